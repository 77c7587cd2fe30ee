"""Truncated SVD, eigenvectors, matrix roots and the balancing of two factors: in fp64, deterministic, with ways out.

Large operands are upcast to fp64 block by block. For a weight of at most fp32, singular vectors come from the eigenvectors
of the smaller Gram matrix: squaring costs half of fp64's digits, which leaves an error of 1e-8 of the largest singular
value, less than an fp32 SVD has, for a fraction of its time.
"""
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import NumericsError, ShapeError

log = logging.getLogger("lowfat")
_BLOCK = 1 << 18  # numbers upcast at a time, 2 MiB in fp64: what malloc keeps of freed blocks grows with their size
_ROWS = 256  # but never fewer rows: products of thinner blocks are bound by memory
_JITTERS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # parts of the mean diagonal, tried in turn
_CLIP = 1e-12  # of the largest eigenvalue; smaller ones are taken for it
_EPS = torch.finfo(torch.float64).eps


@dataclass
class Solved:
    """Which solver gave the result, and what went wrong before it did."""
    solver: str
    events: list[str] = field(default_factory=list)


@dataclass
class Root:
    """L with gram = L L^T: lower triangular, or orthonormal columns times a scale.   vectors [k, k]   scale [k] or None"""
    vectors: Tensor
    scale: Tensor | None
    events: list[str]

    def times(self, right: Tensor) -> Tensor:
        """L right.   right [k, r]"""
        return self.vectors @ (right if self.scale is None else self.scale[:, None] * right)

    def applied(self, left: Tensor) -> Tensor:
        """left L.   left [m, k]"""
        return left @ self.vectors if self.scale is None else (left @ self.vectors).mul_(self.scale)

    def solved(self, left: Tensor) -> Tensor:
        """left L^-1.   left [r, k]"""
        if self.scale is None:
            return torch.linalg.solve_triangular(self.vectors, left, upper=False, left=False)
        return (left / self.scale) @ self.vectors.mT

    def whitened(self, left: Tensor) -> Tensor:
        """left L^-T, with which the Gram matrix becomes I.   left [r, k]"""
        if self.scale is None:
            return torch.linalg.solve_triangular(self.vectors.mT, left, upper=True, left=False)
        return (left @ self.vectors).div_(self.scale)


def require_finite(tensor: Tensor, name: str) -> None:
    """NumericsError that counts what is not finite: an SVD of infinity gives NaN without an error, or even numbers."""
    bad = sum(block.numel() - int(block.isfinite().sum()) for _, block in _row_blocks(tensor))
    if bad:
        raise NumericsError(f"{name} {list(tensor.shape)} holds NaN or infinity in {bad} of {tensor.numel()} places")


def require_rank(rank: int, weight: Tensor) -> None:
    """ShapeError unless 1 <= rank <= min(n, k).   weight [n, k]"""
    if not 1 <= rank <= min(weight.shape):
        raise ShapeError(f"rank must be between 1 and {min(weight.shape)} for a weight {list(weight.shape)}, found {rank}")


def truncated_svd(weight: Tensor, rank: int, *, rows: Tensor | None = None,
                  columns: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Solved]:
    """The leading singular triples of W, or of D_rows W D_columns, in fp64, largest first.

    u [n, r]   s [r]   vt [r, k], the largest entry of each of its rows positive; where s is zero, so is the column of u.
    Raises NumericsError, ShapeError."""
    require_finite(weight, "weight")
    require_rank(rank, weight)

    def whole() -> Tensor:
        scaled = weight.to(torch.float64, copy=True)
        scaled = scaled if rows is None else scaled.mul_(rows[:, None])
        return scaled if columns is None else scaled.mul_(columns)

    events: list[str] = []
    rungs = [("svd in fp64", lambda: torch.linalg.svd(whole(), full_matrices=False)),
             ("eigenvectors of the Gram matrix", lambda: _svd_by_gram(weight, rank, rows, columns, events))]
    if weight.is_cuda:
        rungs[1:1] = [("gesvd in fp64", lambda: torch.linalg.svd(whole(), full_matrices=False, driver="gesvd")),
                      ("svd in fp64 on the CPU", lambda: torch.linalg.svd(whole().cpu(), full_matrices=False))]
    if weight.dtype != torch.float64:
        rungs.insert(0, rungs.pop())
    (u, s, vt), solved = _climb(rungs)
    u, s, vt = (part.to(weight.device) for part in (u[:, :rank], s[:rank], vt[:rank]))
    sign = _signs(vt)
    return u.mul_(sign), s, vt.mul_(sign[:, None]), Solved(solved.solver, events + solved.events)


