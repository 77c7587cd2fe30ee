"""y = scale W^T C W x: factors between the subbands of a wavelet transform of the features (WaRA, 2506.24092).

x [..., k]   v [r, columns]   gain [P, r] or None   u [rows, r]   y [..., n]      transforms: dwt.py

    b[j], half of level j, of x, rounded once                                           [m, ceil(k / 2^j)]
    h[p] = b v[:, columns of p]^T, rounded once: the middle                             [P, m, r]
    c = sum over the pairs p into a half of (h[p] gain[p]) u[rows of p]^T, rounded once [m, ceil(n / 2^j)]
    y = scale * what the inverse transform makes of all c, rounded once                 [m, n]

A pair p goes from one half to another of its level, `HL` from low to high. In this order, coarse to fine:

    all           LL, LH, HL, HH of the last level, then LH, HL, HH of each one before: C is split again where it is LL
    diag          LL, HH of the last level, then HH of each one before
    LL            LL of the last level
    shared+gain   as all, with one v and one u for the pairs of a level, and a gain for each pair

columns and rows of the pairs lie side by side in v and u in that order, those of shared pairs once (see layout). So `diag`
has as many columns as x has coefficients, in the order of dwt. Transforms add in fp32, fp64 in fp64: a kernel may have
them in its loads and stores (of haar two adds and a product) or fold them into the factors, and round no more often than the
reference does."""
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import ArgumentError, ShapeError
from ._kinds import check_kinds
from ._library import autocast, below_autograd, define, differentiable, in_transform, refuse
from .dwt import analyze, band_sizes, check_transform, synthesize

OP = "wavelet"
SUBBANDS = {"all": ("LL", "LH", "HL", "HH"), "diag": ("LL", "HH"), "LL": ("LL",), "shared+gain": ("LL", "LH", "HL", "HH")}


class Pair(NamedTuple):
    """A half of the inputs, a half of the outputs, and the factors between them."""
    source: tuple[int, int]  # level from 0, and 0 for low, 1 for high
    target: tuple[int, int]
    factors: int  # the number of their place in v and u: pairs that share them have the same
    columns: slice  # of v
    rows: slice  # of u
    name: str


def layout(subbands: str, levels: int, k: int, n: int) -> list[Pair]:
    """The pairs in their order; the last has the last columns and rows."""
    pairs, factors, column, row = [], -1, 0, 0
    widths, heights = band_sizes(k, levels), band_sizes(n, levels)
    for level in reversed(range(levels)):
        names = [name for name in SUBBANDS[subbands] if name != "LL" or level == levels - 1]
        for i, name in enumerate(names):
            if i == 0 or subbands != "shared+gain":
                columns, rows = slice(column, column + widths[level]), slice(row, row + heights[level])
                factors, column, row = factors + 1, columns.stop, rows.stop
            target, source = ((level, int(half == "H")) for half in name)
            pairs.append(Pair(source, target, factors, columns, rows, name))
    return pairs


def check(x: Tensor, v: Tensor, gain: Tensor | None, u: Tensor, filter: str, levels: int, subbands: str, n: int,
          dy: Tensor | None = None, h: Tensor | None = None) -> None:
    """Raise the error that names what is wrong with these arguments, if anything is."""
    check_kinds(OP, x, {"v": v, "u": u}, {"gain": gain, "dy": dy, "h": h}, {}, ())
    check_subbands(subbands)
    if x.dim() < 1:
        raise ShapeError(f"{OP}: x has no dimensions, must be [..., k]")
    if n < 0:
        raise ShapeError(f"{OP}: n is {n}, must be at least 0")
    k = x.shape[-1]
    check_transform(filter, levels, k, n, op=OP)
    pairs = layout(subbands, levels, k, n)
    columns, rows = pairs[-1].columns.stop, pairs[-1].rows.stop
    if v.dim() != 2 or v.shape[1] != columns:
        raise ShapeError(f"{OP}: v {list(v.shape)} must be [r, {columns}] for {subbands} of {k} features and {levels} "
                         f"levels (x {list(x.shape)})")
    r = v.shape[0]
    if u.shape != (rows, r):
        raise ShapeError(f"{OP}: u {list(u.shape)} must be {[rows, r]} for {subbands} of {n} features and {levels} "
                         f"levels, and the rank of v {list(v.shape)}")
    if gain is None and subbands == "shared+gain":
        raise ShapeError(f"{OP}: gain is missing, must be {[len(pairs), r]} for {subbands}")
    if gain is not None and gain.shape != (len(pairs), r):
        raise ShapeError(f"{OP}: gain {list(gain.shape)} must be {[len(pairs), r]}, a row for each pair of {subbands}")
    for name, t, shape in (("dy", dy, (*x.shape[:-1], n)), ("h", h, (len(pairs), prod(x.shape[:-1]), r))):
        if t is not None and t.shape != shape:
            raise ShapeError(f"{OP}: {name} {list(t.shape)} must be {list(shape)}")


