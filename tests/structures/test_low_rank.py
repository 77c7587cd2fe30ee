"""LowRank as a drop-in for `nn.Linear`, and LowRankGroup against the layers it is made of."""
import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import gates
from lowfat.errors import ArgumentError, DeviceError, DtypeError, NumericsError, ShapeError, UnsupportedError
from lowfat.structures import STRUCTURES, LowRank, LowRankGroup

SIZES = [(7, 5, 3), (5, 7, 5), (6, 6, 1), (1, 1, 1), (48, 33, 16)]


def linear_in_two(layer, x):
    return linear(linear(x, layer.v), layer.u, layer.bias)


def judge(y, layer, x):
    exact = gates.chain(x, layer.v.T, layer.u.T, bias=layer.bias)
    assert gates.failed_gates(y, linear_in_two(layer, x), exact) == []


def same_bits(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and all(
        s.dtype == t.dtype and torch.equal(s, t) for s, t in zip(a.state_dict().values(), b.state_dict().values()))


# --- the layer ---

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k,n,r", SIZES)
@torch.no_grad()
def test_forward_is_x_times_dense(k, n, r, bias, dtype):
    layer = LowRank(k, n, r, bias=bias, dtype=dtype)
    x = torch.randn(9, k).to(dtype)
    judge(layer(x), layer, x)
    assert layer.dense().shape == (n, k) and layer.dense().dtype == dtype
    dense, exact = layer.dense(), gates.chain(layer.u, layer.v)
    assert gates.failed_gates(dense, dense, exact) == []
    for shape in ((k,), (0, k), (2, 1, 3, k)):
        assert layer(torch.randn(shape).to(dtype)).shape == (*shape[:-1], n)


@pytest.mark.parametrize("bias", [True, False])
def test_shape_is_json_and_rebuilds_the_layer(bias):
    layer = LowRank(7, 5, 3, bias=bias)
    shape = json.loads(json.dumps(layer.shape()))
    assert shape == {"in_features": 7, "out_features": 5, "rank": 3, "bias": bias}
    rebuilt = STRUCTURES[type(layer).__name__](**shape)
    rebuilt.load_state_dict(layer.state_dict())
    assert same_bits(layer, rebuilt)
    assert repr(layer) == f"LowRank(in_features=7, out_features=5, rank=3, bias={bias})"
    assert layer.macs() == 3 * (7 + 5) == layer.v.numel() + layer.u.numel()


def test_starts_like_two_linear_layers_in_a_row():
    torch.manual_seed(1)
    layer = LowRank(400, 300, 100)
    for tensor, inputs in ((layer.v, 400), (layer.u, 100), (layer.bias, 100)):
        assert tensor.abs().max() <= inputs**-0.5
        assert tensor.abs().max() > 0.97 * inputs**-0.5  # 300 uniform numbers: all below 0.97 has probability 1e-4
        assert tensor.requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["v", "u", "bias"]


def test_on_meta_without_memory():
    layer = LowRank(2**20, 2**20, 2**19, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(3, 2**20, device="meta", dtype=torch.bfloat16)).is_meta
    with torch.device("meta"):
        assert LowRank(7, 5, 3).v.is_meta
    empty = LowRank(7, 5, 3, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert all(p.isfinite().all() for p in empty.parameters())
    filled = LowRank(7, 5, 3, device="meta")
    filled.load_state_dict(empty.state_dict(), assign=True)
    assert same_bits(filled, empty)


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)),
          "share_memory": lambda m: m.share_memory(), "to": lambda m: m.to("cpu")}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("grouped", [False, True], ids=["layer", "group"])
