"""The low-rank product whose u is the identity in r of its rows (PIFA): y is h = x v^T at the pivots, h c^T elsewhere.

x [..., k]   v [r, k], the pivot rows of the weight   c [n - r, r], the other rows by those   y [..., n]
pivots [r], int64, strictly ascending in 0..n-1: where y has the columns of h; those of h c^T take the other places in their
order. bias [n] is added. r (n + k - r) numbers for a weight of rank r, r^2 fewer than two factors have."""
import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import DeviceError, DtypeError, IndexRangeError, ShapeError
from ._library import CHECKS_INDICES, below_autograd, composite_gradient, define, is_recorded, refuse
from .low_rank import check as check_factors

OP = "low_rank_pivoted"


def check(x: Tensor, v: Tensor, c: Tensor, pivots: Tensor, bias: Tensor | None = None) -> None:
    """Raise the error that names what is wrong with these arguments, if anything is; the values of pivots are not read."""
    check_factors(x, v, c, bias, op=OP, names=("v", "c", "bias"), is_pivoted=True)
    check_kind(pivots)
    if pivots.shape != v.shape[:1]:
        raise ShapeError(f"{OP}: pivots {list(pivots.shape)} must be [{v.shape[0]}], the rows of v {list(v.shape)}")
    if pivots.device != x.device:
        raise DeviceError(f"{OP}: pivots is on {pivots.device}, x is on {x.device}; all must be on one device")


def check_kind(pivots: Tensor) -> None:
    if not isinstance(pivots, Tensor):
        raise DtypeError(f"{OP}: pivots must be a tensor, found {type(pivots).__name__}")
    if pivots.dtype != torch.int64:
        raise DtypeError(f"{OP}: pivots has {pivots.dtype}, must be int64")
    if pivots.dim() != 1:
        raise ShapeError(f"{OP}: pivots {list(pivots.shape)} must have one dimension")


def check_pivots(pivots: Tensor, n: int) -> None:
    """Raise IndexRangeError, naming the first bad position, unless pivots [r] is strictly ascending in 0..n-1.

    For whoever builds or loads pivots: it reads them, which waits for a GPU. The op does so only with LOWFAT_DEBUG_CHECK=1;
    without, bad pivots give wrong numbers, and never an access out of bounds."""
    check_kind(pivots)
    if pivots.is_meta:
        return
    before = torch.cat([pivots.new_full((1,), -1), pivots[:-1]])
    bad = ((pivots <= before) | (pivots < 0) | (pivots >= n)).nonzero()
    if len(bad) > 0:
        i = int(bad[0])
        after = f" and above pivots[{i - 1}], which is {int(pivots[i - 1])}" if i > 0 else ""
        raise IndexRangeError(f"{OP}: pivots[{i}] is {int(pivots[i])}, must be in 0..{n - 1}{after}")


def source(pivots: Tensor, n: int) -> Tensor:
    """Which column of [h, h c^T] each column of y is. In range for any pivots whatever, and found without reading them."""
    columns = torch.arange(n, device=pivots.device)
    pivots = pivots.contiguous()
    before = torch.searchsorted(pivots, columns)  # pivots left of the column
    is_pivot = torch.searchsorted(pivots, columns, right=True) > before
    return torch.where(is_pivot, before, len(pivots) + columns - before).clamp(0, n - 1)


def reference(x: Tensor, v: Tensor, c: Tensor, pivots: Tensor, bias: Tensor | None = None) -> Tensor:
    check(x, v, c, pivots, bias)
    h = linear(x.contiguous(), v.contiguous())  # contiguous: the same bits for every layout of the same values
    both = torch.cat([h, linear(h, c.contiguous())], dim=-1)
    y = both.index_select(-1, source(pivots, both.shape[-1]))
    return y if bias is None else y + bias


_forward = define("low_rank_pivoted(Tensor x, Tensor v, Tensor c, Tensor pivots, Tensor? bias=None) -> Tensor", reference)
composite_gradient(_forward, reference)


def low_rank_pivoted(x: Tensor, v: Tensor, c: Tensor, pivots: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by the weight [n, k] whose rows at pivots are v and whose other rows are c v.

    x [..., k]   v [r, k]   c [n - r, r]   pivots [r], int64, strictly ascending (see check_pivots)   bias [n]
    returns [..., n]

    Raises ShapeError, DtypeError or DeviceError, naming the argument, and UnsupportedError for tensors that torch cannot
    route to the op (sparse, sharded). Gradients are torch's own: second derivatives work."""
    if torch.compiler.is_compiling():
        return _forward(x, v, c, pivots, bias)
    try:
        if CHECKS_INDICES:
            check(x, v, c, pivots, bias)
            check_pivots(pivots, v.shape[0] + c.shape[0])
        if is_recorded(x, v, c, bias):
            return _forward(x, v, c, pivots, bias)
        return below_autograd(_forward, x, v, c, pivots, bias)
    except (RuntimeError, TypeError, AttributeError) as error:
        refuse(error, OP, check, x, v, c, pivots, bias)
