"""y = S (D x) + bias: a dense dictionary of atoms and a sparse S with s non-zeros per row, both in P x Q blocks (one block:
CoSpaDi, 2509.22075; more: DSFormer, 2312.13211).

x [..., k]   d [P, Q, a, p]   values [n, Q s]   support   bias [n]   y [..., n]
p = ceil(k / Q) inputs and ceil(n / P) outputs of a block: sizes that the blocks do not divide are padded with zeros

    h[o] = [D[o, 0] x[0], D[o, 1] x[1], ...]          [P, m, Q a], x[q] the q-th p of the inputs: the middle, rounded once
    y[i] = sum over q and the s kept atoms j of block q of values[i, q, j] h[o][q, j] + bias[i],  o = i // ceil(n / P)

support says which atoms a row keeps; its dtype, in what form. Values are in ascending order of the atoms within each block.
int32 [n, Q ceil(a / 32)]: a bitmap for each block (see bitmap.py). int16 [n, Q s]: the atoms' numbers, strictly ascending
within each block; then a is at most 32767. What is not kept is skipped or multiplied by zero, as suits the kernel.
In bf16 on a CPU, subnormal inputs, middles and sums may count as zero."""
from math import ceil, prod

import torch
from torch import Tensor

from ..errors import IndexRangeError, ShapeError
from ._kinds import check_kinds
from ._library import CHECKS_INDICES, autocast, below_autograd, define, differentiable, in_transform, refuse
from .bitmap import WORD, check_entries, expand, places, unpack, words
from .monarch import join_inputs, join_outputs, split_inputs, split_outputs

OP = "dictionary"
MAX_POSITIONS = 2**15 - 1  # atoms of a block, in int16


def check(x: Tensor, d: Tensor, values: Tensor, support: Tensor, bias: Tensor | None, dy: Tensor | None = None,
          h: Tensor | None = None) -> None:
    """Raise the error that names what is wrong with these arguments, if anything is; the values of support are not read."""
    check_kinds(OP, x, {"d": d, "values": values}, {"bias": bias, "dy": dy, "h": h}, {"support": support},
                (torch.int32, torch.int16))
    if d.dim() != 4 or min(d.shape[:2]) < 1:
        raise ShapeError(f"{OP}: d {list(d.shape)} must be [P, Q, a, p], with at least one block")
    p_out, q, a, p = d.shape
    check_entries(OP, x.device, a)
    if x.dim() < 1 or ceil(x.shape[-1] / q) != p:
        raise ShapeError(f"{OP}: x {list(x.shape)} must have {q * p} features, or up to {q - 1} less: {q} blocks of {p} "
                         f"(d {list(d.shape)})")
    if values.dim() != 2 or values.shape[1] % q or values.shape[1] > q * a:
        raise ShapeError(f"{OP}: values {list(values.shape)} must be [n, {q} s], s of the {a} atoms in each of {q} blocks")
    check_support_shape(support, values, q, a)
    n = values.shape[0]
    if bias is not None and bias.shape != (n,):
        raise ShapeError(f"{OP}: bias {list(bias.shape)} must be [{n}], the rows of values {list(values.shape)}")
    for name, t, shape in (("dy", dy, (*x.shape[:-1], n)), ("h", h, (p_out, prod(x.shape[:-1]), q * a))):
        if t is not None and t.shape != shape:
            raise ShapeError(f"{OP}: {name} {list(t.shape)} must be {list(shape)}")


def check_support_shape(support: Tensor, values: Tensor, q: int, a: int) -> None:
    n, stored = values.shape
    if support.dtype == torch.int16 and a > MAX_POSITIONS:
        raise ShapeError(f"{OP}: positions in int16 reach {MAX_POSITIONS} atoms, found {a}; use a bitmap")
    due, why = ((n, q * words(a)), f"a bit for each of {a} atoms in words of {WORD}, {q} times") \
        if support.dtype == torch.int32 else ((n, stored), "an atom for each value")
    if support.shape != due:
        raise ShapeError(f"{OP}: support {list(support.shape)} must be {list(due)}, {why}")


