"""sparse24 against its peers, the dense layer and on a GPU torch's own 2:4: r of every 4 neighbours are kept, 2 if not said
otherwise."""
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured as semi_structured

from ..errors import ArgumentError
from ..ops import sparse24
from ..ops.bitmap import expand, pack, unpack, words
from . import timing
from .gates import chain, failed_gates
from .shapes import Layer
from .timing import Candidate


@dataclass(frozen=True)
class Sparse24:
    """As measure.py wants a module of an op."""
    group: int = 4

    OP, MEMBERS, PEERS = "sparse24", 1, ("pair", "semi_structured")
    SCALE = 0.02  # of random weights

    def rank_for(self, k: int, n: int, ratio: float) -> int:
        return max(1, int(ratio * self.group))

    def most(self, k: int, n: int) -> int:
        if k % self.group:
            raise ArgumentError(f"k must be a multiple of {self.group} for sparse24; found {k}")
        return self.group

    def work(self, layer: Layer, m: int) -> tuple[int, int]:
        """(numbers moved: values, a mask of 16-bit numbers, x and y once; multiply-adds, those with zero left out)"""
        values = layer.n * layer.k // self.group * layer.r
        return values + 2 * layer.n * words(layer.k) + m * (layer.k + layer.n), m * values

    def candidates(self, x: Tensor, n: int, r: int, compiled: bool = False) -> dict[str, Candidate]:
        """Ours and its PEERS; there is nothing to compile."""
        k = x.shape[1]
        stored, mask_numbers = k // self.group * r, n * words(k) * 4 // x.element_size()
        masks = going_around(random_mask(n, k, r, self.group, x.device), (n * stored + n * k) * x.element_size())
        found = {
            self.OP: Candidate(n * stored + mask_numbers, lambda slab: (slab[:n * stored].view(n, stored), next(masks)),
                               lambda values, mask: sparse24(x, values, mask, kept=r, group=self.group)),
            "pair": Candidate(k * n, lambda slab: (slab.view(n, k),), lambda weight: linear(x, weight)),
        }
        if has_semi_structured(x, n, r, self.group):
            keep = unpack(random_mask(n, k, r, self.group, x.device), k)
            found["semi_structured"] = Candidate(k * n, lambda slab: (semi_structured(slab.view(n, k) * keep),),
                                                 lambda weight: linear(x, weight))
        return found

    def judged(self, x: Tensor, results: list[tuple[tuple, Tensor]]) -> list[str]:
        """The gates that any of these results fails, against fp64 and the library's own error on the same operands."""
        failed = set()
        for (values, mask), y in results:
            weight = expand(values, unpack(mask, x.shape[1]))
            failed.update(failed_gates(y, linear(x, weight), chain(x, weight.T)))
        return sorted(failed)


def has_semi_structured(x: Tensor, n: int, kept: int, group: int) -> bool:
    """Whether torch's own 2:4 (cuSPARSELt where it is there, else CUTLASS) covers this problem."""
    return x.is_cuda and x.element_size() == 2 and (kept, group) == (2, 4) and n % 32 == 0 and x.shape[1] % 64 == 0


def random_mask(n: int, k: int, kept: int, group: int, device: torch.device) -> Tensor:
    order = torch.rand(n, k // group, group, device=device).argsort(-1)
    return pack((order < kept).flatten(1))


def going_around(indices: Tensor, bytes_between: int):
    """The same indices with their rows rolled, so many that none is used again before twice the last-level cache was read,
    of which a call and its peers read this much: they come from memory as the weights of a pool do."""
    count = 2 * timing.last_level_cache_bytes() // max(1, bytes_between) + 2
    return cycle([indices.roll(i, 0) for i in range(min(count, len(indices)))])
