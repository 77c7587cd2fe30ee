"""The backward kernels of monarch on a GPU: for which problems they are planned, that they run there, and pass the gates."""
import pytest
import torch

import gates
from lowfat import _native
from lowfat.bench.monarch_backward import known_gradients
from lowfat.ops import monarch
from lowfat.ops.monarch import reference_backward, reference_training
from ops.test_monarch import normal, whole

OPS = torch.ops.lowfat
needs_library = pytest.mark.skipif(_native.native is None, reason=f"no compiled library: {_native.why_not}")
# m, k, n, blocks in and out, rank: groups of 8, 4 and 2 blocks between each other and of runs; splits; padded inputs and
# outputs; every way of storing dz
BOTH = {"many blocks": (520, 4096, 4096, 64, 64, 1), "bert": (4096, 768, 768, 4, 4, 48),
        "one block": (100, 456, 504, 1, 1, 72), "padded outputs": (65, 256, 120, 8, 16, 1),
        "eight blocks": (300, 4096, 4096, 8, 8, 64)}
INTERLEAVED = {"padded inputs": (70, 208, 168, 9, 4, 8), "a block of padding": (64, 120, 136, 16, 2, 4),
               "odd ranks": (300, 80, 104, 2, 4, 12)}
RUNS = {"three blocks": (257, 72, 144, 1, 3, 8)}
CASES = [pytest.param(shape, interleave, id=f"{name}, {'monarch' if interleave else 'blockwise'}")
         for interleave, shapes in ((True, BOTH | INTERLEAVED), (False, BOTH | RUNS)) for name, shape in shapes.items()]
NAMES = "dx", "dv", "du", "db"


def paths() -> dict[str, int]:
    return {path: _native.calls("monarch_backward", "cuda", path) for path in ("kernels", "library")}


def given_dy(m: int, n: int, like: torch.Tensor) -> torch.Tensor:
    return (torch.randn(n, m) * torch.linspace(0.02, 0.4, m)).to(like).T  # not uniform, not contiguous


def config(**changes) -> dict:
    problem = dict(m=4096, n=4096, k=4096, r=1, b_in=64, b_out=64, device="cuda")
    return _native.native.choose_config("monarch_backward", **{**problem, **changes})


@needs_library
@pytest.mark.parametrize(("path", "changes"), [
    ("empty", {"m": 0}), ("kernels", {}), ("kernels", {"m": 64}), ("library", {"m": 63}), ("kernels", {"dtype": "float16"}),
    ("library", {"dtype": "float32"}), ("library", {"dtype": "float64"}), ("library", {"is_aligned": False}),
    ("library", {"arch": 100}), ("library", {"arch": 75}), ("kernels", {"arch": 80, "sm_count": 108}),
    ("kernels", {"arch": 86, "sm_count": 84}), ("kernels", {"interleave": False}), ("library", {"k": 4092}),
    ("library", {"n": 4092}), ("kernels", {"n": 4088}), ("library", {"n": 3840, "interleave": False}),
    ("kernels", {"b_in": 8, "b_out": 8, "r": 64}), ("library", {"b_in": 4, "b_out": 4, "r": 256}),
    ("library", {"b_out": 12, "r": 8}), ("kernels", {"b_out": 16, "r": 2}), ("library", {"b_in": 8, "b_out": 8, "r": 72}),
    ("library", {"m": 1 << 40}), ("library", {"b_out": 0}), ("library", {"r": 0})])
def test_the_path_follows_what_the_kernels_cover(path, changes):
    assert config(**changes)["path"] == path


@needs_library
@pytest.mark.parametrize(("shape", "interleave"), CASES)
def test_what_is_run_on_a_gpu_below_is_planned_for_the_kernels(shape, interleave):
    sizes = dict(zip(("m", "k", "n", "b_in", "b_out", "r"), shape))
    for gpu in ({}, {"arch": 80, "sm_count": 108}, {"arch": 86, "sm_count": 84}):
        assert config(**sizes, interleave=interleave, **gpu)["path"] == "kernels"


