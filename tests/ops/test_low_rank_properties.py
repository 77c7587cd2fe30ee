"""What holds for any sizes, layouts and values. 2,000 examples: derandomized, so that a failure is the same everywhere."""
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

import gates
from lowfat.ops import low_rank

sizes = st.sampled_from([1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
layouts = st.sampled_from(gates.LAYOUTS)


@st.composite
def problems(draw, rows=sizes | st.just(0), dtypes=dtypes):
    """x [m, k], v [r, k], u [n, r] and maybe bias [n], each in a layout of its own."""
    m, k, n = draw(rows), draw(sizes), draw(sizes)
    r = draw(st.integers(0, min(k, n)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(dtypes)
    shapes = ((m, k), (r, k), (n, r), *([(n,)] if draw(st.booleans()) else []))
    return tuple(gates.laid_out(torch.randn(shape, generator=g).to(dtype), draw(layouts)) for shape in shapes)


def known(x, v, u, bias=None):
    return gates.chain(x, v.T, u.T, bias=bias)


examples = settings(max_examples=280, deadline=None, derandomize=True)


@examples
@given(problems())
def test_equals_the_dense_layer(args):
    x, v, u, *bias = args
    y, exact = low_rank(*args), known(*args)
    found = gates.failed_gates(y, linear(linear(x, v), u, *bias), exact)
    assert not set(found) - {"mistrusted"}
    dense = u.double() @ v.double()
    # the judge itself: two fp64 results, neither further from the truth than a rounding for each of its k + r + 1 terms
    apart = (exact.y64 - linear(x.double(), dense, *(t.double() for t in bias))).abs()
    assert (apart <= 2 * (exact.length + 2) * 2**-53 * exact.magnitude).all()


@examples
@given(problems())
def test_layouts_do_not_change_bits(args):
    assert torch.equal(low_rank(*args), low_rank(*(t.clone(memory_format=torch.contiguous_format) for t in args)))


@examples
@given(problems(), st.floats(-2, 2, width=16))
def test_linear_in_x(args, a):
    """op(a x + z) against a op(x) + op(z): the sum of three results, each within its own G3."""
    x, v, u = args[:3]
    z = x.flip(0)
    together = (a * x.double() + z.double()).to(x.dtype)
    bound = sum(abs(c) * bounds(known(t, v, u), x.dtype) for c, t in ((1, together), (a, x), (1, z)))
    moved = known(together.double() - (a * x.double() + z.double()), v, u).y64.abs()  # together itself was rounded
    apart = low_rank(together, v, u).double() - (a * low_rank(x, v, u).double() + low_rank(z, v, u).double())
    assert (apart.abs() <= bound + moved).all()


def bounds(exact, dtype):
    u, u_acc = gates.ROUNDOFF[dtype], min(gates.ROUNDOFF[dtype], 2**-24)
    mids = sum(exact.mids, torch.zeros(()))
    return u * exact.y64.abs() + 6 * u * mids + 6 * exact.length**0.5 * u_acc * exact.magnitude + torch.finfo(dtype).tiny


@examples
@given(problems(rows=st.integers(2, 40)), st.randoms(use_true_random=False))
def test_rows_do_not_know_each_other(args, random):
    """Permuting tokens permutes results, and a token of NaN touches only its own row."""
    x, *factors = args
    order = list(range(x.shape[0]))
    random.shuffle(order)
    y, exact = low_rank(x[order], *factors), known(*args)
    exact.y64, exact.magnitude, exact.mids = exact.y64[order], exact.magnitude[order], [mid[order] for mid in exact.mids]
    assert gates.element_gate(y, exact)
    spoiled = x.clone()
    spoiled[order[0]] = float("nan")
    hit = low_rank(spoiled, *factors).isnan()
    assert not hit[order[1:]].any() and (hit[order[0]].all() or factors[0].shape[0] == 0)


@examples
@given(problems(), problems())
def test_concatenated_rows(args, others):
    x, *factors = args
    more = others[0][:, :1].to(x.dtype).expand(-1, x.shape[1])
    exact = known(torch.cat([x, more]), *factors)
    assert gates.element_gate(low_rank(torch.cat([x, more]), *factors), exact)
    assert gates.element_gate(torch.cat([low_rank(x, *factors), low_rank(more, *factors)]), exact)


@examples
@given(problems(dtypes=st.just(torch.float64)))
def test_gradients_are_adjoint(args):
    """<op(x), g> = <x, dx(g)> + <bias, g>, and the same through v and u: both sides in fp64."""
    args = [t.detach().requires_grad_() for t in args]
    y = low_rank(*args)
    g = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(y, args, g)
    bias = (args[3] * g).sum() if len(args) == 4 else 0.0
    scale = (known(*(t.detach() for t in args)).magnitude * g.abs()).sum()
    (m, k), (n, r) = args[0].shape, args[2].shape
    for t, gradient in list(zip(args, gradients))[:3]:  # a rounding for each term of every sum that a side goes through
        roundings = (k + r + 2 + m * n) + (m + k + n + r + t.numel()) + 2
        assert abs((y * g).sum() - bias - (t * gradient).sum()) <= roundings * 2**-53 * scale


@examples
@given(problems())
def test_twice_the_same_bits_and_nothing_else_written(args):
    assert torch.equal(gates.check_call(low_rank, args), low_rank(*args))
