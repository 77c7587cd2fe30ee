"""A linear layer whose weight is u v, of rank r: r (k + n) numbers in place of k n.   v [r, k]   u [n, r]"""
from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, DeviceError, DtypeError, ShapeError
from ..linalg import truncated_svd
from ..ops import low_rank, low_rank_group
from .structure import Structure, check_dense, share


class LowRank(Structure):
    """y = (x v^T) u^T + bias.   x [..., in_features], y [..., out_features]

    Raises ArgumentError or ShapeError for sizes that are no whole numbers, or a rank outside 1..min(in, out)."""

    first = "v"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        check_sizes(in_features, out_features, rank)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.v = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.u = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As two `nn.Linear` in a row start: each factor uniform within 1 / sqrt(its own inputs)."""
        nn.init.uniform_(self.v, -1 / sqrt(self.in_features), 1 / sqrt(self.in_features))
        for last in (self.u, self.bias):
            if last is not None:
                nn.init.uniform_(last, -1 / sqrt(self.rank), 1 / sqrt(self.rank))

    @classmethod
    def of(cls, v: Tensor, u: Tensor, bias: Tensor | None = None) -> "LowRank":
        """The layer that holds these factors, contiguous copies of them.   v [r, k]   u [n, r]   bias [n]"""
        layer = cls(v.shape[1], u.shape[0], u.shape[1], bias=bias is not None, device="meta", dtype=v.dtype)
        for name, tensor in (("v", v), ("u", u), ("bias", bias)):
            if tensor is not None:
                layer.register_parameter(name, nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)))
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, rank: int) -> "LowRank":
        """The closest rank-r matrix to weight [n, k] (Eckart and Young 1936), each singular value split evenly between the
        factors, in the weight's dtype. Raises NumericsError for NaN or infinity, UnsupportedError for
        a sharded weight."""
        check_dense(weight)
        check_sizes(weight.shape[1], weight.shape[0], rank)
        u, s, vt, _ = truncated_svd(weight, rank)
        root = s.sqrt()
        return cls.of((root[:, None] * vt).to(weight.dtype), (u * root).to(weight.dtype), bias)

    def forward(self, x: Tensor) -> Tensor:
        return low_rank(x, self.v, self.u, self.bias)

    def dense(self) -> Tensor:
        return self.u @ self.v

    def shape(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank,
                "bias": self.bias is not None}

    def split(self, rows: Sequence[int], biases: Sequence[Tensor | None]) -> list["LowRank"]:
        """Layers of so many of this one's outputs each, in their order, that hold its v as one parameter."""
        return share([LowRank.of(self.v, u, bias) for u, bias in zip(self.u.split(list(rows)), biases)])

    def macs(self) -> int:
        return self.rank * (self.in_features + self.out_features)

    def merged(self, v: Tensor, u: Tensor, scale: float = 1.0) -> "LowRank":
        """This layer plus scale * u v, exactly: the update's rank is added to the layer's.   v [r2, k]   u [n, r2]"""
        if v.dim() != 2 or u.dim() != 2 or v.shape[1] != self.in_features or u.shape != (self.out_features, v.shape[0]):
            raise ShapeError(f"the update needs v [r, {self.in_features}] and u [{self.out_features}, r], "
                             f"found v {list(v.shape)} and u {list(u.shape)}")
        _check_alike("the update's v", v, self.v)
        _check_alike("the update's u", u, self.v)
        return type(self).of(torch.cat([self.v, v]), torch.cat([self.u, scale * u], dim=1), self.bias)


class LowRankGroup(nn.Module):
    """Layers that read the same input (q/k/v, gate/up) as one module, their first factors in one parameter.

    v [sum of ranks, k]   u0 [n0, r0], u1 [n1, r1], ...   forward(x [..., k]) -> (y0 [..., n0], y1 [..., n1], ...)
    One call of the op low_rank_group. On a CPU each member keeps its own layer's bits: one product with all of v saved
    nothing at 64 rows, and at one row kept bf16 from the compiled kernel, which took twice as long."""

    def __init__(self, layers: Sequence[LowRank]):
        super().__init__()
        _check_group(layers)
        self.ranks = [layer.rank for layer in layers]
        self.v = nn.Parameter(torch.cat([layer.v.detach() for layer in layers]))
        for i, layer in enumerate(layers):
            self.register_parameter(f"u{i}", nn.Parameter(layer.u.detach().clone()))
            self.register_parameter(f"bias{i}", None if layer.bias is None else nn.Parameter(layer.bias.detach().clone()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        u, bias = zip(*self._last())
        return tuple(low_rank_group(x, self.v.split(self.ranks), u, bias))

    def layers(self) -> list[LowRank]:
        """The layers as they were, bit for bit."""
        return [LowRank.of(v, u, bias) for v, (u, bias) in zip(self.v.split(self.ranks), self._last())]

    def _last(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(getattr(self, f"u{i}"), getattr(self, f"bias{i}")) for i in range(len(self.ranks))]


def check_sizes(in_features: int, out_features: int, rank: int) -> None:
    for name, size in (("in_features", in_features), ("out_features", out_features), ("rank", rank)):
        if not isinstance(size, int) or isinstance(size, bool):
            raise ArgumentError(f"{name} must be a whole number, found {size!r}")
    if in_features < 1 or out_features < 1:
        raise ShapeError(f"in_features {in_features} and out_features {out_features} must be at least 1")
    if not 1 <= rank <= min(in_features, out_features):
        raise ShapeError(f"rank must be between 1 and {min(in_features, out_features)} for {in_features} to {out_features} "
                         f"features, found {rank}")


def _check_group(layers: Sequence[LowRank]) -> None:
    if not layers:
        raise ArgumentError("a group needs at least one layer, found none")
    for i, layer in enumerate(layers):
        if not isinstance(layer, LowRank):
            raise ArgumentError(f"layer {i} of the group must be a LowRank, found {type(layer).__name__}")
        if layer.in_features != layers[0].in_features:
            raise ShapeError(f"layer {i} of the group has in_features {layer.in_features}, layer 0 has "
                             f"{layers[0].in_features}; layers of a group read the same input")
        _check_alike(f"layer {i} of the group", layer.v, layers[0].v)


def _check_alike(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise DtypeError(f"{name} has {tensor.dtype}, must have {other.dtype}")
    if tensor.device != other.device:
        raise DeviceError(f"{name} is on {tensor.device}, must be on {other.device}")
