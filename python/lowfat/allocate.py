"""Ranks for many matrices under one budget of parameters: numbers in, numbers out.

A matrix [n, k] has a ladder of sizes: ranks that save something, then dense. A choice is an index into its ladder."""
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import gcd, inf

import torch

from .errors import ArgumentError

STEP = 8  # ranks are multiples of it: what tensor cores want
_CELLS = 1 << 16  # into which the budget of a knapsack is cut, at most


@dataclass(frozen=True)
class Ladder:
    """The sizes one matrix can have, smallest first.   k features in, n out

    unit: parameters that one more rank costs; most: the largest rank. By default those of two factors, [n, r] and [r, k].
    parameters: those of a rank, rising with it, where they are not exactly rank * unit."""
    k: int
    n: int
    unit: float = 0
    most: int = 0
    parameters: Callable[[int], int] | None = field(default=None, compare=False)

    def __post_init__(self):
        if not self.unit:
            object.__setattr__(self, "unit", self.k + self.n)
            object.__setattr__(self, "most", min(self.k, self.n))
        if self.parameters is None:
            object.__setattr__(self, "parameters", lambda rank: rank * self.unit)

    @cached_property
    def ranks(self) -> list[int]:
        """1, 2, 4, ... up to the step and its multiples below break-even, where n k parameters would be stored anyhow."""
        most = bisect_left(range(1, self.most + 1), self.n * self.k, key=self.parameters)
        step = next((step for step in (STEP, 4, 2) if 8 * step <= most), 1)  # small matrices need finer steps
        return [rank for rank in (1, 2, 4) if rank < step and rank <= most] + list(range(step, most + 1, step))

    @cached_property
    def fixed(self) -> float:
        """Parameters that no rank saves."""
        return max(0, self.parameters(self.most) - self.most * self.unit)

    @cached_property
    def costs(self) -> list[int]:
        """Parameters at each rank, and last of the dense matrix."""
        return [self.parameters(rank) for rank in self.ranks] + [self.n * self.k]


def per_matrix(ladders: Sequence[Ladder], budget: int) -> list[int]:
    """The same share of its parameters for every matrix that can be made smaller."""
    fixed = sum(ladder.n * ladder.k for ladder in ladders if not ladder.ranks)
    total = sum(ladder.n * ladder.k for ladder in ladders) - fixed
    share = (budget - fixed) / total if total else 0.0
    return _nearest(ladders, budget, [(share * ladder.n * ladder.k - ladder.fixed) / ladder.unit for ladder in ladders])


def uniform_rank(ladders: Sequence[Ladder], budget: int) -> list[int]:
    """One rank for all; a matrix that this rank would not make smaller stays dense, and the others get what it leaves."""
    rank = (budget - sum(ladder.fixed for ladder in ladders)) / sum(ladder.unit for ladder in ladders)
    return _nearest(ladders, budget, [rank] * len(ladders))


def allocated(ladders: Sequence[Ladder], budget: int, losses: Sequence[Sequence[float]]) -> list[int]:
    """The least sum of losses (one for each size of a ladder, dense last): steps on the convex hulls by falling gain.

    Optimal for convex curves up to the last step (Lagrange), which the rest of the budget then fills."""
    chosen = [0] * len(ladders)
    left = _left(ladders, budget, chosen)
    steps = [(-(lost[a] - lost[b]) / (ladder.costs[b] - ladder.costs[a]), i, b)
             for i, (ladder, lost) in enumerate(zip(ladders, losses)) for a, b in pairwise(_hull(ladder.costs, lost))]
    for _, i, b in sorted(steps):
        cost = ladders[i].costs[b] - ladders[i].costs[chosen[i]]
        if cost <= left:  # where a step does not fit, later ones of the same matrix cost more still
            chosen[i], left = b, left - cost
    return _filled(ladders, left, chosen, losses)


