"""Sparsity-aware SVD of a pruned weight (LPAF, 2306.14152): min sum_ij Omega_ij (W - What)_ij^2, Omega the scores or the mask
of the pruning, which stand where the Fisher information does in Stats.

As fwsvd: closed form with the sums of Omega per input, descent from there with its elements. Besides, rows and columns of W
that are empty need no parameters: the rest of W gets the rank that these would have cost."""
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..linalg import require_rank
from ..structures import LowRank, Structure, Submatrix
from ..structures.submatrix import used
from . import fwsvd, svd

if TYPE_CHECKING:
    from ..stats import Stats

ARGUMENTS = {"exact": (False, True), "drop": (True, False)}


@torch.no_grad()
def factorize(weight: Tensor, bias: Tensor | None, stats: "Stats", *, rank: int, exact: bool = False,
              drop: bool = True) -> tuple[Structure, list[str]]:
    """The layer in the weight's dtype, with at most rank (n + k) parameters and its factors balanced.   weight [n, k]

    exact: Omega element by element. drop: leave out empty rows and columns, where that makes room for a higher rank. An
    Omega that is the same everywhere gives the plain SVD. Raises ArgumentError without weights, NumericsError for NaN or
    infinity."""
    require(stats, exact=exact)
    fwsvd.weights_of(weight, stats, "in")  # raises for sizes and numbers that cannot be used
    require_rank(rank, weight)
    inputs, outputs = used(weight)
    larger = _rank_of(weight, rank, len(inputs), len(outputs))
    if not drop or larger <= rank:
        return _solved(weight, bias, stats, rank, exact)
    layer, events = _solved(weight[outputs][:, inputs], None, _part(stats, inputs.cpu(), outputs.cpu()), larger, exact)
    n, k = weight.shape
    events = [f"{n - len(outputs)} empty rows and {k - len(inputs)} empty columns dropped: rank {larger} for {rank}", *events]
    return Submatrix.of(layer.v, layer.u, inputs.int(), outputs.int(), bias, in_features=k, out_features=n), events


@torch.no_grad()
def losses(weight: Tensor, stats: "Stats", *, exact: bool = False, drop: bool = True) -> Tensor:
    """sum_ij c_j (W - What)_ij^2 for every rank of the whole weight, c the sums of Omega.   [min(n, k) + 1], fp64"""
    require(stats, exact=exact)
    return fwsvd.losses(weight, stats, side="in", exact=exact)


def require(stats: "Stats | None", *, exact: bool = False, drop: bool = True) -> None:
    try:
        fwsvd.require(stats, side="in", exact=exact)
    except ArgumentError as error:
        raise ArgumentError(str(error).replace("fwsvd", "sparsity_aware", 1)) from error


def _rank_of(weight: Tensor, rank: int, inputs: int, outputs: int) -> int:
    """The rank that so many inputs and outputs afford; a multiple of 8 where the plan's is one, for tensor cores."""
    affordable = rank * sum(weight.shape) // (inputs + outputs)
    if rank % 8 == 0:
        affordable -= affordable % 8
    return min(affordable, inputs, outputs)


def _solved(weight: Tensor, bias: Tensor | None, stats: "Stats", rank: int, exact: bool) -> tuple[LowRank, list[str]]:
    known = stats.fisher if exact else stats.fisher_in
    if bool((known == known.flatten()[0]).all()):
        return svd.factorize(weight, bias, rank=rank)
    return fwsvd.factorize(weight, bias, stats, rank=rank, side="in", exact=exact)


def _part(stats: "Stats", inputs: Tensor, outputs: Tensor) -> "Stats":
    """Of the rows and columns that are kept; where only sums are known, those over all rows."""
    if stats.fisher is None:
        return type(stats)(None, stats.rows, stats.fisher_in[inputs], stats.fisher_out[outputs], samples=stats.samples)
    omega = stats.fisher[outputs][:, inputs]
    return type(stats)(None, stats.rows, omega.sum(0), omega.sum(1), omega, stats.samples)
