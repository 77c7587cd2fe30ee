"""The backward of low_rank_sparse on a GPU: for which problems its kernels are planned, that they run there, pass the
gates."""
import pytest
import torch

import gates
from lowfat import _native
from lowfat.bench.low_rank_sparse import both, scaled, sparse
from lowfat.ops import low_rank_sparse
from lowfat.ops.low_rank_sparse import reference_backward
from ops.test_low_rank_sparse_cuda import bad_supports, needs_library, operands

OPS = torch.ops.lowfat
ALL = 0b1001111
NAMES = "dx", "dv", "du", "dvalues", "db"
BITS = 1, 2, 4, 8, 64
# m, k, r, n, entries: both tiles, splits, a rank of its own kind, layers of models
CASES = {"small": (65, 200, 40, 72, 999), "large": (257, 264, 72, 136, 5001), "all entries": (70, 72, 8, 40, 2880),
         "sparse alone": (130, 136, 0, 200, 1703), "odd rank": (130, 136, 7, 200, 1703), "wide": (64, 33000, 8, 40, 5000),
         "bert": (512, 768, 192, 3072, 70779), "llama": (2048, 4096, 512, 4096, 503316)}


def paths() -> dict[str, int]:
    return {path: _native.calls("low_rank_sparse_backward", "cuda", path) for path in ("kernels", "library")}


def given(m, k, r, n, entries, dtype, **more):
    """dy, x, h, v, u, values, starts, columns, scale; dy not uniform, not contiguous."""
    x, v, u, values, starts, columns, _, scale = operands(m, k, r, n, entries, dtype, **more)
    dy = (torch.randn(n, m) * torch.linspace(0.02, 0.4, m)).to(x.device, dtype).T
    h = OPS.low_rank_sparse_training(x, v, u, values, starts, columns, None, scale)[1]
    return dy, x, h, v, u, values, starts, columns, scale


def config(**changes) -> dict:
    problem = dict(m=4096, n=4096, k=4096, r=512, entries=503316, device="cuda")
    return _native.native.choose_config("low_rank_sparse_backward", **{**problem, **changes})


@needs_library
@pytest.mark.parametrize(("path", "changes"), [
    ("empty", {"m": 0}), ("kernels", {}), ("kernels", {"m": 64}), ("library", {"m": 63}), ("kernels", {"dtype": "float16"}),
    ("library", {"dtype": "float32"}), ("library", {"is_aligned": False}), ("library", {"arch": 100}),
    ("kernels", {"arch": 80, "sm_count": 108}), ("kernels", {"r": 0}), ("kernels", {"r": 509}), ("library", {"n": 4092}),
    ("library", {"k": 4092}), ("library", {"entries": 0}), ("kernels", {"entries": 2**30}),
    ("library", {"entries": 2**30 + 1})])
def test_the_path_follows_what_the_kernels_cover(path, changes):
    assert config(**changes)["path"] == path


@needs_library
def test_the_plan_is_told():
    assert config() == {"path": "kernels", "tile": 128, "splits": 1, "partials": 0, "weight_tile": 128}
    assert config(n=512, k=512, r=0, entries=1001) == {"path": "kernels", "tile": 128, "splits": 16,
                                                    "partials": 16 * (1008 + 512), "weight_tile": 64}
    assert _native.kernels()["low_rank_sparse_backward"]["cuda"] == _native.kernels()["low_rank"]["cuda"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_kernels_within_the_gates(shape, dtype):
    dy, x, h, v, u, values, starts, columns, scale = args = given(*shape, dtype)
    before = paths()
    found = gates.check_call(lambda *a: OPS.low_rank_sparse_backward(*a[:8], ALL, a[8]), args)
    assert paths() == before | {"kernels": before["kernels"] + 2}  # check_call calls twice
    plain = reference_backward(*args[:8], ALL, scale)
    s = sparse(values, starts, columns, len(u), v.shape[1])
    chains = {name: scaled(chain, scale) for name, chain in gates.gradient_chains(dy, x, v, u).items() if name != "db"}
    chains["dx"] = both(chains["dx"], gates.chain(dy, s))
    at = sparse(torch.ones_like(values), starts, columns, *s.shape).bool()
    full = gates.chain(dy.T, x)
    chains["dvalues"] = gates.Chain(full.y64[at], [], full.magnitude[at], full.length, full.roundings)
    chains["db"] = gates.chain(torch.ones(1, len(dy), dtype=dtype, device=dy.device), dy)
    for name, mine, theirs in zip(NAMES, found, plain, strict=True):
        mine, theirs = ((t.T if name == "du" else t).reshape(chains[name].y64.shape) for t in (mine, theirs))
        assert gates.failed_gates(mine, theirs, chains[name]) == [], name


@pytest.mark.gpu
@pytest.mark.parametrize("needs", [bits for bits in range(1, 128) if not bits & 48])
@pytest.mark.parametrize("keep", [False, True])
def test_kernels_compute_what_is_needed(keep, needs):
    dy, x, h, v, u, values, starts, columns, scale = given(65, 136, 24, 72, 777, torch.bfloat16)
    before, kept = paths(), h if keep else None
    all_of_them, found = (OPS.low_rank_sparse_backward(dy, x, kept, v, u, values, starts, columns, which, scale)
                          for which in (ALL, needs))
    assert paths() == before | {"kernels": before["kernels"] + 2}
    for bit, mine, known in zip(BITS, found, all_of_them, strict=True):
        assert torch.equal(mine, known) if needs & bit else mine.shape == (0,)


# Whole numbers, which every order of sums gives exactly.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype, shape", [
    (torch.bfloat16, (63, 136, 24, 72, 777)), (torch.float16, (65, 99, 12, 131, 1301)),
    (torch.bfloat16, (65, 136, 8, 72, 0)), (torch.float32, (65, 136, 24, 72, 777)), (torch.float64, (20, 97, 0, 31, 77)),
    (torch.float64, (20, 97, 5, 31, 0))])
