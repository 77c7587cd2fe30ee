"""LowRankSparse: the layer against its dense matrix, what a seed means, how it starts and trains, and what is refused."""
import copy
import json
import pickle

import pytest
import torch
from torch.nn.functional import linear

import gates
from lowfat import checkpoint
from lowfat.errors import (ArgumentError, DeviceError, DtypeError, FormatError, IndexRangeError, NumericsError, ShapeError,
                           UnsupportedError)
from lowfat.layers import dense_weight, factorizable, replace
from lowfat.ops.low_rank_sparse import check_support
from lowfat.structures import STRUCTURES, LowRank, LowRankSparse, Sum
from lowfat.structures.low_rank_sparse import drawn, entries_of
from lowfat.validate import build

SIZES = [(3, 0.2), (0, 0.3), (4, 0.0), (0, 0.0), (2, 1.0), (0, 1.0), (1, 0.01), (20, 0.5)]  # rank and density
EPS = torch.finfo(torch.float64).eps


def a_layer(rank=3, density=0.2, dtype=torch.float64, **options):
    return LowRankSparse.from_dense(torch.randn(20, 24).to(dtype), torch.randn(20).to(dtype), rank=rank, density=density,
                                    **options)


def seeded(rank=3, density=0.2, seed=5, **options):
    """With all numbers other than zero."""
    layer = LowRankSparse(24, 20, rank, density, seed=seed, **{"alpha": 2.0, "dtype": torch.float64} | options)
    torch.nn.init.normal_(layer.u)
    return layer


# --- the layer ---

@pytest.mark.parametrize("rank,density", SIZES)
@torch.no_grad()
def test_forward_multiplies_by_dense(rank, density):
    for layer in (a_layer(rank, density), a_layer(rank, density, alpha=0.5), seeded(rank, density),
                  seeded(rank, density, seed=None)):
        layer.check_indices()
        dense, keep = layer.dense(), layer.keep()
        scale = 1 if layer.alpha is None or rank == 0 else layer.alpha / rank
        s = torch.zeros(20, 24, dtype=torch.float64).masked_scatter(keep, layer.values)
        assert (dense - scale * layer.u @ layer.v - s).norm() <= 44 * EPS * (dense.norm() + 1)
        assert keep.sum() == layer.values.numel() == int(480 * density + 1e-9)
        assert layer.macs() == rank * 44 + layer.values.numel()
        for shape in ((24,), (0, 24), (2, 1, 3, 24)):
            x = torch.randn(shape, dtype=torch.float64)
            assert (layer(x) - linear(x, dense, layer.bias)).norm() <= 24 * 20 * EPS * (x.norm() + 1) * (dense.norm() + 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank,density", SIZES)
def test_shape_is_json_and_rebuilds_the_layer(rank, density, bias):
    weight, some = torch.randn(20, 24), torch.randn(20) if bias else None
    for layer in (LowRankSparse.from_dense(weight, some, rank=rank, density=density),
                  LowRankSparse(24, 20, rank, density, alpha=8, seed=3, bias=bias)):
        shape = json.loads(json.dumps(layer.shape()))
        rebuilt = STRUCTURES["LowRankSparse"](**shape)
        rebuilt.load_state_dict(layer.state_dict())
        rebuilt.check_indices()
        assert rebuilt.shape() == layer.shape() and torch.equal(rebuilt.dense(), layer.dense())
        assert set(layer.state_dict()) == {"v", "u", "values", "starts", "columns"} | ({"bias"} if bias else set())
        with torch.device("meta"):
            made = LowRankSparse(**shape)
            assert made(torch.empty(3, 24)).shape == (3, 20) and made.columns.is_meta
            made.reset_parameters()


def test_starts_as_sltrain_does():
    """v Kaiming-uniform with a = sqrt 5, u zero, values within 1 / sqrt(in): the sparse part alone is there at first."""
    layer = LowRankSparse(64, 40, 8, 0.1, alpha=16)
    bound = 1 / 8
    for parameter in (layer.v, layer.values, layer.bias):
        assert 0.8 * bound < parameter.abs().max() <= bound
    assert not layer.u.any() and layer.scale == 2
    torch.nn.init.kaiming_uniform_(like := torch.empty(8, 64), a=5**0.5)
    assert abs(like.std() / layer.v.std() - 1) < 0.2
    x = torch.randn(5, 64)
    s = torch.zeros(40, 64).masked_scatter(layer.keep(), layer.values.detach())
    chain = gates.chain(x, s.T, bias=layer.bias.detach())
    assert gates.failed_gates(layer(x).detach(), linear(x, s, layer.bias).detach(), chain) == []


def test_all_entries_and_rank_zero_are_a_dense_layer():
    dense = torch.nn.Linear(24, 20)
    layer = LowRankSparse.from_dense(dense.weight.detach(), dense.bias.detach(), rank=0, density=1)
    same = LowRankSparse(24, 20, 0, 1.0, seed=9)
    same.values.data, same.bias.data = dense.weight.detach().flatten().clone(), dense.bias.detach().clone()
    x, dy = torch.randn(50, 24), torch.randn(50, 20)
    dense(x).backward(dy)
    for one in (layer, same):
        assert torch.equal(one.dense(), dense.weight)
        one(x).backward(dy)
        found = one.values.grad.view(20, 24)
        assert gates.failed_gates(found, dense.weight.grad, gates.chain(dy.T, x)) == []


def test_training_changes_numbers_and_not_places():
    """Towards a matrix of its own form, which it finds; and the places stay those of the seed."""
    layer, target = LowRankSparse(24, 20, 2, 0.1, seed=5), seeded(2, 0.1, dtype=torch.float32)
    with torch.no_grad():
        target.u.mul_(0.3)
    before = layer.starts.clone(), layer.columns.clone()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    x = torch.randn(256, 24)
    y, losses = target(x).detach(), []
    for _ in range(300):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]
    assert torch.equal(layer.starts, before[0]) and torch.equal(layer.columns, before[1])
    layer.check_indices()


