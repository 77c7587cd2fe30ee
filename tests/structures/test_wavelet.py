"""Wavelet: the adapter on every base layer, merged and taken back, copied and stored, and options that there are not."""
import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import gates
from lowfat.errors import ArgumentError, DtypeError, NumericsError, ShapeError, UnsupportedError
from lowfat.ops import wavelet
from lowfat.ops.wavelet import SUBBANDS
from lowfat.structures import STRUCTURES, Dictionary, LowRank, LowRankGroup, Monarch, Sparse24, Sum, Wavelet
from lowfat.structures.structure import dense_weight
from lowfat.structures.wavelet import subband

EPS = torch.finfo(torch.float64).eps
SIZES = [(16, 24, 1), (24, 16, 2), (13, 7, 1), (9, 22, 3)]  # in, out, levels
VARIANTS = [(subbands, tiny) for subbands in SUBBANDS for tiny in (False, True) if not tiny or subbands != "shared+gain"]


def conv1d(k, n, **options):
    from transformers.pytorch_utils import Conv1D
    return Conv1D(n, k).to(options.get("dtype", torch.float32))


BASES = {
    "Linear": lambda k, n, **options: nn.Linear(k, n, **options),
    "no bias": lambda k, n, **o: nn.Linear(k, n, bias=False, **o),
    "Conv1D": conv1d, "LowRank": lambda k, n, **options: LowRank(k, n, 2, **options),
    "Monarch": lambda k, n, **options: Monarch(k, n, 2, 2, **options),
    "Dictionary": lambda k, n, **options: Dictionary(k, n, 6, 3, **options),
    "Sum": lambda k, n, **options: Sum(k, n, [{"structure": "LowRank", "rank": 2}, {"structure": "Monarch"}], **options),
}


