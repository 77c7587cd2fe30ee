"""Sparse24: the layer against its dense matrix, which weights it keeps, and masks that are none."""
import copy
import json
import pickle

import pytest
import torch
from torch.nn.functional import linear

import gates
from lowfat.errors import ArgumentError, DtypeError, IndexRangeError, NumericsError, ShapeError, UnsupportedError
from lowfat.ops.bitmap import pack
from lowfat.structures import STRUCTURES, Sparse24

PATTERNS = [(2, 4), (1, 4), (3, 4), (4, 8), (3, 6), (5, 7), (1, 1), (4, 4)]
EPS = torch.finfo(torch.float64).eps


def weight_and_bias(n, k, dtype=torch.float64):
    return torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)


@pytest.mark.parametrize("n,m", PATTERNS)
@torch.no_grad()
def test_forward_multiplies_by_dense(n, m):
    weight, bias = weight_and_bias(13, 6 * m)
    for layer in (Sparse24.from_dense(weight, bias, n=n, m=m), Sparse24(6 * m, 13, n, m, dtype=torch.float64)):
        dense = layer.dense()
        assert dense.shape == (13, 6 * m) and (layer.keep().view(13, 6, m).sum(2) == n).all()
        assert not dense[~layer.keep()].any() and torch.equal(dense[layer.keep()].view(13, -1), layer.values)
        for shape in ((6 * m,), (0, 6 * m), (2, 1, 3, 6 * m)):
            x = torch.randn(shape, dtype=torch.float64)
            assert (layer(x) - linear(x, dense, layer.bias)).norm() <= 6 * m * EPS * (x.norm() + 1) * dense.norm()


@pytest.mark.parametrize("n,m", PATTERNS)
def test_from_dense_keeps_the_largest_of_every_group(n, m):
    weight, bias = weight_and_bias(13, 6 * m)
    layer = Sparse24.from_dense(weight, bias, n=n, m=m)
    kept = layer.keep().view(13, 6, m)
    size = weight.abs().view(13, 6, m)
    least, most = torch.where(kept, size, torch.inf).amin(2), torch.where(kept, -torch.inf, size).amax(2)
    assert (least >= most).all() and torch.equal(torch.where(layer.keep(), weight, 0), layer.dense())
    assert torch.equal(layer.bias, bias) and layer.values.data_ptr() != weight.data_ptr()
    again = Sparse24.from_dense(layer.dense(), n=n, m=m)
    assert torch.equal(again.dense(), layer.dense())  # what has the structure is not changed


def test_the_first_of_equals_is_kept():
    layer = Sparse24.from_dense(torch.tensor([[1.0, -1, 1, 1, 0, 0, 0, 0, 2, 3, -3, 3]]))
    assert layer.keep().nonzero()[:, 1].tolist() == [0, 1, 4, 5, 9, 10]


def test_the_mask_says_what_is_kept_and_not_the_values():
    """Zeros and -0.0 that are kept stay, through another from_mask, and are trained as any other."""
    weight = torch.tensor([[0.0, -0.0, 5, 7, 1, 0, 0, 0]])
    keep = torch.tensor([[True, True, False, False, False, True, True, False]])
    layer = Sparse24.from_mask(weight, keep)
    assert torch.equal(layer.keep(), keep) and layer.values.tolist() == [[0, 0, 0, 0]]
    assert layer.values[0, 1].signbit() and not layer.values[0, 0].signbit()
    again = Sparse24.from_mask(layer.dense(), layer.keep())
    assert torch.equal(again.mask, layer.mask) and torch.equal(again.values.signbit(), layer.values.signbit())
    layer(torch.ones(1, 8)).sum().backward()
    assert layer.values.grad.tolist() == [[1, 1, 1, 1]]


def test_a_new_layer_uses_every_input():
    for n, m in PATTERNS:
        layer = Sparse24(3 * m, m, n, m)
        layer.check_indices()
        assert (layer.keep().sum(0) == n).all()  # each as often as any other
        bound = (3 * n) ** -0.5
        assert 0.8 * bound < max(p.abs().max() for p in layer.parameters()) <= bound
    assert Sparse24(8, 2).keep().tolist() == [[True, True, False, False] * 2, [False, False, True, True] * 2]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n,m", PATTERNS)
def test_shape_is_json_and_rebuilds_the_layer(n, m, bias):
    weight, some = weight_and_bias(13, 6 * m)
    layer = Sparse24.from_dense(weight, some if bias else None, n=n, m=m)
    shape = json.loads(json.dumps(layer.shape()))
    rebuilt = STRUCTURES["Sparse24"](**shape, dtype=torch.float64)
    rebuilt.load_state_dict(layer.state_dict())
    assert rebuilt.shape() == layer.shape() and torch.equal(rebuilt.dense(), layer.dense())
    assert layer.macs() == layer.values.numel() == 13 * 6 * n
    with torch.device("meta"):
        assert Sparse24(**shape)(torch.empty(3, 6 * m)).shape == (3, 13)


