"""A linear layer that keeps n of every m neighbouring weights of a row (2:4, or any N:M along the inputs).

values [out, in n / m], of each row in ascending order of the inputs; mask [out, ceil(in / 32)] int32, a bitmap of the kept
inputs (see ops/bitmap.py). Which weights are kept is said by the mask alone: a value may be zero, and stays."""
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DtypeError, ShapeError
from ..linalg import require_finite
from ..ops.bitmap import expand, pack, unpack
from ..ops.sparse24 import check_mask, sparse24
from .structure import Structure, check_counts, check_dense


class Sparse24(Structure):
    """y = x W^T + bias, W with n of every m neighbours of a row.   x [..., in_features], y [..., out_features]

    A new layer keeps the first n of each group in its first row, the next n in its second, and so on around the group, so
    that every input is used. Raises ArgumentError or ShapeError for an n:m that the inputs do not have."""

    def __init__(self, in_features: int, out_features: int, n: int = 2, m: int = 4, bias: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        check_counts(in_features=in_features, out_features=out_features, n=n, m=m)
        check_groups(in_features, n, m)
        self.in_features, self.out_features, self.n, self.m = in_features, out_features, n, m
        self.values = nn.Parameter(torch.empty(out_features, in_features // m * n, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("mask", pack(turning(out_features, m, n, self.values.device).repeat(1, in_features // m)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Linear` starts with as many inputs as a row keeps. The mask stays."""
        bound = 1 / sqrt(self.values.shape[1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def of(cls, values: Tensor, mask: Tensor, bias: Tensor | None = None, *, in_features: int | None = None, n: int = 2,
           m: int = 4) -> "Sparse24":
        """The layer that holds these, contiguous copies of them.   values [out, in n / m]   mask [out, ceil(in / 32)] int32

        in_features: by default as many as the values need. Raises IndexRangeError for a mask that does not keep n of every
        m."""
        check_dense(values)
        check_counts(n=n, m=m)
        in_features = values.shape[1] // n * m if in_features is None else in_features
        layer = cls(in_features, values.shape[0], n, m, bias is not None, device="meta", dtype=values.dtype)
        if mask.dtype != torch.int32:
            raise DtypeError(f"mask has {mask.dtype}, must be int32, a bitmap (see lowfat.ops.bitmap.pack)")
        for name, tensor in (("values", values), ("mask", mask), ("bias", bias)):
            if tensor is not None and tensor.shape != getattr(layer, name).shape:
                raise ShapeError(f"{name} is {list(tensor.shape)}, must be {list(getattr(layer, name).shape)}")
        check_mask(mask, in_features, n, m)
        layer.mask = mask.detach().to(values.device, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in (("values", values), ("bias", bias)):
            if tensor is not None:
                layer.register_parameter(name, nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)))
        return layer

    @classmethod
    @torch.no_grad()
    def from_mask(cls, weight: Tensor, keep: Tensor, bias: Tensor | None = None, *, n: int = 2, m: int = 4) -> "Sparse24":
        """The entries of weight [out, in] where keep [out, in] is true, zeros and -0.0 included.

        Raises ShapeError, naming the first bad group, for a mask that is not n of every m."""
        check_dense(weight)
        check_counts(n=n, m=m)
        check_groups(weight.shape[1], n, m)
        if keep.dtype != torch.bool or keep.shape != weight.shape:
            raise ShapeError(f"keep must be bool {list(weight.shape)}, found {keep.dtype} {list(keep.shape)}")
        counts = keep.unflatten(1, (-1, m)).sum(2)
        for row, group in (counts != n).nonzero()[:1].tolist():
            raise ShapeError(f"keep has {int(counts[row, group])} of inputs {group * m}..{group * m + m - 1} in row {row}, is "
                             f"no {n}:{m}")
        return cls.of(weight[keep].view(len(weight), -1), pack(keep), bias, in_features=weight.shape[1], n=n, m=m)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, n: int = 2, m: int = 4) -> "Sparse24":
        """The closest such matrix to weight [out, in]: the n largest of every m, the first of equals. Raises NumericsError
        for NaN or infinity, UnsupportedError for a sharded weight."""
        check_dense(weight)
        check_counts(n=n, m=m)
        check_groups(weight.shape[1], n, m)
        require_finite(weight, "weight")
        return cls.from_mask(weight, largest_of_groups(weight.abs(), n, m), bias, n=n, m=m)

    def forward(self, x: Tensor) -> Tensor:
        return sparse24(x, self.values, self.mask, self.bias, kept=self.n, group=self.m)

    def keep(self) -> Tensor:
        """Which weights are kept.   bool [out, in]"""
        return unpack(self.mask, self.in_features)

    def dense(self) -> Tensor:
        return expand(self.values, self.keep())

    def shape(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "n": self.n, "m": self.m,
                "bias": self.bias is not None}

    def check_indices(self) -> None:
        check_mask(self.mask, self.in_features, self.n, self.m)

    def macs(self) -> int:
        return self.values.numel()


def check_groups(in_features: int, n: int, m: int) -> None:
    """ShapeError where inputs do not divide into groups of m of which n are kept."""
    if n > m:
        raise ShapeError(f"n must be between 1 and m, which is {m}; found {n}")
    if in_features % m:
        below = in_features // m * m
        valid = f"{below} or {below + m}" if below else f"{m}"
        raise ShapeError(f"in_features must be a multiple of {m} for {n}:{m} ({valid}), found {in_features}")


def largest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, the first of equals.   scores [..., size] -> bool [..., size]"""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :count], True)


def largest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m neighbours, the first of equals.   scores [..., size] -> bool [..., size]"""
    return largest(scores.unflatten(-1, (scores.shape[-1] // m, m)), n).flatten(-2)


def turning(rows: int, size: int, count: int, device: torch.device | None = None) -> Tensor:
    """`count` neighbours of `size`, each row's behind those of the row before it.   bool [rows, size]"""
    first = torch.arange(rows, device=device)[:, None] * count
    return (torch.arange(size, device=device) - first) % size < count
