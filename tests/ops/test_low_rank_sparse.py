"""low_rank_sparse against fp64 by the gates, forward and backward, in both plans; supports of every bad kind; and through
what torch does with an op."""
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch.nn.functional import linear

import gates
from lowfat.errors import ArgumentError, DeviceError, DtypeError, IndexRangeError, ShapeError, UnsupportedError
from lowfat.ops import low_rank, low_rank_sparse
from lowfat.ops.low_rank_sparse import (check_support, entries, index_dtype, materialize, places, reference,
                                        reference_backward, split, weight_of)

OPS = torch.ops.lowfat
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
BITS = (1, 2, 4, 8, 64)  # of needs: x, v, u, values, bias
# m, k, n, r, density of S, scale: square, ragged, one row, each part alone, all entries, rows without any, int32 columns
SHAPES = {"square": (64, 256, 256, 16, 0.05, 1.0), "ragged": (65, 301, 130, 9, 0.1, 0.3),
          "decode": (1, 768, 768, 32, 0.03, 1.0), "sparse alone": (33, 97, 125, 0, 0.2, 0.7),
          "low rank alone": (20, 70, 90, 8, 0.0, 1.7), "full": (20, 70, 90, 5, 1.0, 0.3),
          "empty rows": (33, 70, 90, 4, 0.005, 2.5), "wide": (3, 40_000, 24, 4, 0.001, 0.3)}
CASES = [pytest.param(shape, id=name) for name, shape in SHAPES.items()]


def stored(keep):
    """starts and columns of a matrix bool [n, k], by the definition"""
    rows = [row.nonzero().flatten() for row in keep]
    starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    return starts, torch.cat([torch.empty(0, dtype=torch.int64), *rows]).to(index_dtype(keep.shape[1]))


def normal(m, k, n, r, density, scale, dtype, device="cpu"):
    """x, v, u, values, starts, columns, bias, scale"""
    starts, columns = stored(torch.rand(n, k) < density)
    v, u, values = torch.randn(r, k) / k**0.5, torch.randn(n, r) / max(r, 1)**0.5, torch.randn(len(columns))
    values /= max(density * k, 1)**0.5
    x, v, u, values, bias = (t.to(device, dtype) for t in (torch.randn(m, k), v, u, values, torch.randn(n)))
    return x, v, u, values, starts.to(device), columns.to(device), bias, scale


def whole(m, k, n, r, density, scale, dtype, device="cpu"):
    """Sparse enough that every middle and result is exact; so is a scale of 2."""
    made = list(normal(m, k, n, r, density, 2.0, dtype, device))
    for i, share in ((0, 1), (1, min(1, 20 / k)), (2, 0.5), (3, min(1, 40 / max(density * k, 1)))):
        made[i] = (torch.randint(-1, 2, made[i].shape) * (torch.rand(made[i].shape) < share)).to(device, dtype)
    made[6] = torch.randint(-9, 10, (n,)).to(device, dtype)
    return tuple(made)


def sparse(values, starts, columns, n, k):
    """S, dense, as CSR is read everywhere"""
    rows = torch.repeat_interleave(torch.arange(n, device=starts.device), starts.long().diff())
    return values.new_zeros(n, k).index_put((rows, columns.long()), values)


def dense(v, u, values, starts, columns, scale):
    return scale * (u @ v) + sparse(values, starts, columns, u.shape[0], v.shape[1])


def framework(x, v, u, values, starts, columns, bias=None, scale=1.0):
    """Torch's own products, every result rounded."""
    s = sparse(values, starts, columns, u.shape[0], v.shape[1])
    return linear(linear(x, v) * scale, u, bias) + linear(x, s)


def both(low, rest):
    """The chain of a sum."""
    return gates.Chain(low.y64 + rest.y64, [*low.mids, *rest.mids], low.magnitude + rest.magnitude, low.length + rest.length,
                       low.roundings or rest.roundings)


def scaled(chain, scale):
    return gates.Chain(scale * chain.y64, [scale * mid for mid in chain.mids], scale * chain.magnitude, chain.length,
                       chain.roundings)


def known(x, v, u, values, starts, columns, bias=None, scale=1.0):
    s = sparse(values, starts, columns, u.shape[0], v.shape[1])
    return both(scaled(gates.chain(x, v.T, u.T), scale), gates.chain(x, s.T, bias=bias))