def check_subbands(subbands: str) -> None:
    if subbands not in list(SUBBANDS):  # a list: what cannot be hashed is none of them either
        raise ArgumentError(f"{OP}: subbands is {subbands!r}, must be one of {', '.join(SUBBANDS)}")


# --- halves of features ---

def halves(x: Tensor, filter: str, levels: int, scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """(low, high) of every level of scale * x, each rounded once to its dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return [tuple((scale * half).to(x.dtype) for half in level) for level in analyze(wide, filter, levels)]


def joined(made: dict[tuple[int, int], Tensor], like: Tensor, size: int, filter: str, levels: int,
           scale: float = 1.0) -> Tensor:
    """The features [..., size] of which these are the halves, times scale, in the dtype and with the rows of like."""
    wide = torch.promote_types(like.dtype, torch.float32)
    made = {where: half.to(wide) for where, half in made.items()}
    bands = [(made.get((level, 0)), made.get((level, 1))) for level in range(levels)]
    return (scale * synthesize(bands, size, filter)).to(like.dtype).reshape(*like.shape[:-1], size)


def gathered(pairs: Sequence[Pair], key: Callable) -> dict[Any, list[int]]:
    """The numbers of the pairs that have the same key."""
    found: dict[Any, list[int]] = {}
    for i, pair in enumerate(pairs):
        found.setdefault(key(pair), []).append(i)
    return found


def beside(parts: Sequence[Tensor], dim: int) -> Tensor:
    """One after the other; one alone as it is, not a copy of it."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


# --- references ---

def reference(x: Tensor, v: Tensor, gain: Tensor | None, u: Tensor, filter: str, levels: int, subbands: str, n: int,
              scale: float) -> Tensor:
    return reference_training(x, v, gain, u, filter, levels, subbands, n, scale)[0]


def reference_training(x: Tensor, v: Tensor, gain: Tensor | None, u: Tensor, filter: str, levels: int, subbands: str, n: int,
                       scale: float) -> tuple[Tensor, Tensor]:
    check(x, v, gain, u, filter, levels, subbands, n)
    pairs = layout(subbands, levels, x.shape[-1], n)
    h = middle(x.reshape(prod(x.shape[:-1]), x.shape[-1]), v, filter, levels, pairs)
    weighed = h if gain is None else h * gain[:, None]
    u = u.contiguous()
    made = {target: linear(beside([weighed[i] for i in members], 1), beside([u[pairs[i].rows] for i in members], 1))
            for target, members in gathered(pairs, lambda pair: pair.target).items()}  # one sum for each half
    return joined(made, x, n, filter, levels, scale), h


def middle(rows: Tensor, v: Tensor, filter: str, levels: int, pairs: Sequence[Pair]) -> Tensor:
    """h of rows [m, k].   [P, m, r]"""
    b = halves(rows.contiguous(), filter, levels)
    v = v.contiguous()  # the same bits for every layout of the same values
    return torch.stack([linear(b[pair.source[0]][pair.source[1]], v[:, pair.columns]) for pair in pairs])


def reference_backward(dy: Tensor, x: Tensor, h: Tensor | None, v: Tensor, gain: Tensor | None, u: Tensor, needs: int,
                       filter: str, levels: int, subbands: str, n: int, scale: float):
    """Bit i of needs: gradient i of (dx, dv, dgain, du) is wanted, else it comes back empty. A transform's transpose is its
    inverse, so that what reaches a half of y is the same half of the transform of scale * dy."""
    check(x, v, gain, u, filter, levels, subbands, n, dy, h)
    k, m = x.shape[-1], prod(x.shape[:-1])
    pairs = layout(subbands, levels, k, n)
    rows = x.reshape(m, k)
    dc = halves(dy.reshape(m, n), filter, levels, scale)
    dc = [dc[pair.target[0]][pair.target[1]] for pair in pairs]  # [m, ceil(n / 2^j)] of each pair
    dx = dv = dgain = du = None
    if needs & 0b1100 and h is None:
        h = middle(rows, v, filter, levels, pairs)
    if needs & 0b0111:
        weighed = torch.stack([half @ u[pair.rows] for half, pair in zip(dc, pairs)])  # [P, m, r]
        dh = weighed if gain is None else weighed * gain[:, None]
    if needs & 0b0001:
        made = {source: beside([dh[i] for i in members], 1) @ beside([v[:, pairs[i].columns] for i in members], 0)
                for source, members in gathered(pairs, lambda pair: pair.source).items()}
        dx = joined(made, x, k, filter, levels)
    if needs & 0b0010:
        b = halves(rows, filter, levels)
        dv = torch.cat([beside([dh[i] for i in members], 0).mT @
                        beside([b[pairs[i].source[0]][pairs[i].source[1]] for i in members], 0)
                        for members in gathered(pairs, lambda pair: pair.factors).values()], dim=1)
    if needs & 0b0100 and gain is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        dgain = (weighed.to(wide) * h.to(wide)).sum(1).to(x.dtype)
    if needs & 0b1000:
        weighed = h if gain is None else h * gain[:, None]
        du = torch.cat([beside([dc[i] for i in members], 0).mT @ beside([weighed[i] for i in members], 0)
                        for members in gathered(pairs, lambda pair: pair.factors).values()])
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in (dx, dv, dgain, du))


