"""Sparsity-aware SVD: what the weights of elements do, what empty rows and columns give back, and that the budget is kept."""
import pytest
import torch

import lowfat
from lowfat.errors import ArgumentError, NumericsError, ShapeError
from lowfat.methods import METHODS
from lowfat.stats import Calibration, Stats
from lowfat.structures import LowRank, Submatrix

EPS = torch.finfo(torch.float64).eps
factorize, losses = METHODS["sparsity_aware"].factorize, METHODS["sparsity_aware"].losses


def stats_from(omega):
    return Stats(None, 0, omega.sum(0), omega.sum(1), omega, samples=1)


def loss(omega, weight, other):
    return (omega * (weight - other).square()).sum()


def pruned(n=24, k=18, keep=0.3, dtype=torch.float64):
    """(weight with zeros, its mask, uneven scores of what is kept)"""
    weight, mask = torch.randn(n, k, dtype=dtype), torch.rand(n, k) < keep
    return weight * mask, mask, torch.rand(n, k, dtype=dtype) ** 4 * mask + 1e-6


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_weighted_error_is_no_more_than_that_of_the_plain_svd(seed, exact):
    torch.manual_seed(seed)
    weight, _, omega = pruned()
    plain = METHODS["svd"].factorize(weight, None, None, rank=4)[0].dense()
    ours = factorize(weight, None, stats_from(omega), rank=4, exact=exact)[0].dense()
    if exact:
        assert loss(omega, weight, ours) < loss(omega, weight, plain)
        closed = factorize(weight, None, stats_from(omega), rank=4)[0].dense()
        assert loss(omega, weight, ours) <= loss(omega, weight, closed)
    else:  # of its own objective, the sums over outputs
        sums = omega.sum(0).expand_as(omega)
        assert loss(sums, weight, ours) < loss(sums, weight, plain) * (1 + 1e-4)  # the guard


@pytest.mark.parametrize("exact", [False, True])
def test_the_same_weight_everywhere_is_the_plain_svd_bit_for_bit(exact):
    weight, _, _ = pruned(dtype=torch.float32)
    ours, events = factorize(weight, torch.ones(24), stats_from(torch.full_like(weight, 3e-5)), rank=5, exact=exact)
    plain, _ = METHODS["svd"].factorize(weight, torch.ones(24), None, rank=5)
    assert events == [] and all(torch.equal(ours.get_parameter(name), plain.get_parameter(name)) for name in ("u", "v", "bias"))


def test_it_is_fwsvd_with_other_weights_where_nothing_is_empty():
    weight, _, omega = pruned()
    for exact in (False, True):
        ours, _ = factorize(weight, None, stats_from(omega), rank=5, exact=exact)
        theirs, _ = METHODS["fwsvd"].factorize(weight, None, stats_from(omega), rank=5, exact=exact)
        assert type(ours) is LowRank and torch.equal(ours.u, theirs.u) and torch.equal(ours.v, theirs.v)


@pytest.mark.parametrize("bias", [None, torch.randn(24, dtype=torch.float64)])
def test_empty_rows_and_columns_give_their_parameters_to_the_rank(bias):
    weight, _, omega = pruned()
    weight[::2], weight[:, :6] = 0, 0
    layer, events = factorize(weight, bias, stats_from(omega), rank=4)
    assert type(layer) is Submatrix and layer.shape()["inputs"] == 12 and layer.shape()["outputs"] == 12
    assert layer.rank == 4 * (24 + 18) // 24 == 7 and events == ["12 empty rows and 6 empty columns dropped: rank 7 for 4"]
    assert layer.macs() <= 4 * (24 + 18)
    plain, _ = factorize(weight, bias, stats_from(omega), rank=4, drop=False)
    assert type(plain) is LowRank and plain.rank == 4
    assert loss(omega, weight, layer.dense()) < loss(omega, weight, plain.dense())
    assert not layer.dense()[::2].any() and not layer.dense()[:, :6].any()
    assert layer.bias is None if bias is None else torch.equal(layer.bias, bias)


def test_what_is_dropped_changes_nothing_but_the_rank():
    """At the rank that was there before, the closed form is the same matrix: rows of zeros weigh nothing in it."""
    weight, _, omega = pruned()
    weight[::2], omega[::2], weight[:, :6] = 0, 0, 0
    dropped, _ = factorize(weight, None, stats_from(omega), rank=4)
    whole, _ = factorize(weight, None, stats_from(omega), rank=dropped.rank, drop=False)
    assert (whole.dense() - dropped.dense()).norm() <= (24 + 18) ** 2 * EPS * 1e6 * weight.norm()


