"""A linear layer whose weight is low rank plus sparse, scale u v + S, the entries of S anywhere (SLTrain, 2406.02214).

v [r, in]   u [out, r]   values [nnz], row by row, and where they are: starts [out + 1] int32, columns [nnz] int16 or int32
(see ops/low_rank_sparse.py). Where they are is drawn from a seed, or chosen (OATS, 2409.13652), and never changes."""
import hashlib
import sys
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, DeviceError, DtypeError, IndexRangeError, ShapeError
from ..linalg import require_finite, truncated_svd
from ..ops.low_rank_sparse import MAX_ENTRIES, check_support, index_dtype, low_rank_sparse, places, weight_of
from .sparse24 import largest
from .structure import Structure, check_counts, check_dense

_ROUNDS = 8  # of the Feistel network
_MAX_SIZE = 2**62  # entries of the weight: two halves of 31 bits


class LowRankSparse(Structure):
    """y = x (scale u v + S)^T + bias, S with floor(density in out) entries.   x [..., in_features], y [..., out_features]

    alpha: the scale times the rank; None for a scale of 1. seed: what the places of S are drawn from, uniformly and without
    replacement, the same on every device; None where they were chosen (of, from_support, from_dense), and a new layer has
    them evenly spread. Rank, density or both may be 0. Raises ArgumentError or ShapeError for sizes that do not go
    together."""

    def __init__(self, in_features: int, out_features: int, rank: int, density: float, alpha: float | None = None,
                 seed: int | None = 0, bias: bool = True, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None):
        super().__init__()
        check_sizes(in_features, out_features, rank, alpha)
        count = entries_of(density, in_features * out_features)
        if seed is not None and (type(seed) is not int or seed < 0):
            raise ArgumentError(f"seed must be a whole number from 0, or None for chosen places; found {seed!r}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.density, self.alpha, self.seed, self.scale = density, alpha, seed, scale_of(rank, alpha)
        self.v = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.u = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.values = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        device = self.values.device
        self.register_buffer("starts", torch.empty(out_features + 1, device=device, dtype=torch.int32))
        self.register_buffer("columns", torch.empty(count, device=device, dtype=index_dtype(in_features)))
        if seed is None and not self.columns.is_meta:
            self._place(torch.arange(count, device="cpu") * (in_features * out_features) // max(count, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As SLTrain starts: u zero, all else uniform within 1 / sqrt(in), which for v is Kaiming's with a = sqrt 5. Places
        are drawn again from the seed, which changes them only after to_empty(); chosen ones stay."""
        bound = 1 / sqrt(self.in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        nn.init.zeros_(self.u)
        if self.seed is not None and not self.columns.is_meta:
            self._place(self._drawn())

    @classmethod
    def of(cls, v: Tensor, u: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None = None, *,
           alpha: float | None = None) -> "LowRankSparse":
        """The layer that holds these, contiguous copies of them.   v [r, in]   u [out, r]   values [nnz]

        starts [out + 1] int32, columns [nnz] int16, int32 above 32768 inputs. Raises ShapeError, DtypeError and DeviceError
        for tensors that do not fit each other, IndexRangeError for a support whose rows do not follow each other or do not
        rise strictly within the inputs."""
        if v.dim() != 2 or u.dim() != 2 or values.dim() != 1:
            raise ShapeError(f"v is {list(v.shape)}, u {list(u.shape)} and values {list(values.shape)}, must be [r, in], "
                             f"[out, r] and [nnz]")
        check_sizes(v.shape[1], u.shape[0], v.shape[0], alpha)
        size = v.shape[1] * u.shape[0]
        if len(values) > size:
            raise ShapeError(f"values is {list(values.shape)}, the weight has {size} entries")
        layer = cls(v.shape[1], u.shape[0], v.shape[0], len(values) / size, alpha, None, bias is not None, device="meta",
                    dtype=v.dtype)
        tensors = {"v": v, "u": u, "values": values, "starts": starts, "columns": columns, "bias": bias}
        for name, tensor in tensors.items():
            if tensor is not None and tensor.shape != getattr(layer, name).shape:
                raise ShapeError(f"{name} is {list(tensor.shape)}, must be {list(getattr(layer, name).shape)}")
        for name in ("starts", "columns"):
            if tensors[name].dtype != getattr(layer, name).dtype:
                raise DtypeError(f"{name} has {tensors[name].dtype}, must be {getattr(layer, name).dtype}")
        for name in ("u", "values", "bias"):
            if tensors[name] is not None and tensors[name].dtype != v.dtype:
                raise DtypeError(f"{name} has {tensors[name].dtype}, v has {v.dtype}; must be the same")
            if tensors[name] is not None and tensors[name].device != v.device:
                raise DeviceError(f"{name} is on {tensors[name].device}, v on {v.device}; must be the same")
        check_support(starts, columns, layer.in_features)
        for name, tensor in tensors.items():
            if name in ("starts", "columns"):
                setattr(layer, name, tensor.detach().to(v.device, copy=True, memory_format=torch.contiguous_format))
            elif tensor is not None:
                layer.register_parameter(name, nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)))
        return layer

    @classmethod
    @torch.no_grad()
    def from_support(cls, weight: Tensor, keep: Tensor, bias: Tensor | None = None, *, rank: int,
                     alpha: float | None = None) -> "LowRankSparse":
        """The closest matrix of this rank to weight [out, in], and where keep [out, in] is true all that it leaves, zeros
        included. In the weight's dtype. Raises NumericsError for NaN or infinity, UnsupportedError for a sharded weight."""
        check_dense(weight)
        if keep.dtype != torch.bool or keep.shape != weight.shape:
            raise ShapeError(f"keep must be bool {list(weight.shape)}, found {keep.dtype} {list(keep.shape)}")
        v, u, rest = _closest(weight, rank, alpha)
        return cls.of(v, u, rest[keep].to(weight.dtype), *stored_support(keep), bias, alpha=alpha)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, rank: int, density: float,
                   alpha: float | None = None) -> "LowRankSparse":
        """The closest matrix of this rank to weight [out, in], and the largest entries of what it leaves, the first of
        equals. In the weight's dtype. Raises NumericsError for NaN or infinity, UnsupportedError for a sharded weight."""
        check_dense(weight)
        count = entries_of(density, weight.numel())
        v, u, rest = _closest(weight, rank, alpha)
        keep = largest(rest.abs().flatten(), count).view_as(rest)
        return cls.of(v, u, rest[keep].to(weight.dtype), *stored_support(keep), bias, alpha=alpha)

    def forward(self, x: Tensor) -> Tensor:
        return low_rank_sparse(x, self.v, self.u, self.values, self.starts, self.columns, self.bias, scale=self.scale)

    def keep(self) -> Tensor:
        """Where S has its entries.   bool [out, in]"""
        place, is_inside = places(self.starts, self.columns, self.out_features, self.in_features)
        found = torch.zeros(self.out_features * self.in_features, dtype=torch.bool, device=place.device)
        return found.index_fill_(0, place[is_inside], True).view(self.out_features, self.in_features)

    def dense(self) -> Tensor:
        return weight_of(self.v, self.u, self.values, self.starts, self.columns, self.scale)

    def shape(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank,
                "density": self.density, "alpha": self.alpha, "seed": self.seed, "bias": self.bias is not None}

    def check_indices(self) -> None:
        check_support(self.starts, self.columns, self.in_features)
        if self.seed is None or self.columns.is_meta:
            return
        found, _ = places(self.starts.cpu(), self.columns.cpu(), self.out_features, self.in_features)
        due = self._drawn()
        for entry in (found != due).nonzero().flatten()[:1].tolist():
            row = min(int(found[entry]), int(due[entry])) // self.in_features
            raise IndexRangeError(f"starts and columns are not what seed {self.seed} draws: row {row} differs")

    def macs(self) -> int:
        return self.rank * (self.in_features + self.out_features) + self.values.numel()

    def _drawn(self) -> Tensor:
        return drawn(self.seed, self.values.numel(), self.in_features * self.out_features)

    def _place(self, flat: Tensor) -> None:
        starts, columns = in_rows(flat, self.out_features, self.in_features)
        self.starts.copy_(starts)
        self.columns.copy_(columns)


def drawn(seed: int, count: int, size: int) -> Tensor:
    """`count` different numbers out of 0..size - 1, uniformly, in ascending order.   int64 [count], on the CPU

    What a permutation that the seed picks makes of 0, 1, ..., count - 1: nothing as large as the weight is held, and no
    number comes twice. It is a Feistel network on as many bits as the numbers have, its round functions tables of SHAKE-256
    bytes; what it moves out of the range goes through it again. Only whole numbers, and no generator of torch's: a seed
    means the same places everywhere and in every version."""
    bits = (size - 1).bit_length()
    low, high = bits // 2, bits - bits // 2
    tables = [_table(f"lowfat {seed} {i}", *((low, high) if i % 2 == 0 else (high, low))) for i in range(_ROUNDS)]

    def moved(numbers: Tensor) -> Tensor:
        left, right = numbers >> low, numbers & ((1 << low) - 1)
        for i, table in enumerate(tables):
            if i % 2 == 0:
                left = left ^ table[right]
            else:
                right = right ^ table[left]
        return left << low | right

    found = moved(torch.arange(count, device="cpu"))
    while len(outside := (found >= size).nonzero().flatten()):
        found[outside] = moved(found[outside])
    return found.sort().values


def _table(key: str, index_bits: int, value_bits: int) -> Tensor:
    """int64 [2^index_bits] of numbers below 2^value_bits."""
    taken = hashlib.shake_256(key.encode()).digest(4 << index_bits)
    return torch.frombuffer(bytearray(taken), dtype=torch.int32).long() & ((1 << value_bits) - 1)


def in_rows(flat: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """starts int32 [n + 1] and columns [nnz] of ascending places in a matrix [n, k], flat."""
    ends = torch.arange(n + 1, dtype=torch.int64, device=flat.device) * k
    return torch.searchsorted(flat, ends).to(torch.int32), (flat % k).to(index_dtype(k))


def stored_support(keep: Tensor) -> tuple[Tensor, Tensor]:
    """starts and columns of the entries of a matrix that are true.   keep bool [n, k]"""
    return in_rows(keep.flatten().nonzero().flatten(), *keep.shape)


def share_of(density: float, size: int) -> int:
    """floor(density size), where 0.29 of 100 are 29: neither the density nor a product is exact, by 2^-53 of itself each."""
    return min(int(density * (1 + 2**-50) * size), size)


def entries_of(density: float, size: int) -> int:
    """How many entries S has of a weight of that size; ArgumentError or ShapeError where it cannot."""
    if not isinstance(density, (int, float)) or isinstance(density, bool) or not 0 <= density <= 1:
        raise ArgumentError(f"density must be at least 0 and at most 1; found {density!r}")
    count = share_of(density, size)
    if count > MAX_ENTRIES:
        raise ShapeError(f"density {density} of {size} entries are {count}, must be at most {MAX_ENTRIES}")
    return count


def check_sizes(in_features: int, out_features: int, rank: int, alpha: float | None) -> None:
    check_counts(in_features=in_features, out_features=out_features)
    check_counts(0, rank=rank)
    if in_features * out_features > _MAX_SIZE:
        raise ShapeError(f"in_features times out_features must be at most {_MAX_SIZE}, found {in_features * out_features}")
    if rank > min(in_features, out_features):
        raise ShapeError(f"rank must be between 0 and {min(in_features, out_features)} for {in_features} to "
                         f"{out_features} features, found {rank}")
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if alpha is not None and not (is_number and 0 < alpha <= sys.float_info.max):  # compares with any whole number, too
        raise ArgumentError(f"alpha must be a number above 0, or None for a scale of 1; found {alpha!r}")


def scale_of(rank: int, alpha: float | None) -> float:
    return 1.0 if alpha is None or rank == 0 else alpha / rank


def _closest(weight: Tensor, rank: int, alpha: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """(v, u, what they leave of the weight [n, k], in fp64); each singular value is split evenly between the factors."""
    n, k = weight.shape
    check_sizes(k, n, rank, alpha)
    require_finite(weight, "weight")
    if rank == 0:
        return weight.new_empty(0, k), weight.new_empty(n, 0), weight.double()
    scale = scale_of(rank, alpha)
    u, s, vt, _ = truncated_svd(weight, rank)
    root = (s / scale).sqrt()
    v, u = (root[:, None] * vt).to(weight.dtype), (u * root).to(weight.dtype)
    return v, u, weight.double() - scale * (u.double() @ v.double())
