"""Blocks of rank r each, Monarch (Dao et al. 2022) or block-wise low rank (Gupta et al.): the closest ones to a weight.

The b_in x b_out blocks are disjoint, so in the Frobenius norm each is replaced by its own truncated SVD, also with weights
o_i c_j on the entries. On calibration inputs, with C = X^T X, blocks that share outputs interact: for each row of blocks,
min tr(E C E^T), E = [W_i - What_i], goes input block by input block, each step the closed form with the others fixed, in
factors of C_ii = L_i L_i^T throughout:
    What_i L_i = SVD_r[W_i L_i + sum_{a != i} E_a L_a (L_a^-1 C_ai L_i^-T)]
"""
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ArgumentError
from ..linalg import balance, closest_each, gram_root, require_finite, smaller_gram, spectrum, tails, truncated_svd
from ..structures.monarch import Monarch, block_size, check_blocks, check_rank, from_factors, pair_of, to_blocks
from . import fwsvd, whitened
from .grouping import group_rows

if TYPE_CHECKING:
    from ..stats import Stats

_SWEEPS = 5    # around the blocks, at most
_GAIN = 1e-4   # relative; the sweeps stop where one brings less
ARGUMENTS = {"blocks": pair_of, "fit": ("weights", "outputs", "fisher"),  # whether the blocks fit, each layer's size() says
             "grouped": (False, True)}


def needs(*, blocks: int | tuple[int, int] = 4, fit: str = "weights", grouped: bool = False) -> frozenset[str]:
    return frozenset({"outputs": {"gram"}, "fisher": {"fisher"}}.get(fit, ()))


def require(stats: "Stats | None", *, blocks: int | tuple[int, int] = 4, fit: str = "weights",
            grouped: bool = False) -> None:
    if fit == "outputs" and stats is None:
        raise ArgumentError("fit='outputs' needs calibration statistics, found none; pass stats=calibrate(model, batches)")
    if fit == "fisher":
        fwsvd.require(stats)


def size(k: int, n: int, *, blocks: int | tuple[int, int] = 4, fit: str = "weights",
         grouped: bool = False) -> tuple[int, int]:
    """Padding counts: it is stored. The order of grouped rows does not: indices are no parameters."""
    b_in, b_out = check_blocks(k, n, blocks)
    p, s = block_size(k, n, (b_in, b_out))
    return b_in * b_out * (p + s), min(p, s)


def count(k: int, n: int, *, rank: int, grouped: bool = False, **arguments) -> tuple[int, int]:
    """(parameters, bytes of indices): with grouped at most, where no group is closer the rows stay."""
    return rank * size(k, n, **arguments)[0], 4 * n if grouped else 0


@torch.no_grad()
def factorize(weight: Tensor, bias: Tensor | None, stats: "Stats | None" = None, *, rank: int,
              blocks: int | tuple[int, int] = 4, fit: str = "weights", grouped: bool = False,
              interleave: bool = True) -> tuple[Monarch, list[str]]:
    """The layer in the weight's dtype, the factors of each block balanced.   weight [n, k]   bias [n]

    fit: what is closest: the weights, the outputs on the calibration inputs, or the weights by Fisher information (per
    output and per input). grouped: rows of one subspace share an output block (in the papers their place decides which
    do), unless the layer without that is as close. Raises ArgumentError without the statistics for it, NumericsError for NaN
    or infinity."""
    n, k = weight.shape
    blocks = check_blocks(k, n, blocks)
    require(stats, blocks=blocks, fit=fit)
    require_finite(weight, "weight")
    check_rank(rank, *block_size(k, n, blocks))
    layer, events = _solved(weight, bias, stats, rank, blocks, fit, interleave)
    if grouped:
        try:
            rows = group_rows(_in_metric(weight, stats, blocks, fit), blocks, rank, interleave)
        except torch.linalg.LinAlgError as error:
            return layer, sorted({*events, f"rows not grouped: {str(error).splitlines()[0]}"})
        other, more = _solved(weight, bias, stats, rank, blocks, fit, interleave, rows)
        if _lost(weight, other, stats, fit) < _lost(weight, layer, stats, fit):
            layer, events = other, more
    return layer, sorted(set(events))


