"""wavelet on a CPU: which of its ways a call takes, that each passes the gates, and that none touches anything beyond its
tensors.

`python test_wavelet_cpu.py` is the check of one instruction set level (LOWFAT_CPU_LEVEL) with every input at a guard page:
reading one element too far ends that process."""
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import gates  # noqa: E402
from test_wavelet import known, normal, update  # noqa: E402  (beside this file)

from lowfat import _native  # noqa: E402
from lowfat.ops import wavelet  # noqa: E402
from lowfat.ops.wavelet import reference, reference_backward, reference_training  # noqa: E402

OPS = torch.ops.lowfat
LEVELS = _native.kernels().get("wavelet", {}).get("cpu", [])
pytestmark = pytest.mark.skipif(not LEVELS, reason="no compiled library")
PATHS = ("decode", "folded", "halves", "reference")
KINDS = ("LL", "diag", "all")
PAIRS = {"LL": 1, "diag": 2, "all": 4}
DTYPES = (torch.float32, torch.bfloat16)
# m, k, n, rank: few rows and many, odd sizes, one of everything, ranks that no vector divides
SHAPES = {"one row": (1, 768, 384, 8), "few rows": (7, 301, 130, 5), "as many as fit": (8, 64, 256, 16), "one": (1, 1, 1, 1),
          "many": (64, 256, 192, 8), "odd": (65, 301, 131, 7), "two features": (9, 2, 3, 1), "long": (33, 1025, 2051, 8),
          "large": (128, 1024, 768, 32), "larger": (256, 1023, 1025, 16),
          "high rank": (128, 513, 768, 40)}  # so large that the norms of all errors are compared


def paths(op: str = "wavelet") -> dict[str, int]:
    return {path: _native.calls(op, "cpu", path) for path in PATHS if not (op != "wavelet" and path == "decode")}


def taken(call, op: str = "wavelet") -> list[str]:
    before = paths(op)
    call()
    return [path for path, count in paths(op).items() for _ in range(count - before[path])]


def operands(shape, subbands, dtype, gains=False):
    x, v, gain, u = normal(*shape, 1, subbands, dtype)
    if gains and gain is None:
        gain = torch.randn(PAIRS[subbands], shape[3]).to(dtype)
    return x, v, gain if gains else None, u


def path_of(m, subbands, r, dtype):
    if subbands != "all" and m * PAIRS[subbands] <= 16:
        return "decode"
    return path_of_many(m, subbands, r, dtype)


def path_of_many(m, subbands, r, dtype):
    middle, most = PAIRS[subbands] * r, 512 if subbands == "all" else 32 if dtype == torch.float32 else 64
    if middle <= min(4 * m if subbands == "all" else m, most):
        return "folded"
    return "reference" if subbands == "all" else "halves"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("filter, levels, subbands", [
    ("haar", 1, "LL"), ("haar", 1, "diag"), ("haar", 1, "all"), ("haar", 1, "shared+gain"), ("haar", 2, "diag"),
    ("db2", 1, "diag")])
@pytest.mark.parametrize("m", [1, 8, 9, 40])
def test_the_path_is_recorded(m, filter, levels, subbands, dtype):
    """T-dispatch-record: a silent fallback fails here."""
    x, v, gain, u = normal(m, 36, 30, 8, levels, subbands, dtype)
    gain = gain if subbands == "shared+gain" else None
    is_covered = (filter, levels) == ("haar", 1) and subbands in KINDS and dtype in DTYPES
    due, options = path_of(m, subbands, 8, dtype) if is_covered else "reference", (filter, levels, subbands, 30, 0.5)
    assert taken(lambda: OPS.wavelet(x, v, gain, u, *options)) == [due]
    assert taken(lambda: OPS.wavelet_training(x, v, gain, u, *options)) == [due]
    assert taken(lambda: wavelet(x, v, u, gain, out_features=30, filter=filter, levels=levels, subbands=subbands)) == [due]
    dy = torch.ones(m, 30).to(dtype)
    back = taken(lambda: OPS.wavelet_backward(dy, x, None, v, gain, u, 15, *options), "wavelet_backward")
    assert back == [path_of_many(m, subbands, 8, dtype) if is_covered else "reference"]