def known_materialized(x, v, u, values, starts, columns, bias=None, scale=1.0):
    """The rounded middle is the weight."""
    chain = known(x, v, u, values, starts, columns, bias, scale)
    full = dense(v.double(), u.double(), values.double(), starts, columns, scale)
    mid = (x.double().square() @ full.square().T).sqrt()
    return gates.Chain(chain.y64, [mid], chain.magnitude, chain.length, full.numel())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CASES)
def test_forward_within_the_gates(shape, dtype, device):
    args = normal(*shape, dtype, device)
    for given in (args, (*args[:6], None, args[7])):
        y = gates.check_call(OPS.low_rank_sparse, given)
        kept, h = gates.check_call(OPS.low_rank_sparse_training, given)
        assert gates.failed_gates(y, framework(*given), known(*given)) == []
        assert torch.equal(kept, y) and h.shape == (shape[0], shape[3])
        chain = scaled(gates.chain(args[0], args[1].T), shape[5])
        assert gates.failed_gates(h, linear(args[0], args[1]) * shape[5], chain) == []
        assert torch.equal(low_rank_sparse(*given[:7], scale=given[7]), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CASES)
def test_whole_numbers_are_exact(shape, dtype, device):
    """G4: every value in its row and column."""
    args = whole(*shape, dtype, device)
    x, v, u, values, starts, columns, bias, scale = args
    weight = dense(v.double(), u.double(), values.double(), starts, columns, scale)
    exact = x.double() @ weight.T
    assert gates.exact_gate(OPS.low_rank_sparse(*args), exact + bias.double())
    assert gates.exact_gate(OPS.low_rank_sparse(*args[:6], None, scale), exact)
    assert gates.exact_gate(OPS.low_rank_sparse_training(*args)[1], 2 * x.double() @ v.double().T)
    assert gates.exact_gate(weight_of(*args[1:6], scale), weight) and gates.exact_gate(materialize(*args), exact + bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CASES)
def test_both_plans_and_the_dense_product_agree(shape, dtype):
    """methods.md 7: each is as close to fp64 as torch's own products are."""
    args = normal(*shape, dtype)
    x, v, u, values, starts, columns, bias, scale = args
    torch_own = linear(x, dense(v, u, values, starts, columns, scale), bias)
    chain = known_materialized(*args)
    assert gates.failed_gates(split(*args)[0], framework(*args), known(*args)) == []
    assert gates.failed_gates(materialize(*args), torch_own, chain) == []
    assert torch.equal(materialize(*args), linear(x, weight_of(*args[1:6], scale), bias))
    assert torch.equal(entries(*args[3:6], shape[2], shape[1]), sparse(*args[3:6], shape[2], shape[1]))


def test_the_references_round_once():
    """Sums are of fp32: all but those within its error of a boundary, about one of 2^16 / (6 sqrt(length)), come out as
    rounded from fp64. Rounding a part of the sum, or what the scale is still to multiply, would move every fourth."""
    x, v, u, values, starts, columns, bias, scale = args = normal(*SHAPES["ragged"], torch.bfloat16)
    wide = [t.double() for t in (x, v, u, values, bias)]
    s = sparse(wide[3], starts, columns, 130, 301)
    y, h = split(*args)
    for found, exact in ((h, linear(wide[0], wide[1]) * scale),
                         (y, linear(h.double(), wide[2], wide[4]) + linear(wide[0], s)),
                         (weight_of(*args[1:6], scale), scale * (wide[2] @ wide[1]) + s)):
        assert (found != exact.bfloat16()).double().mean() < 6 * 301**0.5 / 2**16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CASES)
def test_gradients_within_the_gates(shape, dtype, device):
    m, _, n, *_, scale = shape
    x, v, u, values, starts, columns, bias, _ = normal(*shape, dtype, device)
    leaves = [t.requires_grad_() for t in (x, v, u, values, bias)]
    dy = (torch.randn(n, m) * torch.linspace(0.02, 0.4, m)).to(device, dtype).T  # not contiguous
    found, expected = (torch.autograd.grad(call(x, v, u, values, starts, columns, bias, scale=scale), leaves, dy)
                       for call in (low_rank_sparse, framework))
    chains = known_gradients(dy, *(t.detach() for t in (x, v, u, values)), starts, columns, scale)
    for (name, chain), mine, theirs in zip(chains.items(), found, expected):
        mine, theirs = ((t.T if name == "du" else t).reshape(chain.y64.shape) for t in (mine, theirs))
        assert mine.dtype == dtype and gates.failed_gates(mine, theirs, chain) == [], name


