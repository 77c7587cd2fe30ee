"""CoSpaDi (2509.22075): a dictionary and sparse codes by K-SVD, fitted to the outputs.

Coding and atoms in turn. Coding: orthogonal matching pursuit (OMP) of every row with the products A A^T and a growing
Cholesky factor (batch OMP); a row keeps its old code where that is better. Atoms: each in turn, with its coefficients, the
best rank-1 fit of what the others leave of the rows that use it, by power iterations; one that no row uses becomes the row
that is fitted worst. No step loses more than the one before. Coordinates, letters: dictionary.py.
"""
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..structures.dictionary import Dictionary
from ..structures.sparse24 import largest
from . import dictionary

if TYPE_CHECKING:
    from ..stats import Stats

_STEPS = 12          # at most
_SWEEPS = 3          # over the atoms for one coding, which costs more than they do
_GAIN = 1e-3         # relative; it ends where a step brings less
_POWER = 2           # iterations towards an atom, from the one before
_ROUNDS = 16         # of OMP: with more than so many non-zeros several atoms are picked at a time
_NUMBERS = 1 << 22   # of the Cholesky factors of a part of the rows
_FEW, _SWAPS = 8, 8  # non-zeros with which atoms are exchanged; exchanges in a row that do not help
_FITTED = 1e-4       # of a row's length: where no row is further off, no atom is missing
_RIDGE = 64          # units in the last place, added to Cholesky factors: atoms may depend on each other
ARGUMENTS = {"density": dictionary.check_density}


@torch.no_grad()
def factorize(weight: Tensor, bias: Tensor | None, stats: "Stats", *, rank: int,
              density: float = 0.5) -> tuple[Dictionary, list[str]]:
    """The layer in the weight's dtype.   weight [n, k]   bias [n]

    rank: atoms, also more than k. density: non-zeros of a row of S over atoms. Raises ArgumentError without calibration
    statistics, NumericsError for NaN or infinity, ShapeError for more atoms than rows."""
    return dictionary.factorized(solve, weight, bias, stats, rank, weight.shape[0], {"density": density})


@torch.no_grad()
def losses(weight: Tensor, stats: "Stats", *, density: float = 0.5) -> Tensor:
    """||(W - What) X^T||_F^2 of codes over the leading singular vectors, where the steps start.   [n + 1], fp64"""
    return dictionary.curve(dictionary.whitened_target(weight, stats).z, weight.shape[0], density=density)


def size(k: int, n: int, *, density: float = 0.5) -> tuple[float, int]:
    return dictionary.unit_of(k, n, density), n


def solve(target: dictionary.Target, support: dictionary.Support) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [n, a], A [a, q], where the codes are [n, a]) with a small ||Z - codes A||."""
    scale = float(target.z.abs().amax()) or 1.0
    z = (target.z / scale).to(target.dtype)
    codes, found, keep = ksvd(z, *start(z, support.atoms, support.nonzeros))
    return dictionary.polished(target.z, codes.double() * scale, found, keep)


def start(z: Tensor, atoms: int, nonzeros: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, atoms, where the codes are): unit vectors, and with more than q atoms the rows that those fit worst.

    z [n, q], its columns by falling norm"""
    fewer = min(atoms, z.shape[1])
    found = torch.eye(fewer, z.shape[1], dtype=z.dtype, device=z.device)
    keep = largest(z[:, :fewer].abs(), min(nonzeros, fewer))
    codes = z[:, :fewer] * keep
    if atoms > fewer:
        worst = z[(z - codes @ found).norm(dim=1).topk(atoms - fewer).indices]
        found = torch.cat([found, worst / worst.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)])
        codes, keep = coded(z, found, nonzeros)
    return codes, found, keep


