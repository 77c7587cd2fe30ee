"""One row of a race: an op against its peers on one layer at one m, what ran, how it was judged, and the floor.

The module of an op (low_rank.py, ...) says what is raced: OP, its name and that of our candidate; MEMBERS, how many pairs of
factors it has; blocks, if they are in blocks; PEERS; SCALE of the random weights; candidates(x, n, r, compiled);
work(layer, m), the numbers moved and the multiply-adds; judged(x, results), the gates that failed."""
from types import ModuleType

import torch
from torch import Tensor

from .. import _native
from . import graphs, timing
from .shapes import Layer
from .timing import Candidate, Pool, microseconds, repeats_for, times_faster

CPU_RATES = 5e9, 100e9  # bytes and operations per second, cautious: how many repeats fit a time


def measure(raced: ModuleType, pool: Pool, layer: Layer, m: int, seconds: float, *, limits: dict | None = None,
            compiled: bool = False) -> dict:
    """Microseconds of one call (`us`, and of each peer), `faster` = pair (the best composition of library calls) / ours by
    neighbouring repeats with its quartiles, and the floor: on the CPU a pure read of the factors, on a GPU bytes or operations
    at the measured ceilings.

    limits: graphs.ceilings() of the pool's GPU. compiled: also race torch.compile, which takes its time."""
    _, _, k, n, r = layer
    x = torch.randn(m, k, device=pool.values.device).to(pool.values.dtype)
    candidates = raced.candidates(x, n, r, compiled)
    count, (_, macs) = candidates[raced.OP].count, raced.work(layer, m)
    question = (raced.OP, x, n, r)
    more = {"members": raced.MEMBERS, "blocks": getattr(raced, "blocks", 1)}
    before = calls(*question, **more)
    if limits:
        pool.rescale(raced.SCALE)
        timed = graphs.paired(candidates, pool, repeats=101)
        floor_us = floor(raced.work(layer, m), x.element_size(), limits)
    else:
        call_seconds = max(count * x.element_size() / CPU_RATES[0], 2 * macs / CPU_RATES[1])
        timed = timing.paired(candidates | reads(count), pool, repeats=repeats_for(call_seconds, seconds))
        floor_us = min(microseconds(timed.pop(name)) for name in reads(0))
    ours = timed[raced.OP]
    us, (low, middle, high) = microseconds(ours), times_faster(ours, timed["pair"])
    row = sizes(layer, m, x) | {"ran": which_ran(*question, before, **more), "us": us, "least_us": min(ours.us)}
    row |= {f"{name}_us": microseconds(timed[name]) for name in raced.PEERS if name in timed}
    return row | {"faster": middle, "faster_low": low, "faster_high": high,
                  "against_best": min(row[f"{name}_us"] for name in raced.PEERS if name in timed) / us,
                  "gb_per_s": count * x.element_size() / us / 1e3, "tflop_per_s": 2e-6 * macs / us, "floor_us": floor_us,
                  "of_floor": floor_us / us, "repeats": len(ours.us), "failed_gates": raced.judged(x, ours.results)}


def sizes(layer: Layer, m: int, x: Tensor) -> dict:
    """How a row begins."""
    return {"model": layer.model, "layer": layer.name, "k": layer.k, "n": layer.n, "r": layer.r, "m": m, "dtype": dtype_name(x)}


def reads(count: int) -> dict[str, Candidate]:
    """Two ways for a CPU to do nothing but read; the faster one counts."""
    def as_floats(slab):
        return (slab.view(torch.float32),)

    return {
        "read by dot": Candidate(count, as_floats, lambda values: torch.dot(values, values)),
        "read by max": Candidate(count, as_floats, lambda values: torch.tensor(values.numpy().view("int32").max())),
    }


def floor(work: tuple[int, int], element_bytes: int, limits: dict) -> float:
    """Microseconds of a GPU at its ceilings: every number moved once, or the operations."""
    moved, macs = work
    return 1e6 * max(moved * element_bytes / limits["bytes_per_s"], 2 * macs / limits["flops_per_s"])


# --- which path ran ---

def config(op: str, x: Tensor, n: int, r: int, members: int = 1, blocks: int = 1) -> dict:
    """What choose_config says about this problem; {} without the compiled library or its kernels for this device."""
    if not _native.kernels().get(op, {}).get(x.device.type):
        return {}
    more = ({"members": members} if members > 1 else {}) | ({"b_in": blocks, "b_out": blocks} if blocks > 1 else {})
    if x.is_cuda:
        about = torch.cuda.get_device_properties(x.device)
        more |= {"arch": about.major * 10 + about.minor, "sm_count": about.multi_processor_count}
    return _native.native.choose_config(op, m=len(x), n=n, k=x.shape[1], r=r, dtype=dtype_name(x), device=x.device.type, **more)


def counted(op: str, x: Tensor, n: int, r: int, members: int = 1, blocks: int = 1) -> tuple[str, dict]:
    """The op whose counters tell what runs, and its config: low_rank, where a group's members go its way one by one."""
    chosen = config(op, x, n, r, members, blocks)
    return ("low_rank", config("low_rank", x, n, r)) if chosen.get("path") == "members" else (op, chosen)


def calls(op: str, x: Tensor, n: int, r: int, members: int = 1, blocks: int = 1) -> int:
    """Calls so far of the path that this problem should take."""
    op, chosen = counted(op, x, n, r, members, blocks)
    return _native.calls(op, x.device.type, chosen["path"]) if chosen else 0


def which_ran(op: str, x: Tensor, n: int, r: int, before: int, members: int = 1, blocks: int = 1) -> str:
    """The path that was taken since `before`, by its counter: the kernel with its level or variant, or what stood in."""
    _, chosen = counted(op, x, n, r, members, blocks)
    if not chosen or calls(op, x, n, r, members, blocks) == before:
        return "reference"
    path = chosen["path"]
    return path if path == "library" else f"kernel ({chosen.get('level') or chosen.get('variant') or path})"


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
