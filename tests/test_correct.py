"""quantize() and correct(): the best low rank for what a base lost, over 8 and 4 bits and over 2:4."""
import copy
import json

import pytest
import torch
from torch import nn

import lowfat
from lowfat.calibrate import calibrate
from lowfat.errors import ArgumentError, NumericsError, ShapeError
from lowfat.layers import dense_weight, factorizable, replace
from lowfat.structures import LowRank, Quantized, Sparse24, Sum, structures

EPS = torch.finfo(torch.float64).eps
BASES = ["int8", "int4", "2:4", "dictionary"]


def batches():
    return [{"input_ids": torch.randint(0, 97, (4, 12)), "labels": torch.randint(0, 3, (4,))} for _ in range(6)]


def based(model, base, stats):
    """The model with its layers in this form."""
    if base == "2:4":
        lowfat.factorize(model, lowfat.plan(model, method="wanda", ratio=0.5, stats=stats), stats)
    elif base == "dictionary":
        lowfat.factorize(model, lowfat.plan(model, method="rocket", ratio=0.4, stats=stats), stats)
    else:
        pytest.importorskip("torchao")
        lowfat.quantize(model, bits=int(base[3:]), group=8 if base == "int4" else None)
    return model


def layer_error(weight, layer, gram):
    weight, gram = weight.double(), gram.double()
    rest = weight - copy.deepcopy(layer).double().dense().detach()
    return float((((rest @ gram) * rest).sum() / ((weight @ gram) * weight).sum()).sqrt())


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_each_layer_gains_the_best_correction_of_its_rank(tiny_bert, base):
    """Its error is the tail of the spectrum of (W - base) L, L L^T the Gram matrix; the base keeps every bit."""
    tiny_bert.double()
    dense = copy.deepcopy(tiny_bert)
    stats = calibrate(tiny_bert, batches())
    model = based(tiny_bert, base, stats)
    bases = {name: copy.deepcopy(layer) for name, layer in structures(model)}
    report = lowfat.correct(model, dense, stats, rank=3)
    assert set(report.layers) == set(bases) and all(one.kept for one in report.layers.values())
    for name, layer in structures(model):
        weight, gram = dense_weight(dense.get_submodule(name)), stats[name].gram.double()
        assert type(layer) is Sum and type(layer.parts[1]) is LowRank and layer.parts[1].rank == 3
        assert torch.equal(layer.parts[0].dense(), bases[name].dense()) and torch.equal(layer.bias, bases[name].bias)
        damped = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        tail = torch.linalg.svdvals((weight - bases[name].dense()) @ torch.linalg.cholesky(damped))[3:].norm()
        rest = weight - layer.dense()
        assert ((rest @ damped) * rest).sum().sqrt() == pytest.approx(float(tail), rel=1e-6)
        one = report.layers[name]
        assert one.error == pytest.approx(layer_error(weight, layer, gram), rel=1e-6) and one.error < one.error_before
        assert one.error_before == pytest.approx(layer_error(weight, bases[name], gram), rel=1e-6)
        assert one.bytes - one.bytes_before == 8 * 3 * (weight.shape[0] + weight.shape[1])
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
def test_a_corrected_model_is_closer_and_comes_back(request, fixture, base, tmp_path):
    model = request.getfixturevalue(fixture)
    for module in factorizable(model).values():
        module.weight.data *= 4
    dense, seen = copy.deepcopy(model), [{"input_ids": torch.randint(0, 97, (4, 12))} for _ in range(6)]
    stats = calibrate(model, seen)
    based(model, base, stats)

    def gap():
        with torch.no_grad():
            return sum((model(**batch).logits - dense(**batch).logits).square().sum() for batch in seen)

    before = gap()
    report = lowfat.correct(model, dense, stats, rank=0.25)
    assert gap() < before and {one.rank for one in report.layers.values()} <= {4, 8}
    lowfat.save(model, tmp_path / "one")
    for loaded in (lowfat.load(tmp_path / "one"), type(model).from_pretrained(tmp_path / "one")):
        with torch.no_grad():
            assert torch.equal(loaded(**seen[0]).logits, model(**seen[0]).logits)
    lowfat.export_dense(model, tmp_path / "dense")
    with torch.no_grad():
        plain = type(model).from_pretrained(tmp_path / "dense")(**seen[0]).logits
        assert (plain - model(**seen[0]).logits).norm() <= 1e-4 * plain.norm()


@pytest.mark.parametrize("bits, group", [(8, None), (4, 8)])
def test_quantizing_stores_less_and_says_how_much_is_lost(tiny_bert, bits, group):
    pytest.importorskip("torchao")
    weights = {name: dense_weight(module).clone() for name, module in factorizable(tiny_bert).items()}
    stats = calibrate(tiny_bert, batches())
    biases = {name: module.bias.detach().clone() for name, module in factorizable(tiny_bert).items()}
    report = lowfat.quantize(tiny_bert, bits=bits, group=group, stats=stats)
    layers = dict(structures(tiny_bert))
    assert set(layers) == set(weights) and {type(layer) for layer in layers.values()} == {Quantized}
    for name, layer in layers.items():
        one, (n, k) = report.layers[name], weights[name].shape
        groups = 1 if group is None else k // group
        assert one.bytes_before == 4 * n * k and one.bytes == n * k * bits // 8 + 4 * n * groups
        assert one.error == pytest.approx(layer_error(weights[name], layer, stats[name].gram), rel=1e-4)
        assert one.error < (0.01 if bits == 8 else 0.15) and torch.equal(layer.bias, biases[name])
    assert report.bytes <= report.bytes_before / (3 if bits == 8 else 4)


