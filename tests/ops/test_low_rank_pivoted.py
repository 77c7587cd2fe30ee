"""low_rank_pivoted against fp64 by the gates, through everything torch does with an op, and with bad index tensors."""
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch.nn.functional import linear

import gates
from lowfat import _native
from lowfat.errors import DeviceError, DtypeError, IndexRangeError, ShapeError
from lowfat.ops import check_pivots, low_rank_pivoted
from lowfat.ops.low_rank_pivoted import reference

OPS = torch.ops.lowfat
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
SHAPES = [(1, 1073, 33, 130), (16, 257, 24, 136), (65, 129, 64, 200), (3, 100, 5, 9), (40, 40, 1, 2)]  # m, k, r, n


def some_pivots(r, n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:r].sort().values


def operands(m, k, r, n, dtype=torch.float32, device="cpu"):
    x, v, c, bias = torch.randn(m, k), torch.randn(r, k) / k**0.5, torch.randn(n - r, r) / r**0.5, torch.randn(n)
    x, v, c, bias = (t.to(device, dtype) for t in (x, v, c, bias))
    return x, v, c, some_pivots(r, n).to(device), bias


def others(pivots, n):
    return torch.tensor([i for i in range(n) if i not in pivots.tolist()], dtype=torch.int64)


def framework(x, v, c, pivots, bias):
    """Torch's own chain, put together the plain way."""
    y = x.new_empty(x.shape[0], v.shape[0] + c.shape[0])
    h = linear(x, v)
    y[:, pivots], y[:, others(pivots, y.shape[1]).to(y.device)] = h, linear(h, c)
    return y if bias is None else y + bias


def known(x, v, c, pivots, bias):
    """Each half by its own chain: h has one product, and is stored; the rest has two."""
    n = v.shape[0] + c.shape[0]
    columns = torch.cat([pivots.cpu(), others(pivots, n)]).to(x.device)
    first, second = gates.chain(x, v.T), gates.chain(x, v.T, c.T)
    y, magnitude = (torch.empty(x.shape[0], n, dtype=torch.float64, device=x.device) for _ in range(2))
    mid = torch.empty_like(y)
    y[:, columns] = torch.cat([first.y64, second.y64], 1)
    magnitude[:, columns] = torch.cat([first.magnitude, second.magnitude], 1)
    mid[:, columns] = torch.cat([first.y64.abs(), (second.mids[0].square() + second.y64.square()).sqrt()], 1)
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    return gates.Chain(y, [mid], magnitude, second.length, second.roundings)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_within_the_gates(has_bias, shape, dtype, device):
    *args, bias = operands(*shape, dtype, device)
    args.append(bias if has_bias else None)
    for call in (low_rank_pivoted, OPS.low_rank_pivoted):
        y = gates.check_call(call, args)
        assert gates.failed_gates(y, framework(*args), known(*args)) == []