def trained(base, **options):
    """An adapter that adds something."""
    layer = Wavelet(base, **{"rank": 2, "alpha": 3.0} | options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters(recurse=False):
            if name != "v":
                parameter.copy_(torch.randn(parameter.shape))
    return layer


def random_layer(k=16, n=24, base="Linear", dtype=torch.float64, **options):
    return trained(BASES[base](k, n, dtype=dtype), **options)


@pytest.mark.parametrize("subbands, tiny", VARIANTS)
@pytest.mark.parametrize("filter", ["haar", "db2"])
@pytest.mark.parametrize("k, n, levels", SIZES)
@torch.no_grad()
def test_forward_multiplies_by_dense(k, n, levels, filter, subbands, tiny):
    rank = 1 if tiny and levels == 3 else 2
    layer = random_layer(k, n, rank=rank, levels=levels, filter=filter, subbands=subbands, tiny=tiny)
    dense = layer.dense()
    assert dense.shape == (n, k) and (dense - dense_weight(layer.base_layer)).norm() > 0.1
    op = wavelet(torch.eye(k).double(), layer.v, layer.u, layer.gain, out_features=n, filter=filter, levels=levels,
                 subbands=subbands, scale=3.0 / rank)
    assert (layer.delta() - op.T).abs().max() < 1e-13
    for shape in ((k,), (0, k), (2, 1, 3, k)):
        x = torch.randn(shape, dtype=torch.float64)
        assert (layer(x) - linear(x, dense, layer.bias)).norm() <= k * n * EPS * (x.norm() + 1) * (dense.norm() + 1)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("subbands, tiny", VARIANTS)
def test_a_new_adapter_leaves_every_bit_and_trains_alone(base, subbands, tiny):
    below = BASES[base](16, 24)
    x = torch.randn(5, 16, requires_grad=True)
    expected = below(x).detach()
    layer = Wavelet(below, rank=2, subbands=subbands, tiny=tiny)
    assert torch.equal(layer(x), expected)
    names = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert names == ({"gain"} if tiny else {"v", "u", "gain"} if subbands == "shared+gain" else {"v", "u"})
    layer(x).square().sum().backward()
    assert all((parameter.grad is not None) == (name in names) for name, parameter in layer.named_parameters())
    assert x.grad.any() and (layer.gain if tiny else layer.u).grad.any()  # it can begin to learn


@pytest.mark.parametrize("k, n", [(16, 24), (24, 8)])
def test_parameters_are_as_stated(k, n):
    due = {"all": 2 * 3 * (k + n), "diag": 3 * (k + n), "LL": 3 * (k + n) // 2, "shared+gain": 3 * (k + n) // 2 + 4 * 3}
    for subbands, count in due.items():
        layer = Wavelet(nn.Linear(k, n), rank=3, subbands=subbands)
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == count
        pairs = {"all": 4, "diag": 2, "LL": 1, "shared+gain": 4}[subbands]
        assert layer.macs() == k * n + pairs * 3 * (k + n) // 2 + 2 * (k + n)
    layer = Wavelet(nn.Linear(k, n), rank=3, tiny=True)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2 * 3
    with torch.no_grad():
        layer.merge()
    assert layer.macs() == k * n


def test_a_new_adapter_starts_like_linear_layers_of_its_subbands():
    layer = Wavelet(nn.Linear(4096, 4096), rank=8, levels=2)
    widest, low, high = layer.v[:, 2048:], layer.v[:, :1024], layer.v[:, 1024:2048]
    for part, size in ((low, 1024), (high, 1024), (widest, 2048)):
        assert all(0.99 * size**-0.5 < bound <= size**-0.5 for bound in (part.max(), -part.min()))
    assert not layer.u.any() and layer.gain is None
    assert Wavelet(nn.Linear(8, 8), rank=1, subbands="shared+gain").gain.tolist() == [[1.0], [0], [0], [1]]  # LL, LH, HL, HH


# --- tiny ---

@pytest.mark.parametrize("filter", ["haar", "sym4"])
@pytest.mark.parametrize("base", ["Linear", "Conv1D", "LowRank"])
@torch.no_grad()
def test_tiny_has_the_singular_vectors_of_the_base_layers_subbands(base, filter):
    layer = random_layer(12, 10, base, rank=2, tiny=True, subbands="all", filter=filter)
    weight = dense_weight(layer.base_layer)
    for i, pair in enumerate(layer._pairs()):
        block = subband(weight, pair, filter)
        u, s, vt = torch.linalg.svd(block)
        mine = layer.u[pair.rows] @ torch.diag(s[:2]) @ layer.v[:, pair.columns]
        assert (mine - u[:, :2] @ torch.diag(s[:2]) @ vt[:2]).abs().max() < 1e-10 * s[0]
    whole = Wavelet(nn.Linear(12, 10).double(), rank=5, tiny=True, subbands="all", alpha=5.0)
    whole.gain.copy_(torch.stack([torch.linalg.svdvals(subband(dense_weight(whole.base_layer), pair, "haar"))[:5]
                                  for pair in whole._pairs()]))
    assert (whole.delta() - dense_weight(whole.base_layer)).abs().max() < 1e-13  # all of them make the weight itself


def test_tiny_factors_follow_the_gains_to_another_dtype():
    """Where training makes parameters fp32 and leaves buffers."""
    layer = random_layer(dtype=torch.bfloat16, tiny=True)
    for parameter in layer.parameters():
        parameter.data = parameter.data.float()
    assert layer.v.dtype == torch.bfloat16
    x = torch.randn(5, 16)
    error = (layer(x) - linear(x, layer.dense(), layer.bias)).norm()
    assert error <= 16 * 24 * gates.ROUNDOFF[torch.float32] * x.norm() * layer.dense().norm()


def test_tiny_refuses_a_weight_that_is_not_finite():
    base = nn.Linear(8, 8)
    with torch.no_grad():
        base.weight[3, 4] = float("nan")
    with pytest.raises(NumericsError, match="NaN or infinity"):
        Wavelet(base, rank=2, tiny=True)
    assert base.weight.requires_grad


# --- merging ---

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["Linear", "Conv1D"])
@pytest.mark.parametrize("k, n", [(16, 24), (16, 16), (13, 7)])
@torch.no_grad()
def test_merging_rounds_once_and_is_taken_back(k, n, base, dtype):
    layer, x = random_layer(k, n, base, dtype), torch.randn(33, k).to(dtype)
    weight, delta, dense, y = dense_weight(layer.base_layer).clone(), layer.delta(), layer.dense(), layer(x)
    parameter = layer.base_layer.weight
    layer.merge()
    merged = dense_weight(layer.base_layer).clone()
    assert layer.base_layer.weight is parameter and torch.equal(merged, (weight.double() + delta).to(dtype))
    assert torch.equal(merged, dense) and torch.equal(layer.dense(), dense)
    exact = linear(x.double(), weight.double() + delta, layer.bias.double())
    error, before = (layer(x).double() - exact).norm(), (y.double() - exact).norm()
    plain = (linear(x, dense, layer.bias).double() - exact).norm()
    assert error <= 1.25 * max(before, plain)  # G1, against the unmerged adapter and torch's own product
    layer.unmerge()
    u = gates.ROUNDOFF[dtype]  # of the sum, and of the difference
    found = dense_weight(layer.base_layer).double().clone()
    assert ((found - weight.double()).abs() <= u * merged.double().abs() / (1 - u) + u * found.abs() / (1 - u)).all()
    layer.merge(keep_base=True)
    before = found.to(dtype)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    layer.unmerge()
    assert torch.equal(dense_weight(layer.base_layer), before) and layer.kept is None


@torch.no_grad()
def test_a_large_weight_is_merged_in_pieces():
    layer = random_layer(13, 24)
    whole = layer.dense()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowfat.structures.wavelet._BLOCK", 40)  # three rows
        pieces = layer.dense()
        layer.merge()
    assert (pieces - whole).abs().max() <= 4 * EPS * (whole.abs().max() + layer.delta().abs().max())
    assert torch.equal(layer.base_layer.weight, pieces)


def test_a_base_layer_that_is_kept_comes_back_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        layer = random_layer(16, 24, dtype=dtype)
        weight = layer.base_layer.weight.detach().clone()
        layer.u.data.mul_(1e4)  # whatever is added
        for _ in range(3):
            layer.merge(keep_base=True)
            layer.unmerge()
        assert torch.equal(layer.base_layer.weight, weight)


@torch.no_grad()
def test_a_low_rank_base_layer_takes_the_adapter_as_rank_and_gives_it_back_bit_for_bit():
    layer, x = random_layer(16, 24, "LowRank", subbands="all"), torch.randn(5, 16).double()
    y, v, u, dense = layer(x), layer.base_layer.v.clone(), layer.base_layer.u.clone(), layer.dense()
    layer.merge()
    assert layer.base_layer.rank == 2 + 4 * 2 and not any(p.requires_grad for p in layer.base_layer.parameters())
    assert (layer(x) - y).norm() < 1e-13 * y.norm() and (layer.dense() - dense).norm() < 1e-13 * dense.norm()
    layer.unmerge()
    assert torch.equal(layer.base_layer.v, v) and torch.equal(layer.base_layer.u, u) and torch.equal(layer(x), y)


@pytest.mark.parametrize("call, error, text", [
    (lambda layer: layer.merge() or layer.merge(), ArgumentError, r"merged already; unmerge\(\) first"),
    (lambda layer: layer.unmerge(), ArgumentError, r"not merged; merge\(\) first"),
    (lambda layer: layer.merge() or layer.state_dict(), UnsupportedError, "the adapter is merged, and its tensors"),
    (lambda layer: layer.merge() or nn.Sequential(layer).state_dict(), UnsupportedError, "^0 is merged"),
    (lambda layer: layer.merge() or layer.load_state_dict(random_layer().state_dict()), UnsupportedError, "is merged"),
])
def test_what_is_merged_is_not_taken_for_what_is_not(call, error, text):
    with pytest.raises(error, match=text):
        call(random_layer())


@pytest.mark.parametrize("base", ["Monarch", "Dictionary", "Sum"])
def test_other_structures_are_not_merged_into(base):
    layer = random_layer(16, 24, base)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(UnsupportedError, match=f"base_layer is a {base}, which cannot hold the sum"):
        layer.merge()
    assert not layer.merged and all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_low_rank_base_layer_takes_no_more_rank_than_it_can_have():
    layer = trained(LowRank(16, 24, 10), rank=2, subbands="all")
    with pytest.raises(UnsupportedError, match="LowRank of rank 10, to which merging would add 8; it can have at most 16"):
        layer.merge()
    assert not layer.merged and layer.base_layer.rank == 10


# --- as a module ---

@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("subbands, tiny", VARIANTS)
@torch.no_grad()
def test_shape_is_json_and_rebuilds_the_layer(subbands, tiny, base):
    layer = random_layer(16, 24, base, subbands=subbands, tiny=tiny, levels=2, filter="db2")
    shape = json.loads(json.dumps(layer.shape()))
    rebuilt = STRUCTURES["Wavelet"](**shape, dtype=torch.float64)
    rebuilt.load_state_dict(layer.state_dict())
    assert rebuilt.shape() == layer.shape() and torch.equal(rebuilt.dense(), layer.dense())
    meta = STRUCTURES["Wavelet"](**shape, device="meta")
    assert meta(torch.empty(3, 16, device="meta")).shape == (3, 24) and meta.shape() == shape
    assert {name: tensor.shape for name, tensor in meta.state_dict().items()} == {
        name: tensor.shape for name, tensor in layer.state_dict().items()}
    layer.check_indices()


def test_copies_and_casts():
    layer, x = random_layer(dtype=torch.float32, subbands="shared+gain", filter="db2"), torch.randn(5, 16)
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert torch.equal(same(x), layer(x)) and not same.base_layer.weight.requires_grad
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.merge(keep_base=True)
    assert layer.to(torch.bfloat16).kept.dtype == torch.bfloat16
    layer.unmerge()
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises((DtypeError, RuntimeError)):
        layer(x)


def test_checkpointed_gradients_are_the_same_bits():
    layer, x = random_layer(dtype=torch.float32), torch.randn(5, 16)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(layer(x).sin().sum(), parameters)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sin().sum()
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(again, parameters), expected))