@needs_library
def test_the_plan_is_told():
    assert config() == {"path": "kernels", "dz_group": 8, "dz_grid": 1024, "dz_splits": 1, "dx_group": 1, "dx_grid": 1024,
                        "dx_splits": 1, "dv_group": 4, "dv_grid": 256, "dv_splits": 16, "du_group": 8, "du_grid": 256,
                        "du_splits": 16, "gathers": 1, "partials": 16 * (2 * 64**3 + 4096)}
    assert config(interleave=False)["gathers"] == 0
    assert _native.kernels()["monarch_backward"]["cuda"] == _native.kernels()["monarch"]["cuda"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(("shape", "interleave"), CASES)
def test_kernels_within_the_gates(shape, interleave, dtype):
    m, _, n, *_ = shape
    x, v, u, bias = normal(*shape, dtype, "cuda")
    dy, before = given_dy(m, n, x), paths()
    h = reference_training(x, v, u, bias, n, interleave)[1]
    found = gates.check_call(lambda *a: OPS.monarch_backward(*a, 15, n, interleave), (dy, x, h, v, u))
    assert paths() == before | {"kernels": before["kernels"] + 2}  # check_call calls twice
    plain = reference_backward(dy, x, h, v, u, 15, n, interleave)
    for name, mine, theirs, chain in zip(NAMES, found, plain, known_gradients(dy, x, None, v, u, n, interleave)):
        flat = (t.reshape(chain.y64.shape) for t in (mine, theirs))
        assert gates.failed_gates(*flat, chain) == [], name
    x, v, u, _ = whole(*shape, dtype, "cuda")
    dy = (torch.randint(-1, 2, (m, n), device="cuda") * (torch.rand(m, n, device="cuda") < 4 / m)).to(dtype)
    exact = reference_backward(*(None if t is None else t.double() for t in (dy, x, None, v, u)), 15, n, interleave)
    for name, mine, theirs in zip(NAMES, OPS.monarch_backward(dy, x, None, v, u, 15, n, interleave), exact):
        assert theirs.abs().max() > 256 or gates.exact_gate(mine, theirs), name  # beyond, bf16 cannot hold it


@pytest.mark.gpu
@pytest.mark.parametrize("needs", range(1, 16))
@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_kernels_compute_what_is_needed(needs, keep):
    x, v, u, bias = normal(65, 64, 48, 8, 4, 2, torch.bfloat16, "cuda")
    dy, before = given_dy(65, 48, x), paths()
    h = OPS.monarch_training(x, v, u, bias, 48, True)[1] if keep else None
    all_of_them, found = (OPS.monarch_backward(dy, x, h, v, u, which, 48, True) for which in (15, needs))
    assert paths() == before | {"kernels": before["kernels"] + 2}
    for i, (mine, known) in enumerate(zip(found, all_of_them)):
        assert torch.equal(mine, known) if needs >> i & 1 else mine.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, shape", [
    (torch.bfloat16, (63, 64, 48, 8, 4, 2)), (torch.bfloat16, (0, 64, 48, 8, 4, 2)),
    (torch.bfloat16, (65, 301, 130, 3, 4, 7)), (torch.float32, (65, 64, 48, 8, 4, 2))])
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_the_library_does_the_rest(dtype, shape, interleave, keep):
    m, _, n, *_ = shape
    x, v, u, bias = whole(*shape, dtype, "cuda")
    dy, before = torch.randint(-1, 2, (m, n), device="cuda").to(dtype), paths()
    h = reference_training(x, v, u, bias, n, interleave)[1] if keep else None
    found = OPS.monarch_backward(dy, x, h, v, u, 15, n, interleave)
    assert paths() == before | {"library": before["library"] + 1}
    for name, mine, known in zip(NAMES, found, reference_backward(dy, x, h, v, u, 15, n, interleave)):
        assert torch.equal(mine, known), name


@pytest.mark.gpu
def test_autograd_reaches_the_kernels():
    inputs = [t.requires_grad_() for t in normal(130, 264, 72, 3, 8, 8, torch.bfloat16, "cuda")]
    before = paths()
    monarch(*inputs, out_features=72).sum().backward()
    assert paths()["kernels"] == before["kernels"] + 1 and all(t.grad.shape == t.shape for t in inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("wrong, text", [
    (dict(dy=torch.ones(6, 7)), "dy must be"), (dict(h=torch.ones(2, 6, 5)), "h must be"), (dict(n=9), "n is 9"),
    (dict(u=torch.ones(2, 4, 5)), "u 5 columns"), (dict(x=torch.ones(6, 9).double()), "one dtype"),
    (dict(dy=torch.ones(6, 8).double()), "dy and h must have one dtype")])
def test_mistakes_are_named(wrong, text):
    sizes = dict(dy=torch.ones(6, 8), x=torch.ones(6, 9), h=torch.ones(2, 6, 6), v=torch.ones(3, 4, 3),
                 u=torch.ones(2, 4, 6), n=8) | wrong
    n = sizes.pop("n")
    with pytest.raises(RuntimeError, match=text):
        OPS.monarch_backward(*(t.cuda() for t in sizes.values()), 15, n, True)