def test_copies_casts_and_compiles():
    layer = seeded(dtype=torch.float32)
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert torch.equal(same.dense(), layer.dense()) and same.shape() == layer.shape()
    x, columns = torch.randn(3, 24), layer.columns.clone()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.to(torch.bfloat16).check_indices()
    assert layer.columns.dtype == torch.int16 and torch.equal(layer.half().columns, columns)
    assert layer(x.half()).dtype == torch.float16
    with pytest.raises(DtypeError, match="v has torch.float16, x has torch.float32"):
        layer(x)


def test_of_copies_what_it_is_given():
    layer = a_layer()
    v, u = (t.mT.contiguous().mT for t in (layer.v, layer.u))
    same = LowRankSparse.of(v, u, layer.values, layer.starts, layer.columns, layer.bias)
    assert torch.equal(same.dense(), layer.dense()) and same.v.is_contiguous() and same.seed is None
    assert same.density == 96 / 480 and same.shape() == layer.shape()
    for tensor in (*same.parameters(), *same.buffers()):
        tensor.data.zero_()
    assert all(tensor.any() for tensor in (*layer.parameters(), *layer.buffers()))


@pytest.mark.parametrize("name", ["u", "values", "bias"])
def test_of_refuses_mixed_tensors(name):
    tensors = dict(a_layer().named_parameters()) | dict(a_layer().named_buffers())
    with pytest.raises(DtypeError, match=f"{name} has torch.float16, v has torch.float64"):
        LowRankSparse.of(**tensors | {name: tensors[name].half()})
    with pytest.raises(DeviceError, match=f"{name} is on meta, v on cpu"):
        LowRankSparse.of(**tensors | {name: tensors[name].to("meta")})


# --- what a seed means ---

