"""y = x (scale u v + S)^T + bias: low rank plus a sparse S with entries anywhere (SLTrain, 2406.02214; OATS, 2409.13652).

x [..., k]   v [r, k]   u [n, r]   values [nnz]   starts [n + 1] int32   columns [nnz]   bias [n]   y [..., n]
S in rows (CSR): row i holds values[starts[i]:starts[i + 1]] at the inputs columns[starts[i]:starts[i + 1]], strictly
ascending; columns is int16 where k <= 32768, else int32. r and nnz may be 0.

    h = scale x v^T              [m, r], rounded once
    y = h u^T + x S^T + bias     "split"; or, with the same result but for rounding,
    W = scale u v + S            [n, k], rounded once
    y = x W^T + bias             "materialize"

What S does not hold is skipped or multiplied by zero, as suits the kernel: Inf or NaN in x reaches at least the outputs that
have an entry for its input, and no other token's. In bf16 on a CPU, subnormal inputs, middles and sums may count as zero."""
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import ArgumentError, DtypeError, IndexRangeError, ShapeError
from ._kinds import check_kinds
from ._library import CHECKS_INDICES, autocast, below_autograd, define, differentiable, in_transform, refuse
from .low_rank import check as check_factors

OP = "low_rank_sparse"
INT16_INPUTS = 2**15  # as many columns int16 counts
MAX_ENTRIES = 2**31 - 1  # of S, in int32


def check(x: Tensor, v: Tensor, u: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None,
          scale: float, dy: Tensor | None = None, h: Tensor | None = None) -> None:
    """Raise the error that names what is wrong with these arguments, if anything is; starts and columns are not read."""
    check_kinds(OP, x, {"v": v, "u": u, "values": values}, {"bias": bias, "dy": dy, "h": h}, {"starts": starts},
                (torch.int32,))
    check_kinds(OP, x, {}, {}, {"columns": columns}, (torch.int16, torch.int32))
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise ArgumentError(f"{OP}: scale must be a number, found {scale!r}")
    check_factors(x, v, u, bias, dy, op=OP)
    n, k, h_shape = u.shape[0], x.shape[-1], [prod(x.shape[:-1]), v.shape[0]]
    most = min(n * k, MAX_ENTRIES)
    if values.dim() != 1 or columns.shape != values.shape:
        raise ShapeError(f"{OP}: values {list(values.shape)} must be [nnz] and columns {list(columns.shape)} the same")
    if values.shape[0] > most:
        raise ShapeError(f"{OP}: values {list(values.shape)} must be at most {most}, for {k} to {n} features")
    if starts.shape != (n + 1,):
        raise ShapeError(f"{OP}: starts {list(starts.shape)} must be [{n + 1}]: where each row of u {list(u.shape)} begins, "
                         f"and the last one ends")
    if columns.dtype != index_dtype(k):
        raise DtypeError(f"{OP}: columns has {columns.dtype}, must be {index_dtype(k)} for {k} features")
    if h is not None and list(h.shape) != h_shape:
        raise ShapeError(f"{OP}: h {list(h.shape)} must be {h_shape}")


def index_dtype(k: int) -> torch.dtype:
    """What the columns of k inputs are stored in."""
    return torch.int16 if k <= INT16_INPUTS else torch.int32


