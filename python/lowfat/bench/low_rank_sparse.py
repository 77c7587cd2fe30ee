"""low_rank_sparse against its peers: the published method by torch's products, which makes the whole weight at every call,
and the dense layer."""
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..ops import low_rank_sparse
from ..ops.low_rank_sparse import index_dtype
from .gates import Chain, chain, failed_gates
from .shapes import Layer
from .sparse24 import going_around
from .timing import Candidate


@dataclass(frozen=True)
class LowRankSparse:
    """As measure.py wants a module of an op; every row of S has as many entries."""
    density: float = 0.03

    OP, MEMBERS, PEERS = "low_rank_sparse", 1, ("pair", "dense")
    SCALE = 0.02  # of random weights

    def entries(self, k: int) -> int:
        """Of a row."""
        return max(1, round(self.density * k))

    def numbers(self, k: int, n: int, r: int) -> tuple[int, int]:
        """Of both factors and the values, and 16-bit numbers of the support."""
        entries = n * self.entries(k)
        return r * (k + n) + entries, entries * index_dtype(k).itemsize // 2 + 2 * (n + 1)

    def rank_for(self, k: int, n: int, ratio: float) -> int:
        """In multiples of 8, `ratio` of the weight's parameters with S."""
        return max(8, int((ratio * k * n - n * self.entries(k)) / (k + n)) // 8 * 8)

    def work(self, layer: Layer, m: int) -> tuple[int, int]:
        """(numbers moved: factors, values, support as 16-bit numbers, x and y once; multiply-adds, S's entries alone)"""
        weights, support = self.numbers(layer.k, layer.n, layer.r)
        return weights + support + m * (layer.k + layer.n), m * weights

    def candidates(self, x: Tensor, n: int, r: int, compiled: bool = False) -> dict[str, Candidate]:
        """Ours and its PEERS; there is nothing to compile."""
        k = x.shape[1]
        weights, support = self.numbers(k, n, r)
        count = weights + support * 2 // x.element_size()
        columns = self.random_columns(n, k, x.device)
        starts = torch.arange(n + 1, dtype=torch.int32, device=x.device) * columns.shape[1]
        supports = going_around(columns, (2 * count + k * n) * x.element_size())
        first = (torch.arange(n, device=x.device) * k)[:, None]
        places = going_around(columns.long() + first, (2 * count + k * n) * x.element_size())

        def factors(slab):
            return slab[:r * k].view(r, k), slab[r * k:r * (k + n)].view(n, r), slab[r * (k + n):weights]

        return {
            self.OP: Candidate(count, lambda slab: (*factors(slab), starts, next(supports).flatten()),
                               lambda *operands: low_rank_sparse(x, *operands)),
            "pair": Candidate(count, lambda slab: (*factors(slab), next(places).flatten()),
                              lambda *operands: published(x, *operands)),
            "dense": Candidate(k * n, lambda slab: (slab.view(n, k),), lambda weight: linear(x, weight)),
        }

    def random_columns(self, n: int, k: int, device: torch.device) -> Tensor:
        return torch.rand(n, k, device=device).argsort(-1)[:, :self.entries(k)].sort(-1).values.to(index_dtype(k))

    def judged(self, x: Tensor, results: list[tuple[tuple, Tensor]]) -> list[str]:
        """The gates that any of these results fails, against fp64 and the library's own error on the same operands."""
        return sorted({gate for operands, y in results
                       for gate in failed_gates(y, products(x, *operands), known(x, *operands))})


def published(x: Tensor, v: Tensor, u: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """SLTrain's own way: the weight by a product and an addition at int64 places, then a dense layer."""
    weight = u @ v
    return linear(x, weight.view(-1).scatter_add_(0, places, values).view(weight.shape))


def sparse(values: Tensor, starts: Tensor, columns: Tensor, n: int, k: int) -> Tensor:
    """S, dense."""
    rows = torch.repeat_interleave(torch.arange(n, device=starts.device), starts.long().diff())
    return values.new_zeros(n, k).index_put((rows, columns.long()), values)


def products(x: Tensor, v: Tensor, u: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None = None,
             scale: float = 1.0) -> Tensor:
    """The op by torch's products, every result rounded."""
    s = sparse(values, starts, columns, len(u), v.shape[1])
    return linear(linear(x, v) * scale, u, bias) + linear(x, s)


def known(x: Tensor, v: Tensor, u: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None = None,
          scale: float = 1.0) -> Chain:
    """What the gates need to know: of the low-rank part, then of S."""
    s = sparse(values, starts, columns, len(u), v.shape[1])
    return both(scaled(chain(x, v.T, u.T), scale), chain(x, s.T, bias=bias))


def scaled(one: Chain, scale: float) -> Chain:
    return Chain(scale * one.y64, [abs(scale) * mid for mid in one.mids], abs(scale) * one.magnitude, one.length,
                 one.roundings)


def both(one: Chain, other: Chain) -> Chain:
    """Their sum."""
    return Chain(one.y64 + other.y64, [*one.mids, *other.mids], one.magnitude + other.magnitude, one.length + other.length,
                 one.roundings)