def ksvd(z: Tensor, codes: Tensor, atoms: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [n, a], atoms [a, q], keep [n, a]) from such a start, its atoms of length 1; nothing is lost on the way.

    With few non-zeros a row depends on each of its atoms, and the descent ends where two atoms stand for one and another is
    missing: then the least used atom gives way to what is left of the row that is fitted worst, as long as that helps."""
    codes, atoms, keep, lost = _descended(z, codes, atoms, keep, _STEPS)
    failed = 0
    for _ in range(len(atoms) if keep[0].sum() <= _FEW else 0):
        left = z - codes @ atoms
        row = left[left.square().sum(1).argmax()]
        if failed == min(_SWAPS, len(atoms)) or row.norm() <= _FITTED * z.norm() / len(z)**0.5:
            break
        other = atoms.clone()
        other[codes.square().sum(0).argsort()[failed]] = row / row.norm()
        new_codes, new_keep = coded(z, other, int(keep[0].sum()))
        found = _descended(z, new_codes, other, new_keep, _STEPS // 3)
        if found[3] < lost * (1 - _GAIN):
            failed, (codes, atoms, keep, lost) = 0, found
        else:
            failed += 1
    return _descended(z, codes, atoms, keep, _STEPS)[:3] if keep[0].sum() <= _FEW else (codes, atoms, keep)


def _descended(z: Tensor, codes: Tensor, atoms: Tensor, keep: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """(codes, atoms, keep, what is lost)"""
    lost = dictionary.lost(z, codes, atoms)
    for _ in range(steps):
        codes, keep = improved(z, codes, atoms, keep)
        for _ in range(_SWEEPS):
            codes, atoms = renewed(z, codes, atoms, keep)
        before, lost = lost, dictionary.lost(z, codes, atoms)
        if not lost < before * (1 - _GAIN):
            break
    return codes, atoms, keep, lost


def improved(z: Tensor, codes: Tensor, atoms: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, where they are) after OMP of each row, those rows as before where it loses more."""
    new_codes, new_keep = coded(z, atoms, int(keep[0].sum()))
    is_better = ((z - new_codes @ atoms).square().sum(1) < (z - codes @ atoms).square().sum(1))[:, None]
    return torch.where(is_better, new_codes, codes), torch.where(is_better, new_keep, keep)


def coded(z: Tensor, atoms: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """(codes [n, a], where they are) by OMP, the coefficients of each row by least squares.   z [n, q]   atoms [a, q]"""
    gram, products = atoms @ atoms.mT, z @ atoms.mT
    found = [_pursued(gram, part, nonzeros) for part in products.split(max(1, _NUMBERS // nonzeros**2))]
    return torch.cat([codes for codes, _ in found]), torch.cat([keep for _, keep in found])


def _pursued(gram: Tensor, products: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """coded() of some rows.   products [n, a]

    M, the inverse of the Cholesky factor of the picked atoms' products, grows by `step` rows a round: with
    V = M_old G_on and T T^T = G_nn - V^T V, its new rows are R = T^-1 [-V^T M_old, I]; they add R^T R p to the codes."""
    n, a = products.shape
    step = -(-nonzeros // _ROUNDS)
    inverse = products.new_zeros(n, nonzeros, nonzeros)
    picked = torch.empty(n, nonzeros, dtype=torch.int64, device=gram.device)
    codes, keep = torch.zeros_like(products), torch.zeros_like(products, dtype=torch.bool)
    one = torch.eye(step, dtype=gram.dtype, device=gram.device)
    ridge = _RIDGE * torch.finfo(gram.dtype).eps * one
    for t in range(0, nonzeros, step):
        new = (products - codes @ gram).abs().masked_fill_(keep, -1).topk(min(step, nonzeros - t), dim=1).indices
        u, at = t + new.shape[1], slice(t, t + new.shape[1])
        picked[:, at], keep = new, keep.scatter(1, new, True)
        v = inverse[:, :t, :t] @ gram[picked[:, :t, None], new[:, None, :]]
        rest = gram[new[:, :, None], new[:, None, :]] - v.mT @ v + ridge[:u - t, :u - t]
        lower, _ = torch.linalg.cholesky_ex(rest)
        inverse[:, at, :t] = -torch.linalg.solve_triangular(lower, v.mT @ inverse[:, :t, :t], upper=False)
        inverse[:, at, at] = torch.linalg.solve_triangular(lower, one[:u - t, :u - t].expand_as(lower), upper=False)
        rows = inverse[:, at, :u]
        values = rows.mT @ (rows @ products.gather(1, picked[:, :u])[:, :, None])
        codes = codes.scatter_add(1, picked[:, :u], values[:, :, 0])
    return codes, keep


def renewed(z: Tensor, codes: Tensor, atoms: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, atoms) after each atom in turn has been fitted, with its coefficients, to what the others leave."""
    columns, atoms, used = codes.mT.contiguous(), atoms.clone(), keep.mT.to(z.dtype).contiguous()
    left = z - codes @ atoms
    worst = iter(left.square().sum(1).argsort(descending=True).tolist())
    for i, users in enumerate(used):
        if not users.any():
            row = z[next(worst)]
            atoms[i] = row / row.norm().clamp_min(torch.finfo(z.dtype).tiny)
            continue
        before, old = columns[i].clone(), atoms[i].clone()
        values, atom = before, old
        for _ in range(_POWER):
            values = torch.addmv(before * (old @ atom), left, atom) * users
            other = torch.addmv(old * (before @ values), left.mT, values)
            length = other.norm()
            if not length > 0:
                break
            atom = other / length
        values = torch.addmv(before * (old @ atom), left, atom) * users
        columns[i], atoms[i] = values, atom
        left.addmm_(torch.stack([before, -values], dim=1), torch.stack([old, atom]))
    return columns.mT.contiguous(), atoms