def _solved(weight: Tensor, bias: Tensor | None, stats: "Stats | None", rank: int, blocks: tuple[int, int], fit: str,
            interleave: bool, rows: Tensor | None = None) -> tuple[Monarch, list[str]]:
    (n, k), seen = weight.shape, weight
    if rows is not None:
        seen = weight[rows]
        if fit == "fisher":
            stats = replace(stats, fisher_out=stats.fisher_out[rows.to(stats.fisher_out.device)])
    pairs, events = {"weights": _by_weights, "outputs": _by_outputs, "fisher": _by_fisher}[fit](
        seen, stats, rank, blocks, interleave)
    if fit == "outputs" and stats.rows < k:  # what no row shows is anybody's guess, and can be far from the weight
        events = [*events, f"only {stats.rows} calibration rows for {k} inputs"]
    v, u = from_factors(torch.stack([torch.stack([v for _, v in row]) for row in pairs]),
                        torch.stack([torch.stack([u for u, _ in row]) for row in pairs]))
    return Monarch.of(v, u, bias, in_features=k, out_features=n, interleave=interleave, rows=rows), events


@torch.no_grad()
def losses(weight: Tensor, stats: "Stats | None" = None, *, blocks: int | tuple[int, int] = 4, fit: str = "weights",
           grouped: bool = False, interleave: bool = True) -> Tensor:
    """The squared error for every rank of the blocks, in the metric of `fit`.   [min(p, s) + 1], fp64

    For outputs, of each block by itself, as if inputs of different blocks were uncorrelated: where the sweeps start. Grouped
    too, of the rows where they are: no group serves every rank, and factorize() does not lose more."""
    n, k = weight.shape
    blocks = check_blocks(k, n, blocks)
    require(stats, blocks=blocks, fit=fit)
    require_finite(weight, "weight")
    parts = to_blocks(_in_metric(weight, stats, blocks, fit), blocks, interleave)
    return sum(tails(spectrum(partial(smaller_gram, block))) for row in parts for block in row)


factorize_blockwise, losses_blockwise = partial(factorize, interleave=False), partial(losses, interleave=False)


def _in_metric(weight: Tensor, stats: "Stats | None", blocks: tuple[int, int], fit: str) -> Tensor:
    """The matrix whose blocks lose in the Frobenius norm what those of weight lose in the metric of `fit`.   [n, b_in p]"""
    if fit == "fisher":
        rows, columns = fwsvd.weights_of(weight, stats, "both")
        weight = rows.sqrt()[:, None] * weight * columns.sqrt()
    if fit == "outputs":
        return _applied(weight, _roots(weight, stats, blocks)[0])
    return pad(weight, (0, -weight.shape[1] % blocks[0]))


def _lost(weight: Tensor, layer: Monarch, stats: "Stats | None", fit: str) -> float:
    """What the layer as stored loses, in the metric of `fit`."""
    error = weight.double() - deepcopy(layer).double().dense()
    if fit == "outputs":
        gram, shift, _ = whitened.damped(weight, stats)
        return float((error * (error @ gram.double() + shift * error)).sum())
    if fit == "fisher":
        rows, columns = fwsvd.weights_of(weight, stats, "both")
        error = rows.sqrt()[:, None] * error * columns.sqrt()
    return float(error.square().sum())


Pairs = list[list[tuple[Tensor, Tensor]]]  # (u [s, r], v [r, p]) of each block, by output and then by input block


def _by_weights(weight: Tensor, stats, rank: int, blocks: tuple[int, int], interleave: bool) -> tuple[Pairs, list[str]]:
    events: list[str] = []
    return [[_closest(block, rank, weight.dtype, events) for block in row]
            for row in to_blocks(weight, blocks, interleave)], events


def _closest(block: Tensor, rank: int, dtype: torch.dtype, events: list[str]) -> tuple[Tensor, Tensor]:
    u, s, vt, solved = truncated_svd(block, rank)
    events += solved.events
    return balance(u * s, vt, dtype)