def check_support(support: Tensor, blocks: int, atoms: int, nonzeros: int) -> None:
    """Raise IndexRangeError, naming the first bad row and block, unless every row keeps `nonzeros` of the atoms of each of
    its blocks: bitmap [n, Q words] int32, or strictly ascending positions [n, Q s] int16 (ShapeError for other widths).

    For whoever builds or loads a support: it reads it, which waits for a GPU. The op does so only with
    LOWFAT_DEBUG_CHECK=1."""
    is_bitmap = support.dtype == torch.int32
    width = blocks * (words(atoms) if is_bitmap else nonzeros)
    if support.dim() != 2 or support.shape[1] != width:
        raise ShapeError(f"{OP}: support {list(support.shape)} must be [n, {width}]")
    if support.is_meta or not support.numel():
        return
    found = support.unflatten(1, (blocks, width // blocks))
    if is_bitmap:
        bits = unpack(found, words(atoms) * WORD)
        counts = bits[..., :atoms].sum(-1)
        for row, block in (counts != nonzeros).nonzero()[:1].tolist():
            raise IndexRangeError(f"{OP}: support keeps {int(counts[row, block])} atoms in block {block} of row {row}, must "
                                  f"keep {nonzeros}")
        for row, block in bits[..., atoms:].any(-1).nonzero()[:1].tolist():
            raise IndexRangeError(f"{OP}: support has bits behind its {atoms} atoms in block {block} of row {row}, must be "
                                  f"zero there")
        return
    before = torch.cat([found.new_full((*found.shape[:2], 1), -1), found[..., :-1]], dim=-1)
    bad = (found <= before) | (found >= atoms)
    for row, block, i in bad.nonzero()[:1].tolist():
        after = f" and above the one before it, which is {int(found[row, block, i - 1])}" if i > 0 else ""
        raise IndexRangeError(f"{OP}: support has {int(found[row, block, i])} in place {i} of block {block} of row {row}, "
                              f"must be in 0..{atoms - 1}{after}")


# --- the sparse factor ---

def kept_atoms(support: Tensor, blocks: int, atoms: int) -> Tensor:
    """bool [n, Q, a] of either form. In range for any support whatever, and found without reading it."""
    found = support.unflatten(1, (blocks, support.shape[1] // blocks))
    if support.dtype == torch.int32:
        return unpack(found, atoms)
    if found.shape[-1] == 0:
        return found.new_zeros((*found.shape[:2], atoms), dtype=torch.bool)
    found = found.contiguous()
    columns = torch.arange(atoms, dtype=torch.int16, device=found.device).expand(*found.shape[:2], atoms).contiguous()
    nearest = torch.searchsorted(found, columns).clamp(max=found.shape[-1] - 1)
    return found.gather(-1, nearest) == columns


def coefficients(values: Tensor, support: Tensor, blocks: int, atoms: int) -> Tensor:
    """S, dense.   [n, Q a]"""
    kept = kept_atoms(support, blocks, atoms)
    return expand(values.unflatten(1, (blocks, values.shape[1] // blocks)), kept).flatten(1)


# --- references ---

def reference(x: Tensor, d: Tensor, values: Tensor, support: Tensor, bias: Tensor | None) -> Tensor:
    return reference_training(x, d, values, support, bias)[0]


def reference_training(x: Tensor, d: Tensor, values: Tensor, support: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    check(x, d, values, support, bias)
    (p_out, q, a, p), n = d.shape, values.shape[0]
    size = ceil(n / p_out)
    h = middle(split_inputs(x.reshape(prod(x.shape[:-1]), x.shape[-1]), q, p), d)
    s = split_rows(coefficients(values, support, q, a), p_out)
    if bias is None:
        y = torch.bmm(h, s.mT)
    else:  # added before the only rounding
        y = torch.baddbmm(split_outputs(bias[None], p_out, size, False), h, s.mT)
    return join_outputs(y, n, False).view(*x.shape[:-1], n), h


def middle(x: Tensor, d: Tensor) -> Tensor:
    """x [Q, m, p], d [P, Q, a, p] -> h [P, m, Q a]"""
    p_out, q, a, _ = d.shape
    return torch.matmul(x, d.mT).transpose(1, 2).reshape(p_out, x.shape[1], q * a).contiguous()


def split_rows(s: Tensor, blocks: int) -> Tensor:
    """[n, Q a] -> [P, ceil(n / P), Q a]"""
    return split_outputs(s.mT, blocks, ceil(len(s) / blocks), False).mT


def reference_backward(dy: Tensor, x: Tensor, h: Tensor | None, d: Tensor, values: Tensor, support: Tensor, needs: int):
    """Bit i of needs: the gradient of input i of (x, d, values, support, bias) is wanted, else it comes back empty. Of the
    support there is none."""
    check(x, d, values, support, None, dy, h)
    (p_out, q, a, p), n, k, m = d.shape, values.shape[0], x.shape[-1], prod(x.shape[:-1])
    dy = dy.reshape(m, n)
    blocks_dy = split_outputs(dy, p_out, ceil(n / p_out), False)  # [P, m, ceil(n / P)]
    blocks_x = split_inputs(x.reshape(m, k), q, p)  # [Q, m, p]
    dx = dd = dvalues = db = None
    if needs & 0b00011:
        dh = torch.bmm(blocks_dy, split_rows(coefficients(values, support, q, a), p_out)).view(p_out, m, q, a)
        if needs & 0b00001:  # one sum over all atoms of all output blocks
            dz = dh.permute(2, 1, 0, 3).reshape(q, m, p_out * a)
            dx = join_inputs(torch.bmm(dz, d.transpose(0, 1).reshape(q, p_out * a, p)), k).reshape(x.shape)
        dd = torch.matmul(dh.permute(0, 2, 3, 1), blocks_x).contiguous() if needs & 0b00010 else None
    if needs & 0b00100:
        h = middle(blocks_x, d) if h is None else h
        ds = torch.bmm(blocks_dy.mT, h).reshape(-1, q, a)[:n]
        dvalues = ds.gather(-1, places(kept_atoms(support, q, a), values.shape[1] // q)).flatten(1)
    if needs & 0b10000:
        db = dy.sum(0)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in (dx, dd, dvalues, db))


_forward = define("dictionary(Tensor x, Tensor d, Tensor values, Tensor support, Tensor? bias) -> Tensor", reference)
_training = define("dictionary_training(Tensor x, Tensor d, Tensor values, Tensor support, Tensor? bias)"
                   " -> (Tensor y, Tensor h)", reference_training)
_backward = define("dictionary_backward(Tensor dy, Tensor x, Tensor? h, Tensor d, Tensor values, Tensor support, int needs)"
                   " -> (Tensor dx, Tensor dd, Tensor dvalues, Tensor db)", reference_backward, casts=False)
_recorded = differentiable(_forward, _training, _backward, reference=reference_training, read=4, indices=(3,))


def dictionary(x: Tensor, d: Tensor, values: Tensor, support: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by S D, a sparse matrix of coefficients and a dense dictionary, in P x Q blocks, never forming the product.

    x [..., k]   d [P, Q, a, ceil(k / Q)]   values [n, Q s]   support [n, Q ceil(a / 32)] int32, a bitmap, or [n, Q s] int16,
    positions (see check_dictionary_support)   bias [n]   returns [..., n]

    Raises ShapeError, DtypeError or DeviceError, naming the argument. Second derivatives raise UnsupportedError, and so do
    tensors that torch cannot route to the op (sparse, sharded)."""
    try:
        if torch.compiler.is_compiling():
            return _forward(x, d, values, support, bias)
        if CHECKS_INDICES:
            check(x, d, values, support, bias)
            check_support(support, d.shape[1], d.shape[2], values.shape[1] // d.shape[1])
        if in_transform():
            return reference(x, d, values, support, bias)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, d, values, bias)):
            return below_autograd(_forward, x, d, values, support, bias)
        return _recorded(*autocast(x, d, values, support, bias))
    except (RuntimeError, TypeError, AttributeError) as error:
        refuse(error, OP, check, x, d, values, support, bias)
