"""Ranks under a budget: never above it, within a step of it, and against exhaustive search."""
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lowfat.allocate import STEP, Ladder, allocated, knapsack, per_matrix, uniform_rank
from lowfat.errors import ArgumentError

SHAPES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=8)


def kept(ladders, picks):
    return sum(ladder.costs[pick] for ladder, pick in zip(ladders, picks))


def falling(ladder, seed):
    """A convex loss curve, zero when dense."""
    return [(seed + 1) * (1 - cost / ladder.costs[-1]) ** 2 for cost in ladder.costs]


def test_ladders_end_below_break_even_and_then_are_dense():
    assert Ladder(384, 384).ranks == [1, 2, 4, *range(8, 192, 8)] and Ladder(384, 384).costs[-1] == 384 * 384
    assert Ladder(768, 3072).ranks[-1] == 608  # break-even 614.4
    assert Ladder(32, 32).ranks == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]  # at 16 nothing is saved
    assert Ladder(80, 80).ranks == [1, 2, *range(4, 40, 4)]
    assert Ladder(1, 100).ranks == [] and Ladder(1, 100).costs == [100]
    assert Ladder(2, 2).ranks == [] and Ladder(3, 2).ranks == [1]


@given(SHAPES)
def test_each_step_of_a_ladder_costs_more(shapes):
    for shape in shapes:
        costs = Ladder(*shape).costs
        assert all(a < b for a, b in itertools.pairwise(costs))


@given(SHAPES, st.floats(0.01, 0.999), st.sampled_from([per_matrix, uniform_rank, allocated, knapsack]))
@example([(10, 10)] * 60 + [(100, 100)], 0.12, per_matrix)  # rank 1 of the small ones is more than their share
def test_the_budget_is_never_exceeded_and_met_within_a_step(shapes, ratio, policy):
    ladders = [Ladder(*shape) for shape in shapes]
    budget = int(ratio * sum(ladder.costs[-1] for ladder in ladders))
    losses = [[falling(ladder, i) for i, ladder in enumerate(ladders)]] if policy in (allocated, knapsack) else []
    if budget < sum(ladder.costs[0] for ladder in ladders):
        with pytest.raises(ArgumentError, match="ratio: .* too few"):
            policy(ladders, budget, *losses)
        return
    picks = policy(ladders, budget, *losses)
    left = budget - kept(ladders, picks)
    assert left >= 0
    next_steps = [ladder.costs[pick + 1] - ladder.costs[pick] for ladder, pick in zip(ladders, picks)
                  if pick + 1 < len(ladder.costs)]
    assert all(step > left for step in next_steps)


