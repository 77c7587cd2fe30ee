"""Submatrix: the layer against the matrix that it stands for, and through a checkpoint."""
import copy
import json

import pytest
import torch

import lowfat
from lowfat import checkpoint
from lowfat.errors import ArgumentError, DtypeError, IndexRangeError, NumericsError, ShapeError
from lowfat.layers import replace
from lowfat.structures import STRUCTURES, LowRank, Submatrix
from lowfat.structures.submatrix import used

EPS = torch.finfo(torch.float64).eps
ROWS, COLUMNS = [0, 2, 3, 7, 9], [1, 2, 5, 6, 8, 11, 13]  # not empty


def a_weight(dtype=torch.float64):
    weight = torch.zeros(10, 14, dtype=dtype)
    weight[torch.tensor(ROWS)[:, None], torch.tensor(COLUMNS)] = torch.randn(5, 7).to(dtype)
    return weight


def a_layer(rank=3, bias=True, dtype=torch.float64):
    weight = a_weight(dtype)
    return Submatrix.from_dense(weight, torch.randn(10).to(dtype) if bias else None, rank=rank), weight


def test_only_what_is_not_empty_is_stored():
    layer, weight = a_layer()
    assert layer.inputs.tolist() == COLUMNS and layer.outputs.tolist() == ROWS
    assert sum(parameter.numel() for parameter in layer.parameters()) == 3 * (5 + 7) + 10 == layer.macs() + 10
    part = weight[ROWS][:, COLUMNS]
    assert torch.equal(layer.dense()[ROWS][:, COLUMNS], layer.u @ layer.v)
    assert int((layer.dense() != 0).sum()) == 35
    best = LowRank.from_dense(part, rank=3)
    assert torch.equal(layer.u, best.u) and torch.equal(layer.v, best.v)


def test_full_rank_gives_the_weight_back():
    layer, weight = a_layer(rank=5)
    assert (layer.dense() - weight).norm() <= 14**2 * EPS * 1e3 * weight.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(14,), (1, 14), (0, 14), (2, 3, 14), (5, 0, 14)])
@torch.no_grad()
def test_forward_multiplies_by_the_weight(shape, bias):
    layer, _ = a_layer(bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    expected = x @ layer.dense().T + (layer.bias if bias else 0)
    assert layer(x).shape == (*shape[:-1], 10)
    assert (layer(x) - expected).norm() <= 14 * 10 * EPS * (x.norm() + 1) * layer.dense().norm()


def test_gradients_are_those_of_the_weight():
    layer, _ = a_layer()
    x, other = torch.randn(4, 14, dtype=torch.float64, requires_grad=True), copy.deepcopy(layer)
    dy = torch.randn(4, 10, dtype=torch.float64)
    layer(x).backward(dy)
    found, x.grad = x.grad, None
    torch.nn.functional.linear(x, other.dense(), other.bias).backward(dy)
    torch.testing.assert_close(found, x.grad)  # fp64: torch's own bounds
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, other.get_parameter(name).grad)


def test_gradcheck_and_strides():
    layer, _ = a_layer()
    x = torch.randn(14, 3, dtype=torch.float64).T.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v, u: torch.func.functional_call(layer, {"v": v, "u": u}, (x,)),
                                    (x, layer.v, layer.u))


def test_autocast_and_compile():
    layer, _ = a_layer(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 14)).dtype == torch.bfloat16
    x = torch.randn(3, 14)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_shape_is_json_and_rebuilds_the_layer(bias):
    layer, _ = a_layer(bias=bias)
    shape = json.loads(json.dumps(layer.shape()))
    rebuilt = STRUCTURES["Submatrix"](**shape, dtype=torch.float64)
    rebuilt.load_state_dict(layer.state_dict())
    assert rebuilt.shape() == layer.shape() and torch.equal(rebuilt.dense(), layer.dense())
    with torch.device("meta"):
        assert Submatrix(**shape)(torch.empty(3, 14)).shape == (3, 10)


def test_a_weight_of_zeros_keeps_one_place():
    inputs, outputs = used(torch.zeros(4, 6))
    assert inputs.tolist() == outputs.tolist() == [0]
    layer = Submatrix.from_dense(torch.zeros(4, 6), rank=1)
    assert not layer.dense().any() and layer(torch.randn(2, 6)).isfinite().all()