def check_support(starts: Tensor, columns: Tensor, k: int) -> None:
    """Raise IndexRangeError, naming the first bad row, unless starts [n + 1] rises from 0 to the length of columns [nnz] and
    the columns of every row rise strictly within 0..k - 1 (ShapeError for what has not one dimension).

    For whoever builds or loads a support: it reads it, which waits for a GPU. The op does so only with
    LOWFAT_DEBUG_CHECK=1."""
    if starts.dim() != 1 or columns.dim() != 1 or starts.shape[0] < 1:
        raise ShapeError(f"{OP}: starts {list(starts.shape)} must be [n + 1] and columns {list(columns.shape)} [nnz]")
    if starts.is_meta or columns.is_meta:
        return
    starts, columns, rows = starts.long(), columns.long(), starts.shape[0] - 1
    if starts[0] != 0:
        raise IndexRangeError(f"{OP}: starts has {int(starts[0])} for row 0, must begin with 0")
    for row in (starts.diff() < 0).nonzero().flatten()[:1].tolist():
        raise IndexRangeError(f"{OP}: starts falls from {int(starts[row])} to {int(starts[row + 1])} behind row {row}, must "
                              f"rise")
    if starts[-1] != columns.shape[0]:
        raise IndexRangeError(f"{OP}: starts has {int(starts[-1])} behind the last row, {rows - 1}, must end with "
                              f"{columns.shape[0]}, as many as columns has")
    row_of = torch.repeat_interleave(torch.arange(rows, device=starts.device), starts.diff())
    before = torch.cat([columns.new_full((1,), -1), columns[:-1]])[:columns.shape[0]]
    is_first = starts[row_of] == torch.arange(columns.shape[0], device=starts.device)
    bad = (columns < 0) | (columns >= k) | (~is_first & (columns <= before))
    for entry in bad.nonzero().flatten()[:1].tolist():
        row = int(row_of[entry])
        after = "" if is_first[entry] else f" and above the one before it, which is {int(before[entry])}"
        place = entry - int(starts[row])
        raise IndexRangeError(f"{OP}: columns has {int(columns[entry])} in place {place} of row {row}, must be in "
                              f"0..{k - 1}{after}")


# --- the sparse matrix ---

