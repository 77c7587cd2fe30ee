"""Whitened SVD: the rank-r matrix whose outputs on the calibration inputs are closest, min ||(W - What) X^T||_F.

Three solvers of one problem (Wang et al. 2024, SVD-LLM and its V2; Chen et al. 2021, DRONE), with C = X^T X = L L^T:
    cholesky, eigen   W L = U S V^T,  What = (W L V_r) (V_r^T L^-1)   L triangular, or eigenvectors times roots
    output            E = leading eigenvectors of W C W^T,  What = E (E^T W)   no inverse at all
"""
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..linalg import balance, gram_of, gram_root, leading, quadratic, require_finite, require_rank, spectrum, tails, times
from ..structures import LowRank

if TYPE_CHECKING:
    from ..stats import Stats

DAMPING = 1e-6  # of the mean diagonal, added to C: with few tokens or dead channels, what no input shows is kept as by SVD


@torch.no_grad()
def factorize(weight: Tensor, bias: Tensor | None, stats: "Stats", *, rank: int,
              solver: str = "auto") -> tuple[LowRank, list[str]]:
    """The layer in the weight's dtype, its factors balanced.   weight [n, k]   bias [n]

    solver "auto": output for n <= k, else cholesky, so that only one eigenproblem is solved, of the smaller side. Raises
    ArgumentError without calibration statistics, NumericsError for NaN or infinity, ShapeError for an impossible rank."""
    gram, shift, events = damped(weight, stats)
    require_rank(rank, weight)
    solver = solver if solver != "auto" else "output" if weight.shape[0] <= weight.shape[1] else "cholesky"
    if solver == "output":
        _, u, solved = leading(lambda: quadratic(weight, gram, shift), rank)
        u, v = balance(u, times(weight.mT, u).mT, weight.dtype)
    else:
        # the root is made twice, so that it is not there while eigh needs the most memory
        _, right, solved = leading(lambda: gram_of(weight, gram_root(gram, solver, shift)), rank)
        root = gram_root(gram, solver, shift)
        v, right = root.solved(right.mT), root.times(right)
        events += root.events
        del root
        u, v = balance(weight, v, weight.dtype, right=right)
    return LowRank.of(v, u, bias), events + solved.events


@torch.no_grad()
def losses(weight: Tensor, stats: "Stats", *, solver: str = "auto") -> Tensor:
    """||(W - What) X^T||_F^2, damping included, for every rank.   [min(n, k) + 1], fp64"""
    gram, shift, _ = damped(weight, stats)
    if weight.shape[0] <= weight.shape[1]:
        return tails(spectrum(lambda: quadratic(weight, gram, shift)))
    return tails(spectrum(lambda: gram_of(weight, gram_root(gram, "cholesky", shift))))


def require(stats: "Stats | None", *, solver: str = "auto") -> None:
    if stats is None:
        raise ArgumentError("whitened needs calibration statistics, found none; pass stats=calibrate(model, batches)")


def damped(weight: Tensor, stats: "Stats | None") -> tuple[Tensor, float, list[str]]:
    """(C, what to add to its diagonal, events)"""
    require(stats)
    require_finite(weight, "weight")
    require_finite(stats.gram, "gram")
    if stats.gram.shape != (weight.shape[1],) * 2:
        raise ArgumentError(f"stats: the Gram matrix is {list(stats.gram.shape)}, the weight [n, k] {list(weight.shape)}")
    gram = stats.gram.to(weight.device)
    mean = float(gram.diagonal().double().mean())
    if mean == 0:
        return gram, 1.0, ["no input energy in the calibration: plain SVD"]
    return gram, DAMPING * mean, []
