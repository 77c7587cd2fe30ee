"""OATS: low rank plus N:M or entries anywhere in a row, planted and found again, never worse from step to step, and by how
loud the inputs are."""
import itertools

import matrices
import pytest
import torch

import lowfat
from lowfat.errors import ArgumentError, NumericsError, ShapeError
from lowfat.methods import METHODS, check_arguments, oats
from lowfat.spectra import spectra
from lowfat.stats import Stats
from lowfat.structures import LowRankSparse
from lowfat.structures.sparse24 import largest, largest_of_groups

EPS = torch.finfo(torch.float64).eps
FORMS = [{}, {"density": 0.25}]


def stats_of(x):
    return Stats(x.mT @ x, len(x))


def white(k):
    return Stats(torch.eye(k, dtype=torch.float64), k)


def made(weight, stats, rank, **arguments):
    return oats.factorize(weight, None, stats, rank=rank, **arguments)[0]


@torch.no_grad()
def lost(weight, layer, stats):
    scale = stats.gram.diagonal().double() + 1e-6 * stats.gram.diagonal().double().mean()
    return float(((weight.double() - layer.double().dense()).square() * scale).sum())


@pytest.mark.parametrize("arguments", FORMS)
def test_no_step_loses_more_and_the_curve_is_the_first(arguments, monkeypatch):
    weight, stats = torch.randn(24, 32, dtype=torch.float64), stats_of(torch.randn(99, 32, dtype=torch.float64))
    losses = []
    for steps in (1, 2, 5, 80):
        monkeypatch.setattr(oats, "_STEPS", steps)
        losses.append(lost(weight, made(weight, stats, 5, **arguments), stats))
    assert all(b < a for a, b in itertools.pairwise(losses)) and losses[-1] < 0.9 * losses[0]
    curve = oats.losses(weight, stats, **arguments)
    assert curve.shape == (25,) and (curve[:-1] >= curve[1:]).all()
    assert abs(curve[5] - losses[0]) <= 24 * 32 * EPS * 1e3 * curve[0]


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_sum_is_found_again(seed):
    """Low rank, and entries that stand out of it, at most one of four, but leave the leading directions where they are: what
    is lost goes on to fall, slowly, with no floor. Which part holds what is open: one of four is kept also where nothing was
    planted."""
    torch.manual_seed(seed)
    low_rank = torch.randn(48, 3, dtype=torch.float64) @ torch.randn(3, 64, dtype=torch.float64)
    spikes = 5 * torch.randn(48, 64, dtype=torch.float64) * largest_of_groups(torch.rand(48, 64), 1, 4) \
        * (torch.rand(48, 64) < 0.1)
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oats, "_GAIN", 0)
        for steps in (20, 200, 2000):
            patch.setattr(oats, "_STEPS", steps)
            losses.append(lost(low_rank + spikes, made(low_rank + spikes, white(64), 3, kept=1), white(64)))
    assert all(after < before / 2 for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_density_is_found_again(seed):
    """Low rank and, wherever they are in a row, as many entries as are kept: both parts, to the last bits."""
    torch.manual_seed(seed)
    low_rank = torch.randn(48, 3, dtype=torch.float64) @ torch.randn(3, 64, dtype=torch.float64)
    keep = largest(torch.rand(48, 64), 3)
    spikes = 5 * torch.randn(48, 64, dtype=torch.float64).sign() * (1 + torch.rand(48, 64, dtype=torch.float64)) * keep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oats, "_GAIN", 0)
        layer = made(low_rank + spikes, white(64), 3, density=3 / 64)
    assert torch.equal(layer.keep(), keep) and (layer.starts.diff() == 3).all()
    assert (layer.values - spikes[keep]).norm() <= 1e-12 * spikes.norm()
    assert (layer.u @ layer.v - low_rank).norm() <= 1e-12 * spikes.norm()


def test_freedom_of_place_is_worth_it():
    """At as many entries the whole row loses less than groups of four, of which it may do all that they do."""
    weight, stats = torch.randn(48, 64)**3, stats_of(torch.randn(200, 64))
    groups, rows = (lost(weight, made(weight, stats, 6, **arguments), stats) for arguments in FORMS)
    assert rows < 0.9 * groups


def test_both_parts_are_worth_their_parameters():
    """Against low rank alone and sparse alone: with heavy entries on a falling spectrum the sum is closer at as many."""
    weight = torch.randn(64, 64) @ torch.diag(0.9**torch.arange(64)) + 0.02 * torch.randn(64, 64)**3
    both = made(weight, white(64), 8, kept=1)
    assert sum(p.numel() for p in both.parameters()) == 16 * 128
    low_rank = METHODS["svd"].factorize(weight, None, None, rank=16)[0]
    sparse = METHODS["magnitude"].factorize(weight, None, None, rank=2)[0]
    assert lost(weight, both, white(64)) < min(lost(weight, low_rank, white(64)), lost(weight, sparse, white(64)))


def test_louder_inputs_are_kept_better():
    weight, x = torch.randn(30, 24, dtype=torch.float64), torch.randn(300, 24, dtype=torch.float64)
    louder = x.clone()
    louder[:, 5] *= 100
    for arguments in FORMS:
        errors = [(weight - made(weight, stats_of(seen), 4, **arguments).dense())[:, 5].norm() for seen in (x, louder)]
        assert errors[1] < errors[0] / 10


@pytest.mark.parametrize("kept, group", [(2, 4), (1, 4), (3, 8)])
def test_all_counts_are_the_formulas(kept, group):
    weight, stats = torch.randn(24, 32), stats_of(torch.randn(99, 32))
    layer = made(weight, stats, 5, kept=kept, group=group)
    parameters, index_bytes = METHODS["oats"].stored(32, 24, rank=5, kept=kept, group=group)
    assert parameters == 5 * 56 + 24 * 32 * kept // group == sum(p.numel() for p in layer.parameters())
    assert index_bytes == sum(buffer.nbytes for buffer in layer.buffers())
    low_rank, sparse = layer.parts
    assert low_rank.rank == 5 and (sparse.n, sparse.m) == (kept, group)


