"""COMPOT (2602.15200): sparse codes over an orthonormal dictionary, both steps in closed form, fitted to the outputs.

    S = the s entries of largest size in each row of Z A^T      exact while A A^T = I
    A = P Q^T of S^T Z = P Sigma Q^T                            orthogonal Procrustes
from the leading singular vectors, 20 times at most. Then the dictionary is let go of: least squares of A for the codes, and
of the codes where they are. Coordinates, letters: dictionary.py.
"""
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..structures import Dictionary
from . import dictionary

if TYPE_CHECKING:
    from ..stats import Stats

_STEPS = 20
_GAIN = 1e-4  # of what is lost; it ends where a step brings less


@torch.no_grad()
def factorize(weight: Tensor, bias: Tensor | None, stats: "Stats", *, rank: int, density: float = 0.5,
              pattern: str | None = None, dense_share: float = 0.0) -> tuple[Dictionary, list[str]]:
    """The layer in the weight's dtype.   weight [n, k]   bias [n]

    rank: atoms. density: non-zeros of a row of S over atoms. pattern "2:4": two of every four atoms behind the first ones, a
    dense_share of them all, which every row keeps. Raises ArgumentError without calibration statistics, NumericsError for
    NaN or infinity, ShapeError for more atoms than min(n, k)."""
    return dictionary.factorized(solve, weight, bias, stats, rank, min(weight.shape),
                                 {"density": density, "pattern": pattern, "dense_share": dense_share})


@torch.no_grad()
def losses(weight: Tensor, stats: "Stats", **arguments) -> Tensor:
    """||(W - What) X^T||_F^2 of where the steps start, for every number of atoms.   [min(n, k) + 1], fp64"""
    return dictionary.curve(dictionary.whitened_target(weight, stats).z, min(weight.shape), **arguments)


def solve(target: dictionary.Target, support: dictionary.Support) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [n, a], A [a, q], where the codes are [n, a]) with a small ||Z - codes A||."""
    z = target.z
    found = torch.eye(support.atoms, z.shape[1], dtype=z.dtype, device=z.device)
    codes, keep, energy = _coded(z, found, support)
    lost = float(z.square().sum(dtype=torch.float64)) - energy
    for _ in range(_STEPS if support.nonzeros < support.atoms else 0):
        p, _, qt = torch.linalg.svd(codes.mT @ z, full_matrices=False)
        new = p @ qt, *_coded(z, p @ qt, support)
        gain = new[3] - energy
        if not gain > 0:  # at the rounding error
            break
        found, codes, keep, energy = new
        lost -= gain
        if not gain > _GAIN * lost:
            break
    return dictionary.polished(z, codes, found, keep)


def _coded(z: Tensor, atoms: Tensor, support: dictionary.Support) -> tuple[Tensor, Tensor, float]:
    """(codes [n, a], where they are, their energy: what is lost is the rest of that of Z)"""
    products = z @ atoms.mT
    keep = support.chosen(products.abs())
    codes = products * keep
    return codes, keep, float(codes.square().sum(dtype=torch.float64))
