"""low_rank with an activation and a residual, against fp64 by the gates and through everything torch does with an op."""
from functools import partial

import pytest
import torch
import torch._dynamo.testing

import gates
from lowfat import _native
from lowfat.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from lowfat.ops import low_rank
from lowfat.ops.low_rank import ACTIVATIONS, reference_epilogue

OPS = torch.ops.lowfat
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def public(x, v, u, bias, activation, residual=None):
    return low_rank(x, v, u, bias, activation=activation, residual=residual)


def operands(m, k, r, n, dtype=torch.float32, device="cpu"):
    shapes = (m, k), (r, k), (n, r), (n,), (m, n)
    scales = 1, k**-0.5, r**-0.5, 1, 2
    return [(torch.randn(shape) * scale).to(device, dtype) for shape, scale in zip(shapes, scales)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 16, 65])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_within_the_gates(activation, has_residual, m, dtype, device):
    x, v, u, bias, residual = operands(m, 257, 24, 136, dtype, device)
    residual = residual if has_residual else None
    known = gates.finished(gates.chain(x, v.T, u.T, bias=bias), activation, residual)
    expected = reference_epilogue(x, v, u, bias, activation, residual)
    for call in (public, OPS.low_rank_epilogue):
        y = gates.check_call(call, (x, v, u, bias, activation, residual))
        half_zeros = {"mistrusted"} if activation == "relu" else set()
        assert set(gates.failed_gates(y, expected, known)) <= half_zeros


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 7, 40])
def test_whole_numbers_are_exact(m, dtype, device):
    """G4: kills another order of activation and residual, and a residual read from another row."""
    x, v, u, bias = gates.whole_inputs(m, 72, 16, 40, dtype)
    residual = torch.randint(-9, 10, (m, 40)).to(dtype)
    z = gates.chain(x, v.T, u.T, bias=bias).y64
    for activation, known in (("relu", z.clamp(min=0)), ("none", z)):
        for add, exact in ((None, known), (residual, known + residual.double())):
            *most, there = (None if t is None else t.to(device) for t in (x, v, u, bias, add))
            assert torch.equal(public(*most, activation, there).cpu().double(), exact.to(dtype).double())


def test_any_layout_of_the_residual_gives_the_same_bits():
    x, v, u, bias, residual = operands(6, 40, 8, 24, torch.bfloat16)
    expected = public(x, v, u, bias, "silu", residual)
    for layout in gates.LAYOUTS:
        assert torch.equal(public(x, v, u, bias, "silu", gates.laid_out(residual, layout)), expected)
    row = residual[:1].expand(6, 24)
    assert torch.equal(public(x, v, u, bias, "silu", row), public(x, v, u, bias, "silu", row.contiguous()))


@pytest.mark.skipif(_native.library_path is None, reason="no compiled library")
@pytest.mark.parametrize("device", DEVICES)
def test_the_path_of_each_layout_of_the_residual(device):
    """T-dispatch-record: off 16 bytes the kernel of a GPU cannot read it. Whole numbers: exact on every path."""
    def paths():
        return {path: _native.calls("low_rank", device, path) for path in ("decode", "library")}

    x, v, u, bias = (t.to(device) for t in gates.whole_inputs(6, 40, 8, 24, torch.bfloat16))
    residual = torch.arange(6 * 24, device=device).view(6, 24).bfloat16() - 72
    exact = gates.chain(x, v.T, u.T, bias=bias).y64.relu() + residual.double()
    assert exact.abs().max() <= 256  # in bf16
    for layout in gates.LAYOUTS:
        path, before = "library" if (device, layout) == ("cuda", "offset") else "decode", paths()
        assert gates.exact_gate(public(x, v, u, bias, "relu", gates.laid_out(residual, layout)), exact)
        assert paths() == before | {path: before[path] + 1}, layout


def test_the_residual_may_be_x():
    x, v, u, bias, _ = operands(3, 24, 8, 24)
    before = x.clone()
    assert torch.equal(public(x, v, u, bias, "none", x), low_rank(x, v, u, bias) + x) and torch.equal(x, before)


def test_nan_passes_every_activation():
    x, v, u, bias, residual = operands(3, 24, 8, 24)
    x[1, 2] = float("nan")
    for activation in ACTIVATIONS:
        y = public(x, v, u, bias, activation, residual)
        assert y[1].isnan().all() and y[::2].isfinite().all()


