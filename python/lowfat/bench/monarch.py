"""monarch against its peers: batched products of torch with the copies around them, the same compiled, the dense layer."""
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..ops import monarch
from ..ops.monarch import join_outputs, reference, reference_training, split_inputs, to_middle
from .gates import Chain, failed_gates
from .shapes import Layer
from .timing import Candidate, compile_anew


@dataclass(frozen=True)
class Monarch:
    """As measure.py wants a module of an op, for a number of blocks; r is the rank of a block."""
    blocks: int = 4  # of k and of n

    OP, MEMBERS, PEERS = "monarch", 1, ("pair", "compiled", "dense")
    SCALE = 0.02  # of random weights

    def shapes(self, k: int, n: int, r: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Of v and u."""
        blocks = self.blocks
        return (blocks, blocks * r, -(-k // blocks)), (blocks, -(-n // blocks), blocks * r)

    def weights(self, k: int, n: int, r: int) -> int:
        v, u = self.shapes(k, n, r)
        return v[0] * v[1] * v[2] + u[0] * u[1] * u[2]

    def work(self, layer: Layer, m: int) -> tuple[int, int]:
        """(numbers moved: weights, x and y once; multiply-adds)"""
        weights = self.weights(layer.k, layer.n, layer.r)
        return weights + m * (layer.k + layer.n), m * weights

    def candidates(self, x: Tensor, n: int, r: int, compiled: bool = False) -> dict[str, Candidate]:
        """Ours and its PEERS."""
        k, (v_shape, u_shape) = x.shape[1], self.shapes(x.shape[1], n, r)
        count = self.weights(k, n, r)

        def factors(slab):
            v = v_shape[0] * v_shape[1] * v_shape[2]
            return slab[:v].view(v_shape), slab[v:].view(u_shape)

        found = {
            self.OP: Candidate(count, factors, lambda v, u: monarch(x, v, u, out_features=n)),
            "pair": Candidate(count, factors, lambda v, u: products(x, v, u, n)),
            "dense": Candidate(k * n, lambda slab: (slab.view(n, k),), lambda weight: linear(x, weight)),
        }
        if compiled:
            built = compile_anew(products)
            found["compiled"] = Candidate(count, factors, lambda v, u: built(x, v, u, n))
        return found

    def judged(self, x: Tensor, results: list[tuple[tuple, Tensor]]) -> list[str]:
        """The gates that any of these results fails, against fp64 and the library's own error on the same operands."""
        n = results[0][1].shape[1]
        return sorted({gate for (v, u), y in results
                       for gate in failed_gates(y, products(x, v, u, n), known(x, v, u, None, n, True))})


def products(x: Tensor, v: Tensor, u: Tensor, n: int) -> Tensor:
    """The op as a user of torch writes it, without the reference's checks."""
    (b_in, _, p), (b_out, s, _) = v.shape, u.shape
    m, k = x.shape
    blocks = x.view(m, b_in, p).transpose(0, 1) if k == b_in * p else split_inputs(x, b_in, p)
    y = torch.bmm(to_middle(torch.bmm(blocks, v.mT), b_out), u.mT)
    return y.permute(1, 2, 0).reshape(m, n) if n == b_out * s else join_outputs(y, n, True)


def known(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, n: int, interleave: bool) -> Chain:
    """What the gates need to know: the rounded middle enters as it does in low_rank, block by block."""
    x, v, u = (t.double() for t in (x, v, u))
    bias = None if bias is None else bias.double()
    y, h = reference_training(x, v, u, bias, n, interleave)
    magnitude = reference(x.abs(), v.abs(), u.abs(), None if bias is None else bias.abs(), n, interleave)
    mid = join_outputs(torch.bmm(h.square(), u.square().mT).sqrt(), n, interleave)
    return Chain(y, [mid], magnitude, v.shape[2] + u.shape[2], h.numel())