def test_copies_and_casts_keep_the_mask():
    layer = Sparse24.from_dense(*weight_and_bias(5, 8, torch.float32))
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert torch.equal(same.dense(), layer.dense())
    x = torch.randn(3, 8)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    mask = layer.mask.clone()
    assert layer.to(torch.bfloat16).mask.dtype == torch.int32 and torch.equal(layer.half().mask, mask)
    assert layer(x.half()).dtype == torch.float16
    with pytest.raises(DtypeError, match="values has torch.float16, x has torch.float32"):
        layer(x)


def test_of_copies_what_it_is_given():
    layer = Sparse24.from_dense(*weight_and_bias(5, 8))
    same = Sparse24.of(layer.values.mT.contiguous().mT, layer.mask.mT.contiguous().mT, layer.bias)
    assert torch.equal(same.dense(), layer.dense()) and same.values.is_contiguous() and same.mask.is_contiguous()
    same.mask.zero_()
    same.values.data.zero_()
    assert layer.mask.any() and layer.values.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_in_the_dtype_of_the_weight(dtype):
    weight, bias = weight_and_bias(33, 48, dtype)
    layer, x = Sparse24.from_dense(weight, bias), torch.randn(9, 48).to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    known = gates.chain(x, layer.dense().T, bias=bias)
    assert gates.failed_gates(layer(x), linear(x, layer.dense(), bias), known) == []


@pytest.mark.parametrize("arguments, error, text", [
    ({"in_features": 10}, ShapeError, r"in_features must be a multiple of 4 for 2:4 \(8 or 12\), found 10"),
    ({"in_features": 3}, ShapeError, r"for 2:4 \(4\), found 3"),
    ({"n": 5}, ShapeError, "n must be between 1 and m, which is 4; found 5"),
    ({"n": 0}, ShapeError, "n must be at least 1, found 0"), ({"m": 0}, ShapeError, "m must be at least 1, found 0"),
    ({"n": 2.0}, ArgumentError, "n must be a whole number, found 2.0"), ({"m": True}, ArgumentError, "found True"),
    ({"out_features": 0}, ShapeError, "out_features must be at least 1"),
    ({"in_features": "8"}, ArgumentError, "in_features"),
])
def test_impossible_sizes(arguments, error, text):
    with pytest.raises(error, match=text):
        Sparse24(**{"in_features": 8, "out_features": 5} | arguments)


@pytest.mark.parametrize("make, error, text", [
    (lambda w, keep: Sparse24.from_mask(w, keep[:, :8]), ShapeError, r"keep must be bool \[5, 12\], found .* \[5, 8\]"),
    (lambda w, keep: Sparse24.from_mask(w, keep.float()), ShapeError, r"keep must be bool \[5, 12\], found torch.float32"),
    (lambda w, keep: Sparse24.from_mask(w, keep | (torch.arange(12) == 6)), ShapeError, "3 of inputs 4..7 in row 0, is no"),
    (lambda w, keep: Sparse24.from_mask(w, w != 0), ShapeError, "has 4 of inputs 0..3 in row 0, is no 2:4"),
    (lambda w, keep: Sparse24.from_mask(w, keep, n=1), ShapeError, "has 2 of inputs 0..3 in row 0, is no 1:4"),
    (lambda w, keep: Sparse24.from_mask(w, keep, m=5), ShapeError, "multiple of 5"),
    (lambda w, keep: Sparse24.from_dense(w[:, :10]), ShapeError, r"multiple of 4 for 2:4 \(8 or 12\), found 10"),
    (lambda w, keep: Sparse24.from_dense(w[0]), ShapeError, r"weight must be \[out, in\], found \[12\]"),
    (lambda w, keep: Sparse24.from_dense(w, w[0]), ShapeError, r"bias is \[12\], must be \[5\]"),
    (lambda w, keep: Sparse24.from_dense(w / 0), NumericsError, "NaN or infinity"),
    (lambda w, keep: Sparse24.of(w[:, :6], pack(keep)[:4]), ShapeError, r"mask is \[4, 1\], must be \[5, 1\]"),
    (lambda w, keep: Sparse24.of(w[:, :6], pack(keep).long()), DtypeError, "mask has torch.int64, must be int32"),
    (lambda w, keep: Sparse24.of(w[:, :6], pack(~keep | keep)), IndexRangeError, "keeps 4 of inputs 0..3 in row 0"),
    (lambda w, keep: Sparse24.of(w[:, :6], pack(keep) | 1 << 12), IndexRangeError, "bits behind its 12 inputs in row 0"),
    (lambda w, keep: Sparse24.of(w[:, :6], pack(keep), in_features=16), ShapeError, r"values is \[5, 6\], must be \[5, 8\]"),
])
def test_what_is_no_such_layer_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make(torch.ones(5, 12), torch.tensor([True, False, False, True]).repeat(5, 3))


def test_a_shard_is_refused():
    class Shard(torch.Tensor):
        full_tensor = None

    with pytest.raises(UnsupportedError, match="perhaps a shard"):
        Sparse24.from_dense(torch.ones(4, 4).as_subclass(Shard))
