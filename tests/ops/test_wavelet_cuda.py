"""The kernels of wavelet on a GPU, forward and backward: for which problems they are planned, that they run there, pass the
gates."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import gates  # noqa: E402
from test_wavelet import known, normal  # noqa: E402  (beside this file)

from lowfat import _native  # noqa: E402
from lowfat.ops import wavelet  # noqa: E402
from lowfat.ops.wavelet import reference_backward, reference_training  # noqa: E402

OPS = torch.ops.lowfat
ALL = 0b1011
PAIRS = {"LL": 1, "diag": 2, "all": 4}
needs_library = pytest.mark.skipif(_native.native is None, reason=f"no compiled library: {_native.why_not}")
# m, k, n, rank: one row; ragged; half a step of the tensor core; a middle of several tiles; many rows; a layer of a model
CASES = {"row": (1, 768, 384, 8), "ragged": (65, 336, 272, 24), "narrow": (130, 176, 160, 8), "wide": (70, 144, 528, 64),
         "tall": (4099, 144, 80, 16), "layer": (2048, 4096, 4096, 8)}


def paths(op: str = "wavelet") -> dict[str, int]:
    return {path: _native.calls(op, "cuda", path) for path in ("kernels", "reference")}


def operands(shape, subbands, dtype, device="cuda"):
    """dy, x, v, u; dy not uniform, not contiguous."""
    m, _, n, _ = shape
    x, v, _, u = normal(*shape, 1, subbands, dtype, device)
    dy = (torch.randn(n, m).T * torch.linspace(0.02, 0.4, m)[:, None]).to(device, dtype)
    return dy, x, v, u


def config(op="wavelet", **changes) -> dict:
    problem = dict(m=4096, n=4096, k=4096, r=8, pairs=2, device="cuda")
    return _native.native.choose_config(op, **{**problem, **changes})


@needs_library
@pytest.mark.parametrize("op", ["wavelet", "wavelet_backward"])
@pytest.mark.parametrize(("path", "changes"), [
    ("empty", {"m": 0}), ("kernels", {}), ("kernels", {"m": 1}), ("kernels", {"dtype": "float16"}),
    ("kernels", {"pairs": 1}), ("kernels", {"pairs": 4}), ("reference", {"pairs": 0}),
    ("reference", {"pairs": 3}), ("reference", {"dtype": "float32"}),
    ("reference", {"dtype": "float64"}), ("reference", {"is_aligned": False}), ("reference", {"arch": 100}),
    ("reference", {"arch": 75}), ("kernels", {"arch": 80, "sm_count": 108}), ("kernels", {"arch": 86, "sm_count": 84}),
    ("reference", {"k": 4088}), ("reference", {"n": 4088}), ("kernels", {"n": 4080}), ("reference", {"r": 4}),
    ("reference", {"r": 12}), ("kernels", {"r": 64, "pairs": 4}), ("reference", {"r": 72, "pairs": 4}),
    ("kernels", {"r": 256, "pairs": 1}), ("reference", {"r": 264, "pairs": 1}),
    ("reference", {"m": 1 << 40}), ("reference", {"r": 1 << 40})])
def test_the_path_follows_what_the_kernels_cover(path, changes, op):
    assert config(op, **changes)["path"] == path


@needs_library
def test_shared_memory_of_smaller_gpus_is_enough_or_not_used():
    assert config(arch=86, sm_count=84, r=64, pairs=4)["path"] == "reference"


@needs_library
@pytest.mark.parametrize("subbands", PAIRS)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_what_is_run_on_a_gpu_below_is_planned_for_the_kernels(shape, subbands):
    sizes = dict(zip(("m", "k", "n", "r"), shape), pairs=PAIRS[subbands])
    for gpu in ({}, {"arch": 80, "sm_count": 108}):
        assert config(**sizes, **gpu)["path"] == config("wavelet_backward", **sizes, **gpu)["path"] == "kernels"


@needs_library
def test_the_plan_is_told():
    assert config() == {"path": "kernels", "splits": 4, "parts": 4, "partials": 4 * 4096 * 16}
    assert config("wavelet_backward") == {"path": "kernels", "dx_splits": 4, "dx_parts": 4, "weight_splits": 2,
                                          "partials": 4 * 4096 * 16}
    assert _native.kernels()["wavelet"]["cuda"] == _native.kernels()["wavelet_backward"]["cuda"] == (
        _native.kernels()["low_rank"]["cuda"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("subbands", PAIRS)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_forward_within_the_gates(shape, subbands, dtype):
    _, x, v, u = operands(shape, subbands, dtype)
    options, before = ("haar", 1, subbands, shape[2], 0.3), paths()
    y = gates.check_call(lambda *a: OPS.wavelet(*a, *options), (x, v, None, u))
    kept, h = gates.check_call(lambda *a: OPS.wavelet_training(*a, *options), (x, v, None, u))
    assert paths() == before | {"kernels": before["kernels"] + 4}  # check_call calls twice
    plain, middle = reference_training(x, v, None, u, *options)
    exact = reference_training(x.double(), v.double(), None, u.double(), *options)[1]
    assert torch.equal(kept, y)
    assert gates.failed_gates(y.cpu(), plain.cpu(), known(x, v, None, u, *options)) == []
    assert gates.norm_gate(h, middle, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("subbands", PAIRS)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_gradients_within_the_gates(shape, subbands, dtype):
    dy, x, v, u = operands(shape, subbands, dtype)
    options = "haar", 1, subbands, shape[2], 0.3
    h = reference_training(x, v, None, u, *options)[1]
    for middle in (h, None):
        before = paths("wavelet_backward")
        found = gates.check_call(lambda *a: OPS.wavelet_backward(*a, ALL, *options), (dy, x, middle, v, None, u))
        assert paths("wavelet_backward") == before | {"kernels": before["kernels"] + 2}
        plain = reference_backward(dy, x, middle, v, None, u, ALL, *options)
        wide = [None if t is None else t.double() for t in (dy, x, middle, v, None, u)]
        wide_found = reference_backward(*wide, ALL, *options)
        for name, mine, theirs, exact in zip(("dx", "dv", "dgain", "du"), found, plain, wide_found):
            assert mine.shape == exact.shape
            assert name == "dgain" or gates.norm_gate(mine, theirs, exact) and gates.max_gate(mine, theirs, exact), name


@pytest.mark.gpu
@pytest.mark.parametrize("needs", [1, 2, 3, 8, 9, 10, 11])
@pytest.mark.parametrize("keeps", [False, True], ids=["recomputed", "kept"])
def test_kernels_compute_what_is_needed(needs, keeps):
    dy, x, v, u = operands((65, 208, 144, 16), "all", torch.bfloat16)
    options, before = ("haar", 1, "all", 144, 0.3), paths("wavelet_backward")
    h = OPS.wavelet_training(x, v, None, u, *options)[1] if keeps else None
    everything, found = (OPS.wavelet_backward(dy, x, h, v, None, u, which, *options) for which in (ALL, needs))
    assert paths("wavelet_backward") == before | {"kernels": before["kernels"] + 2}
    for bit, mine, due in zip((1, 2, 4, 8), found, everything):
        assert torch.equal(mine, due) if needs & bit else mine.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, shape, filter, levels, subbands, gains", [
    (torch.float32, (65, 64, 48, 8), "haar", 1, "diag", False), (torch.float64, (65, 64, 48, 8), "haar", 1, "diag", False),
    (torch.bfloat16, (65, 65, 48, 8), "haar", 1, "diag", False), (torch.bfloat16, (65, 64, 40, 8), "haar", 1, "diag", False),
    (torch.bfloat16, (65, 64, 48, 7), "haar", 1, "diag", False), (torch.bfloat16, (65, 64, 48, 8), "haar", 2, "diag", False),
    (torch.bfloat16, (65, 64, 48, 8), "db2", 1, "diag", False), (torch.bfloat16, (65, 64, 48, 8), "haar", 1, "diag", True),
    (torch.float16, (65, 64, 48, 8), "haar", 1, "shared+gain", True)])
def test_the_reference_does_the_rest(dtype, shape, filter, levels, subbands, gains):
    x, v, gain, u = normal(*shape, levels, subbands, dtype, "cuda")
    gain, options = gain if gains else None, (filter, levels, subbands, shape[2], 0.3)
    dy, before = torch.randn(shape[0], shape[2]).to(x), (paths(), paths("wavelet_backward"))
    y, h = OPS.wavelet_training(x, v, gain, u, *options)
    found = OPS.wavelet_backward(dy, x, h, v, gain, u, 15, *options)
    for op, was in zip(("wavelet", "wavelet_backward"), before):
        assert paths(op) == was | {"reference": was["reference"] + 1}
    assert torch.equal(y, reference_training(x, v, gain, u, *options)[0])
    for mine, due in zip(found, reference_backward(dy, x, h, v, gain, u, 15, *options)):
        assert torch.equal(mine, due)


@pytest.mark.gpu
def test_autograd_reaches_the_kernels():
    _, x, v, u = (t.requires_grad_() for t in operands((130, 176, 160, 8), "diag", torch.bfloat16))
    before = paths(), paths("wavelet_backward")
    wavelet(x, v, u, out_features=160).sum().backward()
    for op, was in zip(("wavelet", "wavelet_backward"), before):
        assert paths(op) == was | {"kernels": was["kernels"] + 1}
    assert all(t.grad.shape == t.shape for t in (x, v, u))
