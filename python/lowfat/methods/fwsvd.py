"""Fisher-weighted SVD (Hsu et al. 2022): min sum_ij F_ij (W - What)_ij^2, F the squared gradients of the task loss.

Closed form when F is taken as o_i c_j: with D_o, D_c the square roots on diagonals, D_o W D_c = U S V^T and
What = D_o^-1 U_r S_r V_r^T D_c^-1. The paper has one weight per input feature (its rows are inputs): side "in".
"""
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..linalg import balance, require_finite, require_rank, smaller_gram, spectrum, tails, truncated_svd
from ..structures import LowRank

if TYPE_CHECKING:
    from ..stats import Stats

_GUARD = 1e-5  # of the mean, added to every weight: a feature without gradient must not divide by zero
_STEPS = 50    # of the exact method, at most
_GAIN = 1e-4   # relative; the exact method stops where a step brings less


@torch.no_grad()
def factorize(weight: Tensor, bias: Tensor | None, stats: "Stats", *, rank: int, side: str = "in",
              exact: bool = False) -> tuple[LowRank, list[str]]:
    """The layer in the weight's dtype, its factors balanced.   weight [n, k]   bias [n]

    side: which sums of F weigh: "in" (per input), "out" or "both". exact: go on from there with F element by element, which
    only ever lowers the objective. Raises ArgumentError without Fisher statistics, NumericsError for NaN or infinity."""
    require(stats, side=side, exact=exact)
    rows, columns = weights_of(weight, stats, side)
    require_rank(rank, weight)
    u, v, events = _weighted_svd(weight, rows, columns, rank)
    if exact:
        require_finite(stats.fisher, "fisher")
        u, v, more = _elementwise(weight, stats.fisher.to(weight.device), u, v, rank)
        events += more
    u, v = balance(u, v, weight.dtype)
    return LowRank.of(v, u, bias), events


@torch.no_grad()
def losses(weight: Tensor, stats: "Stats", *, side: str = "in", exact: bool = False) -> Tensor:
    """sum_ij o_i c_j (W - What)_ij^2 for every rank, in the scale of F itself.   [min(n, k) + 1], fp64

    With exact too: its own objective has no closed form, and this is what it starts from."""
    require(stats, side=side, exact=exact)
    rows, columns = weights_of(weight, stats, side)
    lost = tails(spectrum(lambda: smaller_gram(weight, rows.sqrt(), columns.sqrt())))
    return lost * float(stats.fisher_in.double().mean()) / weight.shape[0]


def require(stats: "Stats | None", *, side: str = "in", exact: bool = False) -> None:
    if stats is None or stats.fisher_in is None or stats.fisher_out is None:
        raise ArgumentError("fwsvd needs the Fisher information, found none: calibrate with labels in the batches")
    if exact and stats.fisher is None:
        raise ArgumentError("fwsvd with exact=True needs the Fisher information element by element: "
                            "calibrate with fisher=\"elements\"")


def weights_of(weight: Tensor, stats: "Stats", side: str) -> tuple[Tensor, Tensor]:
    """(o [n], c [k]), each of mean about 1: o_i c_j times the mean of F stands for F_ij."""
    require_finite(weight, "weight")
    n, k = weight.shape
    if stats.fisher_in.shape != (k,) or stats.fisher_out.shape != (n,):
        raise ArgumentError(f"stats: fisher_in {list(stats.fisher_in.shape)}, fisher_out {list(stats.fisher_out.shape)}; "
                            f"the weight is [n, k] {list(weight.shape)}")
    one = torch.ones((), dtype=torch.float64, device=weight.device)
    return (_guarded(stats.fisher_out.to(weight.device)) if side != "in" else one.expand(n),
            _guarded(stats.fisher_in.to(weight.device)) if side != "out" else one.expand(k))


def _guarded(sums: Tensor) -> Tensor:
    require_finite(sums, "fisher")
    mean = sums.double().mean()
    return sums.double() / mean + _GUARD if mean > 0 else torch.ones_like(sums, dtype=torch.float64)


def _weighted_svd(weight: Tensor, rows: Tensor, columns: Tensor, rank: int) -> tuple[Tensor, Tensor, list[str]]:
    """u [n, r], v [r, k] in fp64 that minimize sum_ij rows_i columns_j (W - u v)_ij^2, and the solver's events."""
    rows, columns = rows.sqrt(), columns.sqrt()
    u, s, vt, solved = truncated_svd(weight, rank, rows=rows, columns=columns)
    return u.mul_(s).div_(rows[:, None]), vt.div_(columns), solved.events


def _elementwise(weight: Tensor, fisher: Tensor, u: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor, list[str]]:
    """Lower sum_ij F_ij (W - u v)_ij^2 step by step: Z <- weighted SVD of Z + F / M * (W - Z) (Srebro and Jaakkola 2003).

    There M is one number, max F, and Fisher information is so uneven that nothing moves. Any M_ij = a_i b_j >= F_ij keeps
    both the closed form and the descent, and is tighter."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, fisher = weight.to(dtype), fisher.to(dtype)
    if not fisher.any():
        return u, v, ["no gradient in the calibration"]
    fisher = fisher / fisher.mean()
    b = fisher.mean(0) + _GUARD
    a = (fisher / b).amax(1) + _GUARD
    b = (fisher / a[:, None]).amax(0) + _GUARD
    share = fisher / (a[:, None] * b)
    residual = weight - (u @ v).to(dtype)
    objective = float((fisher * residual.square()).sum(dtype=torch.float64))
    events = []
    for _ in range(_STEPS):
        new_u, new_v, events = _weighted_svd(weight - residual * (1 - share), a.double(), b.double(), rank)
        new_residual = weight - (new_u @ new_v).to(dtype)
        new_objective = float((fisher * new_residual.square()).sum(dtype=torch.float64))
        if not new_objective < objective:  # at the rounding error of this dtype
            break
        gain, (u, v, residual, objective) = 1 - new_objective / objective, (new_u, new_v, new_residual, new_objective)
        if gain < _GAIN:
            break
    return u, v, events
