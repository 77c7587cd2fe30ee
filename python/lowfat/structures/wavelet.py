"""An adapter between the subbands of a wavelet transform of the features, on a frozen layer (WaRA, 2506.24092).

v [r, columns]   gain [pairs, r], where there is one   u [rows, r]   (ops/wavelet.py says which columns, rows and pairs)
base_layer: a linear layer or a structure, its tensors named base_layer.weight and so on. Nothing of it is trained."""
from collections.abc import Callable
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, DtypeError, LowfatError, ShapeError, UnsupportedError
from ..linalg import truncated_svd
from ..ops.dwt import FILTERS, analyze, band_sizes, check_transform, synthesize
from ..ops.low_rank import DTYPES
from ..ops.wavelet import Pair, check_subbands, layout, wavelet
from .low_rank import LowRank, LowRankGroup
from .structure import Structure, check_counts, dense_weight, is_conv1d, sizes
from .sum import PARTS, Sum

_BLOCK = 1 << 22  # elements of the weight that are merged at a time: 32 MiB in fp64


class Wavelet(Structure):
    """y = base_layer(x) + (alpha / rank) W^T C W x, where W are wavelet transforms.   x [..., in], y [..., out]

    subbands: `all` (every subband to every other: 2 r (in + out) parameters and rank 4 r at one level), `diag` (each to its
    own: r (in + out) and 2 r), `LL` (the coarse one: half of that and r), `shared+gain` (as `all`, with factors that differ
    by gains alone; with haar and gains that stay as they start this is one low-rank matrix for even features and again for
    odd ones: no wavelet is left). levels: the transform again of its coarse half. A new adapter adds zero.
    tiny: u and v are the leading singular vectors of the same subbands of the base layer's weight and stay; of each pair of
    subbands `rank` gains are trained.

    base_layer: nn.Linear, transformers' Conv1D or a structure, which the adapter takes over and freezes; or what shape()
    says of one. device, dtype: of the adapter, by default those of the base layer.
    Raises ArgumentError or ShapeError, with what there is, for options that the sizes do not have, UnsupportedError for
    another layer."""

    def __init__(self, base_layer: nn.Module | dict[str, Any], rank: int = 8, alpha: float = 16.0, filter: str = "haar",
                 levels: int = 1, subbands: str = "diag", tiny: bool = False, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None):
        super().__init__()
        if isinstance(base_layer, dict):
            base_layer = _built(base_layer, device, dtype)
        check_base(base_layer)
        k, n = sizes(base_layer)
        check_options(k, n, rank, alpha, filter, levels, subbands, tiny)
        self.in_features, self.out_features, self.rank, self.alpha = k, n, rank, alpha
        self.filter, self.levels, self.subbands, self.tiny = filter, levels, subbands, tiny
        self.base_layer = base_layer
        pairs, like = self._pairs(), next(base_layer.parameters())
        place = {"device": like.device if device is None else device, "dtype": like.dtype if dtype is None else dtype}
        v = torch.empty(rank, pairs[-1].columns.stop, **place)
        u = torch.empty(pairs[-1].rows.stop, rank, **place)
        for name, factor in (("v", v), ("u", u)):
            self.register_buffer(name, factor) if tiny else self.register_parameter(name, nn.Parameter(factor))
        has_gain = tiny or subbands == "shared+gain"
        self.gain = nn.Parameter(torch.empty(len(pairs), rank, **place)) if has_gain else None
        self.merged = False
        self.register_buffer("kept", None, persistent=False)  # the base layer's weight while merged, if it is to come back
        self._whole: tuple[Tensor, ...] = ()  # the v of a LowRank base layer while merged
        self.reset_parameters()
        base_layer.requires_grad_(False)  # not before what may fail

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """To an adapter that adds zero: v as `nn.Linear` starts with the features of its subband, u zero, gains one from low
        to low and high to high and zero across. With tiny, the factors from the base layer, and gains of zero."""
        if self.tiny:
            self.gain.zero_()
            self._take_singular_vectors()
            return
        for pair in self._pairs():
            self.v[:, pair.columns].uniform_(-1 / sqrt(_width(pair.columns)), 1 / sqrt(_width(pair.columns)))
        self.u.zero_()
        if self.gain is not None:
            for row, pair in zip(self.gain, self._pairs()):
                row.fill_(pair.name in ("LL", "HH"))

    def _take_singular_vectors(self) -> None:
        weight = dense_weight(self.base_layer)
        if weight.is_meta or self.v.is_meta:
            return
        for pair in self._pairs():
            block = subband(weight.double(), pair, self.filter)
            u, _, vt, _ = truncated_svd(block, self.rank)
            self.v[:, pair.columns], self.u[pair.rows] = vt.to(self.v.dtype), u.to(self.u.dtype)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, **options: Any) -> "Wavelet":
        """A new adapter on a copy of weight [out, in] as `nn.Linear`."""
        base = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                base.register_parameter(name, nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)))
        return cls(base, **options)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.merged:
            return y
        v, u = self.v, self.u
        if self.tiny:  # buffers, which stay as they are where training makes parameters fp32
            v, u = v.to(self.gain.dtype), u.to(self.gain.dtype)
        return y + wavelet(x, v, u, self.gain, out_features=self.out_features, filter=self.filter, levels=self.levels,
                           subbands=self.subbands, scale=self.scale)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """(v [pairs r, in], u [out, pairs r]) in fp64, of which the adapter's weight is (alpha / rank) u v."""
        return plain_factors(self.v, self.u, self.gain, self._pairs(), self.in_features, self.out_features, self.filter)

    def delta(self) -> Tensor:
        """The adapter's weight in fp64.   [out, in]"""
        v, u = self.factors()
        return self.scale * (u @ v)

    @torch.no_grad()
    def dense(self) -> Tensor:
        weight = dense_weight(self.base_layer).clone()
        if not self.merged:
            self._add_to(weight)
        return weight

    @torch.no_grad()
    def merge(self, keep_base: bool = False) -> None:
        """Adds the adapter to the base layer's weight, with one rounding, so that it costs nothing any more.

        A LowRank base layer takes it as additional rank, rounded to its dtype; a v that it shared with other layers is its own
        then, until unmerge(). keep_base: a copy of the weight stays, and
        unmerge() gives back its bits. Raises ArgumentError if that has been done, UnsupportedError for other structures,
        or where a LowRank would come to more rank than it has features."""
        if self.merged:
            raise ArgumentError("the adapter is merged already; unmerge() first")
        self.check_mergeable()
        if isinstance(self.base_layer, LowRank):
            dtype = self.base_layer.v.dtype
            v, u = self.factors()
            self._whole = (self.base_layer.v,)  # in a tuple: no parameter of this layer
            self.base_layer = self.base_layer.merged(v.to(dtype), (self.scale * u).to(dtype)).requires_grad_(False)
        else:
            weight = dense_weight(self.base_layer)
            self.kept = weight.clone() if keep_base else None
            self._add_to(weight)
        self.merged = True

    def check_mergeable(self) -> None:
        """UnsupportedError for a structure whose factors cannot take any other weight, or not one of this rank."""
        base = self.base_layer
        if isinstance(base, Structure) and not isinstance(base, LowRank):
            raise UnsupportedError(f"base_layer is a {type(base).__name__}, which cannot hold the sum; only Linear, Conv1D "
                                   "and LowRank can be merged into")
        most, more = min(self.in_features, self.out_features), self.rank * len(self._pairs())
        if isinstance(base, LowRank) and base.rank + more > most:
            raise UnsupportedError(f"base_layer is a LowRank of rank {base.rank}, to which merging would add {more}; it can "
                                   f"have at most {most}")

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes merge() back: with one rounding, or bit for bit where the weight was kept and of a LowRank base layer."""
        if not self.merged:
            raise ArgumentError("the adapter is not merged; merge() first")
        if isinstance(self.base_layer, LowRank):
            layer, rank = self.base_layer, self.base_layer.rank - self.rank * len(self._pairs())
            self.base_layer = LowRank.of(layer.v[:rank], layer.u[:, :rank], layer.bias).requires_grad_(False)
            if _same(self._whole[0], self.base_layer.v):  # other layers may hold it too
                self.base_layer.v = self._whole[0]
            self._whole = ()
        else:
            weight = dense_weight(self.base_layer)
            if self.kept is None:
                self._add_to(weight, -1)
            else:
                weight.copy_(self.kept)
        self.merged, self.kept = False, None

    def _add_to(self, weight: Tensor, sign: int = 1) -> None:
        """Rounds once; some rows at a time, as a large weight in fp64 needs four times its memory in bf16."""
        v, u = self.factors()
        count = max(1, _BLOCK // self.in_features)
        for rows, some in zip(weight.split(count), u.split(count)):
            rows.copy_(rows.double() + sign * self.scale * (some @ v))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._refuse_merged(prefix)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._refuse_merged(prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _refuse_merged(self, prefix: str) -> None:
        """A merged weight beside its adapter would be added to once more by whoever loads both."""
        if self.merged:
            raise UnsupportedError(f"{prefix.removesuffix('.') or 'the adapter'} is merged, and its tensors do not say so; "
                                   "unmerge() it first, or take the adapters out with lowfat.unadapt(model)")

    def shape(self) -> dict[str, Any]:
        return {"base_layer": _described(self.base_layer)} | self.options()

    def options(self) -> dict[str, Any]:
        """The constructor's arguments but for the base layer, as plain JSON."""
        return {"rank": self.rank, "alpha": self.alpha, "filter": self.filter, "levels": self.levels,
                "subbands": self.subbands, "tiny": self.tiny}

    def check_indices(self) -> None:
        if isinstance(self.base_layer, Structure):
            self.base_layer.check_indices()

    def macs(self) -> int:
        """A transform takes as many for each number that it makes as its filter has taps."""
        base = self.base_layer
        macs = base.macs() if isinstance(base, Structure) else base.weight.numel()
        if self.merged:
            return macs
        made = sum(2 * size for side in (self.in_features, self.out_features) for size in band_sizes(side, self.levels))
        pairs = sum(_width(pair.columns) + _width(pair.rows) for pair in self._pairs())
        return macs + self.rank * pairs + made * len(FILTERS[self.filter])

    def _pairs(self) -> list[Pair]:
        return layout(self.subbands, self.levels, self.in_features, self.out_features)


