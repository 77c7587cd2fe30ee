"""Truncated SVD, eigenvectors, matrix roots and the balancing of two factors: in fp64, deterministic, with ways out.

Large operands are upcast to fp64 block by block. For a weight of at most fp32, singular vectors come from the eigenvectors of
the smaller Gram matrix: squaring costs half of fp64's digits, which leaves an error of 1e-8 of the largest singular value, less
than an fp32 SVD has, for a fraction of its time.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import NumericsError, ShapeError

_BLOCK = 1 << 21  # numbers upcast at a time: 16 MiB in fp64
_JITTERS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # parts of the mean diagonal, tried in turn
_CLIP = 1e-12  # eigenvalues below this part of the largest are taken for it
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


def require_finite(tensor: Tensor, name: str) -> None:
    """NumericsError that counts what is not finite. (An SVD of infinity gives NaN without an error, or even numbers.)"""
    bad = sum(block.numel() - int(block.isfinite().sum()) for _, block in _row_blocks(tensor))
    if bad:
        raise NumericsError(f"{name} {list(tensor.shape)} holds NaN or infinity in {bad} of {tensor.numel()} places")


def require_rank(rank: int, weight: Tensor) -> None:
    """ShapeError unless 1 <= rank <= min(n, k).   weight [n, k]"""
    if not 1 <= rank <= min(weight.shape):
        raise ShapeError(f"rank must be between 1 and {min(weight.shape)} for a weight {list(weight.shape)}, found {rank}")


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Solved]:
    """The leading singular triples in fp64, largest first, the largest entry of each row of vt positive.

    u [n, r]   s [r]   vt [r, k]; where s is zero, so is the column of u. Raises NumericsError, ShapeError."""
    require_finite(weight, "weight")
    require_rank(rank, weight)
    rungs = [("svd in fp64", lambda: torch.linalg.svd(weight.double(), full_matrices=False)),
             ("eigenvectors of the Gram matrix", lambda: _svd_by_gram(weight, rank))]
    if weight.is_cuda:
        rungs[1:1] = [("gesvd in fp64", lambda: torch.linalg.svd(weight.double(), full_matrices=False, driver="gesvd")),
                      ("svd in fp64 on the CPU", lambda: torch.linalg.svd(weight.double().cpu(), full_matrices=False))]
    if weight.dtype != torch.float64:
        rungs.insert(0, rungs.pop())
    (u, s, vt), solved = _climb(rungs)
    u, s, vt = (part.to(weight.device) for part in (u[:, :rank], s[:rank], vt[:rank]))
    sign = _signs(vt)
    return u * sign, s, vt * sign[:, None], solved


def leading(build: Callable[[], Tensor], count: int) -> tuple[Tensor, Tensor, Solved]:
    """Eigenpairs of a positive semi-definite fp64 matrix, largest first.   values [count], >= 0   vectors [k, count]

    `build` makes the matrix, and makes it again for the next solver: each overwrites it, as a copy of the largest would not
    fit the memory that a layer may take."""
    rungs = [("eigh", lambda: _eigh_in_place(build())), ("svd", lambda: _eigh_by_svd(build()))]
    if torch.cuda.is_available():
        rungs.insert(1, ("eigh on the CPU", lambda: _eigh_in_place(build().cpu())))
    (values, vectors), solved = _climb(rungs)
    values, vectors = values[:count].clamp_min(0), vectors[:, :count].contiguous()
    return values, vectors.mul_(_signs(vectors.mT)), solved


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
    return Root(vectors, values.clamp_min(max(float(values[0]) * _CLIP, torch.finfo(torch.float64).tiny)).sqrt(),
                events + solved.events)


def gram_of(matrix: Tensor, root: Root | None = None) -> Tensor:
    """M^T M in fp64, or (M L)^T (M L).   matrix [p, q] -> [q, q]"""
    out = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for _, block in _row_blocks(matrix):
        block = block.double()
        block = block if root is None else root.applied(block)
        out.addmm_(block.mT, block)
    return out


def quadratic(weight: Tensor, gram: Tensor, shift: float = 0.0) -> Tensor:
    """W (C + shift I) W^T in fp64, no operand upcast as a whole.   weight [n, k]   gram [k, k] -> [n, n]"""
    n, k = weight.shape
    out = torch.zeros(n, n, dtype=torch.float64, device=weight.device)
    columns = torch.arange(k).split(max(1, min(1024, _BLOCK // n)))
    slices = [slice(int(part[0]), int(part[-1]) + 1) for part in columns]
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


def balance(u: Tensor, v: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The same product with u^T u = v v^T = its singular values, sorted: Adam trains raw factors badly.   u [n, r]   v [r, k]

    With u = Q R and v^T = Q' R', the r x r core R R'^T = A S B^T. Instead of Q and Q', which are as large as the factors, only
    R and R' are computed, from A sqrt(S) = R R'^T B / sqrt(S) and its mirror image."""
    left, right = _triangle(u), _triangle(v.mT)
    (a, s, bt), _ = _climb([("svd", lambda: torch.linalg.svd(left @ right.mT, full_matrices=False)),
                            ("svd on the CPU", lambda: torch.linalg.svd((left @ right.mT).cpu(), full_matrices=False))])
    a, s, bt = a.to(u.device), s.to(u.device), bt.to(u.device)
    noise = _EPS * len(s) * torch.linalg.matrix_norm(left) * torch.linalg.matrix_norm(right)
    inverse = torch.where(s > noise, s, torch.inf).rsqrt()  # zero where the product has no such direction
    new_v = times(v.mT, (left.mT @ (a * inverse)), dtype).mT
    sign = _signs(new_v)
    return times(u, (right.mT @ (bt.mT * inverse)) * sign, dtype), (new_v * sign[:, None]).contiguous()


