"""The compiled CPU kernel of monarch: that it ran, at every instruction set level, and that it touches nothing beyond its
tensors.

`python test_monarch_cpu.py` is the check of one level (LOWFAT_CPU_LEVEL) with every input at a guard page: reading one
element too far ends that process."""
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

import gates
from lowfat import _native
from lowfat.bench.monarch import known
from lowfat.ops import monarch
from lowfat.ops.monarch import reference, reference_training
from paths import cpu_path

OPS = torch.ops.lowfat
LEVELS = _native.kernels().get("monarch", {}).get("cpu", [])
pytestmark = pytest.mark.skipif(not LEVELS, reason="no compiled library")

# k, n, blocks in and out, rank: one block; squares of the moves and their edges; blocks that k or n ends in, or before; more
# than one chunk of a depth; many blocks, so that several groups of them wait and move
SHAPES = [(33, 31, 1, 1, 7), (40, 20, 1, 5, 3), (40, 20, 5, 1, 3), (64, 64, 8, 8, 1), (64, 64, 4, 16, 2), (97, 83, 8, 5, 3),
          (10, 9, 8, 8, 1), (83, 97, 9, 17, 2), (130, 66, 2, 2, 33), (1100, 50, 2, 3, 5), (50, 1100, 3, 2, 260),
          (7, 300, 3, 40, 1), (1024, 1024, 32, 32, 1)]
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16)
FORMS = (True, False)


def normal(m, k, n, b_in, b_out, r, dtype):
    p, s = -(-k // b_in), -(-n // b_out)
    made = torch.randn(m, k), torch.randn(b_in, b_out * r, p), torch.randn(b_out, s, b_in * r), torch.randn(n)
    return tuple(t.to(dtype) for t in made)


def whole(m, k, n, b_in, b_out, r, dtype):
    """So few ones that every middle and result is exact."""
    x, v, u, bias = normal(m, k, n, b_in, b_out, r, torch.float32)
    x, bias = x.sign(), (3 * bias).round()
    v, u = (t.sign() * (torch.rand_like(t) < min(1, 16 / max(1, t.shape[2]))) for t in (v, u))
    return tuple(t.to(dtype) for t in (x, v, u, bias))


def counted(call):
    before = [_native.calls("monarch", "cpu", path) for path in ("decode", "library")]
    call()
    return tuple(_native.calls("monarch", "cpu", path) - was for path, was in zip(("decode", "library"), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("m", [1, 16, 17, 32, 100, 129])
def test_the_path_is_recorded(m, dtype):
    """T-dispatch-record: a silent fallback fails here."""
    args = normal(m, 33, 31, 4, 3, 2, dtype)
    kernel = cpu_path("monarch", m, dtype, n=31, k=36, r=8) == "decode"
    for call in (lambda *a: monarch(*a, out_features=31), lambda *a: OPS.monarch(*a, 31, False),
                 lambda *a: OPS.monarch_training(*a, 31, True)):
        assert counted(lambda: call(*args)) == (kernel, not kernel)


def test_threads_share_blocks_of_enough_bytes():
    """A megabyte of weights in all, and 256 KB for a task."""
    def grains(size, blocks, r, dtype="bfloat16"):
        config = _native.native.choose_config("monarch", m=1, n=size, k=size, r=r, b_in=blocks, b_out=blocks, dtype=dtype)
        return config["first_grain"], config["second_grain"]

    assert grains(4096, 64, 1) == (32, 32) and grains(4096, 64, 1, "float32") == (16, 16)
    assert grains(4096, 4, 256) == (1, 1) and grains(1024, 32, 1) == (0, 0) == grains(4096, 512, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("interleave", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_library_path_moves_everything_to_its_place(shape, interleave, dtype):
    """More rows than the kernel takes; one at a time they take it, but for dtypes that it has not."""
    x, v, u, bias = whole(137, *shape, dtype)
    n = shape[1]
    exact, middle = reference_training(*(t.double() for t in (x, v, u, bias)), n, interleave)
    y, h = OPS.monarch_training(x, v, u, bias, n, interleave)
    assert gates.exact_gate(y, exact) and gates.exact_gate(h, middle)
    assert gates.exact_gate(OPS.monarch(x[:1], v, u, None, n, interleave), exact[:1] - bias.double())


@pytest.mark.parametrize("level", LEVELS)
def test_guard_pages_at_every_level(level):
    path = os.pathsep.join(p for p in (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"LOWFAT_CPU_LEVEL": level, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{level}: exit {done.returncode}\n{done.stderr[-2000:]}"
    assert done.stdout.strip() == f"{_native_level(level)} {2 * len(SHAPES) * len(ROWS) * len(FORMS)}"


def _native_level(level):
    """A processor without a level runs the best it has."""
    return LEVELS[max(LEVELS.index(_native.cpu_level()), LEVELS.index(level))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleave", FORMS)
@pytest.mark.parametrize("blocks, r", [(4, 128), (20, 8)])
def test_same_bits_for_any_number_of_threads(blocks, r, interleave, dtype):
    """T-repeat: a sum is never split differently because another thread was free. Large enough that threads are used."""
    args = normal(3, 1023, 1537, blocks, blocks + 1, r, dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [OPS.monarch_training(*args, 1537, interleave) for _ in range(3)]
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for each in results[1:] for one, other in zip(results[0], each))


def check_level(seed: int = 0) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # a process of its own starts from another seed each time
    done = 0
    for dtype, shape, m, interleave in product((torch.float32, torch.bfloat16), SHAPES, ROWS, FORMS):
        n, what = shape[1], (m, *shape, interleave, dtype)
        args, some = whole(m, *shape, dtype), normal(m, *shape, dtype)
        exact, middle = reference_training(*(t.double() for t in args), n, interleave)
        expected = OPS.monarch(*some, n, interleave)
        if max(some[1].shape[2], some[2].shape[2]) <= 300:  # four lanes add a longer sum less well than many
            found = gates.failed_gates(expected, reference(*some, n, interleave), known(*some, n, interleave))
            assert not set(found) - {"mistrusted"}, (found, what)
        end = done % 2 == 0
        y, h = OPS.monarch_training(*(gates.at_guard_page(t, end=end) for t in args), n, interleave)
        assert gates.exact_gate(y, exact) and gates.exact_gate(h, middle), what
        for end in (True, False):
            assert torch.equal(OPS.monarch(*(gates.at_guard_page(t, end=end) for t in some), n, interleave), expected), what
        done += 1
    assert _native.calls("monarch", "cpu", "library") == 0
    return done


if __name__ == "__main__":
    sys.stdout.write(f"{_native.cpu_level()} {check_level()}\n")