def places(starts: Tensor, columns: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Where each value is in the matrix [n k], flat, and whether it is in it at all.   int64 [nnz], bool [nnz]

    In range for any support whatever, and found without reading it."""
    ordinals = torch.arange(columns.shape[0], dtype=torch.int32, device=columns.device)
    ends = starts[1:].cummax(0).values  # the same where they rise
    rows = torch.searchsorted(ends, ordinals, right=True)  # the first that ends behind it
    columns = columns.long()
    is_inside = (rows < n) & (columns >= 0) & (columns < k)
    return torch.where(is_inside, rows * k + columns, 0), is_inside


def entries(values: Tensor, starts: Tensor, columns: Tensor, n: int, k: int) -> Tensor:
    """S, dense.   [n, k]"""
    if values.shape[0] == 0:
        return values.new_zeros(n, k)
    place, is_inside = places(starts, columns, n, k)
    return values.new_zeros(n * k).index_put((place,), torch.where(is_inside, values, 0), accumulate=True).view(n, k)


def weight_of(v: Tensor, u: Tensor, values: Tensor, starts: Tensor, columns: Tensor, scale: float) -> Tensor:
    """scale u v + S, rounded once.   [n, k]"""
    low_rank = (_wide(u) @ _wide(v)) * scale
    return (low_rank + entries(_wide(values), starts, columns, *low_rank.shape)).to(v.dtype)


# --- references ---

def split(x: Tensor, v: Tensor, u: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None,
          scale: float) -> tuple[Tensor, Tensor]:
    """(y, h) of the products with each part.   x [m, k]"""
    h = middle(x, v, scale)
    return joined(h, u, x, entries(values, starts, columns, u.shape[0], v.shape[1]), bias), h


def materialize(x: Tensor, v: Tensor, u: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None,
                scale: float) -> Tensor:
    """y of one product with the whole matrix, made for this call.   x [m, k]"""
    return linear(x, weight_of(v, u, values, starts, columns, scale), bias)


def middle(x: Tensor, v: Tensor, scale: float) -> Tensor:
    """scale x v^T, rounded once."""
    return (linear(_wide(x), _wide(v)) * scale).to(x.dtype)


def joined(h: Tensor, u: Tensor, x: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
    """h u^T + x s^T + bias, rounded once."""
    low_rank = linear(_wide(h), _wide(u), None if bias is None else _wide(bias))
    return (low_rank + linear(_wide(x), _wide(s))).to(x.dtype)


def _wide(t: Tensor) -> Tensor:
    """In fp32 at least, and contiguous: the same bits for every layout of the same values."""
    return t.to(torch.promote_types(t.dtype, torch.float32)).contiguous()


def reference(x: Tensor, v: Tensor, u: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None,
              scale: float) -> Tensor:
    return reference_training(x, v, u, values, starts, columns, bias, scale)[0]


def reference_training(x: Tensor, v: Tensor, u: Tensor, values: Tensor, starts: Tensor, columns: Tensor,
                       bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    check(x, v, u, values, starts, columns, bias, scale)
    y, h = split(x.reshape(prod(x.shape[:-1]), x.shape[-1]), v, u, values, starts, columns, bias, scale)
    return y.view(*x.shape[:-1], u.shape[0]), h


def reference_backward(dy: Tensor, x: Tensor, h: Tensor | None, v: Tensor, u: Tensor, values: Tensor, starts: Tensor,
                       columns: Tensor, needs: int, scale: float):
    """Bit i of needs: the gradient of input i of (x, v, u, values, starts, columns, bias) is wanted, else it comes back
    empty. Of starts and columns there is none."""
    check(x, v, u, values, starts, columns, None, scale, dy, h)
    m, n, k = prod(x.shape[:-1]), u.shape[0], v.shape[1]
    dy, rows = dy.reshape(m, n).contiguous(), x.reshape(m, k).contiguous()
    dx = dv = du = dvalues = db = None
    if needs & 0b0000011:
        dh = middle(dy, u.mT, scale)  # [m, r]
        if needs & 0b0000001:
            dx = joined(dh, v.mT, dy, entries(values, starts, columns, n, k).mT, None).reshape(x.shape)
        dv = dh.mT @ rows if needs & 0b0000010 else None
    if needs & 0b0000100:
        du = dy.mT @ (middle(rows, v, scale) if h is None else h)
    if needs & 0b0001000:
        place, is_inside = places(starts, columns, n, k)
        found = (_wide(dy).mT @ _wide(rows)).flatten().index_select(0, place)
        dvalues = torch.where(is_inside, found, 0).to(x.dtype)
    if needs & 0b1000000:
        db = dy.sum(0)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in (dx, dv, du, dvalues, db))


_forward = define("low_rank_sparse(Tensor x, Tensor v, Tensor u, Tensor values, Tensor starts, Tensor columns, "
                  "Tensor? bias, float scale) -> Tensor", reference)
_training = define("low_rank_sparse_training(Tensor x, Tensor v, Tensor u, Tensor values, Tensor starts, Tensor columns, "
                   "Tensor? bias, float scale) -> (Tensor y, Tensor h)", reference_training)
_backward = define("low_rank_sparse_backward(Tensor dy, Tensor x, Tensor? h, Tensor v, Tensor u, Tensor values, "
                   "Tensor starts, Tensor columns, int needs, float scale)"
                   " -> (Tensor dx, Tensor dv, Tensor du, Tensor dvalues, Tensor db)", reference_backward, casts=False)
_recorded = differentiable(_forward, _training, _backward, reference=reference_training, read=6, constants=1,
                           indices=(4, 5), reads_middle=2)


def low_rank_sparse(x: Tensor, v: Tensor, u: Tensor, values: Tensor, starts: Tensor, columns: Tensor,
                    bias: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """Multiply by scale u v + S, low rank plus sparse (SLTrain, 2406.02214).

    x [..., k]   v [r, k]   u [n, r]   values [nnz]   starts [n + 1] int32 and columns [nnz] int16, or int32 above 32768
    features: where the values are, row by row (see check_sparse_support)   bias [n]   returns [..., n]

    Raises ShapeError, DtypeError, DeviceError or ArgumentError, naming the argument. Second derivatives raise
    UnsupportedError, and so do tensors that torch cannot route to the op (sparse, sharded)."""
    try:
        if torch.compiler.is_compiling():
            return _forward(x, v, u, values, starts, columns, bias, scale)
        if CHECKS_INDICES:
            check(x, v, u, values, starts, columns, bias, scale)
            check_support(starts, columns, x.shape[-1])
        if in_transform():
            return reference(x, v, u, values, starts, columns, bias, scale)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, v, u, values, bias)):
            return below_autograd(_forward, x, v, u, values, starts, columns, bias, scale)
        return _recorded(*autocast(x, v, u, values, starts, columns, bias), scale)
    except (RuntimeError, TypeError, AttributeError) as error:
        refuse(error, OP, check, x, v, u, values, starts, columns, bias, scale)