def test_per_matrix_keeps_the_same_share_everywhere():
    ladders = [Ladder(384, 384)] * 4 + [Ladder(384, 1536), Ladder(1536, 384)]
    picks = per_matrix(ladders, sum(ladder.costs[-1] for ladder in ladders) // 2)
    for ladder, pick in zip(ladders, picks):
        assert abs(ladder.costs[pick] / ladder.costs[-1] - 0.5) <= 8 * (ladder.n + ladder.k) / ladder.costs[-1]


def test_matrices_that_must_stay_dense_are_paid_for_by_the_others():
    ladders = [Ladder(1, 1000), Ladder(100, 100)]
    picks = per_matrix(ladders, 5500)
    assert picks[0] == 0 and ladders[0].costs[0] == 1000 and kept(ladders, picks) <= 5500


def test_uniform_rank_is_one_rank_and_the_published_ones():
    """BERT-base: 128 is a quarter of the 72 matrices' parameters."""
    ladders = ([Ladder(768, 768)] * 4 + [Ladder(768, 3072), Ladder(3072, 768)]) * 12
    total = sum(ladder.costs[-1] for ladder in ladders)
    assert total == 84_934_656 and sum(ladder.n + ladder.k for ladder in ladders) == 165_888
    for ratio, rank in ((0.5, 256), (0.25, 128), (0.16, 80)):
        picks = uniform_rank(ladders, int(ratio * total))
        ranks = {ladder.ranks[pick] for ladder, pick in zip(ladders, picks)}
        assert ranks <= {rank, rank + 8} and rank in ranks


def test_uniform_rank_leaves_small_matrices_dense():
    ladders = [Ladder(16, 16), Ladder(512, 512)]
    picks = uniform_rank(ladders, int(0.5 * (256 + 512 * 512)))
    assert picks[0] == len(ladders[0].ranks) and picks[1] < len(ladders[1].ranks)


@given(st.lists(st.tuples(st.integers(4, 14), st.integers(4, 14)), min_size=1, max_size=3), st.floats(0.3, 0.95),
       st.integers(0, 1000))
def test_allocated_is_optimal_up_to_its_last_step(shapes, ratio, seed):
    """Against every combination: what is lost beyond the optimum is at most one step of the hull (the Lagrange gap)."""
    ladders = [Ladder(*shape) for shape in shapes]
    budget = int(ratio * sum(ladder.costs[-1] for ladder in ladders))
    if budget < sum(ladder.costs[0] for ladder in ladders):
        return
    losses = [falling(ladder, (seed * (i + 3)) % 7) for i, ladder in enumerate(ladders)]
    picks = allocated(ladders, budget, losses)

    def lost(choice):
        return sum(curve[pick] for curve, pick in zip(losses, choice))

    best = min(lost(choice) for choice in itertools.product(*(range(len(ladder.costs)) for ladder in ladders))
               if kept(ladders, choice) <= budget)
    gap = max((a - b for curve in losses for a, b in itertools.pairwise(curve)), default=0.0)
    assert best - 1e-12 <= lost(picks) <= best + gap  # 1e-12: sums of at most three losses below 7, in another order


@given(st.lists(st.tuples(st.integers(4, 12), st.integers(4, 12)), min_size=1, max_size=3), st.floats(0.3, 0.95),
       st.randoms(use_true_random=False))
def test_knapsack_is_optimal_for_curves_of_any_form(shapes, ratio, random):
    """Against every combination; so small a budget is cut into cells of one parameter each."""
    ladders = [Ladder(*shape) for shape in shapes]
    budget = int(ratio * sum(ladder.costs[-1] for ladder in ladders))
    if budget < sum(ladder.costs[0] for ladder in ladders):
        return
    losses = [[random.randint(0, 100) for _ in ladder.costs] for ladder in ladders]  # whole numbers: their sums are exact
    picks = knapsack(ladders, budget, losses)
    assert kept(ladders, picks) <= budget
    best = min(sum(curve[pick] for curve, pick in zip(losses, choice))
               for choice in itertools.product(*(range(len(ladder.costs)) for ladder in ladders))
               if kept(ladders, choice) <= budget)
    assert sum(curve[pick] for curve, pick in zip(losses, picks)) == best


@given(st.lists(st.tuples(st.integers(4, 12), st.integers(4, 12)), min_size=2, max_size=3), st.floats(0.3, 0.95))
def test_a_knapsack_of_coarse_cells_loses_what_rounding_up_costs(shapes, ratio):
    """No worse than the best choice with as many cells less as there are matrices."""
    ladders = [Ladder(*shape) for shape in shapes]
    budget, least = int(ratio * sum(ladder.costs[-1] for ladder in ladders)), sum(ladder.costs[0] for ladder in ladders)
    if budget < least:
        return
    losses = [falling(ladder, i) for i, ladder in enumerate(ladders)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowfat.allocate._CELLS", 20)
        picks = knapsack(ladders, budget, losses)
    assert kept(ladders, picks) <= budget
    cell = -(-(budget - least) // 20)
    tighter = max(least, budget - (len(ladders) + 1) * cell)  # each size rounded up, and the budget down
    exact = knapsack(ladders, tighter, losses)
    lost, bound = (sum(curve[pick] for curve, pick in zip(losses, found)) for found in (picks, exact))
    assert lost <= bound + 1e-12


def test_knapsack_sees_what_falling_gains_do_not():
    """The step that pays best for its cost leaves no room for two that pay more together."""
    ladders = [Ladder(20, 21, 10, 2, {1: 10, 2: 30}.get)] + 2 * [Ladder(20, 21, 10, 2, {1: 10, 2: 25}.get)]
    losses = [[20.0, 10.0, 0.0]] + 2 * [[20.0, 12.6, 0.0]]
    assert ladders[0].ranks == [1, 2] and ladders[0].costs == [10, 30, 420]
    assert allocated(ladders, 60, losses) == [1, 0, 0] and knapsack(ladders, 60, losses) == [0, 1, 1]


def test_allocated_gives_more_to_whom_it_helps_more():
    ladders = [Ladder(100, 100), Ladder(100, 100)]
    losses = [falling(ladders[0], 0), falling(ladders[1], 9)]
    picks = allocated(ladders, 10_000, losses)
    assert picks[1] > picks[0]
    assert allocated(ladders, 10_000, losses[::-1]) == picks[::-1]


def test_a_layer_with_nothing_to_gain_gets_no_more_than_it_must():
    ladders = [Ladder(100, 100), Ladder(100, 100)]
    assert allocated(ladders, 10_000, [[0.0] * len(ladders[0].costs), falling(ladders[1], 0)])[0] == 0


def test_a_concave_curve_jumps_to_dense_or_stays_small():
    """Nothing on the way to dense pays as much as arriving: kills the greedy walk without the convex hull."""
    ladders = [Ladder(40, 40), Ladder(40, 40)]
    concave = [1.0] * len(ladders[0].ranks) + [0.0]
    flat = [0.1 * (1 - cost / 1600) for cost in ladders[1].costs]
    picks = allocated(ladders, 1600 + ladders[1].costs[0], [concave, flat])
    assert picks == [len(ladders[0].ranks), 0]


def test_uniform_rank_counts_what_no_rank_saves_apart():
    """Low rank beside a sparse part of a fixed size: one rank for all, whatever the sparse parts take."""
    ladders = [Ladder(k, n, k + n, min(k, n), lambda rank, k=k, n=n: k * n // 2 + rank * (k + n))
               for k, n in ((384, 384), (384, 1536), (1536, 384))]
    budget = int(0.7 * sum(ladder.k * ladder.n for ladder in ladders))
    chosen = uniform_rank(ladders, budget)
    ranks = [ladder.ranks[index] for ladder, index in zip(ladders, chosen)]
    assert max(ranks) - min(ranks) <= STEP
    assert sum(ladder.costs[index] for ladder, index in zip(ladders, chosen)) <= budget
