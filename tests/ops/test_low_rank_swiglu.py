"""low_rank_swiglu against fp64 by the gates, and through everything torch does with an op."""
import pytest
import torch
import torch._dynamo.testing
from torch.nn.functional import linear, silu

import gates
from lowfat import _native
from lowfat.errors import DeviceError, DtypeError, ShapeError
from lowfat.ops import low_rank, low_rank_swiglu
from lowfat.ops.low_rank_swiglu import reference

OPS = torch.ops.lowfat
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
SHAPES = {"decode": (1, 257, 16, 9, 130), "batch": (16, 257, 9, 16, 64), "prefill": (65, 129, 33, 32, 257),
          "llama": (1, 1024, 128, 128, 2816)}  # m, k, rank of gate, rank of up, n


def operands(m, k, r_gate, r_up, n, dtype=torch.float32, device="cpu"):
    """x, v, u, bias: the gate has a bias, up has none."""
    v, u = [torch.randn(r, k) / k**0.5 for r in (r_gate, r_up)], [torch.randn(n, r) / r**0.5 for r in (r_gate, r_up)]
    lists = ([None if t is None else t.to(device, dtype) for t in one] for one in (v, u, [torch.randn(n), None]))
    return torch.randn(m, k).to(device, dtype), *lists


def flat(op):
    """The op with its lists taken apart, as check_call and gradcheck want them."""
    return lambda x, v0, v1, u0, u1, b0, b1: op(x, [v0, v1], [u0, u1], [b0, b1])


def apart(x, v, u, bias):
    return x, *v, *u, *bias


def framework(x, v, u, bias):
    gate, up = (linear(linear(x, a), b, c) for a, b, c in zip(v, u, bias))
    return silu(gate) * up


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_within_the_gates(shape, dtype, device):
    x, v, u, bias = args = operands(*shape, dtype, device)
    known = gates.product_of(*(gates.chain(x, a.T, b.T, bias=c) for a, b, c in zip(v, u, bias)))
    for call in (low_rank_swiglu, OPS.low_rank_swiglu):
        assert gates.failed_gates(gates.check_call(flat(call), apart(*args)), framework(*args), known) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 7, 40])
def test_whole_numbers_are_exact(m, dtype, device):
    """G4: a gate of 64, or of -128 (where silu is 0 or all but), as its bias says, lets up through or not."""
    x, v, u, bias = gates.whole_inputs(m, 72, 16, 40, dtype)
    up = gates.chain(x, v.T, u.T, bias=bias).y64
    gate = torch.where(torch.arange(40) % 3 > 0, 64, -128).to(dtype)
    zeros = torch.zeros(8, 72, dtype=dtype), torch.zeros(40, 8, dtype=dtype)
    lists = [[t.to(device) for t in one] for one in ((zeros[0], v), (zeros[1], u), (gate, bias))]
    y = low_rank_swiglu(x.to(device), *lists).cpu()
    assert torch.equal(y[:, gate > 0].double(), (up[:, gate > 0] * 64).to(dtype).double())
    assert (y[:, gate < 0].double().abs() < 1e-30).all()


@pytest.mark.parametrize("call", [low_rank_swiglu, OPS.low_rank_swiglu, reference], ids=["function", "op", "reference"])
def test_gradcheck(call):
    x, *lists = operands(6, 5, 3, 2, 4, torch.float64)
    args = (gates.laid_out(x.reshape(2, 3, 5), "strided"), *lists)
    args = tuple(t if t is None else t.detach().requires_grad_() for t in apart(*args))
    assert torch.autograd.gradcheck(flat(call), args, nondet_tol=0, check_undefined_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [0, 1, 6])
def test_opcheck(m, dtype):
    x, *lists = operands(m, 7, 3, 2, 5, dtype)
    torch.library.opcheck(OPS.low_rank_swiglu.default, (x, *lists))
    if dtype == torch.float32:
        some = [[t if t is None else t.requires_grad_() for t in one] for one in lists]
        torch.library.opcheck(OPS.low_rank_swiglu.default, (gates.laid_out(x, "transposed"), *some))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_to_one_graph(dynamic):
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(low_rank_swiglu, fullgraph=True, dynamic=dynamic, backend=counted)
    lists = operands(6, 9, 3, 2, 5, torch.float64)[1:]
    leaves = [t.requires_grad_() for one in lists for t in one if t is not None]
    for m in (6, 9, 11):
        x = torch.randn(m, 9, dtype=torch.float64)
        found, expected = compiled(x, *lists), low_rank_swiglu(x, *lists)
        gradients = (torch.autograd.grad(y.sum(), leaves) for y in (found, expected))
        assert torch.equal(found, expected) and all(torch.equal(a, b) for a, b in zip(*gradients))
        with torch.no_grad():
            assert torch.equal(compiled(x, *lists), low_rank_swiglu(x, *lists))
    assert counted.frame_count == (2 if dynamic else 4)  # with gradients and without