_forward = define("wavelet(Tensor x, Tensor v, Tensor? gain, Tensor u, str filter, int levels, str subbands, int n,"
                  " float scale) -> Tensor", reference)
_training = define("wavelet_training(Tensor x, Tensor v, Tensor? gain, Tensor u, str filter, int levels, str subbands,"
                   " int n, float scale) -> (Tensor y, Tensor h)", reference_training)
_backward = define("wavelet_backward(Tensor dy, Tensor x, Tensor? h, Tensor v, Tensor? gain, Tensor u, int needs,"
                   " str filter, int levels, str subbands, int n, float scale)"
                   " -> (Tensor dx, Tensor dv, Tensor dgain, Tensor du)", reference_backward, casts=False)
for _op, _reference in ((_training, reference_training), (_backward, reference_backward)):  # for what kernels do not cover
    define(str(_op._schema).removeprefix("lowfat::").replace("(", "_reference(", 1), _reference)
_recorded = differentiable(_forward, _training, _backward, reference=reference_training, read=4, constants=5)


def wavelet(x: Tensor, v: Tensor, u: Tensor, gain: Tensor | None = None, *, out_features: int, filter: str = "haar",
            levels: int = 1, subbands: str = "diag", scale: float = 1.0) -> Tensor:
    """Multiply by scale W^T C W, W wavelet transforms and C of low rank from subband to subband, never forming it.

    x [..., k]   v [r, columns]   u [rows, r]   gain [P, r]: of each pair of subbands, on its middle   returns [..., n]
    subbands: all, diag, LL or shared+gain; which have which columns and rows says layout. filter: haar, db2, db4 or sym4.

    Raises ShapeError, DtypeError, DeviceError or ArgumentError, naming the argument. Second derivatives raise
    UnsupportedError, and so do tensors that torch cannot route to the op (sparse, sharded)."""
    options = filter, levels, subbands, out_features, scale
    try:
        if torch.compiler.is_compiling():
            return _forward(x, v, gain, u, *options)
        if in_transform():
            return reference(x, v, gain, u, *options)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, v, gain, u)):
            return below_autograd(_forward, x, v, gain, u, *options)
        return _recorded(*autocast(x, v, gain, u), *options)
    except (RuntimeError, TypeError, AttributeError) as error:
        refuse(error, OP, lambda: _check_options(levels, out_features, scale) or check(x, v, gain, u, *options[:4]))


def _check_options(levels: int, out_features: int, scale: float) -> None:
    """What the dispatcher refuses in its own words."""
    for name, number, kind in (("levels", levels, int), ("out_features", out_features, int), ("scale", scale, (int, float))):
        if not isinstance(number, kind) or isinstance(number, bool):
            raise ArgumentError(f"{OP}: {name} must be a {'whole ' if kind is int else ''}number, found {number!r}")
