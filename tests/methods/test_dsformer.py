"""DSFormer's one-shot factorization: block-wise low rank with full rows, idempotent, and ahead of low rank at equal bits."""
import itertools

import matrices
import pytest
import torch

import lowfat
from lowfat.errors import ArgumentError, NumericsError, ShapeError
from lowfat.methods import METHODS, check_arguments, cospadi, dictionary, dsformer
from lowfat.structures import Dictionary

EPS = torch.finfo(torch.float64).eps
N, K = 22, 30
every_blocks = pytest.mark.parametrize("blocks", [(1, 1), (1, 3), (2, 5), (3, 4)])  # (3, 4) pads both sides


def made(weight, rank, **arguments):
    return dsformer.factorize(weight, None, None, rank=rank, **arguments)[0]


@torch.no_grad()
def error(weight, layer):
    return float((weight - layer.dense()).norm() / weight.norm())


@every_blocks
def test_full_rows_are_block_wise_low_rank(blocks):
    weight = torch.randn(N, K, dtype=torch.float64)
    ours = made(weight, 2, blocks=blocks, density=1.0).dense()
    theirs, _ = METHODS["block_low_rank"].factorize(weight, None, None, rank=2, blocks=blocks[::-1])
    assert (ours - theirs.dense()).norm() <= (N + K)**2 * EPS * 1e3 * weight.norm()


@every_blocks
def test_as_many_atoms_as_a_block_has_rows_or_inputs_give_the_weight_back(blocks):
    weight = torch.randn(N, K, dtype=torch.float64)
    rank = min(-(-N // blocks[0]), -(-K // blocks[1]))
    assert error(weight, made(weight, rank, blocks=blocks, density=1.0)) <= (N + K)**2 * EPS * 1e3


@every_blocks
@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_each_row_keeps_as_many_and_all_counts_are_the_formulas(blocks, density):
    weight = torch.randn(N, K)
    for rank in (1, 4, 7):
        layer = made(weight, rank, blocks=blocks, density=density)
        assert (layer.kept().view(N, blocks[1], rank).sum(2) == max(1, int(density * rank))).all()
        parameters, index_bytes = METHODS["dsformer"].stored(K, N, rank=rank, blocks=blocks, density=density)
        assert parameters == sum(p.numel() for p in layer.parameters()) and layer.blocks == blocks
        assert index_bytes == sum(buffer.nbytes for buffer in layer.buffers())


@every_blocks
def test_no_step_loses_more_and_the_curve_is_where_they_start(blocks, monkeypatch):
    weight = torch.randn(N, K, dtype=torch.float64)
    losses = []
    for steps in (0, 1, 3, 10):
        monkeypatch.setattr(dsformer, "_STEPS", steps)
        losses.append((error(weight, made(weight, 6, blocks=blocks, density=0.5)) * weight.norm())**2)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses)) and losses[-1] < 0.97 * losses[0]
    curve = dsformer.losses(weight, blocks=blocks, density=0.5)
    assert len(curve) == METHODS["dsformer"].size(K, N, blocks=blocks)[1] + 1
    assert losses[0] <= curve[6] * (1 + 1e-12) and (curve[:-1] >= curve[1:]).all()
    assert abs(curve[0] - weight.square().sum()) <= N * K * EPS * curve[0]


@every_blocks
def test_a_weight_that_has_the_form_is_not_changed(blocks):
    """F(F(W)) = F(W), from the factors that are there; coded anew it is another local optimum."""
    weight = torch.randn(N, K, dtype=torch.float64)
    layer = made(weight, 6, blocks=blocks, density=0.5)
    again = dsformer.refactorized(layer, layer.dense(), steps=3)
    assert error(layer.dense(), again) < 1e-6 and again.shape() == layer.shape()


