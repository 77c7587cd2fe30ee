"""The backward kernels of sparse24 on a GPU: for which problems they are planned, that they run there, pass the gates."""
import pytest
import torch

import gates
from lowfat import _native
from lowfat.ops import bitmap, sparse24
from lowfat.ops.sparse24 import reference_backward

OPS = torch.ops.lowfat
ALL = 0b1011
NAMES = "dx", "dvalues", "db"
needs_library = pytest.mark.skipif(_native.native is None, reason=f"no compiled library: {_native.why_not}")
# m, k, n, kept, group: both tiles, ragged; runs that begin anywhere; groups that tiles cut; splits; a layer of a model
CASES = {"small": (65, 200, 136, 2, 4), "large": (257, 264, 136, 2, 4), "odd runs": (130, 136, 264, 1, 4),
         "4:8": (100, 456, 504, 4, 8), "cut groups": (300, 280, 104, 3, 5), "all kept": (65, 72, 80, 4, 4),
         "split": (4099, 136, 72, 2, 4), "layer": (2048, 4096, 4096, 2, 4)}


def paths() -> dict[str, int]:
    return {path: _native.calls("sparse24_backward", "cuda", path) for path in ("kernels", "library")}


def mask_of(n: int, k: int, kept: int, group: int) -> torch.Tensor:
    ranks = torch.rand(n, k // group, group).argsort(-1).argsort(-1)
    return bitmap.pack((ranks < kept).flatten(1))


def operands(m, k, n, kept, group, dtype, device="cuda"):
    """dy, x, values, mask; dy not uniform, not contiguous."""
    dy = torch.randn(n, m).T * torch.linspace(0.02, 0.4, m)[:, None]
    x, values = torch.randn(m, k), torch.randn(n, k // group * kept)
    return *(t.to(device, dtype) for t in (dy, x, values)), mask_of(n, k, kept, group).to(device)


def known_gradients(dy, x, values, mask, kept, group) -> list[gates.Chain]:
    """What the gates need to know of dx, dvalues, db, which have no rounded middle."""
    wide = [t.double() for t in (dy, x, values)]
    exact, magnitudes = (reference_backward(*given, mask, ALL, kept, group) for given in (wide, [t.abs() for t in wide]))
    return [gates.Chain(y64, [], magnitude, length, y64.numel())
            for y64, magnitude, length in zip(exact, magnitudes, (len(values), len(x), len(x)))]


def config(**changes) -> dict:
    problem = dict(m=4096, n=4096, k=4096, device="cuda")
    return _native.native.choose_config("sparse24_backward", **{**problem, **changes})


@needs_library
@pytest.mark.parametrize(("path", "changes"), [
    ("empty", {"m": 0}), ("kernels", {}), ("kernels", {"m": 64}), ("library", {"m": 63}), ("kernels", {"dtype": "float16"}),
    ("library", {"dtype": "float32"}), ("library", {"dtype": "float64"}), ("library", {"is_aligned": False}),
    ("library", {"arch": 100}), ("library", {"arch": 75}), ("kernels", {"arch": 80, "sm_count": 108}),
    ("kernels", {"arch": 86, "sm_count": 84}), ("library", {"k": 4092}), ("library", {"n": 4092}), ("kernels", {"n": 4088}),
    ("kernels", {"kept": 1, "group": 8}), ("kernels", {"k": 4000, "kept": 3, "group": 5}), ("library", {"group": 5}),
    ("library", {"kept": 5}), ("library", {"kept": 0}), ("library", {"m": 1 << 40})])
def test_the_path_follows_what_the_kernels_cover(path, changes):
    assert config(**changes)["path"] == path


@needs_library
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_what_is_run_on_a_gpu_below_is_planned_for_the_kernels(shape):
    sizes = dict(zip(("m", "k", "n", "kept", "group"), shape))
    for gpu in ({}, {"arch": 80, "sm_count": 108}, {"arch": 86, "sm_count": 84}):
        assert config(**sizes, **gpu)["path"] == "kernels"


@needs_library
def test_the_plan_is_told():
    assert config(n=512, k=512) == {"path": "kernels", "tile": 128, "dx_splits": 2, "values_splits": 16, "starts": 0,
                                    "partials": 2 * 4096 * 512}
    assert config(k=4000, kept=3, group=5)["starts"] == 4096 * 32
    assert _native.kernels()["sparse24_backward"]["cuda"] == _native.kernels()["low_rank"]["cuda"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_kernels_within_the_gates(shape, dtype):
    *_, kept, group = shape
    given, before = operands(*shape, dtype), paths()
    found = gates.check_call(OPS.sparse24_backward, (*given, ALL, kept, group))
    assert paths() == before | {"kernels": before["kernels"] + 2}  # check_call calls twice
    plain = reference_backward(*given, ALL, kept, group)
    for name, mine, theirs, chain in zip(NAMES, found, plain, known_gradients(*given, kept, group)):
        assert gates.failed_gates(mine, theirs, chain) == [], name
    dy, x, values, mask = given
    dy = (torch.randint(-1, 2, dy.shape, device="cuda") * (torch.rand(dy.shape, device="cuda") < 4 / len(dy))).to(dtype)
    x, values = (torch.randint_like(t, -1, 2) for t in (x, values))
    exact = reference_backward(*(t.double() for t in (dy, x, values)), mask, ALL, kept, group)
    for name, mine, theirs in zip(NAMES, OPS.sparse24_backward(dy, x, values, mask, ALL, kept, group), exact):
        assert theirs.abs().max() > 256 or gates.exact_gate(mine, theirs), name  # beyond, bf16 cannot hold it


@pytest.mark.gpu
@pytest.mark.parametrize("needs", [1, 2, 3, 8, 9, 10, 11])
def test_kernels_compute_what_is_needed(needs):
    given, before = operands(65, 200, 136, 2, 4, torch.bfloat16), paths()
    all_of_them, found = (OPS.sparse24_backward(*given, which, 2, 4) for which in (ALL, needs))
    assert paths() == before | {"kernels": before["kernels"] + 2}
    for bit, mine, known in zip((1, 2, 8), found, all_of_them):
        assert torch.equal(mine, known) if needs & bit else mine.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, shape", [
    (torch.bfloat16, (63, 200, 136, 2, 4)), (torch.float16, (65, 204, 131, 1, 4)),
    (torch.float32, (65, 200, 136, 3, 5)), (torch.float64, (65, 64, 48, 2, 4)), (torch.bfloat16, (65, 0, 48, 2, 4)),
    (torch.bfloat16, (65, 64, 0, 2, 4))])
def test_the_library_does_the_rest(dtype, shape):
    *_, kept, group = shape
    dy, x, values, mask = operands(*shape, dtype)
    dy, before = dy.contiguous(), paths()  # as the op makes it: the library may sum another layout in another order
    found = OPS.sparse24_backward(dy, x, values, mask, ALL, kept, group)
    assert paths() == before | {"library": before["library"] + 1}
    for name, mine, known in zip(NAMES, found, reference_backward(dy, x, values, mask, ALL, kept, group)):
        assert torch.equal(mine, known), name


@pytest.mark.gpu
@pytest.mark.parametrize("needs", [ALL, 1, 2, 8])
def test_no_tokens_are_no_work(needs):
    given, before = operands(0, 200, 136, 2, 4, torch.bfloat16), paths()
    found = OPS.sparse24_backward(*given, needs, 2, 4)
    assert paths() == before
    for name, mine, known in zip(NAMES, found, reference_backward(*given, needs, 2, 4)):
        assert torch.equal(mine, known), name


@pytest.mark.gpu
def test_autograd_reaches_the_kernels():
    _, x, values, mask = operands(130, 264, 72, 2, 4, torch.bfloat16)
    inputs = [t.requires_grad_() for t in (x, values, torch.randn(72, device="cuda", dtype=torch.bfloat16))]
    before = paths()
    sparse24(inputs[0], inputs[1], mask, inputs[2]).sum().backward()
    assert paths()["kernels"] == before["kernels"] + 1 and all(t.grad.shape == t.shape for t in inputs)


# A mask that is no 2:4: numbers of some kind, the same each time, and no access outside.
@pytest.mark.gpu
@pytest.mark.parametrize("word", [0, -1, 0x12345678])
@pytest.mark.parametrize("m", [65, 8])
def test_a_wrong_mask_does_no_harm(word, m):
    dy, x, values, mask = operands(m, 200, 136, 2, 4, torch.bfloat16)
    gates.check_call(OPS.sparse24_backward, (dy, x, values, torch.full_like(mask, word), ALL, 2, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("wrong, text", [
    (dict(dy=torch.ones(6, 7)), "dy must be"), (dict(dy=torch.ones(6, 8).double()), "dy must have one dtype"),
    (dict(x=torch.ones(6, 8)), "values"), (dict(mask=torch.ones(8, 2, dtype=torch.int32)), "mask")])
def test_mistakes_are_named(wrong, text):
    sizes = dict(dy=torch.ones(6, 8), x=torch.ones(6, 16), values=torch.ones(8, 8),
                 mask=torch.full((8, 1), 0x3333, dtype=torch.int32)) | wrong
    with pytest.raises(RuntimeError, match=text):
        OPS.sparse24_backward(*(t.cuda() for t in sizes.values()), ALL, 2, 4)