def knapsack(ladders: Sequence[Ladder], budget: int, losses: Sequence[Sequence[float]]) -> list[int]:
    """The least sum of losses, whatever the curves: dynamic programming over the budget, matrix by matrix.

    Exact where the sizes' differences share a divisor that cuts the budget into at most 65,536 cells; else sizes are rounded
    up to cells, and what that leaves goes where it helps most."""
    chosen = [0] * len(ladders)
    left = _left(ladders, budget, chosen)
    more = [[cost - ladder.costs[0] for cost in ladder.costs] for ladder in ladders]
    cell = max(gcd(*(cost for costs in more for cost in costs)), -(-left // _CELLS), 1)
    cells = left // cell
    best, picks = torch.zeros(cells + 1, dtype=torch.float64), []  # least loss of the matrices so far in so many cells
    for costs, lost in zip(more, losses):
        before, best = best, torch.full_like(best, inf)
        pick = torch.zeros(cells + 1, dtype=torch.int32)
        for index, (cost, loss) in enumerate(zip(costs, lost)):
            taken = -(-cost // cell)
            if taken <= cells:
                found = before[:cells + 1 - taken] + loss
                is_better = found < best[taken:]
                best[taken:][is_better], pick[taken:][is_better] = found[is_better], index
        picks.append(pick)
    for i in reversed(range(len(ladders))):
        chosen[i] = int(picks[i][cells])
        cells -= -(-more[i][chosen[i]] // cell)
    return _filled(ladders, _left(ladders, budget, chosen), chosen, losses)


def _filled(ladders: Sequence[Ladder], left: int, chosen: list[int], losses: Sequence[Sequence[float]]) -> list[int]:
    """What is left goes, step by step, to what loses most less for it."""
    return _fill(ladders, left, chosen, lambda i, b: (losses[i][chosen[i]] - losses[i][b]) /
                 (ladders[i].costs[b] - ladders[i].costs[chosen[i]]))


def _nearest(ladders: Sequence[Ladder], budget: int, targets: Sequence[float]) -> list[int]:
    """The largest sizes not above the target ranks; what rounding leaves goes to whoever is furthest below its target.

    Not to the largest next singular value: that would mean to decompose every matrix to place less than one step of each."""
    chosen = [max(0, sum(cost - ladder.fixed <= target * ladder.unit for cost in ladder.costs) - 1)
              for ladder, target in zip(ladders, targets)]

    def below(i: int, b: int) -> float:
        return targets[i] - (ladders[i].costs[b] - ladders[i].fixed) / ladders[i].unit

    while any(chosen) and sum(ladder.costs[b] for ladder, b in zip(ladders, chosen)) > budget:
        # matrices that cannot go below rank 1 have taken more than their share
        chosen[min((i for i, b in enumerate(chosen) if b), key=lambda i: below(i, chosen[i]))] -= 1
    return _fill(ladders, _left(ladders, budget, chosen), chosen,
                 lambda i, b: below(i, b) if b == chosen[i] + 1 else -inf, least=-inf)


def _left(ladders: Sequence[Ladder], budget: int, chosen: Sequence[int]) -> int:
    left = budget - sum(ladder.costs[b] for ladder, b in zip(ladders, chosen))
    if left < 0:
        least, dense = sum(ladder.costs[0] for ladder in ladders), sum(ladder.costs[-1] for ladder in ladders)
        raise ArgumentError(f"ratio: {budget} of {dense} parameters are too few; rank 1 everywhere is {least} "
                            f"(ratio {least / dense:.4f})")
    return left


def _fill(ladders: Sequence[Ladder], left: int, chosen: list[int], gain: Callable[[int, int], float],
          least: float = 0.0) -> list[int]:
    """Take the larger size of most gain, which must be above `least`, for as long as one fits."""
    while True:
        fitting = [(gain(i, b), -i, b) for i, ladder in enumerate(ladders) for b in range(chosen[i] + 1, len(ladder.costs))
                   if ladder.costs[b] - ladder.costs[chosen[i]] <= left]
        best = max(fitting, default=(least, 0, 0))
        if best[0] <= least:
            return chosen
        i, b = -best[1], best[2]
        left -= ladders[i].costs[b] - ladders[i].costs[chosen[i]]
        chosen[i] = b


def _hull(costs: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull of the points (cost, loss)."""
    hull: list[int] = []
    for c in range(len(costs)):
        while len(hull) > 1 and (losses[hull[-1]] - losses[hull[-2]]) * (costs[c] - costs[hull[-2]]) >= \
                (losses[c] - losses[hull[-2]]) * (costs[hull[-1]] - costs[hull[-2]]):
            hull.pop()
        hull.append(c)
    return hull
