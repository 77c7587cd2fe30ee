"""The small-batch kernels of low_rank on the GPU that is here: that they run where they are meant to, and pass the gates."""
import pytest
import torch
from torch.nn.functional import linear

import gates
from lowfat import _native

OPS = torch.ops.lowfat
HALVES = (torch.bfloat16, torch.float16)
# every size of a group; ragged m; a tail of each tile; rings that go around; layers of models
SHAPES = {"smallest": (17, 8, 8, 8), "ragged": (31, 264, 72, 136), "cluster": (64, 520, 64, 72),
          "halves": (129, 200, 72, 88), "long": (250, 65536, 200, 40), "wide": (100, 136, 2056, 18432), "bert": (128, 768, 192, 3072),
          "llama": (256, 4096, 1024, 14336)}


def kernel_here() -> str | None:
    """The path of the small-batch kernels that this GPU has."""
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    return {8: "small batch sm_80", 9: "small batch"}.get(major)


KERNEL = kernel_here()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not KERNEL, reason="no GPU that has small-batch kernels")]


def paths() -> dict[str, int]:
    known = ("decode", "small batch", "small batch sm_80", "library")
    return {path: _native.calls("low_rank", "cuda", path) for path in known}


def operands(m, k, r, n, dtype):
    v, u = torch.randn(r, k) / k**0.5, torch.randn(n, r) / r**0.5
    return tuple(t.to("cuda", dtype) for t in (torch.randn(m, k), v, u, torch.randn(n)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_within_the_gates(shape, dtype):
    x, v, u, bias = args = operands(*shape, dtype)
    known, before = gates.chain(x, v.T, u.T, bias=bias), paths()
    found = gates.check_call(OPS.low_rank, args)
    y, h = gates.check_call(OPS.low_rank_training, args)
    assert paths() == before | {KERNEL: before[KERNEL] + 4}  # check_call calls twice
    assert torch.equal(found, y)
    assert gates.failed_gates(found, linear(linear(x, v), u, bias), known) == []
    assert gates.failed_gates(h, linear(x, v), gates.chain(x, v.T)) == []


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m", [17, 33, 65, 129, 256])
def test_whole_numbers_are_exact(m, dtype):
    args = gates.whole_inputs(m, 520, 136, 200, dtype)
    x, v, u, bias = args
    exact = gates.chain(x, v.T, u.T, bias=bias).y64
    assert gates.exact_gate(OPS.low_rank(*(t.cuda() for t in args)).cpu(), exact)


@pytest.mark.parametrize("shape", ["llama", "cluster"])
def test_the_same_bits_every_time(shape):
    args = operands(*SHAPES[shape], torch.bfloat16)
    first = OPS.low_rank(*args)
    assert all(torch.equal(OPS.low_rank(*args), first) for _ in range(200))


def test_a_graph_replays_with_new_values():
    x, *factors = operands(*SHAPES["bert"], torch.bfloat16)
    OPS.low_rank(x, *factors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OPS.low_rank(x, *factors)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, OPS.low_rank(x, *factors))


@pytest.mark.parametrize("shape", [(32, 68, 8, 8), (32, 64, 12, 8), (32, 64, 8, 9)])
def test_the_library_does_the_rest(shape):
    x, v, u, bias = args = operands(*shape, torch.bfloat16)
    before = paths()
    assert torch.equal(OPS.low_rank(*args), linear(linear(x, v), u, bias))
    assert paths() == before | {"library": before["library"] + 1}


def test_operands_off_their_alignment_go_to_the_library():
    x, v, u, bias = operands(32, 64, 8, 8, torch.bfloat16)
    before = paths()
    assert torch.equal(OPS.low_rank(gates.laid_out(x, "offset"), v, u, bias), linear(linear(x, v), u, bias))
    assert paths()["library"] == before["library"] + 1


def test_streams_at_once():
    """Each stream has a barrier of its own, where the kernels have one."""
    args = [operands(*SHAPES[name], torch.bfloat16) for name in ("bert", "cluster", "bert")]
    expected, streams, found = [OPS.low_rank(*one) for one in args], [torch.cuda.Stream() for _ in args], [[] for _ in args]
    torch.cuda.synchronize()
    for _ in range(50):
        for one, stream, ys in zip(args, streams, found, strict=True):
            with torch.cuda.stream(stream):
                ys.append(OPS.low_rank(*one))
    torch.cuda.synchronize()
    assert all(torch.equal(y, due) for ys, due in zip(found, expected, strict=True) for y in ys)