def _same(left: Tensor, right: Tensor) -> bool:
    return (left.device, left.dtype, left.shape) == (right.device, right.dtype, right.shape) and torch.equal(left, right)


# --- base layers ---

def _conv1d(in_features: int, out_features: int, device=None, dtype=None) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    with torch.device(device or torch.get_default_device()):
        return Conv1D(out_features, in_features).to(dtype or torch.get_default_dtype())


BASES: dict[str, Callable[..., nn.Module]] = {"Linear": nn.Linear, "Conv1D": _conv1d} | PARTS | {"Sum": Sum}


def check_base(base_layer: nn.Module) -> None:
    """UnsupportedError for what no adapter can be put on; ArgumentError for what is no layer."""
    if not isinstance(base_layer, nn.Module):
        raise ArgumentError(f"base_layer must be a layer, found {base_layer!r}")
    if isinstance(base_layer, Wavelet):
        raise UnsupportedError("base_layer is a Wavelet already; merge the first adapter, or train that one")
    if type(base_layer) not in BASES.values() and not is_conv1d(base_layer):
        back = "; put its layers() back first" if isinstance(base_layer, LowRankGroup) else ""
        raise UnsupportedError(f"base_layer is a {type(base_layer).__name__}, must be one of {', '.join(BASES)}{back}")
    for name, tensor in base_layer.named_parameters():
        if hasattr(tensor, "full_tensor"):  # a shard must never pass for the matrix
            raise UnsupportedError(f"base_layer.{name} is sharded over processes; put the adapter on before that")
        if tensor.dtype not in DTYPES:
            raise DtypeError(f"base_layer.{name} has {tensor.dtype}, must be float64, float32, float16 or bfloat16")


