"""low_rank against its peers: two F.linear, the same compiled, the dense layer; and the floor that none gets below.

A row has microseconds of one call (`us`, and of each peer), `faster` = pair / ours by neighbouring repeats with its
quartiles, and the floor: on the CPU a pure read of the factors, on a GPU bytes or operations at the measured ceilings."""
import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import _native
from ..ops import low_rank
from . import graphs, timing
from .gates import chain, failed_gates
from .shapes import Layer
from .timing import Candidate, Pool, microseconds, repeats_for, times_faster

SCALE = 0.02  # of random weights
PEERS = ("pair", "compiled", "dense")
CPU_RATES = 5e9, 100e9  # bytes and operations per second, cautious: how many repeats fit a time


def measure(pool: Pool, layer: Layer, m: int, seconds: float, *, limits: dict | None = None, compiled: bool = False) -> dict:
    """One row. limits: graphs.ceilings() of the pool's GPU. compiled: also race torch.compile, which takes its time."""
    _, _, k, n, r = layer
    x = torch.randn(m, k, device=pool.values.device).to(pool.values.dtype)
    peers = candidates(x, n, r, compiled)
    bytes_read = r * (k + n) * x.element_size()
    before = calls(x, n, r)
    if limits:
        pool.rescale(SCALE)
        timed = graphs.paired(peers, pool, repeats=101)
        floor_us = floor(layer, m, x.element_size(), limits)
    else:
        call_seconds = max(bytes_read / CPU_RATES[0], 2 * m * r * (k + n) / CPU_RATES[1])
        timed = timing.paired(peers | reads(r * (k + n)), pool, repeats=repeats_for(call_seconds, seconds))
        floor_us = min(microseconds(timed.pop(name)) for name in reads(0))
    ours = timed["low_rank"]
    us, (low, middle, high) = microseconds(ours), times_faster(ours, timed["pair"])
    row = {"model": layer.model, "layer": layer.name, "k": k, "n": n, "r": r, "m": m, "dtype": dtype_name(x),
           "ran": which_ran(x, n, r, before), "us": us, "least_us": min(ours.us)}
    row |= {f"{name}_us": microseconds(timed[name]) for name in PEERS if name in timed}
    return row | {"faster": middle, "faster_low": low, "faster_high": high,
                  "against_best": min(row[f"{name}_us"] for name in PEERS if name in timed) / us,
                  "gb_per_s": bytes_read / us / 1e3, "tflop_per_s": 2e-6 * m * r * (k + n) / us, "floor_us": floor_us,
                  "of_floor": floor_us / us, "repeats": len(ours.us), "failed_gates": judged(x, ours.results)}


def candidates(x: Tensor, n: int, r: int, compiled: bool = False) -> dict[str, Candidate]:
    """Ours and its PEERS."""
    k, factors = x.shape[1], factors_of(x.shape[1], n, r)
    count = r * (k + n)
    found = {
        "low_rank": Candidate(count, factors, lambda v, u: low_rank(x, v, u)),
        "pair": Candidate(count, factors, lambda v, u: linear(linear(x, v), u)),
        "dense": Candidate(k * n, lambda slab: (slab.view(n, k),), lambda weight: linear(x, weight)),
    }
    if compiled:
        torch.compiler.reset()  # every shape is compiled for itself
        pair = torch.compile(lambda x, v, u: linear(linear(x, v), u), dynamic=False, mode="max-autotune-no-cudagraphs")
        found["compiled"] = Candidate(count, factors, lambda v, u: pair(x, v, u))
    return found


def factors_of(k: int, n: int, r: int):
    return lambda slab: (slab[:r * k].view(r, k), slab[r * k:].view(n, r))


def reads(count: int) -> dict[str, Candidate]:
    """Two ways for a CPU to do nothing but read; the faster one counts."""
    def as_floats(slab):
        return (slab.view(torch.float32),)

    return {
        "read by dot": Candidate(count, as_floats, lambda values: torch.dot(values, values)),
        "read by max": Candidate(count, as_floats, lambda values: torch.tensor(values.numpy().view("int32").max())),
    }


def judged(x: Tensor, results: list[tuple[tuple, Tensor]]) -> list[str]:
    """The gates that any of these results fails, against fp64 and the library's own error on the same operands."""
    return sorted({gate for (v, u), y in results
                   for gate in failed_gates(y, linear(linear(x, v), u), chain(x, v.T, u.T))})