def test_without_statistics_the_weight_itself_is_corrected():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 12, dtype=torch.float64))])
    dense = copy.deepcopy(model)
    weight = dense.blocks[0][0].weight.detach()
    replace(model, "blocks.0.0", Sparse24.from_dense(weight, dense.blocks[0][0].bias))
    rest = weight - model.blocks[0][0].dense().detach()
    report = lowfat.correct(model, dense, rank=4, method="svd")
    found = float((weight - model.blocks[0][0].dense().detach()).norm())
    assert found == pytest.approx(float(torch.linalg.svdvals(rest)[4:].norm()), rel=1e-9)
    assert report.layers["blocks.0.0"].error == pytest.approx(found / float(weight.norm()), rel=1e-9)


def test_what_lost_nothing_is_left_as_it_was():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 12))])
    exact = Sparse24.from_dense(torch.randn(12, 16), torch.zeros(12))
    model.blocks[0][0].weight.data = exact.dense().detach()
    dense = copy.deepcopy(model)
    replace(model, "blocks.0.0", exact)
    report = lowfat.correct(model, dense, method="svd")
    assert model.blocks[0][0] is exact and exact.bias is not None and not report.layers["blocks.0.0"].kept
    assert report.bytes == report.bytes_before


def test_kfac_corrects_too(tiny_bert):
    dense, data = copy.deepcopy(tiny_bert), batches()
    stats = calibrate(tiny_bert, data, fisher="kronecker")
    based(tiny_bert, "2:4", stats)
    report = lowfat.correct(tiny_bert, dense, stats, rank=4, method="kfac", layers=["*.query", "*.intermediate.dense"])
    assert len(report.layers) == 4 and all(one.kept for one in report.layers.values())
    assert sum(type(layer) is Sum for _, layer in structures(tiny_bert)) == 4


def test_flags_and_biases_in_two_places_stay():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 12)), nn.Sequential(nn.Linear(16, 12))])
    dense = copy.deepcopy(model)
    for block in model.blocks:
        block[0] = Sparse24.from_dense(block[0].weight.detach(), block[0].bias).requires_grad_(False)
    model.blocks[1][0].bias = model.blocks[0][0].bias
    lowfat.correct(model, dense, method="svd")
    assert model.blocks[0][0].bias is model.blocks[1][0].bias and not any(p.requires_grad for p in model.parameters())


# --- refusals ---

@pytest.mark.parametrize("changes, error, says", [
    ({"method": "fwsvd"}, ArgumentError, "method must be one of whitened, svd, kfac; found 'fwsvd'"),
    ({"rank": 0}, ArgumentError, "rank must be a whole number, or a share below 1; found 0"),
    ({"rank": 2.5}, ArgumentError, "rank must be"), ({"rank": float("inf")}, ArgumentError, "rank must be"),
    ({"rank": True}, ArgumentError, "rank must be"),
    ({"rank": 40}, ShapeError, r"query: rank must be at most 32, found 40"),
    ({"layers": ["*.nothing"]}, ArgumentError, r"layers: '\*.nothing' matches no layer to correct; there are bert"),
    ({"layers": "all"}, ArgumentError, "layers must be a list of name patterns"),
    ({"stats": None}, ArgumentError, r"stats: .*query is missing; whitened needs what calibrate\(dense, batches\) returns"),
    ({"method": "kfac"}, ArgumentError, 'kfac needs the Gram matrices .*fisher="kronecker"'),
    ({"dense": nn.Linear(2, 2)}, ArgumentError, "dense: has no bert.encoder.layer.0.attention.self.query"),
])
def test_what_cannot_be_is_refused_before_any_change(tiny_bert, changes, error, says):
    arguments = {"dense": copy.deepcopy(tiny_bert), "stats": calibrate(tiny_bert, batches())}
    based(tiny_bert, "2:4", arguments["stats"])
    with pytest.raises(error, match=says):
        lowfat.correct(tiny_bert, **arguments | changes)
    assert all(type(layer) is Sparse24 for _, layer in structures(tiny_bert))


def test_models_without_a_base_are_refused(tiny_bert):
    with pytest.raises(ArgumentError, match=r"has no layer to correct; quantize\(\) it first"):
        lowfat.correct(tiny_bert, tiny_bert)


def test_layers_that_cannot_be_quantized_are_named_before_any_change(tiny_bert):
    pytest.importorskip("torchao")
    names = list(factorizable(tiny_bert))
    with pytest.raises(ShapeError, match=rf"{names[0]}: group must divide in_features, which are 32"):
        lowfat.quantize(tiny_bert, group=7)
    tiny_bert.get_submodule(names[-1]).weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=rf"{names[-1]}: weight .* holds NaN"):
        lowfat.quantize(tiny_bert)
    assert all(type(module) is nn.Linear for module in factorizable(tiny_bert).values())
