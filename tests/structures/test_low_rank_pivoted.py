"""LowRankPivoted: the layer against its factors, the choice of pivots, and pivot() over a model."""
import copy
import json

import pytest
import torch
from torch import nn

import gates
import lowfat
from lowfat import checkpoint
from lowfat.errors import ArgumentError, DtypeError, FormatError, IndexRangeError, NumericsError, ShapeError
from lowfat.layers import dense_weight, factorizable, replace
from lowfat.structures import STRUCTURES, LowRank, LowRankPivoted, structures
from lowfat.structures.low_rank_pivoted import rank_for

EPS = torch.finfo(torch.float64).eps
SIZES = [(24, 10, 4), (10, 24, 10), (24, 10, 10), (9, 9, 1), (7, 30, 6)]


def a_layer(k=24, n=10, r=4, dtype=torch.float64, bias=True):
    factors = LowRank(k, n, r, bias=bias, dtype=dtype)
    return LowRankPivoted.from_factors(factors.v, factors.u, factors.bias), factors


# --- the layer ---

@pytest.mark.parametrize("k, n, r", SIZES)
@torch.no_grad()
def test_the_weight_is_the_factors_with_r_squared_numbers_less(k, n, r):
    layer, factors = a_layer(k, n, r)
    dense = factors.dense()
    assert (layer.dense() - dense).norm() <= 100 * r * EPS * dense.norm()
    count = sum(p.numel() for name, p in layer.named_parameters() if name != "bias")
    assert count == r * (n + k - r) == layer.macs() == factors.macs() - r * r
    assert torch.equal(layer.v, layer.dense()[layer.pivots]) and torch.equal(layer.bias, factors.bias)
    v, u = layer.factors()
    assert torch.equal(u[layer.pivots], torch.eye(r, dtype=torch.float64)) and torch.allclose(u @ v, layer.dense())
    for shape in ((k,), (0, k), (2, 1, 3, k)):
        x = torch.randn(shape, dtype=torch.float64)
        assert (layer(x) - x @ dense.T - layer.bias).norm() <= 100 * (k + r) * EPS * (x.norm() + 1) * dense.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_forward_is_within_the_gates(dtype):
    layer, _ = a_layer(dtype=dtype)
    x = torch.randn(9, 24).to(dtype)
    first, second = gates.chain(x, layer.v.T), gates.chain(x, layer.v.T, layer.c.T)
    y = torch.empty(9, 10, dtype=torch.float64)
    others = [i for i in range(10) if i not in layer.pivots.tolist()]
    y[:, layer.pivots], y[:, others] = first.y64, second.y64
    error = (layer(x).double() - y - layer.bias.double()).norm() / y.norm()
    assert error <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name, u", [
    ("growing", torch.eye(40, dtype=torch.float64)[:, :12] - torch.ones(40, 12, dtype=torch.float64).tril(-1)),
    ("normal", None), ("one large row", torch.diag(torch.logspace(0, 9, 40, dtype=torch.float64))[:, 20:] + 0.01)])
def test_no_entry_of_c_is_large(name, u):
    """Partial pivoting alone leaves 2^11 in the first: what it calls growth."""
    u = torch.randn(40, 12, dtype=torch.float64) if u is None else u
    v = torch.randn(u.shape[1], 30, dtype=torch.float64)
    layer = LowRankPivoted.from_factors(v, u)
    assert layer.c.abs().max() <= 1.25 + 1e-6
    assert ((layer.dense() - u @ v).norm(dim=1) <= 1e-9 * (u @ v).norm()).all()


def test_gradients_are_those_of_the_formula():
    """gP = G_P + G_others c, dv = gP^T x, dc = G_others^T y_P, dx = gP v; and torch's own check of them."""
    layer, _ = a_layer(6, 7, 3)
    x, g = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), torch.randn(5, 7, dtype=torch.float64)
    layer(x).backward(g)
    others = [i for i in range(7) if i not in layer.pivots.tolist()]
    at = g[:, layer.pivots] + g[:, others] @ layer.c
    for found, wanted in ((layer.v.grad, at.T @ x), (layer.c.grad, g[:, others].T @ (x @ layer.v.T)), (x.grad, at @ layer.v),
                          (layer.bias.grad, g.sum(0))):
        assert (found - wanted).norm() <= 1e3 * EPS * wanted.norm()
    assert torch.autograd.gradcheck(lambda x, v, c: torch.func.functional_call(layer, {"v": v, "c": c}, (x,)),
                                    (x.detach().requires_grad_(), layer.v, layer.c))