def test_the_library_does_the_rest(dtype, shape):
    dy, x, _, v, u, values, starts, columns, scale = given(*shape, dtype, is_whole=True)
    dy, before = torch.randint(-1, 2, dy.shape).to(dy), paths()
    found = OPS.low_rank_sparse_backward(dy, x, None, v, u, values, starts, columns, ALL, scale)
    assert paths() == before | {"library": before["library"] + 1}
    plain = reference_backward(dy, x, None, v, u, values, starts, columns, ALL, scale)
    for name, mine, known in zip(NAMES, found, plain, strict=True):
        assert torch.allclose(mine, known, rtol=gates.ROUNDOFF[dtype] * 4, atol=0), name


@pytest.mark.gpu
@pytest.mark.parametrize("needs", [ALL, *BITS])
def test_no_tokens_are_no_work(needs):
    dy, x, h, v, u, values, starts, columns, scale = given(0, 136, 24, 72, 777, torch.bfloat16)
    before = paths()
    found = OPS.low_rank_sparse_backward(dy, x, h, v, u, values, starts, columns, needs, scale)
    assert paths() == before
    plain = reference_backward(dy, x, h, v, u, values, starts, columns, needs, scale)
    for name, mine, known in zip(NAMES, found, plain, strict=True):
        assert torch.equal(mine, known), name


@pytest.mark.gpu
def test_autograd_reaches_the_kernels():
    x, v, u, values, starts, columns, bias, scale = operands(130, 264, 40, 72, 999, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, v, u, values, bias)]
    before = paths()
    low_rank_sparse(*leaves[:4], starts, columns, leaves[4], scale=scale).sum().backward()
    assert paths()["kernels"] == before["kernels"] + 1 and all(t.grad.shape == t.shape for t in leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, m", [(torch.bfloat16, 65), (torch.bfloat16, 8), (torch.float32, 65)])
def test_a_bad_support_does_no_harm(dtype, m):
    """Every gradient written, the same each time, and no access outside; 0 for an entry whose column there is not."""
    dy, x, h, v, u, values, starts, columns, scale = given(m, 136, 24, 72, 777, dtype)
    for bad in bad_supports(starts, columns, 136):
        args = (dy, x, h, v, u, values, *bad, scale)
        found = gates.check_call(lambda *a: OPS.low_rank_sparse_backward(*a[:8], ALL, a[8]), args)
        assert not found[3][(bad[1] < 0) | (bad[1] >= 136)].any()


@pytest.mark.gpu
@pytest.mark.parametrize("wrong, text", [
    (dict(dy=torch.ones(6, 7)), "dy .*must be"), (dict(h=torch.ones(6, 3)), "h .*must be"),
    (dict(dy=torch.ones(6, 8).double()), "dy and h must have one dtype"), (dict(x=torch.ones(6, 8)), "x has 8 features")])
def test_mistakes_are_named(wrong, text):
    sizes = dict(dy=torch.ones(6, 8), x=torch.ones(6, 9), h=torch.ones(6, 4), v=torch.ones(4, 9), u=torch.ones(8, 4),
                 values=torch.ones(8), starts=torch.arange(9, dtype=torch.int32), columns=torch.zeros(8).short()) | wrong
    with pytest.raises(RuntimeError, match=text):
        OPS.low_rank_sparse_backward(*(t.cuda() for t in sizes.values()), ALL, 1.0)
