"""dictionary against its peers: low rank of the same bytes by torch's products and by our own, and the dense layer."""
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import dictionary
from ..ops.bitmap import pack, words
from ..ops.dictionary import coefficients, middle, reference_training, split_rows
from ..ops.monarch import join_outputs, split_inputs
from . import low_rank
from .gates import Chain, failed_gates
from .shapes import Layer
from .sparse24 import going_around
from .timing import Candidate


@dataclass(frozen=True)
class Dictionary:
    """As measure.py wants a module of an op; r is the atoms of a block, of which each row keeps one in `share`."""
    blocks: int = 1  # of k and of n
    share: int = 2

    OP, MEMBERS, PEERS = "dictionary", 1, ("pair", "low_rank", "dense")
    SCALE = 0.02  # of random weights

    def nonzeros(self, r: int) -> int:
        """Of a row and block."""
        return max(1, r // self.share)

    def is_bitmap(self, r: int) -> bool:
        """The form that takes fewer bytes."""
        return 4 * words(r) <= 2 * self.nonzeros(r)

    def numbers(self, k: int, n: int, r: int) -> tuple[int, int, int]:
        """Of d, of the values, and 16-bit numbers of the support."""
        blocks, s = self.blocks, self.nonzeros(r)
        return blocks**2 * r * -(-k // blocks), n * blocks * s, n * blocks * (2 * words(r) if self.is_bitmap(r) else s)

    def rank_for(self, k: int, n: int, ratio: float) -> int:
        """Atoms in multiples of 8 that all blocks share, in bf16 about `ratio` of the weight's bytes."""
        per_atom = k + n * (1 / self.share + min(1 / 16, 1 / self.share))
        return max(8, int(ratio * k * n / per_atom) // 8 * 8)

    def work(self, layer: Layer, m: int) -> tuple[int, int]:
        """(numbers moved: d, values, support as 16-bit numbers, x and y once; multiply-adds, those with zero left out)"""
        d, values, support = self.numbers(layer.k, layer.n, layer.r)
        return d + values + support + m * (layer.k + layer.n), m * (d + values)

    def candidates(self, x: Tensor, n: int, r: int, compiled: bool = False) -> dict[str, Candidate]:
        """Ours and its PEERS; torch has no product with such codes to compile."""
        k, blocks = x.shape[1], self.blocks
        d, values, support = self.numbers(k, n, r)
        count = d + values + support * 2 // x.element_size()
        supports = going_around(self.random_support(n, r, x.device), (3 * count + k * n) * x.element_size())

        def operands(slab):
            return slab[:d].view(blocks, blocks, r, -(-k // blocks)), slab[d:d + values].view(n, -1), next(supports)

        peers = low_rank.candidates(x, n, max(1, count // (k + n)))
        return {self.OP: Candidate(count, operands, lambda *factors: dictionary(x, *factors)), "pair": peers["pair"],
                "low_rank": peers["low_rank"], "dense": peers["dense"]}

    def random_support(self, n: int, r: int, device: torch.device) -> Tensor:
        kept = torch.rand(n, self.blocks, r, device=device).argsort(-1) < self.nonzeros(r)
        return pack(kept).flatten(1) if self.is_bitmap(r) else kept.nonzero()[:, 2].view(n, -1).to(torch.int16)

    def judged(self, x: Tensor, results: list[tuple[tuple, Tensor]]) -> list[str]:
        """The gates that any of these results fails, against fp64 and the library's own error on the same operands."""
        return sorted({gate for factors, y in results
                       for gate in failed_gates(y, products(x, *factors), known(x, *factors))})


def products(x: Tensor, d: Tensor, values: Tensor, support: Tensor) -> Tensor:
    """The op by torch's products."""
    blocks_out, blocks_in, atoms, size = d.shape
    h = middle(split_inputs(x, blocks_in, size), d)
    s = split_rows(coefficients(values, support, blocks_in, atoms), blocks_out)
    return join_outputs(torch.bmm(h, s.mT), len(values), False)


def known(x: Tensor, d: Tensor, values: Tensor, support: Tensor, bias: Tensor | None = None) -> Chain:
    """What the gates need to know: the rounded middle enters as it does in low_rank, block by block."""
    x, d, values = (t.double() for t in (x, d, values))
    bias = None if bias is None else bias.double()
    y, h = reference_training(x, d, values, support, bias)
    magnitude = reference_training(x.abs(), d.abs(), values.abs(), support, None if bias is None else bias.abs())[0]
    s = split_rows(coefficients(values, support, d.shape[1], d.shape[2]), len(d))
    mid = join_outputs(torch.bmm(h.square(), s.square().mT).sqrt(), len(values), False)
    return Chain(y, [mid], magnitude, d.shape[3] + values.shape[1], h.numel())
