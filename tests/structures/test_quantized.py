"""Quantized: whole numbers and scales, packing, torchao's rounding to the bit, and through a checkpoint."""
import copy
import json
import sys

import pytest
import torch

from lowfat import checkpoint
from lowfat.errors import ArgumentError, DtypeError, FormatError, NumericsError, ShapeError, UnsupportedError
from lowfat.layers import factorizable, replace
from lowfat.structures import STRUCTURES, LowRank, Quantized, Sum

EPS = torch.finfo(torch.float64).eps
FORMATS = [(8, None), (8, 6), (4, None), (4, 8)]


def a_layer(bits=8, group=None, dtype=torch.float32, bias=True, n=10, k=24):
    numbers = torch.randint(-(2**(bits - 1)), 2**(bits - 1), (n, k), dtype=torch.int8)
    scales = torch.rand(n, 1 if group is None else k // group, dtype=torch.float64).to(dtype)
    return Quantized.of(numbers, scales, torch.randn(n).to(dtype) if bias else None, bits=bits), numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits, group", FORMATS)
@torch.no_grad()
def test_the_weight_is_numbers_times_scales(bits, group, dtype):
    layer, numbers = a_layer(bits, group, dtype)
    assert torch.equal(layer.numbers(), numbers) and layer.codes.nbytes == numbers.numel() * bits // 8
    spread = layer.scales.repeat_interleave(24 if group is None else group, dim=1)
    assert torch.equal(layer.dense(), numbers.to(dtype) * spread) and layer.dense().dtype == dtype
    for shape in ((24,), (0, 24), (2, 1, 3, 24)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.dense(), layer.bias))
    assert layer.macs() == 240


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits, group", FORMATS)
def test_shape_is_json_and_rebuilds_the_layer(bits, group, bias):
    layer, _ = a_layer(bits, group, bias=bias)
    shape = json.loads(json.dumps(layer.shape()))
    assert shape == {"in_features": 24, "out_features": 10, "bits": bits, "group": group, "bias": bias}
    rebuilt = STRUCTURES["Quantized"](**shape)
    assert not rebuilt.dense().any()
    rebuilt.load_state_dict(layer.state_dict())
    assert torch.equal(rebuilt.dense(), layer.dense())
    with torch.device("meta"):
        assert Quantized(**shape)(torch.empty(3, 24)).shape == (3, 10)


def test_scales_and_bias_learn_and_casts_keep_the_codes():
    layer, numbers = a_layer(4, 8)
    layer(torch.randn(5, 24)).square().sum().backward()
    assert layer.scales.grad.any() and layer.bias.grad.any()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.codes.dtype == torch.uint8 and torch.equal(half.numbers(), numbers)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 24)).dtype == torch.bfloat16