def _described(base_layer: nn.Module) -> dict[str, Any]:
    if isinstance(base_layer, Structure):
        return {"structure": type(base_layer).__name__} | base_layer.shape()
    k, n = sizes(base_layer)
    found = {"structure": type(base_layer).__name__, "in_features": k, "out_features": n}
    return found if is_conv1d(base_layer) else found | {"bias": base_layer.bias is not None}


def _built(described: dict[str, Any], device, dtype) -> nn.Module:
    arguments = {name: value for name, value in described.items() if name != "structure"}
    if described.get("structure") not in list(BASES):  # a list compares where a dict would need a hash
        raise ArgumentError(f"base_layer must have a structure of {', '.join(BASES)}; found {described!r}")
    try:
        if described["structure"] in ("Linear", "Conv1D"):
            check_counts(**{name: size for name, size in arguments.items() if name != "bias"})
        return BASES[described["structure"]](**arguments, device=device, dtype=dtype)
    except LowfatError as error:
        raise type(error)(f"base_layer: {error}") from error
    except TypeError as error:  # an argument that it does not have, or lacks
        raise ArgumentError(f"base_layer: {error}") from error


# --- options ---

def check_options(k: int, n: int, rank: int = 8, alpha: float = 16.0, filter: str = "haar", levels: int = 1,
                  subbands: str = "diag", tiny: bool = False) -> None:
    """ArgumentError or ShapeError for an adapter that a layer of k to n features cannot have."""
    check_subbands(subbands)
    check_transform(filter, levels, k, n, op="wavelet")
    check_counts(rank=rank)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not isfinite(alpha):
        raise ArgumentError(f"alpha must be a finite number, found {alpha!r}")
    if not isinstance(tiny, bool):
        raise ArgumentError(f"tiny must be True or False, found {tiny!r}")
    if tiny and subbands == "shared+gain":
        raise ArgumentError("tiny has gains and factors of its own for each pair; subbands must be all, diag or LL")
    ranks = [min(_width(pair.columns), _width(pair.rows)) for pair in layout(subbands, levels, k, n)]
    most = min(ranks) if tiny else max(ranks)  # singular vectors are there for as many as the smallest subband has
    if rank > most:
        raise ShapeError(f"rank must be between 1 and {most} for {subbands} of {k} to {n} features and levels={levels}"
                         f"{' and tiny' if tiny else ''}, found {rank}")