@every_blocks
def test_following_a_weight_that_moves_brings_the_layer_closer(blocks):
    weight = torch.randn(N, K)
    layer = made(weight, 6, blocks=blocks, density=0.5)
    moved = weight + 0.3 * torch.randn(N, K)
    closer = dsformer.refactorized(layer, moved)
    assert error(moved, closer) < 0.97 * error(moved, layer)
    assert (closer.kept().view(N, blocks[1], 6).sum(2) == 3).all()
    assert error(moved, dsformer.refactorized(closer, moved)) <= error(moved, closer) * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_heavy_tailed_weights_lose_less_than_low_rank_at_equal_bits(seed):
    """16 bits for a value and one for each place of the mask, 40 % kept."""
    torch.manual_seed(seed)
    weight = torch.randn(128, 128)**3
    n = k = 128
    low_rank = METHODS["svd"].factorize(weight, None, None, rank=int(0.4 * n * k / (n + k)))[0]
    one = made(weight, int(0.4 * n * k / (k + n / 2 + n / 16)), blocks=(1, 1), density=0.5)
    four = made(weight, int(0.4 * n * k / (4 * (k / 4 + n / 4 + n / 16))), blocks=(1, 4), density=0.25)
    assert error(weight, low_rank) > error(weight, one) > error(weight, four)


@pytest.mark.parametrize("weight", matrices.weights())
def test_degenerate_weights_never_give_nan(weight):
    weight = matrices.weights()[weight]
    for blocks in ((1, 1), (1, min(4, weight.shape[1]))):
        layer = made(weight, 1, blocks=blocks)
        more = made(weight, min(5, weight.shape[0]), blocks=blocks, density=0.5)
        for one in (layer, more, dsformer.refactorized(more, weight)):
            assert one.d.isfinite().all() and one.values.isfinite().all()
            wide = weight.double()
            assert (wide - one.double().dense()).norm() <= wide.norm() * (1 + 8 * torch.finfo(weight.dtype).eps)
        assert dsformer.losses(weight, blocks=blocks).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_layer_has_the_dtype_and_the_bias_and_the_same_bits_each_time(dtype):
    weight, bias = torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    (one, events), (other, _) = (dsformer.factorize(weight, bias, rank=6) for _ in range(2))
    assert one.d.dtype == one.values.dtype == dtype and torch.equal(one.bias, bias) and events == []
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_wrong_calls_are_named():
    weight = torch.randn(N, K)
    for blocks in (4, (1,), (0, 2), "ab", (1, 2.0), None):
        with pytest.raises(ArgumentError, match="dsformer: blocks must be two whole numbers above 0"):
            check_arguments("dsformer", {"blocks": blocks})
    with pytest.raises(ShapeError, match="blocks must be between 1 and 30 for 30 inputs; found 31"):
        made(weight, 2, blocks=(1, 31))
    for rank in (0, 12):
        with pytest.raises(ShapeError, match="must be between 1 and 11, found"):
            made(weight, rank, blocks=(2, 1))
    layer = Dictionary(K, N, 8, 4, pattern=(2, 4))
    with pytest.raises(ArgumentError, match="neither a pattern nor dense atoms"):
        dsformer.refactorized(layer, weight)
    with pytest.raises(ShapeError, match=r"weight is \[30, 22\], must be \[22, 30\]"):
        dsformer.refactorized(made(weight, 4), weight.T)
    weight[1, 2] = torch.inf
    with pytest.raises(NumericsError, match="weight .* 1 of"):
        made(weight, 4)


def test_alternating_keeps_atoms_at_length_one():
    z = dictionary.plain_target(torch.randn(40, 12, dtype=torch.float64)).z
    codes, atoms, _ = dsformer.alternated(z, *cospadi.start(z, 9, 3), 4)
    assert torch.allclose(atoms.norm(dim=1), torch.ones(9, dtype=torch.float64))
    assert dictionary.lost(z, codes, atoms) < z.square().sum()


@pytest.mark.parametrize("policy", ["per_matrix", "allocated", "knapsack"])
def test_a_model_keeps_the_ratio_and_runs(policy, tiny_llama, tmp_path):
    plan = lowfat.plan(tiny_llama, method="dsformer", ratio=0.5, policy=policy, arguments={"blocks": [1, 2]})
    assert 0.4 < plan.totals()["ratio"] <= 0.5
    plan.save(tmp_path / "plan.json")
    assert lowfat.Plan.load(tmp_path / "plan.json") == plan
    report = lowfat.factorize(tiny_llama, plan)
    assert report.parameters == plan.totals()["parameters"]
    assert sum(layer.index_bytes for layer in report.layers) == plan.totals()["index_bytes"] > 0
    ids = torch.arange(12).view(2, 6)
    expected = tiny_llama(ids).logits
    lowfat.save(tiny_llama, tmp_path / "half")
    assert torch.equal(lowfat.load(tmp_path / "half")(ids).logits, expected)
