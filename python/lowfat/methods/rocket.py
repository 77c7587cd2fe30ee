"""ROCKET (2602.11008): sparse codes over eigenvectors in one pass, fitted to the outputs.

B = the a leading eigenvectors of Z^T Z, C = Z B^T. Of each row of C the s entries of most |c_ij| ||L^-T b_j||^(1/2) stay:
those that matter to the outputs, with a word for those that are large in the weight itself. Then A = argmin ||Z - C A||.

The paper keeps a few entries more in some rows and fewer in others; here each row has the same number, which is what the
kernels are for. Coordinates, letters: dictionary.py.
"""
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..structures import Dictionary
from . import dictionary

if TYPE_CHECKING:
    from ..stats import Stats

_POWER = 0.5  # of the length that an atom has outside of whitened coordinates


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
    """||(W - What) X^T||_F^2 before the least squares of A, for every number of atoms.   [min(n, k) + 1], fp64"""
    target = dictionary.whitened_target(weight, stats)
    return dictionary.curve(target.z, min(weight.shape), target.z.abs() * _lengths(target, min(weight.shape)), **arguments)


def solve(target: dictionary.Target, support: dictionary.Support) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [n, a], A [a, q], where the codes are [n, a]) with a small ||Z - codes A||."""
    leading = target.z[:, :support.atoms]
    keep = support.chosen(leading.abs() * _lengths(target, support.atoms))
    codes = leading * keep
    return codes, dictionary.fitted_atoms(target.z, codes), keep


def _lengths(target: dictionary.Target, atoms: int) -> Tensor:
    """||L^-T b_j||^(1/2)   [a]"""
    vectors = torch.eye(atoms, target.z.shape[1], dtype=target.z.dtype, device=target.z.device)
    return torch.linalg.vector_norm(target.atoms(vectors), dim=1) ** _POWER
