"""The weight-stationary clusters of monarch on an sm_90: for which problems they are planned, that they run there, and pass
the gates."""
import pytest
import torch

import gates
from lowfat import _native
from lowfat.ops.monarch import reference, reference_training
from ops.test_monarch import known, normal, whole

OPS = torch.ops.lowfat
needs_library = pytest.mark.skipif(_native.native is None, reason=f"no compiled library: {_native.why_not}")
FORMS = [pytest.param(True, id="monarch"), pytest.param(False, id="blockwise")]
# m, k, n, blocks in and out, rank: one token, both tiles, stores of each width, slabs that are not full, padded inputs
SHAPES = {"smallest": (1, 256, 256, 16, 16, 1), "decode": (16, 4096, 4096, 64, 64, 1), "many": (4099, 4096, 4096, 64, 64, 1),
          "ranks": (300, 1272, 768, 16, 32, 3), "padded": (70, 488, 1016, 32, 16, 2), "long": (33, 1280, 1024, 16, 64, 2)}
SMEM = 227 << 10  # bytes that a block may have


def config(**changes) -> dict:
    problem = dict(m=4096, n=4096, k=4096, r=1, b_in=64, b_out=64, device="cuda")
    return _native.native.choose_config("monarch", **{**problem, **changes})


@needs_library
@pytest.mark.parametrize(("path", "changes"), [
    ("empty", {"m": 0}), ("stationary", {}), ("stationary", {"m": 1}), ("stationary", {"m": 1 << 20}),
    ("stationary", {"dtype": "float16"}), ("library", {"dtype": "float32"}), ("library", {"is_aligned": False}),
    ("stationary", {"interleave": False}), ("stationary", {"n": 4088}), ("stationary", {"n": 4080, "b_out": 16}),
    ("batched", {"n": 4080, "b_out": 16, "interleave": False}),
    ("batched", {"arch": 80, "sm_count": 108}), ("batched", {"sm_count": 7}), ("stationary", {"sm_count": 8}),
    ("batched", {"n": 4092}), ("stationary", {"k": 4088}), ("batched", {"k": 3840, "b_in": 60, "r": 2}),
    ("batched", {"b_out": 56}), ("batched", {"b_in": 8, "b_out": 8, "r": 8}), ("stationary", {"b_in": 16, "b_out": 16}),
    ("batched", {"k": 4096 + 64 * 8}), ("batched", {"r": 4}), ("stationary", {"b_in": 32, "b_out": 32, "r": 2}),
    ("batched", {"b_in": 32, "b_out": 32, "r": 4})])
def test_the_path_follows_what_the_kernel_covers(path, changes):
    assert config(**changes)["path"] == path


@needs_library
def test_tiles_are_as_large_as_there_are_tokens_and_room():
    assert {name: config()[name] for name in ("tokens", "together", "middles", "clusters", "tiles")} == {
        "tokens": 16, "together": 8, "middles": 2, "clusters": 16, "tiles": 256}
    small = dict(n=1024, k=1024, b_in=32, b_out=32)
    assert [config(**small, m=m)["tokens"] for m in (1, 256, 257)] == [16, 16, 32]
    assert [config(**small, m=m)["clusters"] for m in (1, 100, 257, 4096)] == [1, 7, 9, 16]
    assert [config(**{**small, "b_out": b})["together"] for b in (16, 32, 48, 64)] == [2, 4, 2, 8]


@needs_library
def test_plans_have_room_and_their_tiles():
    planned = 0
    for blocks in range(16, 129, 16):
        for size in (256, 768, 1024, 2048, 3072, 4096):
            for r in (1, 2, 3, 4, 8):
                for m in (1, 16, 17, 300, 20000):
                    found = config(m=m, n=size, k=size, r=r, b_in=blocks, b_out=blocks)
                    if found["path"] != "stationary":
                        continue
                    planned += 1
                    assert found["smem_bytes"] <= SMEM and found["inputs"] >= 1 and found["middles"] in (1, 2)
                    assert 1 <= found["clusters"] <= min(16, found["tiles"])
                    assert (found["tiles"] - 1) * found["tokens"] < m <= found["tiles"] * found["tokens"]
                    bytes_of_both = 2 * (blocks * r * size + size * blocks * r)
                    assert bytes_of_both / 8 < found["smem_bytes"]  # of each of 8
    assert planned > 100


def is_sm_90() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not is_sm_90(), reason="the kernel is machine code for sm_90 alone")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("interleave", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernel_runs_and_passes_the_gates(shape, interleave, dtype):
    n, before = shape[2], _native.calls("monarch", "cuda", "stationary")
    args = normal(*shape, dtype, "cuda")
    y = gates.check_call(lambda *a: OPS.monarch(*a, n, interleave), args)
    assert gates.failed_gates(y, reference(*args, n, interleave), known(*args, n, interleave)) == []
    assert torch.equal(OPS.monarch_training(*args, n, interleave)[0], y)
    exact = whole(*shape, dtype, "cuda")
    found = OPS.monarch_training(*exact, n, interleave)
    for ours, true in zip(found, reference_training(*(t.double() for t in exact), n, interleave), strict=True):
        assert gates.exact_gate(ours, true)
    assert _native.calls("monarch", "cuda", "stationary") >= before + 3
