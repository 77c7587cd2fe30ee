"""low_rank against fp64 by the gates, forward and backward, and through everything torch does with an op."""
from itertools import product

import pytest
import torch
import torch._dynamo.testing
from torch.nn.functional import linear

import gates
from lowfat.ops import low_rank
from lowfat.ops.low_rank import reference, reference_training

OPS = torch.ops.lowfat
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))

# one decode row and the largest batch of decode of real layers: MiniLM's up projection, a Llama-sized square at r 64
REAL = {"minilm": (16, 384, 96, 1536), "wide": (1, 4096, 64, 4096)}


def framework(x, v, u, bias=None):
    return linear(linear(x, v), u, bias)


def normal(m, k, r, n, dtype):
    v, u = torch.randn(r, k) / k**0.5, torch.randn(n, r) / r**0.5
    return tuple(t.to(dtype) for t in (torch.randn(m, k), v, u, torch.randn(n)))


def upstream(m, n, dtype):
    """Not uniform and not contiguous; small enough that fp16 does not overflow on the scaled rows."""
    return (torch.randn(n, m) * torch.linspace(0.02, 0.4, m)).to(dtype).T


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", gates.RECIPES)
def test_forward_within_the_gates(recipe, dtype, device):
    x, v, u, bias = args = gates.inputs(recipe, dtype, device=device)
    for call in (low_rank, OPS.low_rank, lambda *a: OPS.low_rank_training(*a)[0]):
        y = gates.check_call(call, args)
        assert gates.failed_gates(y, framework(*args), gates.chain(x, v.T, u.T, bias=bias)) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL)