@pytest.mark.parametrize("call", [public, OPS.low_rank_epilogue, reference_epilogue], ids=["function", "op", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, call):
    args = [t.double().requires_grad_() for t in operands(4, 5, 3, 6)]
    assert torch.autograd.gradcheck(lambda *a: call(*a[:4], activation, a[4]), args, nondet_tol=0, check_undefined_grad=True)
    frozen = [t.detach() for t in args[:4]]  # only the residual is trained
    assert torch.autograd.gradcheck(lambda residual: call(*frozen, activation, residual), args[4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [0, 6])
def test_opcheck(m, dtype):
    x, v, u, bias, residual = operands(m, 7, 3, 5, dtype)
    for given in ((x, v, u, bias, "gelu_tanh", residual), (x, v, u, None, "silu"),
                  (x.mT.contiguous().mT, v, u, bias, "none", gates.laid_out(residual, "transposed"))):
        torch.library.opcheck(OPS.low_rank_epilogue.default, given)
        if dtype == torch.float32:
            some = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) and i in (0, 2, 5) else t
                    for i, t in enumerate(given)]
            torch.library.opcheck(OPS.low_rank_epilogue.default, some)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_to_one_graph(dynamic):
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(partial(low_rank, activation="gelu"), fullgraph=True, dynamic=dynamic, backend=counted)
    for m in (6, 9, 11):
        x, v, u, bias, residual = (t.double().requires_grad_() for t in operands(m, 9, 3, 5))
        found, expected = compiled(x, v, u, bias, residual=residual), public(x, v, u, bias, "gelu", residual)
        gradients = (torch.autograd.grad(y.sum(), (x, v, u, bias, residual)) for y in (found, expected))
        assert torch.equal(found, expected) and all(torch.equal(a, b) for a, b in zip(*gradients))
        with torch.no_grad():
            assert torch.equal(compiled(x, v, u, bias, residual=residual), public(x, v, u, bias, "gelu", residual))
    assert counted.frame_count == (2 if dynamic else 4)  # with gradients and without


@pytest.mark.parametrize("call", [public, OPS.low_rank_epilogue], ids=["function", "op"])
def test_autocast_gives_one_dtype_everywhere(call):
    args = operands(4, 7, 3, 5)
    for recorded in (False, True):
        for t in args:
            t.requires_grad_(recorded)
        with torch.autocast("cpu", torch.bfloat16):
            y = call(*args[:4], "silu", args[4])
        assert y.dtype == torch.bfloat16 and y.requires_grad == recorded
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), args))


def test_plain_calls_do_not_take_the_longer_op():
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    *given, residual = operands(4, 7, 3, 5)
    with Seen():
        low_rank(*given)
        low_rank(*given, activation="silu")
        low_rank(*given, residual=residual)
    assert seen == [OPS.low_rank.default, OPS.low_rank_epilogue.default, OPS.low_rank_epilogue.default]


@pytest.mark.parametrize("wrong,error,text", [
    (dict(activation="tanh"), ArgumentError, "activation is 'tanh', must be one of none, relu, gelu, gelu_tanh, silu"),
    (dict(activation=None), ArgumentError, "activation is None"),
    (dict(activation=["relu"]), ArgumentError, "activation is"),
    (dict(activation=""), ArgumentError, "activation is ''"),
    (dict(residual=torch.ones(4, 6)), ShapeError, r"residual \[4, 6\] must be \[4, 5\]"),
    (dict(residual=torch.ones(5)), ShapeError, r"residual \[5\] must be \[4, 5\]"),  # would broadcast
    (dict(residual=torch.ones(1, 5)), ShapeError, r"residual \[1, 5\] must be \[4, 5\]"),
    (dict(residual=torch.ones(1, 4, 5)), ShapeError, r"residual \[1, 4, 5\] must be \[4, 5\]"),
    (dict(residual=torch.ones(4, 5).double()), DtypeError, "residual has torch.float64, x has torch.float32"),
    (dict(residual=torch.ones(4, 5, device="meta")), DeviceError, "residual is on meta, x is on cpu"),
    (dict(residual=1.0), DtypeError, "residual must be a tensor, found float")])
def test_mistakes_are_named(wrong, error, text):
    *given, _ = operands(4, 7, 3, 5)
    for recorded in (False, True):
        given[0].requires_grad_(recorded)
        with pytest.raises(error, match=f"low_rank: {text}"):
            low_rank(*given, **wrong)
        with pytest.raises((error, RuntimeError), match="low_rank"):
            OPS.low_rank_epilogue(*given, **{"activation": "none"} | wrong)
