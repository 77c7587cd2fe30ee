"""wavelet against its definition in matrices and against fp64 by the gates; what its variants are and are not."""
import itertools
from functools import cache

import pytest
import torch
from torch.nn.functional import linear

import gates
from lowfat.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from lowfat.ops import dwt, idwt, wavelet
from lowfat.ops.dwt import FILTERS
from lowfat.ops.wavelet import SUBBANDS, layout, reference, reference_backward, reference_training
from lowfat.ops.wavelet import halves as rounded_halves

OPS = torch.ops.lowfat
NAMES = ("haar", "db2", "db4", "sym4")
FILTERS["lazy"] = (1.0, 0.0)  # even and odd features as they are: exact on whole numbers, as no other is
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
# m, k, n, rank, levels: square, ragged, one row, deep, one feature
SHAPES = {"square": (64, 256, 256, 16, 1), "ragged": (65, 301, 130, 7, 2), "decode": (1, 768, 384, 8, 1),
          "deep": (33, 40, 96, 4, 5), "one": (5, 1, 1, 1, 1)}
ORDER = {"all": ("LL", "LH", "HL", "HH"), "diag": ("LL", "HH"), "LL": ("LL",), "shared+gain": ("LL", "LH", "HL", "HH")}
SMALL = [(5, 8, 12, 2, 2), (4, 7, 5, 3, 2), (3, 9, 6, 2, 1)]


