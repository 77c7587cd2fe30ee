"""The backward of dictionary on a GPU: for which problems its kernels are planned, that they run there, pass the gates."""
import pytest
import torch

import gates
from lowfat import _native
from lowfat.ops import bitmap, dictionary
from lowfat.ops.dictionary import reference_backward, reference_training

OPS = torch.ops.lowfat
ALL = 0b10111
NAMES = "dx", "dd", "dvalues", "db"
needs_library = pytest.mark.skipif(_native.native is None, reason=f"no compiled library: {_native.why_not}")
# m, k, n, P, Q, atoms, non-zeros: both tiles; blocks, inputs and outputs that they do not divide; a layer of a model
CASES = {"small": (65, 200, 136, 1, 1, 40, 7), "large": (257, 264, 136, 1, 1, 264, 132),
         "blocks": (130, 96, 144, 2, 3, 24, 5), "padded": (70, 100, 136, 9, 3, 16, 3),
         "large blocks": (300, 272, 272, 2, 2, 136, 60), "layer": (2048, 4096, 4096, 1, 1, 2048, 1024)}


def paths() -> dict[str, int]:
    return {path: _native.calls("dictionary_backward", "cuda", path) for path in ("kernels", "library")}


def support_of(n, q, a, s, form):
    """Bitmap or positions, and the same in bool [n, Q, a]."""
    kept = torch.rand(n, q, a).argsort(-1).argsort(-1) < s
    if form == "bitmap":
        return bitmap.pack(kept).flatten(1)
    return kept.nonzero()[:, -1].view(n, q * s).to(torch.int16)