def test_a_rank_of_eights_stays_one():
    weight, _, omega = pruned(64, 64, 0.9)
    weight[:20] = 0
    layer, _ = factorize(weight, None, stats_from(omega), rank=8)
    assert type(layer) is LowRank  # 9 would fit, no 16
    weight[:, :50] = 0
    layer, _ = factorize(weight, None, stats_from(omega), rank=8)
    assert type(layer) is Submatrix and layer.rank == 14  # all that 14 columns have


def test_a_weight_of_zeros():
    layer, _ = factorize(torch.zeros(9, 7), None, stats_from(torch.ones(9, 7)), rank=2)
    assert not layer.dense().any() and layer.dense().isfinite().all()


def test_the_loss_curve_is_that_of_the_whole_weight():
    weight, _, omega = pruned()
    weight[::2] = 0
    curve = losses(weight, stats_from(omega))
    assert torch.equal(curve, METHODS["fwsvd"].losses(weight, stats_from(omega), side="in"))


def test_missing_or_foreign_weights_are_refused():
    weight = torch.randn(5, 7)
    with pytest.raises(ArgumentError, match="sparsity_aware needs the Fisher information, found none"):
        factorize(weight, None, None, rank=2)
    with pytest.raises(ArgumentError, match="sparsity_aware with exact=True needs"):
        factorize(weight, None, Stats(None, 0, torch.ones(7), torch.ones(5)), rank=2, exact=True)
    with pytest.raises(ArgumentError, match=r"fisher_in \[5\], fisher_out \[7\]"):
        factorize(weight, None, stats_from(torch.ones(7, 5)), rank=2)
    with pytest.raises(ShapeError, match="between 1 and 5"):
        factorize(weight, None, stats_from(torch.rand(5, 7)), rank=6)
    weight[0, 0] = float("inf")
    with pytest.raises(NumericsError, match="weight"):
        factorize(weight, None, stats_from(torch.rand(5, 7)), rank=2)


def test_sums_alone_are_enough_for_the_closed_form():
    weight, _, omega = pruned()
    weight[::2], omega[::2] = 0, 0
    some, _ = factorize(weight, None, Stats(None, 0, omega.sum(0), omega.sum(1)), rank=4)
    all_, _ = factorize(weight, None, stats_from(omega), rank=4)
    assert some.rank == all_.rank and (some.dense() - all_.dense()).norm() <= (24 + 18) ** 2 * EPS * 1e6 * weight.norm()


def test_elements_that_hardly_count_may_become_anything_and_the_layer_is_kept(tiny_bert):
    """Further from the weight than zeros are, but not where it counts: by what the method minimizes it is kept."""
    names, omega = list(lowfat.plan(tiny_bert, method="svd", ratio=0.5)), {}
    for name in names:
        weight = tiny_bert.get_submodule(name).weight
        mask = torch.rand(weight.shape) < 0.2
        with torch.no_grad():
            weight.mul_(mask)
        omega[name] = stats_from(mask * torch.rand(weight.shape) + 1e-4)
    stats = Calibration(omega)
    plan = lowfat.plan(tiny_bert, method="sparsity_aware", ratio=0.5, stats=stats, arguments={"exact": True})
    report = lowfat.factorize(tiny_bert, plan, stats)
    assert all(layer.kept for layer in report.layers) and max(layer.error for layer in report.layers) > 1


def test_a_model_keeps_its_budget_and_counts_what_is_stored(tiny_bert, tmp_path):
    names = [name for name in lowfat.plan(tiny_bert, method="svd", ratio=0.5)]
    omega = {}
    for name in names:
        weight = tiny_bert.get_submodule(name).weight
        with torch.no_grad():
            weight[:, :10] = 0
        omega[name] = stats_from(torch.rand(weight.shape))
    plan = lowfat.plan(tiny_bert, method="sparsity_aware", ratio=0.5, stats=Calibration(omega))
    report = lowfat.factorize(tiny_bert, plan, Calibration(omega))
    stored = sum(parameter.numel() for name in names for key, parameter in tiny_bert.get_submodule(name).named_parameters()
                 if key != "bias")
    assert report.parameters == stored and report.ratio <= 0.5
    assert "Submatrix" in {layer.structure for layer in report.layers} and report.layers[0].output_error is None
    lowfat.save(tiny_bert, tmp_path / "out")
    batch = {"input_ids": torch.arange(6)[None]}
    assert torch.equal(lowfat.load(tmp_path / "out")(**batch).logits, tiny_bert(**batch).logits)