def leading(build: Callable[[], Tensor], count: int) -> tuple[Tensor, Tensor, Solved]:
    """Eigenpairs of a positive semi-definite fp64 matrix, largest first.   values [count], >= 0   vectors [k, count]

    `build` makes the matrix, and makes it again for the next solver: each overwrites it, as a copy of the largest would not
    fit the memory that a layer may take."""
    rungs = [("eigh", lambda: _eigh_in_place(build())), ("svd", lambda: _eigh_by_svd(build()))]
    if torch.cuda.is_available():
        rungs.insert(1, ("eigh on the CPU", lambda: _eigh_in_place(build().cpu())))
    (values, vectors), solved = _climb(rungs)
    values, vectors = values[-count:].flip(0).clamp_min(0), vectors[:, -count:].flip(1).contiguous()
    return values, vectors.mul_(_signs(vectors.mT)), solved


def closest_each(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, list[str]]:
    """(u [b, n, r], v [b, r, k]) whose products are the closest ones of rank r to each of the matrices [b, n, k] in fp64, and
    the solvers' events. The factor of the smaller side has orthonormal columns or rows: no division by what may be zero."""
    is_tall = matrices.shape[1] >= matrices.shape[2]
    grams = matrices.mT @ matrices if is_tall else matrices @ matrices.mT

    def one_by_one() -> tuple[Tensor]:
        found = [leading(gram.clone, rank) for gram in grams]
        events.extend(event for _, _, solved in found for event in solved.events)
        return torch.stack([vectors for _, vectors, _ in found]),

    events: list[str] = []
    (vectors,), solved = _climb([("eigh of a stack", lambda: (torch.linalg.eigh(grams).eigenvectors[..., -rank:],)),
                                 ("one by one", one_by_one)])
    if is_tall:
        return matrices @ vectors, vectors.mT, solved.events + events
    return vectors, vectors.mT @ matrices, solved.events + events


def spectrum(build: Callable[[], Tensor]) -> Tensor:
    """All eigenvalues of a positive semi-definite fp64 matrix, largest first, none below zero.   [k]"""
    (values,), _ = _climb([("eigvalsh", lambda: (torch.linalg.eigvalsh(build()).flip(0),)),
                           ("svdvals", lambda: (torch.linalg.svdvals(build().cpu()),))])
    return values.clamp_min(0)


def tails(values: Tensor) -> Tensor:
    """What is lost when only the first r of the values are kept, for r = 0, 1, ..., all of them.   [k] -> [k + 1]"""
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def gram_root(gram: Tensor, solver: str, shift: float = 0.0) -> Root:
    """L with gram + shift I = L L^T, by "cholesky" or "eigen"; never fails on a finite positive semi-definite matrix.

    Cholesky adds more and more to the diagonal until it succeeds, then gives way to eigen, which clips eigenvalues."""
    events = []

    def shifted(more: float = 0.0) -> Tensor:
        matrix = gram.to(torch.float64, copy=True)
        matrix.diagonal().add_(shift + more)
        return matrix

    if solver == "cholesky":
        mean = float(gram.diagonal().double().mean()) + shift
        for jitter in _JITTERS:
            lower, failed = torch.linalg.cholesky_ex(shifted(jitter * mean))
            if not failed and bool(lower.isfinite().all()):
                return Root(lower, None, events + ([f"cholesky: {jitter:g} of the mean diagonal added"] if jitter else []))
        events.append("cholesky: not positive definite, eigenvalues clipped")
    values, vectors, solved = leading(shifted, gram.shape[0])
    # below the shift there is only rounding: summed in fp32, a Gram matrix is indefinite by 1e-7 of its largest eigenvalue
    least = max(shift, float(values[0]) * _CLIP, torch.finfo(torch.float64).tiny)
    return Root(vectors, values.clamp_min(least).sqrt(), events + solved.events)


def gram_of(matrix: Tensor, root: Root | None = None, *, rows: Tensor | None = None) -> Tensor:
    """M^T M in fp64, or (M L)^T (M L); rows scales the rows of M.   matrix [p, q] -> [q, q]"""
    out = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for part, block in _row_blocks(matrix):
        block = block.double() if rows is None else block.double() * rows[part, None]
        block = block if root is None else root.applied(block)
        out.addmm_(block.mT, block)
    return out