def _by_fisher(weight: Tensor, stats: "Stats", rank: int, blocks: tuple[int, int], interleave: bool) -> tuple[Pairs, list[str]]:
    rows, columns = (weights.sqrt() for weights in fwsvd.weights_of(weight, stats, "both"))
    events: list[str] = []
    scale_of_row = to_blocks(rows[:, None].expand_as(weight), blocks, interleave)[:, 0, :, 0]  # [b_out, s]
    scale_of_column = to_blocks(columns.expand_as(weight), blocks, interleave)[0, :, 0]  # [b_in, p]
    pairs = []
    for row, o in zip(to_blocks(rows[:, None] * weight * columns, blocks, interleave), scale_of_row):
        pairs.append([])
        for block, c in zip(row, scale_of_column):
            u, s, vt, solved = truncated_svd(block, rank)
            events += solved.events
            o, c = (torch.where(scale > 0, scale, 1) for scale in (o, c))  # padding
            pairs[-1].append(balance(u * s / o[:, None], vt / c, weight.dtype))
    return pairs, events


def _by_outputs(weight: Tensor, stats: "Stats", rank: int, blocks: tuple[int, int], interleave: bool) -> tuple[Pairs, list[str]]:
    """All output blocks at once: they share the inputs and nothing else."""
    roots, gram, events = _roots(weight, stats, blocks)
    parts = to_blocks(_applied(weight, roots), blocks, interleave).transpose(0, 1).contiguous()  # [b_in, b_out, s, p]
    cross = _cross(roots, gram)
    found = [_fitted(part, rank, events) for part in parts]
    error = [part - u @ v for part, (u, v) in zip(parts, found)]
    lost = _energy(error, cross)
    for _ in range(_SWEEPS if len(parts) > 1 else 0):
        gain = 0.0
        for i, part in enumerate(parts):
            others = sum(error[a] @ cross[a][i] for a in range(len(parts)) if a != i)
            found[i] = _fitted(part + others, rank, events)
            before, error[i] = error[i], part - found[i][0] @ found[i][1]
            gain += float((before + others).square().sum() - (error[i] + others).square().sum())
        lost -= gain
        if not gain > lost * _GAIN:
            break
    return [[balance(u[o], root.solved(v[o]), weight.dtype) for (u, v), root in zip(found, roots)]
            for o in range(blocks[1])], events


def _fitted(targets: Tensor, rank: int, events: list[str]) -> tuple[Tensor, Tensor]:
    u, v, more = closest_each(targets, rank)
    events += more
    return u, v


def _energy(error: list[Tensor], cross: list[list[Tensor]]) -> float:
    """tr(E C E^T)"""
    whole = [left + sum(error[a] @ cross[a][b] for a in range(len(error)) if a != b) for b, left in enumerate(error)]
    return float(sum((left * right).sum() for left, right in zip(error, whole)))


def _roots(weight: Tensor, stats: "Stats", blocks: tuple[int, int]):
    """([root L of C_ii of each input block], C as blocks [b_in][b_in] of [p, p] fp64, events)"""
    gram, shift, events = whitened.damped(weight, stats)
    (n, k), (b_in, _) = weight.shape, blocks
    p = block_size(k, n, blocks)[0]
    whole = torch.zeros(b_in * p, b_in * p, dtype=torch.float64, device=weight.device)
    whole[:k, :k] = gram
    whole.diagonal().add_(shift)  # the padding's, too: no block is without a root
    parts = [list(strip.split(p, dim=1)) for strip in whole.split(p)]
    roots = [gram_root(parts[i][i], "cholesky") for i in range(b_in)]
    return roots, parts, events + [event for root in roots for event in root.events]


def _applied(weight: Tensor, roots: list) -> Tensor:
    """[W_i L_i] for the columns of every input block, padded with zeros.   weight [n, k] -> [n, b_in p]"""
    p = roots[0].vectors.shape[0]
    return torch.cat([root.applied(strip) for root, strip in
                      zip(roots, pad(weight.double(), (0, len(roots) * p - weight.shape[1])).split(p, dim=1))], dim=1)


def _cross(roots: list, gram: list[list[Tensor]]) -> list[list[Tensor]]:
    """L_a^-1 C_ab L_b^-T; for a = b never read: that is I, where a root had to be changed too."""
    return [[left.whitened(right.whitened(part).mT).mT for right, part in zip(roots, row)] for left, row in zip(roots, gram)]
