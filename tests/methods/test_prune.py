"""N:M pruning: which weights stay, what the others' errors are, and that later inputs make up for earlier ones."""
import itertools

import matrices
import pytest
import torch

import lowfat
from lowfat.errors import ArgumentError, NumericsError, ShapeError
from lowfat.methods import METHODS, check_arguments, prune
from lowfat.stats import Stats

EPS = torch.finfo(torch.float64).eps
NAMES = ("magnitude", "wanda", "sparsegpt")
every_method = pytest.mark.parametrize("name", NAMES)


def stats_of(x):
    return Stats(x.mT @ x, len(x))


def inputs(k, rows=200):
    """Correlated, of uneven energy."""
    return torch.randn(rows, k, dtype=torch.float64) @ torch.randn(k, k, dtype=torch.float64) @ torch.diag(
        torch.logspace(0, -1, k, dtype=torch.float64))


def made(name, weight, stats, rank, **arguments):
    return METHODS[name].factorize(weight, None, stats, rank=rank, **arguments)[0]


@torch.no_grad()
def outputs_lost(name, weight, stats, rank, **arguments):
    error = weight - made(name, weight, stats, rank, **arguments).dense()
    return float(((error @ stats.gram) * error).sum())


@every_method
@pytest.mark.parametrize("rank, group", [(2, 4), (1, 4), (3, 4), (4, 4), (1, 2), (5, 8), (2, 6)])
def test_so_many_of_every_group_stay_and_all_counts_are_the_formulas(name, rank, group):
    weight, stats = torch.randn(11, 48), stats_of(inputs(48).float())
    layer = made(name, weight, stats, rank, group=group)
    assert (layer.keep().view(11, -1, group).sum(2) == rank).all() and (layer.n, layer.m) == (rank, group)
    parameters, index_bytes = METHODS[name].stored(48, 11, rank=rank, group=group)
    assert parameters == 11 * 48 * rank // group == layer.values.numel() and index_bytes == layer.mask.nbytes
    assert METHODS[name].size(48, 11, group=group) == (11 * 48 // group, group)


@every_method
def test_all_of_a_group_is_the_weight_itself(name):
    weight, stats = torch.randn(9, 16, dtype=torch.float64), stats_of(inputs(16))
    assert torch.equal(made(name, weight, stats, 4).dense(), weight)


def test_magnitude_and_wanda_keep_the_weights_as_they_are():
    weight, stats = torch.randn(9, 16), stats_of(inputs(16).float())
    for name in NAMES[:2]:
        layer = made(name, weight, stats, 2)
        assert torch.equal(layer.dense(), weight * layer.keep())


def test_wanda_sees_what_inputs_are_loud():
    """By hand: 3 * 1, 2.5 * 4, 1 * 1, 4 * 2."""
    weight = torch.tensor([[3.0, -2.5, 1.0, 4.0]])
    stats = Stats(torch.diag(torch.tensor([1.0, 16.0, 1.0, 4.0])), 1)
    assert made("magnitude", weight, None, 2).keep().tolist() == [[True, False, False, True]]
    assert made("wanda", weight, stats, 2).keep().tolist() == [[False, True, False, True]]
    assert made("wanda", weight, stats, 1).keep().tolist() == [[False, True, False, False]]


def test_white_inputs_leave_nothing_to_make_up_for():
    """All three are one method then."""
    weight, stats = torch.randn(9, 16, dtype=torch.float64), Stats(torch.eye(16, dtype=torch.float64), 16)
    plain = made("magnitude", weight, None, 2).dense()
    assert torch.equal(made("wanda", weight, stats, 2).dense(), plain)
    assert (made("sparsegpt", weight, stats, 2).dense() - plain).norm() <= 16**2 * EPS * plain.norm()


@pytest.mark.parametrize("width", [4, 8, 128])
def test_the_sweep_is_the_best_for_the_mask_step_by_step(width, monkeypatch):
    """Against the definition, without a Cholesky factor: when input j has had its turn, later inputs hold what is best for
    the outputs given all that is settled. However many columns are corrected at a time."""
    monkeypatch.setattr(prune, "_COLUMNS", width)
    weight, stats = torch.randn(5, 12, dtype=torch.float64), stats_of(inputs(12))
    layer = made("sparsegpt", weight, stats, 2)
    gram = stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    current, keep = weight.clone(), layer.keep()
    for j in range(12):
        if j % 4 == 0:
            inverse = torch.linalg.inv(gram[j:, j:])
            left = torch.linalg.cholesky(inverse, upper=True).diagonal()[:4]
            scores = current[:, j:j + 4].square() / left.square()
            assert torch.equal(keep[:, j:j + 4], prune.largest_of_groups(scores, 2, 4))
        moved = current[:, j] * keep[:, j] - current[:, j]
        current[:, j + 1:] -= torch.linalg.solve(gram[j + 1:, j + 1:], gram[j + 1:, j, None] * moved).mT
        current[:, j] += moved
    assert (layer.dense() - current).norm() <= 12**2 * EPS * float(torch.linalg.cond(gram)) * weight.norm()


def test_the_order_of_the_papers():
    """In the outputs of correlated inputs of uneven energy: magnitude loses most, then wanda, then sparsegpt."""
    for seed in range(5):
        torch.manual_seed(seed)
        mixed = torch.eye(64) + 0.1 * torch.randn(64, 64)
        x = torch.randn(200, 64) @ mixed @ torch.diag(torch.logspace(0, -1, 64)[torch.randperm(64)])
        weight, stats = torch.randn(64, 64, dtype=torch.float64), stats_of(x.double())
        magnitude, wanda, sparsegpt = (outputs_lost(name, weight, stats, 2) for name in NAMES)
        assert magnitude > wanda > sparsegpt


@every_method
@pytest.mark.parametrize("group", [2, 4, 8])
def test_the_loss_curve_is_what_is_measured(name, group):
    weight, stats = torch.randn(9, 16, dtype=torch.float64), stats_of(inputs(16))
    curve = METHODS[name].losses(weight, stats, group=group)
    assert curve.shape == (group + 1,) and curve.dtype == torch.float64 and curve[-1] == 0
    assert all(b < a for a, b in itertools.pairwise(curve.tolist()))
    mean = stats.gram.diagonal().mean()
    eye = torch.eye(16, dtype=torch.float64)
    metric = {"magnitude": eye, "wanda": torch.diag(stats.gram.diagonal() + 1e-6 * mean),
              "sparsegpt": stats.gram + 0.01 * mean * eye}[name]
    for rank in range(1, group + 1):
        error = weight - made(name, weight, stats, rank, group=group).dense()
        assert abs(float(((error @ metric) * error).sum()) - curve[rank]) <= 16**2 * EPS * 1e3 * curve[0]
    assert abs(float(((weight @ metric) * weight).sum()) - curve[0]) <= 16**2 * EPS * 1e3 * curve[0]


@every_method
def test_a_matrix_of_the_form_stays_as_it_is(name):
    weight = torch.randn(9, 16, dtype=torch.float64) * prune.largest_of_groups(torch.rand(9, 16), 2, 4)
    assert (made(name, weight, stats_of(inputs(16)), 2).dense() - weight).norm() <= 16**2 * EPS * weight.norm()


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_layer_has_the_dtype_and_the_bias_and_the_same_bits_each_time(name, dtype):
    weight, bias, stats = torch.randn(9, 16).to(dtype), torch.randn(9).to(dtype), stats_of(inputs(16).float())
    before = weight.clone(), stats.gram.clone()
    one, other = (METHODS[name].factorize(weight, bias, stats, rank=2) for _ in range(2))
    assert one[0].values.dtype == dtype and torch.equal(one[0].bias, bias) and one[1] == other[1] == []
    assert torch.equal(one[0].values, other[0].values) and torch.equal(one[0].mask, other[0].mask)
    assert torch.equal(weight, before[0]) and torch.equal(stats.gram, before[1])


@every_method
@pytest.mark.parametrize("weight", matrices.weights())
def test_degenerate_weights_never_give_nan(name, weight):
    weight = matrices.weights()[weight]
    weight = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 4))
    stats = stats_of(torch.randn(60, weight.shape[1]))
    layer, _ = METHODS[name].factorize(weight, None, stats, rank=2)
    assert layer.values.isfinite().all() and METHODS[name].losses(weight, stats).isfinite().all()


