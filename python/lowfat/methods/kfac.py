"""KFAC-SVD: min tr(C_g D C_x D^T) of D = W - What, the loss to second order where F ~ C_x (x) C_g (LEMS, ICML 2026).

C_x = sum of x x^T, C_g = sum of g g^T over tokens, g the gradient of the loss at the layer's output. Each is mixed with its
mean diagonal, without which the form is rank-deficient and collapses on large models (GFWSVD): C <- (1 - s) C + s mean I,
s = 0.1 for the inputs and 0.3 for the outputs. With C_x = L L^T and C_g = M M^T, M^T W L = U S V^T, and one root is enough:
    What = M^-T U_r S_r V_r^T L^-1 = (W L V_r) (V_r^T L^-1) = (M^-T U_r) (U_r^T M^T W)
"""
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..linalg import Root, balance, gram_root, leading, quadratic, require_finite, require_rank, spectrum, tails, times
from ..structures import LowRank
from .whitened import DAMPING

if TYPE_CHECKING:
    from ..stats import Stats


class _Side(NamedTuple):
    """A Gram matrix and what to add to its diagonal; that it is scaled by one number changes nothing."""
    gram: Tensor
    shift: float
    events: list[str]

    def root(self) -> Root:
        return gram_root(self.gram, "cholesky", self.shift)


def _check_share(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ArgumentError(f"shrink_in and shrink_out must be numbers from 0 to 1; found {value!r}")


ARGUMENTS = {"shrink_in": _check_share, "shrink_out": _check_share}


@torch.no_grad()
def factorize(weight: Tensor, bias: Tensor | None, stats: "Stats", *, rank: int, shrink_in: float = 0.1,
              shrink_out: float = 0.3) -> tuple[LowRank, list[str]]:
    """The layer in the weight's dtype, its factors balanced.   weight [n, k]   bias [n]

    shrink_in, shrink_out: how much of the mean diagonal is mixed into C_x and C_g; both 1 is plain SVD, shrink_in=0 with
    shrink_out=1 whitened.
    Raises ArgumentError without these statistics, NumericsError for NaN or infinity, ShapeError for an impossible rank."""
    into, out = _sides(weight, stats, shrink_in, shrink_out)
    require_rank(rank, weight)
    if weight.shape[0] <= weight.shape[1]:
        _, left, solved = leading(lambda: _between(weight, into, out), rank)
        root = out.root()
        u, v = balance(root.solved(left.mT).mT, times(weight.mT, root.times(left)).mT, weight.dtype)
    else:
        # the root is made twice, so that it is not there while eigh needs the most memory
        _, right, solved = leading(lambda: _between(weight.mT, out, into), rank)
        root = into.root()
        v, right = root.solved(right.mT), root.times(right)
        u, v = balance(weight, v, weight.dtype, right=right)
    return LowRank.of(v, u, bias), into.events + out.events + root.events + solved.events


@torch.no_grad()
def losses(weight: Tensor, stats: "Stats", *, shrink_in: float = 0.1, shrink_out: float = 0.3) -> Tensor:
    """tr(C_g D C_x D^T) with what is mixed in, up to one factor for the layer, for every rank.   [min(n, k) + 1], fp64"""
    into, out = _sides(weight, stats, shrink_in, shrink_out)
    if weight.shape[0] <= weight.shape[1]:
        return tails(spectrum(lambda: _between(weight, into, out)))
    return tails(spectrum(lambda: _between(weight.mT, out, into)))


def require(stats: "Stats | None", **arguments) -> None:
    if stats is None or stats.gram_out is None:
        raise ArgumentError("kfac needs the Gram matrices of inputs and of gradients, found none: calibrate with labels in "
                            'the batches and fisher="kronecker"')


def _sides(weight: Tensor, stats: "Stats | None", shrink_in: float, shrink_out: float) -> tuple[_Side, _Side]:
    require(stats)
    require_finite(weight, "weight")
    n, k = weight.shape
    if stats.gram.shape != (k, k) or stats.gram_out.shape != (n, n):
        raise ArgumentError(f"stats: the Gram matrices are {list(stats.gram.shape)} of inputs and "
                            f"{list(stats.gram_out.shape)} of gradients; the weight is [n, k] {list(weight.shape)}")
    return (_mixed(stats.gram, shrink_in, weight.device, "gram", "no input energy"),
            _mixed(stats.gram_out, shrink_out, weight.device, "gram_out", "no gradient"))


def _mixed(gram: Tensor, share: float, device: torch.device, name: str, nothing: str) -> _Side:
    _check_share(share)
    require_finite(gram, name)
    gram = gram.to(device)
    mean = float(gram.diagonal().double().mean())
    if share == 1 or mean == 0:
        return _Side(torch.zeros_like(gram), mean or 1.0, [] if mean else [f"{nothing} in the calibration: all alike"])
    return _Side(gram, max(share / (1 - share), DAMPING) * mean, [])


def _between(weight: Tensor, inner: _Side, outer: _Side) -> Tensor:
    """M^T W C W^T M in fp64, C that of the inner side and M M^T of the outer.   weight [p, q] -> [p, p]"""
    root = outer.root()
    half = root.applied(quadratic(weight, inner.gram, inner.shift))
    return root.applied(half.mT)