@pytest.mark.parametrize("bias", [True, False])
def test_shape_is_json_and_rebuilds_the_layer(bias):
    layer, _ = a_layer(bias=bias)
    shape = json.loads(json.dumps(layer.shape()))
    assert shape == {"in_features": 24, "out_features": 10, "rank": 4, "bias": bias}
    rebuilt = STRUCTURES["LowRankPivoted"](**shape, dtype=torch.float64)
    assert rebuilt.pivots.tolist() == [0, 1, 2, 3]
    rebuilt.load_state_dict(layer.state_dict())
    assert torch.equal(rebuilt.dense(), layer.dense())
    with torch.device("meta"):
        assert LowRankPivoted(**shape)(torch.empty(3, 24)).shape == (3, 10)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.pivots.dtype == torch.int64 and half(torch.randn(2, 24).bfloat16()).dtype == torch.bfloat16


def test_from_dense_is_the_closest_of_its_rank():
    weight = torch.randn(10, 24)
    layer = LowRankPivoted.from_dense(weight, torch.randn(10), rank=4)
    plain = LowRank.from_dense(weight.double(), rank=4).dense()
    assert layer.v.dtype == torch.float32 and (layer.dense() - plain).norm() <= 1e-6 * plain.norm()
    with pytest.raises(NumericsError, match="lower rank than their 3 directions"):
        LowRankPivoted.from_dense(torch.zeros(5, 6), rank=3)
    with pytest.raises(NumericsError):
        LowRankPivoted.from_dense(torch.full((5, 6), float("nan")), rank=3)
    with pytest.raises(ShapeError, match="rank must be between 1 and 5"):
        LowRankPivoted.from_dense(torch.randn(5, 6), rank=6)


@pytest.mark.parametrize("change, error, says", [
    ({"c": torch.zeros(6, 3)}, ShapeError, r"c is \[6, 3\], must be \[6, 4\]"),
    ({"c": torch.zeros(6, 4).half()}, DtypeError, "c has torch.float16"),
    ({"pivots": torch.arange(3)}, ShapeError, r"pivots is \[3\], must be \[4\]"),
    ({"pivots": torch.tensor([0, 2, 1, 5])}, IndexRangeError, r"pivots\[2\] is 1"),
    ({"pivots": torch.tensor([0, 1, 2, 10])}, IndexRangeError, r"pivots\[3\] is 10, must be in 0..9"),
    ({"pivots": torch.arange(4).int()}, DtypeError, "pivots has torch.int32"),
    ({"bias": torch.zeros(9)}, ShapeError, r"bias is \[9\], must be \[10\]"),
])
def test_what_does_not_fit_together_is_refused(change, error, says):
    parts = {"v": torch.zeros(4, 24), "c": torch.zeros(6, 4), "pivots": torch.arange(4), "bias": torch.zeros(10)}
    LowRankPivoted.of(**parts)
    with pytest.raises(error, match=says):
        LowRankPivoted.of(**parts | change)


@pytest.mark.parametrize("k, n", [(64, 64), (768, 768), (768, 3072), (3072, 768)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 0.99])
def test_the_rank_for_a_ratio_is_the_largest_that_fits(k, n, ratio):
    def stored(rank):
        return rank * (n + k - rank) + rank

    exact, stepped = rank_for(k, n, ratio, step=1), rank_for(k, n, ratio)
    assert stored(exact) <= ratio * n * k < stored(exact + 1)
    assert stepped == exact - exact % 16 if exact >= 16 else stepped == exact
    assert exact >= int(ratio * n * k / (n + k))  # more than two factors may have
    with pytest.raises(ArgumentError, match="ratio must be between 0 and 1"):
        rank_for(k, n, 1.0)


# --- over a model ---

def low_rank(model, rank=12):
    for name, module in factorizable(model).items():
        replace(model, name, LowRank.from_dense(dense_weight(module), module.bias, rank=rank))
    return model


def output(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(2, 12))[0]


