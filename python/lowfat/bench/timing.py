"""Paired timing of calls on weights that come from memory, not from caches; what they returned is kept to be judged."""
import glob
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor


def last_level_cache_bytes() -> int:
    """Of cpu0; 64 MB where the system does not say."""
    sizes = [Path(path).read_text().strip() for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=64 << 20)


class Pool:
    """Random weights, over twice the last-level cache. next() goes around in it, so that every call finds its own in
    memory, as a model's decode step does. Never zeros: real hardware is faster on them."""

    def __init__(self, dtype: torch.dtype, scale: float, size_bytes: int | None = None, device: torch.device | str = "cpu"):
        size_bytes = size_bytes or 2 * last_level_cache_bytes() + (64 << 20)
        self.values, self.at, self.scale = torch.empty(size_bytes // dtype.itemsize, dtype=dtype, device=device), 0, scale
        for piece in self.values.split(1 << 24):  # no second copy of all of it in fp32
            piece.copy_(torch.randn(piece.numel(), device=device).mul_(scale))

    def rescale(self, scale: float) -> None:
        self.values.mul_(scale / self.scale)
        self.scale = scale

    def next(self, count: int) -> Tensor:
        if count > self.values.numel():
            raise ValueError(f"the pool has {self.values.numel()} numbers, {count} are needed")
        if self.at + count > self.values.numel():
            self.at = 0
        slab = self.values[self.at:self.at + count]
        self.at += -(-count // 64) * 64  # the next one starts at a cache line
        return slab


class Candidate(NamedTuple):
    count: int  # numbers it reads from the pool
    operands: Callable[[Tensor], tuple]  # those numbers, as the arguments of call; not timed
    call: Callable[..., Tensor | list[Tensor]]  # timed; must return tensors of its own


def compile_anew(call: Callable) -> Callable:
    """What torch.compile makes of it, with nothing left of earlier shapes: every one is compiled for itself."""
    torch.compiler.reset()
    return torch.compile(call, dynamic=False, mode="max-autotune-no-cudagraphs")


class Timed(NamedTuple):
    us: list[float]  # one per repeat
    results: list[tuple[tuple, Tensor | list[Tensor]]]  # operands and the very buffers of the last timed calls


def paired(candidates: dict[str, Candidate], pool: Pool, *, repeats: int, kept: int = 2,
           warmup: int = 2) -> dict[str, Timed]:
    """Time every candidate once per repeat on the CPU, in alternating order, each time on other weights.

    A buffer that goes back to the allocator is filled with NaN first, so that a candidate which computes nothing is given
    NaN or a result for other weights, and fails when its buffers are judged."""
    us, results = {name: [] for name in candidates}, {name: deque() for name in candidates}
    for name, candidate in candidates.items():
        y = candidate.call(*candidate.operands(pool.next(candidate.count)))
        blanks = [blank for _ in range(4) for blank in blanks_like(y)]  # held together, so that each is another buffer
        del y, blanks
    for i in range(-warmup, repeats):
        for name in candidates if i % 2 else reversed(candidates):
            candidate = candidates[name]
            operands = candidate.operands(pool.next(candidate.count))
            start = time.perf_counter()
            y = candidate.call(*operands)
            elapsed = time.perf_counter() - start
            if i >= 0:
                us[name].append(elapsed * 1e6)
            results[name].append((operands, y))
            del y
            if len(results[name]) > kept:
                _, old = results[name].popleft()
                poison(old)
                del old
    return {name: Timed(us[name], list(results[name])) for name in candidates}


def poison(y: Tensor | list[Tensor]) -> None:
    for one in outputs_of(y):
        one.fill_(poison_of(one))


def blanks_like(y: Tensor | list[Tensor]) -> list[Tensor]:
    return [torch.full_like(one, poison_of(one)) for one in outputs_of(y)]


def outputs_of(y: Tensor | list[Tensor]) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else y


def poison_of(y: Tensor) -> float | int:
    return float("nan") if y.dtype.is_floating_point else torch.iinfo(y.dtype).max


def times_faster(ours: Timed, theirs: Timed) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of theirs / ours over pairs of neighbours."""
    return tuple(quantiles([b / a for a, b in zip(ours.us, theirs.us, strict=True)], n=4))


def repeats_for(call_seconds: float, seconds: float) -> int:
    """Repeats that take about this long, never few; odd, so that the median is a measurement."""
    return max(15, min(301, int(seconds / call_seconds))) | 1


def microseconds(timed: Timed) -> float:
    return median(timed.us)
