"""sparse24 against fp64 by the gates, forward and backward, for many N:M; masks of every bad kind; and through what torch
does with an op."""
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch.nn.functional import linear

import gates
from lowfat.errors import DeviceError, DtypeError, IndexRangeError, ShapeError, UnsupportedError
from lowfat.ops import sparse24
from lowfat.ops.bitmap import pack, unpack, words
from lowfat.ops.sparse24 import check_mask, reference, reference_backward

OPS = torch.ops.lowfat
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
# m, k, n, kept, group: square, ragged, one row, sparser, wider groups, groups across words, an odd group, all kept, no rows
SHAPES = {"square": (64, 256, 256, 2, 4), "ragged": (65, 300, 131, 2, 4), "decode": (1, 768, 768, 2, 4),
          "sparser": (33, 100, 83, 1, 4), "wide": (16, 512, 512, 4, 8), "across": (20, 66, 90, 3, 6),
          "odd": (9, 91, 40, 5, 7), "all": (20, 70, 90, 1, 1)}


def some_mask(n, k, kept, group):
    """bool [n, k]"""
    return (torch.rand(n, k // group, group).argsort(-1).argsort(-1) < kept).flatten(1)


def normal(m, k, n, kept, group, dtype, device="cpu"):
    """x, values, mask, bias"""
    stored = k // group * kept
    x, values, bias = torch.randn(m, k), torch.randn(n, stored) / max(stored, 1)**0.5, torch.randn(n)
    x, values, bias = (t.to(device, dtype) for t in (x, values, bias))
    return x, values, pack(some_mask(n, k, kept, group)).to(device), bias


def whole(m, k, n, kept, group, dtype, device="cpu"):
    """Sparse enough that every result is exact."""
    x, values, mask, bias = normal(m, k, n, kept, group, dtype)
    values = torch.randint(-1, 2, values.shape) * (torch.rand(values.shape) < 0.3)
    whole_x, whole_bias = torch.randint(-1, 2, x.shape), torch.randint(-9, 10, bias.shape)
    x, values, bias = (t.to(device, dtype) for t in (whole_x, values, whole_bias))
    return x, values, mask.to(device), bias


def dense(values, mask, k):
    """By its definition, row by row."""
    rows = [values.new_zeros(k).masked_scatter(kept, stored) for kept, stored in zip(unpack(mask, k), values)]
    return torch.stack(rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_within_the_gates(shape, dtype, device):
    pattern = shape[3:]
    x, values, mask, bias = args = normal(*shape, dtype, device)
    weight = dense(values, mask, shape[1])
    for some_bias in (bias, None):
        y = gates.check_call(lambda *a: OPS.sparse24(*a, some_bias, *pattern), args[:3])
        known = gates.chain(x, weight.T, bias=some_bias)
        assert gates.failed_gates(y, linear(x, weight, some_bias), known) == []
        assert torch.equal(sparse24(x, values, mask, some_bias, kept=pattern[0], group=pattern[1]), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_whole_numbers_are_exact(shape, dtype, device):
    """G4: every value in its place: kills a bit, word, group or row in the place of another."""
    x, values, mask, bias = whole(*shape, dtype, device)
    exact = x.double() @ dense(values.double(), mask, shape[1]).T
    assert gates.exact_gate(OPS.sparse24(x, values, mask, bias, *shape[3:]), exact + bias.double())
    assert gates.exact_gate(OPS.sparse24(x, values, mask, None, *shape[3:]), exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_within_the_gates(shape, dtype, device):
    x, values, mask, bias = normal(*shape, dtype, device)
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    weight, kept = dense(values.detach(), mask, shape[1]), unpack(mask, shape[1])
    dy = (torch.randn(shape[2], shape[0]) * torch.linspace(0.02, 0.4, shape[0])).to(device, dtype).T  # not contiguous
    found = torch.autograd.grad(sparse24(x, values, mask, bias, kept=shape[3], group=shape[4]), leaves, dy)
    x = x.detach()
    chains = (gates.chain(dy, weight), gates.chain(dy.T, x), gates.chain(torch.ones(1, shape[0]).to(dy), dy))
    plain = (dy @ weight, dy.T @ x, dy.sum(0, keepdim=True))
    for name, mine, theirs, chain in zip(("dx", "dvalues", "db"), found, plain, chains):
        if name == "dvalues":  # the kept entries of a dense gradient
            theirs = theirs[kept].view(mine.shape)
            chain = gates.Chain(chain.y64[kept].view(mine.shape), [], chain.magnitude[kept].view(mine.shape), chain.length,
                                mine.numel())
        assert gates.failed_gates(mine.reshape(chain.y64.shape), theirs, chain) == [], name


@pytest.mark.parametrize("needs", [i for i in range(16) if not i & 4])
@pytest.mark.parametrize("shape", [(6, 12, 11, 2, 4), (3, 70, 5, 3, 5)])
def test_backward_gives_what_is_needed_and_nothing_else(shape, needs):
    x, values, mask, bias = whole(*shape, torch.float64)
    leaves, pattern = [t.requires_grad_() for t in (x, values, bias)], shape[3:]
    dy = torch.randint(-3, 4, (shape[0], shape[2])).double()
    expected = torch.autograd.grad(linear(x, dense(values, mask, shape[1]), bias), leaves, dy)
    found = gates.check_call(lambda *a: OPS.sparse24_backward(*a, needs, *pattern), (dy, x.detach(), values.detach(), mask))
    assert all(mine.is_contiguous() for mine in found)  # on every device: torch.compile relies on it
    for bit, mine, theirs in zip((1, 2, 8), found, expected):
        assert torch.equal(mine, theirs) if needs & bit else mine.shape == (0,)


def test_asks_backward_only_for_what_is_wanted():
    """No wasted kernel for what is frozen; for the mask never."""
    class Asked(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is OPS.sparse24_backward.default:
                asked.append(args[4])
            return func(*args, **(kwargs or {}))

    asked, due = [], [needs for needs in range(1, 16) if not needs & 4]
    for needs in due:
        x, values, mask, bias = normal(6, 12, 11, 2, 4, torch.float32)
        for bit, t in zip((1, 2, 8), (x, values, bias)):
            t.requires_grad_(bool(needs & bit))
        y = sparse24(x, values, mask, bias)
        with Asked():
            y.sum().backward()
    assert asked == due


@pytest.mark.parametrize("shape", [(5, 12, 20, 2, 4), (3, 36, 7, 1, 3)])
def test_what_torch_asks_of_an_op(shape):
    x, values, mask, bias = normal(*shape, torch.float64)
    leaves, pattern = [t.requires_grad_() for t in (x, values, bias)], dict(kept=shape[3], group=shape[4])

    def call(x, values, bias):
        return sparse24(x, values, mask, bias, **pattern)

    assert torch.autograd.gradcheck(call, leaves, check_undefined_grad=True)
    assert torch.autograd.gradcheck(lambda x, v, b: OPS.sparse24(x, v, mask, b, *shape[3:]), leaves)
    torch.library.opcheck(OPS.sparse24.default, (x, values, mask, bias, *shape[3:]))
    plain = [t.detach() for t in leaves]
    dy = torch.ones(shape[0], shape[2]).double()
    torch.library.opcheck(OPS.sparse24_backward.default, (dy, *plain[:2], mask, 11, *shape[3:]))
    torch.compiler.reset()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), call(*leaves))
    known = gates.chain(plain[0], dense(plain[1], mask, shape[1]).T, bias=plain[2])
    per_row = torch.func.vmap(lambda row: call(row, *plain[1:]))(plain[0])
    assert gates.failed_gates(per_row, call(*plain), known) == []
    assert call(torch.empty(2, 0, shape[1]).double(), *plain[1:]).shape == (2, 0, shape[2])
    assert sparse24(*(t.to("meta") for t in (x, values, mask, bias)), **pattern).shape == (shape[0], shape[2])
    with pytest.raises(UnsupportedError, match="second derivatives"):
        first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)[1]
        first.square().sum().backward()


def test_compiles_once_for_every_number_of_rows():
    torch.compiler.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sparse24, fullgraph=True, dynamic=True, backend=counted)
    _, values, mask, bias = normal(1, 16, 20, 2, 4, torch.float64)
    leaves = [t.requires_grad_() for t in (values, bias)]
    for m in (6, 9, 11):
        x = torch.randn(m, 16, dtype=torch.float64)
        found, expected = (f(x, values, mask, bias) for f in (compiled, sparse24))
        gradients = (torch.autograd.grad(y.sum(), leaves) for y in (found, expected))
        assert torch.equal(found, expected) and all(torch.equal(a, b) for a, b in zip(*gradients))
    assert counted.frame_count == 1


def test_leading_dimensions_and_layouts_give_the_same_bits():
    x, values, mask, bias = normal(12, 40, 24, 2, 4, torch.float32)
    expected = OPS.sparse24(x, values, mask, bias, 2, 4)
    assert torch.equal(OPS.sparse24(x.view(2, 6, 40), values, mask, bias, 2, 4), expected.view(2, 6, 24))
    wide = torch.full((24, 5), -7, dtype=torch.int32)
    wide[:, 1::2] = mask
    apart = torch.cat([torch.full((1,), -1, dtype=torch.int32), mask.flatten()])[1:].view(24, 2)
    for layout in gates.LAYOUTS:
        moved = [gates.laid_out(t, layout) for t in (x, values, bias)]
        for same in (mask, wide[:, 1::2], mask.mT.contiguous().mT, apart):
            assert torch.equal(OPS.sparse24(*moved[:2], same, moved[2], 2, 4), expected)


def test_autocast_leaves_the_mask_alone():
    x, values, mask, bias = normal(4, 8, 5, 2, 4, torch.float32)
    for call in (sparse24, lambda *a: OPS.sparse24(*a, 2, 4)):
        with torch.autocast("cpu", torch.bfloat16):
            assert call(x, values, mask, bias).dtype == torch.bfloat16
            assert call(x, values.clone().requires_grad_(), mask, bias).dtype == torch.bfloat16


def test_no_features_and_no_outputs():
    x, values, mask, bias = normal(3, 0, 5, 2, 4, torch.float32)
    assert torch.equal(sparse24(x, values, mask, bias), bias.expand(3, 5))
    x, values, mask, bias = normal(3, 8, 0, 2, 4, torch.float32)
    assert sparse24(x, values, mask, bias).shape == (3, 0)


# --- mistakes, and masks of every bad kind (T-index) ---

@pytest.mark.parametrize("wrong, error, text", [
    (dict(x=torch.ones(2, 39)), ShapeError, "x has 39 features, must be a multiple of 4 for 2:4"),
    (dict(x=torch.ones(2, 44)), ShapeError, r"values \[24, 20\] must be \[n, 22\]: of the 44 features of x 2 of every 4"),
    (dict(x=torch.tensor(1.0)), ShapeError, "x has no dimensions"),
    (dict(values=torch.ones(24, 19)), ShapeError, r"values \[24, 19\] must be \[n, 20\]"),
    (dict(values=torch.ones(20)), ShapeError, r"values \[20\] must be"),
    (dict(kept=1), ShapeError, r"must be \[n, 10\]"), (dict(kept=0), ShapeError, "from 1 to group of each group, found 0:4"),
    (dict(kept=5), ShapeError, "found 5:4"),
    (dict(bias=torch.ones(23)), ShapeError, r"bias \[23\] must be \[24\], the rows of values \[24, 20\]"),
    (dict(bias=torch.ones(1, 24)), ShapeError, r"bias \[1, 24\]"),
    (dict(values=torch.ones(24, 20).double()), DtypeError, "values has torch.float64, x has torch.float32"),
    (dict(values=torch.ones(24, 20, device="meta")), DeviceError, "values is on meta, x is on cpu"),
    (dict(mask=torch.zeros(24, 2, dtype=torch.int32, device="meta")), DeviceError, "mask is on meta, x is on cpu"),
    (dict(x=torch.ones(2, 40).to_sparse()), UnsupportedError, "x is torch.sparse_coo"),
    (dict(x=[1.0]), DtypeError, "x must be a tensor, found list"),
    (dict(values=None), DtypeError, "values must be a tensor"),
    (dict(x=torch.ones(2, 40).long(), values=torch.ones(24, 20).long(), bias=None), DtypeError, "must be float64"),
])
@pytest.mark.parametrize("recorded", [False, True])
def test_wrong_arguments_are_named(wrong, error, text, recorded):
    given = dict(x=torch.ones(2, 40), values=torch.ones(24, 20).requires_grad_(recorded),
                 mask=pack(some_mask(24, 40, 2, 4)), bias=torch.ones(24), kept=2, group=4) | wrong
    with pytest.raises(error, match=f"sparse24: .*{text}"):
        sparse24(**given)
    with pytest.raises((error, RuntimeError, TypeError)):
        OPS.sparse24(*given.values())


@pytest.mark.parametrize("dy, text", [(torch.ones(2, 23), r"dy \[2, 23\] must be \[2, 24\]"),
                                      (torch.ones(3, 24), r"dy \[3, 24\]")])
def test_backward_refuses_wrong_sizes(dy, text):
    with pytest.raises((ShapeError, RuntimeError), match=text):
        OPS.sparse24_backward(dy, torch.ones(2, 40), torch.ones(24, 20), pack(some_mask(24, 40, 2, 4)), 11, 2, 4)


K, N = 40, 24  # of the masks below: two words of which 24 bits are padding


def changed(row, word, change):
    def of(mask):
        mask = mask.clone()
        mask[row, word] = change(int(mask[row, word]))
        return mask

    return of


def filled(word):
    return lambda mask: torch.full_like(mask, word)


BAD_BITS = {  # what check_mask says of a mask [24, 2] that keeps inputs 1 and 2 of every four
    "a bit too few": (changed(3, 0, lambda w: w & ~2), r"keeps 1 of inputs 0\.\.3 in row 3, must keep 2 of every 4"),
    "a bit too many": (changed(23, 1, lambda w: w | 1), r"keeps 3 of inputs 32\.\.35 in row 23"),
    "a bit in another group": (changed(5, 0, lambda w: w & ~2 | 1 << 4), r"keeps 1 of inputs 0\.\.3 in row 5"),
    "none": (filled(0), r"keeps 0 of inputs 0\.\.3 in row 0"), "all": (filled(-1), r"keeps 4 of inputs 0\.\.3 in row 0"),
    "2^31 - 1": (filled(2**31 - 1), "keeps 4 of"), "-2^31": (filled(-2**31), "keeps 0 of"), "one": (filled(1), "keeps 1 of"),
    "n": (filled(N), r"keeps 1 of inputs 0\.\.3"),  # a number of a row, where bits are due
    "padding": (changed(7, 1, lambda w: w | 1 << 8), "has bits behind its 40 inputs in row 7, must be zero there"),
    "last padding": (changed(0, 1, lambda w: w - 2**31), "has bits behind its 40 inputs in row 0"),
    "shifted": (lambda mask: (mask << 1) | mask, "keeps 3 of"),
    "halves": (lambda mask: mask & 0x0F0F0F0F, r"keeps 0 of inputs 4\.\.7 in row 0"),
    "swapped words": (lambda mask: mask.flip(1), "keeps 0 of inputs 8"),
    "of 1:4": (lambda mask: mask & 0x22222222, "keeps 1 of"),
    "inverted": (lambda mask: mask ^ 0x77777777, "keeps 1 of"),
    "random": (lambda mask: torch.randint(-2**31, 2**31 - 1, mask.shape).int(), "keeps"),
}
BAD_KINDS = {  # what the op says
    "a row less": (lambda mask: mask[:-1], ShapeError, r"mask \[23, 2\] must be \[24, 2\]"),
    "a word less": (lambda mask: mask[:, :1], ShapeError, r"\[24, 1\] must be \[24, 2\], a bit for each of 40 features"),
    "a word more": (lambda mask: mask.repeat(1, 2), ShapeError, r"mask \[24, 4\]"),
    "transposed": (lambda mask: mask.T, ShapeError, r"mask \[2, 24\]"),
    "flat": (lambda mask: mask.flatten(), ShapeError, r"\[48\]"),
    "empty": (lambda mask: mask[:0], ShapeError, r"mask \[0, 2\]"),
    "of another layer": (lambda mask: mask[:20], ShapeError, "20"),
    "int64": (lambda mask: mask.long(), DtypeError, "mask has torch.int64, must be int32"),
    "2^40": (lambda mask: torch.full((24, 2), 2**40), DtypeError, "torch.int64, must be int32"),
    "int16": (lambda mask: mask.short(), DtypeError, "torch.int16, must be int32"),
    "float": (lambda mask: mask.float(), DtypeError, "torch.float32, must be int32"),
    "bool": (lambda mask: unpack(mask, 2), DtypeError, "torch.bool, must be int32"),
    "list": (lambda mask: mask.tolist(), DtypeError, "mask must be a tensor, found list"),
    "none": (lambda mask: None, DtypeError, "mask must be a tensor, found NoneType"),
}


def a_mask():
    return pack(torch.tensor([False, True, True, False]).repeat(N, K // 4))


@pytest.mark.parametrize("bad", BAD_BITS)
def test_bad_bits_are_found(bad):
    change, text = BAD_BITS[bad]
    with pytest.raises(IndexRangeError, match=f"sparse24: mask {text}"):
        check_mask(change(a_mask()), K, 2, 4)


def test_good_masks_pass():
    for k, kept, group in ((40, 2, 4), (66, 3, 6), (91, 5, 7), (4, 4, 4), (0, 2, 4)):
        check_mask(pack(some_mask(9, k, kept, group)), k, kept, group)
    check_mask(torch.empty(24, 2, dtype=torch.int32, device="meta"), 40, 2, 4)


@pytest.mark.parametrize("bad", BAD_KINDS)
def test_what_is_no_mask_is_refused_by_name(bad):
    change, error, text = BAD_KINDS[bad]
    x, values = torch.ones(2, K), torch.ones(N, K // 2)
    for given in (values, values.clone().requires_grad_()):
        with pytest.raises(error, match=f"sparse24: .*{text}"):
            sparse24(x, given, change(a_mask()))
        with pytest.raises((error, RuntimeError)):
            OPS.sparse24(x, given, change(a_mask()), None, 2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("m", [1, 5, 20])
@pytest.mark.parametrize("bad", BAD_BITS)
def test_bad_bits_touch_nothing_else(bad, m, dtype):
    """Validation bypassed: some numbers or other, every one written, and no access outside of any tensor."""
    x, values, _, bias = normal(m, K, N, 2, 4, dtype)
    mask, dy = BAD_BITS[bad][0](a_mask()), torch.randn(m, N).to(dtype)
    for end in (True, False):
        x, values, mask, bias, dy = (gates.at_guard_page(t, end=end) for t in (x, values, mask, bias, dy))
        assert OPS.sparse24(x, values, mask, bias, 2, 4).isfinite().all()
        assert all(t.isfinite().all() for t in OPS.sparse24_backward(dy, x, values, mask, 11, 2, 4))
    assert gates.check_call(lambda *a: OPS.sparse24(*a, 2, 4), (x, values, mask, bias)).shape == (m, N)
    gates.check_call(lambda *a: OPS.sparse24_backward(*a, 11, 2, 4), (dy, x, values, mask))


@pytest.mark.parametrize("check", ["0", "1"])
def test_debug_check_validates_every_call(check):
    source = ("from torch import int32, ones, zeros\nfrom lowfat.ops import sparse24\n"
              "try:\n    sparse24(ones(1, 4), ones(3, 2), zeros(3, 1, dtype=int32))\n"
              "except IndexError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"LOWFAT_DEBUG_CHECK": check})
    said = "sparse24: mask keeps 0 of inputs 0..3 in row 0, must keep 2 of every 4\n"
    assert (done.returncode, done.stdout) == (0, said if check == "1" else ""), done.stderr
