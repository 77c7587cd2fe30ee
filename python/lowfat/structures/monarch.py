"""A linear layer of b_in x b_out blocks of rank r each: r (b_out k + b_in n) numbers.   v [b_in, b_out r, p]   u [b_out, s, b_in r]

interleave: output block o owns the rows o, o + b_out, ... (Monarch, Dao et al. 2022); else a run of neighbours (block-wise low
rank, Gupta et al.). Sizes that the blocks do not divide are padded with zeros: p = ceil(k / b_in), s = ceil(n / b_out).
grouped: what is computed as output i of these blocks is output rows[i] of the layer.   rows [n] int32, a permutation"""
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import ArgumentError, DtypeError, IndexRangeError, ShapeError
from ..linalg import truncated_svd
from ..ops.monarch import monarch
from .structure import Structure, check_counts, check_dense


class Monarch(Structure):
    """y = x W^T + bias, W of b_in x b_out blocks of rank r.   x [..., in_features], y [..., out_features]

    blocks: one number for both, or (input blocks, output blocks). rank: of a block; by default the one at which a layer with
    as many blocks on both sides has max(in, out) / blocks of its weight's parameters, as published Monarch layers do.
    grouped: any rows may share an output block, as the buffer `rows` says; a new layer leaves each where it is.
    Raises ArgumentError or ShapeError for blocks or ranks that the sizes do not have."""

    def __init__(self, in_features: int, out_features: int, blocks: int | tuple[int, int] = 4, rank: int | None = None,
                 interleave: bool = True, bias: bool = True, grouped: bool = False, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None):
        super().__init__()
        self.blocks = check_blocks(in_features, out_features, blocks)
        self.in_features, self.out_features, self.interleave = in_features, out_features, interleave
        (b_in, b_out), (p, s) = self.blocks, block_size(in_features, out_features, self.blocks)
        self.rank = check_rank(max(1, min(p, s) // max(b_in, b_out)) if rank is None else rank, p, s)
        self.v = nn.Parameter(torch.empty(b_in, b_out * self.rank, p, device=device, dtype=dtype))
        self.u = nn.Parameter(torch.empty(b_out, s, b_in * self.rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("rows", torch.arange(out_features, dtype=torch.int32, device=device) if grouped else None)
        self._inverse: tuple[Tensor, int, Tensor] | None = None  # of rows: what they were, their version, the answer
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each factor uniform within 1 / sqrt(its own inputs), as two `nn.Linear` in a row start."""
        nn.init.uniform_(self.v, -1 / sqrt(self.v.shape[2]), 1 / sqrt(self.v.shape[2]))
        for last in (self.u, self.bias):
            if last is not None:
                nn.init.uniform_(last, -1 / sqrt(self.u.shape[2]), 1 / sqrt(self.u.shape[2]))

    @classmethod
    def of(cls, v: Tensor, u: Tensor, bias: Tensor | None = None, *, in_features: int, out_features: int,
           interleave: bool = True, rows: Tensor | None = None) -> "Monarch":
        """The layer that holds these factors, contiguous copies of them.   v [b_in, b_out r, p]   u [b_out, s, b_in r]

        rows [out_features]: of the outputs, in the order of the blocks; IndexRangeError unless it is a permutation."""
        blocks, rank = (v.shape[0], u.shape[0]), v.shape[1] // u.shape[0]
        layer = cls(in_features, out_features, blocks, rank, interleave, bias is not None, rows is not None, device="meta",
                    dtype=v.dtype)
        if rows is not None:
            check_rows(rows, out_features)
            layer.rows = rows.to(v.device, torch.int32, copy=True)
        for name, tensor in (("v", v), ("u", u), ("bias", bias)):
            if tensor is not None:
                if tensor.shape != getattr(layer, name).shape:
                    raise ShapeError(f"{name} is {list(tensor.shape)}, must be {list(getattr(layer, name).shape)}")
                layer.register_parameter(name, nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)))
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, blocks: int | tuple[int, int] = 4, rank: int,
                   interleave: bool = True, rows: Tensor | None = None) -> "Monarch":
        """The closest such matrix to weight [n, k] (Dao et al. 2022, theorem 1, for any rank: blocks are disjoint, so each is
        replaced by its truncated SVD). rows [n]: the blocks are those of weight[rows]. Raises NumericsError for NaN or
        infinity, IndexRangeError for rows that are no permutation, UnsupportedError for a sharded weight."""
        check_dense(weight)
        n, k = weight.shape
        blocks = check_blocks(k, n, blocks)
        check_rank(rank, *block_size(k, n, blocks))
        if rows is not None:
            check_rows(rows, n)
        weight = weight if rows is None else weight[rows.long()]
        factors = [[_balanced_svd(block, rank) for block in row] for row in to_blocks(weight, blocks, interleave)]
        v, u = from_factors(*(torch.stack([torch.stack([pair[i] for pair in row]) for row in factors]) for i in (0, 1)))
        return cls.of(v.to(weight.dtype), u.to(weight.dtype), bias, in_features=k, out_features=n, interleave=interleave,
                      rows=rows)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.bias is None or self.rows is None else self.bias.index_select(0, self.rows)
        y = monarch(x, self.v, self.u, bias, out_features=self.out_features, interleave=self.interleave)
        return self._sorted(y, -1)

    def dense(self) -> Tensor:
        (b_in, b_out), r = self.blocks, self.rank
        v, u = self.v.view(b_in, r, b_out, -1), self.u.view(b_out, -1, b_in, r)
        weight = from_blocks(torch.einsum("osir,irop->oisp", u, v), self.out_features, self.in_features, self.interleave)
        return self._sorted(weight, 0)

    def _sorted(self, computed: Tensor, dim: int) -> Tensor:
        """What the blocks compute, in the order of the outputs: the inverse permutation along dim."""
        return computed if self.rows is None else computed.index_select(dim, self._inverse_rows())

    def _inverse_rows(self) -> Tensor:
        """Kept until rows is another tensor or has been written to: a sort takes 20 times as long as the gather."""
        rows = self.rows
        if torch.compiler.is_compiling() or rows.is_meta or rows.is_inference():  # the last have no version
            return rows.argsort()
        if self._inverse is None or self._inverse[0] is not rows or self._inverse[1] != rows._version:
            self._inverse = rows, rows._version, rows.argsort()
        return self._inverse[2]

    def shape(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "blocks": list(self.blocks),
                "rank": self.rank, "interleave": self.interleave, "bias": self.bias is not None,
                "grouped": self.rows is not None}

    def check_indices(self) -> None:
        if self.rows is not None:
            check_rows(self.rows, self.out_features)

    def macs(self) -> int:
        return self.v.numel() + self.u.numel()


def _balanced_svd(block: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(v [r, p], u [s, r]) in fp64, each singular value split evenly"""
    u, s, vt, _ = truncated_svd(block, rank)
    root = s.sqrt()
    return vt * root[:, None], u * root


# --- blocks of a dense weight ---

def to_blocks(weight: Tensor, blocks: tuple[int, int], interleave: bool) -> Tensor:
    """weight [n, k], padded with zeros, as its blocks [b_out, b_in, s, p]"""
    (n, k), (b_in, b_out) = weight.shape, blocks
    p, s = block_size(k, n, blocks)
    padded = pad(weight, (0, b_in * p - k, 0, b_out * s - n))
    if interleave:
        return padded.view(s, b_out, b_in, p).permute(1, 2, 0, 3)
    return padded.view(b_out, s, b_in, p).transpose(1, 2)


def from_blocks(weight: Tensor, n: int, k: int, interleave: bool) -> Tensor:
    """The inverse: [b_out, b_in, s, p] -> [n, k]"""
    b_out, b_in, s, p = weight.shape
    rows = weight.permute(2, 0, 1, 3) if interleave else weight.transpose(1, 2)
    return rows.reshape(b_out * s, b_in * p)[:n, :k]


def from_factors(v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of each block, v [b_out, b_in, r, p] and u [b_out, b_in, s, r], as a Monarch layer stores them."""
    b_out, b_in, r, p = v.shape
    return (v.permute(1, 2, 0, 3).reshape(b_in, r * b_out, p),
            u.transpose(1, 2).reshape(b_out, u.shape[2], b_in * r))


def block_size(in_features: int, out_features: int, blocks: tuple[int, int]) -> tuple[int, int]:
    """(p, s): inputs and outputs of a block, those of the last one partly padding."""
    return ceil(in_features / blocks[0]), ceil(out_features / blocks[1])


def check_blocks(in_features: int, out_features: int, blocks: int | tuple[int, int]) -> tuple[int, int]:
    """(b_in, b_out); ArgumentError or ShapeError where there is no such division."""
    check_counts(in_features=in_features, out_features=out_features)
    pair = pair_of(blocks)
    for what, count, size in zip(("inputs", "outputs"), pair, (in_features, out_features)):
        if not 1 <= count <= size:
            raise ShapeError(f"blocks must be between 1 and {size} for {size} {what}; found {count}")
    return pair


def pair_of(blocks: int | tuple[int, int]) -> tuple[int, int]:
    """(b_in, b_out), whatever the sizes; ArgumentError for what is no number of blocks."""
    pair = (blocks, blocks) if type(blocks) is int else blocks
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(type(count) is int for count in pair):
        raise ArgumentError(f"blocks must be a whole number or two, for inputs and outputs; found {blocks!r}")
    return tuple(pair)


def check_rank(rank: int, p: int, s: int) -> int:
    if type(rank) is not int:
        raise ArgumentError(f"rank must be a whole number, found {rank!r}")
    if not 1 <= rank <= min(p, s):
        raise ShapeError(f"rank must be between 1 and {min(p, s)}, the smaller side of a block of {s} x {p}; found {rank}")
    return rank


def check_rows(rows: Tensor, n: int) -> None:
    """IndexRangeError unless rows [n] holds each of 0 .. n - 1 once; ShapeError or DtypeError for other tensors."""
    if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"rows must be an int32 or int64 tensor, found {getattr(rows, 'dtype', type(rows).__name__)}")
    if rows.shape != (n,):
        raise ShapeError(f"rows {list(rows.shape)} must be [{n}], one for each output")
    outside, ordered = rows[(rows < 0) | (rows >= n)], rows.sort().values
    twice = ordered[1:][ordered.diff() == 0]
    for found, what in ((outside, "outside of it"), (twice, "twice")):
        if len(found):
            raise IndexRangeError(f"rows must be a permutation of 0 .. {n - 1}; found {int(found[0])} {what}")
