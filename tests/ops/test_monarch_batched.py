"""The batched kernel of monarch on a GPU: for which problems it is planned, that it runs there, and passes the gates."""
import pytest
import torch

import gates
from lowfat import _native
from lowfat.ops.monarch import reference
from ops.test_monarch import known, normal, whole

OPS = torch.ops.lowfat
needs_library = pytest.mark.skipif(_native.native is None, reason=f"no compiled library: {_native.why_not}")
FORMS = [pytest.param(True, id="monarch"), pytest.param(False, id="blockwise")]
# m, k, n, blocks in and out, rank: every tile; groups of blocks; single elements; inputs and outputs that are padded
SHAPES = {"smallest": (1, 8, 8, 1, 1, 8), "decode": (16, 3840, 3840, 60, 60, 2), "few blocks": (300, 1024, 1024, 4, 4, 64),
          "large tiles": (4100, 1024, 1032, 2, 2, 128), "many blocks": (520, 3840, 3840, 60, 60, 2),
          "ragged": (70, 208, 163, 9, 4, 24), "a block of padding": (33, 120, 40, 16, 2, 16),
          "odd ranks": (130, 1024, 999, 8, 5, 7), "bert": (4096, 768, 768, 4, 4, 48), "one block": (100, 776, 520, 1, 1, 72)}


def config(**changes) -> dict:
    problem = dict(m=4096, n=3840, k=3840, r=2, b_in=60, b_out=60, device="cuda")
    return _native.native.choose_config("monarch", **{**problem, **changes})


@needs_library
@pytest.mark.parametrize(("path", "changes"), [
    ("empty", {"m": 0}), ("batched", {}), ("batched", {"m": 1}), ("batched", {"m": 1 << 20}),
    ("batched", {"dtype": "float16"}), ("library", {"dtype": "float32"}), ("library", {"is_aligned": False}),
    ("library", {"arch": 100}), ("library", {"k": 3836}), ("batched", {"n": 3839}), ("library", {"b_in": 58}),
    ("library", {"b_in": 2}), ("batched", {"b_in": 4, "r": 6}), ("batched", {"arch": 80, "sm_count": 108}),
    ("batched", {"arch": 86, "sm_count": 84}), ("batched", {"interleave": False})])
def test_the_path_follows_what_the_kernel_covers(path, changes):
    assert config(**changes)["path"] == path


@needs_library
def test_blocks_share_a_store_as_far_as_their_results_lie_between_each_other():
    many = config(n=4096, k=4096, r=1, b_in=64, b_out=64, arch=80, sm_count=108)  # an sm_90 has clusters for it
    assert (many["first_group"], many["second_group"], many["second_stores"]) == (16, 16, "16 bytes")
    few = config(b_in=4, b_out=4, r=256)
    assert (few["first_group"], few["second_group"]) == (1, 4)
    assert config(b_in=4, b_out=4, r=256, interleave=False)["second_group"] == 1
    assert config(n=3839)["second_stores"] == "elements"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("interleave", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernel_runs_and_passes_the_gates(shape, interleave, dtype):
    n, before = shape[2], _native.calls("monarch", "cuda", "batched")
    args = normal(*shape, dtype, "cuda")
    y = gates.check_call(lambda *a: OPS.monarch(*a, n, interleave), args)
    assert gates.failed_gates(y, reference(*args, n, interleave), known(*args, n, interleave)) == []
    assert torch.equal(OPS.monarch_training(*args, n, interleave)[0], y)
    exact = whole(*shape, dtype, "cuda")
    assert gates.exact_gate(OPS.monarch(*exact, n, interleave), reference(*(t.double() for t in exact), n, interleave))
    assert _native.calls("monarch", "cuda", "batched") >= before + 3


@pytest.mark.gpu
def test_what_the_kernel_does_not_cover_is_the_librarys():
    for dtype, shape in ((torch.float32, SHAPES["bert"]), (torch.bfloat16, (65, 301, 130, 3, 4, 7))):
        before = _native.calls("monarch", "cuda", "library")
        args = normal(*shape, dtype, "cuda")
        OPS.monarch(*args, shape[2], True)
        assert _native.calls("monarch", "cuda", "library") == before + 1
