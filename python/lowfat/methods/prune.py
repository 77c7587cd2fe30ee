"""N:M pruning: of every `group` inputs of an output, `rank` weights stay.

magnitude     the largest weights.
wanda         the largest |w_ij| sqrt(C_jj): by what they do to the outputs, each by itself (Sun et al., 2306.11695).
sparsegpt     input by input, with U^T U = C^-1, U upper triangular: of a group those with the least w_ij^2 / U_jj^2 go, and
              the weights of later inputs make up for what each takes with it (Frantar and Alistarh, 2301.00774).
C = X^T X of the calibration inputs X.
"""
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from ..linalg import gram_root, require_finite, tails
from ..structures.sparse24 import Sparse24, check_groups, largest_of_groups
from . import whitened

if TYPE_CHECKING:
    from ..stats import Stats

_MOST = 32      # inputs of a group, one word of the mask
_COLUMNS = 128  # whose corrections are kept back until all of them are done, then given to the rest at once
_DAMPING = 0.01  # of the mean diagonal, added to C for sparsegpt: the paper's


def check_group(group: int) -> None:
    if not isinstance(group, int) or isinstance(group, bool) or not 2 <= group <= _MOST:
        raise ArgumentError(f"group must be a whole number from 2 to {_MOST}; found {group!r}")


ARGUMENTS = {"group": check_group}


def require(stats: "Stats | None", *, group: int = 4) -> None:
    if stats is None:
        raise ArgumentError("wanda and sparsegpt need calibration statistics, found none; "
                            "pass stats=calibrate(model, batches)")


def size(k: int, n: int, *, group: int = 4) -> tuple[int, int]:
    check_group(group)
    check_groups(k, group, group)
    return n * k // group, group


def count(k: int, n: int, *, rank: int, group: int = 4) -> tuple[int, int]:
    return rank * n * k // group, 4 * n * -(-k // 32)


@torch.no_grad()
def factorize(weight: Tensor, bias: Tensor | None, stats: "Stats | None" = None, *, rank: int, group: int = 4,
              by: str) -> tuple[Sparse24, list[str]]:
    """The layer in the weight's dtype.   weight [n, k]   bias [n]

    rank: how many of each group stay. Raises ArgumentError without the calibration statistics that it needs, NumericsError
    for NaN or infinity, ShapeError where the groups do not divide the inputs or are smaller than the rank."""
    size(*weight.shape[::-1], group=group)
    if not 1 <= rank <= group:
        raise ShapeError(f"rank, the number kept of each {group}, must be between 1 and {group}, found {rank}")
    require_finite(weight, "weight")
    events: list[str] = []
    if by == "sparsegpt":
        upper, events = _inverse_root(weight, stats)
        pruned, keep, _ = swept(weight, upper, rank, group)
    else:
        scores, events = _scores(weight, stats, by)
        pruned, keep = weight, largest_of_groups(scores, rank, group)
    return Sparse24.from_mask(pruned.to(weight.dtype), keep, bias, n=rank, m=group), events


@torch.no_grad()
def losses(weight: Tensor, stats: "Stats | None" = None, *, group: int = 4, by: str) -> Tensor:
    """What is lost where 0, 1, ... of each group stay.   [group + 1], fp64

    Squared weights; those times C_jj for wanda; ||(W - What) X^T||_F^2, damping included, for sparsegpt."""
    size(*weight.shape[::-1], group=group)
    require_finite(weight, "weight")
    if by == "sparsegpt":
        upper, _ = _inverse_root(weight, stats)
        return weight.new_tensor([swept(weight, upper, kept, group)[2] for kept in range(group + 1)], dtype=torch.float64)
    scores, _ = _scores(weight, stats, by)
    return tails(scores.double().square().reshape(-1, group).sort(descending=True).values.sum(0))


magnitude, wanda, sparsegpt = (partial(factorize, by=name) for name in ("magnitude", "wanda", "sparsegpt"))
magnitude_losses, wanda_losses, sparsegpt_losses = (
    partial(losses, by=name) for name in ("magnitude", "wanda", "sparsegpt"))


def _scores(weight: Tensor, stats: "Stats | None", by: str) -> tuple[Tensor, list[str]]:
    if by == "magnitude":
        return weight.abs(), []
    require(stats)
    gram, shift, events = whitened.damped(weight, stats)
    return weight.double().abs() * (gram.diagonal().double() + shift).sqrt(), events


def _inverse_root(weight: Tensor, stats: "Stats") -> tuple[Tensor, list[str]]:
    """(U upper triangular with U^T U = (C + damping)^-1, events): by the Cholesky factor of C from its end, then inverted."""
    require(stats)
    gram, shift, events = whitened.damped(weight, stats)
    root = gram_root(gram.flip(0, 1), "cholesky", shift if events else _DAMPING / whitened.DAMPING * shift)
    one = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    lower = torch.linalg.qr(root.times(one).mT, mode="r").R.mT  # triangular also where the root is of eigenvectors
    return torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True), events + root.events


def swept(weight: Tensor, upper: Tensor, kept: int, group: int) -> tuple[Tensor, Tensor, float]:
    """(the weight [n, k] in fp64 after its sweep, where it stays [n, k] bool, tr(E C E^T))

    What goes from input j costs e = w_j / U_jj, and later inputs l then take e U_jl off."""
    left, keep, scale = weight.to(torch.float64, copy=True), torch.empty_like(weight, dtype=torch.bool), upper.diagonal()
    lost, width = 0.0, max(1, _COLUMNS // group) * group  # whole groups
    for start in range(0, weight.shape[1], width):
        block = slice(start, min(start + width, weight.shape[1]))
        errors = torch.zeros(len(left), block.stop - start, dtype=torch.float64, device=left.device)
        for j in range(start, block.stop):
            if j % group == 0:
                here = slice(j, j + group)
                keep[:, here] = largest_of_groups(left[:, here].abs() / scale[here].abs(), kept, group)
            errors[:, j - start] = torch.where(keep[:, j], 0, left[:, j]) / scale[j]
            left[:, j:block.stop] -= errors[:, j - start, None] * upper[j, j:block.stop]
        left[:, block.stop:] -= errors @ upper[block, block.stop:]
        lost += float(errors.square().sum())
    return left.mul_(keep), keep, lost