def test_copies_keep_bits_and_results(grouped, how):
    layer = LowRankGroup([LowRank(7, 5, 3), LowRank(7, 4, 2, bias=False)]) if grouped else LowRank(7, 5, 3)
    other = COPIES[how](layer)
    x = torch.randn(4, 7)
    assert same_bits(layer, other) and repr(layer) == repr(other)
    ours, theirs = layer(x), other(x)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_all_of_itself(dtype):
    layer = LowRank(7, 5, 3).to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype} and layer(torch.randn(2, 7).to(dtype)).dtype == dtype
    with pytest.raises(DtypeError, match="v has .*, x has torch.float32"):
        layer(torch.randn(2, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert LowRank(7, 5, 3)(torch.randn(2, 7)).dtype == torch.bfloat16


def test_state_dict_round_trip_through_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file
    for layer in (LowRank(7, 5, 3, dtype=torch.bfloat16), LowRank.from_dense(torch.randn(5, 7), torch.randn(5), rank=2),
                  LowRank(7, 5, 3).merged(torch.randn(1, 7), torch.randn(5, 1))):
        save_file(layer.state_dict(), tmp_path / "layer")  # refuses what is not contiguous, or shares memory
        other = LowRank(**layer.shape(), dtype=layer.v.dtype)
        other.load_state_dict(load_file(tmp_path / "layer"))
        assert same_bits(layer, other)


@torch.no_grad()
def test_split_layers_are_the_rows_of_the_whole():
    bias, whole = torch.randn(20), LowRank(16, 20, rank=7)
    for parameter in whole.parameters():
        parameter.mul_(64).round_()  # whole numbers: products are exact, in whatever order
    first, second = whole.split([12, 8], [None, bias[:8]])
    assert torch.equal(torch.cat([first.dense(), second.dense()]), whole.dense())
    assert first.v is second.v and first.v is not whole.v and first.bias is None and torch.equal(second.bias, bias[:8])
    assert second.shape() == whole.shape() | {"out_features": 8}


def test_strict_state_dict_names_what_is_missing():
    layer = LowRank(7, 5, 3)
    with pytest.raises(RuntimeError, match='Missing key.*"u"'):
        layer.load_state_dict({"v": layer.v, "bias": layer.bias})


def test_trains_hooks_and_parametrizations():
    layer = LowRank(6, 4, 2)
    seen = []
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append((dx[0].shape, dy[0].shape)))
    torch.nn.utils.parametrizations.weight_norm(layer, "u")
    x, target = torch.randn(64, 6, requires_grad=True), torch.randn(64, 4)
    for foreach in (True, False):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, foreach=foreach)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
    assert seen[0] == ((64, 6), (64, 4))


@pytest.mark.parametrize("arguments,error,text", [
    (dict(rank=0), ShapeError, "rank must be between 1 and 5 .* found 0"), (dict(rank=6), ShapeError, "found 6"),
    (dict(rank=-1), ShapeError, "found -1"), (dict(rank=2.0), ArgumentError, "rank must be a whole number, found 2.0"),
    (dict(rank="2"), ArgumentError, "rank must be a whole number, found '2'"), (dict(rank=None), ArgumentError, "rank"),
    (dict(rank=True), ArgumentError, "rank"), (dict(rank=float("nan")), ArgumentError, "rank"),
    (dict(in_features=0), ShapeError, "in_features 0"), (dict(out_features=-3), ShapeError, "out_features -3"),
    (dict(in_features=7.5), ArgumentError, "in_features must be"),
    (dict(out_features=[5]), ArgumentError, "out_features must be")])
def test_wrong_sizes_are_refused_by_name(arguments, error, text):
    with pytest.raises(error, match=text):
        LowRank(**{"in_features": 7, "out_features": 5, "rank": 2} | arguments)


# --- from_dense ---

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k,n,r", SIZES)
def test_from_dense_is_the_closest_matrix_of_its_rank(k, n, r, dtype):
    """Eckart and Young: the error is the tail of the spectrum. Bounds: 2 n eps |W|, the backward error of an SVD, as the
    factors are rounded to the dtype once."""
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    layer = LowRank.from_dense(weight, bias, rank=r)
    assert layer.shape() == {"in_features": k, "out_features": n, "rank": r, "bias": True} and torch.equal(layer.bias, bias)
    s = torch.linalg.svdvals(weight.double())
    error = (layer.u.double() @ layer.v.double() - weight.double()).norm()
    slack = 2 * max(n, k) * torch.finfo(dtype).eps * s[0]
    assert abs(error - s[r:].square().sum().sqrt()) <= slack
    u2, v2 = layer.u.double().square().sum(0), layer.v.double().square().sum(1)
    assert (u2 - s[:r]).abs().max() <= slack and (v2 - s[:r]).abs().max() <= slack  # the symmetric split


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_dense_of_a_low_rank_weight_gives_it_back(dtype):
    """Rank 2 in whole numbers: exact in the dtype, so what comes back is within the rounding of the two factors."""
    u, v = torch.randint(-3, 4, (9, 2)), torch.randint(-3, 4, (2, 7))
    weight = (u @ v).to(dtype)
    layer = LowRank.from_dense(weight, rank=2)
    assert layer.bias is None and layer.v.dtype == dtype
    scale = layer.u.double().abs() @ layer.v.double().abs()
    assert ((layer.u.double() @ layer.v.double() - weight.double()).abs() <= 2.1 * gates.ROUNDOFF[dtype] * scale).all()


