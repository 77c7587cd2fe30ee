"""What the solvers of W = S D share: D a dense dictionary of atoms, S with a fixed number of non-zeros in each row.

The problem is solved in whitened coordinates (CoSpaDi, 2509.22075): with C = X^T X = L L^T and W L = U Sigma V^T = Z V^T,
||(W - S D) X^T||_F = ||Z - S A||_F for D = A V^T L^-1. In this basis the leading right singular vectors are unit vectors.
    W [n, k]   C, L [k, k]   Z [n, q], q = min(n, k)   A [a, q]   D [a, k]   S [n, a], s of a row not zero
"""
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from ..linalg import gram_root, truncated_svd
from ..ops.bitmap import words
from ..structures.dictionary import Dictionary, check_format, choose
from . import whitened

if TYPE_CHECKING:
    from ..stats import Stats

_NUMBERS = 1 << 22  # of a batch of small matrices held at a time: 32 MiB in fp64
_POINTS = 64        # sizes at which a loss curve is measured, about; straight lines in between


class Target(NamedTuple):
    """What is to be coded, and the way back."""
    z: Tensor  # [n, q] fp64, q = min(n, k): the weight in whitened coordinates, columns by falling norm
    atoms: Callable[[Tensor], Tensor]  # A [a, q] -> D [a, k]
    dtype: torch.dtype  # of long iterations: fp32, but for weights in fp64
    events: list[str]


def check_density(density: float) -> None:
    if not isinstance(density, (int, float)) or isinstance(density, bool) or not 0 < density <= 1:
        raise ArgumentError(f"density must be above 0 and at most 1; found {density!r}")


def check_dense_share(share: float) -> None:
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share < 1:
        raise ArgumentError(f"dense_share must be at least 0 and below 1; found {share!r}")


ARGUMENTS = {"density": check_density, "pattern": (None, "2:4"), "dense_share": check_dense_share}


class Support(NamedTuple):
    """How many atoms a row keeps, and which it may."""
    atoms: int
    nonzeros: int
    dense_atoms: int = 0  # the first ones, which every row keeps
    pattern: tuple[int, int] | None = None  # n of every m of the others

    def chosen(self, scores: Tensor) -> Tensor:
        """Those of the largest scores.   scores [n, a], none negative -> bool [n, a]"""
        return choose(scores, self.nonzeros, self.dense_atoms, self.pattern)

    def index_bytes(self, rows: int) -> int:
        is_bitmap = check_format(self.atoms, self.nonzeros, None) == "bitmap"
        return rows * (4 * words(self.atoms) if is_bitmap else 2 * self.nonzeros)