def test_forward_on_real_shapes(shape, dtype, device):
    x, v, u, bias = args = [t.to(device) for t in normal(*shape, dtype)]
    assert gates.failed_gates(low_rank(*args), framework(*args), gates.chain(x, v.T, u.T, bias=bias)) == []
    x, v, u, bias = args = [t.to(device) for t in gates.whole_inputs(*shape, dtype)]
    assert gates.exact_gate(low_rank(*args), gates.chain(x, v.T, u.T, bias=bias).y64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", gates.RECIPES)
def test_the_kept_middle_is_that_of_the_forward(recipe, dtype):
    """Kills a stale or unrounded h: backward would then differ from the forward it belongs to."""
    x, v, u, bias = args = gates.inputs(recipe, dtype)
    y, h = gates.check_call(OPS.low_rank_training, args)
    assert torch.equal(y, OPS.low_rank(*args))
    assert gates.failed_gates(h, linear(x, v), gates.chain(x, v.T)) == []


@pytest.mark.parametrize("call", [low_rank, OPS.low_rank], ids=["function", "op"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", gates.RECIPES)
def test_gradients_within_the_gates(recipe, dtype, device, call):
    args = gates.inputs(recipe, dtype, device=device)
    x, v, u, _ = args
    dy = upstream(x.shape[0], u.shape[0], dtype).to(device)
    found, expected = ([t.detach().clone().requires_grad_() for t in args] for _ in range(2))
    call(*found).backward(dy)
    framework(*expected).backward(dy)
    for (name, known), mine, theirs in zip(gates.gradient_chains(dy, x, v, u).items(), found, expected):
        mine, theirs = ((t.grad.T if name == "du" else t.grad).reshape(known.y64.shape) for t in (mine, theirs))
        assert mine.dtype == dtype and gates.failed_gates(mine, theirs, known) == [], name


@pytest.mark.parametrize("needs", range(16))
@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_backward_gives_what_is_needed_and_nothing_else(needs, keep):
    x, v, u, bias = gates.whole_inputs(6, 9, 4, 8, torch.float64)
    x = x.reshape(2, 3, 9)
    dy = torch.randint(-3, 4, (2, 3, 8)).double()
    args = [t.clone().requires_grad_() for t in (x, v, u, bias)]
    expected = torch.autograd.grad(framework(*args), args, dy)
    found = gates.check_call(OPS.low_rank_backward, (dy, x, linear(x, v) if keep else None, v, u, needs))
    for i, (mine, theirs) in enumerate(zip(found, expected)):
        assert torch.equal(mine, theirs) if needs >> i & 1 else mine.shape == (0,)


def test_backward_reads_the_middle_it_is_given():
    """Kills a backward that recomputes h anyway."""
    x, v, u, _ = gates.whole_inputs(6, 9, 4, 8, torch.float64)
    dy, h = torch.ones(6, 8, dtype=torch.float64), torch.full((6, 4), 2.0, dtype=torch.float64)
    assert torch.equal(OPS.low_rank_backward(dy, x, h, v, u, 4)[2], dy.T @ h)


@pytest.mark.parametrize("wrong,text", [
    (dict(dy=torch.ones(6, 7)), r"dy \[6, 7\] must be \[6, 8\]"), (dict(dy=torch.ones(48)), r"dy \[48\] must be"),
    (dict(h=torch.ones(6, 3)), r"h \[6, 3\] must be \[6, 4\]"), (dict(x=torch.ones(6, 8)), "x has 8 features, v has 9"),
    (dict(u=torch.ones(8, 5)), "u has rank 5, v has rank 4")])
def test_backward_refuses_wrong_sizes(wrong, text):
    sizes = dict(dy=torch.ones(6, 8), x=torch.ones(6, 9), h=torch.ones(6, 4), v=torch.ones(4, 9), u=torch.ones(8, 4))
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=f"low_rank_backward: {text}"):
            OPS.low_rank_backward(*(t.to(device) for t in (sizes | wrong).values()), 15)


@pytest.mark.parametrize("needs", [needs for needs in product((False, True), repeat=4) if any(needs)])
@pytest.mark.parametrize("call", [low_rank, OPS.low_rank, lambda *a: OPS.low_rank_training(*a)[0]],
                         ids=["function", "op", "training"])
def test_gradcheck(call, needs):
    x, v, u, bias = (t.double() for t in normal(6, 5, 3, 4, torch.float64))
    args = (gates.laid_out(x.reshape(2, 3, 5), "strided"), gates.laid_out(v, "transposed"), u, bias)
    args = tuple(t.detach().requires_grad_(need) for t, need in zip(args, needs))
    assert torch.autograd.gradcheck(call, args, nondet_tol=0, check_undefined_grad=True, fast_mode=False)


SAMPLES = {
    "plain": lambda x, v, u, bias: (x, v, u, bias),
    "no bias": lambda x, v, u, bias: (x, v, u),
    "empty": lambda x, v, u, bias: (x[:0], v, u, bias),
    "three dimensions": lambda x, v, u, bias: (x.reshape(2, 3, 7), v, u, bias),
    "strided": lambda x, v, u, bias: (gates.laid_out(x, "strided"), gates.laid_out(v, "transposed"), u, bias),
    "one row": lambda x, v, u, bias: (x[0], v, u, bias),
    "rank zero": lambda x, v, u, bias: (x, v[:0], u[:, :0], bias),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, sample):
    args = SAMPLES[sample](*normal(6, 7, 3, 5, dtype))
    some = [t.detach().requires_grad_(i in (0, 2)) for i, t in enumerate(args)]
    for op in (OPS.low_rank.default, OPS.low_rank_training.default):
        torch.library.opcheck(op, args)
        if dtype == torch.float32:
            torch.library.opcheck(op, some)
    x, v, u = args[:3]
    y, h = OPS.low_rank_training(*args)
    for kept, needs in ((h, 15), (None, 5)):
        torch.library.opcheck(OPS.low_rank_backward.default, (y, x, kept, v, u, needs))


@pytest.mark.parametrize("backend,dynamic", [("aot_eager", None), ("aot_eager", True), ("inductor", True)])
def test_compiles_to_one_graph(backend, dynamic):
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(low_rank, fullgraph=True, dynamic=dynamic, backend=counted)
    for m in (6, 9, 11):
        args, expected = ([t.requires_grad_() for t in gates.whole_inputs(m, 9, 4, 8, torch.float64)] for _ in range(2))
        dy = torch.randint(-3, 4, (m, 8)).double()
        y = compiled(*args)
        y.backward(dy)
        framework(*expected).backward(dy)
        assert torch.equal(y, framework(*expected))
        assert all(torch.equal(a.grad, e.grad) for a, e in zip(args, expected))
    assert counted.frame_count == (1 if dynamic else 2)  # the first size, then one graph for every size
    with torch.no_grad():
        assert torch.equal(compiled(*args), framework(*args))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(tmp_path, strict):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            _, *factors = gates.whole_inputs(2, 9, 4, 8, torch.float32)
            self.v, self.u, self.bias = (torch.nn.Parameter(t) for t in factors)

        def forward(self, x):
            return low_rank(x, self.v, self.u, self.bias)

    model = Model()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            rows = {0: torch.export.Dim("m")}
            program = torch.export.export(model, (torch.ones(3, 9),), dynamic_shapes=(rows,), strict=strict)
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2").module()
        for m in (1, 4, 33):
            x = torch.randint(-3, 4, (m, 9)).float()
            assert torch.equal(loaded(x), framework(x, model.v, model.u, model.bias))
        assert any("low_rank" in str(node.target) for node in program.graph.nodes), "the op was not kept whole"


def test_fake_tensors_have_the_true_strides():
    from torch._subclasses import FakeTensorMode
    x, v, u, bias = normal(6, 7, 3, 5, torch.float32)
    for given in (x, x.reshape(2, 3, 7), x.reshape(2, 3, 7).transpose(0, 1), x[:1].expand(4, 7)):
        real = OPS.low_rank_training(given, v, u, bias)
        with FakeTensorMode() as mode:
            fake = OPS.low_rank_training(*(mode.from_tensor(t) for t in (given, v, u, bias)))
        assert [(t.shape, t.stride(), t.dtype) for t in fake] == [(t.shape, t.stride(), t.dtype) for t in real]


def test_saves_no_middle_when_the_last_factor_is_frozen():
    """Memory: with u frozen nobody reads h, so it must not be kept alive."""
    x, v, u, bias = (t.requires_grad_() for t in normal(6, 7, 3, 5, torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        low_rank(x, v, u.detach(), bias)
        assert (6, 3) not in kept
        low_rank(x, v, u, bias)
        assert (6, 3) in kept


def test_asks_backward_only_for_what_is_wanted():
    """No wasted kernel for a frozen factor: kills a backward that computes everything and drops it."""
    class Asked(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is OPS.low_rank_backward.default:
                asked.append(args[-1])
            return func(*args, **(kwargs or {}))

    asked = []
    for needs in range(1, 16):
        args = [t.requires_grad_(bool(needs >> i & 1)) for i, t in enumerate(normal(6, 7, 3, 5, torch.float32))]
        y = low_rank(*args)
        with Asked():
            y.sum().backward()
    assert asked == list(range(1, 16))


def test_the_kept_middle_carries_no_gradient():
    x, v, u, _ = (t.requires_grad_() for t in normal(6, 7, 3, 5, torch.float32))
    y, h = OPS.low_rank_training(x, v, u)
    assert y.requires_grad and not h.requires_grad


def test_the_reference_is_what_it_says():
    x, v, u, bias = gates.whole_inputs(6, 9, 4, 8, torch.float64)
    assert torch.equal(reference(x, v, u, bias), (u @ v @ x.T).T + bias)
    assert torch.equal(reference_training(x, v, u)[1], x @ v.T)


def test_same_bits_from_many_threads():
    """T-threads: shared factors, 8 Python threads."""
    from concurrent.futures import ThreadPoolExecutor
    x, v, u, bias = normal(3, 64, 8, 40, torch.bfloat16)
    rows = [x + i for i in range(8)]
    expected = [low_rank(row, v, u, bias) for row in rows]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            assert all(map(torch.equal, pool.map(lambda row: low_rank(row, v, u, bias), rows), expected))


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("m, k, n", [(33_000, 2, 65_537), (16, 2, 2**27 + 1), (16, 2**27 + 1, 2)],
                         ids=["y of many rows", "y of the decode kernel", "x of the decode kernel"])
def test_more_elements_than_an_int32_counts(m, k, n):
    """T-big: x or y has more than 2^31 elements. Whole numbers that stay exact in bf16: one product per sum is not zero."""
    x, v, u = torch.zeros(m, k, dtype=torch.bfloat16), torch.zeros(1, k, dtype=torch.bfloat16), torch.ones(n, 1).bfloat16()
    x[:, -1], v[:, -1] = torch.arange(m) % 5, 2
    u[-1] = -3
    bias = (torch.arange(n) % 7).bfloat16()
    y = low_rank(x, v, u, bias)
    assert max(x.numel(), y.numel()) > 2**31
    for row in (0, m // 2, m - 1):
        assert torch.equal(y[row], 2 * (row % 5) * u[:, 0] + bias)
