"""Sum: the layer against the sum of its parts, and through a checkpoint."""
import copy
import json

import pytest
import torch

from lowfat import checkpoint
from lowfat.errors import (ArgumentError, DeviceError, DtypeError, FormatError, IndexRangeError, NumericsError,
                           ShapeError)
from lowfat.layers import dense_weight, factorizable, replace, skipped
from lowfat.spectra import spectra
from lowfat.structures import STRUCTURES, Dictionary, LowRank, Monarch, Sparse24, Sum, structures

LOW_RANK, SPARSE = {"structure": "LowRank", "rank": 2}, {"structure": "Sparse24", "n": 1, "m": 4}
OTHERS = [{"structure": "Monarch", "blocks": [2, 2], "rank": 2}, {"structure": "Dictionary", "atoms": 6, "nonzeros": 2}]
SUMS = [[LOW_RANK, SPARSE], [SPARSE, LOW_RANK], [LOW_RANK], [LOW_RANK, *OTHERS, SPARSE]]
EPS = torch.finfo(torch.float64).eps


def a_layer(parts=(LOW_RANK, SPARSE), dtype=torch.float64):
    weight, bias = torch.randn(10, 24).to(dtype), torch.randn(10).to(dtype)
    return Sum.from_dense(weight, bias, parts=parts), weight


@pytest.mark.parametrize("parts", SUMS)
@torch.no_grad()
def test_forward_multiplies_by_the_sum(parts):
    layer, _ = a_layer(parts)
    dense = layer.dense()
    assert torch.equal(dense, sum(part.dense() for part in layer.parts))
    assert layer.macs() == sum(part.macs() for part in layer.parts)
    for shape in ((24,), (0, 24), (2, 1, 3, 24)):
        x = torch.randn(shape, dtype=torch.float64)
        assert (layer(x) - x @ dense.T - layer.bias).norm() <= 24 * 10 * EPS * (x.norm() + 1) * dense.norm()


def test_each_part_takes_from_what_is_left():
    layer, weight = a_layer(SUMS[3])
    rest, errors = weight, []
    for part in layer.parts:
        same = type(part).from_dense(rest, **{name: value for name, value in part.shape().items() if name in (
            "rank", "n", "m", "blocks", "atoms", "nonzeros")})
        assert torch.equal(same.dense(), part.dense())
        rest = rest - part.dense()
        errors.append(rest.norm())
    assert errors == sorted(errors, reverse=True) and torch.allclose(rest, weight - layer.dense())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parts", SUMS)
def test_shape_is_json_and_rebuilds_the_layer(parts, bias):
    layer = Sum.from_dense(torch.randn(10, 24), torch.randn(10) if bias else None, parts=parts)
    shape = json.loads(json.dumps(layer.shape()))
    rebuilt = STRUCTURES["Sum"](**shape)
    rebuilt.load_state_dict(layer.state_dict())
    assert rebuilt.shape() == layer.shape() and torch.equal(rebuilt.dense(), layer.dense())
    assert set(layer.state_dict()) >= {"parts.0.v"} or parts[0] is SPARSE
    with torch.device("meta"):
        assert Sum(**shape)(torch.empty(3, 24)).shape == (3, 10)


def test_holds_the_parts_themselves_and_trains_them():
    parts = [LowRank(24, 10, 2, bias=False), Sparse24(24, 10, bias=False)]
    layer = Sum.of(parts, torch.zeros(10))
    assert layer.parts[0] is parts[0] and {name for name, _ in layer.named_parameters()} == {
        "bias", "parts.0.v", "parts.0.u", "parts.1.values"}
    x, dy = torch.randn(3, 24), torch.randn(3, 10)
    layer(x).backward(dy)
    for part in (LowRank.of(parts[0].v, parts[0].u), copy.deepcopy(parts[1])):
        part.zero_grad()
        part(x).backward(dy)
        mine = layer.parts[0] if isinstance(part, LowRank) else layer.parts[1]
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine.parameters(), part.parameters()))
    assert torch.equal(layer.bias.grad, dy.sum(0))
    before = [p.clone() for p in layer.parameters()]
    layer.reset_parameters()
    assert not any(torch.equal(p, was) for p, was in zip(layer.parameters(), before))


def test_casts_autocast_and_compiles():
    layer, _ = a_layer(dtype=torch.float32)
    x = torch.randn(3, 24)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16 and layer.parts[1].mask.dtype == torch.int32


@pytest.mark.parametrize("parts, error, text", [
    ([], ArgumentError, r"parts must be a list of at least one structure, found \[\]"),
    ("LowRank", ArgumentError, "must be a list"), (LOW_RANK, ArgumentError, "must be a list"),
    ([2], ArgumentError, "part 0 must be a dictionary with a structure of LowRank, "),
    ([LOW_RANK, {"structure": "Sum", "parts": []}], ArgumentError, "part 1 must be a dictionary with a structure"),
    ([{"structure": []}], ArgumentError, "part 0 must be"), ([{"rank": 2}], ArgumentError, "part 0 must be"),
    ([LOW_RANK | {"bias": True}], ArgumentError, "part 0 has its own bias; that is the sum's"),
    ([LOW_RANK | {"in_features": 24}], ArgumentError, "its own in_features"),
    ([LOW_RANK, {"structure": "LowRank", "rank": 11}], ShapeError, "part 1: rank must be between 1 and 10"),
    ([SPARSE | {"m": 5}], ShapeError, r"part 0: in_features must be a multiple of 5 for 1:5 \(20 or 25\), found 24"),
    ([LOW_RANK | {"turns": 2}], ArgumentError, "part 0: .*unexpected keyword argument 'turns'"),
    ([{"structure": "LowRank"}], ArgumentError, "part 0: .*rank"),
])
def test_impossible_parts(parts, error, text):
    for make in (lambda: Sum(24, 10, parts), lambda: Sum.from_dense(torch.randn(10, 24), parts=parts)):
        with pytest.raises(error, match=text):
            make()