def known_gradients(dy, x, v, u, values, starts, columns, scale):
    """scale dy u is a rounded middle of dx and dv, h one of du; du comes transposed."""
    n, k = u.shape[0], v.shape[1]
    chains = {name: scaled(chain, scale) for name, chain in gates.gradient_chains(dy, x, v, u).items() if name != "db"}
    chains["dx"] = both(chains["dx"], gates.chain(dy, sparse(values, starts, columns, n, k)))
    full = gates.chain(dy.T, x)
    at = torch.repeat_interleave(torch.arange(n, device=starts.device), starts.long().diff()), columns.long()
    chains["dvalues"] = gates.Chain(full.y64[at], [], full.magnitude[at], full.length, full.roundings)
    chains["db"] = gates.chain(torch.ones(1, len(dy), dtype=dy.dtype, device=dy.device), dy)
    return chains


SMALL = (6, 13, 11, 3, 0.3, 2.0)


@pytest.mark.parametrize("needs", [i for i in range(128) if not i & 48])
@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_backward_gives_what_is_needed_and_nothing_else(keep, needs):
    x, v, u, values, starts, columns, bias, scale = whole(*SMALL, torch.float64)
    leaves = [t.requires_grad_() for t in (x, v, u, values, bias)]
    dy = torch.randint(-3, 4, (6, 11)).double()
    expected = torch.autograd.grad(framework(x, v, u, values, starts, columns, bias, scale), leaves, dy)
    x, v, u, values, bias = (t.detach() for t in leaves)
    h = OPS.low_rank_sparse_training(x, v, u, values, starts, columns, bias, scale)[1] if keep else None
    found = gates.check_call(lambda *a: OPS.low_rank_sparse_backward(*a, needs, scale),
                             (dy, x, h, v, u, values, starts, columns))
    assert all(mine.is_contiguous() for mine in found)  # on every device: torch.compile relies on it
    for bit, mine, theirs in zip(BITS, found, expected):
        assert torch.equal(mine, theirs) if needs & bit else mine.shape == (0,)


def test_backward_reads_the_middle_it_is_given():
    x, v, u, values, starts, columns, _, scale = whole(*SMALL, torch.float64)
    dy, h = torch.randint(-3, 4, (6, 11)).double(), torch.full((6, 3), 2.0, dtype=torch.float64)
    assert torch.equal(OPS.low_rank_sparse_backward(dy, x, h, v, u, values, starts, columns, 4, scale)[2], dy.T @ h)