def support_of(atoms: int, density: float = 0.5, pattern: str | None = None, dense_share: float = 0.0) -> Support:
    """density: non-zeros over atoms. pattern "2:4": two of every four atoms behind the first, dense_share of them all, which
    every row keeps; that decides the non-zeros, whatever the density."""
    check_density(density)
    check_dense_share(dense_share)
    if pattern is None:
        nonzeros = max(1, int(density * atoms + 1e-9))  # 0.29 of 100 are 29
        return Support(atoms, nonzeros, min(nonzeros, int(dense_share * atoms)))
    sparse = (atoms - int(dense_share * atoms)) // 4 * 4
    return Support(atoms, atoms - sparse // 2, atoms - sparse, (2, 4) if sparse else None)


def require(stats: "Stats | None", **arguments) -> None:
    if stats is None:
        raise ArgumentError("a dictionary needs calibration statistics, found none; pass stats=calibrate(model, batches)")


def unit_of(k: int, n: int, density: float = 0.5, pattern: str | None = None, dense_share: float = 0.0) -> float:
    """Parameters that one more atom costs, about."""
    support_of(1, density, pattern, dense_share)
    return k + n * (density if pattern is None else (1 + dense_share) / 2)


def size(k: int, n: int, **arguments) -> tuple[float, int]:
    """Of what was asked for: ArgumentError for a density beside a pattern, which decides the non-zeros."""
    if "density" in arguments and arguments.get("pattern") is not None:
        raise ArgumentError(f"density {arguments['density']} and pattern {arguments['pattern']}: needs one of them")
    return unit_of(k, n, **arguments), min(k, n)


def count(k: int, n: int, *, rank: int, **arguments) -> tuple[int, int]:
    support = support_of(rank, **arguments)
    return rank * k + n * support.nonzeros, support.index_bytes(n)


def whitened_target(weight: Tensor, stats: "Stats") -> Target:
    """Of outputs on the calibration inputs.   weight [n, k]"""
    require(stats)
    gram, shift, events = whitened.damped(weight, stats)
    root = gram_root(gram, "cholesky", shift)
    z, basis, more = _in_own_basis(root.applied(weight.double()))
    return Target(z, lambda atoms: root.solved(atoms.double() @ basis), _working(weight), events + root.events + more)


def plain_target(weight: Tensor) -> Target:
    """Of the weights themselves.   weight [n, k]"""
    z, basis, events = _in_own_basis(weight.double())
    return Target(z, lambda atoms: atoms.double() @ basis, _working(weight), events)


def _working(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _in_own_basis(matrix: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """(U Sigma [n, q], V^T [q, k], events)"""
    u, s, vt, solved = truncated_svd(matrix, min(matrix.shape))
    return u.mul_(s), vt, solved.events


def factorized(solve: Callable, weight: Tensor, bias: Tensor | None, stats: "Stats", atoms: int, most: int,
               arguments: dict) -> tuple[Dictionary, list[str]]:
    """The layer of what solve(target, support) -> (codes, A, where the codes are) makes of the whitened weight."""
    support = support_of(atoms, **arguments)
    if not 1 <= atoms <= most:
        raise ShapeError(f"rank, the number of atoms, must be between 1 and {most} for a weight {list(weight.shape)}, "
                         f"found {atoms}")
    target = whitened_target(weight, stats)
    codes, found, keep = solve(target, support)
    codes, d = balanced(codes, target.atoms(found))
    return Dictionary.from_codes(d.to(weight.dtype)[None, None], codes.to(weight.dtype), keep, bias,
                                 in_features=weight.shape[1], dense_atoms=support.dense_atoms,
                                 pattern=support.pattern), target.events


def curve(z: Tensor, size: int, importance: Tensor | None = None, **arguments) -> Tensor:
    """||Z - S A||^2 for a = 0, 1, ..., size leading singular vectors as atoms, each row with its entries of largest size, or
    of most importance.   z, importance [n, q] -> [size + 1], fp64"""
    squares = z.double().square()
    scores, whole = squares if importance is None else importance, float(squares.sum())

    def missing(a: int) -> float:
        support = support_of(a, **arguments)
        if support.pattern is None and not support.dense_atoms:  # a fifth of the time of a stable sort
            kept = scores[:, :a].topk(min(support.nonzeros, z.shape[1]), dim=1, sorted=False).indices
            return whole - float(squares.gather(1, kept).sum())
        return whole - float((squares[:, :a] * support.chosen(scores[:, :a])).sum())

    return sampled(size, lambda a: missing(a) if a else whole)


def sampled(size: int, measure: Callable[[int], float]) -> Tensor:
    """measure(a), never rising nor below zero, for a = 0, 1, ..., size.   [size + 1], fp64

    Measured at about 64 sizes, those of a plan's ladder among them, and straight in between."""
    step = max(1, -(-size // _POINTS // 8) * 8) if size > _POINTS else 1
    at = torch.tensor(sorted({0, 1, 2, 4, size, *range(0, size, step)} & set(range(size + 1))))
    values = torch.tensor([measure(a) for a in at.tolist()], dtype=torch.float64).clamp_min(0).cummin(0).values
    where = torch.arange(size + 1)
    right = torch.searchsorted(at, where).clamp_min(1)
    share = (where - at[right - 1]).double() / (at[right] - at[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


def lost(z: Tensor, codes: Tensor, atoms: Tensor) -> float:
    """||Z - S A||_F^2"""
    return float((z - codes @ atoms).square().sum(dtype=torch.float64))


def fitted_atoms(z: Tensor, codes: Tensor) -> Tensor:
    """The A that minimizes ||Z - S A||_F; atoms that no row uses are zero.   z [n, q]   codes [n, a] -> [a, q], fp64"""
    codes = codes.double()
    norms = torch.linalg.vector_norm(codes, dim=0)
    codes = codes / torch.where(norms > 0, norms, torch.inf)
    gram = codes.mT @ codes
    gram.diagonal().add_((norms == 0).double())
    root = gram_root(gram, "cholesky")
    found = root.solved(root.whitened((codes.mT @ z.double()).mT)).mT
    return found / torch.where(norms > 0, norms, torch.inf)[:, None]


def fitted_codes(z: Tensor, atoms: Tensor, keep: Tensor) -> Tensor:
    """The S with non-zeros where keep says that minimizes ||Z - S A||_F, every row by itself.

    z [n, q]   atoms [a, q]   keep [n, a] bool, as many in each row -> [n, a], fp64"""
    atoms = atoms.double()
    norms = torch.linalg.vector_norm(atoms, dim=1)
    scale = torch.where(norms > 0, norms, torch.inf)
    atoms = atoms / scale[:, None]
    gram, right = atoms @ atoms.mT, z.double() @ atoms.mT
    s = int(keep[0].sum())
    index = keep.nonzero()[:, 1].view(len(keep), s)
    found = torch.zeros_like(right)
    for rows in torch.arange(len(z), device=z.device).split(max(1, _NUMBERS // s**2)):
        at = index[rows]
        parts = gram[at[:, :, None], at[:, None, :]]
        lower, failed = torch.linalg.cholesky_ex(parts)
        wanted = right[rows].gather(1, at)[:, :, None]
        solved = torch.cholesky_solve(wanted, lower)
        if failed.any():  # atoms that depend on each other, or zeros
            solved[failed > 0] = torch.linalg.pinv(parts[failed > 0], hermitian=True) @ wanted[failed > 0]
        found[rows] = found[rows].scatter(1, at, solved[:, :, 0])
    return found / scale


def polished(z: Tensor, codes: Tensor, atoms: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, atoms, keep) after least squares of the atoms and then of the codes, in fp64, unless they lose more."""
    z, codes, atoms = z.double(), codes.double(), atoms.double()
    before = lost(z, codes, atoms)
    new_atoms = fitted_atoms(z, codes)
    if (after := lost(z, codes, new_atoms)) < before:
        atoms, before = new_atoms, after
    new_codes = fitted_codes(z, atoms, keep)
    return new_codes if lost(z, new_codes, atoms) < before else codes, atoms, keep


def balanced(codes: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, each atom of the norm of its coefficients: Adam trains factors of different scale badly."""
    left, right = torch.linalg.vector_norm(codes, dim=0), torch.linalg.vector_norm(atoms, dim=1)
    is_used = (left > 0) & (right > 0)
    scale = torch.where(is_used, (left / right.clamp_min(torch.finfo(right.dtype).tiny)).sqrt(), 1)
    return codes / scale, atoms * scale[:, None]
