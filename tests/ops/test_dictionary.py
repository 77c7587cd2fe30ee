"""dictionary against fp64 by the gates, forward and backward, in both forms of its support; supports of every bad kind; and
through what torch does with an op."""
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing

import gates
from lowfat.errors import DeviceError, DtypeError, IndexRangeError, ShapeError, UnsupportedError
from lowfat.ops import dictionary, low_rank
from lowfat.ops.bitmap import pack, unpack
from lowfat.ops.dictionary import check_support, coefficients, kept_atoms, reference, reference_backward

OPS = torch.ops.lowfat
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
# m, k, n, P, Q, a, s: square, ragged, one row, one block, blocks that leave an output block empty, one non-zero, all of them
SHAPES = {"square": (64, 256, 256, 2, 2, 48, 24), "ragged": (65, 301, 130, 3, 4, 40, 7),
          "decode": (1, 768, 768, 1, 1, 200, 100), "empty block": (33, 97, 25, 6, 5, 33, 16),
          "vectors": (20, 70, 90, 1, 2, 31, 1), "full": (20, 70, 90, 2, 1, 32, 32)}
FORMS = ["bitmap", "positions"]


def some_atoms(n, q, a, s):
    """bool [n, Q, a]"""
    return torch.rand(n, q, a).argsort(-1).argsort(-1) < s


def stored(kept, form):
    if form == "bitmap":
        return pack(kept).flatten(1)
    return kept.nonzero()[:, 2].view(len(kept), -1).short()