@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
def test_a_model_computes_the_same_from_fewer_numbers_and_comes_back(request, fixture, tmp_path):
    model = low_rank(request.getfixturevalue(fixture))
    before, count = output(model), sum(p.numel() for p in model.parameters())
    report = lowfat.pivot(model)
    layers = dict(structures(model))
    assert {type(layer) for layer in layers.values()} == {LowRankPivoted} and all(one.kept for one in report.layers.values())
    saved = 12 * 12 * len(layers)
    assert report.parameters_before - report.parameters == saved == count - sum(p.numel() for p in model.parameters())
    assert (output(model) - before).norm() <= 1e-5 * before.norm()  # fp32, two dozen layers
    json.dumps(report.to_json(), allow_nan=False)
    checkpoint.save(model, tmp_path / "one")
    for loaded in (checkpoint.load(tmp_path / "one"), type(model).from_pretrained(tmp_path / "one")):
        assert torch.equal(output(loaded), output(model))
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/lowfat.safetensors").read_bytes() == (tmp_path / "two/lowfat.safetensors").read_bytes()
    checkpoint.export_dense(model, tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense")
    assert (output(plain) - output(model)).norm() <= 1e-5 * before.norm()


def test_a_pivoted_model_trains():
    from tiny_text import classifier, rows, tokenizer

    model = low_rank(classifier())
    lowfat.pivot(model)
    first = next(layer for _, layer in structures(model))
    before = first.v.detach().clone(), first.c.detach().clone(), first.pivots.clone()
    lowfat.finetune(model, rows(8), tokenizer=tokenizer(), steps=2, batch_size=4, max_length=12, autocast=False)
    assert [torch.equal(*pair) for pair in zip((first.v, first.c, first.pivots), before)] == [False, False, True]


def test_what_cannot_be_pivoted_keeps_its_factors(tiny_bert):
    model = low_rank(tiny_bert)
    names = [name for name, _ in structures(model)]
    layers = dict(structures(model))
    layers[names[0]].u.data[:, 3] = 0
    layers[names[4]].v = layers[names[1]].v
    layers[names[2]].to(torch.bfloat16)
    report = lowfat.pivot(model, growth=1.0)
    assert report.layers[names[0]].reason == "the factors are of a lower rank than their 12 directions; pivots do not exist"
    for name in (names[1], names[4]):
        assert report.layers[name].reason == "its v is another layer's too"
    judged = report.layers[names[2]]
    assert judged.kept or (judged.reason.startswith("its rounding error would grow") and judged.error > judged.error_before)
    left = {name for name, layer in structures(model) if type(layer) is LowRank}
    assert left == {name for name, one in report.layers.items() if not one.kept} >= {names[0], names[1], names[4]}


def test_in_bf16_a_wide_layer_keeps_its_factors_unless_asked():
    """Each row that is no pivot adds up r rounded numbers: at rank 96 of 256 the error is 2 to 8 times that of factors."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(LowRank.from_dense(torch.randn(256, 256), rank=96).bfloat16())])
    was = copy.deepcopy(model)
    judged = lowfat.pivot(model).layers["blocks.0.0"]
    assert not judged.kept and 2 * judged.error_before < judged.error < 8 * judged.error_before
    assert torch.equal(model.blocks[0][0].u, was.blocks[0][0].u)
    assert lowfat.pivot(model, growth=8).layers["blocks.0.0"].kept
    single = was.float()
    assert lowfat.pivot(single).layers["blocks.0.0"].kept  # in fp32 it grows as much, and is below any rounding to bf16


def test_only_layers_that_match_and_flags_stay(tiny_bert):
    model = low_rank(tiny_bert)
    for name, layer in structures(model):
        layer.v.requires_grad_(False)
    report = lowfat.pivot(model, layers=["*.query"])
    assert {name.rpartition(".")[2] for name in report.layers} == {"query"}
    for name, layer in structures(model):
        assert (type(layer) is LowRankPivoted) == name.endswith("query") and not layer.v.requires_grad
    with pytest.raises(ArgumentError, match=r"'\*.nothing' matches no low-rank layer"):
        lowfat.pivot(model, layers=["*.nothing"])
    with pytest.raises(ArgumentError, match="growth must be a number, at least 1"):
        lowfat.pivot(model, growth=0.5)


def test_a_model_without_low_rank_layers_is_refused(tiny_bert):
    with pytest.raises(ArgumentError, match=r"has no low-rank layer; factorize\(\) it first"):
        lowfat.pivot(tiny_bert)


# --- index tensors of files ---

@pytest.mark.parametrize("change, error", [
    (lambda p: p.flip(0), IndexRangeError), (lambda p: p - 40, IndexRangeError), (torch.zeros_like, IndexRangeError),
    (lambda p: p + 1000, IndexRangeError), (lambda p: p.index_fill(0, torch.tensor([1]), 2**40), IndexRangeError),
    (lambda p: p.index_fill(0, torch.tensor([0]), torch.iinfo(torch.int64).min), IndexRangeError),
    (lambda p: p.index_copy(0, torch.tensor([1]), p[:1]), IndexRangeError),
    (lambda p: p.int(), FormatError), (lambda p: p.float(), FormatError), (lambda p: p > 0, FormatError),
    (lambda p: p[:-1], FormatError), (lambda p: p[None], FormatError), (lambda p: torch.cat([p, p[-1:] + 1]), FormatError)])
def test_bad_pivots_are_refused_at_load(change, error, tiny_bert, tmp_path):
    name = next(iter(factorizable(tiny_bert)))
    model = low_rank(tiny_bert)
    lowfat.pivot(model)
    layer = model.get_submodule(name)
    layer.pivots = change(layer.pivots).contiguous()
    checkpoint.save(model, tmp_path / "bad")
    for load in (checkpoint.load, type(model).from_pretrained):
        with pytest.raises(error, match=name.replace(".", r"\.")):
            load(tmp_path / "bad")