def test_asks_backward_only_for_what_is_wanted():
    """And saves no middle when u is frozen: only its gradient reads it."""
    class Asked(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is OPS.low_rank_sparse_backward.default:
                asked.append((args[8], args[2] is not None))
            return func(*args, **(kwargs or {}))

    asked, due = [], [needs for needs in range(1, 128) if not needs & 48]
    for needs in due:
        x, v, u, values, starts, columns, bias, scale = normal(*SMALL, torch.float32)
        for bit, t in zip(BITS, (x, v, u, values, bias)):
            t.requires_grad_(bool(needs & bit))
        y = low_rank_sparse(x, v, u, values, starts, columns, bias, scale=scale)
        with Asked():
            y.sum().backward()
    assert asked == [(needs, bool(needs & 4)) for needs in due]


@pytest.mark.parametrize("shape", [(5, 12, 20, 4, 0.2, 0.7), (3, 13, 7, 0, 0.5, 1.0), (3, 13, 7, 2, 0.0, 1.5)])
def test_what_torch_asks_of_an_op(shape):
    x, v, u, values, starts, columns, bias, scale = normal(*shape, torch.float64)
    leaves = [t.requires_grad_() for t in (x, v, u, values, bias)]
    trained = [t for t in leaves if t.numel()]  # gradcheck takes none without numbers

    def call(x, v, u, values, bias):
        return low_rank_sparse(x, v, u, values, starts, columns, bias, scale=scale)

    def of_trained(op, *some):
        some = iter(some)
        x, v, u, values, bias = (next(some) if t.numel() else t for t in leaves)
        return op(x, v, u, values, starts, columns, bias, scale)

    for op in (reference, OPS.low_rank_sparse, lambda *args: low_rank_sparse(*args[:7], scale=args[7])):
        assert torch.autograd.gradcheck(lambda *some: of_trained(op, *some), trained, check_undefined_grad=True)
    for op in (OPS.low_rank_sparse, OPS.low_rank_sparse_training):
        torch.library.opcheck(op.default, (*leaves[:4], starts, columns, bias, scale))
    plain = [t.detach() for t in leaves]
    dy = torch.ones(shape[0], shape[2]).double()
    for h in (None, torch.ones(shape[0], shape[3]).double()):
        args = (dy, plain[0], h, *plain[1:4], starts, columns, 79, scale)
        torch.library.opcheck(OPS.low_rank_sparse_backward.default, args)
    torch.compiler.reset()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), call(*leaves))
    chain = known(*plain[:4], starts, columns, plain[4], scale)
    for mapped in (torch.func.vmap(lambda row: call(row, *plain[1:]))(plain[0]),
                   torch.func.vmap(lambda values: call(*plain[:3], values, plain[4]))(plain[3][None])[0],
                   torch.func.vmap(lambda v: call(plain[0], v, *plain[2:]))(plain[1][None])[0]):
        assert gates.failed_gates(mapped, call(*plain), chain) == []
    if shape[4]:
        moved = torch.func.jvp(lambda values: call(*plain[:3], values, plain[4]), (plain[3],), (plain[3],))[1]
        alone = known(plain[0], 0 * plain[1], plain[2], plain[3], starts, columns)
        assert gates.failed_gates(moved, moved, alone) == []
    assert call(torch.empty(2, 0, shape[1]).double(), *plain[1:]).shape == (2, 0, shape[2])
    on_meta = (t.to("meta") for t in (*plain[:4], starts, columns, plain[4]))
    assert low_rank_sparse(*on_meta).shape == (shape[0], shape[2])
    y, h = OPS.low_rank_sparse_training(*leaves[:4], starts, columns, bias, scale)
    assert y.requires_grad and not h.requires_grad
    with pytest.raises(UnsupportedError, match="second derivatives"):
        first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)[4 if shape[3] == 0 else 1]
        first.square().sum().backward()


def test_compiles_once_for_every_number_of_rows():
    """With a scale that is part of the program; one that is an argument is seen as such, which takes a second look."""
    torch.compiler.reset()

    def call(x, v, u, values, starts, columns, bias, scale):
        return low_rank_sparse(x, v, u, values, starts, columns, bias, scale=0.7 if scale is None else scale)

    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counted)
    _, v, u, values, starts, columns, bias, _ = normal(1, 12, 20, 4, 0.2, 1.0, torch.float64)
    leaves = [t.requires_grad_() for t in (v, u, values, bias)]
    for scale, rows in ((None, (6, 9, 11)), (0.3, (6, 9)), (1.5, (6,))):
        for m in rows:
            x = torch.randn(m, 12, dtype=torch.float64)
            found, expected = (f(x, v, u, values, starts, columns, bias, scale) for f in (compiled, call))
            gradients = (torch.autograd.grad(y.sum(), leaves) for y in (found, expected))
            assert torch.equal(found, expected) and all(torch.equal(a, b) for a, b in zip(*gradients))
        assert counted.frame_count == 1 or scale is not None


def test_fake_tensors_have_the_true_strides():
    from torch._subclasses import FakeTensorMode
    x, *others, scale = normal(*SMALL, torch.float32)
    for given in (x, x.reshape(2, 3, 13), x.reshape(2, 3, 13).transpose(0, 1), x[:1].expand(4, 13)):
        real = OPS.low_rank_sparse_training(given, *others, scale)
        with FakeTensorMode() as mode:
            fake = OPS.low_rank_sparse_training(*(mode.from_tensor(t) for t in (given, *others)), scale)
        assert [(t.shape, t.stride(), t.dtype) for t in fake] == [(t.shape, t.stride(), t.dtype) for t in real]


