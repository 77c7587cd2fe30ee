"""Dictionary: the layer against its dense matrix, its special cases, its promises about the mask, and what is refused."""
import copy
import json
import pickle

import pytest
import torch
from torch.nn.functional import linear

import gates
from lowfat.errors import ArgumentError, DtypeError, IndexRangeError, NumericsError, ShapeError, UnsupportedError
from lowfat.ops.bitmap import pack
from lowfat.structures import STRUCTURES, Dictionary, LowRank, Monarch

# in, out and arguments: one block, all kept, more blocks either way, ragged ones, an empty one, dense atoms, 2:4
LAYERS = [(16, 20, dict(atoms=8, nonzeros=3)), (16, 20, dict(atoms=16, nonzeros=16)),
          (24, 20, dict(atoms=5, nonzeros=2, blocks=(4, 3))), (13, 19, dict(atoms=4, nonzeros=4, blocks=(3, 2))),
          (7, 9, dict(atoms=2, nonzeros=1, blocks=(4, 3))), (16, 20, dict(atoms=10, nonzeros=5, dense_atoms=3)),
          (24, 20, dict(atoms=10, nonzeros=6, dense_atoms=2, pattern=(2, 4))),
          (16, 40, dict(atoms=8, nonzeros=2, pattern=(1, 4), blocks=(2, 2))),
          (16, 20, dict(atoms=6, nonzeros=6, dense_atoms=6)),
          (16, 20, dict(atoms=6, nonzeros=2, dense_atoms=2))]
FORMS = ["bitmap", "positions"]
EPS = torch.finfo(torch.float64).eps


def is_same(found, expected):
    """But for the rounding of about as many steps as the matrix has rows and columns, each as many numbers long."""
    return found.shape == expected.shape and (found - expected).norm() <= sum(expected.shape) ** 2 * EPS * expected.norm()