@pytest.mark.parametrize("density, kept", [(0.25, 8), (0.07, 2), (0.03125, 1), (0.96875, 31)])
def test_all_counts_of_a_density_are_the_formulas(density, kept):
    weight, stats = torch.randn(24, 32), stats_of(torch.randn(99, 32))
    layer = made(weight, stats, 5, density=density)
    parameters, index_bytes = METHODS["oats"].stored(32, 24, rank=5, density=density)
    assert parameters == 5 * 56 + 24 * kept == sum(p.numel() for p in layer.parameters())
    assert index_bytes == 4 * 25 + 2 * 24 * kept == sum(buffer.nbytes for buffer in layer.buffers())
    assert isinstance(layer, LowRankSparse) and layer.rank == 5 and layer.density == 24 * kept / (24 * 32)
    assert METHODS["oats"].stored(40_000, 2, rank=1, density=0.1) == (40_002 + 8000, 4 * 3 + 4 * 8000)


@pytest.mark.parametrize("weight", matrices.weights())
def test_degenerate_weights_never_give_nan(weight):
    weight = matrices.weights()[weight]
    weight = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 4))
    stats = stats_of(torch.randn(60, weight.shape[1]))
    for arguments in FORMS:
        layer, _ = oats.factorize(weight, None, stats, rank=1, **arguments)
        assert all(parameter.isfinite().all() for parameter in layer.parameters())
        assert oats.losses(weight, stats, **arguments).isfinite().all()


@pytest.mark.parametrize("x", matrices.inputs(12))
def test_degenerate_inputs_never_give_nan(x):
    weight, stats = torch.randn(9, 12), stats_of(matrices.inputs(12)[x])
    for arguments in FORMS:
        layer, _ = oats.factorize(weight, None, stats, rank=3, **arguments)
        assert all(parameter.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("arguments", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_layer_has_the_dtype_and_the_bias_and_the_same_bits_each_time(dtype, arguments):
    weight, bias, stats = torch.randn(9, 16).to(dtype), torch.randn(9).to(dtype), stats_of(torch.randn(60, 16))
    (one, events), (other, _) = (oats.factorize(weight, bias, stats, rank=3, **arguments) for _ in range(2))
    assert {parameter.dtype for parameter in one.parameters()} == {dtype} and torch.equal(one.bias, bias) and events == []
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_wrong_calls_are_named():
    weight, stats = torch.randn(9, 16), stats_of(torch.randn(60, 16))
    with pytest.raises(ArgumentError, match="oats needs calibration statistics, found none"):
        oats.factorize(weight, None, None, rank=2)
    for kept in (0, "2", True):
        with pytest.raises(ArgumentError, match="oats: kept must be a whole number above 0"):
            check_arguments("oats", {"kept": kept})
    with pytest.raises(ShapeError, match="kept must be below the group, 4; found 4"):
        made(weight, stats, 2, kept=4)
    with pytest.raises(ShapeError, match="multiple of 6"):
        made(weight, stats, 2, group=6)
    for density in (0, 2, "0.5", True):
        with pytest.raises(ArgumentError, match="oats: density must be above 0 and at most 1"):
            check_arguments("oats", {"density": density})
    for density, kept in ((0.06, 0), (1.0, 16)):
        with pytest.raises(ShapeError, match=f"keeps {kept} of 16 inputs of a row, must keep 1 to 15 of them"):
            made(weight, stats, 2, density=density)
    for other in ("kept", "group"):
        with pytest.raises(ArgumentError, match=f"density 0.5 and {other} 4: needs one of them"):
            METHODS["oats"].size(16, 9, density=0.5, **{other: 4})
    for arguments in FORMS:
        with pytest.raises(ShapeError, match="rank must be between 1 and 9"):
            made(weight, stats, 10, **arguments)
    weight[1, 2] = torch.inf
    with pytest.raises(NumericsError, match="weight .* 1 of"):
        made(weight, stats, 2)


@pytest.mark.parametrize("arguments", [{"kept": 1}, {"density": 0.25}])
@pytest.mark.parametrize("policy", ["per_matrix", "uniform_rank", "allocated", "knapsack"])
def test_a_model_keeps_the_ratio_and_runs(policy, arguments, tiny_llama, tmp_path):
    stats = lowfat.calibrate(tiny_llama, [{"input_ids": torch.randint(0, 97, (4, 12))}])
    plan = lowfat.plan(tiny_llama, method="oats", ratio=0.6, policy=policy, stats=stats, arguments=arguments)
    assert 0.5 < plan.totals()["ratio"] <= 0.6
    plan.save(tmp_path / "plan.json")
    assert lowfat.Plan.load(tmp_path / "plan.json") == plan
    report = lowfat.factorize(tiny_llama, plan, stats)
    assert report.parameters == plan.totals()["parameters"]
    assert [one.rank for one in report.layers if one.kept] == [one.arguments["rank"] for one in plan.values() if one.method]
    assert [one.rank for one in spectra(tiny_llama)] == [one.arguments.get("rank") for one in plan.values()]
    assert sum(layer.index_bytes for layer in report.layers) == plan.totals()["index_bytes"] > 0
    ids = torch.arange(12).view(2, 6)
    expected = tiny_llama(ids).logits
    lowfat.save(tiny_llama, tmp_path / "half")
    assert torch.equal(lowfat.load(tmp_path / "half")(ids).logits, expected)
