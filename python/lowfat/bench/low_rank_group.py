"""low_rank_group on three layers of one shape with one input (q/k/v) against the best composition: their first factors
stacked, then a product with each second factor."""
from torch import Tensor
from torch.nn.functional import linear

from ..ops import low_rank_group
from .low_rank import SCALE
from .low_rank import judged as judged_member
from .shapes import Layer
from .timing import Candidate, compile_anew

__all__ = ["MEMBERS", "OP", "PEERS", "SCALE", "candidates", "judged", "members_of", "stacked_then_each", "work"]
OP, MEMBERS, PEERS = "low_rank_group", 3, ("pair", "compiled", "dense")


def work(layer: Layer, m: int) -> tuple[int, int]:
    """(numbers moved: weights, x and every y once; multiply-adds)"""
    _, _, k, n, r = layer
    return MEMBERS * r * (k + n) + m * (k + MEMBERS * n), MEMBERS * m * r * (k + n)


def candidates(x: Tensor, n: int, r: int, compiled: bool = False) -> dict[str, Candidate]:
    """Ours and its PEERS. dense: one product with the stacked dense weights."""
    k, none = x.shape[1], [None] * MEMBERS
    count, factors = MEMBERS * r * (k + n), members_of(k, n, r, MEMBERS)
    found = {
        OP: Candidate(count, factors, lambda v, u: low_rank_group(x, list(v), list(u), none)),
        "pair": Candidate(count, factors, lambda v, u: stacked_then_each(x, v, u)),
        "dense": Candidate(MEMBERS * k * n, lambda slab: (slab.view(MEMBERS * n, k),), lambda weight: linear(x, weight)),
    }
    if compiled:
        built = compile_anew(stacked_then_each)
        found["compiled"] = Candidate(count, factors, lambda v, u: built(x, v, u))
    return found


def members_of(k: int, n: int, r: int, members: int):
    """v [members, r, k], u [members, n, r]: the first factors lie together, as whoever stacks them would have them."""
    at = members * r * k
    return lambda slab: (slab[:at].view(members, r, k), slab[at:].view(members, n, r))


def stacked_then_each(x: Tensor, v: Tensor, u: Tensor) -> list[Tensor]:
    members, r, k = v.shape
    h = linear(x, v.view(members * r, k)).split(r, dim=-1)
    return [linear(part, last) for part, last in zip(h, u.unbind(), strict=True)]


def judged(x: Tensor, results: list[tuple[tuple, list[Tensor]]]) -> list[str]:
    """The gates that any member of any of these results fails, each against fp64 and the library on the same operands."""
    return sorted({gate for (v, u), outputs in results
                   for v_i, u_i, y in zip(v, u, outputs, strict=True) for gate in judged_member(x, [((v_i, u_i), y)])})
