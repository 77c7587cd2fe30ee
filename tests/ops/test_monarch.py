"""monarch against fp64 by the gates, forward and backward, on both forms; and through what torch does with an op."""
import pytest
import torch

import gates
from lowfat.bench.monarch import known
from lowfat.bench.monarch_backward import known_gradients
from lowfat.errors import DeviceError, DtypeError, ShapeError, UnsupportedError
from lowfat.ops import monarch
from lowfat.ops.monarch import reference, reference_backward, reference_training

OPS = torch.ops.lowfat
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
# m, k, n, blocks in and out, rank: square, ragged, one row, many blocks, more blocks than divide, one block, no rows
SHAPES = {"square": (64, 256, 256, 4, 4, 16), "ragged": (65, 301, 130, 3, 4, 7), "decode": (1, 768, 768, 4, 4, 48),
          "many": (16, 512, 512, 32, 32, 1), "padded": (33, 97, 83, 8, 5, 3), "one": (20, 70, 90, 1, 1, 9)}
FORMS = [pytest.param(True, id="monarch"), pytest.param(False, id="blockwise")]


def normal(m, k, n, b_in, b_out, r, dtype, device="cpu"):
    p, s = -(-k // b_in), -(-n // b_out)
    v, u = torch.randn(b_in, b_out * r, p) / p**0.5, torch.randn(b_out, s, b_in * r) / (b_in * r)**0.5
    return tuple(t.to(device, dtype) for t in (torch.randn(m, k), v, u, torch.randn(n)))


def whole(m, k, n, b_in, b_out, r, dtype, device="cpu"):
    """Sparse enough that every middle and result is exact."""
    p, s = -(-k // b_in), -(-n // b_out)
    v, u = ((torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.2)) for shape in ((b_in, b_out * r, p), (b_out, s, b_in * r)))
    return tuple(t.to(device, dtype) for t in (torch.randint(-1, 2, (m, k)), v, u, torch.randint(-9, 10, (n,))))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleave", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_within_the_gates(shape, interleave, dtype, device):
    n = shape[2]
    args = normal(*shape, dtype, device)
    y = gates.check_call(lambda *a: OPS.monarch(*a, n, interleave), args)
    kept, h = gates.check_call(lambda *a: OPS.monarch_training(*a, n, interleave), args)
    assert gates.failed_gates(y, reference(*args, n, interleave), known(*args, n, interleave)) == []
    assert torch.equal(kept, y) and h.shape == (shape[4], shape[0], shape[3] * shape[5])
    assert torch.equal(monarch(*args, out_features=n, interleave=interleave), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleave", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_whole_numbers_are_exact(shape, interleave, dtype, device):
    """Every index of both permutations: kills a block, row or column in the place of another."""
    args = whole(*shape, dtype, device)
    exact = reference(*(t.double() for t in args), shape[2], interleave)
    assert gates.exact_gate(OPS.monarch(*args, shape[2], interleave), exact)
    assert gates.exact_gate(OPS.monarch(*args[:3], None, shape[2], interleave), exact - args[3].double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleave", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_within_the_gates(shape, interleave, dtype, device):
    args = [t.requires_grad_() for t in normal(*shape, dtype, device)]
    x, v, u, bias = args
    n = shape[2]
    dy = (torch.randn(n, shape[0]) * torch.linspace(0.02, 0.4, shape[0])).to(device, dtype).T  # not contiguous
    found = torch.autograd.grad(monarch(*args, out_features=n, interleave=interleave), args, dy)
    plain = reference_backward(dy, x.detach(), None, v.detach(), u.detach(), 15, n, interleave)
    for name, mine, theirs, chain in zip(("dx", "dv", "du", "db"), found, plain,
                                         known_gradients(dy, x.detach(), None, v.detach(), u.detach(), n, interleave)):
        flat = (t.reshape(chain.y64.shape) for t in (mine, theirs))
        assert gates.failed_gates(*flat, chain) == [], name


@pytest.mark.parametrize("needs", range(16))
@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_backward_gives_what_is_needed_and_nothing_else(needs, keep):
    args = [t.requires_grad_() for t in whole(6, 13, 11, 3, 2, 2, torch.float64)]
    x, v, u, bias = (t.detach() for t in args)
    dy = torch.randint(-3, 4, (6, 11)).double()
    expected = torch.autograd.grad(reference(*args, 11, True), args, dy)
    h = reference_training(x, v, u, bias, 11, True)[1] if keep else None
    found = gates.check_call(lambda *a: OPS.monarch_backward(*a, needs, 11, True), (dy, x, h, v, u))
    assert all(mine.is_contiguous() for mine in found)  # on every device: torch.compile relies on it
    for i, (mine, theirs) in enumerate(zip(found, expected)):
        assert torch.equal(mine, theirs) if needs >> i & 1 else mine.shape == (0,)


@pytest.mark.parametrize("interleave", FORMS)
@pytest.mark.parametrize("shape", [(5, 12, 20, 3, 4, 2), (3, 13, 7, 4, 3, 1)])
def test_what_torch_asks_of_an_op(shape, interleave):
    args = [t.requires_grad_() for t in normal(*shape, torch.float64)]
    n = shape[2]

    def call(*a):
        return monarch(*a, out_features=n, interleave=interleave)

    assert torch.autograd.gradcheck(call, args)
    torch.library.opcheck(OPS.monarch.default, (*args, n, interleave))
    plain = [t.detach() for t in args]
    torch.library.opcheck(OPS.monarch_backward.default, (torch.ones(shape[0], n).double(), plain[0], None, *plain[1:3], 15, n,
                                                         interleave))
    torch.compiler.reset()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*args), call(*args))
    per_row = torch.func.vmap(lambda row: call(row, *plain[1:]))(plain[0])
    assert gates.failed_gates(per_row, call(*plain), known(*plain, n, interleave)) == []
    assert call(torch.empty(2, 0, shape[1]).double(), *plain[1:]).shape == (2, 0, n)
    assert call(*(t.to("meta") for t in plain)).shape == (shape[0], n)


def test_leading_dimensions_and_layouts_give_the_same_bits():
    x, v, u, bias = normal(12, 20, 24, 4, 3, 2, torch.float32)
    expected = OPS.monarch(x, v, u, bias, 24, True)
    assert torch.equal(OPS.monarch(x.view(2, 6, 20), v, u, bias, 24, True), expected.view(2, 6, 24))
    strided = [t.mT.contiguous().mT for t in (x, v, u)]
    assert torch.equal(OPS.monarch(*strided, bias, 24, True), expected)


@pytest.mark.parametrize("wrong, error, text", [
    (dict(x=torch.ones(2, 16)), ShapeError, r"x \[2, 16\] must have 20 features, or up to 3 less: 4 blocks of 5"),
    (dict(x=torch.ones(2, 21)), ShapeError, "20 features"), (dict(x=torch.tensor(1.0)), ShapeError, r"x \[\] must"),
    (dict(n=21), ShapeError, "n is 21, must be 24, or up to 2 less: 3 blocks of 8"), (dict(n=25), ShapeError, "n is 25"),
    (dict(v=torch.ones(4, 5, 5)), ShapeError, r"v \[4, 5, 5\] and u \[3, 8, 8\] do not share a rank"),
    (dict(v=torch.ones(4, 6)), ShapeError, r"v \[4, 6\] must be \[b_in, b_out r, p\]"),
    (dict(u=torch.ones(3, 8, 9)), ShapeError, "do not share a rank"),
    (dict(bias=torch.ones(23)), ShapeError, r"bias \[23\] must be \[24\]"),
    (dict(u=torch.ones(3, 8, 8).double()), DtypeError, "u has torch.float64, x has torch.float32"),
    (dict(v=torch.ones(4, 6, 5, device="meta")), DeviceError, "v is on meta, x is on cpu"),
    (dict(x=torch.ones(2, 20).to_sparse()), UnsupportedError, "x is torch.sparse_coo"),
    (dict(x=[1.0]), DtypeError, "x must be a tensor, found list"),
])
@pytest.mark.parametrize("recorded", [False, True])
def test_wrong_arguments_are_named(wrong, error, text, recorded):
    given = dict(x=torch.ones(2, 20), v=torch.ones(4, 6, 5).requires_grad_(recorded), u=torch.ones(3, 8, 8),
                 bias=torch.ones(24), n=24) | wrong
    with pytest.raises(error, match=text):
        monarch(given["x"], given["v"], given["u"], given["bias"], out_features=given["n"])
