"""The compiled part: that it loads, what it says about itself, which path it chooses; and that nothing breaks without it."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowfat
from lowfat import _native
from lowfat.errors import ArgumentError, CompatibilityError

needs_library = pytest.mark.skipif(_native.native is None, reason=f"no compiled library: {_native.why_not}")


def run(code: str, **environment) -> subprocess.CompletedProcess:
    path = os.pathsep.join([*(str(Path(folder).parent) for folder in lowfat.__path__), os.environ.get("PYTHONPATH", "")])
    env = {k: v for k, v in os.environ.items() if not k.startswith("LOWFAT_")} | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env | environment)


# ------------------------------------------------------------------------------------------------ what it says of itself
@needs_library
def test_the_kernels_listed_are_the_kernels_registered():
    for op, devices in lowfat.kernels().items():
        for device, compiled in devices.items():
            has = torch._C._dispatch_has_kernel_for_dispatch_key(f"lowfat::{op}", device.upper())
            assert has == bool(compiled), (op, device)


@needs_library
def test_kernels_are_listed_by_plain_names():
    """A name is for programs, alike on every device; what there is to say about it, doctor says."""
    names = {name for devices in lowfat.kernels().values() for compiled in devices.values() for name in compiled}
    assert names <= {*_native.CPU_LEVELS, *lowfat.build_info()["cuda_archs"]}


@needs_library
def test_build_info():
    info = lowfat.build_info()
    assert {"version", "torch", "torch_minimum", "python", "compiler", "cuda", "cuda_archs", "sanitize"} == info.keys()
    assert bool(info["cuda"]) == bool(info["cuda_archs"])
    assert all(arch.startswith(("sm_", "compute_")) for arch in info["cuda_archs"])
    assert _native.cpu_level() in lowfat.kernels()["low_rank"]["cpu"]


@needs_library
def test_stable_abi_only():
    """A C++ symbol of torch in the library would tie it to one torch version."""
    try:
        names = subprocess.run(["nm", "-D", "--undefined-only", _native.library_path], capture_output=True, text=True).stdout
    except FileNotFoundError:
        pytest.skip("no nm")
    unstable = [line.split()[-1] for line in names.splitlines() if "N2at" in line or "N3c10" in line or "N5torch" in line]
    assert names and unstable == []


# ------------------------------------------------------------------------------------------------ which path is chosen
def config(**problem):
    return _native.native.choose_config("low_rank", **{"n": 4096, "k": 4096, "r": 512} | problem)


@needs_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_path_for_every_m(dtype, device):
    most = {"cpu": {"float32": 32, "bfloat16": 128}, "cuda": {"bfloat16": 16, "float16": 16}}[device].get(dtype, 0)
    for m in range(20_001):
        on_gpu = "small batch" if m <= 256 else "chain" if m < 4096 else "library"  # 4 tiles of h to 128 rows: 128 at most
        more = on_gpu if most and device == "cuda" else "library"
        due = "empty" if m == 0 else "decode" if m <= most else more
        assert config(m=m, dtype=dtype, device=device, level="avx512_bf16", has_tiles=False)["path"] == due, m


@needs_library
@pytest.mark.parametrize("problem, most", [
    ({"level": "avx512_bf16", "has_tiles": True}, 16), ({"level": "avx512_bf16", "has_tiles": True, "dtype": "float32"}, 32),
    ({"level": "avx2_fma", "has_tiles": False}, 16), ({"level": "scalar", "has_tiles": False, "dtype": "float32"}, 16)])
@pytest.mark.parametrize("op", ["low_rank", "monarch", "sparse24", "dictionary"])
def test_slices_only_where_they_were_measured(op, problem, most):
    """Kills slices beside a library that multiplies tiles, or at a level whose slices nobody timed."""
    most = min(most, 16) if op == "monarch" else most
    paths = [_native.native.choose_config(op, m=m, n=4096, k=4096, r=64, **problem)["path"] for m in (most, most + 1)]
    assert paths == ["decode", "library"]


@needs_library
@pytest.mark.parametrize("problem, path", [
    ({}, "decode"), ({"is_aligned": False}, "library"),
    ({"k": 4100}, "library"), ({"r": 500}, "library"), ({"n": 4097}, "decode"),  # rows of 16 bytes; n may be anything
    ({"r": 2048}, "decode"), ({"r": 2056}, "library"), ({"k": 32768}, "decode"), ({"k": 32776}, "library"),
    ({"k": 0}, "library"), ({"r": 0}, "library"), ({"n": 0}, "library"), ({"n": 1 << 21}, "library"),
    ({"arch": 80, "sm_count": 108}, "decode"), ({"arch": 86, "sm_count": 46}, "decode"), ({"arch": 89, "sm_count": 20}, "decode"),
    ({"arch": 75}, "library"), ({"arch": 100}, "library"), ({"arch": 120}, "library"),  # not built for, or not measured on
    ({"n": 128256}, "decode"), ({"n": 128256, "arch": 89}, "library")])  # the sums of a block do not fit 99 KB
def test_which_problems_the_gpu_kernel_covers(problem, path):
    assert config(m=16, device="cuda", **problem)["path"] == path


@needs_library
@pytest.mark.parametrize("problem, path", [
    ({}, "small batch"), ({"is_aligned": False}, "library"), ({"dtype": "float16"}, "small batch"),
    ({"k": 4100}, "library"), ({"r": 500}, "library"), ({"n": 4097}, "library"),  # rows of 16 bytes, of y too
    ({"k": 0}, "library"), ({"r": 0}, "library"), ({"n": 0}, "library"), ({"n": (1 << 20) + 8}, "library"),
    ({"k": 1 << 20, "n": 1 << 20, "r": 1 << 20}, "small batch"), ({"sm_count": 78}, "small batch"),
    ({"arch": 75}, "library"), ({"arch": 100}, "library")])
@pytest.mark.parametrize("m", [17, 256])
@pytest.mark.parametrize("arch, kernel", [(80, "small batch sm_80"), (86, "small batch sm_80"), (89, "small batch sm_80"),
                                          (90, "small batch")])
def test_which_problems_the_small_batch_kernels_cover(arch, kernel, m, problem, path):
    built = lowfat.build_info()["cuda_archs"]
    if built and "sm_90a" not in built:
        kernel = "small batch sm_80"
    assert config(m=m, device="cuda", **{"arch": arch} | problem)["path"] == (kernel if path == "small batch" else path)


@needs_library
def test_plan_of_small_batch_launches():
    found = config(m=256, device="cuda")  # 64 tiles of u, 8 of v in clusters of 8: twice that fills 132 multiprocessors
    assert found == {"path": "small batch", "first_tokens": 128, "first_grid": 128, "cluster": 8,
                     "second_tokens": 128, "second_grid": 128, "prefetch": 8}


@needs_library
@pytest.mark.parametrize("m, problem, path", [
    (257, {}, "chain"), (4095, {}, "chain"), (4096, {}, "library"), (300, {"dtype": "float16"}, "chain"),
    (300, {"dtype": "float32"}, "library"), (300, {"is_aligned": False}, "library"),
    (300, {"k": 4100}, "library"), (300, {"r": 500}, "library"), (300, {"n": 4097}, "library"),  # rows of 16 bytes, of y too
    (300, {"k": 0}, "library"), (300, {"r": 0}, "library"), (300, {"n": 0}, "library"),
    (300, {"k": 1 << 20, "n": 1 << 20}, "chain"), (300, {"n": (1 << 20) + 8}, "library"),
    (2048, {"r": 1024}, "chain"), (2049, {"r": 1024}, "library"),  # 16 x 8 tiles of h for 132 multiprocessors, 17 x 8
    (4095, {"r": 520}, "library"), (4095, {"sm_count": 128}, "library"), (4095, {"sm_count": 129}, "chain"),
    (300, {"arch": 80, "sm_count": 108}, "library"), (300, {"arch": 89}, "library"), (300, {"arch": 100}, "library")])
def test_which_problems_the_chained_kernel_covers(m, problem, path):
    assert config(m=m, device="cuda", **problem)["path"] == path


@needs_library
def test_plan_of_a_chained_launch():
    found = config(m=1024, device="cuda")  # 8 x 4 tiles of h: four splits of k fill 132 multiprocessors, five do not fit
    assert found == {"path": "chain", "first_tiles": 32, "splits": 4, "second_tiles": 256, "grid": 132, "smem_bytes": 231424}


@needs_library
@pytest.mark.parametrize("m, n, k, r, arch, plan", [
    (64, 4096, 4096, 512, 80, (64, 1, 13, 104, 8)),  # 8 tiles of v in 13 splits; a tile of u is asked for early
    (128, 4096, 4096, 512, 80, (128, 1, 13, 104, 8)),
    (256, 4096, 4096, 512, 80, (128, 2, 6, 108, 12)),  # two groups: 16 items of v in 6 splits
    (256, 14336, 4096, 1024, 80, (128, 2, 3, 108, 12)),
    (256, 14336, 4096, 1024, 89, (128, 2, 3, 108, 4)),  # 99 KB: 4 slots
    (128, 768, 768, 192, 86, (64, 2, 3, 24, 4))])  # small groups, so that twice the multiprocessors have something to do
def test_plan_of_a_small_batch_launch_on_compute_capability_8(m, n, k, r, arch, plan):
    found = config(m=m, n=n, k=k, r=r, device="cuda", arch=arch, sm_count=108)
    assert tuple(found[name] for name in ("tokens", "groups", "splits", "grid", "weight_slots")) == plan
    assert found["smem_bytes"] <= (163 if arch == 80 else 99) << 10


@needs_library
@pytest.mark.parametrize("m, n, k, r, grid, splits, prefetch", [(1, 4096, 4096, 512, 128, 4, 4), (16, 14336, 4096, 1024, 128, 2, 22),
                                                                (8, 768, 768, 192, 48, 3, 1), (8, 3072, 768, 192, 96, 3, 2)])
def test_plan_of_a_gpu_launch(m, n, k, r, grid, splits, prefetch):
    found = config(m=m, n=n, k=k, r=r, device="cuda")
    assert (found["grid"], found["splits"], found["prefetch"]) == (grid, splits, prefetch)
    assert found["variant"] == "one launch" and found["token_tiles"] == (1 if m <= 8 else 2)
    assert prefetch * 8192 < found["smem_bytes"] <= 232448


@needs_library
@pytest.mark.parametrize("k, n, r, dtype, is_threaded", [
    (4096, 4096, 512, "bfloat16", True), (4096, 14336, 1024, "float32", True), (1, 10**6, 1, "float32", True),
    (768, 3072, 192, "bfloat16", True), (384, 1536, 96, "bfloat16", False), (4096, 4096, 0, "float32", False)])
def test_a_thread_gets_256_kb_of_weights_or_all_of_them(k, n, r, dtype, is_threaded):
    """Counted in row tiles: the smallest number of tiles that reaches the bytes; one tile less falls short."""
    found, size = config(m=1, k=k, n=n, r=r, dtype=dtype), 4 if dtype == "float32" else 2
    assert is_threaded == (r * (k + n) * size >= 2**20)
    for grain, depth in ((found["first_grain"], k), (found["second_grain"], r)):
        tile = found["row_tile"] * depth * size
        assert grain * tile >= 2**18 > (grain - 1) * tile if is_threaded else grain == 0


@needs_library
def test_choice_is_printable_and_names_what_it_does_not_know():
    assert config(m=1, level="avx2_fma")["level"] == "avx2_fma"
    for wrong in ({"dtype": "int8"}, {"device": "tpu"}, {"level": "sse"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is '{next(iter(wrong.values()))}', known are "):
            config(m=1, **wrong)
    with pytest.raises(ValueError, match="no compiled op is named 'high_rank'"):
        _native.native.choose_config("high_rank", m=1, n=1, k=1)


@needs_library
@pytest.mark.parametrize("m, path", [(1, "decode"), (16, "decode"), (33, "library")])
def test_calls_count_the_path_taken(m, path):
    before = {name: _native.calls("low_rank", "cpu", name) for name in ("decode", "library")}
    torch.ops.lowfat.low_rank(torch.randn(m, 8), torch.randn(2, 8), torch.randn(4, 2))
    after = {name: _native.calls("low_rank", "cpu", name) for name in before}
    assert after == before | {path: before[path] + 1}
    with pytest.raises(ArgumentError, match="tea"):
        _native.calls("low_rank", "cpu", "tea")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype):
    """Over 1 MB of weights, so that there are several tasks; ragged rows. Kills a row tile split between two tasks."""
    x, v, u = torch.randn(3, 1531), torch.randn(509, 1531), torch.randn(1021, 509)
    x, v, u = (t.to(dtype) for t in (x, v, u))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(torch.ops.lowfat.low_rank(x, v, u))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, results[0]) for y in results)


# ------------------------------------------------------------------------------------------------ without it
SAME_RESULT = """
import torch, lowfat
x, v, u = (torch.arange(float(rows * columns)).view(rows, columns) for rows, columns in ((3, 8), (2, 8), (4, 2)))
assert torch.equal(lowfat.low_rank(x, v, u), x @ v.T @ u.T)  # whole numbers: exact
print(lowfat.kernels(), lowfat.build_info())
"""


def test_kernels_switched_off():
    done = run(SAME_RESULT, LOWFAT_DISABLE_KERNELS="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "{} {}\n", "")


def test_missing_library_warns_once_and_runs_the_reference():
    hide = "import pathlib; pathlib.Path.is_file = lambda self: False\n"
    done = run(hide + SAME_RESULT)
    assert (done.returncode, done.stdout) == (0, "{} {}\n")
    assert done.stderr.count("the reference path is in use") == 1 and "no compiled library in" in done.stderr


@pytest.mark.parametrize("name, value, valid", [("LOWFAT_CPU_LEVEL", "avx1024", "avx512_bf16, avx2_fma, scalar"),
                                                ("LOWFAT_DISABLE_KERNELS", "yes", "0 or 1"),
                                                ("LOWFAT_DEBUG_CHECK", "on", "0 or 1")])
def test_bad_variable(name, value, valid):
    done = run("import lowfat", **{name: value})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"lowfat.errors.ArgumentError: {name} is '{value}', must be {_one_of(valid)}"


def _one_of(valid):
    return valid if " or " in valid else f"one of {valid}"


@needs_library
def test_level_can_only_be_lowered():
    for level in _native.CPU_LEVELS:
        done = run("import lowfat._native as n; print(n.cpu_level())", LOWFAT_CPU_LEVEL=level)
        best, asked = (_native.CPU_LEVELS.index(name) for name in (done.stdout.strip(), level))
        assert best >= asked, done.stderr


def test_torch_too_old(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    with pytest.raises(CompatibilityError, match=r"built for torch >= 2.11, found 2.10.1\+cu128"):
        _native.check_torch("2.11")
    monkeypatch.setattr(torch, "__version__", "3.0.0a0+git1")
    _native.check_torch("2.11")


@needs_library
@pytest.mark.parametrize("broken", ["_C", "library"])
def test_broken_library_is_a_warning_with_its_cause(monkeypatch, broken):
    if broken == "_C":
        monkeypatch.setattr(importlib, "import_module", _raise(ImportError("wrong tag")))
    else:
        monkeypatch.setattr(torch.ops, "load_library", _raise(OSError("undefined symbol: x")))
    with pytest.warns(RuntimeWarning, match="the reference path is in use") as caught:
        path, module, why_not = _native.load()
    assert (path, module) == (None, None)
    assert str(caught[0].message.__cause__) in why_not


def _raise(error):
    def function(*_):
        raise error
    return function