def block(matrix, layer, o, i):
    """The rows and columns of output block o and input block i, by the definition."""
    (p, q), (n, k) = layer.blocks, matrix.shape
    rows, columns = -(-n // p), -(-k // q)
    return matrix[o * rows:(o + 1) * rows, i * columns:(i + 1) * columns]


def checked(layer):
    layer.check_indices()
    return layer


# --- the layer ---

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k,n,sizes", LAYERS)
@torch.no_grad()
def test_dense_is_made_of_blocks_and_forward_multiplies_by_it(k, n, sizes, form):
    """By definition, not by the layer's own way to put blocks together. New and made from a weight."""
    weight, bias = torch.randn(n, k, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    made = Dictionary.from_dense(weight, bias, format=form, **sizes)
    for layer in (made, Dictionary(k, n, format=form, dtype=torch.float64, **sizes)):
        dense, codes, kept = checked(layer).dense(), layer.codes(), layer.kept()
        (p, q), a = layer.blocks, layer.atoms
        assert (a, layer.nonzeros) == (sizes["atoms"], sizes["nonzeros"])
        assert dense.shape == (n, k) and (kept.view(n, q, a).sum(2) == layer.nonzeros).all() and not codes[~kept].any()
        assert torch.equal(codes[kept].view(n, -1), layer.values)
        for o in range(p):
            for i in range(q):
                expected = block(dense, layer, o, i)
                rows = codes.view(n, q, a)[o * -(-n // p):(o + 1) * -(-n // p), i]
                assert is_same((rows @ layer.d[o, i])[:, :expected.shape[1]], expected)
        assert is_same(layer(torch.eye(k, dtype=torch.float64)), dense.T + layer.bias)
        for shape in ((k,), (0, k), (2, 1, 3, k)):
            x = torch.randn(shape, dtype=torch.float64)
            assert is_same(layer(x).view(-1, n), linear(x, dense, layer.bias).view(-1, n))


@pytest.mark.parametrize("form", [*FORMS, None])
@pytest.mark.parametrize("k,n,sizes", LAYERS)
def test_shape_is_json_and_rebuilds_the_layer(k, n, sizes, form):
    layer = Dictionary.from_dense(torch.randn(n, k), format=form, **sizes)
    shape = json.loads(json.dumps(layer.shape()))
    rebuilt = STRUCTURES["Dictionary"](**shape)
    rebuilt.load_state_dict(layer.state_dict())
    assert rebuilt.shape() == layer.shape() and torch.equal(rebuilt.dense(), layer.dense())
    p, q = layer.blocks
    assert layer.macs() == layer.d.numel() + layer.values.numel()
    assert layer.macs() == p * q * layer.atoms * -(-k // q) + n * q * layer.nonzeros
    with torch.device("meta"):
        assert Dictionary(**shape)(torch.empty(3, k)).shape == (3, n)


def test_both_forms_are_one_layer():
    for k, n, sizes in LAYERS:
        weight = torch.randn(n, k)
        bits, places = (Dictionary.from_dense(weight, format=form, **sizes) for form in FORMS)
        assert torch.equal(bits.kept(), places.kept()) and torch.equal(bits.values, places.values)
        assert bits.mask.dtype == torch.int32 and bits.positions is None
        assert places.positions.dtype == torch.int16 and places.mask is None
        assert set(bits.state_dict()) == {"d", "values", "mask"} and set(places.state_dict()) == {"d", "values", "positions"}


def test_the_smaller_form_is_the_default():
    """In bytes: a / 8 in whole words against 2 s."""
    for atoms, nonzeros, form in ((32, 2, "bitmap"), (32, 1, "positions"), (512, 32, "bitmap"), (512, 31, "positions"),
                                  (33, 4, "bitmap"), (33, 3, "positions"), (2**15, 1, "bitmap"),
                                  (2**15 - 1, 1, "positions")):
        layer = Dictionary(8, 8, atoms, nonzeros, device="meta")
        stored = layer.support.numel() * layer.support.element_size()
        assert layer.format == form and (stored == 8 * min(-(-atoms // 32) * 4, 2 * nonzeros) or atoms == 2**15)


def test_a_new_layer_uses_every_atom_and_input():
    for k, n, sizes in LAYERS:
        layer = Dictionary(k, 40, **sizes)
        is_used = layer.kept().any(0).view(layer.blocks[1], layer.atoms)
        rest = layer.nonzeros > layer.dense_atoms
        assert is_used[:, :layer.dense_atoms].all() and is_used[:, layer.dense_atoms:].all() == rest or layer.atoms == 6
        assert layer.d.abs().max() <= layer.d.shape[3] ** -0.5
        assert layer.values.abs().max() <= layer.values.shape[1] ** -0.5


def test_the_mask_says_what_is_kept_and_not_the_codes():
    """Zeros and -0.0 that are kept stay, and are trained."""
    d, codes = torch.ones(1, 1, 4, 3), torch.tensor([[0.0, -0.0, 5, 7], [1, 0, 0, 2]])
    kept = torch.tensor([[True, True, False, False], [False, True, True, False]])
    for form in FORMS:
        layer = Dictionary.from_codes(d, codes, kept, in_features=3, format=form)
        assert torch.equal(layer.kept(), kept) and not layer.values.any() and layer.values[0, 1].signbit()
        layer(torch.ones(1, 3)).sum().backward()
        assert (layer.values.grad == 3).all()


def test_copies_and_casts_keep_the_support():
    for form in FORMS:
        layer = Dictionary.from_dense(torch.randn(20, 16), torch.randn(20), atoms=8, nonzeros=3, format=form)
        for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(same.dense(), layer.dense())
        x, support = torch.randn(3, 16), layer.support.clone()
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
        assert torch.equal(layer.to(torch.bfloat16).support, support) and layer.support.dtype == support.dtype
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(DtypeError, match="d has torch.bfloat16, x has torch.float32"):
            layer(x)


def test_of_copies_what_it_is_given():
    layer = Dictionary.from_dense(torch.randn(20, 16), torch.randn(20), atoms=8, nonzeros=3)
    given = (t.mT.contiguous().mT for t in (layer.d, layer.values, layer.support))
    same = Dictionary.of(*given, layer.bias, in_features=16)
    assert torch.equal(same.dense(), layer.dense()) and same.d.is_contiguous() and same.support.is_contiguous()
    same.support.zero_()
    for parameter in same.parameters():
        parameter.data.zero_()
    assert layer.support.any() and all(parameter.any() for parameter in layer.parameters())


def test_layers_share_a_dictionary():
    first, second = (Dictionary(16, n, atoms=8, nonzeros=3) for n in (20, 12))
    second.d = first.d
    both = torch.nn.ModuleList([first, second]).to(torch.bfloat16)
    assert both[0].d is both[1].d and len(list(both.parameters())) == 5
    x = torch.randn(3, 16).bfloat16()
    (first(x).sum() + second(x).sum()).backward()
    alone = [torch.autograd.grad(layer(x).sum(), layer.d)[0] for layer in both]
    assert torch.equal(first.d.grad, alone[0] + alone[1])


@pytest.mark.parametrize("sizes", [
    {"atoms": 9, "nonzeros": 3}, {"atoms": 9, "nonzeros": 1}, {"atoms": 6, "nonzeros": 3, "blocks": (1, 2)},
    {"atoms": 10, "nonzeros": 6, "dense_atoms": 2, "pattern": (1, 2), "format": "bitmap"}])
@torch.no_grad()
def test_split_layers_are_the_rows_of_the_whole(sizes):
    whole, bias = Dictionary.from_dense(torch.randn(20, 16), torch.zeros(20), **sizes), torch.randn(20)
    for parameter in whole.parameters():
        parameter.mul_(8).round_()  # whole numbers: products are exact, in whatever order
    first, second = whole.split([8, 12], [bias[:8], None])
    assert torch.equal(torch.cat([first.dense(), second.dense()]), whole.dense())
    assert first.d is second.d and first.d is not whole.d and torch.equal(first.bias, bias[:8]) and second.bias is None
    assert first.shape() == whole.shape() | {"out_features": 8}


def test_dictionaries_of_several_blocks_of_outputs_are_not_split():
    with pytest.raises(ShapeError, match="one block of outputs, found 2"):
        Dictionary(16, 20, atoms=4, nonzeros=2, blocks=(2, 1)).split([8, 12], [None, None])


# --- from a dense weight ---

@pytest.mark.parametrize("blocks", [(1, 1), (2, 3), (3, 2)])
@torch.no_grad()
def test_all_atoms_kept_is_block_low_rank(blocks):
    """s = a: the closest matrix of that rank in every block (methods.md 12: DS(s = r) = BLR), and exact at full rank."""
    weight = torch.randn(18, 24, dtype=torch.float64)
    for atoms in (1, 3, 6):
        found = Dictionary.from_dense(weight, atoms=atoms, nonzeros=atoms, blocks=blocks)
        same = Monarch.from_dense(weight, blocks=blocks[::-1], rank=atoms, interleave=False)
        assert is_same(found.dense(), same.dense())
    one = Dictionary.from_dense(weight, atoms=5, nonzeros=5)
    assert is_same(one.dense(), LowRank.from_dense(weight, rank=5).dense())
    assert is_same(Dictionary.from_dense(weight, atoms=18, nonzeros=18).dense(), weight)


@pytest.mark.parametrize("k,n,sizes", LAYERS)
@torch.no_grad()
def test_keeps_the_largest_coefficients_of_orthonormal_atoms(k, n, sizes):
    weight = torch.randn(n, k, dtype=torch.float64)
    layer = Dictionary.from_dense(weight, **sizes)
    (p, q), a, dense = layer.blocks, layer.atoms, layer.dense_atoms
    size, kept = -(-n // p), layer.kept().view(n, q, a)
    for o in range(p):
        for i in range(q):
            part = block(weight, layer, o, i)
            if not part.numel():
                continue
            assert is_same(layer.d[o, i] @ layer.d[o, i].T, torch.eye(a, dtype=torch.float64))
            atoms = layer.d[o, i][:, :part.shape[1]]
            full, mine = part @ atoms.T, kept[o * size:(o + 1) * size, i]
            assert mine[:, :dense].all()
            for row, chosen in zip(full[:, dense:].abs(), mine[:, dense:]):
                m = len(row) if layer.pattern is None else layer.pattern[1]
                for group, where in zip(row.split(max(m, 1)), chosen.split(max(m, 1))):
                    if where.any() and not where.all():
                        assert group[where].min() >= group[~where].max()


@torch.no_grad()
def test_error_falls_with_non_zeros():
    weight = torch.randn(20, 24, dtype=torch.float64)
    layers = [Dictionary.from_dense(weight, atoms=12, nonzeros=s, blocks=(1, 2)) for s in range(1, 13)]
    errors = [(weight - layer.dense()).norm() for layer in layers]
    assert all(later <= earlier for earlier, later in zip(errors, errors[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_in_the_dtype_of_the_weight(dtype):
    weight = torch.randn(33, 48).to(dtype)
    layer = Dictionary.from_dense(weight, weight[:, 0], atoms=10, nonzeros=4, blocks=(2, 3))
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(torch.randn(9, 48).to(dtype)).dtype == dtype
    closest = Dictionary.from_dense(weight.double(), atoms=10, nonzeros=4, blocks=(2, 3)).dense()
    assert (layer.double().dense() - closest).norm() / closest.norm() < 2 * gates.ROUNDOFF[dtype]  # each factor rounded once


# --- what is refused ---

@pytest.mark.parametrize("arguments, error, text", [
    ({"nonzeros": 9}, ShapeError, "nonzeros must be between 1 and 8, the atoms; found 9"),
    ({"nonzeros": 0}, ShapeError, "nonzeros must be at least 1, found 0"),
    ({"atoms": 0}, ShapeError, "atoms must be at least 1"),
    ({"atoms": 8.0}, ArgumentError, "atoms must be a whole number, found 8.0"),
    ({"nonzeros": True}, ArgumentError, "nonzeros"),
    ({"blocks": 2}, ArgumentError, "blocks must be two whole numbers, of outputs and of inputs; found 2"),
    ({"blocks": (1, 2, 3)}, ArgumentError, "two whole numbers"),
    ({"blocks": (21, 1)}, ShapeError, "between 1 and 20 for 20 outputs"),
    ({"blocks": (1, 0)}, ShapeError, "between 1 and 16 for 16 inputs; found 0"),
    ({"dense_atoms": 4}, ShapeError, "dense_atoms must be between 0 and 3, the nonzeros; found 4"),
    ({"dense_atoms": -1}, ShapeError, "dense_atoms must be at least 0, found -1"),
    ({"dense_atoms": None}, ArgumentError, "dense"),
    ({"pattern": (2, 4)}, ShapeError, "pattern 2:4 of the 8 atoms behind the first 0 must keep 3 of them"),
    ({"pattern": (3, 7)}, ShapeError, "pattern 3:7 of the 8"),
    ({"pattern": 2}, ArgumentError, "pattern must be two whole numbers"),
    ({"pattern": (5, 4)}, ShapeError, "pattern 5:4"), ({"pattern": (0, 0)}, ShapeError, "pattern 0:0"),
    ({"format": "csr"}, ArgumentError, "format must be one of bitmap, positions, or None; found 'csr'"),
    ({"format": []}, ArgumentError, "format must be one of"),
    ({"format": "positions", "atoms": 2**15}, ShapeError, "positions reach 32767 atoms, found 32768; use the bitmap"),
    ({"in_features": 0}, ShapeError, "in_features must be at least 1"),
    ({"out_features": 2.5}, ArgumentError, "out_features"),
])
def test_impossible_sizes(arguments, error, text):
    with pytest.raises(error, match=text):
        Dictionary(**{"in_features": 16, "out_features": 20, "atoms": 8, "nonzeros": 3} | arguments)


def a_layer(**options):
    return Dictionary.from_dense(torch.randn(20, 16), **{"atoms": 8, "nonzeros": 4} | options)


@pytest.mark.parametrize("make, error, text", [
    (lambda: a_layer(atoms=17), ShapeError, "between 1 and 16, the smaller side of a block of 20 x 16; found 17"),
    (lambda: a_layer(blocks=(4, 4)), ShapeError, "between 1 and 4, the smaller side of a block of 5 x 4; found 8"),
    (lambda: Dictionary.from_dense(torch.ones(4), atoms=1, nonzeros=1), ShapeError, r"weight must be \[out, in\]"),
    (lambda: Dictionary.from_dense(torch.ones(4, 4) / 0, atoms=1, nonzeros=1), NumericsError, "NaN or infinity"),
    (lambda: of(bias=lambda t: t[:3]), ShapeError, r"bias is \[3\], must be \[20\]"),
    (lambda: of(support=lambda t: t.long()), DtypeError, r"support has torch.int64, must be int32 \(a bitmap\) or int16"),
    (lambda: of(support=lambda t: t[:-1]), ShapeError, r"support is \[19, 1\], must be \[20, 1\]"),
    (lambda: of(support=lambda t: t * 0), IndexRangeError, "keeps 0 atoms in block 0 of row 0, must keep 4"),
    (lambda: of(support=lambda t: t | 1 << 8), IndexRangeError, "bits behind its 8 atoms"),
    (lambda: of(d=lambda t: t[0]), ShapeError, r"must be \[P, Q, a, p\]"),
    (lambda: of(d=lambda t: t[..., :9]), ShapeError, r"d is \[1, 1, 8, 9\], must be \[1, 1, 8, 16\]"),
    (lambda: of(values=lambda t: t[:, :3]), IndexRangeError, "keeps 4 atoms in block 0 of row 0, must keep 3"),
    (lambda: codes(kept=lambda t: t | (torch.arange(8) == 7)), ShapeError, "every row must keep as many"),
    (lambda: codes(kept=lambda t: t.float()), ShapeError, r"kept must be bool \[20, 8\], found torch.float32"),
    (lambda: codes(codes=lambda t: t[:, :7]), ShapeError, r"codes \[20, 7\], must be"),
])
def test_what_is_no_such_layer_is_refused(make, error, text):
    torch.manual_seed(0)
    with pytest.raises(error, match=text):
        make()


def of(**changes):
    layer = a_layer(format="bitmap")
    given = {"d": layer.d, "values": layer.values, "support": layer.support, "bias": torch.ones(20)}
    return Dictionary.of(**{name: changes.get(name, lambda t: t)(t) for name, t in given.items()}, in_features=16)


def codes(**changes):
    layer = a_layer()
    given = {"d": layer.d, "codes": layer.codes(), "kept": layer.kept()}
    return Dictionary.from_codes(**{name: changes.get(name, lambda t: t)(t) for name, t in given.items()}, in_features=16)


@pytest.mark.parametrize("form", FORMS)
def test_promises_about_the_mask_are_checked(form):
    """dense_atoms and pattern: what breaks them is refused, though it has the right number of atoms."""
    d = torch.randn(1, 1, 10, 16)
    good = torch.tensor([1, 1, 0, 1, 1, 0, 1, 0, 0, 1]).bool().expand(20, -1)
    promises = dict(in_features=16, dense_atoms=2, pattern=(2, 4), format=form)
    assert Dictionary.from_codes(d, torch.randn(20, 10), good, **promises).pattern == (2, 4)
    cases = [([0, 1, 1, 1, 1, 0, 1, 0, 0, 1], "row 3 does not keep atom 0 of block 0, one of the first 2 that every row"),
             ([1, 1, 1, 1, 1, 0, 1, 0, 0, 0], "row 3 keeps 3 of atoms 2..5 of block 0, must keep 2 of every 4")]
    for row, text in cases:
        bad = good.clone()
        bad[3] = torch.tensor(row).bool()
        with pytest.raises(IndexRangeError, match=text):
            Dictionary.from_codes(d, torch.randn(20, 10), bad, **promises)
        assert Dictionary.from_codes(d, torch.randn(20, 10), bad, in_features=16).nonzeros == 6  # nothing promised


def test_a_shard_is_refused():
    class Shard(torch.Tensor):
        full_tensor = None

    with pytest.raises(UnsupportedError, match="perhaps a shard"):
        Dictionary.from_dense(torch.ones(4, 4).as_subclass(Shard), atoms=1, nonzeros=1)
