"""The same race as timing.paired on a GPU: calls inside CUDA graphs, as a server runs them."""
import subprocess
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from .timing import Candidate, Pool, Timed, poison

LAYERS = 32  # calls in a graph: a model's depth
SLEEP_CYCLES = 200_000  # about 0.1 ms, in which the host queues what is timed


class Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    results: list[tuple[tuple, Tensor | list[Tensor]]]  # of each call: operands, and the buffers that a replay writes


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def pool_for(dtype: torch.dtype, scale: float, device: torch.device, count: int) -> Pool:
    """At least `count` numbers, and at least four times the L2 cache."""
    return Pool(dtype, scale, max(4 * l2_bytes(device), count * dtype.itemsize), device)


def record(candidate: Candidate, pool: Pool, calls: int, memory) -> Recorded:
    """Calls on weights of their own in one graph. Outputs are held, so that no two calls share a buffer, also where several
    graphs take theirs from one `memory` (torch.cuda.graph_pool_handle())."""
    every = [candidate.operands(pool.next(candidate.count)) for _ in range(calls)]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles, loads modules and sizes workspaces outside the capture
        for operands in every[:2]:
            candidate.call(*operands)
    torch.cuda.current_stream().wait_stream(aside)
    graph, results = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, pool=memory):
        for operands in every:
            results.append((operands, candidate.call(*operands)))
    return Recorded(graph, results)


def paired(candidates: dict[str, Candidate], pool: Pool, *, repeats: int, calls: int = LAYERS, kept: int = 4,
           warmup: int = 3) -> dict[str, Timed]:
    """Time every candidate once per repeat, in alternating order; microseconds are of one call among `calls` in a graph.

    As many graphs go around as have read twice the L2 cache before a weight comes again. Every output is NaN before a
    replay, so that what is judged was written by the replay that was timed."""
    cache = l2_bytes(pool.values.device)
    recorded, memory = {}, torch.cuda.graph_pool_handle()
    for name, candidate in candidates.items():
        graphs = ceil(2 * cache / (calls * candidate.count * pool.values.element_size()))
        recorded[name] = [record(candidate, pool, calls, memory) for _ in range(graphs)]
    us, last = {name: [] for name in candidates}, {}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(-warmup, repeats):
        for name in candidates if i % 2 else reversed(candidates):
            last[name] = one = recorded[name][i % len(recorded[name])]
            for _, y in one.results:
                poison(y)
            torch.cuda._sleep(SLEEP_CYCLES)
            start.record()
            one.graph.replay()
            end.record()
            end.synchronize()
            if i >= 0:
                us[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: Timed(us[name], one.results[::ceil(calls / kept)]) for name, one in last.items()}


def ceilings(device: torch.device) -> dict:
    """What this GPU reaches: bytes/s of a copy, read and written, and FLOP/s of a bf16 product. Both on random data; then its
    clocks, found and not set."""
    free, _ = torch.cuda.mem_get_info(device)
    source = torch.randint(-2**31, 2**31 - 1, (min(2 << 30, free // 4) // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy_us = median_us(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    product_us = median_us(lambda: torch.mm(a, b))
    return {"bytes_per_s": 2e6 * source.nbytes / copy_us, "flops_per_s": 2e6 * 8192**3 / product_us, "clocks": clocks()}


def clocks() -> str | None:
    """Of the multiprocessors and the memory now, as the driver's tool says it; None without the tool."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def median_us(call, repeats: int = 20) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(3 + repeats):
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return sorted(found[3:])[repeats // 2]