def smaller_gram(weight: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """M^T M or M M^T in fp64, whichever is smaller, of M = D_rows W D_columns.   weight [n, k]"""
    if weight.shape[0] < weight.shape[1]:
        weight, rows, columns = weight.mT, columns, rows
    out = gram_of(weight, rows=rows)
    return out if columns is None else out.mul_(columns).mul_(columns[:, None])


def quadratic(weight: Tensor, gram: Tensor, shift: float = 0.0) -> Tensor:
    """W (C + shift I) W^T in fp64, no operand upcast as a whole.   weight [n, k]   gram [k, k] -> [n, n]"""
    n, k = weight.shape
    out = torch.zeros(n, n, dtype=torch.float64, device=weight.device)
    slices = [slice(start, min(start + 4 * _ROWS, k)) for start in range(0, k, 4 * _ROWS)]
    for right in slices:
        moved = torch.zeros(n, right.stop - right.start, dtype=torch.float64, device=weight.device)  # W C, these columns
        for left in slices:
            block = gram[left, right].to(weight.device, torch.float64, copy=True)
            if left == right:
                block.diagonal().add_(shift)
            moved.addmm_(weight[:, left].double(), block)
        out.addmm_(moved, weight[:, right].double().mT)
    return out


def times(matrix: Tensor, right: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """M right, multiplied in fp64, kept in dtype.   matrix [p, q]   right [q, r] -> [p, r]"""
    out = torch.empty(matrix.shape[0], right.shape[1], dtype=dtype, device=matrix.device)
    for rows, block in _row_blocks(matrix):
        out[rows] = (block.double() @ right.double()).to(dtype)
    return out


def balance(u: Tensor, v: Tensor, dtype: torch.dtype = torch.float64, *,
            right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same product with u^T u = v v^T = its singular values on a diagonal, largest first.   u [n, r]   v [r, k]

    Adam trains factors of different scale badly. With u = Q R and v^T = P T, the r x r core R T^T is A S B^T, and the new
    factors are Q A sqrt(S) = u T^T B / sqrt(S) and its mirror image: Q and P, as large as the factors, are never made. Given
    right [k, r], u stands for u right, which is not made either."""
    left_triangle, right_triangle = _triangle(u, right), _triangle(v.mT)
    (a, s, bt), _ = _climb([("svd", lambda: torch.linalg.svd(left_triangle @ right_triangle.mT, full_matrices=False)),
                            ("svd on the CPU", lambda: torch.linalg.svd((left_triangle @ right_triangle.mT).cpu(),
                                                                        full_matrices=False))])
    a, s, bt = a.to(u.device), s.to(u.device), bt.to(u.device)
    noise = _EPS * len(s) * torch.linalg.matrix_norm(left_triangle) * torch.linalg.matrix_norm(right_triangle)
    inverse = torch.where(s > noise, s, torch.inf).rsqrt()  # zero where the product has no such direction
    new_v = times(v.mT, left_triangle.mT @ (a * inverse), dtype).mT
    sign = _signs(new_v)
    turn = right_triangle.mT @ (bt.mT * inverse) * sign
    return times(u, turn if right is None else right @ turn, dtype), (new_v * sign[:, None]).contiguous()


def _row_blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(_ROWS, _BLOCK // max(1, matrix.shape[-1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step), matrix[start:start + step]


def _climb(rungs: list[tuple[str, Callable]]) -> tuple[tuple[Tensor, ...], Solved]:
    """The first solver that neither raises nor returns something that is not finite."""
    events = []
    for name, solve in rungs:
        try:
            result = solve()
        except (torch.linalg.LinAlgError, NumericsError) as error:
            events.append(f"{name}: {str(error).splitlines()[0]}")
        else:
            if all(block.isfinite().all() for part in result for _, block in _row_blocks(part)):
                return tuple(result), Solved(name, events)
            events.append(f"{name}: result is not finite")
        log.warning("linalg: %s", events[-1])  # not every caller has a report to put it in
    raise NumericsError("every solver failed: " + "; ".join(events))


def _svd_by_gram(weight: Tensor, rank: int, rows: Tensor | None, columns: Tensor | None,
                 events: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """s is measured as the length of W v_i, which stays accurate where the square root of an eigenvalue is all noise."""
    is_tall = weight.shape[0] >= weight.shape[1]
    _, vectors, solved = leading(lambda: smaller_gram(weight, rows, columns), rank)
    events += solved.events
    before, after = (columns, rows) if is_tall else (rows, columns)
    moved = times(weight if is_tall else weight.mT, vectors if before is None else vectors * before[:, None])
    moved = moved if after is None else moved.mul_(after[:, None])
    s = torch.linalg.vector_norm(moved, dim=0)
    moved.div_(torch.where(s > 0, s, torch.inf))
    if (s.diff() > 0).any():  # among values that are all noise
        s, order = s.sort(descending=True, stable=True)
        moved, vectors = moved[:, order], vectors[:, order]
    return (moved, s, vectors.mT) if is_tall else (vectors, s, moved.mT)


def _eigh_in_place(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs, smallest first; the vectors take the matrix's own memory, which saves one matrix of four."""
    values = torch.empty(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    vectors = matrix.mT  # LAPACK's layout; the matrix is symmetric
    torch.linalg.eigh(vectors, out=(values, vectors))
    return values, vectors


def _eigh_by_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    vectors, values, _ = torch.linalg.svd(matrix.cpu())
    return values.flip(0).to(matrix.device), vectors.flip(1).to(matrix.device)


def _triangle(tall: Tensor, right: Tensor | None = None) -> Tensor:
    """R of the QR decomposition of M or M right in fp64, some rows at a time, so that no copy of it is needed."""
    r = None
    for block in tall.split(max(_ROWS, tall.shape[1] if right is None else right.shape[1])):
        block = block.double() if right is None else block.double() @ right
        r = torch.linalg.qr(block if r is None else torch.cat([r, block]), mode="r").R
    return r


def _signs(rows: Tensor) -> Tensor:
    """+1 or -1 that makes the entry of largest size of each row positive."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True)).squeeze(1)
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)
