"""The backward kernels of low_rank on a GPU: that they run where they are meant to, and pass the gates."""
import pytest
import torch
from torch.nn.functional import linear

import gates
from lowfat import _native
from lowfat.ops import low_rank

OPS = torch.ops.lowfat
HALVES = (torch.bfloat16, torch.float16)
# both sizes of tile, ragged m; splits of each contraction; a layer of a model
SHAPES = {"small": (65, 200, 24, 136), "large": (257, 136, 136, 264), "split": (4099, 264, 72, 2056),
          "layer": (2048, 4096, 256, 4096)}


def paths() -> dict[str, int]:
    return {path: _native.calls("low_rank_backward", "cuda", path) for path in ("kernels", "library")}


def operands(m, k, r, n, dtype):
    v, u = torch.randn(r, k) / k**0.5, torch.randn(n, r) / r**0.5
    dy = torch.randn(n, m).T * torch.linspace(0.02, 0.4, m)[:, None]  # not uniform, not contiguous
    return tuple(t.to("cuda", dtype) for t in (dy, torch.randn(m, k), v, u))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_within_the_gates(shape, dtype):
    dy, x, v, u = operands(*shape, dtype)
    h, before = linear(x, v), paths()
    dh = dy @ u
    found = gates.check_call(OPS.low_rank_backward, (dy, x, h, v, u, 15))
    assert paths() == before | {"kernels": before["kernels"] + 2}  # check_call calls twice
    framework = (dh @ v, dh.T @ x, dy.T @ h, dy.sum(0))
    for (name, known), mine, theirs in zip(gates.gradient_chains(dy, x, v, u).items(), found, framework):
        mine, theirs = ((t.T if name == "du" else t).reshape(known.y64.shape) for t in (mine, theirs))
        assert gates.failed_gates(mine, theirs, known) == [], name


@pytest.mark.gpu
@pytest.mark.parametrize("needs", range(1, 16))
def test_kernels_compute_what_is_needed(needs):
    dy, x, v, u = operands(65, 200, 24, 136, torch.bfloat16)
    h = linear(x, v) if needs % 2 else None
    all_of_them, found = (OPS.low_rank_backward(dy, x, h, v, u, which) for which in (15, needs))
    for i, (mine, known) in enumerate(zip(found, all_of_them)):
        assert torch.equal(mine, known) if needs >> i & 1 else mine.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(63, 200, 24, 136), (0, 200, 24, 136), (65, 201, 24, 136), (65, 200, 264, 136)])
def test_the_library_does_the_rest(shape):
    dy, x, v, u = operands(*shape, torch.bfloat16)
    dy, before = dy.contiguous(), paths()  # as the op makes it: the library may sum another layout in another order
    found = OPS.low_rank_backward(dy, x, None, v, u, 15)
    assert paths() == before | {"library": before["library"] + 1}
    dh, h = dy @ u, linear(x, v)
    for mine, known in zip(found, (dh @ v, dh.T @ x, dy.T @ h, dy.sum(0))):
        assert torch.equal(mine, known)


@pytest.mark.gpu
def test_autograd_reaches_the_kernels():
    _, *inputs = operands(130, 264, 40, 72, torch.bfloat16)
    inputs = [t.requires_grad_() for t in (*inputs, torch.randn(72, device="cuda", dtype=torch.bfloat16))]
    before = paths()
    low_rank(*inputs).sum().backward()
    assert paths()["kernels"] == before["kernels"] + 1 and all(t.grad.shape == t.shape for t in inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("wrong, text", [
    (dict(dy=torch.ones(6, 7)), "dy must be"), (dict(h=torch.ones(6, 3)), "h must be"),
    (dict(u=torch.ones(8, 5)), "u has rank 5, v has rank 4"), (dict(x=torch.ones(6, 9).double()), "one dtype")])
def test_mistakes_are_named(wrong, text):
    sizes = dict(dy=torch.ones(6, 8), x=torch.ones(6, 9), h=torch.ones(6, 4), v=torch.ones(4, 9), u=torch.ones(8, 4))
    given = [t.cuda() for t in (sizes | wrong).values()]
    with pytest.raises(RuntimeError, match=f"low_rank_backward: .*{text}"):
        OPS.low_rank_backward(*given, 15)
    with pytest.raises(RuntimeError, match=f"low_rank_backward_into: .*{text}"):
        OPS.low_rank_backward_into(*given, None, None, None, True)
