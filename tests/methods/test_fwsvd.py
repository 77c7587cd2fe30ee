"""Fisher-weighted SVD: the closed forms, the element-wise descent, and which side is which."""
import pytest
import torch

from lowfat.errors import ArgumentError
from lowfat.methods import METHODS
from lowfat.stats import Stats

EPS = torch.finfo(torch.float64).eps
factorize = METHODS["fwsvd"].factorize


def stats_from(fisher):
    return Stats(torch.eye(fisher.shape[1], dtype=fisher.dtype), 1, fisher.sum(0), fisher.sum(1), fisher, samples=1)


def dense(weight, fisher, rank=3, **arguments):
    return factorize(weight, None, stats_from(fisher), rank=rank, **arguments)[0].dense()


def loss(fisher, weight, other):
    return (fisher * (weight - other).square()).sum()


@pytest.mark.parametrize("arguments", [{}, {"side": "out"}, {"side": "both"}, {"exact": True}])
def test_constant_fisher_gives_plain_svd(arguments):
    weight = torch.randn(14, 9, dtype=torch.float64)
    plain = METHODS["svd"].factorize(weight, None, None, rank=3)[0].dense()
    ours = dense(weight, torch.full((14, 9), 1e-7, dtype=torch.float64), **arguments)
    assert (ours - plain).norm() <= (14 + 9) ** 2 * EPS * 1e3 * weight.norm()


@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_fisher_that_is_a_product_is_solved_exactly(side):
    """Where F_ij = o_i c_j the closed form is the optimum, and the descent has nothing left to gain."""
    weight = torch.randn(14, 9, dtype=torch.float64)
    o = torch.ones(14, 1, dtype=torch.float64) if side == "in" else torch.rand(14, 1, dtype=torch.float64) + 0.1
    c = torch.ones(1, 9, dtype=torch.float64) if side == "out" else torch.rand(1, 9, dtype=torch.float64) + 0.1
    fisher = o * c
    closed, exact = dense(weight, fisher, side=side), dense(weight, fisher, side=side, exact=True)
    assert loss(fisher, weight, exact) <= loss(fisher, weight, closed) * (1 + 1e3 * EPS)
    assert loss(fisher, weight, closed) <= loss(fisher, weight, exact) * (1 + 1e-4)  # the guard, 1e-5 on either side
    plain = METHODS["svd"].factorize(weight, None, None, rank=3)[0].dense()
    assert loss(fisher, weight, closed) < loss(fisher, weight, plain)
    assert (weight - closed).norm() >= (weight - plain).norm()


@pytest.mark.parametrize("shape", [(20, 14), (14, 20), (16, 16)])
def test_weighting_by_element_beats_by_row_beats_not_at_all(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    fisher = torch.rand(shape, dtype=torch.float64) ** 4 * torch.logspace(0, -2, shape[1], dtype=torch.float64)
    plain = METHODS["svd"].factorize(weight, None, None, rank=3)[0].dense()
    losses = [loss(fisher, weight, other) for other in (
        dense(weight, fisher, exact=True), dense(weight, fisher), plain)]
    assert losses == sorted(losses) and losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_every_step_of_the_descent_lowers_the_objective(monkeypatch, side):
    from lowfat.methods import fwsvd
    weight, fisher = torch.randn(12, 10, dtype=torch.float64), torch.rand(12, 10, dtype=torch.float64) ** 6
    losses = []
    monkeypatch.setattr(fwsvd, "_GAIN", -1.0)
    for steps in range(12):
        monkeypatch.setattr(fwsvd, "_STEPS", steps)
        losses.append(loss(fisher, weight, dense(weight, fisher, side=side, exact=True)))
    assert all(b <= a * (1 + 1e3 * EPS) for a, b in zip(losses, losses[1:])) and losses[-1] < losses[0]


@pytest.mark.parametrize("arguments", [{}, {"side": "out"}, {"side": "both"}, {"exact": True}])
def test_the_scale_of_the_fisher_information_does_not_matter(arguments):
    weight, fisher = torch.randn(14, 9), torch.rand(14, 9) ** 4
    a, b = dense(weight, fisher, **arguments), dense(weight, fisher * 2.0**-30, **arguments)
    assert torch.equal(a, b)


@pytest.mark.parametrize("arguments", [{}, {"side": "out"}, {"side": "both"}, {"exact": True}])
def test_features_without_gradient_give_no_infinity(arguments):
    weight, fisher = torch.randn(14, 9), torch.rand(14, 9)
    fisher[:, 2] = 0
    fisher[5] = 0
    assert dense(weight, fisher, **arguments).isfinite().all()
    zero = dense(weight, torch.zeros(14, 9), **arguments)
    plain = METHODS["svd"].factorize(weight, None, None, rank=3)[0].dense()
    assert (zero - plain).norm() <= 14 * 9 * torch.finfo(torch.float32).eps * weight.norm()


@pytest.mark.parametrize("side, index", [("in", (slice(None), 3)), ("out", 3), ("both", 3)])
def test_a_heavy_feature_is_reconstructed_better(side, index):
    """The orientation test: kills sums over the wrong axis, on a square weight."""
    weight, flat = torch.randn(12, 12, dtype=torch.float64), torch.rand(12, 12, dtype=torch.float64) + 0.5
    heavy = flat.clone()
    heavy[index] *= 1e4
    errors = [(weight - dense(weight, fisher, side=side))[index].norm() for fisher in (flat, heavy)]
    assert errors[1] < errors[0] / 10


def test_missing_or_foreign_statistics_are_refused():
    weight = torch.randn(5, 7)
    with pytest.raises(ArgumentError, match="calibrate with labels in the batches"):
        factorize(weight, None, Stats(torch.eye(7), 7), rank=2)
    with pytest.raises(ArgumentError, match="calibrate with labels"):
        factorize(weight, None, None, rank=2)
    with pytest.raises(ArgumentError, match="exact=True needs.*elements"):
        factorize(weight, None, Stats(torch.eye(7), 7, torch.ones(7), torch.ones(5)), rank=2, exact=True)
    with pytest.raises(ArgumentError, match=r"fisher_in \[5\], fisher_out \[7\]"):
        factorize(weight, None, Stats(torch.eye(7), 7, torch.ones(5), torch.ones(7)), rank=2)