def normal(m, k, n, p_out, q, a, s, dtype, form="bitmap", device="cpu"):
    """x, d, values, support, bias"""
    p = -(-k // q)
    x, d, values, bias = (torch.randn(m, k), torch.randn(p_out, q, a, p) / p**0.5, torch.randn(n, q * s) / (q * s)**0.5,
                          torch.randn(n))
    x, d, values, bias = (t.to(device, dtype) for t in (x, d, values, bias))
    return x, d, values, stored(some_atoms(n, q, a, s), form).to(device), bias


def whole(m, k, n, p_out, q, a, s, dtype, form="bitmap", device="cpu"):
    """Sparse enough that every middle and result is exact."""
    args = normal(m, k, n, p_out, q, a, s, dtype, form)
    x, d, values = (torch.randint(-1, 2, t.shape) * (torch.rand(t.shape) < density)
                    for t, density in zip(args, (1, 0.2, 0.3)))
    made = (x, d, values, args[3], torch.randint(-9, 10, args[4].shape))
    return tuple(t.to(device) if i == 3 else t.to(device, dtype) for i, t in enumerate(made))


def factors(d, values, support):
    """S [n, Q a] and, of each output block, D [Q a, Q p], both dense and by their definition."""
    p_out, q, a, p = d.shape
    s = values.shape[1] // q
    rows = []
    for row, where in zip(values, support):
        full = []
        for block in range(q):
            if support.dtype == torch.int16:
                places = where[block * s:(block + 1) * s].long()
            else:
                places = unpack(where.view(q, -1)[block], a).nonzero().flatten()
            full.append(values.new_zeros(a).index_copy(0, places, row[block * s:(block + 1) * s]))
        rows.append(torch.cat(full))
    return torch.stack(rows), [torch.block_diag(*blocks) for blocks in d]


def dense(d, values, support, k):
    """[n, k]"""
    s, blocks = factors(d, values, support)
    size = -(-len(s) // len(d))
    return torch.cat([rows @ block for rows, block in zip(s.split(size), blocks)])[:, :k]


def framework(x, d, values, support, bias=None):
    """Torch's own products of the dense factors, the middle rounded in between."""
    s, blocks = factors(d, values, support)
    padded = torch.nn.functional.pad(x, (0, d.shape[1] * d.shape[3] - x.shape[1]))
    y = torch.cat([padded @ block.T @ rows.T for rows, block in zip(s.split(-(-len(s) // len(d))), blocks)], dim=1)
    return y if bias is None else y + bias


def known(x, d, values, support, bias=None):
    s, blocks = factors(d.double(), values.double(), support)
    padded = torch.nn.functional.pad(x, (0, d.shape[1] * d.shape[3] - x.shape[1])).double()
    chains = [gates.chain(padded, block.T, rows.T) for rows, block in zip(s.split(-(-len(s) // len(d))), blocks)]
    y64, mid, magnitude = (torch.cat(parts, dim=1) for parts in zip(*((c.y64, c.mids[0], c.magnitude) for c in chains)))
    if bias is not None:
        y64, magnitude = y64 + bias.double(), magnitude + bias.double().abs()
    return gates.Chain(y64, [mid], magnitude, chains[0].length, chains[0].roundings)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_within_the_gates(shape, form, dtype, device):
    m, _, _, p_out, q, a, _ = shape
    args = normal(*shape, dtype, form, device)
    for given in (args, (*args[:4], None)):
        y = gates.check_call(OPS.dictionary, given)
        kept, h = gates.check_call(OPS.dictionary_training, given)
        assert gates.failed_gates(y, framework(*given), known(*given)) == []
        assert torch.equal(kept, y) and h.shape == (p_out, m, q * a)
        assert torch.equal(dictionary(*given), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_whole_numbers_are_exact(shape, form, dtype, device):
    """G4: every value, atom and block in its place."""
    args = whole(*shape, dtype, form, device)
    x, d, values, support, bias = args
    exact = x.double() @ dense(d.double(), values.double(), support, shape[1]).T
    assert gates.exact_gate(OPS.dictionary(*args), exact + bias.double())
    assert gates.exact_gate(OPS.dictionary(*args[:4], None), exact)
    h = OPS.dictionary_training(*args)[1]
    padded = torch.nn.functional.pad(x, (0, d.shape[1] * d.shape[3] - shape[1])).double()
    assert gates.exact_gate(h, torch.stack([padded @ torch.block_diag(*blocks).T for blocks in d.double()]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_forms_give_the_same_bits(shape, dtype):
    x, d, values, mask, bias = normal(*shape, dtype)
    positions = stored(kept_atoms(mask, shape[4], shape[5]), "positions")
    y = reference(x, d, values, mask, bias)
    assert torch.equal(reference(x, d, values, positions, bias), y)
    dy = torch.randn_like(y)
    pairs = zip(*(reference_backward(dy, x, None, d, values, support, 31) for support in (mask, positions)))
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_within_the_gates(shape, form, dtype, device):
    m, k, n, p_out, q, a, s = shape
    x, d, values, support, bias = normal(*shape, dtype, form, device)
    leaves = [t.requires_grad_() for t in (x, d, values, bias)]
    dy = (torch.randn(n, m) * torch.linspace(0.02, 0.4, m)).to(device, dtype).T  # not contiguous
    found = torch.autograd.grad(dictionary(x, d, values, support, bias), leaves, dy)
    x, d, values = (t.detach() for t in (x, d, values))
    plain, chains = reference_backward(dy, x, None, d, values, support, 31), known_gradients(dy, x, d, values, support)
    for name, mine, theirs, chain in zip(("dx", "dd", "dvalues", "db"), found, plain, chains):
        assert gates.failed_gates(mine.reshape(chain.y64.shape), theirs.reshape(chain.y64.shape), chain) == [], name


def known_gradients(dy, x, d, values, support):
    """dh = dy S is a rounded middle of dx and dd, h one of dvalues."""
    (p_out, q, a, p), (n, stored), k = d.shape, values.shape, x.shape[1]
    size = -(-n // p_out)
    s, blocks = factors(d.double(), values.double(), support)
    kept = kept_atoms(support, q, a).flatten(1)
    padded = torch.nn.functional.pad(x, (0, q * p - k)).double()
    dxs, dds, dvs = [], [], []
    for i, (rows, block) in enumerate(zip(s.split(size), blocks)):
        mine = dy[:, i * size:(i + 1) * size]
        dxs.append(gates.chain(mine, rows, block))
        dd = gates.chain(padded.T, mine, rows)  # of the gradient transposed; its rounded middle is dy S, not x^T dy
        dh = mine.double() @ rows
        full = gates.Chain(dd.y64.T, [(dh.square().T @ padded.square()).sqrt()], dd.magnitude.T, dd.length, dh.numel())
        dds.append([[part.view(q, a, q, p)[j, :, j] for part in (full.y64, full.mids[0], full.magnitude)] for j in range(q)])
        h = padded @ block.T
        dv = gates.chain(mine.T, h)
        mid = (mine.double().T.square() @ h.square()).sqrt()
        scale = mine.double().T.abs() @ (padded.abs() @ block.T.abs())
        dvs.append((dv.y64, mid, scale))
    for i in range(len(dds), p_out):  # of outputs that there are not
        dds.append([[torch.zeros(a, p, dtype=torch.float64, device=x.device)] * 3 for _ in range(q)])
    dx = gates.Chain(sum(c.y64 for c in dxs)[:, :k], [sum(c.mids[0].square() for c in dxs).sqrt()[:, :k]],
                     sum(c.magnitude for c in dxs)[:, :k], size + p_out * a, len(x) * a)
    dd = (torch.stack([torch.stack([block[part] for block in row]) for row in dds]) for part in range(3))
    y64, mid, magnitude = dd
    dv = [torch.cat(parts)[kept].view(n, stored) for parts in zip(*dvs)]
    ones = torch.ones(1, len(dy), dtype=dy.dtype, device=dy.device)
    return (dx, gates.Chain(y64, [mid], magnitude, len(x) + size, len(x) * a),
            gates.Chain(dv[0], [dv[1]], dv[2], len(x) + p, len(x) * a), gates.chain(ones, dy))


@pytest.mark.parametrize("needs", [i for i in range(32) if not i & 8])
@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_backward_gives_what_is_needed_and_nothing_else(keep, needs):
    x, d, values, support, bias = whole(6, 13, 11, 3, 2, 5, 2, torch.float64)
    leaves = [t.requires_grad_() for t in (x, d, values, bias)]
    dy = torch.randint(-3, 4, (6, 11)).double()
    expected = torch.autograd.grad(torch.nn.functional.linear(x, dense(d, values, support, 13), bias), leaves, dy)
    plain = [t.detach() for t in leaves]
    h = OPS.dictionary_training(*plain[:3], support, plain[3])[1] if keep else None
    found = gates.check_call(lambda *a: OPS.dictionary_backward(*a, needs), (dy, plain[0], h, *plain[1:3], support))
    assert all(mine.is_contiguous() for mine in found)  # on every device: torch.compile relies on it
    for bit, mine, theirs in zip((1, 2, 4, 16), found, expected):
        assert torch.equal(mine, theirs) if needs & bit else mine.shape == (0,)


def test_backward_reads_the_middle_it_is_given():
    x, d, values, support, _ = whole(6, 13, 11, 3, 2, 5, 2, torch.float64)
    dy, h = torch.randint(-3, 4, (6, 11)).double(), OPS.dictionary_training(x, d, values, support, None)[1]
    once, twice = (OPS.dictionary_backward(dy, x, middle, d, values, support, 4)[2] for middle in (h, 2 * h))
    assert torch.equal(2 * once, twice) and once.any()


def test_asks_backward_only_for_what_is_wanted():
    """And saves no middle when the values are frozen: only their gradient reads it."""
    class Asked(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is OPS.dictionary_backward.default:
                asked.append((args[6], args[2] is not None))
            return func(*args, **(kwargs or {}))

    asked, due = [], [needs for needs in range(1, 32) if not needs & 8]
    for needs in due:
        x, d, values, support, bias = normal(6, 13, 11, 3, 2, 5, 2, torch.float32)
        for bit, t in zip((1, 2, 4, 16), (x, d, values, bias)):
            t.requires_grad_(bool(needs & bit))
        y = dictionary(x, d, values, support, bias)
        with Asked():
            y.sum().backward()
    assert asked == [(needs, bool(needs & 4)) for needs in due]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5, 12, 20, 1, 1, 6, 3), (3, 13, 7, 2, 4, 3, 1)])
def test_what_torch_asks_of_an_op(shape, form):
    x, d, values, support, bias = normal(*shape, torch.float64, form)
    leaves = [t.requires_grad_() for t in (x, d, values, bias)]

    def call(x, d, values, bias):
        return dictionary(x, d, values, support, bias)

    assert torch.autograd.gradcheck(call, leaves, check_undefined_grad=True)
    assert torch.autograd.gradcheck(lambda x, d, v, b: OPS.dictionary(x, d, v, support, b), leaves)
    for op in (OPS.dictionary, OPS.dictionary_training):
        torch.library.opcheck(op.default, (x, d, values, support, bias))
    plain = [t.detach() for t in leaves]
    dy = torch.ones(shape[0], shape[2]).double()
    torch.library.opcheck(OPS.dictionary_backward.default, (dy, plain[0], None, *plain[1:3], support, 23))
    torch.compiler.reset()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), call(*leaves))
    per_row = torch.func.vmap(lambda row: call(row, *plain[1:]))(plain[0])
    assert gates.failed_gates(per_row, call(*plain), known(*plain[:3], support, plain[3])) == []
    assert call(torch.empty(2, 0, shape[1]).double(), *plain[1:]).shape == (2, 0, shape[2])
    assert dictionary(*(t.to("meta") for t in (x, d, values, support, bias))).shape == (shape[0], shape[2])
    y, h = OPS.dictionary_training(x, d, values, support, bias)
    assert y.requires_grad and not h.requires_grad
    with pytest.raises(UnsupportedError, match="second derivatives"):
        first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)[1]
        first.square().sum().backward()


def test_compiles_once_for_every_number_of_rows():
    torch.compiler.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dictionary, fullgraph=True, dynamic=True, backend=counted)
    _, d, values, support, bias = normal(1, 12, 20, 2, 3, 8, 3, torch.float64)
    leaves = [t.requires_grad_() for t in (d, values, bias)]
    for m in (6, 9, 11):
        x = torch.randn(m, 12, dtype=torch.float64)
        found, expected = (f(x, d, values, support, bias) for f in (compiled, dictionary))
        gradients = (torch.autograd.grad(y.sum(), leaves) for y in (found, expected))
        assert torch.equal(found, expected) and all(torch.equal(a, b) for a, b in zip(*gradients))
    assert counted.frame_count == 1


@pytest.mark.parametrize("form", FORMS)
def test_leading_dimensions_and_layouts_give_the_same_bits(form):
    x, d, values, support, bias = normal(12, 20, 24, 3, 2, 40, 5, torch.float32, form)
    expected = OPS.dictionary(x, d, values, support, bias)
    assert torch.equal(OPS.dictionary(x.view(2, 6, 20), d, values, support, bias), expected.view(2, 6, 24))
    wide = torch.full((24, 2 * support.shape[1] + 1), -7, dtype=support.dtype)
    wide[:, 1::2] = support
    apart = torch.cat([support.new_full((1,), -1), support.flatten()])[1:].view(support.shape)
    for layout in gates.LAYOUTS:
        moved = [gates.laid_out(t, layout) for t in (x, d, values, bias)]
        for same in (support, wide[:, 1::2], support.mT.contiguous().mT, apart):
            assert torch.equal(OPS.dictionary(*moved[:3], same, moved[3]), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_block_that_keeps_all_is_low_rank(dtype):
    """s = a: the dense product, to the rounding of its sums."""
    x, d, values, support, bias = normal(33, 70, 90, 1, 1, 24, 24, dtype)
    assert torch.equal(coefficients(values, support, 1, 24), values)
    chain = gates.chain(x, d[0, 0].T, values.T, bias=bias)
    assert gates.failed_gates(dictionary(x, d, values, support, bias), low_rank(x, d[0, 0], values, bias), chain) == []


def test_autocast_leaves_the_support_alone():
    args = normal(4, 8, 5, 1, 1, 6, 2, torch.float32)
    for call in (dictionary, OPS.dictionary):
        with torch.autocast("cpu", torch.bfloat16):
            assert call(*args).dtype == torch.bfloat16
            assert call(args[0].clone().requires_grad_(), *args[1:]).dtype == torch.bfloat16


# --- mistakes, and supports of every bad kind (T-index) ---

@pytest.mark.parametrize("wrong, error, text", [
    (dict(x=torch.ones(2, 18)), ShapeError, r"x \[2, 18\] must have 20 features, or up to 1 less: 2 blocks of 10"),
    (dict(x=torch.ones(2, 21)), ShapeError, "20 features"), (dict(x=torch.tensor(1.0)), ShapeError, r"x \[\] must"),
    (dict(d=torch.ones(3, 2, 40)), ShapeError, r"d \[3, 2, 40\] must be \[P, Q, a, p\]"),
    (dict(d=torch.ones(0, 2, 40, 10)), ShapeError, "with at least one block"),
    (dict(values=torch.ones(24, 9)), ShapeError, r"values \[24, 9\] must be \[n, 2 s\], s of the 40 atoms in each of 2"),
    (dict(values=torch.ones(24, 82)), ShapeError, r"values \[24, 82\]"),
    (dict(values=torch.ones(10)), ShapeError, r"\[10\]"),
    (dict(bias=torch.ones(23)), ShapeError, r"bias \[23\] must be \[24\]"),
    (dict(values=torch.ones(24, 10).double()), DtypeError, "values has torch.float64, x has torch.float32"),
    (dict(d=torch.ones(3, 2, 40, 10, device="meta")), DeviceError, "d is on meta, x is on cpu"),
    (dict(support=torch.zeros(24, 4, dtype=torch.int32, device="meta")), DeviceError, "support is on meta, x is on cpu"),
    (dict(x=torch.ones(2, 20).to_sparse()), UnsupportedError, "x is torch.sparse_coo"),
    (dict(x=[1.0]), DtypeError, "x must be a tensor, found list"), (dict(d=None), DtypeError, "d must be a tensor"),
    (dict(values=None), DtypeError, "values must be a tensor, found NoneType"),
])
@pytest.mark.parametrize("recorded", [False, True])
def test_wrong_arguments_are_named(wrong, error, text, recorded):
    given = dict(x=torch.ones(2, 20), d=torch.ones(3, 2, 40, 10).requires_grad_(recorded), values=torch.ones(24, 10),
                 support=pack(some_atoms(24, 2, 40, 5)).flatten(1), bias=torch.ones(24)) | wrong
    with pytest.raises(error, match=f"dictionary: .*{text}"):
        dictionary(**given)
    with pytest.raises((error, RuntimeError, TypeError)):
        OPS.dictionary(*given.values())


@pytest.mark.parametrize("wrong, text", [(dict(dy=torch.ones(2, 23)), r"dy \[2, 23\] must be \[2, 24\]"),
                                         (dict(h=torch.ones(3, 2, 40)), r"h \[3, 2, 40\] must be \[3, 2, 80\]")])
def test_backward_refuses_wrong_sizes(wrong, text):
    given = dict(dy=torch.ones(2, 24), x=torch.ones(2, 20), h=None, d=torch.ones(3, 2, 40, 10),
                 values=torch.ones(24, 10)) | wrong
    with pytest.raises((ShapeError, RuntimeError), match=text):
        OPS.dictionary_backward(*given.values(), pack(some_atoms(24, 2, 40, 5)).flatten(1), 23)


def test_positions_reach_no_further_than_int16():
    d, values = torch.ones(1, 1, 2**15, 1), torch.ones(2, 1)
    with pytest.raises(ShapeError, match="positions in int16 reach 32767 atoms, found 32768; use a bitmap"):
        dictionary(torch.ones(1, 1), d, values, torch.zeros(2, 1, dtype=torch.int16))
    last = torch.tensor([[0], [2**15 - 2]], dtype=torch.int16)
    y = dictionary(torch.ones(1, 1), torch.arange(2**15 - 1.0).view(1, 1, -1, 1), values, last)
    assert y.tolist() == [[0, 2**15 - 2]]


N, Q, A, S = 24, 2, 40, 5  # of the supports below


def kept_before_change():
    """The atoms 0, 8, 16, 24, 32 of every block."""
    return (torch.arange(A) % 8 == 0).expand(N, Q, A)


def word(row, place, change):
    def of(mask):
        mask = mask.clone()
        mask[row, place] = change(int(mask[row, place]))
        return mask

    return of


def at(row, place, number):
    def of(positions):
        positions = positions.clone()
        positions[row, place] = number
        return positions

    return of


BAD_BITMAPS = {  # what check_support says of a bitmap [24, 4]
    "a bit too few": (word(3, 0, lambda w: w & ~1), "keeps 4 atoms in block 0 of row 3, must keep 5"),
    "a bit too many": (word(23, 2, lambda w: w | 2), "keeps 6 atoms in block 1 of row 23"),
    "padding": (word(7, 1, lambda w: w | 1 << 8), "has bits behind its 40 atoms in block 0 of row 7, must be zero there"),
    "last padding": (word(0, 3, lambda w: w - 2**31), "has bits behind its 40 atoms in block 1 of row 0"),
    "a bit of the other block": (lambda m: word(5, 2, lambda w: w | 2)(word(5, 0, lambda w: w & ~1)(m)), "keeps 4 .* row 5"),
    "none": (lambda m: m * 0, "keeps 0 atoms in block 0 of row 0"), "all": (lambda m: m * 0 - 1, "keeps 40 atoms"),
    "2^31 - 1": (lambda m: m * 0 + 2**31 - 1, "keeps 39 atoms"), "-2^31": (lambda m: m * 0 - 2**31, "keeps 1 atoms"),
    "a number": (lambda m: m * 0 + A, "keeps 4 atoms"), "next number": (lambda m: m * 0 + A + 1, "keeps 6 atoms"),
    "shifted": (lambda m: (m << 1) | m, "keeps 10 atoms"), "inverted": (lambda m: ~m, "keeps 35 atoms"),
    "swapped words": (lambda m: m.flip(1), "keeps 2 atoms in block 0 of row 0"),
    "low half": (lambda m: m & 0xFFFF, "keeps 3 atoms"),
    "random": (lambda m: torch.randint(-2**31, 2**31 - 1, m.shape).int(), "keeps"),
}
BAD_POSITIONS = {  # of positions [24, 10]
    "negative": (at(3, 0, -1), r"has -1 in place 0 of block 0 of row 3, must be in 0\.\.39"),
    "a": (at(3, 4, A), r"has 40 in place 4 of block 0 of row 3, must be in 0\.\.39 and above the one before it, .* 24"),
    "a + 1": (at(0, 9, A + 1), "has 41 in place 4 of block 1 of row 0"),
    "largest": (at(0, 4, 2**15 - 1), "has 32767 in place 4"),
    "smallest": (at(0, 0, -2**15), "has -32768 in place 0"), "twice": (at(7, 2, 8), "has 8 in place 2 of block 0 of row 7"),
    "unsorted": (at(7, 2, 7), "has 7 in place 2 .* above the one before it, which is 8"),
    "descending": (lambda p: p.flip(1), "has 24 in place 1"), "all the same": (lambda p: p * 0 + 3, "has 3 in place 1"),
    "all out of range": (lambda p: p + A, "has 40 in place 0"), "all negative": (lambda p: p - A, "has -40 in place 0"),
    "of both blocks in one order": (lambda p: torch.arange(10).short().expand(N, -1) * 8, "has 40 in place 0 of block 1"),
    "wrapped": (at(23, 9, -2**15 + 32), "has -32736 in place 4 of block 1 of row 23"),
    "zeros": (lambda p: p * 0, "has 0 in place 1 of block 0 of row 0"),
    "of a wider block": (lambda p: p + 8, "has 40 in place 4"),
    "random": (lambda p: torch.randint(-2**15, 2**15 - 1, p.shape).short(), "has"),
}
BAD = [("bitmap", bad) for bad in BAD_BITMAPS] + [("positions", bad) for bad in BAD_POSITIONS]
BAD_KINDS = [  # what the op says of either
    (lambda t: t[:-1], ShapeError, r"support \[23, "),
    (lambda t: t[:, :-1], ShapeError, r"support \[24, [39]\] must be \[24, "),
    (lambda t: t.repeat(1, 2), ShapeError, r"support \[24, (8|20)\]"),
    (lambda t: t.T, ShapeError, r"support \[(4|10), 24\]"),
    (lambda t: t.flatten(), ShapeError, "must be"), (lambda t: t[:0], ShapeError, r"support \[0, "),
    (lambda t: t[:, :2], ShapeError, r"support \[24, 2\]"),
    (lambda t: t.long(), DtypeError, "torch.int64, must be int32 or int16"),
    (lambda t: t.long() + 2**40, DtypeError, "torch.int64, must be int32 or int16"),
    (lambda t: t.float(), DtypeError, "torch.float32, must be int32 or int16"), (lambda t: t > 0, DtypeError, "torch.bool"),
    (lambda t: t.to(torch.uint8), DtypeError, "torch.uint8"),
    (lambda t: t.tolist(), DtypeError, "must be a tensor, found list"),
    (lambda t: t.to(torch.int16 if t.dtype == torch.int32 else torch.int32), ShapeError, r"support \[24, (4|10)\] must be"),
]


@pytest.mark.parametrize("form,bad", BAD)
def test_bad_supports_are_found(form, bad):
    change, text = (BAD_BITMAPS if form == "bitmap" else BAD_POSITIONS)[bad]
    with pytest.raises(IndexRangeError, match=f"dictionary: support ({text})"):
        check_support(change(stored(kept_before_change(), form)), Q, A, S)


@pytest.mark.parametrize("form", FORMS)
def test_good_supports_pass(form):
    for n, q, a, s in ((24, 2, 40, 5), (7, 3, 64, 64), (5, 1, 1, 1)):
        check_support(stored(some_atoms(n, q, a, s), form), q, a, s)
    check_support(torch.empty(24, 4 if form == "bitmap" else 10, device="meta").to(
        torch.int32 if form == "bitmap" else torch.int16), Q, A, S)
    with pytest.raises(ShapeError, match="support"):
        check_support(torch.zeros(24, 3, dtype=torch.int32), Q, A, S)


@pytest.mark.parametrize("change, error, text", BAD_KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_support_is_refused_by_name(form, change, error, text):
    x, d, values = torch.ones(2, 20), torch.ones(3, Q, A, 10), torch.ones(N, Q * S)
    support = change(stored(kept_before_change(), form))
    for given in (d, d.clone().requires_grad_()):
        with pytest.raises(error, match=f"dictionary: support .*{text.removeprefix('support ')}"):
            dictionary(x, given, values, support)
        with pytest.raises((error, RuntimeError)):
            OPS.dictionary(x, given, values, support, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("m", [1, 5, 20])
@pytest.mark.parametrize("form,bad", BAD)
def test_bad_supports_touch_nothing_else(form, bad, m, dtype):
    """Validation bypassed: some numbers or other, every one written, and no access outside of any tensor."""
    x, d, values, _, bias = normal(m, 20, N, 3, Q, A, S, dtype)
    support = (BAD_BITMAPS if form == "bitmap" else BAD_POSITIONS)[bad][0](stored(kept_before_change(), form))
    dy = torch.randn(m, N).to(dtype)
    for end in (True, False):
        x, d, values, support, bias, dy = (gates.at_guard_page(t, end=end) for t in (x, d, values, support, bias, dy))
        assert OPS.dictionary(x, d, values, support, bias).isfinite().all()
        assert all(t.isfinite().all() for t in OPS.dictionary_backward(dy, x, None, d, values, support, 23))
    assert gates.check_call(OPS.dictionary, (x, d, values, support, bias)).shape == (m, N)
    gates.check_call(lambda *a: OPS.dictionary_backward(*a, 23), (dy, x, None, d, values, support))


@pytest.mark.parametrize("check", ["0", "1"])
def test_debug_check_validates_every_call(check):
    source = ("from torch import int16, ones, zeros\nfrom lowfat.ops import dictionary\n"
              "try:\n    dictionary(ones(1, 7), ones(1, 1, 4, 7), ones(3, 2), zeros(3, 2, dtype=int16))\n"
              "except IndexError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"LOWFAT_DEBUG_CHECK": check})
    said = "dictionary: support has 0 in place 1 of block 0 of row 0, must be in 0..3 and above the one before it, which is 0\n"
    assert (done.returncode, done.stdout) == (0, said if check == "1" else ""), done.stderr
