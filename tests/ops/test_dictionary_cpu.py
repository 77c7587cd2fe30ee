"""The compiled CPU kernel of dictionary: that it ran, at every instruction set level and for both forms of the support, and
that it touches nothing beyond its tensors, whatever the support says.

`python test_dictionary_cpu.py` is the check of one level (LOWFAT_CPU_LEVEL) with every input at a guard page: reading one
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
from lowfat.bench.dictionary import known
from lowfat.ops import dictionary
from lowfat.ops.bitmap import pack
from lowfat.ops.dictionary import reference, reference_training
from paths import cpu_path

OPS = torch.ops.lowfat
LEVELS = _native.kernels().get("dictionary", {}).get("cpu", [])
pytestmark = pytest.mark.skipif(not LEVELS, reason="no compiled library")

# k, n, blocks of n and of k, atoms, non-zeros: one block; atoms of less than a word and more than a chunk; blocks that k
# or n ends in, or before; no non-zeros and all; rows of a position list that end in one of four, and in one of 64
SHAPES = [(9, 7, 1, 1, 5, 2), (40, 33, 1, 1, 64, 32), (70, 65, 2, 3, 33, 9), (11, 10, 8, 4, 3, 1), (300, 40, 3, 2, 600, 131),
          (50, 30, 1, 5, 40, 40), (8, 9, 2, 2, 7, 0), (64, 70, 4, 4, 100, 67), (33, 300, 1, 1, 32, 16),
          (20, 18, 2, 1, 1030, 3)]
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16)
FORMS = (torch.int32, torch.int16)


def support_of(kept, form):
    n, blocks, _ = kept.shape
    return pack(kept).flatten(1) if form is torch.int32 else kept.nonzero()[:, 2].view(n, -1).to(torch.int16)


def normal(m, k, n, b_out, b_in, a, s, form, dtype):
    kept = torch.rand(n, b_in, a).argsort(-1) < s
    made = torch.randn(m, k), torch.randn(b_out, b_in, a, -(-k // b_in)), torch.randn(n, b_in * s), torch.randn(n)
    x, d, values, bias = (t.to(dtype) for t in made)
    return x, d, values, support_of(kept, form), bias


def whole(m, k, n, b_out, b_in, a, s, form, dtype):
    """So few ones that every middle and result is exact."""
    x, d, values, support, bias = normal(m, k, n, b_out, b_in, a, s, form, torch.float32)
    d, values = (t.sign() * (torch.rand_like(t) < min(1, 16 / max(1, t.shape[-1]))) for t in (d, values))
    return tuple(t if t is support else t.to(dtype) for t in (x.sign(), d, values, support, (3 * bias).round()))


def in_double(args):
    return tuple(t.double() if t.is_floating_point() else t for t in args)


def counted(call):
    before = [_native.calls("dictionary", "cpu", path) for path in ("decode", "library")]
    call()
    return tuple(_native.calls("dictionary", "cpu", path) - was for path, was in zip(("decode", "library"), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [1, 16, 17, 32, 100, 129])
def test_the_path_is_recorded(m, form, dtype):
    """T-dispatch-record: a silent fallback fails here."""
    args = normal(m, 33, 31, 2, 3, 20, 7, form, dtype)
    kernel = cpu_path("dictionary", m, dtype, n=31, k=36, r=8) == "decode"
    for call in (dictionary, OPS.dictionary, OPS.dictionary_training):
        assert counted(lambda: call(*args)) == (kernel, not kernel)


def test_threads_share_rows_of_enough_bytes():
    """A megabyte of d, values and support in all, and 256 KB for a task."""
    def grains(size, atoms, kept, blocks=1, dtype="bfloat16"):
        config = _native.native.choose_config("dictionary", m=1, n=size, k=size, r=atoms, kept=kept, b_in=blocks,
                                              b_out=blocks, dtype=dtype)
        return config["first_grain"], config["second_grain"]

    assert grains(4096, 1024, 512) == (32, 228) and grains(4096, 1024, 512, dtype="float32") == (16, 121)
    assert grains(4096, 256, 128, blocks=4) == (128, 228) and grains(4096, 1024, 32) == (32, 2048)
    assert grains(384, 192, 96) == (0, 0) == grains(0, 64, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_library_path_moves_everything_to_its_place(shape, form, dtype):
    """More rows than the kernel takes, of x in three dimensions too; one at a time they take it, but for other dtypes."""
    x, *factors, bias = args = whole(140, *shape, form, dtype)
    exact, middle = reference_training(*in_double(args))
    y, h = OPS.dictionary_training(*args)
    assert gates.exact_gate(y, exact) and gates.exact_gate(h, middle)
    assert torch.equal(OPS.dictionary(x.view(28, 5, -1), *factors, bias), y.view(28, 5, -1))
    assert gates.exact_gate(OPS.dictionary(x[:1], *factors, None), exact[:1] - bias.double())


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
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m, blocks", [(1, (1, 1)), (3, (4, 3)), (9, (1, 1)), (9, (3, 4))])
def test_same_bits_for_any_number_of_threads(m, blocks, form, dtype):
    """T-repeat: a sum is never split differently because another thread was free. Large enough that threads are used."""
    args = normal(m, 1023, 1537, *blocks, 300, 150, form, dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [OPS.dictionary_training(*args) for _ in range(3)]
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for each in results[1:] for one, other in zip(results[0], each))


def bad_support(support, how):
    """Values that run out early or late, bits behind the last atom, atoms that there are not, negative ones."""
    bits = {torch.int32: 32, torch.int16: 16}[support.dtype]
    if how == 0:
        return torch.randint(-2**(bits - 1), 2**(bits - 1), support.shape, dtype=torch.int64).to(support.dtype)
    return torch.full_like(support, {1: -1, 2: 0, 3: 2**(bits - 1) - 1}[how])


def check_level(seed: int = 0) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # a process of its own starts from another seed each time
    done = 0
    for dtype, shape, m, form in product((torch.float32, torch.bfloat16), SHAPES, ROWS, FORMS):
        what = (m, *shape, form, dtype)
        args, some = whole(m, *shape, form, dtype), normal(m, *shape, form, dtype)
        exact, middle = reference_training(*in_double(args))
        expected = OPS.dictionary(*some)
        x, d, values, support, bias = some
        found = gates.failed_gates(expected, reference(*some), known(*some))
        # four lanes add a long sum less well than many; and few numbers may by chance be all but exact in torch's products
        compared = values.shape[1] <= 128 and d.shape[3] <= 128 and min(expected.numel(), middle.numel()) >= 256
        assert not set(found) - ({"mistrusted"} if compared else {"mistrusted", "G1", "G2"}), (found, what)
        end = done % 2 == 0
        y, h = OPS.dictionary_training(*(gates.at_guard_page(t, end=end) for t in args))
        assert gates.exact_gate(y, exact) and gates.exact_gate(h, middle), what
        for end in (True, False):
            assert torch.equal(OPS.dictionary(*(gates.at_guard_page(t, end=end) for t in some)), expected), what
        rows = 137 if done % 10 == 0 else 1  # the library path too
        wrong = (x.repeat(rows, 1), d, values, bad_support(support, done // 2 % 4), bias)
        for end in (True, False):
            OPS.dictionary(*(gates.at_guard_page(t, end=end) for t in wrong))
        if form is torch.int16:  # a position that there is not is left out, on both paths
            gone, none = torch.rand(support.shape) < 0.3, torch.tensor([-1, d.shape[2], 2**15 - 1], dtype=torch.int16)
            positions = torch.where(gone, none[torch.randint(3, support.shape)], support)
            due = OPS.dictionary(wrong[0], d, values.masked_fill(gone, 0), support, bias)
            assert torch.equal(OPS.dictionary(wrong[0], d, values, positions, bias), due), what
        done += 1
    return done


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 1, 3, 24), (5, 4, 24)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_number_of_dimensions_on_every_path(dtype, shape):
    """Also few rows in a dtype that has no kernel, and many in one that has."""
    d, values = torch.randn(1, 1, 6, 24).to(dtype), torch.randn(10, 2).to(dtype)
    support = pack(torch.rand(10, 6).argsort(-1) < 2)
    x = torch.randn(shape).to(dtype)
    rows = x.reshape(-1, 24)
    assert torch.equal(OPS.dictionary(x, d, values, support, None).reshape(len(rows), 10),
                       OPS.dictionary(rows, d, values, support, None))


if __name__ == "__main__":
    sys.stdout.write(f"{_native.cpu_level()} {check_level()}\n")
