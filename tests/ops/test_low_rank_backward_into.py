"""low_rank_backward_into: what is added, to which tensors, and that nothing is rounded on the way there."""
from itertools import product

import pytest
import torch
from torch.nn.functional import linear

import gates
from lowfat import _native
from lowfat.errors import DeviceError, DtypeError, ShapeError, UnsupportedError
from lowfat.ops import low_rank, low_rank_backward_into

OPS = torch.ops.lowfat
CALLS = {"function": low_rank_backward_into,
         "op": lambda *args, needs_dx=True: OPS.low_rank_backward_into(*args, *(None,) * (8 - len(args)), needs_dx)}
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def operands(m, k, r, n, dtype, device="cpu"):
    dy = torch.randn(n, m).T * torch.linspace(0.02, 0.4, m)[:, None]  # not uniform, not contiguous
    made = dy, torch.randn(m, k), torch.randn(r, k) / k**0.5, torch.randn(n, r) / r**0.5
    return tuple(t.to(device, dtype) for t in made)


def totals(v, u, fill=torch.zeros):
    dtype = torch.promote_types(v.dtype, torch.float32)
    return [fill(shape, dtype=dtype, device=v.device) for shape in (v.shape, u.shape, u.shape[:1])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(130, 264, 40, 72), (65, 200, 24, 136), (7, 33, 5, 19)])
def test_within_the_gates(shape, dtype, device):
    """In float32, against the framework's own chain in the dtype: a gradient that was rounded first would not pass."""
    dy, x, v, u = operands(*shape, dtype, device)
    h, dh = linear(x, v), dy @ u
    framework = dh @ v, dh.mT.to(torch.float64) @ x.double(), dy.mT.double() @ h.double(), dy.double().sum(0)
    added = totals(v, u)
    dx = gates.check_call(lambda *args: low_rank_backward_into(*args, *(t.zero_() for t in added)), (dy, x, h, v, u))
    for (name, known), mine, theirs in zip(gates.gradient_chains(dy, x, v, u).items(), (dx, *added), framework):
        mine, theirs = ((t.T if name == "du" else t).reshape(known.y64.shape) for t in (mine, theirs))
        middle = {} if name in ("dx", "db") else {"mid": dtype}  # dh and h are stored in the dtype
        assert gates.element_gate(mine, known, **middle), name
        if name != "dx" and dtype in (torch.bfloat16, torch.float16):
            rounded = theirs.to(dtype).double()  # what a product in the dtype would have given
            assert (mine.double() - theirs).norm() < 0.05 * (rounded - theirs).norm() + 1e-30, name


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("needs", [*product((False, True), repeat=4)])
def test_adds_to_what_is_given_and_nothing_else(needs, dtype, device, call):
    """Whole numbers: exact. What was there stays, and what is not given is not computed."""
    x, v, u, _ = (t.to(device) for t in gates.whole_inputs(70, 72, 16, 40, dtype))
    x = x.reshape(2, 35, 72)
    dy = torch.randint(-1, 2, (2, 35, 40), generator=torch.Generator().manual_seed(1)).to(device, dtype)
    flat, rows = dy.reshape(70, 40).double(), x.reshape(70, 72).double()
    dh, h = flat @ u.double(), rows @ v.double().T
    assert dh.abs().max() <= 1 / gates.ROUNDOFF[dtype] and h.abs().max() <= 1 / gates.ROUNDOFF[dtype]
    exact = dh.T @ rows, flat.T @ h, flat.sum(0)
    kept = h.to(dtype).reshape(2, 35, 16) if needs[0] else None
    given = [t if need else None for t, need in zip(totals(v, u, torch.ones), needs[1:])]
    for times in (1, 2):
        dx = call(dy, x, kept, v, u, *given, needs_dx=needs[0])
        for total, gradient in zip(given, exact):
            assert total is None or torch.equal(total.double(), 1 + times * gradient)
    expected = OPS.low_rank_backward(dy, x, kept, v, u, int(needs[0]))[0]
    assert torch.equal(dx, expected) and dx.shape == (x.shape if needs[0] else (0,))


def test_reads_the_middle_it_is_given():
    """Kills an op that computes h anyway."""
    dy, x, v, u = operands(6, 9, 4, 8, torch.float32)
    du, h = torch.zeros(8, 4), torch.full((6, 4), 2.0)
    low_rank_backward_into(dy, x, h, v, u, du=du)
    assert torch.equal(du, dy.T @ h)


def test_no_rows_add_nothing():
    dy, x, v, u = operands(0, 9, 4, 8, torch.float32)
    given = totals(v, u, torch.ones)
    assert low_rank_backward_into(dy, x, None, v, u, *given).shape == (0, 9) and all((t == 1).all() for t in given)


def test_any_layout_of_the_sums():
    dy, x, v, u = operands(6, 40, 8, 24, torch.bfloat16)
    expected = totals(v, u)
    low_rank_backward_into(dy, x, None, v, u, *expected)
    for layout in gates.LAYOUTS:
        given = [gates.laid_out(t, layout) for t in totals(v, u)]
        low_rank_backward_into(*(gates.laid_out(t, layout) for t in (dy, x)), None, v, u, *given)
        assert all(torch.equal(a, b) for a, b in zip(given, expected))


