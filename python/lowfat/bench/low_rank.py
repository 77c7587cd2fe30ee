"""low_rank against its peers: two F.linear, the same compiled, the dense layer."""
import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..ops import low_rank
from . import graphs
from .gates import chain, failed_gates
from .measure import calls, floor, sizes, which_ran
from .shapes import Layer
from .timing import Candidate, Pool, compile_anew, microseconds, times_faster

OP, MEMBERS, PEERS = "low_rank", 1, ("pair", "compiled", "dense")
SCALE = 0.02  # of random weights


def work(layer: Layer, m: int) -> tuple[int, int]:
    """(numbers moved: weights, x and y once; multiply-adds)"""
    return (layer.r + m) * (layer.k + layer.n), m * layer.r * (layer.k + layer.n)


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
        pair = compile_anew(lambda x, v, u: linear(linear(x, v), u))
        found["compiled"] = Candidate(count, factors, lambda v, u: pair(x, v, u))
    return found


def factors_of(k: int, n: int, r: int):
    return lambda slab: (slab[:r * k].view(r, k), slab[r * k:].view(n, r))


def judged(x: Tensor, results: list[tuple[tuple, Tensor]]) -> list[str]:
    """The gates that any of these results fails, against fp64 and the library's own error on the same operands."""
    return sorted({gate for (v, u), y in results
                   for gate in failed_gates(y, linear(linear(x, v), u), chain(x, v.T, u.T))})


# --- a model's depth ---

def measure_chain(pool: Pool, layer: Layer, m: int, limits: dict) -> dict:
    """32 different layers in one graph, each fed with what the one before gave; microseconds are of one layer.

    A layer that is not square is followed by one of n -> k, which has as many bytes."""
    _, _, k, n, r = layer
    x = torch.randn(m, k, device=pool.values.device).to(pool.values.dtype)
    pool.rescale((r * math.sqrt(k * n)) ** -0.25)  # two layers in turn neither grow nor shrink what they are given
    before = calls(OP, x, n, r)
    timed = graphs.paired(chain_candidates(x, n, r), pool, repeats=51, calls=1, kept=1)
    us, pair_us = (microseconds(timed[name]) / graphs.LAYERS for name in ("low_rank", "pair"))
    low, middle, high = times_faster(timed["low_rank"], timed["pair"])
    floor_us = floor(work(layer, m), x.element_size(), limits)
    return sizes(layer, m, x) | {
        "ran": which_ran(OP, x, n, r, before), "layers": graphs.LAYERS, "us": us, "pair_us": pair_us, "faster": middle,
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