def sizes(subbands, levels, k, n):
    """(pairs, columns, rows), counted by hand."""
    def halves(size):
        return [-(-size // 2**level) for level in range(1, levels + 1)]

    if subbands == "LL":
        return 1, halves(k)[-1], halves(n)[-1]
    if subbands == "diag":
        return levels + 1, sum(halves(k)) + halves(k)[-1], sum(halves(n)) + halves(n)[-1]
    if subbands == "all":
        return 3 * levels + 1, 3 * sum(halves(k)) + halves(k)[-1], 3 * sum(halves(n)) + halves(n)[-1]
    return 3 * levels + 1, sum(halves(k)), sum(halves(n))


def made(draw, m, k, n, r, levels, subbands, dtype, device="cpu"):
    """x, v, gain, u of numbers that draw gives for a shape."""
    pairs, columns, rows = sizes(subbands, levels, k, n)
    gain = draw(pairs, r) if subbands in ("shared+gain", "diag") else None
    found = draw(m, k), draw(r, columns), gain, draw(rows, r)
    return tuple(None if t is None else t.to(device, dtype) for t in found)


def normal(*arguments, **options):
    return made(lambda *shape: torch.randn(*shape) / max(1, shape[-1]) ** 0.5, *arguments, **options)


def whole(*arguments, **options):
    """Sparse enough that every middle and result is exact."""
    return made(lambda *shape: torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.3), *arguments, **options)


# --- by definition ---

@cache
def matrix(filter, size):
    """One level, [2 ceil(size / 2), size], number by number."""
    taps, even = FILTERS[filter], size + size % 2
    found = torch.zeros(2, even // 2, even, dtype=torch.float64)
    for i, t in itertools.product(range(even // 2), range(len(taps))):
        found[0, i, (2 * i + t) % even] += taps[t]
        found[1, i, (2 * i + t) % even] += (-1) ** t * taps[-1 - t]
    return found.flatten(0, 1)[:, :size]


def update(v, gain, u, filter, levels, subbands, k, n):
    """The weight that the adapter adds, as the paper's equation says, its coarse block by the same again."""
    widths = [-(-k // 2**level) for level in range(1, levels + 1)]
    heights = [-(-n // 2**level) for level in range(1, levels + 1)]
    numbers, blocks, place = iter(range(100)), {}, [0, 0]
    for level in reversed(range(levels)):
        shared = None
        for name in ORDER[subbands]:
            if name == "LL" and level < levels - 1:
                continue
            if shared is None or subbands != "shared+gain":
                shared = (v[:, place[0]:place[0] + widths[level]], u[place[1]:place[1] + heights[level]])
                place = [place[0] + widths[level], place[1] + heights[level]]
            i = next(numbers)
            weight = shared[0] if gain is None else gain[i][:, None] * shared[0]
            blocks[level, name] = shared[1] @ weight
    inner = None
    for level in reversed(range(levels)):
        def block(name):
            found = inner if name == "LL" and level < levels - 1 else blocks.get((level, name))
            return torch.zeros(heights[level], widths[level], dtype=torch.float64) if found is None else found

        c = torch.cat([torch.cat([block("LL"), block("LH")], 1), torch.cat([block("HL"), block("HH")], 1)])
        inner = matrix(filter, ([n] + heights)[level]).T @ c @ matrix(filter, ([k] + widths)[level])
    return inner


@cache
def halves(filter, size, levels):
    found, before = [], torch.eye(size, dtype=torch.float64)
    for _ in range(levels):
        both = matrix(filter, len(before)) @ before
        found.append(both.split(len(both) // 2))
        before = found[-1][0]
    return found


def known(x, v, gain, u, filter, levels, subbands, n, scale):
    """What the gates need to know: the halves of x, the middle, and the halves of y are each rounded once."""
    x, v, u = x.double().cpu(), v.double().cpu(), u.double().cpu()
    pairs = layout(subbands, levels, x.shape[-1], n)
    into, out = halves(filter, x.shape[-1], levels), halves(filter, n, levels)
    targets = list(dict.fromkeys(pair.target for pair in pairs))
    r, heights = v.shape[0], [len(out[level][half]) for level, half in targets]
    last = torch.zeros(len(pairs) * r, sum(heights), dtype=torch.float64)
    for i, pair in enumerate(pairs):
        start = sum(heights[:targets.index(pair.target)])
        last[i * r:(i + 1) * r, start:start + pair.rows.stop - pair.rows.start] = u[pair.rows].T
    gains = [] if gain is None else [torch.diag(gain.double().cpu().flatten())]
    return gates.chain(x, torch.cat([into[pair.source[0]][pair.source[1]].T for pair in pairs], 1),
                       torch.block_diag(*(v[:, pair.columns].T for pair in pairs)), *gains, last,
                       scale * torch.cat([out[level][half] for level, half in targets]))


@pytest.mark.parametrize("subbands", SUBBANDS)
@pytest.mark.parametrize("filter", NAMES)
@pytest.mark.parametrize("shape", SMALL)
def test_is_its_definition(shape, filter, subbands):
    """For whole blocks of matrices and no transform of ours. Kills pairs in another order, or the wrong way round."""
    m, k, n, r, levels = shape
    x, v, gain, u = normal(*shape, subbands, torch.float64)
    for given in {gain, None} if subbands != "shared+gain" else {gain}:
        expected = linear(x, 0.75 * update(v, given, u, filter, levels, subbands, k, n))
        found = wavelet(x, v, u, given, out_features=n, filter=filter, levels=levels, subbands=subbands, scale=0.75)
        assert (found - expected).abs().max() < 1e-13 * max(1, expected.abs().max())


@pytest.mark.parametrize("subbands", SUBBANDS)
@pytest.mark.parametrize("levels", (1, 2, 3))
def test_layout_has_the_sizes_of_the_variants(levels, subbands):
    for k, n in ((8, 8), (13, 21), (5, 40)):
        pairs = layout(subbands, levels, k, n)
        assert (len(pairs), pairs[-1].columns.stop, pairs[-1].rows.stop) == sizes(subbands, levels, k, n)
    total = sum(sizes(subbands, levels, 16, 8)[1:])
    one = {"all": 2, "diag": 1, "LL": 1 / 2, "shared+gain": 1 / 2}[subbands]  # of r (m + n), at one level
    deep = {"all": 3 - 2 / 2**levels, "diag": 1, "LL": 1 / 2**levels, "shared+gain": 1 - 1 / 2**levels}[subbands]
    assert total == deep * 24 and (levels > 1 or deep == one)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("subbands", SUBBANDS)
@pytest.mark.parametrize("filter", ("haar", "db4"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_within_the_gates(shape, filter, subbands, dtype, device):
    options = filter, shape[4], subbands, shape[2], 0.3
    args = normal(*shape, subbands, dtype, device)
    y = gates.check_call(lambda *a: OPS.wavelet(*a, *options), args)
    kept, h = gates.check_call(lambda *a: OPS.wavelet_training(*a, *options), args)
    assert gates.failed_gates(y.cpu(), reference(*args, *options).cpu(), known(*args, *options)) == []
    assert torch.equal(kept, y) and h.shape == (len(layout(subbands, shape[4], shape[1], shape[2])), shape[0], shape[3])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("subbands", SUBBANDS)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *SMALL])
def test_whole_numbers_are_exact(shape, subbands, dtype, device):
    """With even and odd features for halves: every index of both transforms, and of the factors between them."""
    m, k, n, r, levels = shape
    args = whole(*shape, subbands, dtype, device)
    _, v, gain, u = (None if t is None else t.double().cpu() for t in args)
    exact = 2 * args[0].double().cpu() @ update(v, gain, u, "lazy", levels, subbands, k, n).T
    found = OPS.wavelet(*args, "lazy", levels, subbands, n, 2.0).cpu()
    assert gates.exact_gate(found, exact) or exact.abs().max() > 1 / gates.ROUNDOFF[dtype]


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_halves_are_rounded_once_however_deep(dtype):
    x = torch.randn(8, 96).to(dtype)
    for found, exact in zip(rounded_halves(x, "db4", 5, 0.3), halves("db4", 96, 5)):
        for mine, half in zip(found, exact):
            due, size = 0.3 * x.double() @ half.T, 0.3 * x.double().abs() @ half.T.abs()
            sums = 5 * 8 * gates.ROUNDOFF[torch.float32] * size.max()  # eight taps a level, added in fp32
            assert ((mine.double() - due).abs() <= gates.ROUNDOFF[dtype] * due.abs() + sums).all()


# --- gradients ---

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("subbands", SUBBANDS)
@pytest.mark.parametrize("shape", ("square", "ragged", "deep"))  # the others have so few numbers that luck decides
def test_gradients_are_as_good_as_those_of_the_composition(shape, subbands, dtype, device):
    """G1 and G2, against torch's own gradient of the reference in the same dtype."""
    m, k, n, r, levels = shape = SHAPES[shape]
    options = "db2", levels, subbands, n, 0.3
    args = normal(*shape, subbands, dtype, device)
    dy = (torch.randn(n, m) * torch.linspace(0.02, 0.4, m)).to(device, dtype).T  # not contiguous

    def gradients(function, inputs):
        inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
        y = function(*inputs, *options)
        return torch.autograd.grad(y, [t for t in inputs if t is not None], dy.to(y.dtype))

    ours, plain = gradients(OPS.wavelet, args), gradients(reference, args)
    wide = gradients(reference, [None if t is None else t.double() for t in args])
    for name, mine, theirs, exact in zip(("dx", "dv", "dgain", "du"), ours, plain, wide):
        assert mine.dtype == dtype and mine.shape == exact.shape
        if dtype == torch.float64:
            assert (mine - exact).abs().max() <= 1e-12 * exact.abs().max(), name
        else:
            assert gates.norm_gate(mine, theirs, exact) and gates.max_gate(mine, theirs, exact), name


@pytest.mark.parametrize("needs", range(16))
@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("subbands", SUBBANDS)
def test_backward_gives_what_is_needed_and_nothing_else(subbands, keep, needs):
    options = "lazy", 2, subbands, 11, 2.0
    args = whole(6, 13, 11, 3, 2, subbands, torch.float64)
    given = [t for t in args if t is not None]
    for t in given:
        t.requires_grad_()
    dy = torch.randint(-3, 4, (6, 11)).double()
    expected = iter(torch.autograd.grad(reference(*args, *options), given, dy))
    expected = [None if t is None else next(expected) for t in args]
    plain = [None if t is None else t.detach() for t in args]
    h = reference_training(*plain, *options)[1] if keep else None
    found = gates.check_call(lambda *a: OPS.wavelet_backward(*a, needs, *options), (dy, plain[0], h, *plain[1:]))
    assert all(mine.is_contiguous() for mine in found)  # on every device: torch.compile relies on it
    for i, (mine, theirs) in enumerate(zip(found, expected)):
        wanted = needs >> i & 1 and theirs is not None
        assert torch.equal(mine, theirs) if wanted else mine.shape == (0,)


def test_backward_reads_the_middle_it_is_given():
    x, v, gain, u = whole(6, 12, 8, 2, 1, "diag", torch.float64)
    dy = torch.randint(-3, 4, (6, 8)).double()
    options = "lazy", 1, "diag", 8, 1.0
    h = reference_training(x, v, gain, u, *options)[1]
    once, twice = (reference_backward(dy, x, factor * h, v, gain, u, 15, *options) for factor in (1, 2))
    assert torch.equal(2 * once[2], twice[2]) and torch.equal(2 * once[3], twice[3])
    assert torch.equal(once[0], twice[0]) and torch.equal(once[1], twice[1])


def test_gain_alone_is_trained():
    """As tiny does."""
    x, v, gain, u = normal(6, 12, 8, 2, 1, "diag", torch.float64)
    found = torch.autograd.grad(wavelet(x, v, u, gain.requires_grad_(), out_features=8, scale=2.0).sum(), gain)
    expected = torch.autograd.grad(reference(x, v, gain, u, "haar", 1, "diag", 8, 2.0).sum(), gain)
    assert (found[0] - expected[0]).abs().max() < 1e-13


def test_asks_backward_only_for_what_is_wanted():
    x, v, gain, u = normal(6, 12, 8, 2, 1, "diag", torch.float64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        wavelet(x, v.requires_grad_(), u, gain, out_features=8)
        assert torch.Size((2, 6, 2)) not in saved  # the middle, which only u's gradient reads
        wavelet(x, v, u.requires_grad_(), gain, out_features=8)
        assert torch.Size((2, 6, 2)) in saved


@pytest.mark.parametrize("subbands", SUBBANDS)
@pytest.mark.parametrize("filter", NAMES)
def test_what_torch_asks_of_an_op(filter, subbands):
    shape = 4, 7, 10, 2, 2
    x, v, gain, u = normal(*shape, subbands, torch.float64)
    args = [t.requires_grad_() for t in (x, v, u, gain) if t is not None]

    def call(*a):
        return wavelet(*a, out_features=10, filter=filter, levels=2, subbands=subbands, scale=0.5)

    options = filter, 2, subbands, 10, 0.5
    assert torch.autograd.gradcheck(call, args)
    if filter == "haar":
        torch.library.opcheck(OPS.wavelet.default, (x, v, gain, u, *options))
        plain = [None if t is None else t.detach() for t in (x, v, gain, u)]
        dy = torch.ones(4, 10).double()
        torch.library.opcheck(OPS.wavelet_backward.default, (dy, plain[0], None, *plain[1:], 15, *options))
        torch.compiler.reset()
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*args), call(*args))
    plain = [t.detach() for t in args]
    per_row = torch.func.vmap(lambda row: call(row, *plain[1:]))(plain[0])
    assert (per_row - call(*plain)).abs().max() < 1e-13
    assert call(torch.empty(2, 0, 7).double(), *plain[1:]).shape == (2, 0, 10)
    assert call(*(t.to("meta") for t in plain)).shape == (4, 10)


def test_leading_dimensions_and_layouts_give_the_same_bits():
    x, v, gain, u = normal(12, 20, 24, 3, 2, "all", torch.float32)
    options = "db2", 2, "all", 24, 1.0
    expected = OPS.wavelet(x, v, gain, u, *options)
    assert torch.equal(OPS.wavelet(x.view(2, 6, 20), v, gain, u, *options), expected.view(2, 6, 24))
    strided = [t.mT.contiguous().mT for t in (x, v, u)]
    assert torch.equal(OPS.wavelet(strided[0], strided[1], gain, strided[2], *options), expected)


# --- what the variants are ---

@pytest.mark.parametrize("k, n", ((12, 8), (7, 9)))
def test_shared_factors_and_haar_are_one_matrix_for_even_and_for_odd_features(k, n):
    """The trap: gains of one leave nothing of the wavelet. Not so for a longer filter, or for other gains."""
    x, v, _, u = normal(5, k, n, 2, 1, "shared+gain", torch.float64)
    same = torch.tensor([[1.0], [0], [0], [1]], dtype=torch.float64).expand(4, 2)  # LL, LH, HL, HH
    wide = torch.nn.functional.pad(x, (0, k % 2))
    expected = torch.stack([linear(linear(wide[:, i::2], v), u) for i in (0, 1)], dim=2).flatten(1)[:, :n]

    def found(filter, gain):
        return wavelet(x, v, u, gain, out_features=n, filter=filter, subbands="shared+gain")

    assert (found("haar", same) - expected).abs().max() < 1e-13
    for filter in NAMES[1:]:
        assert (found(filter, same) - expected).norm() > 0.1 * expected.norm()
    other = same * torch.tensor([[1.0], [1], [1], [-1]], dtype=torch.float64)
    assert (found("haar", other) - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("filter", NAMES)
@pytest.mark.parametrize("tokens", (8, 13))
def test_a_transform_of_the_tokens_with_a_shared_adapter_is_lora(filter, tokens):
    """The other trap, which is why the transform is of the features: over tokens it cancels."""
    x, v, u = (torch.randn(*shape, dtype=torch.float64) for shape in ((tokens, 10), (2, 10), (6, 2)))
    adapted = linear(linear(dwt(x.T, filter, 2).T, v), u)
    assert (idwt(adapted.T, tokens, filter, 2).T - linear(linear(x, v), u)).abs().max() < 1e-13


@pytest.mark.parametrize("subbands, ranks", [("all", 4), ("diag", 2), ("LL", 1), ("shared+gain", 2)])
@pytest.mark.parametrize("filter", NAMES)
def test_the_rank_is_as_stated(filter, subbands, ranks):
    """And so no variant but LL is a LoRA of rank r."""
    for k, n in ((16, 24), (17, 23)):
        _, v, gain, u = normal(1, k, n, 2, 1, subbands, torch.float64)
        delta = wavelet(torch.eye(k).double(), v, u, gain, out_features=n, filter=filter, subbands=subbands)
        assert torch.linalg.matrix_rank(delta) == 2 * ranks
    _, v, _, u = normal(1, 64, 64, 2, 3, "diag", torch.float64)
    delta = wavelet(torch.eye(64).double(), v, u, out_features=64, filter=filter, levels=3)
    assert torch.linalg.matrix_rank(delta) == 8  # another r for every level


@pytest.mark.parametrize("levels", (1, 2))
@pytest.mark.parametrize("k, n", ((8, 12), (7, 5)))
@pytest.mark.parametrize("filter", NAMES)
def test_all_subbands_at_full_rank_fit_any_update(filter, k, n, levels):
    delta = torch.randn(n, k, dtype=torch.float64)
    r = max(-(-k // 2), -(-n // 2))
    into, out = halves(filter, k, levels), halves(filter, n, levels)
    pairs = layout("all", levels, k, n)
    v, u = torch.zeros(r, pairs[-1].columns.stop).double(), torch.zeros(pairs[-1].rows.stop, r).double()
    for pair in pairs:
        block = out[pair.target[0]][pair.target[1]] @ delta @ into[pair.source[0]][pair.source[1]].T
        v[:block.shape[1], pair.columns] = torch.eye(block.shape[1]).double()
        u[pair.rows, :block.shape[1]] = block
    found = wavelet(torch.eye(k).double(), v, u, out_features=n, filter=filter, levels=levels, subbands="all").T
    assert (found - delta).abs().max() < 1e-12


# --- errors ---

@pytest.mark.parametrize("wrong, error, text", [
    (dict(filter="db3"), ArgumentError, "filter is 'db3', must be one of haar, db2, db4, sym4"),
    (dict(subbands="HH"), ArgumentError, r"subbands is 'HH', must be one of all, diag, LL, shared\+gain"),
    (dict(levels=4), ShapeError, "levels is 4, must be one of 1, 2, 3 for 10 and 6 features"),
    (dict(levels=0), ShapeError, "levels is 0"),
    (dict(levels=1.5), ArgumentError, "levels must be a whole number, found 1.5"),
    (dict(out_features="6"), ArgumentError, "out_features must be a whole number, found '6'"),
    (dict(scale="1"), ArgumentError, "scale must be a number, found '1'"), (dict(out_features=-1), ShapeError, "n is -1"),
    (dict(x=torch.ones(2, 12)), ShapeError, r"v \[3, 10\] must be \[r, 12\] for diag of 12 features and 1 levels"),
    (dict(x=torch.tensor(1.0)), ShapeError, "x has no dimensions"),
    (dict(v=torch.ones(3)), ShapeError, r"v \[3\] must be \[r, 10\]"),
    (dict(u=torch.ones(6, 4)), ShapeError, r"u \[6, 4\] must be \[6, 3\]"),
    (dict(u=torch.ones(5, 3)), ShapeError, r"u \[5, 3\]"),
    (dict(gain=torch.ones(3)), ShapeError, r"gain \[3\] must be \[2, 3\], a row for each pair of diag"),
    (dict(gain=torch.ones(1, 3)), ShapeError, r"gain \[1, 3\] must be \[2, 3\]"),
    (dict(subbands="shared+gain", v=torch.ones(3, 5), u=torch.ones(3, 3)), ShapeError, r"gain is missing, must be \[4, 3\]"),
    (dict(u=torch.ones(6, 3).double()), DtypeError, "u has torch.float64, x has torch.float32"),
    (dict(gain=torch.ones(2, 3).half()), DtypeError, "gain has torch.float16"),
    (dict(v=torch.ones(3, 10, device="meta")), DeviceError, "v is on meta, x is on cpu"),
    (dict(x=torch.ones(2, 10).to_sparse()), UnsupportedError, "x is torch.sparse_coo"),
    (dict(x=[1.0]), DtypeError, "x must be a tensor, found list"),
])
@pytest.mark.parametrize("recorded", [False, True])
def test_wrong_arguments_are_named(wrong, error, text, recorded):
    given = dict(x=torch.ones(2, 10), v=torch.ones(3, 10), u=torch.ones(6, 3), gain=None, out_features=6) | wrong
    x, v, u, gain = (given.pop(name) for name in ("x", "v", "u", "gain"))
    with pytest.raises(error, match=text):
        wavelet(x, v.requires_grad_(recorded), u, gain, **given)


@pytest.mark.parametrize("wrong", [dict(dy=torch.ones(2, 5)), dict(h=torch.ones(1, 2, 3)), dict(h=torch.ones(2, 3, 3))])
def test_backward_refuses_wrong_sizes(wrong):
    given = dict(dy=torch.ones(2, 6), h=torch.ones(2, 2, 3)) | wrong
    with pytest.raises((ShapeError, RuntimeError), match=f"{next(iter(wrong))}.* must be"):  # of the reference, of a kernel
        OPS.wavelet_backward(given["dy"], torch.ones(2, 10), given["h"], torch.ones(3, 10), None, torch.ones(6, 3), 15,
                             "haar", 1, "diag", 6, 1.0)