def operands(m, k, n, p, q, a, s, form, dtype, device="cuda"):
    """dy, x, d, values, support; dy not uniform, not contiguous."""
    dy = torch.randn(n, m).T * torch.linspace(0.02, 0.4, m)[:, None]
    x, d, values = torch.randn(m, k), torch.randn(p, q, a, -(-k // q)) / (k / q)**0.5, torch.randn(n, q * s) / (q * s)**0.5
    return *(t.to(device, dtype) for t in (dy, x, d, values)), support_of(n, q, a, s, form).to(device)


def config(**changes) -> dict:
    problem = dict(m=4096, n=4096, k=4096, r=2048, kept=1024, device="cuda")
    return _native.native.choose_config("dictionary_backward", **{**problem, **changes})


@needs_library
@pytest.mark.parametrize(("path", "changes"), [
    ("empty", {"m": 0}), ("kernels", {}), ("kernels", {"m": 64}), ("library", {"m": 63}), ("kernels", {"dtype": "float16"}),
    ("library", {"dtype": "float32"}), ("library", {"is_aligned": False}), ("library", {"arch": 100}),
    ("kernels", {"arch": 80, "sm_count": 108}), ("library", {"r": 2044}), ("library", {"n": 4092}),
    ("kernels", {"k": 4095}), ("kernels", {"b_in": 4, "b_out": 8, "r": 64, "kept": 16}),
    ("library", {"b_in": 4, "b_out": 1000, "r": 64, "kept": 16}), ("library", {"kept": 0}), ("library", {"kept": 2049}),
    ("library", {"m": 1 << 40})])
def test_the_path_follows_what_the_kernels_cover(path, changes):
    assert config(**changes)["path"] == path


@needs_library
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_what_is_run_on_a_gpu_below_is_planned_for_the_kernels(shape):
    sizes = dict(zip(("m", "k", "n", "b_out", "b_in", "r", "kept"), shape))
    for gpu in ({}, {"arch": 80, "sm_count": 108}, {"arch": 86, "sm_count": 84}):
        assert config(**sizes, **gpu)["path"] == "kernels"


@needs_library
def test_the_plan_is_told():
    assert config(n=512, r=512, kept=100) == {"path": "kernels", "tile": 128, "dh_splits": 2, "values_splits": 16,
                                              "starts": 512 * 4, "partials": 2 * 4096 * 512}
    assert _native.kernels()["dictionary_backward"]["cuda"] == _native.kernels()["low_rank"]["cuda"]


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["bitmap", "positions"])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_kernels_within_the_gates(shape, dtype, form):
    dy, x, d, values, support = operands(*shape, form, dtype)
    h, before = reference_training(x, d, values, support, None)[1], paths()
    found = gates.check_call(OPS.dictionary_backward, (dy, x, h, d, values, support, ALL))
    assert paths() == before | {"kernels": before["kernels"] + 2}  # check_call calls twice
    plain = reference_backward(dy, x, h, d, values, support, ALL)
    wide = [t.double() for t in (dy, x, h, d, values)]
    exact, sizes = (reference_backward(*given, support, ALL) for given in (wide, [t.abs() for t in wide]))
    rms = reference_backward(*(t.square() for t in wide), support, ALL)  # not less than the spread of a rounded dh
    m, _, n, p, _, a, _ = shape
    lengths = -(-n // p) + p * a, -(-n // p) + m, m, m
    for i, name in enumerate(NAMES):
        mids = [rms[i].sqrt()] if i < 2 else []
        chain = gates.Chain(exact[i], mids, sizes[i], lengths[i], exact[i].numel())
        assert gates.failed_gates(found[i], plain[i], chain) == [], name


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["bitmap", "positions"])
@pytest.mark.parametrize("needs", [bits for bits in range(1, 32) if not bits & 8])
def test_kernels_compute_what_is_needed(needs, form):
    dy, x, d, values, support = operands(65, 96, 144, 2, 3, 24, 5, form, torch.bfloat16)
    before = paths()
    all_of_them, found = (OPS.dictionary_backward(dy, x, None, d, values, support, which) for which in (ALL, needs))
    assert paths() == before | {"kernels": before["kernels"] + 2}
    for bit, mine, known in zip((1, 2, 4, 16), found, all_of_them):
        assert torch.equal(mine, known) if needs & bit else mine.shape == (0,)


# Whole numbers, which every order of sums gives exactly.
@pytest.mark.gpu
@pytest.mark.parametrize("form", ["bitmap", "positions"])
@pytest.mark.parametrize("dtype, shape", [
    (torch.bfloat16, (63, 96, 144, 2, 3, 24, 5)), (torch.float16, (65, 30, 131, 1, 1, 12, 4)),
    (torch.float32, (65, 100, 136, 9, 3, 16, 3)), (torch.float64, (20, 10, 21, 4, 3, 5, 2))])
def test_the_library_does_the_rest(dtype, shape, form):
    dy, x, d, values, support = operands(*shape, form, dtype)
    dy, x, d, values = (torch.randint_like(t, -1, 2) for t in (dy.contiguous(), x, d, values))
    before = paths()
    found = OPS.dictionary_backward(dy, x, None, d, values, support, ALL)
    assert paths() == before | {"library": before["library"] + 1}
    for name, mine, known in zip(NAMES, found, reference_backward(dy, x, None, d, values, support, ALL)):
        assert torch.allclose(mine, known, rtol=gates.ROUNDOFF[dtype] * 4, atol=0), name


@pytest.mark.gpu
@pytest.mark.parametrize("needs", [ALL, 1, 2, 4, 16])
@pytest.mark.parametrize("form", ["bitmap", "positions"])
def test_no_tokens_are_no_work(form, needs):
    dy, x, d, values, support = operands(0, 96, 144, 2, 3, 24, 5, form, torch.bfloat16)
    before = paths()
    found = OPS.dictionary_backward(dy, x, None, d, values, support, needs)
    assert paths() == before
    for name, mine, known in zip(NAMES, found, reference_backward(dy, x, None, d, values, support, needs)):
        assert torch.equal(mine, known), name


@pytest.mark.gpu
def test_autograd_reaches_the_kernels():
    _, x, d, values, support = operands(130, 264, 72, 1, 1, 40, 9, "bitmap", torch.bfloat16)
    inputs = [t.requires_grad_() for t in (x, d, values, torch.randn(72, device="cuda", dtype=torch.bfloat16))]
    before = paths()
    dictionary(*inputs[:3], support, inputs[3]).sum().backward()
    assert paths()["kernels"] == before["kernels"] + 1 and all(t.grad.shape == t.shape for t in inputs)


# A support that is none: numbers of some kind, the same each time, and no access outside.
@pytest.mark.gpu
@pytest.mark.parametrize("form", ["bitmap", "positions"])
@pytest.mark.parametrize("word", [0, -1, 32767])
@pytest.mark.parametrize("m", [65, 8])
def test_a_wrong_support_does_no_harm(word, m, form):
    dy, x, d, values, support = operands(m, 96, 144, 2, 3, 24, 5, form, torch.bfloat16)
    gates.check_call(OPS.dictionary_backward, (dy, x, None, d, values, torch.full_like(support, word), ALL))


@pytest.mark.gpu
@pytest.mark.parametrize("wrong, text", [
    (dict(dy=torch.ones(6, 7)), "dy must be"), (dict(h=torch.ones(1, 6, 3)), "h must be"),
    (dict(dy=torch.ones(6, 8).double()), "dy and h must have one dtype"), (dict(x=torch.ones(6, 8)), "x has 8 features")])
def test_mistakes_are_named(wrong, text):
    sizes = dict(dy=torch.ones(6, 8), x=torch.ones(6, 9), h=torch.ones(1, 6, 4), d=torch.ones(1, 1, 4, 9),
                 values=torch.ones(8, 2), support=torch.full((8, 1), 3, dtype=torch.int32)) | wrong
    with pytest.raises(RuntimeError, match=text):
        OPS.dictionary_backward(*(t.cuda() for t in sizes.values()), ALL)