def floor(layer: Layer, m: int, element_bytes: int, limits: dict) -> float:
    """Microseconds of a GPU at its ceilings: weights, x and y moved once, or the operations."""
    _, _, k, n, r = layer
    return 1e6 * max((r + m) * (k + n) * element_bytes / limits["bytes_per_s"], 2 * m * r * (k + n) / limits["flops_per_s"])


# --- a model's depth ---

def measure_chain(pool: Pool, layer: Layer, m: int, limits: dict) -> dict:
    """32 different layers in one graph, each fed with what the one before gave; microseconds are of one layer.

    A layer that is not square is followed by one of n -> k, which has as many bytes."""
    _, _, k, n, r = layer
    x = torch.randn(m, k, device=pool.values.device).to(pool.values.dtype)
    pool.rescale((r * math.sqrt(k * n)) ** -0.25)  # two layers in turn neither grow nor shrink what they are given
    before = calls(x, n, r)
    timed = graphs.paired(chain_candidates(x, n, r), pool, repeats=51, calls=1, kept=1)
    us, pair_us = (microseconds(timed[name]) / graphs.LAYERS for name in ("low_rank", "pair"))
    low, middle, high = times_faster(timed["low_rank"], timed["pair"])
    floor_us = floor(layer, m, x.element_size(), limits)
    return {"model": layer.model, "layer": layer.name, "k": k, "n": n, "r": r, "m": m, "dtype": dtype_name(x),
            "ran": which_ran(x, n, r, before), "layers": graphs.LAYERS, "us": us, "pair_us": pair_us, "faster": middle,
            "faster_low": low, "faster_high": high, "floor_us": floor_us, "of_floor": floor_us / us,
            "failed_gates": judged_chain(x, timed["low_rank"].results)}


def chain_candidates(x: Tensor, n: int, r: int) -> dict[str, Candidate]:
    """Ours and the pair; operands are v, u, v, u ..., and a call returns what every layer gave."""
    k = x.shape[1]
    shapes = [(r, k), (n, r), (r, n), (k, r)] * (graphs.LAYERS // 2)

    def factors(slab):
        pieces = slab.split([rows * columns for rows, columns in shapes])
        return tuple(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))

    def through(layer):
        def call(*weights):
            outputs = [x]
            for v, u in zip(weights[::2], weights[1::2], strict=True):
                outputs.append(layer(outputs[-1], v, u))
            return outputs[1:]
        return Candidate(graphs.LAYERS * r * (k + n), factors, call)

    return {"low_rank": through(lambda x, v, u: low_rank(x, v, u)), "pair": through(lambda x, v, u: linear(linear(x, v), u))}


def judged_chain(x: Tensor, results: list[tuple[tuple, list[Tensor]]]) -> list[str]:
    """As judged, each layer by what it was fed: bounds on the whole chain would forgive anything."""
    return sorted({gate for weights, outputs in results
                   for fed, v, u, y in zip([x, *outputs[:-1]], weights[::2], weights[1::2], outputs, strict=True)
                   for gate in judged(fed, [((v, u), y)])})


# --- which path ran ---

def config(x: Tensor, n: int, r: int) -> dict:
    """What choose_config says about this problem; {} without the compiled library or its kernels for this device."""
    if not _native.kernels().get("low_rank", {}).get(x.device.type):
        return {}
    gpu = {}
    if x.is_cuda:
        about = torch.cuda.get_device_properties(x.device)
        gpu = {"arch": about.major * 10 + about.minor, "sm_count": about.multi_processor_count}
    return _native.native.choose_config("low_rank", m=len(x), n=n, k=x.shape[1], r=r, dtype=dtype_name(x),
                                        device=x.device.type, **gpu)


def calls(x: Tensor, n: int, r: int) -> int:
    """Calls so far of the path that this problem should take."""
    chosen = config(x, n, r)
    return _native.calls("low_rank", x.device.type, chosen["path"]) if chosen else 0


def which_ran(x: Tensor, n: int, r: int, before: int) -> str:
    """The path that was taken since `before`, by its counter: the kernel with its level or variant, or what stood in."""
    chosen = config(x, n, r)
    if not chosen or calls(x, n, r) == before:
        return "reference"
    path = chosen["path"]
    return path if path == "library" else f"kernel ({chosen.get('level') or chosen.get('variant') or path})"


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
