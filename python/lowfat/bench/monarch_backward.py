"""monarch_backward against its peers: torch's batched products with the permuted copies around them, the same compiled."""
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.monarch import from_middle, join_inputs, reference_backward, split_inputs, split_outputs, to_middle
from .gates import Chain, failed_gates
from .low_rank_backward import ALL, given
from .monarch import Monarch
from .shapes import Layer
from .timing import Candidate, compile_anew


@dataclass(frozen=True)
class MonarchBackward(Monarch):
    OP, PEERS = "monarch_backward", ("pair", "compiled")

    def work(self, layer: Layer, m: int) -> tuple[int, int]:
        """(numbers moved: dy, x, h and the factors read once, their gradients written; multiply-adds)"""
        _, _, k, n, r = layer
        weights = self.weights(k, n, r)
        return m * (n + k + r * self.blocks**2) + weights + m * k + weights + n, 2 * m * weights

    def candidates(self, x: Tensor, n: int, r: int, compiled: bool = False) -> dict[str, Candidate]:
        """Ours and its PEERS; dy and h stay, as x does, only the factors go around."""
        dy, h, count = given(x, n), self.middle(x, r), self.weights(x.shape[1], n, r)
        v_shape, u_shape = self.shapes(x.shape[1], n, r)

        def factors(slab):
            v = v_shape[0] * v_shape[1] * v_shape[2]
            return slab[:v].view(v_shape), slab[v:].view(u_shape)

        def ours(v, u):
            return list(torch.ops.lowfat.monarch_backward(dy, x, h, v, u, ALL, n, True))

        found = {
            self.OP: Candidate(count, factors, ours),
            "pair": Candidate(count, factors, lambda v, u: products(dy, x, h, v, u)),
        }
        if compiled:
            built = compile_anew(products)
            found["compiled"] = Candidate(count, factors, lambda v, u: built(dy, x, h, v, u))
        return found

    def middle(self, x: Tensor, r: int) -> Tensor:
        """[blocks, m, blocks r], the same for everyone who asks."""
        return given(x, r * self.blocks**2).view(len(x), self.blocks, -1).transpose(0, 1).contiguous()

    def judged(self, x: Tensor, results: list[tuple[tuple, list[Tensor]]]) -> list[str]:
        """The gates that any of these gradients fails, against fp64 and the library's own error on the same operands."""
        failed = set()
        for (v, u), gradients in results:
            n, h = len(gradients[3]), self.middle(x, v.shape[1] // len(u))
            dy = given(x, n)
            chains = known_gradients(dy, x, h, v, u, n, True)
            for gradient, library, known in zip(gradients, products(dy, x, h, v, u), chains, strict=True):
                flat = (t.reshape(known.y64.shape) for t in (gradient, library))
                failed.update(failed_gates(*flat, known))
        return sorted(failed)


def products(dy: Tensor, x: Tensor, h: Tensor, v: Tensor, u: Tensor) -> list[Tensor]:
    """The op as a user of torch writes it, without the reference's checks."""
    (b_in, _, p), (b_out, s, _) = v.shape, u.shape
    blocks_dy = split_outputs(dy, b_out, s, True)
    dz = from_middle(torch.bmm(blocks_dy, u), b_in)
    return [join_inputs(torch.bmm(dz, v), x.shape[1]), torch.bmm(dz.mT, split_inputs(x, b_in, p)),
            torch.bmm(blocks_dy.mT, h), dy.sum(0)]


def known_gradients(dy: Tensor, x: Tensor, h: Tensor | None, v: Tensor, u: Tensor, n: int, interleave: bool) -> list[Chain]:
    """What the gates need to know of dx, dv, du, db: dz is a rounded middle, and so is h, unless it is given."""
    dy, x, v, u = (t.double() for t in (dy, x, v, u))
    h = None if h is None else h.double()
    (b_in, _, p), (b_out, s, t) = v.shape, u.shape
    exact = reference_backward(dy, x, h, v, u, ALL, n, interleave)
    magnitudes = reference_backward(dy.abs(), x.abs(), None if h is None else h.abs(), v.abs(), u.abs(), ALL, n, interleave)
    blocks_dy, blocks_x = split_outputs(dy, b_out, s, interleave), split_inputs(x, b_in, p)
    dz = from_middle(torch.bmm(blocks_dy, u), b_in)
    mids = [[join_inputs(torch.bmm(dz.square(), v.square()), x.shape[-1]).sqrt()],
            [torch.bmm(dz.square().mT, blocks_x.square()).sqrt()], [], []]
    if h is None:
        made = to_middle(torch.bmm(blocks_x, v.mT), b_out)
        mids[2] = [torch.bmm(blocks_dy.square().mT, made.square()).sqrt()]
    return [Chain(*parts, dz.numel()) for parts in zip(exact, mids, magnitudes, (s + t, s + len(x), p + len(x), len(x)))]