def test_leading_dimensions_and_layouts_give_the_same_bits():
    x, v, u, values, starts, columns, bias, scale = normal(12, 20, 24, 5, 0.3, 0.3, torch.float32)
    expected = OPS.low_rank_sparse(x, v, u, values, starts, columns, bias, scale)
    found = OPS.low_rank_sparse(x.view(2, 6, 20), v, u, values, starts, columns, bias, scale)
    assert torch.equal(found, expected.view(2, 6, 24))

    def apart(t):
        wide = torch.full((2 * len(t) + 1,), -7, dtype=t.dtype)
        wide[1::2] = t
        return wide[1::2]

    dy = torch.randn(12, 24)
    gradients = OPS.low_rank_sparse_backward(dy, x, None, v, u, values, starts, columns, 79, scale)
    for layout in gates.LAYOUTS:
        x2, v2, u2, values2, bias2, dy2 = (gates.laid_out(t, layout) for t in (x, v, u, values, bias, dy))
        for pair in ((starts, columns), (apart(starts), apart(columns))):
            assert torch.equal(OPS.low_rank_sparse(x2, v2, u2, values2, *pair, bias2, scale), expected)
            again = OPS.low_rank_sparse_backward(dy2, x2, None, v2, u2, values2, *pair, 79, scale)
            assert all(torch.equal(a, b) for a, b in zip(again, gradients))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_cases(dtype):
    """methods.md 7: all entries and rank 0 are a dense layer, u = 0 gives S x, no entries give low_rank."""
    x, v, u, values, starts, columns, bias, _ = normal(33, 70, 90, 8, 1.0, 1.0, dtype)
    weight, none = values.view(90, 70), starts.new_zeros(91)
    y = low_rank_sparse(x, v[:0], u[:, :0], values, starts, columns, bias)
    assert gates.failed_gates(y, linear(x, weight, bias), gates.chain(x, weight.T, bias=bias)) == []
    y = low_rank_sparse(x, v, 0 * u, values, starts, columns, scale=0.3)
    assert gates.failed_gates(y, linear(x, weight), gates.chain(x, weight.T)) == []
    y = low_rank_sparse(x, v, u, values[:0], none, columns[:0], bias)
    assert gates.failed_gates(y, low_rank(x, v, u, bias), gates.chain(x, v.T, u.T, bias=bias)) == []


def test_autocast_leaves_the_support_alone():
    *args, scale = normal(4, 8, 5, 2, 0.3, 0.3, torch.float32)
    for call in (lambda *a: low_rank_sparse(*a, scale=scale), lambda *a: OPS.low_rank_sparse(*a, scale)):
        with torch.autocast("cpu", torch.bfloat16):
            assert call(*args).dtype == torch.bfloat16
            assert call(args[0].clone().requires_grad_(), *args[1:]).dtype == torch.bfloat16


# --- mistakes, and supports of every bad kind (T-index) ---

N, K, S = 24, 40, 5  # of the supports below: every row has the columns 0, 8, 16, 24, 32


def good_starts():
    return torch.arange(N + 1, dtype=torch.int32) * S


