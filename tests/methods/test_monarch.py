"""Methods monarch and block_low_rank: optimal in their metrics, never worse than the plain projection, ladders of their own."""
import pytest
import torch

import lowfat
from lowfat.errors import ArgumentError, NumericsError, ShapeError
from lowfat.methods import METHODS, check_arguments
from lowfat.stats import Stats
from lowfat.structures import Monarch

NAMES = ("monarch", "block_low_rank")
N, K = 22, 30
EPS = torch.finfo(torch.float64).eps


def is_same(found, expected, condition=1.0):
    """But for the rounding of about N + K steps, each as many numbers long, in a problem of this condition."""
    return (found - expected).norm() <= (N + K) ** 2 * EPS * condition * expected.norm()


def stats_of(x):
    return Stats(gram=(x.T @ x).float(), rows=len(x), fisher_in=torch.rand(K) + 0.1, fisher_out=torch.rand(N) + 0.1, samples=1)


@pytest.fixture
def problem():
    """A weight, and inputs whose channels are correlated across blocks."""
    x = torch.randn(400, 12, dtype=torch.float64) @ torch.randn(12, K, dtype=torch.float64) + 0.1 * torch.randn(400, K)
    return torch.randn(N, K, dtype=torch.float64), x, stats_of(x)


@torch.no_grad()
def output_error(layer, weight, x):
    return float(((weight - layer.dense()) @ x.T).norm() / (weight @ x.T).norm())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blocks", [1, 3, (2, 5)])