def test_is_what_two_calls_make():
    x, v, u, bias = operands(5, 9, 3, 2, 8)
    for t in (x, *v, *u, bias[0]):
        t.requires_grad_()
    gate, up = (low_rank(x, a, b, c) for a, b, c in zip(v, u, bias))
    assert torch.equal(low_rank_swiglu(x, v, u, bias), silu(gate) * up)
    swapped = low_rank_swiglu(x, v[::-1], u[::-1], bias[::-1])
    assert torch.equal(swapped, silu(up) * gate) and not torch.equal(swapped, silu(gate) * up)


def test_no_bias_at_all():
    x, v, u, _ = operands(5, 9, 3, 2, 8)
    assert torch.equal(low_rank_swiglu(x, v, u), low_rank_swiglu(x, tuple(v), tuple(u), (None, None)))


ONE = torch.ones(3, 7), [torch.ones(2, 7), torch.ones(4, 7)], [torch.ones(5, 2), torch.ones(5, 4)], [None, torch.ones(5)]


@pytest.mark.parametrize("place,wrong,error,text", [
    (1, ONE[1][:1], ShapeError, "v has 1 members, u 2 and bias 2"), (2, None, DtypeError, "u must be a list"),
    (1, [ONE[1][0], None], DtypeError, r"v\[1\] must be a tensor"),
    (2, [ONE[2][0], torch.ones(6, 4)], ShapeError, r"bias\[1\] \[5\] must be \[6\], the rows of u\[1\]"),
    (2, [torch.ones(6, 2), ONE[2][1]], ShapeError, r"u\[0\] \(gate\) has 6 rows, u\[1\] \(up\) has 5"),
    (3, [torch.ones(4), None], ShapeError, r"bias\[0\] \[4\] must be \[5\]"),
    (1, [ONE[1][0].double(), ONE[1][1]], DtypeError, r"v\[0\] has torch.float64, x has torch.float32"),
    (0, ONE[0].to("meta"), DeviceError, r"v\[0\] is on cpu, x is on meta")])
def test_mistakes_name_their_member(place, wrong, error, text):
    args = [wrong if i == place else one for i, one in enumerate(ONE)]
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode, pytest.raises(error, match=f"low_rank_swiglu: {text}"):
            low_rank_swiglu(*args)
    with pytest.raises((error, RuntimeError)):
        OPS.low_rank_swiglu(*args)


@pytest.mark.parametrize("place", [1, 2, 3])
def test_one_tensor_is_no_list_of_members(place):
    """With gradients or without: torch would take its rows for the members."""
    args = [torch.ones(3, 7), torch.ones(2, 4, 7), torch.ones(2, 5, 4), torch.ones(2, 5)]
    args = [one if i in (0, place) else list(one) for i, one in enumerate(args)]
    for mode in (torch.no_grad(), torch.enable_grad()):
        for recorded in (False, True):
            args[0].requires_grad_(recorded)
            with mode, pytest.raises(DtypeError, match="low_rank_swiglu: .* must be a list of tensors, .* found Tensor"):
                low_rank_swiglu(*args)


@pytest.mark.parametrize("count", [1, 3])
def test_two_members_are_needed(count):
    x, v, u = ONE[0], [ONE[1][0]] * count, [ONE[2][0]] * count
    for call in (low_rank_swiglu, OPS.low_rank_swiglu):
        with pytest.raises((ShapeError, RuntimeError), match=f"v has {count} members, must have two, gate and up"):
            call(x, v, u, [None] * count)


@pytest.mark.skipif(_native.library_path is None, reason="no compiled library")
@pytest.mark.parametrize("m,path", [(1, "decode"), (129, "library")])
def test_the_path_on_a_cpu_is_recorded(m, path):
    """T-dispatch-record, with the bits of two calls."""
    def paths():
        return [_native.calls("low_rank_swiglu", "cpu", "members"), _native.calls("low_rank", "cpu", path)]

    x, *lists = operands(m, 72, 16, 9, 40, torch.bfloat16)
    before = paths()
    y = OPS.low_rank_swiglu(x, *lists)
    assert paths() == [before[0] + 1, before[1] + 2]
    gate, up = (low_rank(x, *member) for member in zip(*lists))
    assert torch.equal(y, silu(gate) * up)


@pytest.mark.gpu
@pytest.mark.parametrize("shape,path", [((1, 264, 64, 16, 136), "decode"), ((16, 264, 16, 64, 72), "decode"),
                                        ((17, 264, 64, 16, 136), "members"), ((1, 264, 64, 12, 136), "members")])
def test_the_path_on_a_gpu_is_recorded(shape, path):
    """T-dispatch-record, within the gates."""
    def paths():
        return {path: _native.calls("low_rank_swiglu", "cuda", path) for path in ("decode", "members")}

    x, v, u, bias = args = operands(*shape, torch.bfloat16, "cuda")
    before = paths()
    y = gates.check_call(flat(OPS.low_rank_swiglu), apart(*args))
    assert paths() == before | {path: before[path] + 2}  # check_call calls twice
    known = gates.product_of(*(gates.chain(x, a.T, b.T, bias=c) for a, b, c in zip(v, u, bias)))
    assert gates.failed_gates(y, framework(*args), known) == []