def test_from_dense_copies_the_weight():
    weight, bias = torch.randn(8, 6), torch.randn(8)
    layer = Wavelet.from_dense(weight, bias, rank=2)
    assert torch.equal(layer.dense(), weight) and torch.equal(layer.bias, bias)
    assert layer.base_layer.weight.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("options, error, text", [
    ({"levels": 5}, ShapeError, "levels is 5, must be one of 1, 2, 3, 4 for 16 and 24 features"),
    ({"levels": 0}, ShapeError, "levels is 0, must be one of 1, 2, 3, 4"),
    ({"levels": True}, ArgumentError, "levels must be a whole number, found True"),
    ({"filter": "db3"}, ArgumentError, "filter is 'db3', must be one of haar, db2, db4, sym4"),
    ({"subbands": "HH"}, ArgumentError, r"subbands is 'HH', must be one of all, diag, LL, shared\+gain"),
    ({"rank": 0}, ShapeError, "rank must be at least 1, found 0"),
    ({"rank": 2.0}, ArgumentError, "rank must be a whole number"),
    ({"rank": 9}, ShapeError, "rank must be between 1 and 8 for diag of 16 to 24 features and levels=1, found 9"),
    ({"rank": 5, "levels": 2, "subbands": "LL"}, ShapeError, "rank must be between 1 and 4 for LL"),
    ({"rank": 5, "levels": 2, "tiny": True}, ShapeError, "1 and 4 for diag of 16 to 24 features and levels=2 and tiny"),
    ({"alpha": float("nan")}, ArgumentError, "alpha must be a finite number, found nan"),
    ({"alpha": "16"}, ArgumentError, "alpha must be a finite number"),
    ({"tiny": 1}, ArgumentError, "tiny must be True or False"),
    ({"tiny": True, "subbands": "shared+gain"}, ArgumentError, "subbands must be all, diag or LL"),
    ({"base_layer": 3}, ArgumentError, "base_layer must be a layer, found 3"),
    ({"base_layer": nn.Conv1d(3, 3, 1)}, UnsupportedError, "base_layer is a Conv1d, must be one of Linear, Conv1D, LowRank"),
    ({"base_layer": nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)}, UnsupportedError, "is a NonDynamically"),
    ({"base_layer": LowRankGroup([LowRank(8, 8, 2)])}, UnsupportedError, r"LowRankGroup.* put its layers\(\) back"),
    ({"base_layer": Wavelet(nn.Linear(8, 8), 2)}, UnsupportedError, "is a Wavelet already"),
    ({"base_layer": nn.Linear(4, 4).requires_grad_(False).to(torch.float8_e4m3fn)}, DtypeError, "weight has torch.float8"),
    ({"base_layer": {"structure": "Wavelet"}}, ArgumentError, "must have a structure of Linear"),
    ({"base_layer": {"structure": ["Linear"]}}, ArgumentError, "must have a structure of Linear"),
    ({"base_layer": {"structure": "Linear", "in_features": 4}}, ArgumentError, "base_layer: .*out_features"),
    ({"base_layer": {"structure": "Linear", "in_features": 0, "out_features": 4}}, ShapeError, "base_layer: in_feat"),
    ({"base_layer": {"structure": "LowRank", "in_features": 4, "out_features": 4, "rank": 9}}, ShapeError, "base_layer"),
])
def test_what_there_is_not(options, error, text):
    base = nn.Linear(16, 24)
    with pytest.raises(error, match=text):
        Wavelet(**{"base_layer": base, "rank": 2} | options)
    assert base.weight.requires_grad  # not frozen by a mistake


def test_a_sharded_base_layer_is_refused():
    class Shard(torch.Tensor):
        full_tensor = None

    base = nn.Linear(4, 4)
    base.weight = nn.Parameter(torch.ones(4, 4).as_subclass(Shard))
    with pytest.raises(UnsupportedError, match="base_layer.weight is sharded"):
        Wavelet(base, rank=2)


def test_a_sparse_base_layer():
    layer = trained(Sparse24(16, 24, dtype=torch.float64))
    x = torch.randn(5, 16).double()
    assert (layer(x) - linear(x, layer.dense(), layer.bias)).norm() < 1e-12
    layer.check_indices()