def test_from_dense_takes_conv1d_weights_transposed():
    from transformers.pytorch_utils import Conv1D
    for nx, nf in ((6, 6), (6, 4), (4, 6)):
        conv = Conv1D(nf, nx)
        layer = LowRank.from_dense(conv.weight.T, conv.bias, rank=min(nx, nf))
        x = torch.randn(3, nx)
        full = torch.linalg.norm(conv.weight, 2) * x.norm(dim=-1).max()
        assert (layer(x) - conv(x)).abs().max() <= 8 * nx * 2**-24 * full  # rank is full: only rounding is left
        assert layer.in_features == nx and layer.out_features == nf


def test_from_dense_does_not_touch_or_share_the_weight():
    weight, bias = torch.randn(5, 7, requires_grad=True), torch.randn(5)
    before = weight.detach().clone()
    layer = LowRank.from_dense(weight, bias, rank=3)
    layer.u.data.zero_()
    layer.bias.data.zero_()
    assert torch.equal(weight, before) and bias.all() and layer.u.grad_fn is None and layer.u.is_leaf


@pytest.mark.parametrize("weight,arguments,error,text", [
    (torch.full((5, 7), float("nan")), dict(rank=2), NumericsError, r"weight \[5, 7\]"),
    (torch.eye(5).index_put((torch.tensor(0),), torch.tensor(float("inf"))), dict(rank=2), NumericsError, "weight"),
    (torch.ones(5), dict(rank=2), ShapeError, r"weight must be \[out, in\]"),
    (torch.ones(5, 7), dict(rank=6), ShapeError, "rank must be between 1 and 5"),
    (torch.ones(5, 7), dict(rank=0.5), ArgumentError, "rank must be a whole number")])
def test_from_dense_refuses_by_name(weight, arguments, error, text):
    with pytest.raises(error, match=text):
        LowRank.from_dense(weight, **arguments)