@pytest.mark.parametrize("bits, group, error", [(8, None, 2**-7), (8, 6, 2**-7), (4, None, 2**-3), (4, 8, 2**-3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_dense_rounds_as_torchao_does(bits, group, error, dtype):
    quantization = pytest.importorskip("torchao.quantization")
    weight, bias = torch.randn(10, 24).to(dtype), torch.randn(10).to(dtype)
    layer = Quantized.from_dense(weight, bias, bits=bits, group=group)
    linear = torch.nn.Linear(24, 10, bias=False, dtype=dtype)
    linear.weight.data = weight.clone()
    granularity = quantization.PerAxis(0) if group is None else quantization.PerGroup(group)
    quantization.quantize_(linear, quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int8 if bits == 8 else torch.int4, granularity=granularity))
    assert torch.equal(layer.dense(), linear.weight.dequantize())
    largest = weight.abs().unflatten(1, (-1, group or 24)).amax(-1, keepdim=True).float()
    rest = (layer.dense() - weight).float().unflatten(1, (-1, group or 24)).abs()
    assert (rest <= largest * (error / 2 * 1.1 + 2 * torch.finfo(dtype).eps)).all()  # half a step of the largest number
    assert torch.equal(layer.bias, bias)


def test_finer_formats_are_closer():
    pytest.importorskip("torchao")
    weight = torch.randn(10, 24) * torch.logspace(0, -2, 24)
    errors = [(Quantized.from_dense(weight, bits=bits, group=group).dense() - weight).norm()
              for bits, group in ((4, None), (4, 8), (8, None), (8, 6))]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("make, error, says", [
    (lambda: Quantized(24, 10, 3), ShapeError, "bits must be 8 or 4, found 3"),
    (lambda: Quantized(24, 10, True), ArgumentError, "bits must be a whole number"),
    (lambda: Quantized(24, 10, 8, 5), ShapeError, "group must divide in_features, which are 24, into more than one"),
    (lambda: Quantized(24, 10, 8, 24), ShapeError, r"\(None for one\); found 24"),
    (lambda: Quantized(24, 10, 8, "6"), ArgumentError, "group must be a whole number"),
    (lambda: Quantized(23, 10, 4), ShapeError, "in_features must be even for 4 bits, two to a byte; found 23"),
    (lambda: Quantized.of(torch.ones(3, 4), torch.ones(3, 1)), DtypeError, "numbers has torch.float32, must be int8"),
    (lambda: Quantized.of(torch.ones(3, 4).char(), torch.ones(3, 3)), ShapeError, r"scales is \[3, 3\], must be \[3, a div"),
    (lambda: Quantized.of(torch.full((3, 4), 9).char(), torch.ones(3, 1), bits=4), ShapeError, "from 9 to 9 do not fit 4"),
    (lambda: Quantized.of(torch.ones(3, 4).char(), torch.ones(3, 1), torch.ones(2)), ShapeError, r"bias is \[2\]"),
    (lambda: Quantized.from_dense(torch.full((3, 4), float("inf"))), NumericsError, "weight .* holds NaN or infinity"),
])
def test_what_cannot_be_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_without_torchao_only_rounding_is_refused(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"] + ["torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=r"quantizing needs torchao \(.*\); install lowfat\[quantize\]"):
        Quantized.from_dense(torch.randn(4, 6))
    layer, _ = a_layer()
    assert layer(torch.randn(2, 24)).shape == (2, 10)


def output(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(2, 12))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_comes_back_as_it_was(tiny_bert, tmp_path, dtype):
    tiny_bert.to(dtype)
    for number, (name, module) in enumerate(factorizable(tiny_bert).items()):
        k, n = module.in_features, module.out_features
        layer, _ = a_layer(*FORMATS[number % 4], dtype=dtype, n=n, k=k - k % 24 or k) if k % 24 == 0 else a_layer(
            *[(8, None), (4, None), (4, 8), (8, 8)][number % 4], dtype=dtype, n=n, k=k)
        layer.scales.data *= 0.01
        if number % 2:
            bias, layer.bias = layer.bias, None
            layer = Sum.of([layer, LowRank(k, n, 2, bias=False, dtype=dtype)], bias)
        replace(tiny_bert, name, layer)
    checkpoint.save(tiny_bert, tmp_path / "one")
    for loaded in (checkpoint.load(tmp_path / "one"), type(tiny_bert).from_pretrained(tmp_path / "one")):
        state = loaded.state_dict()
        for name, tensor in tiny_bert.state_dict().items():
            assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
        assert torch.equal(output(loaded), output(tiny_bert))
    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/lowfat.safetensors").read_bytes() == (tmp_path / "two/lowfat.safetensors").read_bytes()
    checkpoint.export_dense(tiny_bert, tmp_path / "dense")
    plain = type(tiny_bert).from_pretrained(tmp_path / "dense")
    assert (output(plain) - output(tiny_bert)).norm() <= 64 * torch.finfo(dtype).eps * output(tiny_bert).norm()


@pytest.mark.parametrize("change", [lambda t: t.int(), lambda t: t.float(), lambda t: t.to(torch.uint8), lambda t: t[:, 1:],
                                    lambda t: t[None], lambda t: t > 0])
def test_other_codes_are_refused_at_load(change, tiny_bert, tmp_path):
    name, module = next(iter(factorizable(tiny_bert).items()))
    layer, _ = a_layer(n=module.out_features, k=module.in_features)
    replace(tiny_bert, name, layer)
    layer.codes = change(layer.codes).contiguous()
    checkpoint.save(tiny_bert, tmp_path / "bad")
    for load in (checkpoint.load, type(tiny_bert).from_pretrained):
        with pytest.raises(FormatError, match=name.replace(".", r"\.")):
            load(tmp_path / "bad")
