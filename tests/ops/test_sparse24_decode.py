"""The forward kernel of sparse24 on a GPU: for which problems it is planned, that it runs there, and passes the gates."""
import pytest
import torch
from torch.nn.functional import linear

import gates
from lowfat import _native
from lowfat.ops.bitmap import expand, unpack
from lowfat.ops.sparse24 import reference

OPS = torch.ops.lowfat
needs_library = pytest.mark.skipif(_native.native is None, reason=f"no compiled library: {_native.why_not}")
# m, k, n: every number of token tiles; a tail of each tile and batch; units in turn; layers of models
SHAPES = {"smallest": (1, 64, 1), "ragged": (3, 192, 17), "tile": (8, 1024, 50), "two tiles": (13, 320, 140),
          "four tiles": (27, 2112, 165), "eight tiles": (61, 576, 330), "long": (5, 65536, 40), "bert": (16, 768, 3072),
          "llama": (1, 4096, 4096), "llama batch": (64, 4096, 14336), "llama down": (8, 14336, 4096)}


def config(**changes) -> dict:
    return _native.native.choose_config("sparse24", **{**dict(m=1, n=4096, k=4096, device="cuda"), **changes})


@needs_library
@pytest.mark.parametrize(("path", "changes"), [
    ("empty", {"m": 0}), ("decode", {}), ("decode", {"m": 64}), ("prefill", {"m": 65}), ("decode", {"dtype": "float16"}),
    ("library", {"dtype": "float32"}), ("library", {"is_aligned": False}), ("library", {"kept": 1}),
    ("library", {"kept": 4, "group": 8}), ("library", {"k": 4128}), ("decode", {"n": 4095}), ("library", {"arch": 100}),
    ("decode", {"arch": 80, "sm_count": 108}), ("decode", {"arch": 86, "sm_count": 84})])
def test_the_path_follows_what_the_kernel_covers(path, changes):
    assert config(**changes)["path"] == path


@needs_library
def test_k_is_split_where_x_does_not_fit_or_rows_are_few():
    assert (config()["splits"], config()["grid"]) == (1, 132)
    assert config(m=64)["splits"] > 1 and config(m=8, k=14336)["splits"] > 1
    few = config(k=32768, n=256)
    assert few["splits"] > 1 and few["grid"] % few["splits"] == 0


def operands(m, k, n, dtype, *, is_whole=False):
    make = (lambda *sizes: torch.randint(-1, 2, sizes)) if is_whole else torch.randn
    keep = torch.rand(n, k // 4, 4).argsort(-1) < 2
    bits = keep.reshape(n, k // 32, 32).long() << torch.arange(32)
    mask = bits.sum(-1).to(torch.uint32).view(torch.int32)
    size = 1 if is_whole else (k / 2)**0.5
    x, values, bias = (t.to("cuda", dtype) for t in (make(m, k), make(n, k // 2) / size, make(n)))
    return x, values, mask.cuda(), bias


def dense(args):
    x, values, mask, _ = args
    return expand(values, unpack(mask, x.shape[-1]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernel_runs_and_passes_the_gates(shape, dtype):
    args, before = operands(*shape, dtype), _native.calls("sparse24", "cuda", "decode")
    y = gates.check_call(lambda *a: OPS.sparse24(*a, 2, 4), args)
    assert _native.calls("sparse24", "cuda", "decode") == before + 2  # check_call calls twice
    x, w, bias = args[0], dense(args), args[3]
    assert gates.failed_gates(y, linear(x, w, bias), gates.chain(x, w.T, bias=bias)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 9, 20, 64])
def test_whole_numbers_are_exact(m):
    args = operands(m, 192, 70, torch.bfloat16, is_whole=True)
    exact = linear(args[0].double(), dense(args).double(), args[3].double())
    assert gates.exact_gate(OPS.sparse24(*args, 2, 4), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["llama", "llama batch", "long"])
def test_the_same_bits_every_time(shape):
    args = operands(*SHAPES[shape], torch.bfloat16)
    first = OPS.sparse24(*args, 2, 4)
    assert all(torch.equal(OPS.sparse24(*args, 2, 4), first) for _ in range(100))


@pytest.mark.gpu
def test_a_graph_replays_with_new_values():
    x, *weight = operands(*SHAPES["llama batch"], torch.bfloat16)
    OPS.sparse24(x, *weight, 2, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OPS.sparse24(x, *weight, 2, 4)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, OPS.sparse24(x, *weight, 2, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(65, 72, 8), (1, 96, 8), (2, 68, 9)])
def test_the_library_does_the_rest(shape):
    m, k, n = shape
    x, bias = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(n, device="cuda").bfloat16()
    values, mask = torch.randn(n, k // 2, device="cuda").bfloat16(), torch.full((n, -(-k // 32)), 0x55555555, device="cuda")
    mask[:, -1] &= (1 << (k - 1) % 32 + 1) - 1
    args, before = (x, values, mask.int(), bias), _native.calls("sparse24", "cuda", "library")
    assert torch.equal(OPS.sparse24(*args, 2, 4), reference(*args, 2, 4))
    assert _native.calls("sparse24", "cuda", "library") == before + 1


@pytest.mark.gpu
def test_a_bad_mask_harms_its_row_alone():
    x, values, mask, bias = operands(3, 448, 40, torch.bfloat16)
    due, bad = OPS.sparse24(x, values, mask, bias, 2, 4), mask.clone()
    bad[7] = torch.randint(-2**31, 2**31 - 1, bad[7].shape, device="cuda")
    y = OPS.sparse24(x, values, bad, bias, 2, 4)
    assert torch.equal(y[:, torch.arange(40) != 7], due[:, torch.arange(40) != 7])