def test_from_dense_refuses_a_shard():
    """T-shard: a shard must never pass for the whole matrix."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.tensor import distribute_tensor, init_device_mesh
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UnsupportedError, match="weight is a DTensor.*full_tensor"):
            LowRank.from_dense(distribute_tensor(torch.randn(5, 7), init_device_mesh("cpu", (1,))), rank=2)
    finally:
        destroy_process_group()


def test_from_dense_of_zeros():
    layer = LowRank.from_dense(torch.zeros(5, 7), rank=2)
    assert not layer.dense().any() and layer.u.isfinite().all() and layer.v.isfinite().all()


# --- merged ---

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.5, -1.7])
@torch.no_grad()
def test_merged_is_the_concatenation_and_the_sum(scale, dtype):
    layer = LowRank(24, 20, 6, dtype=dtype)
    v, u = torch.randn(3, 24).to(dtype), torch.randn(20, 3).to(dtype)
    before = copy.deepcopy(layer)
    merged = layer.merged(v, u, scale=scale)
    assert merged.shape() == layer.shape() | {"rank": 9}
    assert torch.equal(merged.v, torch.cat([layer.v, v])) and torch.equal(merged.u, torch.cat([layer.u, scale * u], dim=1))
    assert torch.equal(merged.bias, layer.bias) and same_bits(layer, before)
    x = torch.randn(40, 24).to(dtype)
    base, update = gates.chain(x, layer.v.T, layer.u.T, bias=layer.bias), gates.chain(x, v.T, (scale * u).T)
    total = gates.Chain(base.y64 + update.y64, [*base.mids, *update.mids], base.magnitude + update.magnitude,
                        base.length + update.length, min(base.roundings, update.roundings))
    assert gates.failed_gates(merged(x), linear_in_two(layer, x) + linear(linear(x, v), scale * u), total) == []
    merged.v.zero_()
    assert same_bits(layer, before)


def test_merged_refuses_by_name():
    layer = LowRank(7, 5, 3)
    for v, u in (((1, 6), (5, 1)), ((1, 7), (4, 1)), ((2, 7), (5, 1)), ((7,), (5,))):
        with pytest.raises(ShapeError, match=r"needs v \[r, 7\] and u \[5, r\]"):
            layer.merged(torch.ones(v), torch.ones(u))
    with pytest.raises(ShapeError, match="rank must be between 1 and 5 .* found 6"):
        layer.merged(torch.ones(3, 7), torch.ones(5, 3))
    with pytest.raises(DtypeError, match="update's v has torch.float64, must have torch.float32"):
        layer.merged(torch.ones(1, 7).double(), torch.ones(5, 1))
    with pytest.raises(DeviceError, match="update's u is on meta, must be on cpu"):
        layer.merged(torch.ones(1, 7), torch.ones(5, 1, device="meta"))


# --- the group ---

def group_of(dtype=torch.float32):
    return [LowRank(48, 33, 16, dtype=dtype), LowRank(48, 20, 5, bias=False, dtype=dtype), LowRank(48, 48, 30, dtype=dtype)]


@pytest.mark.parametrize("rows", [1, 4, 120])  # 1 and 4: what the compiled kernel is for
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_group_gives_the_bits_of_its_layers(dtype, rows):
    layers = group_of(dtype)
    group = LowRankGroup(layers)
    assert group.v.shape == (51, 48)
    x = torch.randn(rows, 48).to(dtype)
    assert all(torch.equal(y, layer(x)) for y, layer in zip(group(x), layers, strict=True))


def test_group_gives_its_layers_back_bit_for_bit():
    layers = group_of()
    group = LowRankGroup(layers)
    for mine, theirs in zip(group.layers(), layers, strict=True):
        assert same_bits(mine, theirs) and mine.shape() == theirs.shape()
        mine.v.data.zero_()  # a copy: the group keeps its own
    assert torch.equal(group.v, torch.cat([layer.v for layer in layers]))


def test_group_gradients_are_those_of_its_layers():
    layers = [layer.double() for layer in group_of()]
    group = LowRankGroup(layers)
    x = torch.randn(6, 48, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    sum(y.sin().sum() for y in group(mine)).backward()
    sum(layer(theirs).sin().sum() for layer in layers).backward()
    pairs = [(group.v.grad, torch.cat([layer.v.grad for layer in layers])), (mine.grad, theirs.grad)]
    pairs += [(getattr(group, f"u{i}").grad, layer.u.grad) for i, layer in enumerate(layers)]
    for found, expected in pairs:  # sums of at most 131 products in another order
        assert (found - expected).abs().max() <= 131 * 2**-53 * 48 * expected.abs().max()


@pytest.mark.parametrize("layers,error,text", [
    ([], ArgumentError, "at least one layer"),
    ([LowRank(7, 5, 3), LowRank(6, 5, 3)], ShapeError, "layer 1 of the group has in_features 6, layer 0 has 7"),
    ([LowRank(7, 5, 3), nn.Linear(7, 5)], ArgumentError, "layer 1 of the group must be a LowRank, found Linear"),
    ([LowRank(7, 5, 3), LowRank(7, 5, 3, dtype=torch.bfloat16)], DtypeError,
     "layer 1 of the group has torch.bfloat16, must have torch.float32"),
    ([LowRank(7, 5, 3), LowRank(7, 5, 3, device="meta")], DeviceError, "layer 1 of the group is on meta")])
def test_group_refuses_by_name(layers, error, text):
    with pytest.raises(error, match=text):
        LowRankGroup(layers)


def test_group_state_dict_round_trip():
    from safetensors.torch import load, save
    group, other = LowRankGroup(group_of()), LowRankGroup(group_of())
    other.load_state_dict(load(save(group.state_dict())))
    assert same_bits(group, other)
