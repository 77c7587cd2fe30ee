"""A linear layer of rank r stored as r rows of its weight and what makes the other rows of them (PIFA, 2501.19090).

v [r, k], the weight's rows at pivots [r]   c [n - r, r]   the other rows, in their order, are c v. That is r (n + k - r)
numbers and r indices, r^2 fewer than two factors need for the same weight, and as many fewer multiplications."""
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, DtypeError, NumericsError, ShapeError
from ..linalg import truncated_svd
from ..ops import check_pivots, low_rank_pivoted
from ..ops.low_rank_pivoted import source
from .low_rank import check_sizes
from .structure import Structure, check_counts, check_dense

_LARGEST = 1.25  # entry of c that is left alone: below, exchanging two rows gains little, and takes time
_EXCHANGES = 8  # for each row, at most: far more than are ever needed, but for rounding
_EPS = torch.finfo(torch.float64).eps


class LowRankPivoted(Structure):
    """y = x W^T + bias, W [n, k] of rank r with v [r, k] at its pivot rows and c v elsewhere.   x [..., k], y [..., n]

    A new layer's pivots are its first r rows. Raises ArgumentError or ShapeError for sizes that are no whole numbers, or a
    rank outside 1..min(in, out)."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        check_sizes(in_features, out_features, rank)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.v = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.c = nn.Parameter(torch.empty(out_features - rank, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("pivots", torch.arange(rank, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As two `nn.Linear` in a row start: each part uniform within 1 / sqrt(its own inputs). The pivots stay."""
        nn.init.uniform_(self.v, -1 / sqrt(self.in_features), 1 / sqrt(self.in_features))
        for last in (self.c, self.bias):
            if last is not None and last.numel():
                nn.init.uniform_(last, -1 / sqrt(self.rank), 1 / sqrt(self.rank))

    @classmethod
    def of(cls, v: Tensor, c: Tensor, pivots: Tensor, bias: Tensor | None = None) -> "LowRankPivoted":
        """The layer that holds these, contiguous copies of them.   v [r, k]   c [n - r, r]   pivots [r] int64   bias [n]

        Raises ShapeError or DtypeError for what does not fit together, IndexRangeError for pivots that do not ascend in
        0..n-1."""
        check_dense(v)
        check_dense(c)
        n = len(v) + len(c)
        check_pivots(pivots, n)
        layer = cls(v.shape[1], n, len(v), bias is not None, device="meta", dtype=v.dtype)
        for name, tensor in (("c", c), ("pivots", pivots), ("bias", bias)):
            if tensor is not None and tensor.shape != getattr(layer, name).shape:
                raise ShapeError(f"{name} is {list(tensor.shape)}, must be {list(getattr(layer, name).shape)}")
            if tensor is not None and tensor.dtype != getattr(layer, name).dtype:
                raise DtypeError(f"{name} has {tensor.dtype}, must have {getattr(layer, name).dtype}")
        layer.pivots = pivots.detach().to(v.device, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in (("v", v), ("c", c), ("bias", bias)):
            if tensor is not None:
                layer.register_parameter(name, nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)))
        return layer

    @classmethod
    @torch.no_grad()
    def from_factors(cls, v: Tensor, u: Tensor, bias: Tensor | None = None) -> "LowRankPivoted":
        """The weight u v anew, with the same numbers but for rounding, in the dtype of v.   v [r, k]   u [n, r]

        Pivots are rows of u that span the most volume, so that c has no entry above 1.25 and rounding does not grow. Raises
        NumericsError for factors of a lower rank than they have room for, and for NaN or infinity."""
        check_dense(u)
        check_dense(v)
        pivots, c = _pivoted(u.double())
        return cls.of((u[pivots].double() @ v.double()).to(v.dtype), c.to(v.dtype), pivots, bias)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, rank: int) -> "LowRankPivoted":
        """The closest rank-r matrix to weight [n, k] (Eckart and Young 1936), in the weight's dtype. Raises NumericsError
        for NaN or infinity and for a weight of a lower rank, UnsupportedError for a sharded one."""
        check_dense(weight)
        check_sizes(weight.shape[1], weight.shape[0], rank)
        u, s, vt, _ = truncated_svd(weight, rank)
        made = cls.from_factors(vt, u * s, None)
        return cls.of(made.v.to(weight.dtype), made.c.to(weight.dtype), made.pivots, bias)

    def forward(self, x: Tensor) -> Tensor:
        return low_rank_pivoted(x, self.v, self.c, self.pivots, self.bias)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(v [r, k], u [n, r]) of the same weight, u with the rows of the identity at the pivots."""
        one = torch.eye(self.rank, dtype=self.c.dtype, device=self.c.device)
        return self.v, torch.cat([one, self.c])[source(self.pivots, self.out_features)]

    def dense(self) -> Tensor:
        return torch.cat([self.v, self.c @ self.v])[source(self.pivots, self.out_features)]

    def shape(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank,
                "bias": self.bias is not None}

    def check_indices(self) -> None:
        check_pivots(self.pivots, self.out_features)

    def macs(self) -> int:
        return self.rank * (self.in_features + self.out_features - self.rank)


def rank_for(in_features: int, out_features: int, ratio: float, *, step: int = 16) -> int:
    """The largest rank that keeps at most `ratio` of the weight's numbers in this form, indices counted as numbers; a
    multiple of step, or below one step whatever fits. 0 where not even rank 1 does."""
    check_counts(in_features=in_features, out_features=out_features, step=step)
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio < 1:
        raise ArgumentError(f"ratio must be between 0 and 1, both excluded; found {ratio!r}")
    room = in_features + out_features + 1
    rank = int((room - sqrt(room * room - 4 * ratio * in_features * out_features)) / 2)
    return rank - rank % step if rank >= step else rank


def _pivoted(u: Tensor) -> tuple[Tensor, Tensor]:
    """(pivots [r] ascending, c [n - r, r] with u[others] = c u[pivots]) of u [n, r] in fp64.

    Partial pivoting gives a start whose L has no entry above 1, which c = L2 L1^-1 may still have; then rows change places
    wherever c has a large entry, each time by that factor more volume (maxvol: Goreinov et al. 2010)."""
    n, r = u.shape
    if not u.isfinite().all():
        raise NumericsError(f"u {list(u.shape)} holds NaN or infinity")
    scaled = u / torch.linalg.vector_norm(u, dim=0).clamp_min(torch.finfo(u.dtype).tiny)  # the same c, easier to judge
    lu, swaps, _ = torch.linalg.lu_factor_ex(scaled)  # it is the diagonal that says whether pivots exist
    order = list(range(n))
    for place, other in enumerate((swaps - 1).tolist()):
        order[place], order[other] = order[other], order[place]
    diagonal = lu.diagonal().abs()
    if not float(diagonal.min()) > n * _EPS * float(diagonal.max()):
        raise NumericsError(f"the factors are of a lower rank than their {r} directions; pivots do not exist")
    order = torch.tensor(order, device=u.device)
    c = torch.linalg.solve_triangular(lu[:r], lu[r:], upper=False, left=False, unitriangular=True)
    for _ in range(_EXCHANGES * n if c.numel() else 0):
        i, j = divmod(int(c.abs().argmax()), r)
        if not abs(entry := float(c[i, j])) > _LARGEST:
            break
        row = c[i].clone()
        row[j] -= 1
        step = row / entry  # the new pivot row in place of the old one, which takes the place that it leaves
        c -= c[:, j, None].clone() * step
        c[i] = -step
        c[i, j] += 1
        order[[j, r + i]] = order[[r + i, j]]
    pivots, others = order[:r].sort().values, order[r:].sort().values
    return pivots, torch.linalg.solve(scaled[pivots], scaled[others], left=False)  # anew: exchanges have added up rounding