@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 600, 4097])
def test_a_seed_draws_each_number_once(size):
    for count in {0, 1, size // 3, size - 1, size}:
        found = drawn(11, count, size)
        assert found.shape == (count,) and (found.diff() > 0).all() and not ((found < 0) | (found >= size)).any()
        assert torch.equal(found, drawn(11, count, size))
    assert torch.equal(drawn(11, size, size), torch.arange(size))


def test_a_seed_means_the_same_everywhere():
    """Written down, so that no version of torch or of this package changes what a stored seed says."""
    assert drawn(0, 12, 100).tolist() == [32, 40, 44, 45, 49, 52, 58, 59, 66, 67, 69, 89]
    assert drawn(0, 1_352_663, 4096 * 11_008)[:5].tolist() == [6, 14, 50, 57, 74]
    torch.manual_seed(1)
    first = LowRankSparse(24, 20, 3, 0.2)
    torch.manual_seed(2)
    assert torch.equal(LowRankSparse(24, 20, 3, 0.2, dtype=torch.bfloat16).columns, first.columns)
    assert torch.get_rng_state().numel() and not torch.equal(LowRankSparse(24, 20, 3, 0.2, seed=1).columns, first.columns)
    places = torch.cat([torch.full((n,), i) * 24 for i, n in enumerate(first.starts.diff().tolist())]) + first.columns
    assert torch.equal(places, drawn(0, 96, 480))


def test_draws_are_uniform_and_independent():
    """Each number, each pair of them, and what two seeds have in common, as often as chance has it, within 5 deviations."""
    size, count, seeds = 96, 24, 2000
    taken = torch.zeros(seeds, size)
    for seed in range(seeds):
        taken[seed, drawn(seed, count, size)] = 1
    share = count / size
    assert (taken.mean(0) - share).abs().max() < 5 * (share * (1 - share) / seeds)**0.5
    pair = share * (count - 1) / (size - 1)
    together = taken.mT @ taken / seeds
    together.fill_diagonal_(pair)
    assert (together - pair).abs().max() < 5.5 * (pair * (1 - pair) / seeds)**0.5  # the largest of 4,560
    common = (taken[:-1] * taken[1:]).sum(1).mean()  # of one seed and the next: hypergeometric
    assert abs(common - count * share) < 5 * (count * share * (1 - share) * (size - count) / (size - 1) / seeds)**0.5


def test_places_come_back_after_to_empty():
    layer = LowRankSparse(24, 20, 3, 0.2, seed=7, device="meta").to_empty(device="cpu")
    layer.starts.fill_(-1)
    layer.columns.fill_(-1)
    layer.reset_parameters()
    layer.check_indices()
    assert torch.equal(layer.columns, LowRankSparse(24, 20, 3, 0.2, seed=7).columns)
    chosen = a_layer()
    before = chosen.columns.clone()
    chosen.reset_parameters()
    assert torch.equal(chosen.columns, before)


def test_places_that_the_seed_does_not_give_are_found():
    """Good supports, all of them, but of another seed, or with one entry moved."""
    layer = seeded(seed=5)
    for other in (LowRankSparse(24, 20, 3, 0.2, seed=6), LowRankSparse(24, 20, 3, 0.2, seed=None)):
        wrong = copy.deepcopy(layer)
        wrong.starts, wrong.columns = other.starts, other.columns
        check_support(wrong.starts, wrong.columns, 24)
        with pytest.raises(IndexRangeError, match="starts and columns are not what seed 5 draws: row 0 differs"):
            wrong.check_indices()
    row, place = next((i, int(end) - 1) for i, end in enumerate(layer.starts[1:].tolist())
                      if i > 2 and end and layer.columns[end - 1] < 23 and end > layer.starts[i])
    layer.columns[place] += 1
    check_support(layer.starts, layer.columns, 24)
    with pytest.raises(IndexRangeError, match=f"not what seed 5 draws: row {row} differs"):
        layer.check_indices()


@pytest.mark.parametrize("density, size, count", [
    (0.29, 100, 29), (0.03, 100, 3), (0.07, 100, 7), (0.57, 100, 57), (1 / 3, 3, 1), (0.999, 100, 99), (1.0, 7, 7),
    (1, 7, 7), (0, 7, 0), (1e-9, 7, 0)])
def test_density_counts_what_it_says(density, size, count):
    assert entries_of(density, size) == count


def test_a_density_of_a_count_gives_the_count():
    for size in (7, 480, 4096 * 11_008, 2**31 - 1):
        for count in {1, 2, 3, size // 7, size // 3, size - 2, size - 1, size}:
            assert entries_of(count / size, size) == count


# --- from a dense weight ---

@torch.no_grad()
def test_from_dense_is_the_closest_rank_and_the_largest_of_the_rest():
    weight = torch.randn(20, 24, dtype=torch.float64)
    for alpha in (None, 0.5, 7):
        layer = LowRankSparse.from_dense(weight, rank=3, density=0.1, alpha=alpha)
        low_rank = LowRank.from_dense(weight, rank=3)
        rest = weight - low_rank.dense()
        assert (layer.scale * layer.u @ layer.v - low_rank.dense()).norm() <= 44**2 * EPS * weight.norm()
        keep = layer.keep()
        assert keep.sum() == 48 and rest[keep].abs().min() >= rest[~keep].abs().max()
        assert (weight - layer.dense())[keep].norm() <= 44**2 * EPS * weight.norm()
        assert torch.allclose(layer.u.norm(dim=0), layer.v.norm(dim=1))
    mine = torch.rand(20, 24) < 0.3
    layer = LowRankSparse.from_support(weight, mine, rank=3)
    assert torch.equal(layer.keep(), mine) and (weight - layer.dense())[mine].norm() <= 44**2 * EPS * weight.norm()


@torch.no_grad()
def test_error_falls_with_rank_and_density_and_nothing_is_lost_with_all():
    weight = torch.randn(20, 24, dtype=torch.float64)
    for errors in ([(weight - a.dense()).norm() for a in (LowRankSparse.from_dense(weight, rank=rank, density=density)
                                                         for rank, density in sizes)]
                   for sizes in ([(r, 0.1) for r in range(21)], [(3, d / 10) for d in range(11)])):
        assert all(later <= earlier for earlier, later in zip(errors, errors[1:])) and errors[-1] <= 1e-12 * errors[0]


def test_zeros_that_are_kept_stay_and_are_trained():
    weight, keep = torch.tensor([[0.0, -0.0, 5, 7]]), torch.tensor([[True, True, False, False]])
    layer = LowRankSparse.from_support(weight, keep, rank=0)
    assert layer.values.tolist() == [0, 0] and torch.equal(layer.keep(), keep)
    layer(torch.ones(1, 4)).sum().backward()
    assert layer.values.grad.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_in_the_dtype_of_the_weight(dtype):
    """The entries make up for the rounding of the factors, too."""
    weight = torch.randn(33, 48).to(dtype)
    layer = LowRankSparse.from_dense(weight, weight[:, 0], rank=4, density=0.3)
    assert {p.dtype for p in layer.parameters()} == {dtype} and layer(torch.randn(9, 48).to(dtype)).dtype == dtype
    kept = (layer.double().dense() - weight.double())[layer.keep()]
    assert kept.norm() <= 2 * gates.ROUNDOFF[dtype] * weight.double().norm()


# --- in a sum and in a model ---

def test_is_a_part_of_a_sum():
    parts = [{"structure": "LowRank", "rank": 2}, {"structure": "LowRankSparse", "rank": 0, "density": 0.25}]
    layer = Sum.from_dense(torch.randn(10, 24), parts=parts)
    rebuilt = Sum(**json.loads(json.dumps(layer.shape())))
    rebuilt.load_state_dict(layer.state_dict())
    layer.check_indices()
    assert torch.equal(rebuilt.dense(), layer.dense()) and layer.macs() == 2 * 34 + 60
    layer.parts[1].columns.fill_(-1)
    with pytest.raises(IndexRangeError, match="part 1: low_rank_sparse: columns has -1 in place 0 of row"):
        layer.check_indices()


def output(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(2, 12))[0]


def replaced(model):
    """Layers with and without each part, of seeds and of choice."""
    for number, (name, module) in enumerate(factorizable(model).items()):
        weight = dense_weight(module)
        rank, density = [(3, 0.2), (0, 0.1), (4, 0.0), (0, 0.0)][number % 4]
        layer = LowRankSparse.from_dense(weight, module.bias, rank=rank, density=density)
        if number % 3 == 0:
            layer = LowRankSparse(weight.shape[1], weight.shape[0], rank, density, alpha=2.0, seed=number)
            torch.nn.init.normal_(layer.u)
        replace(model, name, layer)
    return model


def test_a_model_comes_back_as_it_was(tiny_bert, tmp_path):
    model = replaced(tiny_bert)
    checkpoint.export_dense(model, tmp_path / "dense")
    torch.testing.assert_close(output(type(model).from_pretrained(tmp_path / "dense")), output(model))
    checkpoint.save(model, tmp_path / "one")
    for loaded in (checkpoint.load(tmp_path / "one"), type(model).from_pretrained(tmp_path / "one")):
        assert torch.equal(output(loaded), output(model))
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    loaded.save_pretrained(tmp_path / "two")
    first, second = ({path.name: path.read_bytes() for path in sorted((tmp_path / name).glob("*.safetensors*"))}
                     for name in ("one", "two"))
    assert first == second
    half = checkpoint.load(tmp_path / "two", dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith((".starts", ".columns")):
            assert torch.equal(half.get_buffer(name), buffer) and half.get_buffer(name).dtype == buffer.dtype


def test_a_checkpoint_whose_places_its_seed_does_not_give_is_refused(tiny_bert, tmp_path):
    name, module = list(factorizable(tiny_bert).items())[3]
    layer = LowRankSparse(module.in_features, module.out_features, 3, 0.2, seed=4)
    replace(tiny_bert, name, layer)
    layer.seed = 5
    checkpoint.save(tiny_bert, tmp_path / "bad")
    for load in (checkpoint.load, type(tiny_bert).from_pretrained):
        with pytest.raises(IndexRangeError, match=rf"{name}: starts and columns are not what seed 5 draws: row "):
            load(tmp_path / "bad")


@pytest.mark.parametrize("change, text", [
    ({"density": 2}, "density must be at least 0"), ({"rank": 21}, "rank must be between 0 and 20"),
    ({"seed": -1}, "seed must"), ({"seed": 1.0}, "seed must"), ({"alpha": "8"}, "alpha must"),
    ({"density": None}, "density must"),
    ({"density": True}, "density must"), ({"alpha": 10**400}, "alpha must"), ({"in_features": 10**400}, "must be at most"),
    ({"in_features": 2**62}, "must be at most"), ({"places": []}, "places"),
    ({"out_features": 2**31, "in_features": 2**28}, "are .*, must be at most 2147483647")])
def test_a_checkpoint_with_impossible_sizes_is_refused(change, text):
    with pytest.raises(FormatError, match=text):
        build("layer", {"structure": "LowRankSparse"} | seeded().shape() | change)


# --- what is refused ---

@pytest.mark.parametrize("arguments, error, text", [
    ({"rank": 21}, ShapeError, "rank must be between 0 and 20 for 24 to 20 features, found 21"),
    ({"rank": -1}, ShapeError, "rank must be at least 0, found -1"), ({"rank": 2.0}, ArgumentError, "rank must be a whole"),
    ({"density": -0.1}, ArgumentError, "density must be at least 0 and at most 1; found -0.1"),
    ({"density": 1.5}, ArgumentError, "density"), ({"density": "0.1"}, ArgumentError, "density"),
    ({"density": float("nan")}, ArgumentError, "density"), ({"density": True}, ArgumentError, "density"),
    ({"alpha": 0}, ArgumentError, "alpha must be a number above 0, or None for a scale of 1; found 0"),
    ({"alpha": float("inf")}, ArgumentError, "alpha"), ({"alpha": True}, ArgumentError, "alpha"),
    ({"alpha": "16"}, ArgumentError, "alpha"), ({"alpha": 10**400}, ArgumentError, "alpha"),
    ({"alpha": float("nan")}, ArgumentError, "alpha"),
    ({"seed": -1}, ArgumentError, "seed must be a whole number from 0, or None"),
    ({"seed": True}, ArgumentError, "seed"), ({"seed": "0"}, ArgumentError, "seed"),
    ({"in_features": 0}, ShapeError, "in_features must be at least 1"),
    ({"out_features": 2.5}, ArgumentError, "out_features"),
    ({"in_features": 2**20, "out_features": 2**20, "density": 0.5}, ShapeError, "must be at most 2147483647"),
])
def test_impossible_sizes(arguments, error, text):
    with pytest.raises(error, match=text):
        LowRankSparse(**{"in_features": 24, "out_features": 20, "rank": 3, "density": 0.2, "device": "meta"} | arguments)


def of(**changes):
    torch.manual_seed(0)
    layer = a_layer()
    given = {name: getattr(layer, name).detach() for name in ("v", "u", "values", "starts", "columns", "bias")}
    return LowRankSparse.of(**{name: changes.get(name, lambda t: t)(t) for name, t in given.items()})


@pytest.mark.parametrize("make, error, text", [
    (lambda: of(v=lambda t: t[0]), ShapeError, r"v is \[24\], u .*, must be \[r, in\], \[out, r\] and \[nnz\]"),
    (lambda: of(u=lambda t: t[:, :2]), ShapeError, r"u is \[20, 2\], must be \[20, 3\]"),
    (lambda: of(values=lambda t: t[:95]), ShapeError, r"columns is \[96\], must be \[95\]"),
    (lambda: of(values=lambda t: t.repeat(6)), ShapeError, r"values is \[576\], the weight has 480 entries"),
    (lambda: of(bias=lambda t: t[:3]), ShapeError, r"bias is \[3\], must be \[20\]"),
    (lambda: LowRankSparse.from_dense(torch.ones(4), rank=1, density=0.5), ShapeError, r"weight must be \[out, in\]"),
    (lambda: LowRankSparse.from_dense(torch.ones(4, 4) / 0, rank=1, density=0.5), NumericsError, "NaN or infinity"),
    (lambda: LowRankSparse.from_dense(torch.ones(4, 4) / 0, rank=0, density=0.5), NumericsError, "NaN or infinity"),
    (lambda: LowRankSparse.from_dense(torch.ones(4, 4), rank=5, density=0.5), ShapeError, "rank must be between 0 and 4"),
    (lambda: LowRankSparse.from_dense(torch.ones(4, 4), rank=1, density=2), ArgumentError, "density must be"),
    (lambda: LowRankSparse.from_support(torch.ones(4, 4), torch.ones(4, 3) > 0, rank=1), ShapeError, "keep must be bool"),
    (lambda: LowRankSparse.from_support(torch.ones(4, 4), torch.ones(4, 4), rank=1), ShapeError, "found torch.float32"),
])
def test_what_is_no_such_layer_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


def first(number):
    def of_first(t):
        t = t.clone()
        t[0] = number
        return t

    return of_first


INDEX = {  # every kind of wrong index at construction, and what is said of starts and of columns
    "-1": (first(-1), IndexRangeError, "has -1 "), "far": (first(2**15 - 1), IndexRangeError, "has 32767 "),
    "smallest": (lambda t: first(torch.iinfo(t.dtype).min)(t), IndexRangeError, "has -(2147483648|32768) "),
    "zeros": (lambda t: t * 0, IndexRangeError, "has 0 "), "ones": (lambda t: t * 0 + 1, IndexRangeError, "has 1 "),
    "all -1": (lambda t: t * 0 - 1, IndexRangeError, "has -1 "), "k": (lambda t: t * 0 + 24, IndexRangeError, "has 24 "),
    "k + 1": (lambda t: t * 0 + 25, IndexRangeError, "has 25 "), "shifted": (lambda t: t + 24, IndexRangeError, "has "),
    "descending": (lambda t: t.flip(0), IndexRangeError, "has "), "negated": (lambda t: -1 - t, IndexRangeError, "has -"),
    "doubled": (lambda t: t * 2 + 1, IndexRangeError, "has "), "rolled": (lambda t: t.roll(1), IndexRangeError, "has "),
    "shorter": (lambda t: t[:-1], ShapeError, "must be"),
    "longer": (lambda t: torch.cat([t, t[-1:]]), ShapeError, "must be"),
    "empty": (lambda t: t[:0], ShapeError, "must be"), "two dimensions": (lambda t: t[None], ShapeError, "must be"),
    "folded": (lambda t: t[:, None], ShapeError, "must be"), "int64": (lambda t: t.long(), DtypeError, "has torch.int64"),
    "2^40": (lambda t: t.long() + 2**40, DtypeError, "has torch.int64"),
    "float": (lambda t: t.float(), DtypeError, "has torch.float32"),
    "bool": (lambda t: t > 0, DtypeError, "torch.bool"), "int8": (lambda t: t.to(torch.int8), DtypeError, "torch.int8"),
    "other width": (lambda t: t.to({2: torch.int32, 4: torch.int16}[t.itemsize]), DtypeError, "must be torch.int"),
}


@pytest.mark.parametrize("change, error, text", INDEX.values(), ids=INDEX)
@pytest.mark.parametrize("buffer", ["starts", "columns"])
def test_bad_indices_are_refused_by_name(buffer, change, error, text):
    """T-index at construction; at load in tests/test_indices.py."""
    with pytest.raises(error, match=f"{buffer} .*{text}"):
        of(**{buffer: change})


def test_a_shard_is_refused():
    class Shard(torch.Tensor):
        full_tensor = None

    with pytest.raises(UnsupportedError, match="perhaps a shard"):
        LowRankSparse.from_dense(torch.ones(4, 4).as_subclass(Shard), rank=1, density=0.5)