def good_columns():
    return torch.arange(0, K, K // S, dtype=torch.int16).repeat(N)


def given(**changes):
    args = dict(x=torch.ones(2, K), v=torch.ones(3, K), u=torch.ones(N, 3), values=torch.ones(N * S), starts=good_starts(),
                columns=good_columns(), bias=torch.ones(N))
    return args | changes


@pytest.mark.parametrize("wrong, error, text", [
    (dict(x=torch.ones(2, 39)), ShapeError, "x has 39 features, v has 40"),
    (dict(x=torch.tensor(1.0)), ShapeError, "x has no dimensions"),
    (dict(v=torch.ones(40)), ShapeError, r"v \[40\] must be \[r, k\]"),
    (dict(u=torch.ones(24, 2)), ShapeError, "u has rank 2, v has rank 3"),
    (dict(values=torch.ones(119)), ShapeError, r"values \[119\] must be \[nnz\] and columns \[120\] the same"),
    (dict(values=torch.ones(24, 5)), ShapeError, r"values \[24, 5\] must be \[nnz\]"),
    (dict(values=torch.ones(961), columns=torch.zeros(961).short()), ShapeError, r"values \[961\] must be at most 960"),
    (dict(bias=torch.ones(23)), ShapeError, r"bias \[23\] must be \[24\]"),
    (dict(values=torch.ones(120).double()), DtypeError, "values has torch.float64, x has torch.float32"),
    (dict(u=torch.ones(24, 3).half()), DtypeError, "u has torch.float16, x has torch.float32"),
    (dict(v=torch.ones(3, 40, device="meta")), DeviceError, "v is on meta, x is on cpu"),
    (dict(starts=torch.zeros(25, dtype=torch.int32, device="meta")), DeviceError, "starts is on meta, x is on cpu"),
    (dict(columns=torch.zeros(120, dtype=torch.int16, device="meta")), DeviceError, "columns is on meta, x is on cpu"),
    (dict(x=torch.ones(2, 40).to_sparse()), UnsupportedError, "x is torch.sparse_coo"),
    (dict(x=[1.0]), DtypeError, "x must be a tensor, found list"), (dict(u=None), DtypeError, "u must be a tensor"),
    (dict(values=None), DtypeError, "values must be a tensor, found NoneType"),
    (dict(scale="2"), ArgumentError, "scale must be a number, found '2'"),
    (dict(scale=None), ArgumentError, "scale must be a number, found None"),
])
@pytest.mark.parametrize("recorded", [False, True])
def test_wrong_arguments_are_named(wrong, error, text, recorded):
    args = given(**wrong)
    if recorded and args["x"] is not wrong.get("x"):
        args["x"] = args["x"].clone().requires_grad_()
    with pytest.raises(error, match=f"low_rank_sparse: .*{text}"):
        low_rank_sparse(**args)
    with pytest.raises((error, RuntimeError, TypeError)):
        OPS.low_rank_sparse(*({"scale": 1.0} | args).values())


@pytest.mark.parametrize("wrong, text", [(dict(dy=torch.ones(2, 23)), r"dy \[2, 23\] must be \[2, 24\]"),
                                         (dict(h=torch.ones(3, 3)), r"h \[3, 3\] must be \[2, 3\]"),
                                         (dict(h=torch.ones(1, 2, 3)), r"h \[1, 2, 3\] must be \[2, 3\]")])
def test_backward_refuses_wrong_sizes(wrong, text):
    sizes = dict(dy=torch.ones(2, N), x=torch.ones(2, K), h=None, v=torch.ones(3, K), u=torch.ones(N, 3)) | wrong
    with pytest.raises((ShapeError, RuntimeError), match=text):
        OPS.low_rank_sparse_backward(*sizes.values(), torch.ones(N * S), good_starts(), good_columns(), 79, 1.0)


def test_int16_reaches_32768_inputs():
    last = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([2**15 - 1], dtype=torch.int16)
    for k, dtype in ((2**15, torch.int16), (2**15 + 1, torch.int32)):
        x, v, u = torch.arange(k).double()[None], torch.ones(0, k).double(), torch.ones(1, 0).double()
        y = low_rank_sparse(x, v, u, torch.ones(1).double(), last[0], last[1].to(dtype))
        assert index_dtype(k) == dtype and y.tolist() == [[2**15 - 1]]
        other = torch.int16 if dtype == torch.int32 else torch.int32
        with pytest.raises(DtypeError, match=f"columns has {other}, must be {dtype} for {k} features"):
            low_rank_sparse(x, v, u, torch.ones(1).double(), last[0], last[1].to(other))


def at(place, number):
    def of(t):
        t = t.clone()
        t[place] = number
        return t

    return of


BAD_STARTS = {  # what check_support says of starts [25]
    "negative": (at(0, -1), "starts has -1 for row 0, must begin with 0"),
    "late": (at(0, 1), "starts has 1 for row 0"), "smallest first": (at(0, -2**31), "starts has -2147483648 for row 0"),
    "falls": (at(3, 9), "starts falls from 10 to 9 behind row 2, must rise"),
    "past the end": (at(7, 121), "starts falls from 121 to 40 behind row 7"),
    "largest": (at(7, 2**31 - 1), "starts falls from 2147483647 to 40 behind row 7"),
    "smallest": (at(7, -2**31), "starts falls from 30 to -2147483648 behind row 6"),
    "ends early": (at(24, 119), "starts has 119 behind the last row, 23, must end with 120, as many as columns has"),
    "ends late": (at(24, 121), "starts has 121 behind the last row"),
    "ends far": (at(24, 2**31 - 1), "starts has 2147483647 behind"),
    "zeros": (lambda t: t * 0, "starts has 0 behind the last row"), "ones": (lambda t: t * 0 + 1, "starts has 1 for row 0"),
    "all -1": (lambda t: t * 0 - 1, "starts has -1 for row 0"), "n": (lambda t: t * 0 + N, "starts has 24 for row 0"),
    "n + 1": (lambda t: t * 0 + N + 1, "starts has 25 for row 0"), "all largest": (lambda t: t * 0 + 2**31 - 1, "for row 0"),
    "all smallest": (lambda t: t * 0 - 2**31, "for row 0"),
    "negated": (lambda t: -t, "starts falls from 0 to -5 behind row 0"),
    "descending": (lambda t: t.flip(0), "starts has 120 for row 0"), "moved on": (lambda t: t + 1, "starts has 1 for row 0"),
    "one row behind": (lambda t: t.roll(1), "starts has 120 for row 0"),
    "doubled": (lambda t: t * 2, "starts has 240 behind"),
    "counts": (lambda t: (t > 0).int() * S, "starts has 5 behind the last row"),
    "a column of the next row": (at(7, 36), "columns has 0 in place 5 of row 6, must be in 0..39 and above .*, which is 32"),
    "random": (lambda t: torch.randint(-2**31, 2**31 - 1, t.shape).int(), "starts has"),
}
BAD_COLUMNS = {  # of columns [120]
    "negative": (at(15, -1), r"columns has -1 in place 0 of row 3, must be in 0\.\.39$"),
    "k": (at(19, K), r"columns has 40 in place 4 of row 3, must be in 0\.\.39 and above the one before it, which is 24"),
    "k + 1": (at(119, K + 1), "columns has 41 in place 4 of row 23"),
    "largest": (at(4, 2**15 - 1), "columns has 32767 in place 4 of row 0"),
    "smallest": (at(0, -2**15), "columns has -32768 in place 0 of row 0"),
    "twice": (at(37, 8), "has 8 in place 2 of row 7"),
    "unsorted": (at(37, 7), "columns has 7 in place 2 of row 7, .* above the one before it, which is 8"),
    "descending": (lambda t: t.flip(0), "columns has 24 in place 1 of row 0"),
    "all the same": (lambda t: t * 0 + 3, "columns has 3 in place 1 of row 0"),
    "zeros": (lambda t: t * 0, "has 0 in place 1"),
    "all out of range": (lambda t: t + K, "columns has 40 in place 0"),
    "of a wider layer": (lambda t: t + 8, "columns has 40 in place 4 of row 0"),
    "all negative": (lambda t: t - K, "columns has -40 in place 0"),
    "negated": (lambda t: -1 - t, "columns has -1 in place 0"),
    "wrapped": (at(119, -2**15 + 32), "columns has -32736 in place 4 of row 23"),
    "one place behind": (lambda t: t.roll(1), "columns has 32 in place 0|columns has 0 in place 1 of row 0"),
    "all largest": (lambda t: t * 0 + 2**15 - 1, "columns has 32767 in place 0"),
    "all smallest": (lambda t: t * 0 - 2**15, "columns has -32768 in place 0"),
    "n": (lambda t: t * 0 + N, "columns has 24 in place 1 of row 0"),
    "counted through": (lambda t: torch.arange(120).short(), "columns has 40 in place 0 of row 8"),
    "random": (lambda t: torch.randint(-2**15, 2**15 - 1, t.shape).short(), "columns has"),
}
BAD = [("starts", bad) for bad in BAD_STARTS] + [("columns", bad) for bad in BAD_COLUMNS]
BAD_KINDS = [  # what the op says of either
    (lambda t: t[:-1], ShapeError, r"\[(24|119)\]"), (lambda t: torch.cat([t, t[-1:]]), ShapeError, r"\[(26|121)\]"),
    (lambda t: t[None], ShapeError, r"\[1, (25|120)\]"), (lambda t: t[:, None], ShapeError, r"\[(25|120), 1\]"),
    (lambda t: t[:0], ShapeError, r"\[0\]"), (lambda t: t[0], ShapeError, r"\[\]"),
    (lambda t: t.long(), DtypeError, "torch.int64, must be int"), (lambda t: t.long() + 2**40, DtypeError, "torch.int64"),
    (lambda t: t.float(), DtypeError, "torch.float32, must be int"), (lambda t: t > 0, DtypeError, "torch.bool"),
    (lambda t: t.to(torch.uint8), DtypeError, "torch.uint8"),
    (lambda t: t.to(torch.int16 if t.dtype == torch.int32 else torch.int32), DtypeError, "torch.int(16|32), must be"),
    (lambda t: t.tolist(), DtypeError, "must be a tensor, found list"),
]


def changed(buffer, bad):
    starts, columns = good_starts(), good_columns()
    if buffer == "starts":
        return BAD_STARTS[bad][0](starts), columns
    return starts, BAD_COLUMNS[bad][0](columns)


@pytest.mark.parametrize("buffer,bad", BAD)
def test_bad_supports_are_found(buffer, bad):
    text = (BAD_STARTS if buffer == "starts" else BAD_COLUMNS)[bad][1]
    with pytest.raises(IndexRangeError, match=f"low_rank_sparse: .*({text})"):
        check_support(*changed(buffer, bad), K)


def test_good_supports_pass():
    check_support(good_starts(), good_columns(), K)
    for n, k, density in ((24, 40, 0.3), (7, 3, 1.0), (5, 1, 0.5), (30, 30, 0.0), (40, 33_000, 0.001)):
        check_support(*stored(torch.rand(n, k) < density), k)
    check_support(good_starts().to("meta") * 0, good_columns().to("meta"), K)
    with pytest.raises(ShapeError, match=r"starts \[0\] must be \[n \+ 1\]"):
        check_support(good_starts()[:0], good_columns(), K)


@pytest.mark.parametrize("change, error, text", BAD_KINDS)
@pytest.mark.parametrize("buffer", ["starts", "columns"])
def test_what_is_no_support_is_refused_by_name(buffer, change, error, text):
    for x in (torch.ones(2, K), torch.ones(2, K, requires_grad=True)):
        args = given(x=x, **{buffer: change(given()[buffer])})
        with pytest.raises(error, match=f"low_rank_sparse: .*{buffer} .*{text}"):
            low_rank_sparse(**args)
        with pytest.raises((error, RuntimeError)):
            OPS.low_rank_sparse(*args.values(), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("m", [1, 5, 20])
@pytest.mark.parametrize("buffer,bad", BAD)
def test_bad_supports_touch_nothing_else(buffer, bad, m, dtype):
    """Validation bypassed: some numbers or other, every one written, and no access outside of any tensor."""
    x, v, u, values, bias, dy = (torch.randn(shape).to(dtype) for shape in ((m, K), (3, K), (N, 3), (N * S,), (N,), (m, N)))
    starts, columns = changed(buffer, bad)
    for end in (True, False):
        x, v, u, values, starts, columns, bias, dy = (
            gates.at_guard_page(t, end=end) for t in (x, v, u, values, starts, columns, bias, dy))
        assert OPS.low_rank_sparse(x, v, u, values, starts, columns, bias, 0.3).isfinite().all()
        gradients = OPS.low_rank_sparse_backward(dy, x, None, v, u, values, starts, columns, 79, 0.3)
        assert all(t.isfinite().all() for t in gradients)
        place, is_inside = places(starts, columns, N, K)
        assert (place >= 0).all() and (place < N * K).all() and not gradients[3][~is_inside].any()
        assert torch.equal(entries(values, starts, columns, N, K), entries(values * is_inside, starts, columns, N, K))
    gates.check_call(lambda *a: OPS.low_rank_sparse(*a, 0.3), (x, v, u, values, starts, columns, bias))
    gates.check_call(lambda *a: OPS.low_rank_sparse_backward(*a, 79, 0.3), (dy, x, None, v, u, values, starts, columns))


@pytest.mark.parametrize("check", ["0", "1"])
def test_debug_check_validates_every_call(check):
    source = ("from torch import int16, int32, ones, tensor, zeros\nfrom lowfat.ops import low_rank_sparse\n"
              "try:\n    low_rank_sparse(ones(1, 7), ones(1, 7), ones(1, 1), ones(2), tensor([0, 2], dtype=int32),"
              " zeros(2, dtype=int16))\n"
              "except IndexError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"LOWFAT_DEBUG_CHECK": check})
    said = "low_rank_sparse: columns has 0 in place 1 of row 0, must be in 0..6 and above the one before it, which is 0\n"
    assert (done.returncode, done.stdout) == (0, said if check == "1" else ""), done.stderr
