"""Kernels whose blocks wait for each other count them, in a counter that no launch beside may have: graphs and streams."""
import pytest
import torch

from lowfat import _native

pytestmark = pytest.mark.gpu
OPS = torch.ops.lowfat
M, K, N, R = 4, 264, 136, 64  # few blocks: two launches fit a GPU at the same time
LONG = 20_000_000  # cycles that a stream waits, while launches queue up behind


def low_rank(x, v, u, bias):
    return OPS.low_rank(x, v[0], u[0], bias)


def low_rank_epilogue(x, v, u, bias):
    return OPS.low_rank_epilogue(x, v[0], u[0], bias, "gelu", x[:, :N])


def low_rank_group(x, v, u, bias):
    return OPS.low_rank_group(x, v, u, [bias, None])


def low_rank_swiglu(x, v, u, bias):
    return OPS.low_rank_swiglu(x, v, u, [None, bias])


def low_rank_pivoted(x, v, u, bias):
    return OPS.low_rank_pivoted(x, v[0], u[0][R:], torch.arange(1, 2 * R, 2, device="cuda"), bias)


CALLS = {low_rank: "low_rank", low_rank_epilogue: "low_rank", low_rank_group: "low_rank_group",
         low_rank_swiglu: "low_rank_swiglu", low_rank_pivoted: "low_rank_pivoted"}  # and the op that counts the calls
each_op = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)


def operands():
    def numbers(*shape):
        return torch.randn(shape, device="cuda").mul_(shape[-1] ** -0.5).bfloat16()

    v, u = [numbers(R, K), numbers(16, K)], [numbers(N, R), numbers(N, 16)]
    return numbers(M, K), v, u, numbers(N)


def same(found, expected) -> bool:
    if isinstance(found, torch.Tensor):
        found, expected = [found], [expected]
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def captured(call, given):
    """A graph of one call, and its result; the call took the kernel."""
    call(*given)
    graph, before = torch.cuda.CUDAGraph(), _native.calls(CALLS[call], "cuda", "decode")
    with torch.cuda.graph(graph):
        found = call(*given)
    assert _native.calls(CALLS[call], "cuda", "decode") == before + 1
    return graph, found


@each_op
def test_a_graph_replays_with_new_values(call):
    x, *factors = operands()
    graph, found = captured(call, (x, *factors))
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert same(found, call(x, *factors))


@each_op
def test_two_streams_at_once(call):
    every, streams, found = [operands() for _ in range(2)], [torch.cuda.Stream() for _ in range(2)], [[], []]
    expected = [call(*given) for given in every]
    torch.cuda.synchronize()
    before = _native.calls(CALLS[call], "cuda", "decode")
    for i in range(100):
        for given, stream, results in zip(every, streams, found, strict=True):
            with torch.cuda.stream(stream):
                if i == 0:
                    torch.cuda._sleep(LONG)
                results.append(call(*given))
    torch.cuda.synchronize()
    assert _native.calls(CALLS[call], "cuda", "decode") == before + 200
    assert all(same(one, due) for results, due in zip(found, expected, strict=True) for one in results)


@each_op
def test_a_graph_beside_calls(call):
    """A graph may run while the stream that it was captured on does something else."""
    given, other, results = operands(), operands(), []
    expected, due = call(*given), call(*other)
    graph, found = captured(call, given)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for i in range(100):
        with torch.cuda.stream(stream):
            if i == 0:
                torch.cuda._sleep(LONG)
            graph.replay()
        if i == 0:
            torch.cuda._sleep(LONG)
        results.append(call(*other))
    torch.cuda.synchronize()
    assert same(found, expected) and all(same(one, due) for one in results)
