"""The compiled CPU kernel of sparse24: that it ran, at every instruction set level, and that it touches nothing beyond its
tensors, whatever the mask says.

`python test_sparse24_cpu.py` is the check of one level (LOWFAT_CPU_LEVEL) with every input at a guard page: reading one
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
from lowfat.bench.sparse24 import random_mask
from lowfat.ops import sparse24
from lowfat.ops.bitmap import expand, unpack
from lowfat.ops.sparse24 import reference
from paths import cpu_path

OPS = torch.ops.lowfat
LEVELS = _native.kernels().get("sparse24", {}).get("cpu", [])
pytestmark = pytest.mark.skipif(not LEVELS, reason="no compiled library")

# k, n, kept, group: less than a word and than a vector; groups across words; rows of one step, of several, and a rest of
# each; all kept and one; more than one chunk; more rows than a group of them has
SHAPES = [(4, 1, 2, 4), (36, 7, 2, 4), (45, 6, 3, 5), (96, 33, 7, 48), (128, 65, 2, 4), (160, 5, 1, 4), (64, 9, 4, 4),
          (600, 31, 2, 8), (1100, 97, 2, 4), (2052, 130, 1, 4), (32, 300, 2, 4)]
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16)
BAD = ("all", "none", "random", "shifted")


def normal(m, k, n, kept, group, dtype):
    x, values, bias = torch.randn(m, k), torch.randn(n, k // group * kept), torch.randn(n)
    return x.to(dtype), values.to(dtype), random_mask(n, k, kept, group, x.device), bias.to(dtype)


def whole(m, k, n, kept, group, dtype):
    """So few ones that every sum is exact."""
    x, values, mask, bias = normal(m, k, n, kept, group, torch.float32)
    x, values = x.sign(), values.sign() * (torch.rand_like(values) < min(1, 64 / values.shape[1]))
    return x.to(dtype), values.to(dtype), mask, (3 * bias).round().to(dtype)


def counted(call):
    before = [_native.calls("sparse24", "cpu", path) for path in ("decode", "library")]
    call()
    return tuple(_native.calls("sparse24", "cpu", path) - was for path, was in zip(("decode", "library"), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("m", [1, 16, 17, 32, 100, 129])
def test_the_path_is_recorded(m, dtype):
    """T-dispatch-record: a silent fallback fails here."""
    args = normal(m, 36, 31, 2, 4, dtype)
    kernel = cpu_path("sparse24", m, dtype, n=31, k=36, r=8) == "decode"
    for call in (sparse24, lambda *a: OPS.sparse24(*a, 2, 4)):
        assert counted(lambda: call(*args)) == (kernel, not kernel)


def test_threads_share_rows_of_enough_bytes():
    """A megabyte of values and mask in all, and 256 KB for a task."""
    def grain(k, n, kept=2, dtype="bfloat16"):
        return _native.native.choose_config("sparse24", m=1, n=n, k=k, kept=kept, group=4, dtype=dtype)["grain"]

    assert grain(4096, 4096) == 15 and grain(4096, 4096, 4) == 8 and grain(4096, 4096, dtype="float32") == 8
    assert grain(4096, 228) == 15 and grain(4096, 227) == 0 == grain(0, 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_library_path_writes_every_weight_to_its_place(shape, dtype):
    """More rows than the kernel takes; one at a time they take it, but for dtypes that it has not."""
    x, values, mask, bias = whole(137, *shape, dtype)
    pattern = shape[2:]
    exact = reference(x.double(), values.double(), mask, bias.double(), *pattern)
    assert gates.exact_gate(OPS.sparse24(x, values, mask, bias, *pattern), exact)
    assert gates.exact_gate(OPS.sparse24(x[:1], values, mask, None, *pattern), exact[:1] - bias.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 6, 40])
def test_kept_zeros_stay_kept(m, dtype):
    """Kills a kernel that takes its pattern from the values: zeros and negative zeros are values like others."""
    x, values, mask, bias = whole(m, 128, 33, 2, 4, dtype)
    values[:, ::3], values[1::2, 1::3] = 0, -0.0
    exact = reference(x.double(), values.double(), mask, bias.double(), 2, 4)
    assert gates.exact_gate(OPS.sparse24(x, values, mask, bias, 2, 4), exact)


@pytest.mark.parametrize("level", LEVELS)
def test_guard_pages_at_every_level(level):
    path = os.pathsep.join(p for p in (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"LOWFAT_CPU_LEVEL": level, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{level}: exit {done.returncode}\n{done.stderr[-2000:]}"
    assert done.stdout.strip() == f"{_native_level(level)} {2 * len(SHAPES) * len(ROWS)}"


def _native_level(level):
    """A processor without a level runs the best it has."""
    return LEVELS[max(LEVELS.index(_native.cpu_level()), LEVELS.index(level))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 3, 9])
def test_same_bits_for_any_number_of_threads(m, dtype):
    """T-repeat: a sum is never split differently because another thread was free. Large enough that threads are used."""
    args = normal(m, 1100, 1537, 2, 4, dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [sparse24(*args) for _ in range(3)]
    torch.set_num_threads(1)
    assert all(torch.equal(results[0], other) for other in results[1:])


def bad_mask(mask, how):
    """No mask at all: values run out early or late, and bits lie behind the last input."""
    if how == "random":
        return torch.randint(-2**31, 2**31, mask.shape, dtype=torch.int64).to(torch.int32)
    return {"all": torch.full_like(mask, -1), "none": torch.zeros_like(mask), "shifted": mask << 1}[how]


def check_level(seed: int = 0) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # a process of its own starts from another seed each time
    done = 0
    for dtype, shape, m in product((torch.float32, torch.bfloat16), SHAPES, ROWS):
        pattern, what = shape[2:], (m, *shape, dtype)
        args, some = whole(m, *shape, dtype), normal(m, *shape, dtype)
        exact = reference(*(t if t.dtype is torch.int32 else t.double() for t in args), *pattern)
        x, values, mask, bias = some
        expected = OPS.sparse24(*some, *pattern)
        weight = expand(values, unpack(mask, x.shape[1]))
        found = gates.failed_gates(expected, linear(x, weight, bias), gates.chain(x, weight.T, bias=bias))
        # four lanes add a long sum less well than many; and few numbers may by chance be all but exact in torch's product
        compared = values.shape[1] <= 128 and expected.numel() >= 256
        assert not set(found) - ({"mistrusted"} if compared else {"mistrusted", "G1", "G2"}), (found, what)
        for end in (True, False):
            y = OPS.sparse24(*(gates.at_guard_page(t, end=end) for t in args), *pattern)
            assert gates.exact_gate(y, exact), what
            assert torch.equal(OPS.sparse24(*(gates.at_guard_page(t, end=end) for t in some), *pattern), expected), what
        wrong = bad_mask(mask, BAD[done % len(BAD)])
        for end in (True, False):
            OPS.sparse24(*(gates.at_guard_page(t, end=end) for t in (x, values, wrong, bias)), *pattern)
            many = (x.repeat(137, 1), values, wrong, bias) if done % 10 == 0 else (x, values, wrong, bias)
            OPS.sparse24(*(gates.at_guard_page(t, end=end) for t in many), *pattern)
        done += 1
    return done


if __name__ == "__main__":
    sys.stdout.write(f"{_native.cpu_level()} {check_level()}\n")