@pytest.mark.parametrize("make, error, text", [
    (lambda: Sum.of([]), ArgumentError, "a sum needs at least one part"),
    (lambda: Sum.of([torch.nn.Linear(2, 2)]), ArgumentError, "part 0 is a Linear, must be one of LowRank, Monarch"),
    (lambda: Sum.of([a_layer()[0]]), ArgumentError, "part 0 is a Sum"),
    (lambda: Sum.of([LowRank(24, 10, 2)]), ArgumentError, "part 0 has a bias; give it to the sum"),
    (lambda: Sum.of([LowRank(24, 10, 2, bias=False), LowRank(24, 9, 2, bias=False)]), ShapeError, "part 1 has out_features"),
    (lambda: Sum.of([LowRank(24, 10, 2, bias=False), LowRank(24, 10, 2, bias=False).half()]), DtypeError, "part 1 has "),
    (lambda: Sum.of([LowRank(24, 10, 2, bias=False)], torch.ones(9)), ShapeError, r"bias is \[9\], must be \[10\]"),
    (lambda: Sum.of([LowRank(24, 10, 2, bias=False)], torch.ones(10).half()), DtypeError, "bias has torch.float16"),
    (lambda: Sum.from_dense(torch.ones(10, 24) / 0, parts=[LOW_RANK]), NumericsError, "part 0: "),
    (lambda: Sum(0, 10, [LOW_RANK]), ShapeError, "in_features must be at least 1"),
])
def test_what_is_no_sum_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


# --- in a model ---

def summed(model):
    for name, module in factorizable(model).items():
        replace(model, name, Sum.from_dense(dense_weight(module), module.bias, parts=SUMS[3]))
    return model


def output(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(2, 12))[0]


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors*"))}


def test_a_model_comes_back_as_it_was(tiny_bert, tmp_path):
    """A dictionary that parts of two sums share and a sum in two places stay shared; the dense copy computes the same."""
    summed(tiny_bert)
    layers = tiny_bert.bert.encoder.layer
    layers[1].attention.self.key.parts[2].d = layers[0].attention.self.key.parts[2].d
    checkpoint.export_dense(tiny_bert, tmp_path / "dense")
    torch.testing.assert_close(output(type(tiny_bert).from_pretrained(tmp_path / "dense")), output(tiny_bert))
    layers[1].attention.self.query = layers[0].attention.self.query
    checkpoint.save(tiny_bert, tmp_path / "one")
    for loaded in (checkpoint.load(tmp_path / "one"), type(tiny_bert).from_pretrained(tmp_path / "one")):
        assert torch.equal(output(loaded), output(tiny_bert))
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in tiny_bert.state_dict().items())
        first, second = (layer.attention.self for layer in loaded.bert.encoder.layer)
        assert first.key.parts[2].d is second.key.parts[2].d and first.query.parts[0].v is second.query.parts[0].v
        assert first.query.bias is second.query.bias
    loaded.save_pretrained(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_conv1d_takes_a_sum(tiny_gpt2, tmp_path):
    checkpoint.save(summed(tiny_gpt2), tmp_path / "one")
    assert torch.equal(output(checkpoint.load(tmp_path / "one")), output(tiny_gpt2))


def test_bad_indices_of_a_part_are_refused_at_load(tiny_bert, tmp_path):
    name = next(iter(factorizable(tiny_bert)))
    layer = summed(tiny_bert).get_submodule(name)
    layer.parts[3].mask.zero_()
    with pytest.raises(IndexRangeError, match="part 3: sparse24: mask keeps 0 of inputs"):
        layer.check_indices()
    checkpoint.save(tiny_bert, tmp_path / "bad")
    with pytest.raises(IndexRangeError, match=rf"{name.replace('.', r'[.]')}.*mask keeps 0 of inputs 0\.\.3 in row 0"):
        checkpoint.load(tmp_path / "bad")


def test_a_checkpoint_with_impossible_parts_is_refused(tiny_bert, tmp_path):
    from lowfat.validate import build

    shape = a_layer()[0].shape()
    for parts, text in (([], "at least one"), ([{"structure": "Sum", "parts": []}], "part 0 must be"), (5, "must be a list"),
                        ([SPARSE | {"n": 5}], "part 0: n must be"), ([{"structure": "Sparse24"}], "expected a form like")):
        with pytest.raises(FormatError, match=text):
            build("layer", {"structure": "Sum"} | shape | {"parts": parts})


def test_parts_are_no_layers_of_the_model(tiny_bert):
    names = list(factorizable(tiny_bert))
    found = dict(structures(summed(tiny_bert)))
    assert list(found) == names and {type(layer) for layer in found.values()} == {Sum}
    assert [one.name for one in spectra(tiny_bert)] == names
    already = {name: why for name, why in skipped(tiny_bert).items() if why.startswith("already")}
    assert already == dict.fromkeys(names, "already Sum")
    assert {type(part) for part in next(iter(found.values())).parts} == {LowRank, Monarch, Dictionary, Sparse24}


def test_a_bias_or_part_on_another_device_is_named():
    part = LowRank(8, 8, 2, bias=False)
    with pytest.raises(DeviceError, match="bias is on meta, the parts are on cpu"):
        Sum.of([part], torch.zeros(8, device="meta"))
    with pytest.raises(DeviceError, match="part 1 is on meta, part 0 is on cpu"):
        Sum.of([part, LowRank(8, 8, 2, bias=False, device="meta")])
