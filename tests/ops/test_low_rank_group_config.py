"""Which plan the decode kernels of a group, of SwiGLU and of the pivoted form have for a problem."""
from itertools import product

import pytest
import torch

import lowfat
from lowfat import _native

pytestmark = pytest.mark.skipif(_native.native is None, reason=f"no compiled library: {_native.why_not}")
LLAMA = {"m": 1, "n": 4096, "k": 4096, "r": 512, "device": "cuda"}
OPS = ["low_rank_group", "low_rank_swiglu", "low_rank_pivoted"]


def config(op: str, **changes) -> dict:
    return _native.native.choose_config(op, **LLAMA | changes)


@pytest.mark.parametrize(("op", "members", "grid", "tiles"), [
    ("low_rank_group", 1, 128, 2), ("low_rank_group", 3, 128, 6), ("low_rank_group", 4, 128, 8),
    ("low_rank_swiglu", 1, 128, 4), ("low_rank_pivoted", 1, 128, 2)])
def test_blocks_have_equal_numbers_of_tiles(op, members, grid, tiles):
    found = config(op, members=members)
    assert (found["path"], found["grid"], found["tiles"]) == ("decode", grid, tiles)
    assert found["smem_bytes"] <= 227 << 10


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("path", "changes"), [
    ("empty", {"m": 0}), ("decode", {"m": 16}), ("none", {"m": 17}), ("none", {"dtype": "float32"}),
    ("decode", {"dtype": "float16"}), ("none", {"is_aligned": False}), ("none", {"r": 508}), ("none", {"arch": 100}),
    ("decode", {"arch": 80, "sm_count": 108}), ("decode", {"arch": 86, "sm_count": 84})])
def test_the_path_follows_what_the_kernel_covers(op, path, changes):
    instead = "library" if op == "low_rank_pivoted" else "members"  # one by one, by low_rank's own paths
    assert config(op, **changes)["path"] == (instead if path == "none" else path)


@pytest.mark.parametrize("op", lowfat.kernels())
def test_every_path_that_is_told_has_a_counter(op):
    """Kills a name that no call is counted under: who times an op asks for the calls of the path it was told."""
    for device in ("cpu", "cuda") if lowfat.build_info()["cuda"] else ("cpu",):
        if not lowfat.kernels()[op][device]:
            continue
        rows, others = (1, 16, 17, 64, 256, 300, 2048, 5000), ({}, {"is_aligned": False}, {"members": 5}, {"r": 12})
        dtypes, archs = ("float32", "bfloat16", "float16", "float64"), (75, 80, 86, 90, 100)
        for m, dtype, arch, more in product(rows, dtypes, archs, others):
            path = config(op, m=m, dtype=dtype, device=device, arch=arch, **more)["path"]
            assert _native.calls(op, device, path) >= 0  # raises where there is none


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("m", [1, 16, 17])
@pytest.mark.parametrize("op", OPS)
def test_a_call_on_a_cpu_is_counted_under_its_path(op, m, dtype):
    kind = getattr(torch, dtype)
    x, v, other = torch.ones(m, 40, dtype=kind), torch.ones(8, 40, dtype=kind), torch.ones(24, 8, dtype=kind)
    args = (v, other, torch.arange(8), None) if op == "low_rank_pivoted" else ([v, v], [other, other], [None, None])
    path = config(op, m=m, n=24, k=40, r=8, dtype=dtype, device="cpu")["path"]
    before = _native.calls(op, "cpu", path)
    getattr(torch.ops.lowfat, op)(x, *args)
    assert _native.calls(op, "cpu", path) == before + 1


@pytest.mark.parametrize(("path", "changes"), [
    ("decode", {}), ("decode", {"m": 16, "dtype": "float32"}), ("library", {"m": 129}), ("library", {"dtype": "float16"})])
def test_the_path_on_a_cpu_is_that_of_the_products(path, changes):
    assert config("low_rank_pivoted", device="cpu", **changes)["path"] == path
    assert config("low_rank_group", device="cpu", **changes)["path"] == "members"


def test_a_group_has_one_to_four_members():
    paths = [config("low_rank_group", members=count)["path"] for count in (0, 1, 4, 5)]
    assert paths == ["members", "decode", "decode", "members"]


def test_pivots_are_columns():
    assert config("low_rank_pivoted", n=512)["path"] == "decode"  # all of them
    assert config("low_rank_pivoted", n=511)["path"] == "library"
