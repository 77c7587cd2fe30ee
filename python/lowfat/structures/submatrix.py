"""A linear layer whose weight is low-rank on some rows and columns, and zero on the others, which store nothing.

W[outputs][:, inputs] = u v   v [r, inputs kept]   u [outputs kept, r]   of indices in rising order"""
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DtypeError, IndexRangeError, ShapeError
from ..linalg import truncated_svd
from ..ops import low_rank
from .structure import Structure, check_counts, check_dense


class Submatrix(Structure):
    """y[outputs] = (x[inputs] v^T) u^T, y = 0 elsewhere, + bias.   x [..., in_features], y [..., out_features]

    inputs, outputs: how many are kept; a new layer keeps the first. Raises ArgumentError or ShapeError for sizes that are no
    whole numbers or do not fit into each other."""

    def __init__(self, in_features: int, out_features: int, rank: int, inputs: int, outputs: int, bias: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        check_counts(in_features=in_features, out_features=out_features, rank=rank, inputs=inputs, outputs=outputs)
        for name, count, most in (("inputs", inputs, in_features), ("outputs", outputs, out_features),
                                  ("rank", rank, min(inputs, outputs))):
            if count > most:
                raise ShapeError(f"{name} must be at most {most}, found {count}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.v = nn.Parameter(torch.empty(rank, inputs, device=device, dtype=dtype))
        self.u = nn.Parameter(torch.empty(outputs, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("inputs", torch.arange(inputs, dtype=torch.int32, device=device))
        self.register_buffer("outputs", torch.arange(outputs, dtype=torch.int32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As a LowRank of what is kept starts. The indices stay."""
        nn.init.uniform_(self.v, -1 / sqrt(self.v.shape[1]), 1 / sqrt(self.v.shape[1]))
        for last in (self.u, self.bias):
            if last is not None:
                nn.init.uniform_(last, -1 / sqrt(self.rank), 1 / sqrt(self.rank))

    @classmethod
    def of(cls, v: Tensor, u: Tensor, inputs: Tensor, outputs: Tensor, bias: Tensor | None = None, *, in_features: int,
           out_features: int) -> "Submatrix":
        """The layer that holds these, contiguous copies of them. Raises IndexRangeError for indices that it cannot use.
        v [r, k']   u [n', r]   inputs [k'] int32   outputs [n'] int32   bias [n]"""
        layer = cls(in_features, out_features, len(v), len(inputs), len(outputs), bias is not None, device="meta",
                    dtype=v.dtype)
        for name, tensor in (("v", v), ("u", u), ("bias", bias), ("inputs", inputs), ("outputs", outputs)):
            if tensor is None:
                continue
            if tensor.shape != (wanted := getattr(layer, name)).shape:
                raise ShapeError(f"{name} is {list(tensor.shape)}, must be {list(wanted.shape)}")
            if tensor.dtype != wanted.dtype:
                raise DtypeError(f"{name} has {tensor.dtype}, must have {wanted.dtype}")
            copied = tensor.detach().clone(memory_format=torch.contiguous_format)
            setattr(layer, name, nn.Parameter(copied) if name in layer._parameters else copied)
        layer.check_indices()
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, rank: int) -> "Submatrix":
        """The closest matrix of the rank to weight [n, k], without its empty rows and columns."""
        check_dense(weight)
        inputs, outputs = used(weight)
        u, s, vt, _ = truncated_svd(weight[outputs][:, inputs], rank)
        root = s.sqrt()
        return cls.of((root[:, None] * vt).to(weight.dtype), (u * root).to(weight.dtype), inputs.int(), outputs.int(), bias,
                      in_features=weight.shape[1], out_features=weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        y = low_rank(x.index_select(-1, self.inputs), self.v, self.u)
        y = y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.outputs.long(), y)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # another one only under autocast, as in linear

    def dense(self) -> Tensor:
        whole = self.v.new_zeros(self.out_features, self.in_features)
        return whole.index_put((self.outputs.long()[:, None], self.inputs.long()), self.u @ self.v)

    def shape(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank,
                "inputs": self.v.shape[1], "outputs": self.u.shape[0], "bias": self.bias is not None}

    def check_indices(self) -> None:
        for name, indices, size in (("inputs", self.inputs, self.in_features), ("outputs", self.outputs, self.out_features)):
            if indices.is_meta:
                continue
            if int(indices[0]) < 0 or int(indices[-1]) >= size or not bool((indices[1:] > indices[:-1]).all()):
                raise IndexRangeError(f"{name} must rise from 0 or more to less than {size}, each once")

    def macs(self) -> int:
        return self.v.numel() + self.u.numel()


def used(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the columns and of the rows that are not all zero; of a matrix without any the first.   weight [n, k]"""
    there = weight != 0
    inputs, outputs = there.any(0).nonzero()[:, 0], there.any(1).nonzero()[:, 0]
    return (inputs, outputs) if len(inputs) else (inputs.new_zeros(1), outputs.new_zeros(1))