@every_method
@pytest.mark.parametrize("x", matrices.inputs(12))
def test_degenerate_inputs_never_give_nan(name, x):
    weight, stats = torch.randn(9, 12), stats_of(matrices.inputs(12)[x])
    layer, events = METHODS[name].factorize(weight, None, stats, rank=2)
    assert layer.values.isfinite().all() and METHODS[name].losses(weight, stats).isfinite().all()
    if x == "nothing but zeros":
        assert torch.equal(layer.keep(), made("magnitude", weight, None, 2).keep())


@every_method
def test_wrong_calls_are_named(name):
    weight, stats = torch.randn(9, 18), stats_of(inputs(18).float())
    with pytest.raises(ShapeError, match="in_features must be a multiple of 4"):
        made(name, weight, stats, 2)
    with pytest.raises(ShapeError, match="rank, the number kept of each 6, must be between 1 and 6, found 7"):
        made(name, weight, stats, 7, group=6)
    for group in (1, 33, "4", True, 2.0):
        with pytest.raises(ArgumentError, match=f"{name}: group must be a whole number from 2 to 32; found {group!r}"):
            check_arguments(name, {"group": group})
    if name != "magnitude":
        with pytest.raises(ArgumentError, match="wanda and sparsegpt need calibration statistics, found none"):
            made(name, weight, None, 2, group=6)
    weight[2, 3] = torch.nan
    with pytest.raises(NumericsError, match="weight .* 1 of"):
        made(name, weight, stats, 2, group=6)


# --- plans ---

@every_method
def test_half_of_a_model_is_two_of_four(name, tiny_llama, tmp_path):
    stats = lowfat.calibrate(tiny_llama, [{"input_ids": torch.randint(0, 97, (4, 12))}])
    plan = lowfat.plan(tiny_llama, method=name, ratio=0.5, stats=stats)
    assert plan.totals()["ratio"] == 0.5 and {choice.arguments["rank"] for choice in plan.values()} == {2}
    assert plan.totals()["index_bytes"] == sum(4 * choice.out_features * -(-choice.in_features // 32)
                                               for choice in plan.values())
    report = lowfat.factorize(tiny_llama, plan, stats)
    assert report.parameters == plan.totals()["parameters"]
    ids = torch.arange(12).view(2, 6)
    expected = tiny_llama(ids).logits
    lowfat.save(tiny_llama, tmp_path / "half")
    assert torch.equal(lowfat.load(tmp_path / "half")(ids).logits, expected)


@pytest.mark.parametrize("policy", ["allocated", "knapsack"])
def test_layers_get_as_many_of_a_group_as_they_need(policy, tiny_llama):
    """One layer of 1:4 already: that costs nothing there, and the others get what it leaves."""
    thin = tiny_llama.model.layers[0].mlp.up_proj.weight
    thin.data *= prune.largest_of_groups(thin.data.abs(), 1, 4)
    plan = lowfat.plan(tiny_llama, method="magnitude", ratio=0.6, policy=policy)
    assert plan["model.layers.0.mlp.up_proj"].arguments["rank"] == 1 and 0.5 < plan.totals()["ratio"] <= 0.6