@pytest.mark.parametrize("m, changes, path, back", [
    (0, {}, "empty", "empty"), (1, {}, "decode", "halves"), (8, {}, "decode", "halves"), (9, {}, "halves", "halves"),
    (16, {}, "folded", "folded"), (16, {"pairs": 1}, "decode", "folded"), (17, {"pairs": 1}, "folded", "folded"),
    (3, {"pairs": 4}, "reference", "reference"), (8, {"pairs": 4}, "folded", "folded"),
    (4096, {"r": 16}, "folded", "folded"), (4096, {"r": 17}, "halves", "halves"),
    (4096, {"r": 32, "dtype": "bfloat16"}, "folded", "folded"), (4096, {"r": 33, "dtype": "bfloat16"}, "halves", "halves"),
    (9, {"r": 1000}, "halves", "halves"),
    (4096, {"r": 128, "pairs": 4}, "folded", "folded"), (4096, {"r": 129, "pairs": 4}, "reference", "reference"),
    (4096, {"dtype": "float16"}, "reference", "reference"), (1, {"dtype": "float64"}, "reference", "reference"),
    (4096, {"pairs": 0}, "reference", "reference"), (4096, {"pairs": 3}, "reference", "reference")])
def test_the_plan_is_told(m, changes, path, back):
    for op, due in (("wavelet", path), ("wavelet_backward", back)):
        config = _native.native.choose_config(op, **{"m": m, "n": 4096, "k": 4096, "r": 8, "dtype": "float32", **changes})
        assert config["path"] == due


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gains", [False, True], ids=["plain", "gains"])
@pytest.mark.parametrize("subbands", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_within_the_gates(shape, subbands, gains, dtype):
    m, k, n, r = SHAPES[shape]
    args, options = operands(SHAPES[shape], subbands, dtype, gains), ("haar", 1, subbands, n, 0.3)
    y = gates.check_call(lambda *a: OPS.wavelet(*a, *options), args)
    kept, h = gates.check_call(lambda *a: OPS.wavelet_training(*a, *options), args)
    plain, middle = reference_training(*args, *options)
    found = gates.failed_gates(y, plain, known(*args, *options))
    assert not set(found) - ({"mistrusted", "G1", "G2"} if y.numel() < 256 else set()), found
    exact = reference_training(*(None if t is None else t.double() for t in args), *options)[1]
    assert torch.equal(kept, y) and h.shape == (PAIRS[subbands], m, r)
    if h.numel() >= 256:
        assert gates.norm_gate(h, middle, exact)
    assert (h.double() - exact).abs().max() <= 4 * gates.ROUNDOFF[dtype] * (exact.abs().max() + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gains", [False, True], ids=["plain", "gains"])
@pytest.mark.parametrize("subbands", KINDS)
@pytest.mark.parametrize("shape", ["many", "odd", "long", "large", "larger", "high rank"])
def test_gradients_within_the_gates(shape, subbands, gains, dtype):
    m, k, n, r = SHAPES[shape]
    x, v, gain, u = operands(SHAPES[shape], subbands, dtype, gains)
    options = "haar", 1, subbands, n, 0.3
    dy = (torch.randn(n, m) * torch.linspace(0.02, 0.4, m)).to(dtype).T  # not contiguous
    h = reference_training(x, v, gain, u, *options)[1]
    for middle in (h, None):
        found = gates.check_call(lambda *a: OPS.wavelet_backward(*a, 15, *options), (dy, x, middle, v, gain, u))
        plain = reference_backward(dy, x, middle, v, gain, u, 15, *options)
        wide = [None if t is None else t.double() for t in (dy, x, middle, v, gain, u)]
        exact = reference_backward(*wide, 15, *options)
        for name, mine, theirs, due in zip(("dx", "dv", "dgain", "du"), found, plain, exact):
            assert mine.shape == due.shape and mine.is_contiguous(), name
            if due.numel() >= 256:
                assert gates.norm_gate(mine, theirs, due) and gates.max_gate(mine, theirs, due), name
            elif due.numel():
                error, plainly, largest = ((t.double() - due).abs().max() for t in (mine, theirs, torch.zeros_like(due)))
                assert error <= 4 * plainly + 2 * gates.ROUNDOFF[dtype] * largest, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("subbands", KINDS)
@pytest.mark.parametrize("k, n", [(24, 40), (25, 13), (1, 2)])
def test_every_feature_goes_where_it_belongs(k, n, subbands, dtype):
    """One feature at a time through whole numbers: each weight of the update, few rows at a time and all of them."""
    _, v, _, u = normal(1, k, n, 2, 1, subbands, torch.float32)
    v, u = (torch.randint_like(t, -3, 4) + 0.25 for t in (v, u))
    expected = 2 * update(v.double(), None, u.double(), "haar", 1, subbands, k, n).T
    x, v, u = (t.to(dtype) for t in (torch.eye(k), v, u))
    for rows in (x.split(1), (x.repeat(3, 1),)):
        found = torch.cat([OPS.wavelet(some, v, None, u, "haar", 1, subbands, n, 2.0) for some in rows])[:k]
        assert (found.double() - expected).abs().max() <= 8 * gates.ROUNDOFF[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_neighbours_that_are_alike(dtype):
    """Kills a high half's gradient as a difference of rounded ones: of smooth inputs nothing would be left of it."""
    m, k, n, r = 64, 256, 192, 8
    x, v, _, u = operands((m, k, n, r), "diag", dtype)
    smooth = lambda rows, size: (torch.randn(rows, 1) + 0.02 * torch.randn(rows, size)).to(dtype)  # noqa: E731
    x, dy, options = smooth(m, k), smooth(m, n), ("haar", 1, "diag", n, 1.0)
    h = reference_training(x, v, None, u, *options)[1]
    found = OPS.wavelet_backward(dy, x, h, v, None, u, 15, *options)
    plain = reference_backward(dy, x, h, v, None, u, 15, *options)
    exact = reference_backward(*(t.double() for t in (dy, x, h, v)), None, u.double(), 15, *options)
    for which, high in ((1, slice(k // 2, None)), (3, slice(n // 2, None))):
        pick = (lambda t: t[:, high]) if which == 1 else (lambda t: t[high])
        mine, theirs, due = (pick(t[which]) for t in (found, plain, exact))
        assert (mine - due).norm() <= (1.25 if dtype == torch.bfloat16 else 8) * (theirs - due).norm() + 1e-6 * due.norm()


@pytest.mark.parametrize("needs", range(16))
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_gives_what_is_needed_and_nothing_else(needs, dtype):
    shape = 32, 48, 36, 4
    x, v, gain, u = operands(shape, "all", dtype, True)
    dy, options = torch.randn(32, 36).to(dtype), ("haar", 1, "all", 36, 2.0)
    for h in (None, reference_training(x, v, gain, u, *options)[1]):
        everything, found = (OPS.wavelet_backward(dy, x, h, v, gain, u, which, *options) for which in (15, needs))
        for i, (mine, due) in enumerate(zip(found, everything)):
            assert torch.equal(mine, due) if needs >> i & 1 else mine.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [3, 40])
def test_leading_dimensions_and_layouts_give_the_same_bits(m, dtype):
    x, v, gain, u = operands((2 * m, 40, 24, 8), "diag", dtype, True)
    options = "haar", 1, "diag", 24, 1.0
    expected, h = OPS.wavelet_training(x, v, gain, u, *options)
    deep = OPS.wavelet_training(x.view(2, m, 40), v, gain, u, *options)
    assert torch.equal(deep[0], expected.view(2, m, 24)) and torch.equal(deep[1], h)
    strided = [t.mT.contiguous().mT for t in (x, v, gain, u)]
    assert torch.equal(OPS.wavelet(*strided, *options), expected)
    dx = OPS.wavelet_backward(torch.ones(2, m, 24).to(dtype), x.view(2, m, 40), h, v, gain, u, 1, *options)[0]
    assert dx.shape == (2, m, 40)


def test_no_rows_are_no_work():
    x, v, gain, u = operands((1, 40, 24, 4), "diag", torch.float32)
    options = "haar", 1, "diag", 24, 1.0
    assert taken(lambda: OPS.wavelet(x[:0], v, gain, u, *options)) == []
    dx, dv, _, du = OPS.wavelet_backward(torch.empty(0, 24), x[:0], None, v, gain, u, 11, *options)
    assert dx.shape == (0, 40) and dv.shape == v.shape and not dv.any() and not du.any()


@pytest.mark.parametrize("wrong, text", [
    (dict(subbands="HH"), "subbands is 'HH', must be one of all, diag, LL, shared"), (dict(n=-1), "n is -1"),
    (dict(levels=0), "levels is 0, must be between 1 and 3 for 10 and 6 features"), (dict(levels=4), "levels is 4"),
    (dict(v=torch.ones(3, 9)), r"v must be \[r, 10\] for diag of 10 features and 1 levels"),
    (dict(u=torch.ones(6, 4)), r"u must be \[6, 3\] for diag of 6 features"),
    (dict(u=torch.ones(5, 3)), r"u must be \[6, 3\]"),
    (dict(gain=torch.ones(1, 3)), r"gain must be \[2, 3\], a row for each pair of diag"),
    (dict(subbands="shared+gain", v=torch.ones(3, 5), u=torch.ones(3, 3)), r"gain is missing, must be \[4, 3\]"),
    (dict(u=torch.ones(6, 3).double()), "must have one dtype"), (dict(x=torch.tensor(1.0)), "x has no dimensions"),
    (dict(x=torch.ones(2, 10).int(), v=torch.ones(3, 10).int(), u=torch.ones(6, 3).int()), "x must be float64")])
def test_mistakes_are_named_by_the_op_too(wrong, text):
    given = dict(x=torch.ones(2, 10), v=torch.ones(3, 10), gain=None, u=torch.ones(6, 3), levels=1, subbands="diag", n=6)
    x, v, gain, u, levels, subbands, n = (given | wrong).values()
    with pytest.raises(RuntimeError, match=text):
        OPS.wavelet(x, v, gain, u, "haar", levels, subbands, n, 1.0)


# --- one level of instructions ---

@pytest.mark.parametrize("level", LEVELS)
def test_guard_pages_at_every_level(level):
    path = os.pathsep.join(p for p in (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"LOWFAT_CPU_LEVEL": level, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{level}: exit {done.returncode}\n{done.stderr[-2000:]}"
    best = LEVELS[max(LEVELS.index(_native.cpu_level()), LEVELS.index(level))]  # of what the processor has
    assert done.stdout.strip() == f"{best} {2 * 3 * len(SHAPES)}"


def check_level() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    done = 0
    for dtype, subbands, shape in product(DTYPES, KINDS, SHAPES.values()):
        args, options = operands(shape, subbands, dtype, True), ("haar", 1, subbands, shape[2], 0.3)
        expected, h = OPS.wavelet_training(*args, *options)
        exact = reference(*(t.double() for t in args), *options)
        size = reference(*(t.double().abs() for t in args), *options).abs().max()  # low halves of sizes are as large as any
        assert (expected.double() - exact).abs().max() <= 8 * gates.ROUNDOFF[dtype] * 4 * size, shape
        dy = torch.randn(shape[0], shape[2]).to(dtype)
        gradients = OPS.wavelet_backward(dy, args[0], h, *args[1:], 15, *options)
        for end in (True, False):
            x, v, gain, u = (gates.at_guard_page(t, end=end) for t in args)
            assert torch.equal(OPS.wavelet(x, v, gain, u, *options), expected), shape
            given = (gates.at_guard_page(dy, end=end), x, gates.at_guard_page(h, end=end), v, gain, u)
            again = OPS.wavelet_backward(*given, 15, *options)
            assert all(torch.equal(mine, due) for mine, due in zip(again, gradients)), shape
        done += 1
    return done


if __name__ == "__main__":
    sys.stdout.write(f"{_native.cpu_level()} {check_level()}\n")