# --- subbands ---

def subband(weight: Tensor, pair: Pair, filter: str) -> Tensor:
    """What of a weight [out, in] goes from one half of the inputs to one of the outputs.   [rows, columns] of the pair"""
    columns = analyze(weight, filter, pair.source[0] + 1)[pair.source[0]][pair.source[1]]
    return analyze(columns.mT, filter, pair.target[0] + 1)[pair.target[0]][pair.target[1]].mT


def plain_factors(v: Tensor, u: Tensor, gain: Tensor | None, pairs: list[Pair], k: int, n: int,
                  filter: str) -> tuple[Tensor, Tensor]:
    """(v [pairs r, k], u [n, pairs r]) in fp64: those of a low-rank matrix of features that is the adapter's."""
    v, u = v.double(), u.double()
    firsts = [v[:, pair.columns] for pair in pairs]
    if gain is not None:
        firsts = [row[:, None] * first for row, first in zip(gain.double(), firsts)]
    return (torch.cat([_back(first, pair.source, k, filter) for first, pair in zip(firsts, pairs)]),
            torch.cat([_back(u[pair.rows].mT, pair.target, n, filter) for pair in pairs]).mT)


def _back(half: Tensor, where: tuple[int, int], size: int, filter: str) -> Tensor:
    """The features [..., size] of which this is the one half that is not zero."""
    level, place = where
    bands = [(None, None)] * level + [(None, half) if place else (half, None)]
    return synthesize(bands, size, filter)


def _width(part: slice) -> int:
    return part.stop - part.start
