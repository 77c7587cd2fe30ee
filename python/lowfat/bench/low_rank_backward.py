"""low_rank_backward against the library's own products: dh = dy u, dx = dh v, dv = dh^T x, du = dy^T h, and a sum for db."""
import torch
from torch import Tensor
from torch.nn.functional import linear

from .gates import chain, failed_gates
from .low_rank import SCALE, factors_of
from .shapes import Layer
from .timing import Candidate, compile_anew

__all__ = ["MEMBERS", "OP", "PEERS", "SCALE", "candidates", "judged", "work"]
OP, MEMBERS, PEERS = "low_rank_backward", 1, ("pair", "compiled")
ALL = 0b1111  # gradients of x, v, u and bias


def work(layer: Layer, m: int) -> tuple[int, int]:
    """(numbers moved: dy, x, h and the factors read once, their gradients written; multiply-adds)"""
    _, _, k, n, r = layer
    return m * (n + k + r) + r * (k + n) + m * k + r * (k + n) + n, 2 * m * r * (k + n)


def candidates(x: Tensor, n: int, r: int, compiled: bool = False) -> dict[str, Candidate]:
    """Ours and its PEERS; dy and h stay, as x does, only the factors go around."""
    k, dy, h = x.shape[1], given(x, n), given(x, r)
    count, factors = r * (k + n), factors_of(x.shape[1], n, r)
    found = {
        OP: Candidate(count, factors, lambda v, u: list(torch.ops.lowfat.low_rank_backward(dy, x, h, v, u, ALL))),
        "pair": Candidate(count, factors, lambda v, u: products(dy, x, h, v, u)),
    }
    if compiled:
        built = compile_anew(products)
        found["compiled"] = Candidate(count, factors, lambda v, u: built(dy, x, h, v, u))
    return found


def given(x: Tensor, size: int) -> Tensor:
    """[m, size], the same for everyone who asks: what the forward and the loss have left."""
    numbers = torch.Generator().manual_seed(size)
    return torch.randn(len(x), size, generator=numbers).to(x)


def products(dy: Tensor, x: Tensor, h: Tensor, v: Tensor, u: Tensor) -> list[Tensor]:
    dh = dy @ u
    return [dh @ v, dh.mT @ x, dy.mT @ h, dy.sum(0)]


def judged(x: Tensor, results: list[tuple[tuple, list[Tensor]]]) -> list[str]:
    """The gates that any of these gradients fails, against fp64 and the library's own error on the same operands."""
    failed = set()
    for (v, u), gradients in results:
        dy, h, ones = given(x, len(u)), given(x, len(v)), x.new_ones(1, len(x))
        expected = [(linear(linear(dy, u.T), v.T), chain(dy, u, v)), (linear(linear(u.T, dy), x.T), chain(u.T, dy.T, x)),
                    (linear(dy.T, h.T), chain(dy.T, h)), (linear(ones, dy.T)[0], chain(ones, dy))]
        for gradient, (library, known) in zip(gradients, expected, strict=True):
            known.y64 = known.y64.reshape(gradient.shape)
            known.magnitude = known.magnitude.reshape(gradient.shape)
            failed.update(failed_gates(gradient, library, known))
    return sorted(failed)