def test_main_grad_training_equals_autograd():
    """The use that the docstring shows, over two steps, against autograd in float64 of the same rounded numbers."""
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, v, u, bias):
            y, h = OPS.low_rank_training(x, v, u, bias)
            ctx.save_for_backward(x, h, v, u, bias)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, h, v, u, bias = ctx.saved_tensors
            dx = low_rank_backward_into(dy, x, h, v, u, v.main_grad, u.main_grad, bias.main_grad)
            return dx, None, None, None

    x, v, u, bias = (t.requires_grad_() for t in gates.whole_inputs(12, 9, 4, 8, torch.float32))
    for t in (v, u, bias):
        t.main_grad = torch.zeros_like(t)
    for _ in range(2):
        Linear.apply(x, v, u, bias).sum().backward()
    known = [t.detach().double().requires_grad_() for t in (x, v, u, bias)]
    low_rank(*known).sum().backward()
    assert torch.equal(x.grad.double(), 2 * known[0].grad) and v.grad is None
    for t, other in zip((v, u, bias), known[1:]):
        assert torch.equal(t.main_grad.double(), 2 * other.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_autograd_knows_what_was_written_to(device):
    dy, x, v, u = operands(130, 264, 40, 72, torch.bfloat16, device)
    total = torch.ones(40, 264, device=device, requires_grad=True)
    y = total.exp() * total
    with torch.no_grad():
        low_rank_backward_into(dy, x, None, v, u, total)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.inference_mode():
        low_rank_backward_into(dy, x, None, v, u, torch.ones(40, 264, device=device))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_is_refused_where_gradients_are_recorded(call):
    dy, x, v, u = operands(6, 9, 4, 8, torch.float32)
    for place in range(3):
        given = [t.detach().requires_grad_(i == place) for i, t in enumerate((x, v, u))]
        with pytest.raises(UnsupportedError, match="low_rank_backward_into: .* torch.no_grad"):
            call(dy, given[0], None, *given[1:], torch.ones(4, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_and_compile(dtype):
    dy, x, v, u = operands(6, 9, 4, 8, dtype)
    dv, du, db = totals(v, u)
    for args in ((dy, x, None, v, u, dv, du, None, True), (dy, x, linear(x, v), v, u, None, None, db, False)):
        torch.library.opcheck(OPS.low_rank_backward_into.default, args)
    compiled = torch.compile(low_rank_backward_into, fullgraph=True, backend="aot_eager")
    expected, given = totals(v, u), totals(v, u)
    with torch.no_grad():
        assert torch.equal(compiled(dy, x, None, v, u, *given), low_rank_backward_into(dy, x, None, v, u, *expected))
    assert all(torch.equal(a, b) for a, b in zip(given, expected))


@pytest.mark.parametrize("wrong,error,text", [
    (dict(dv=torch.ones(4, 9).bfloat16()), DtypeError, "dv has torch.bfloat16, must be torch.float32 to add gradients of"),
    (dict(du=torch.ones(8, 4).double()), DtypeError, "du has torch.float64, must be torch.float32"),
    (dict(db=1.0), DtypeError, "db must be a tensor or None, found float"),
    (dict(dv=torch.ones(9, 4)), ShapeError, r"dv \[9, 4\] must be \[4, 9\]"),
    (dict(du=torch.ones(1, 4)), ShapeError, r"du \[1, 4\] must be \[8, 4\]"),
    (dict(db=torch.ones(8, 1)), ShapeError, r"db \[8, 1\] must be \[8\]"),
    (dict(dv=torch.ones(4, 9, device="meta")), DeviceError, "dv is on meta, x is on cpu"),
    (dict(dy=torch.ones(6, 7)), ShapeError, r"dy \[6, 7\] must be \[6, 8\]"),
    (dict(h=torch.ones(6, 3)), ShapeError, r"h \[6, 3\] must be \[6, 4\]"),
    (dict(u=torch.ones(8, 5)), ShapeError, "u has rank 5, v has rank 4"),
    (dict(x=None), DtypeError, "x must be a tensor")])
def test_mistakes_are_named_and_nothing_is_added(wrong, error, text):
    sizes = dict(dy=torch.ones(6, 8), x=torch.ones(6, 9), h=torch.ones(6, 4), v=torch.ones(4, 9), u=torch.ones(8, 4),
                 dv=torch.ones(4, 9), du=torch.ones(8, 4), db=torch.ones(8))
    given = sizes | wrong
    with pytest.raises(error, match=f"low_rank_backward_into: {text}"):
        low_rank_backward_into(*given.values())
    with pytest.raises((error, RuntimeError)):
        OPS.low_rank_backward_into(*given.values(), True)
    assert all((sizes[name] == 1).all() for name in ("dv", "du", "db"))


def paths():
    return {path: _native.calls("low_rank_backward_into", "cuda", path) for path in ("kernels", "library")}


@pytest.mark.gpu
@pytest.mark.parametrize("shape,path", [((130, 264, 40, 72), "kernels"), ((2048, 4096, 256, 4096), "kernels"),
                                        ((63, 200, 24, 136), "library"), ((65, 201, 24, 136), "library")])
def test_the_path_is_recorded(shape, path):
    dy, x, v, u = operands(*shape, torch.bfloat16, "cuda")
    before = paths()
    low_rank_backward_into(dy, x, None, v, u, *totals(v, u))
    assert paths() == before | {path: before[path] + 1}
    dv, du, db = totals(v, u)
    for given in (du.mT.contiguous().mT, gates.laid_out(du, "offset")):  # the kernels add 16 bytes at a time
        before = paths()
        low_rank_backward_into(dy, x, None, v, u, dv, given, db)
        assert paths() == before | {"library": before["library"] + 1}