PATTERNS = {"first": lambda r, n: range(r), "last": lambda r, n: range(n - r, n), "even": lambda r, n: range(0, 2 * r, 2),
            "spread": lambda r, n: [i * n // r for i in range(r)], "ends": lambda r, n: [0, *range(n - r + 1, n)]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 7, 40])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_whole_numbers_are_exact(pattern, m, dtype, device):
    """G4: every column in its place, each with its own bias."""
    r, n = 16, 56
    x, v, c, _ = gates.whole_inputs(m, 72, r, n - r, dtype)
    bias, pivots = torch.arange(-n // 2, n - n // 2).to(dtype), torch.tensor(list(PATTERNS[pattern](r, n)))
    u = torch.zeros(n, r, dtype=torch.float64)
    u[pivots], u[others(pivots, n)] = torch.eye(r, dtype=torch.float64), c.double()
    y = low_rank_pivoted(*(t.to(device) for t in (x, v, c, pivots, bias)))
    exact = x.double() @ v.double().T @ u.T + bias.double()
    assert y.shape == (m, n) and torch.equal(y.cpu().double(), exact.to(dtype).double())


@pytest.mark.parametrize("r,n", [(5, 5), (1, 1), (0, 4)])
def test_all_rows_or_none_are_pivots(r, n):
    x, v, c, pivots, bias = operands(3, 7, r, n) if r else (torch.randn(3, 7), torch.empty(0, 7), torch.empty(n, 0),
                                                             torch.empty(0, dtype=torch.int64), torch.randn(n))
    expected = x @ v.T + bias if r else bias.expand(3, n)
    for call in (low_rank_pivoted, OPS.low_rank_pivoted):
        assert torch.allclose(call(x, v, c, pivots, bias), expected, rtol=0, atol=7 * 2**-22 * (x.norm() + 1).item())


def test_batch_dimensions_and_layouts_give_the_same_bits():
    x, v, c, pivots, bias = operands(6, 40, 8, 24)
    y = low_rank_pivoted(x, v, c, pivots, bias)
    assert torch.equal(low_rank_pivoted(x.reshape(2, 1, 3, 40), v, c, pivots, bias), y.reshape(2, 1, 3, 24))
    wide = torch.full((17,), -7)
    wide[1::2] = pivots
    for layout in gates.LAYOUTS:
        moved = [gates.laid_out(t, layout) for t in (x, v, c, bias)]
        assert torch.equal(low_rank_pivoted(*moved[:3], wide[1::2], moved[3]), y)


@pytest.mark.skipif(_native.library_path is None, reason="no compiled library")
@pytest.mark.parametrize("device", DEVICES)
def test_the_path_of_each_layout(device):
    """T-dispatch-record: what a GPU's kernel cannot read 16 bytes at a time the library takes, pivots too. Whole numbers:
    exact on every path."""
    def paths():
        return {path: _native.calls("low_rank_pivoted", device, path) for path in ("decode", "library")}

    r, n = 8, 24
    x, v, c, _ = gates.whole_inputs(6, 40, r, n - r, torch.bfloat16)
    bias, pivots = torch.arange(-n // 2, n // 2).bfloat16(), some_pivots(r, n)
    u = torch.zeros(n, r, dtype=torch.bfloat16)
    u[pivots], u[others(pivots, n)] = torch.eye(r, dtype=torch.bfloat16), c
    exact = gates.chain(x, v.T, u.T, bias=bias).y64
    assert exact.abs().max() <= 256  # in bf16
    x, v, c, pivots, bias = (t.to(device) for t in (x, v, c, pivots, bias))
    apart, off = torch.stack([pivots, -pivots], dim=1)[:, 0], torch.cat([pivots[:1], pivots])[1:]
    cases = [("decode", "contiguous", pivots), ("decode", "transposed", pivots), ("decode", "strided", apart),
             ("library", "offset", pivots), ("library", "contiguous", off)]
    for path, layout, places in cases:
        path, before = path if device == "cuda" else "decode", paths()
        factors = (gates.laid_out(t, layout) for t in (x, v, c))
        assert gates.exact_gate(low_rank_pivoted(*factors, places, gates.laid_out(bias, "offset")).cpu(), exact)
        assert paths() == before | {path: before[path] + 1}, (layout, places.storage_offset())


@pytest.mark.parametrize("call", [low_rank_pivoted, OPS.low_rank_pivoted, reference], ids=["function", "op", "reference"])
def test_gradcheck_and_second_derivatives(call):
    x, v, c, pivots, bias = operands(4, 5, 3, 7, torch.float64)
    x = gates.laid_out(x.reshape(2, 2, 5), "strided")
    x, v, c, bias = (t.requires_grad_() for t in (x, v, c, bias))

    def product(x, v, c, bias):
        return call(x, v, c, pivots, bias)

    assert torch.autograd.gradcheck(product, (x, v, c, bias), nondet_tol=0, check_undefined_grad=True)
    assert torch.autograd.gradgradcheck(product, (x, v, c, bias))


def test_gradients_within_the_gates():
    """dh = dy at the pivots + dy elsewhere c; dv = dh^T x; dc = dy elsewhere^T h; dx = dh v; db = sum of dy."""
    for dtype in DTYPES:
        x, v, c, pivots, bias = operands(64, 257, 16, 130, dtype)
        ours, theirs = ([t.clone().requires_grad_() for t in (x, v, c, bias)] for _ in range(2))
        dy = (torch.randn(130, 64) * torch.linspace(0.02, 0.4, 64)).to(dtype).T
        low_rank_pivoted(*ours[:3], pivots, ours[3]).backward(dy)
        rest = others(pivots, 130)
        framework(*theirs[:3], pivots, theirs[3]).backward(dy)
        u = torch.zeros(130, 16, dtype=dtype)  # dense: the identity in the rows of the pivots
        u[pivots], u[rest] = torch.eye(16, dtype=dtype), c
        chains = {"dx": (0, gates.chain(dy, u, v)), "dv": (1, gates.chain(u.T, dy.T, x)),
                  "dc": (2, gates.chain(v, x.T, dy[:, rest])), "db": (3, gates.chain(torch.ones(1, 64).to(dtype), dy))}
        for name, (i, chain) in chains.items():
            mine, other = ((t[i].grad.T if name == "dc" else t[i].grad).reshape(chain.y64.shape) for t in (ours, theirs))
            assert gates.failed_gates(mine, other, chain) == [], (name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [0, 1, 6])
def test_opcheck(m, dtype):
    x, v, c, pivots, bias = operands(m, 7, 3, 8, dtype)
    for args in ((x, v, c, pivots, bias), (gates.laid_out(x, "transposed"), v, c, pivots)):
        torch.library.opcheck(OPS.low_rank_pivoted.default, args)
        if dtype == torch.float32:
            some = [t.detach().requires_grad_() if i in (0, 2) else t for i, t in enumerate(args)]
            torch.library.opcheck(OPS.low_rank_pivoted.default, some)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_to_one_graph(dynamic):
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(low_rank_pivoted, fullgraph=True, dynamic=dynamic, backend=counted)
    _, v, c, pivots, bias = operands(6, 9, 3, 8, torch.float64)
    leaves = [t.requires_grad_() for t in (v, c, bias)]
    for m in (6, 9, 11):
        x = torch.randn(m, 9, dtype=torch.float64)
        found, expected = (f(x, v, c, pivots, bias) for f in (compiled, low_rank_pivoted))
        gradients = (torch.autograd.grad(y.sum(), leaves) for y in (found, expected))
        assert torch.equal(found, expected) and all(torch.equal(a, b) for a, b in zip(*gradients))
        with torch.no_grad():
            assert torch.equal(compiled(x, v, c, pivots, bias), low_rank_pivoted(x, v, c, pivots, bias))
    assert counted.frame_count == (2 if dynamic else 4)  # with gradients and without


def test_autocast_leaves_the_pivots_alone():
    args = operands(4, 7, 3, 8)
    for call in (low_rank_pivoted, OPS.low_rank_pivoted):
        with torch.autocast("cpu", torch.bfloat16):
            assert call(*args).dtype == torch.bfloat16
            assert call(args[0].requires_grad_(), *args[1:]).dtype == torch.bfloat16


def test_meta_gives_shapes():
    y = low_rank_pivoted(*(t.to("meta") for t in operands(4, 7, 3, 8)))
    assert y.shape == (4, 8) and y.is_meta


@pytest.mark.skipif(_native.library_path is None, reason="no compiled library")
@pytest.mark.parametrize("m,path,dtype,product", [
    (1, "decode", torch.bfloat16, "decode"), (16, "decode", torch.float32, "decode"), (16, "library", torch.half, "library"),
    (33, "library", torch.float32, "library")])
def test_the_path_on_a_cpu_is_recorded(m, path, dtype, product):
    """T-dispatch-record: the product's path is low_rank's own, ours is how its columns come to their places."""
    def paths():
        mine = {path: _native.calls("low_rank_pivoted", "cpu", path) for path in ("decode", "library")}
        return mine | {f"product {path}": _native.calls("low_rank", "cpu", path) for path in ("decode", "library")}

    before, args = paths(), operands(m, 40, 8, 24, dtype)
    low_rank_pivoted(*args)
    assert paths() == before | {path: before[path] + 1, f"product {product}": before[f"product {product}"] + 1}


@pytest.mark.gpu
@pytest.mark.parametrize("shape,path", [((1, 264, 64, 200), "decode"), ((16, 264, 16, 72), "decode"),
                                        ((1, 264, 64, 64), "decode"), ((17, 264, 64, 200), "library"),
                                        ((1, 265, 64, 200), "library")])
def test_the_path_on_a_gpu_is_recorded(shape, path):
    """T-dispatch-record, within the gates. With bad pivots every column is written all the same, to memory that was NaN, and
    the GPU goes on."""
    def paths():
        return {path: _native.calls("low_rank_pivoted", "cuda", path) for path in ("decode", "library")}

    args = operands(*shape, torch.bfloat16, "cuda")
    before = paths()
    y = gates.check_call(OPS.low_rank_pivoted, args)
    assert paths() == before | {path: before[path] + 2}  # check_call calls twice
    assert gates.failed_gates(y, framework(*args), known(*args)) == []
    r, n = shape[2:]
    bad = [args[3].flip(0), torch.zeros_like(args[3]), torch.full_like(args[3], n - 1)]
    for one in (-1, n, 2**31 - 1, 2**32, 2**40, -2**63):
        bad.append(args[3].clone())
        bad[-1][r // 2] = one
    for pivots in bad:
        assert gates.check_call(OPS.low_rank_pivoted, (*args[:3], pivots, args[4])).shape == (shape[0], n)
    torch.cuda.synchronize()
    assert torch.equal(OPS.low_rank_pivoted(*args), y)


# --- mistakes, and index tensors of every bad kind (T-index) ---

@pytest.mark.parametrize("place,wrong,error,text", [
    (0, torch.ones(4, 6), ShapeError, "x has 6 features, v has 7"), (0, None, DtypeError, "x must be a tensor"),
    (1, torch.ones(3), ShapeError, r"v \[3\] must be \[r, k\] and c \[5, 3\]"),
    (2, torch.ones(5, 2), ShapeError, "c has rank 2, v has rank 3"), (2, 1, DtypeError, "c must be a tensor, found int"),
    (2, torch.ones(5, 3).half(), DtypeError, "c has torch.float16, x has torch.float32"),
    (4, torch.ones(5), ShapeError, r"bias \[5\] must be \[8\], the rows of v \[3, 7\] and of c \[5, 3\]"),
    (4, torch.ones(8, device="meta"), DeviceError, "bias is on meta, x is on cpu"),
    (3, torch.arange(4), ShapeError, r"pivots \[4\] must be \[3\], the rows of v"),
    (3, torch.arange(3)[None], ShapeError, r"pivots \[1, 3\] must have one dimension"),
    (3, torch.empty(0, dtype=torch.int64), ShapeError, r"pivots \[0\] must be \[3\]"),
    (3, torch.arange(3).int(), DtypeError, "pivots has torch.int32, must be int64"),
    (3, torch.arange(3.0), DtypeError, "pivots has torch.float32, must be int64"),
    (3, [0, 1, 2], DtypeError, "pivots must be a tensor, found list"),
    (3, torch.arange(3, device="meta"), DeviceError, "pivots is on meta, x is on cpu")])
def test_mistakes_are_named(place, wrong, error, text):
    args = [wrong if i == place else t for i, t in enumerate(operands(4, 7, 3, 8))]
    for recorded in (False, True):
        if place != 0:
            args[0].requires_grad_(recorded)
        with pytest.raises(error, match=f"low_rank_pivoted: {text}"):
            low_rank_pivoted(*args)
        with pytest.raises((error, RuntimeError)):
            OPS.low_rank_pivoted(*args)


BAD = {  # pivots of 8 columns -> what check_pivots says
    "negative": ([-1, 2, 5], r"pivots\[0\] is -1, must be in 0..7$"),
    "n": ([1, 2, 8], r"pivots\[2\] is 8, must be in 0..7 and above"),
    "n + 1": ([1, 2, 9], r"pivots\[2\] is 9"), "2^31 - 1": ([1, 2, 2**31 - 1], r"pivots\[2\] is 2147483647"),
    "-2^31": ([-2**31, 2, 3], r"pivots\[0\] is -2147483648"), "2^40": ([1, 2**40, 2**41], r"pivots\[1\] is 1099511627776"),
    "2^32, which is 0 when narrowed": ([0, 1, 2**32], r"pivots\[2\] is 4294967296"),
    "smallest": ([-2**63, 0, 1], r"pivots\[0\] is -9223372036854775808"),
    "largest": ([0, 1, 2**63 - 1], r"pivots\[2\] is 9223372036854775807"),
    "unsorted": ([2, 1, 5], r"pivots\[1\] is 1, must be in 0..7 and above pivots\[0\], which is 2"),
    "descending": ([7, 4, 1], r"pivots\[1\] is 4"),
    "twice": ([1, 5, 5], r"pivots\[2\] is 5, must .* above pivots\[1\], which is 5"),
    "all the same": ([3, 3, 3], r"pivots\[1\] is 3"), "all out of range": ([8, 9, 10], r"pivots\[0\] is 8"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_pivots_are_found(bad):
    values, text = BAD[bad]
    with pytest.raises(IndexRangeError, match=f"low_rank_pivoted: {text}"):
        check_pivots(torch.tensor(values), 8)


def test_good_pivots_pass():
    for values, n in (([], 0), ([], 5), ([0], 1), ([0, 1, 2], 3), ([2, 5, 7], 8)):
        check_pivots(torch.tensor(values, dtype=torch.int64), n)
    check_pivots(torch.arange(3, device="meta"), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("bad", BAD)
def test_bad_pivots_touch_nothing_else(bad, m, dtype):
    """Validation bypassed: some numbers or other, every one written, and no access outside of any tensor."""
    x, v, c, _, bias = operands(m, 40, 3, 8, dtype)
    pivots = torch.tensor(BAD[bad][0])
    for end in (True, False):
        given = [gates.at_guard_page(t, end=end) for t in (x, v, c, pivots, bias)]
        assert gates.check_call(OPS.low_rank_pivoted, given).shape == (m, 8)


@pytest.mark.parametrize("check", ["0", "1"])
def test_debug_check_validates_every_call(check):
    source = ("from torch import ones, tensor\nfrom lowfat.ops import low_rank_pivoted\n"
              "try:\n    low_rank_pivoted(ones(1, 7), ones(2, 7), ones(3, 2), tensor([4, 5]))\n"
              "except IndexError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"LOWFAT_DEBUG_CHECK": check})
    said = "low_rank_pivoted: pivots[1] is 5, must be in 0..4 and above pivots[0], which is 4\n"
    assert (done.returncode, done.stdout) == (0, said if check == "1" else ""), done.stderr