def _row_blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, _BLOCK // max(1, matrix.shape[1] if matrix.dim() > 1 else 1))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step), matrix[start:start + step]


def _climb(rungs: list[tuple[str, Callable]]) -> tuple[tuple[Tensor, ...], Solved]:
    """The first solver that neither raises nor returns something that is not finite."""
    events = []
    for name, solve in rungs:
        try:
            result = solve()
        except torch.linalg.LinAlgError as error:
            events.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        if all(bool(part.isfinite().all()) for part in result):
            return tuple(result), Solved(name, events)
        events.append(f"{name}: result is not finite")
    raise NumericsError("every solver failed: " + "; ".join(events))


def _svd_by_gram(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """s is measured as the length of W v_i, which stays accurate where the square root of an eigenvalue is all noise."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    _, vectors, _ = leading(lambda: gram_of(tall), rank)
    moved = times(tall, vectors)
    s, order = torch.linalg.vector_norm(moved, dim=0).sort(descending=True, stable=True)
    moved = moved[:, order] / torch.where(s > 0, s, torch.inf)
    vectors = vectors[:, order]
    return (moved, s, vectors.mT) if tall is weight else (vectors, s, moved.mT)


def _eigh_in_place(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs, largest first; the vectors take the matrix's own memory, which saves one matrix of four."""
    values = torch.empty(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    vectors = matrix.mT  # LAPACK's layout; the matrix is symmetric
    torch.linalg.eigh(vectors, out=(values, vectors))
    return values.flip(0), vectors.flip(1)


def _eigh_by_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    vectors, values, _ = torch.linalg.svd(matrix.cpu())
    return values.to(matrix.device), vectors.to(matrix.device)


def _triangle(tall: Tensor) -> Tensor:
    """R of a QR decomposition in fp64, block of rows by block of rows, so that no second matrix of this size is needed."""
    r = None
    for _, block in _row_blocks(tall):
        block = block.double()
        r = torch.linalg.qr(block if r is None else torch.cat([r, block]), mode="r").R
    return r


def _signs(rows: Tensor) -> Tensor:
    """+1 or -1 that makes the entry of largest size of each row positive."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True)).squeeze(1)
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)
