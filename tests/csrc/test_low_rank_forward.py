"""The arithmetic of the CUDA forward, compiled for the host: the kernel has not run on a GPU yet, its indices are held here."""
import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from gates import chain, failed_gates
from torch.nn.functional import linear

HERE = Path(__file__).parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# m, k, r, n: whole 16-byte packs, ragged ones, one element, more packs than lanes; each number of rows of x its instance
SHAPES = [(1, 64, 32, 40), (1, 769, 1, 255), (3, 100, 5, 9), (4, 1024, 96, 33), (5, 31, 33, 130), (16, 1073, 33, 130),
          (13, 4104, 64, 64), (1, 1, 1, 1), (2, 8, 0, 3), (2, 0, 3, 5)]


@pytest.fixture(scope="module")
def forward(tmp_path_factory):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    built = tmp_path_factory.mktemp("host") / "forward.so"
    flags = "-fPIC,-fsanitize=undefined,-fno-sanitize-recover=all,-static-libubsan"
    subprocess.run(["nvcc", "-x", "c++", "-std=c++17", "-O1", "-shared", "-cudart", "none", "-Xcompiler", flags,
                    "-I", str(HERE.parents[1] / "csrc"), str(HERE / "low_rank_forward_host.cpp"), "-o", str(built)], check=True)
    library = ctypes.CDLL(str(built))

    def call(x, v, u, bias):
        h, y = x.new_full((x.shape[0], v.shape[0]), float("nan")), x.new_full((x.shape[0], u.shape[0]), float("nan"))
        pointers = [ctypes.c_void_p(t.data_ptr() or None) if t is not None else None for t in (x, v, u, bias, h, y)]
        sizes = [ctypes.c_int64(size) for size in (x.shape[0], x.shape[1], v.shape[0], u.shape[0])]
        library.forward_on_host(*pointers, *sizes, DTYPES.index(x.dtype))
        return y, h

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "offset"])
def test_forward(forward, shape, dtype, offset):
    m, k, r, n = shape

    def placed(*size):  # offset 1: aligned to nothing but the element
        values = torch.randn(size) / max(1, size[-1]) ** 0.5
        flat = torch.empty(values.numel() + offset, dtype=dtype)
        flat[offset:] = values.flatten()
        return flat[offset:].view(size)

    x, v, u, bias = placed(m, k), placed(r, k), placed(n, r), placed(n)
    for b in (bias, None):
        y, h = forward(x, v, u, b)
        if k and r:
            assert failed_gates(y, linear(linear(x, v), u, b), chain(x, v.T, u.T, bias=b)) == []
        else:
            assert torch.equal(y, torch.zeros(m, n, dtype=dtype) if b is None else b.expand(m, n))
        assert h.isfinite().all()


def test_not_a_number_stays_in_its_row(forward):
    x, v, u = torch.randn(5, 40), torch.randn(7, 40), torch.randn(9, 7)
    x[2, 39] = float("nan")
    y, _ = forward(x, v, u, None)
    assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()