def test_the_weights_fit_is_the_exact_projection(name, blocks, problem):
    weight, _, _ = problem
    layer, _ = METHODS[name].factorize(weight, None, None, rank=2, blocks=blocks)
    plain = Monarch.from_dense(weight, blocks=blocks, rank=2, interleave=name == "monarch")
    assert is_same(layer.dense(), plain.dense()) and layer.shape() == plain.shape()
    curve = METHODS[name].losses(weight, None, blocks=blocks)
    assert abs(curve[2] - (weight - layer.dense()).square().sum()) <= (N + K) ** 2 * EPS * curve[0]
    assert len(curve) == METHODS[name].size(K, N, blocks=blocks)[1] + 1 and curve[-1] <= 1e-12 * curve[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blocks", [1, 3, (2, 5), 4])
def test_the_outputs_fit_beats_the_projection_on_outputs(name, blocks, problem):
    weight, x, stats = problem
    layers = {fit: METHODS[name].factorize(weight, None, stats, rank=2, blocks=blocks, fit=fit)[0] for fit in ("weights", "outputs")}
    assert output_error(layers["outputs"], weight, x) < 0.9 * output_error(layers["weights"], weight, x)


@pytest.mark.parametrize("name", NAMES)
def test_every_sweep_lowers_the_error_on_outputs(name, problem, monkeypatch):
    import lowfat.methods.monarch as module

    weight, x, stats = problem
    errors = []
    for sweeps in (0, 1, 5):
        monkeypatch.setattr(module, "_SWEEPS", sweeps)
        errors.append(output_error(METHODS[name].factorize(weight, None, stats, rank=1, blocks=3, fit="outputs")[0], weight, x))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_fit_ends_where_no_factor_can_improve(name, problem, monkeypatch):
    """At its end the gradient vanishes: kills a wrong cross term, with which the sweeps end somewhere else."""
    import lowfat.methods.monarch as module

    weight, _, stats = problem
    gram = stats.gram.double() + 1e-6 * stats.gram.double().diagonal().mean() * torch.eye(K)  # damped, as the method has it
    monkeypatch.setattr(module, "_GAIN", 0)
    slopes = []
    for sweeps in (1, 3000):
        monkeypatch.setattr(module, "_SWEEPS", sweeps)
        layer, _ = METHODS[name].factorize(weight, None, stats, rank=2, blocks=3, fit="outputs")
        error = weight - layer.dense()
        torch.einsum("nk,kl,nl->", error, gram, error).backward()
        slopes.append(layer.v.grad.norm() + layer.u.grad.norm())
    assert slopes[1] < slopes[0] / 100  # it goes on to fall, slowly: inputs of the blocks are correlated


@pytest.mark.parametrize("name", NAMES)
def test_one_block_fitted_to_outputs_is_whitened_low_rank(name, problem):
    weight, _, stats = problem
    ours, _ = METHODS[name].factorize(weight, None, stats, rank=4, blocks=1, fit="outputs")
    theirs, _ = METHODS["whitened"].factorize(weight, None, stats, rank=4)
    assert is_same(ours.dense(), theirs.dense(), condition=torch.linalg.cond(stats.gram.double()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blocks", [3, (4, 5)])
@torch.no_grad()
def test_the_fisher_fit_is_optimal_in_its_metric(name, blocks, problem):
    weight, _, stats = problem
    errors = {}
    metric = (stats.fisher_out[:, None] * stats.fisher_in).double()
    for fit in ("weights", "fisher"):
        layer, _ = METHODS[name].factorize(weight, None, stats, rank=2, blocks=blocks, fit=fit)
        errors[fit] = float((metric * (weight - layer.dense()).square()).sum())
    assert errors["fisher"] < errors["weights"]
    even = Stats(stats.gram, 1, torch.ones(K), torch.ones(N), samples=1)
    same, _ = METHODS[name].factorize(weight, None, even, rank=2, blocks=blocks, fit="fisher")
    plain, _ = METHODS[name].factorize(weight, None, None, rank=2, blocks=blocks)
    assert is_same(same.dense(), plain.dense())


def test_the_wrong_gram_matrix_and_nan(problem):
    weight, _, stats = problem
    with pytest.raises(ArgumentError, match="fit='outputs' needs calibration statistics"):
        METHODS["monarch"].factorize(weight, None, None, rank=1, fit="outputs")
    with pytest.raises(ArgumentError, match="Fisher"):
        METHODS["monarch"].factorize(weight, None, Stats(stats.gram, 1), rank=1, fit="fisher")
    with pytest.raises(ShapeError, match="rank must be between 1 and 5"):
        METHODS["monarch"].factorize(weight, None, None, rank=6, blocks=5)
    weight[0, 0] = torch.nan
    with pytest.raises(NumericsError):
        METHODS["monarch"].factorize(weight, None, None, rank=1)


# --- plans ---

def test_needs_follow_the_arguments():
    assert check_arguments("monarch", {}).needs == frozenset()
    assert check_arguments("monarch", {"fit": "outputs"}).needs == {"gram"}
    assert check_arguments("block_low_rank", {"fit": "fisher", "blocks": [2, 4]}).needs == {"fisher"}
    for blocks in (0.5, "4", [1, 2, 3], None):
        with pytest.raises(ArgumentError, match="monarch: blocks must be a whole number or two"):
            check_arguments("monarch", {"blocks": blocks})


@pytest.mark.parametrize("policy", ["per_matrix", "uniform_rank", "allocated"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_keeps_the_ratio_and_runs(name, policy, tiny_llama, tmp_path):
    plan = lowfat.plan(tiny_llama, method=name, ratio=0.5, policy=policy, arguments={"blocks": 2})
    assert 0.4 < plan.totals()["ratio"] <= 0.5
    plan.save(tmp_path / "plan.json")
    assert lowfat.Plan.load(tmp_path / "plan.json") == plan
    report = lowfat.factorize(tiny_llama, plan)
    assert report.parameters == plan.totals()["parameters"] == sum(
        layer.macs() for layer in tiny_llama.modules() if isinstance(layer, Monarch)) + sum(
        row["parameters"] for row in plan.rows() if row["method"] is None)
    ids = torch.arange(12).view(2, 6)
    expected = tiny_llama(ids).logits
    lowfat.save(tiny_llama, tmp_path / "half")
    assert torch.equal(lowfat.load(tmp_path / "half")(ids).logits, expected)


def test_blocks_that_a_layer_cannot_have_are_named(tiny_llama):
    with pytest.raises(ShapeError, match=r"layers\.0\.self_attn\.q_proj: blocks must be between 1 and 32 for 32 inputs; found 40"):
        lowfat.plan(tiny_llama, method="monarch", ratio=0.5, arguments={"blocks": 40})
    with pytest.raises(ShapeError, match="found 0"):
        lowfat.plan(tiny_llama, method="monarch", ratio=0.5, arguments={"blocks": 0})


@pytest.mark.parametrize("count, events", [(7, ["only 7 calibration rows for 8 inputs"]), (8, [])])
def test_too_few_calibration_rows_are_said(count, events):
    x = torch.randn(count, 8)
    stats = Stats(gram=x.T @ x, rows=count)
    for grouped in (False, True):
        _, found = METHODS["monarch"].factorize(torch.randn(8, 8), None, stats, rank=1, blocks=2, fit="outputs", grouped=grouped)
        assert [event for event in found if "only" in event] == events
