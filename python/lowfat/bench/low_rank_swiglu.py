"""low_rank_swiglu, silu(gate) * up, against the best composition: first factors stacked, two second products, and silu and
product as torch has them (compiled: in one kernel)."""
from torch import Tensor
from torch.nn.functional import linear, silu

from ..ops import low_rank_swiglu
from .gates import Chain, chain, failed_gates, product_of
from .low_rank import SCALE
from .low_rank_group import members_of, stacked_then_each
from .shapes import Layer
from .timing import Candidate, compile_anew

__all__ = ["MEMBERS", "OP", "PEERS", "SCALE", "candidates", "judged", "work"]
OP, MEMBERS, PEERS = "low_rank_swiglu", 2, ("pair", "compiled", "dense")


def work(layer: Layer, m: int) -> tuple[int, int]:
    """(numbers moved: weights, x and y once; multiply-adds)"""
    _, _, k, n, r = layer
    return MEMBERS * r * (k + n) + m * (k + n), MEMBERS * m * r * (k + n)


def candidates(x: Tensor, n: int, r: int, compiled: bool = False) -> dict[str, Candidate]:
    """Ours and its PEERS. dense: one product with both dense weights, then silu and product."""
    k, none = x.shape[1], [None] * MEMBERS
    count, factors = MEMBERS * r * (k + n), members_of(k, n, r, MEMBERS)
    found = {
        OP: Candidate(count, factors, lambda v, u: low_rank_swiglu(x, list(v), list(u), none)),
        "pair": Candidate(count, factors, lambda v, u: composed(x, v, u)),
        "dense": Candidate(MEMBERS * k * n, lambda slab: (slab.view(MEMBERS * n, k),),
                           lambda weight: gated(*linear(x, weight).split(n, dim=-1))),
    }
    if compiled:
        built = compile_anew(composed)
        found["compiled"] = Candidate(count, factors, lambda v, u: built(x, v, u))
    return found


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def composed(x: Tensor, v: Tensor, u: Tensor) -> Tensor:
    return gated(*stacked_then_each(x, v, u))


def judged(x: Tensor, results: list[tuple[tuple, Tensor]]) -> list[str]:
    """The gates that any of these results fails, against fp64 and the library's own error on the same operands."""
    return sorted({gate for (v, u), y in results for gate in failed_gates(y, composed(x, v, u), known_of(x, v, u))})


def known_of(x: Tensor, v: Tensor, u: Tensor) -> Chain:
    gate, up = (chain(x, first.T, last.T) for first, last in zip(v, u, strict=True))
    return product_of(gate, up)
