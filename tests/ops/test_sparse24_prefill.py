"""The prefill kernel of sparse24 on a GPU: for which problems it is planned, that it runs there, and passes the gates."""
import pytest
import torch
from torch.nn.functional import linear

import gates
from lowfat import _native
from lowfat.bench.sparse24 import random_mask
from lowfat.ops.sparse24 import reference
from ops.test_sparse24_decode import dense, needs_library

OPS = torch.ops.lowfat
# m, k, n: every tile; tails of tokens, slabs, words of the mask and rows, one by one and together; layers of models
SHAPES = {"smallest": (65, 16, 1), "tokens": (65, 64, 64), "ragged": (130, 304, 131), "words": (100, 48, 520),
          "middle": (512, 1040, 4100), "large": (1030, 336, 4104), "bert": (512, 768, 3072), "llama": (1024, 4096, 4096),
          "llama up": (4096, 4096, 14336), "llama down": (777, 14336, 4096)}


def config(**changes) -> dict:
    return _native.native.choose_config("sparse24", **{**dict(m=1024, n=4096, k=4096, device="cuda"), **changes})


@needs_library
@pytest.mark.parametrize(("path", "changes"), [
    ("prefill", {}), ("prefill", {"m": 65}), ("decode", {"m": 64}), ("prefill", {"m": 1 << 20}),
    ("prefill", {"dtype": "float16"}), ("library", {"dtype": "float32"}), ("library", {"is_aligned": False}),
    ("library", {"kept": 1}), ("library", {"kept": 4, "group": 8}), ("prefill", {"k": 4112}), ("library", {"k": 4104}),
    ("prefill", {"n": 4095}), ("library", {"arch": 100}), ("prefill", {"arch": 80, "sm_count": 108}),
    ("prefill", {"arch": 86, "sm_count": 84}), ("library", {"m": 1 << 25})])
def test_the_path_follows_what_the_kernel_covers(path, changes):
    assert config(**changes)["path"] == path


@needs_library
@pytest.mark.parametrize(("rows", "tokens", "changes"), [
    (256, 128, {}), (256, 128, {"m": 8192, "n": 14336}), (128, 128, {"m": 512}), (64, 64, {"m": 65}),
    (64, 64, {"m": 512, "n": 768, "k": 768}), (128, 128, {"arch": 86, "sm_count": 84, "m": 8192})])
def test_tiles_are_as_large_as_leave_no_multiprocessor_idle(rows, tokens, changes):
    found = config(**changes)
    assert (found["rows"], found["tokens"]) == (rows, tokens) and found["grid"] > 0


def operands(m, k, n, dtype, *, is_whole=False):
    make = (lambda *sizes: torch.randint(-1, 2, sizes)) if is_whole else torch.randn
    size = 1 if is_whole else (k / 2)**0.5
    x, values, bias = (t.to("cuda", dtype) for t in (make(m, k), make(n, k // 2) / size, make(n)))
    return x, values, random_mask(n, k, 2, 4, torch.device("cuda")), bias


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernel_runs_and_passes_the_gates(shape, dtype):
    args, before = operands(*shape, dtype), _native.calls("sparse24", "cuda", "prefill")
    y = gates.check_call(lambda *a: OPS.sparse24(*a, 2, 4), args)
    assert _native.calls("sparse24", "cuda", "prefill") == before + 2  # check_call calls twice
    x, w, bias = args[0], dense(args), args[3]
    assert gates.failed_gates(y, linear(x, w, bias), gates.chain(x, w.T, bias=bias)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(65, 208, 70), (300, 192, 2100), (1100, 80, 4097)])
def test_whole_numbers_are_exact(shape):
    args = operands(*shape, torch.bfloat16, is_whole=True)
    exact = linear(args[0].double(), dense(args).double(), args[3].double())
    assert gates.exact_gate(OPS.sparse24(*args, 2, 4), exact)


@pytest.mark.gpu
def test_an_input_that_no_row_keeps_is_not_read():
    x, values, mask, bias = operands(100, 64, 40, torch.bfloat16)
    mask.fill_(0x33333333)  # the first two of four
    due = OPS.sparse24(x, values, mask, bias, 2, 4)
    x[:, 2::4] = float("nan")
    assert torch.equal(OPS.sparse24(x, values, mask, bias, 2, 4), due)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["middle", "llama"])
def test_the_same_bits_every_time(shape):
    args = operands(*SHAPES[shape], torch.bfloat16)
    first = OPS.sparse24(*args, 2, 4)
    assert all(torch.equal(OPS.sparse24(*args, 2, 4), first) for _ in range(100))
    less = OPS.sparse24(args[0][-70:], *args[1:], 2, 4)  # other tiles
    assert torch.equal(less, first[-70:])


@pytest.mark.gpu
def test_a_graph_replays_with_new_values():
    x, *weight = operands(*SHAPES["bert"], torch.bfloat16)
    OPS.sparse24(x, *weight, 2, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OPS.sparse24(x, *weight, 2, 4)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, OPS.sparse24(x, *weight, 2, 4))


@pytest.mark.gpu
def test_rows_that_are_no_whole_pieces_go_to_the_library():
    args, before = operands(65, 72, 8, torch.bfloat16), _native.calls("sparse24", "cuda", "library")
    assert torch.equal(OPS.sparse24(*args, 2, 4), reference(*args, 2, 4))
    assert _native.calls("sparse24", "cuda", "library") == before + 1


@pytest.mark.gpu
def test_a_bad_mask_harms_its_row_alone():
    x, values, mask, bias = operands(130, 448, 140, torch.bfloat16)
    due, bad = OPS.sparse24(x, values, mask, bias, 2, 4), mask.clone()
    bad[7] = torch.randint(-2**31, 2**31 - 1, bad[7].shape, device="cuda")
    y = OPS.sparse24(x, values, bad, bias, 2, 4)
    assert torch.equal(y[:, torch.arange(140) != 7], due[:, torch.arange(140) != 7])
