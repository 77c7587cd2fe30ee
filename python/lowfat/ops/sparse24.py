"""y = x W^T + bias, where W keeps `kept` of every `group` neighbours of a row (2 of 4, or any N:M along k).

x [..., k]   values [n, k kept / group]   mask [n, ceil(k / 32)] int32   bias [n]   y [..., n]
mask: a bitmap of the kept inputs of each row (see bitmap.py); values of a row in ascending order of the inputs.
What is not kept is skipped or multiplied by zero, as suits the kernel: Inf or NaN in x reaches at least the outputs that
keep its input, and no other token's. In bf16 on a CPU, subnormal inputs and sums may count as zero."""
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import IndexRangeError, ShapeError
from ._kinds import check_kinds
from ._library import CHECKS_INDICES, autocast, below_autograd, define, differentiable, in_transform, refuse
from .bitmap import WORD, check_entries, expand, places, unpack, words

OP = "sparse24"


def check(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, kept: int, group: int,
          dy: Tensor | None = None) -> None:
    """Raise the error that names what is wrong with these arguments, if anything is; the bits of mask are not read."""
    check_kinds(OP, x, {"values": values}, {"bias": bias, "dy": dy}, {"mask": mask}, (torch.int32,))
    check_pattern(kept, group)
    if x.dim() < 1:
        raise ShapeError(f"{OP}: x has no dimensions, must be [..., k]")
    k = x.shape[-1]
    if k % group:
        raise ShapeError(f"{OP}: x has {k} features, must be a multiple of {group} for {kept}:{group}")
    check_entries(OP, x.device, k)
    if values.dim() != 2 or values.shape[1] != k // group * kept:
        raise ShapeError(f"{OP}: values {list(values.shape)} must be [n, {k // group * kept}]: of the {k} features of x "
                         f"{kept} of every {group}")
    n = values.shape[0]
    if mask.shape != (n, words(k)):
        raise ShapeError(f"{OP}: mask {list(mask.shape)} must be [{n}, {words(k)}], a bit for each of {k} features in words "
                         f"of {WORD}")
    if bias is not None and bias.shape != (n,):
        raise ShapeError(f"{OP}: bias {list(bias.shape)} must be [{n}], the rows of values {list(values.shape)}")
    if dy is not None and dy.shape != (*x.shape[:-1], n):
        raise ShapeError(f"{OP}: dy {list(dy.shape)} must be {[*x.shape[:-1], n]}")


def check_pattern(kept: int, group: int) -> None:
    if type(kept) is not int or type(group) is not int or not 1 <= kept <= group:
        raise ShapeError(f"{OP}: must keep a whole number from 1 to group of each group, found {kept!r}:{group!r}")


def check_mask(mask: Tensor, k: int, kept: int, group: int) -> None:
    """Raise IndexRangeError, naming the first bad row and group, unless mask [n, words] keeps `kept` of every `group` of k.

    For whoever builds or loads a mask: it reads it, which waits for a GPU. The op does so only with LOWFAT_DEBUG_CHECK=1."""
    if mask.is_meta:
        return
    bits = unpack(mask, words(k) * WORD)
    counts = bits[:, :k].unflatten(1, (k // group, group)).sum(2)
    for row, place in (counts != kept).nonzero()[:1].tolist():
        inputs = f"{place * group}..{place * group + group - 1}"
        raise IndexRangeError(f"{OP}: mask keeps {int(counts[row, place])} of inputs {inputs} in row {row}, must keep "
                              f"{kept} of every {group}")
    for row in bits[:, k:].any(1).nonzero()[:1]:
        raise IndexRangeError(f"{OP}: mask has bits behind its {k} inputs in row {int(row)}, must be zero there")


# --- references ---

def reference(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, kept: int, group: int) -> Tensor:
    check(x, values, mask, bias, kept, group)
    weight = expand(values, unpack(mask, x.shape[-1]))
    return linear(x.contiguous(), weight, bias)  # contiguous: the same bits for every layout of the same values


def reference_backward(dy: Tensor, x: Tensor, values: Tensor, mask: Tensor, needs: int, kept: int, group: int):
    """Bit i of needs: the gradient of input i of (x, values, mask, bias) is wanted, else it comes back empty. Of the mask
    there is none."""
    check(x, values, mask, None, kept, group, dy)
    (n, stored), k, m = values.shape, x.shape[-1], prod(x.shape[:-1])
    dy, rows, bits = dy.reshape(m, n), x.reshape(m, k), unpack(mask, k)
    dx = dvalues = db = None
    if needs & 0b0001:
        dx = (dy @ expand(values, bits)).reshape(x.shape)
    if needs & 0b0010:
        dvalues = (dy.mT @ rows).gather(1, places(bits, stored))
    if needs & 0b1000:
        db = dy.sum(0)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in (dx, dvalues, db))


_forward = define("sparse24(Tensor x, Tensor values, Tensor mask, Tensor? bias, int kept, int group) -> Tensor", reference)
_backward = define("sparse24_backward(Tensor dy, Tensor x, Tensor values, Tensor mask, int needs, int kept, int group)"
                   " -> (Tensor dx, Tensor dvalues, Tensor db)", reference_backward, casts=False)
_recorded = differentiable(_forward, None, _backward, reference=reference, read=3, constants=2, indices=(2,))


def sparse24(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None = None, *, kept: int = 2,
             group: int = 4) -> Tensor:
    """Multiply by a weight that keeps `kept` of every `group` neighbours of a row, never forming it where a kernel serves.

    x [..., k]   values [n, k kept / group]   mask [n, ceil(k / 32)], int32 (see check_mask)   bias [n]   returns [..., n]

    Raises ShapeError, DtypeError or DeviceError, naming the argument. Second derivatives raise UnsupportedError, and so do
    tensors that torch cannot route to the op (sparse, sharded)."""
    try:
        if torch.compiler.is_compiling():
            return _forward(x, values, mask, bias, kept, group)
        if CHECKS_INDICES:
            check(x, values, mask, bias, kept, group)
            check_mask(mask, x.shape[-1], kept, group)
        if in_transform():
            return reference(x, values, mask, bias, kept, group)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, values, bias)):
            return below_autograd(_forward, x, values, mask, bias, kept, group)
        return _recorded(*autocast(x, values, mask, bias), kept, group)
    except (RuntimeError, TypeError, AttributeError) as error:
        refuse(error, OP, check, x, values, mask, bias, kept, group)
