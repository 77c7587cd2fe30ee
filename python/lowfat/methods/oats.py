"""OATS (2409.13652): low rank plus sparse, fitted to the weights with each input by how loud it is.

W_s = W diag(sqrt(C_jj)), C = X^T X of the calibration inputs X. In turn, 80 times at most,
    L = SVD_r(W_s - S)      S = the `kept` largest of each group of (W_s - L)
both the closest of their kind, so that ||W_s - L - S||_F never grows; the scale is taken off at the end. A group is some
neighbours of a row, N:M, or where a density is given the whole row.
"""
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from ..linalg import balance, require_rank, truncated_svd
from ..structures import LowRank, LowRankSparse, Sum
from ..structures.low_rank_sparse import index_dtype, share_of, stored_support
from ..structures.sparse24 import Sparse24, check_groups, largest_of_groups
from . import dictionary, prune, whitened

if TYPE_CHECKING:
    from ..stats import Stats

_STEPS = 80
_GAIN = 1e-4  # relative; it ends where a step brings less


def check_kept(kept: int) -> None:
    if not isinstance(kept, int) or isinstance(kept, bool) or kept < 1:
        raise ArgumentError(f"kept must be a whole number above 0; found {kept!r}")


ARGUMENTS = {"kept": check_kept, "group": prune.check_group, "density": dictionary.check_density}


def require(stats: "Stats | None", **arguments) -> None:
    if stats is None:
        raise ArgumentError("oats needs calibration statistics, found none; pass stats=calibrate(model, batches)")


def pattern_of(k: int, *, kept: int = 1, group: int = 4, density: float | None = None) -> tuple[int, int]:
    """(kept, group) of a row of k inputs; a density keeps its share of the whole row, whatever kept and group."""
    if density is not None:
        dictionary.check_density(density)
        if not 1 <= (kept := share_of(density, k)) < k:
            raise ShapeError(f"density {density} keeps {kept} of {k} inputs of a row, must keep 1 to {k - 1} of them")
        return kept, k
    check_kept(kept)
    prune.check_group(group)
    check_groups(k, kept, group)
    if kept == group:
        raise ShapeError(f"kept must be below the group, {group}; found {kept}, which is the dense weight")
    return kept, group


def size(k: int, n: int, **arguments) -> tuple[int, int]:
    """Of what was asked for: ArgumentError for kept or group beside a density, which decides what is kept."""
    density, others = arguments.get("density"), [name for name in ("kept", "group") if name in arguments]
    if density is not None and others:
        raise ArgumentError(f"density {density} and {others[0]} {arguments[others[0]]}: needs one of them")
    pattern_of(k, **arguments)
    return k + n, min(k, n)


def count(k: int, n: int, *, rank: int, **arguments) -> tuple[int, int]:
    kept, group = pattern_of(k, **arguments)
    parameters, index_bytes = prune.count(k, n, rank=kept, group=group)
    if arguments.get("density") is not None:
        index_bytes = 4 * (n + 1) + parameters * index_dtype(k).itemsize
    return parameters + rank * (k + n), index_bytes


@torch.no_grad()
def factorize(weight: Tensor, bias: Tensor | None, stats: "Stats", *, rank: int, kept: int = 1, group: int = 4,
              density: float | None = None) -> tuple[Sum | LowRankSparse, list[str]]:
    """The layer in the weight's dtype: the sum of a LowRank and a Sparse24, or with a density a LowRankSparse.

    weight [n, k]   bias [n]   rank: of the low-rank part. kept, group: so many of every so many inputs of an output are in
    the sparse part; density: or that share of each output's inputs, wherever they are. Raises ArgumentError without
    calibration statistics, NumericsError for NaN or infinity, ShapeError for sizes that do not fit."""
    kept, group = pattern_of(weight.shape[1], kept=kept, group=group, density=density)
    scale, events = _scale(weight, stats)
    require_rank(rank, weight)
    scaled = (weight.double() * scale).to(torch.promote_types(weight.dtype, torch.float32))
    u, v, sparse, keep, more = split(scaled, rank, kept, group)
    u, v = balance(u, v / scale, weight.dtype)
    sparse = (sparse / scale).to(weight.dtype)
    if density is None:
        layer = Sum.of([LowRank.of(v, u), Sparse24.from_mask(sparse, keep, n=kept, m=group)], bias)
    else:
        layer = LowRankSparse.of(v, u, sparse[keep], *stored_support(keep), bias)
    return layer, sorted({*events, *more})


@torch.no_grad()
def losses(weight: Tensor, stats: "Stats", *, kept: int = 1, group: int = 4, density: float | None = None) -> Tensor:
    """||(W - What) diag(sqrt(C_jj))||_F^2 after the first step, for every rank.   [min(n, k) + 1], fp64"""
    kept, group = pattern_of(weight.shape[1], kept=kept, group=group, density=density)
    scale, _ = _scale(weight, stats)
    scaled = weight.double() * scale
    u, s, vt, _ = truncated_svd(scaled, min(weight.shape))

    def missing(rank: int) -> float:
        rest = scaled - (u[:, :rank] * s[:rank]) @ vt[:rank]
        return float((rest * ~largest_of_groups(rest.abs(), kept, group)).square().sum())

    return dictionary.sampled(min(weight.shape), missing)


def _scale(weight: Tensor, stats: "Stats") -> tuple[Tensor, list[str]]:
    """(sqrt(C_jj), damped, so that none is zero [k] fp64, events)"""
    require(stats)
    gram, shift, events = whitened.damped(weight, stats)
    return (gram.diagonal().double() + shift).sqrt(), events


def split(scaled: Tensor, rank: int, kept: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """(u [n, r], v [r, k], sparse [n, k], where it is [n, k] bool, events) with u v + sparse close to the matrix [n, k]"""
    sparse, before, best, events = torch.zeros_like(scaled), torch.inf, None, []
    for _ in range(_STEPS):
        u, s, vt, solved = truncated_svd(scaled - sparse, rank)
        events += solved.events
        rest = scaled - ((u * s) @ vt).to(scaled.dtype)
        keep = largest_of_groups(rest.abs(), kept, group)
        sparse = rest * keep
        lost = float((rest - sparse).square().sum(dtype=torch.float64))
        if not lost < before:  # at the rounding error
            break
        gain, before, best = before - lost, lost, (u * s, vt, sparse, keep)
        if not gain > _GAIN * lost:
            break
    return *(best or (u * s, vt, sparse, keep)), events
