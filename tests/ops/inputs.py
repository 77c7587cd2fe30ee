"""T-inputs: what every op must survive or reject. One function per class of input; its docstring is the required outcome.

Every op is seen as low_rank(x, v, u, bias): where it is more, the rest is neutral, and tested in the op's own file.
`python inputs.py OP AFTER` runs those for one op and prints one JSON line each, so that a crash is a failed test and not the
end of the run. A case takes a Caller, which hides how the op is called and which errors that way of calling promises."""
import json
import sys
import traceback
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.functional import linear

import gates
from lowfat.errors import DeviceError, DtypeError, ShapeError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parent))
from callers import CALLERS, Caller, framework  # noqa: E402  (beside this file)

EDGES = (1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def judge(op, x, v, u, bias=None):
    y = op(x, v, u, bias)
    flat = x.reshape(-1, x.shape[-1])
    known = gates.chain(flat, v.T, u.T, bias=bias)
    found = gates.failed_gates(y.reshape(known.y64.shape), op.framework(flat, v, u, bias), known)
    assert not set(found) - {"mistrusted"}, f"{found} for {list(x.shape)} {list(v.shape)} {list(u.shape)} {x.dtype}"


def numbers(*shape, dtype=torch.float32, k=7, r=3, n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = (torch.randn(*shape, k, generator=g), torch.randn(r, k, generator=g), torch.randn(n, r, generator=g),
            torch.randn(n, generator=g))
    return tuple(t.to(dtype) for t in made)


def class_01_no_tokens(op):
    """Empty output, and gradients of zeros."""
    for shape in ((0,), (2, 0), (0, 3)):
        x, v, u, bias = (t.requires_grad_() for t in numbers(*shape))
        y = op(x, v, u, bias)
        assert y.shape == (*shape, 5)
        y.sum().backward()
        assert x.grad.shape == x.shape and not v.grad.any() and not u.grad.any() and not bias.grad.any()


def class_02_rank_zero(op):
    """A zero matrix, plus bias."""
    for dtype in DTYPES:
        x, v, u, bias = numbers(4, r=0, dtype=dtype)
        assert torch.equal(op(x, v, u, bias), bias.expand(4, 5)) and torch.equal(op(x, v, u), x.new_zeros(4, 5))


def class_03_no_features(op):
    """As two `nn.Linear` of this torch."""
    for k, n in ((0, 5), (7, 0), (0, 0)):
        args = numbers(4, k=k, n=n)
        y, expected = op(*args), framework(*args)
        assert y.shape == expected.shape and torch.equal(y, expected)


def class_04_size_one(op):
    """Works, all gates."""
    for dtype in DTYPES:
        for args in (numbers(1, dtype=dtype, k=1, r=1, n=1), numbers(1, dtype=dtype, k=65, r=1, n=1),
                     numbers(1, dtype=dtype, k=1, r=1, n=65)):
            judge(op, *args)


def class_05_ragged(op):
    """Right at every edge of every size: G1-G3 on normal data, G4 on whole numbers."""
    sizes = [tuple(edge if place == i else other for i, other in enumerate((2, 33, 5, 17)))
             for place in range(4) for edge in EDGES]
    sizes += [(m, 47, 9, 35) for m in range(1, 19)]
    for dtype, (m, k, r, n) in product((torch.float32, torch.bfloat16), sizes):
        args = numbers(m, dtype=dtype, k=k, r=r, n=n)
        judge(op, *args)
        args = gates.whole_inputs(m, k, r, n, dtype)
        x, v, u, bias = args
        assert gates.exact_gate(op(*args), gates.chain(x, v.T, u.T, bias=bias).y64), (m, k, r, n, dtype)


def class_06_batch_dimensions(op):
    """As `nn.Linear`: any number of them, and none."""
    for shape in ((), (4,), (2, 3), (2, 1, 3, 1)):
        x, v, u, bias = args = numbers(*shape)
        y = op(*args)
        assert y.shape == (*shape, 5)
        judge(op, *args)


def class_08_strided_x(op):
    """The same bits as for the contiguous copy."""
    for dtype in (torch.float32, torch.bfloat16):
        x, v, u, bias = numbers(4, 6, dtype=dtype, k=40)
        views = [gates.laid_out(x, layout) for layout in gates.LAYOUTS]
        views += [x.flip(0), x.narrow(1, 1, 3), x.transpose(0, 1), x[:1].expand(3, 6, 40), x[0, 0].expand(5, 40)]
        for view in views:
            assert torch.equal(op(view, v, u, bias), op(view.contiguous(), v, u, bias))


def class_09_offset_storage(op):
    """The same bits as for an aligned copy."""
    for dtype in DTYPES:
        args = numbers(3, dtype=dtype, k=40, r=17, n=33)
        moved = [gates.laid_out(t, "offset") for t in args]
        assert moved[0].data_ptr() % 16 and torch.equal(op(*moved), op(*args))


def class_10_strided_factors(op):
    """The same bits as for contiguous factors."""
    for dtype, layout in product((torch.float32, torch.bfloat16), gates.LAYOUTS):
        x, v, u, bias = numbers(3, dtype=dtype, k=40, r=17, n=33)
        moved = [gates.laid_out(t, layout) for t in (v, u, bias)]
        assert torch.equal(op(x, *moved), op(x, v, u, bias))


def class_11_strided_upstream_gradient(op):
    """The gradients of the contiguous copy."""
    args = [t.requires_grad_() for t in gates.whole_inputs(6, 9, 4, 8, torch.float64)]
    base = torch.randint(-3, 4, (6, 16)).double()
    gradients = [base[:, ::2], base[:, :8], base.T[:8].T.flip(1), base[:1, :8].expand(6, 8), base[0, 0].expand(6, 8)]
    for dy in gradients:
        pairs = zip(torch.autograd.grad(op(*args), args, dy), torch.autograd.grad(framework(*args), args, dy.contiguous()))
        assert all(torch.equal(found, expected) for found, expected in pairs)


def class_12_shared_memory(op):
    """Right where the same tensor, or a view of it, is passed twice; nothing is written to."""
    t = torch.randint(-3, 4, (6, 6)).float()
    for args in ((t, t, t), (t[:2], t, t), (t, t.T, t.flip(0)), (t[:, :3], t[:3, :3], t[:, 3:], t[0])):
        before = t.clone()
        assert torch.equal(op(*args), framework(*args)) and torch.equal(t, before)


def class_13_dtypes(op):
    """fp64, fp32, fp16 and bf16 work; others are refused."""
    for dtype in DTYPES:
        args = numbers(4, dtype=dtype)
        y = op(*args)
        assert y.dtype == dtype
        judge(op, *args)
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        x, v, u, _ = (t.abs().to(dtype) for t in numbers(4))
        with op.refuses(DtypeError, "float64, float32, float16 or bfloat16"):
            op(x, v, u)


def class_14_mixed_dtypes(op):
    """Refused, naming the argument."""
    x, v, u, bias = numbers(4)
    half = torch.bfloat16
    for args, name in (((x.to(half), v, u), "v"), ((x, v, u.to(half)), "u"), ((x, v.double(), u, bias), "v")):
        with op.refuses(DtypeError, ""):
            op(*args)
    if op.named:
        with op.refuses(DtypeError, "bias"):
            op(x, v, u, bias.to(half))


def class_15_mixed_devices(op):
    """Refused, naming the argument; all on meta gives shapes only."""
    x, v, u, bias = numbers(2, 4)
    for args in ((x.to("meta"), v, u), (x, v.to("meta"), u), (x, v, u.to("meta"))):
        with op.refuses(DeviceError, "is on"):
            op(*args)
    for recorded in (False, True):
        y = op(*(t.to("meta").requires_grad_(recorded) for t in (x, v, u, bias)))
        assert y.shape == (2, 4, 5) and y.device.type == "meta" and (y.requires_grad == recorded or not op.has_gradient)


def class_16_wrong_sizes(op):
    """Refused with both shapes, on the CPU and on meta."""
    x, v, u, bias = numbers(4)
    wrong = [((x[:, :6], v, u), ""), ((x, v, u[:, :2]), ""), ((x, v[0], u), ""), ((x, v, u[0]), ""), ((x[0, 0], v, u), "")]
    if op.named:
        wrong += [((x, v, u, bias[:4]), "bias [4] must be [5]"), ((x, v, u, bias[None]), "bias [1, 5] must be [5]"),
                  ((x[:, :6], v, u), "x has 6 features, v has 7"), ((x, v, u[:, :2]), "u has rank 2, v has rank 3")]
    for (args, text), device in product(wrong, ("cpu", "meta")):
        with op.refuses(ShapeError, text):
            op(*(t.to(device) for t in args))


def class_17_not_finite_in_x(op):
    """Reaches every output of its token, and no other token's."""
    for dtype, m in product((torch.float32, torch.bfloat16), (3, 20)):
        x, v, u, bias = numbers(m, dtype=dtype, k=40, r=17, n=33)
        clean = op(x, v, u, bias)
        for value in (float("nan"), float("inf")):
            for spoil in ((1, 0), (1, 39), (1, slice(None))):
                bad = x.clone()
                bad[spoil] = value
                y = op(bad, v, u, bias)
                assert not y[1].isfinite().any()
                assert torch.equal(y[0], clean[0]) and torch.equal(y[2:], clean[2:])


def class_18_not_finite_in_factors(op):
    """Propagates: from v and a column of u to every output, from a row of u or the bias to its own feature only."""
    for dtype in (torch.float32, torch.bfloat16):
        args = numbers(3, dtype=dtype, k=40, r=17, n=33)
        clean = op(*args)
        for place, spoil, hit in ((1, (16, 39), slice(None)), (2, (32, 16), 32), (3, 32, 32)):
            bad = [t.clone() for t in args]
            bad[place][spoil] = float("nan")
            y = op(*bad)
            expected = torch.zeros_like(y, dtype=torch.bool)
            expected[:, hit] = True
            assert torch.equal(y.isnan(), expected) and torch.equal(y[~expected], clean[~expected])


def class_19_zeros_and_subnormals(op):
    """0 * Inf is NaN as IEEE says; subnormal inputs and middles are not flushed. In bf16 on a CPU all those of an operand
    may count as zero: the result is right, or that of zeros in their place, and nothing between."""
    x, v, u, _ = numbers(2)
    v[:] = 0
    x[0, 0] = float("inf")
    assert op(x, v, u)[0].isnan().all() and not op(x, v, u)[1].any()
    for dtype in (torch.float32, torch.float16):
        tiny = torch.finfo(dtype).smallest_normal
        x = torch.full((1, 1), tiny / 4, dtype=dtype)
        one, large = torch.ones(1, 1, dtype=dtype), torch.full((1, 1), 2.0**10, dtype=dtype)
        assert op(x, one, large).item() == tiny * 2.0**8
    tiny = torch.finfo(torch.bfloat16).smallest_normal
    mixed, ones, one = torch.tensor([[0.25, 0.5, 1.0]]).repeat(1, 14) * tiny, torch.ones(1, 42), torch.ones(1, 1)
    small = torch.full((1, 1), 2.0**-64)
    either_way = {24.5 * tiny * 2.0**20, 14 * tiny * 2.0**20}  # 14 times 1.75; 14 times 1
    cases = [(mixed, ones, one * 2.0**20, either_way), (ones, mixed, one * 2.0**20, either_way),
             (one, ones.T * 2.0**20, mixed, either_way), (small, small, one * 2.0**20, {tiny / 4 * 2.0**20, 0.0})]
    for m, (x, v, u, allowed) in product((1, 2, 3, 4, 5, 16, 17), cases):
        y = op(*(t.bfloat16() for t in (x.repeat(m, 1), v, u)))
        assert set(y.flatten().tolist()) <= allowed and y.unique().numel() == 1, (m, y, allowed)


def class_20_overflowing_middle(op):
    """The right number if the middle stays in fp32, else Inf or NaN: never a finite wrong one."""
    x, v, u, _ = numbers(3, k=64, r=4, n=5)
    x, v, u = (x.abs() * 100).half(), (v.abs() * 50).half(), (u * 2.0**-12).half()
    assert (x.double() @ v.double().T).max() > 65504
    y = op(x, v, u)
    known = gates.chain(x, v.T, u.T)
    finite = y.isfinite()
    assert gates.element_gate(torch.where(finite, y, known.y64.half()), known)


def class_21_huge_range(op):
    """G3 holds with rows and channels scaled by 2^-30..2^30."""
    for dtype in (torch.float32, torch.bfloat16):
        x, v, u, bias = numbers(33, k=40, r=17, n=33)
        x *= 2.0 ** torch.randint(-30, 31, (33, 1))
        v *= 2.0 ** torch.randint(-30, 31, (1, 40))
        args = [t.to(dtype) for t in (x, v, u, bias)]
        assert gates.element_gate(op(*args), gates.chain(args[0], args[1].T, args[2].T, bias=args[3]))


def class_22_uninitialized_memory(op):
    """The result is the same in poisoned memory, and nothing but it is written."""
    for dtype, m in product(DTYPES, (1, 5, 16, 33)):
        args = numbers(m, dtype=dtype, k=40, r=17, n=33)
        assert torch.equal(gates.check_call(op, args), op(*args))


def class_23_patterns_of_requires_grad(op):
    """The right gradients for every subset of inputs, None for the rest; no graph in no_grad and inference_mode."""
    given = gates.whole_inputs(6, 9, 4, 8, torch.float64)
    dy = torch.randint(-3, 4, (6, 8)).double()
    for needs in product((False, True), repeat=4):
        ours, theirs = ([t.clone().requires_grad_(need) for t, need in zip(given, needs)] for _ in range(2))
        y = op(*ours)
        assert y.requires_grad == any(needs)
        if any(needs):
            y.backward(dy)
            framework(*theirs).backward(dy)
        for mine, their in zip(ours, theirs):
            assert (mine.grad is None) == (their.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, their.grad)
        for off in (torch.no_grad(), torch.inference_mode()):
            with off:
                assert not op(*ours).requires_grad and torch.equal(op(*ours), y)


def class_24_upstream_gradients(op):
    """Zeros, one-hot, and none at all give what torch gives."""
    args = [t.requires_grad_() for t in gates.whole_inputs(6, 9, 4, 8, torch.float64)]
    one_hot = torch.zeros(6, 8, dtype=torch.float64)
    one_hot[5, 7] = 1
    for dy in (torch.zeros(6, 8, dtype=torch.float64), one_hot):
        pairs = zip(torch.autograd.grad(op(*args), args, dy), torch.autograd.grad(framework(*args), args, dy))
        assert all(torch.equal(found, expected) for found, expected in pairs)
    unused = op(*args)
    assert torch.autograd.grad(args[0].sum() + unused.detach().sum(), args, allow_unused=True)[1] is None


def class_25_double_backward(op):
    """Refused by name, whichever gradient is differentiated again."""
    args = [t.requires_grad_() for t in numbers(4)]
    for first in range(3):
        gradient = torch.autograd.grad(op(*args).square().sum(), args, create_graph=True)[first]
        try:
            gradient.square().sum().backward()
        except UnsupportedError as error:
            assert "second derivatives" in str(error)
        else:
            raise AssertionError("second derivatives were not refused")


def class_26_autocast(op):
    """The dtype of `linear`, in forward and backward, nested, and switched off inside; fp64 stays."""
    args = [t.requires_grad_() for t in numbers(4)]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            y, expected = op(*args), framework(*args)
            assert y.dtype == expected.dtype == dtype
            judge(op, *(t.detach().to(dtype) for t in args))
            assert op(*(t.to(torch.bfloat16) for t in args)).dtype == dtype
            assert op(*(t.double() for t in args)).dtype == framework(*(t.double() for t in args)).dtype == torch.float64
            with torch.no_grad():
                assert op(*args).dtype == dtype
            with torch.autocast("cpu", enabled=False):
                assert op(*args).dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16):
                assert op(*args).dtype == torch.bfloat16
        seen = torch.autograd.grad(y, args, torch.ones_like(y))
        assert all(gradient.dtype == torch.float32 for gradient in seen)
        for gradient in seen:  # computed in the half dtype, then cast up: the low bits are zero
            assert torch.equal(gradient, gradient.to(dtype).float())
        with torch.autocast("cpu", dtype):  # full-precision forward, backward inside of autocast: stays in full precision
            with torch.autocast("cpu", enabled=False):
                y = op(*args)
            inside = torch.autograd.grad(y, args, torch.ones_like(y), retain_graph=True)
        outside = torch.autograd.grad(y, args, torch.ones_like(y))
        assert not op.gradient_is_ours or all(torch.equal(a, b) for a, b in zip(inside, outside))


def class_27_gradient_scaler(op):
    """Overflowing gradients reach the scaler: the step is skipped and the weights keep their bits."""
    x, v, u, bias = numbers(4)
    v, u = v.requires_grad_(), u.requires_grad_()
    optimizer = torch.optim.SGD([v, u], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = v.clone(), u.clone()
    with torch.autocast("cpu", torch.float16):
        y = op(x, v, u, bias)
    scaler.scale(y.float().square().sum()).backward()
    assert not v.grad.isfinite().all()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(v, before[0]) and torch.equal(u, before[1]) and scaler.get_scale() == 2.0**23


def class_29_transforms(op):
    """vmap, func.grad, jvp and forward-mode AD give what plain torch gives."""
    x, v, u, bias = args = gates.whole_inputs(6, 9, 4, 8, torch.float64)
    stack = torch.stack([x, x + 1])
    assert torch.equal(torch.func.vmap(op, (0, None, None, None))(stack, v, u, bias), framework(stack, v, u, bias))
    both = torch.func.vmap(op, (0, 0, None, None))(stack, torch.stack([v, v + 1]), u, bias)
    assert torch.equal(both, torch.stack([framework(x, v, u, bias), framework(x + 1, v + 1, u, bias)]))

    def of(f):
        return lambda v: f(x, v, u, bias).square().sum()

    assert torch.equal(torch.func.grad(of(op))(v), torch.func.grad(of(framework))(v))
    assert torch.equal(torch.func.jvp(of(op), (v,), (v,))[1], torch.func.jvp(of(framework), (v,), (v,))[1])
    with torch.autograd.forward_ad.dual_level():
        for mode in (torch.no_grad(), torch.enable_grad()):
            with mode:
                dual = op(x, torch.autograd.forward_ad.make_dual(v, v), u, bias)
                tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
                assert torch.equal(tangent, framework(x, v, u))


def class_30_activation_checkpointing(op):
    """The same gradients, bit for bit, in both modes."""
    args = [t.requires_grad_() for t in numbers(4)]
    expected = torch.autograd.grad(op(*args).sin().sum(), args)
    for reentrant in (True, False):
        y = torch.utils.checkpoint.checkpoint(op, *args, use_reentrant=reentrant)
        y.sin().sum().backward()
        for t, gradient in zip(args, expected):
            assert torch.equal(t.grad, gradient)
            t.grad = None


def class_32_global_defaults(op):
    """No effect on us."""
    args = numbers(4)
    expected = op(*args)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            y = op(*args)
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype == torch.float32 and torch.equal(y, expected)


def class_38_wrong_python_types(op):
    """Refused, naming the argument."""
    x, v, u, bias = numbers(4)
    for args, name in (((1, v, u), "x"), ((x, [1.0], u), "v"), ((x, v, None), "u"), ((x.numpy(), v, u), "x"),
                       ((x, v, u, "bias"), "bias"), ((None, None, None), "x")):
        with op.refuses(DtypeError, f"{name} must be a tensor"):
            op(*args)


def class_39_tensor_subclasses(op):
    """Parameters and plain subclasses work; sparse and sharded ones are refused, never taken for the whole."""
    class Marked(torch.Tensor):
        pass

    args = numbers(4)
    expected = op(*args)
    assert torch.equal(op(*(torch.nn.Parameter(t) for t in args)), expected)
    assert torch.equal(op(*(t.as_subclass(Marked) for t in args)).as_subclass(Tensor), expected)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    for x, *factors in ([args[0].to_sparse(), *args[1:]], [distribute_tensor(t, mesh) for t in args]):
        for mode in (torch.no_grad(), torch.enable_grad()):
            with mode:
                try:
                    op(x.requires_grad_(), *factors)
                except (UnsupportedError if op.named else RuntimeError):
                    continue
                raise AssertionError(f"accepted {type(x)} {x.layout}")
    torch.distributed.destroy_process_group()


NOT_HERE = {
    7: "more than 2^31 elements: test_low_rank.py, nightly",
    28: "torch.compile and export: test_low_rank.py",
    31: "copies of modules: tests/structures",
    33: "limits of structures: tests/structures",
    34: "preconditions: low_rank has none",
    35: "layers of a model: tests/test_layers.py",
    36: "names of layers: tests/test_layers.py",
    37: "options: every case passes a bias, merged is tested with a scale",
    40: "interrupted calls: no call is long",
}
FORWARD_ONLY = {1, 11, 23, 24, 25, 26, 27, 29, 30, 32}  # of the backward op: its gradient is refused, see test_low_rank.py
NOT_PIVOTED = {25, 30, 39}  # second derivatives work; gradients run torch's own products, inference those of low_rank
NOT_BITMAP = {16}  # fewer values than atoms are right there; test_dictionary.py has the wrong sizes
ON_DEVICE = {1, 2, 3, 4, 5, 6, 10, 11, 13, 14, 17, 18, 19, 20, 21, 23, 24}  # what can be said of an op on another device
CASES = {int(name.split("_")[1]): case for name, case in list(globals().items()) if name.startswith("class_")}


def on(device: str, caller: Caller) -> Caller:
    """The same op on another device; what goes in and comes out is on the CPU."""
    def call(*args):
        return caller.call(*(t.to(device) if isinstance(t, Tensor) else t for t in args)).cpu()

    return replace(caller, call=call)


def caller_of(op: str) -> Caller:
    """By its name, which may end in "on" and a device."""
    name, _, device = op.partition(" on ")
    return on(device, CALLERS[name]) if device else CALLERS[name]


def cases_of(op: str) -> list[int]:
    if " on " in op:
        return [number for number in cases_of(op.partition(" on ")[0]) if number in ON_DEVICE]
    left_out = (FORWARD_ONLY if "backward" in op else NOT_PIVOTED if op.endswith("pivoted")
                else NOT_BITMAP if op == "torch.ops.lowfat.dictionary" else ())
    return [number for number in CASES if number not in left_out]


def run(op: str, after: int) -> None:
    torch.set_num_threads(1)
    for number in cases_of(op):
        if number > after:
            torch.manual_seed(0)
            try:
                CASES[number](caller_of(op))
                failure = None
            except Exception:
                failure = traceback.format_exc()
            sys.stdout.write(json.dumps([number, failure]) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    run(sys.argv[1], after=int(sys.argv[2]))