def test_weights_that_are_not_finite_are_refused():
    weight = a_weight()
    weight[2, 5] = float("nan")
    with pytest.raises(NumericsError, match="holds NaN or infinity"):
        Submatrix.from_dense(weight, rank=2)


@pytest.mark.parametrize("change, error, message", [
    ({"rank": 6}, ShapeError, "rank must be at most 5, found 6"), ({"rank": 0}, ShapeError, "rank must be at least 1"),
    ({"inputs": 15}, ShapeError, "inputs must be at most 14"), ({"outputs": 11}, ShapeError, "outputs must be at most 10"),
    ({"inputs": 2.0}, ArgumentError, "inputs must be a whole number")])
def test_sizes_that_do_not_fit_are_named(change, error, message):
    with pytest.raises(error, match=message):
        Submatrix(**{"in_features": 14, "out_features": 10, "rank": 3, "inputs": 7, "outputs": 5} | change)


BAD = {"not rising": [1, 2, 5, 5, 8, 11, 13], "falling": [2, 1, 5, 6, 8, 11, 13], "negative": [-1, 2, 5, 6, 8, 11, 13],
       "too large": [1, 2, 5, 6, 8, 11, 14]}


@pytest.mark.parametrize("bad", BAD)
def test_indices_that_cannot_be_used_are_refused(bad):
    layer, _ = a_layer()
    inputs = torch.tensor(BAD[bad], dtype=torch.int32)
    with pytest.raises(IndexRangeError, match="inputs must rise from 0 or more to less than 14, each once"):
        Submatrix.of(layer.v, layer.u, inputs, layer.outputs, in_features=14, out_features=10)


@pytest.mark.parametrize("change, error, message", [
    ({"inputs": torch.arange(7)}, DtypeError, "inputs has torch.int64, must have torch.int32"),
    ({"inputs": torch.arange(6, dtype=torch.int32)}, ShapeError, r"v is \[3, 7\], must be \[3, 6\]"),
    ({"u": torch.zeros(5, 2, dtype=torch.float64)}, ShapeError, r"u is \[5, 2\], must be \[5, 3\]"),
    ({"u": torch.zeros(5, 3)}, DtypeError, "u has torch.float32"),
    ({"bias": torch.zeros(9, dtype=torch.float64)}, ShapeError, r"bias is \[9\], must be \[10\]")])
def test_tensors_that_do_not_fit_are_named(change, error, message):
    layer, _ = a_layer()
    parts = {"v": layer.v, "u": layer.u, "inputs": layer.inputs, "outputs": layer.outputs}
    with pytest.raises(error, match=message):
        Submatrix.of(**parts | change, in_features=14, out_features=10)


def test_through_a_checkpoint(tiny_bert, tmp_path):
    name = "bert.encoder.layer.0.attention.self.query"
    weight = tiny_bert.get_submodule(name).weight.detach().clone()
    weight[5:20], weight[:, 3] = 0, 0
    replace(tiny_bert, name, Submatrix.from_dense(weight, torch.randn(32), rank=4))
    checkpoint.attach(tiny_bert)
    lowfat.save(tiny_bert, tmp_path / "out")
    again = lowfat.load(tmp_path / "out")
    layer = again.get_submodule(name)
    assert isinstance(layer, Submatrix) and layer.outputs.tolist() == [*range(5), *range(20, 32)]
    batch = {"input_ids": torch.arange(6)[None]}
    assert torch.equal(again.eval()(**batch).logits, tiny_bert.eval()(**batch).logits)
    lowfat.export_dense(again, tmp_path / "dense")
    from transformers import BertForSequenceClassification

    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense").get_submodule(name)
    assert torch.equal(dense.weight, layer.dense())


def test_a_checkpoint_with_bad_indices_is_refused(tiny_bert, tmp_path):
    name = "bert.encoder.layer.0.attention.self.query"
    layer = Submatrix(32, 32, 4, 20, 10)
    layer.inputs[-1] = 40
    replace(tiny_bert, name, layer)
    checkpoint.attach(tiny_bert)
    lowfat.save(tiny_bert, tmp_path / "out")
    with pytest.raises(IndexRangeError, match=f"{name}: inputs must rise from 0 or more to less than 32, each once"):
        lowfat.load(tmp_path / "out")
