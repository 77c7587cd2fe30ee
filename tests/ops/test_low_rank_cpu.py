"""The compiled CPU kernel: that it ran, at every instruction set level, and that it touches nothing beyond its tensors.

`python test_low_rank_cpu.py` is the check of one level (LOWFAT_CPU_LEVEL) with every input at a guard page: reading one
element too far ends that process."""
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

import gates
from lowfat import _native
from lowfat.ops import low_rank
from paths import cpu_path

pytestmark = pytest.mark.skipif(_native.library_path is None, reason="no compiled library")

SHAPES = [(k, r, n) for k, r, n in product((1, 15, 33, 100), (1, 7, 32, 65), (1, 31, 64, 97)) if r <= min(k, n)]
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16)


def counted(call):
    before = [_native.calls("low_rank", "cpu", path) for path in ("decode", "library")]
    call()
    return tuple(_native.calls("low_rank", "cpu", path) - was for path, was in zip(("decode", "library"), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("m", [1, 16, 17, 32, 100, 129])
def test_the_path_is_recorded(m, dtype):
    """T-dispatch-record: a silent fallback fails here."""
    args = gates.whole_inputs(m, 33, 7, 31, torch.bfloat16)
    kernel = cpu_path("low_rank", m, dtype, n=31, k=36, r=8) == "decode"
    for call in (low_rank, torch.ops.lowfat.low_rank, torch.ops.lowfat.low_rank_training):
        assert counted(lambda: call(*(t.to(dtype) for t in args))) == (kernel, not kernel)


@pytest.mark.parametrize("level", _native.kernels().get("low_rank", {}).get("cpu", []))
def test_guard_pages_at_every_level(level):
    path = os.pathsep.join(p for p in (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"LOWFAT_CPU_LEVEL": level, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{level}: exit {done.returncode}\n{done.stderr[-2000:]}"
    assert done.stdout.strip() == f"{_native_level(level)} {2 * len(SHAPES) * len(ROWS) * 2}"


def _native_level(level):
    """A processor without a level runs the best it has."""
    best = _native.kernels()["low_rank"]["cpu"].index(_native.cpu_level())
    return _native.kernels()["low_rank"]["cpu"][max(best, _native.kernels()["low_rank"]["cpu"].index(level))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype):
    """T-repeat: a sum is never split differently because another thread was free. Large enough that threads are used."""
    args = tuple(torch.randn(shape).to(dtype) for shape in ((3, 1024), (512, 1024), (1536, 512), (1536,)))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [low_rank(*args) for _ in range(3)]
    torch.set_num_threads(1)
    assert all(torch.equal(results[0], other) for other in results[1:])


def check_level(seed: int = 0) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # a process of its own starts from another seed each time
    done = 0
    for dtype, (k, r, n), m in product((torch.float32, torch.bfloat16), SHAPES, ROWS):
        x, v, u, bias = args = gates.whole_inputs(m, k, r, n, dtype, seed=m)
        exact = gates.chain(x, v.T, u.T, bias=bias).y64
        normal = tuple(torch.randn_like(t) for t in args)
        expected = low_rank(*normal)
        known = gates.chain(normal[0], normal[1].T, normal[2].T, bias=normal[3])
        framework = linear(linear(*normal[:2]), *normal[2:])
        assert not set(gates.failed_gates(expected, framework, known)) - {"mistrusted"}, (m, k, r, n, dtype)
        for end in (True, False):
            assert gates.exact_gate(low_rank(*(gates.at_guard_page(t, end=end) for t in args)), exact), (m, k, r, n, dtype)
            assert torch.equal(low_rank(*(gates.at_guard_page(t, end=end) for t in normal)), expected), (m, k, r, n, dtype)
            done += 1
    assert _native.calls("low_rank", "cpu", "library") == 0
    return done


if __name__ == "__main__":
    sys.stdout.write(f"{_native.cpu_level()} {check_level()}\n")
