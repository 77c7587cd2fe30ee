"""A linear layer whose weight is the sum of those of other structures: low rank plus sparse, for one.

Every part is a structure without a bias; its tensors are named parts.0.v, parts.1.values and so on."""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, DeviceError, DtypeError, LowfatError, ShapeError
from .dictionary import Dictionary
from .low_rank import LowRank
from .low_rank_sparse import LowRankSparse
from .monarch import Monarch
from .quantized import Quantized
from .sparse24 import Sparse24
from .structure import Structure, check_counts, check_dense

PARTS = {c.__name__: c for c in (LowRank, Monarch, Sparse24, Dictionary, LowRankSparse, Quantized)}
OURS = ("in_features", "out_features", "bias")  # what all parts have in common


class Sum(Structure):
    """y = x (W1 + W2 + ...)^T + bias, the parts' results added in their order.   x [..., in_features], y [..., out_features]

    parts: for each its structure and the arguments of that but for sizes and bias, as
    [{"structure": "LowRank", "rank": 8}, {"structure": "Sparse24", "n": 2, "m": 4}]
    Raises ArgumentError for parts that are no such list, and what the parts raise, with their number."""

    def __init__(self, in_features: int, out_features: int, parts: Sequence[dict[str, Any]], bias: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        check_counts(in_features=in_features, out_features=out_features)
        check_parts(parts)
        self.in_features, self.out_features = in_features, out_features
        common = {"in_features": in_features, "out_features": out_features, "bias": False, "device": device, "dtype": dtype}
        self.parts = nn.ModuleList(_numbered(i, lambda: PARTS[part["structure"]](**_arguments(part), **common))
                                   for i, part in enumerate(parts))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._reset_bias()

    def reset_parameters(self) -> None:
        """Each part as it starts alone, the bias as that of `nn.Linear`."""
        for part in self.parts:
            part.reset_parameters()
        self._reset_bias()

    def _reset_bias(self) -> None:
        if self.bias is not None:
            nn.init.uniform_(self.bias, -self.in_features**-0.5, self.in_features**-0.5)

    @classmethod
    def of(cls, parts: Sequence[Structure], bias: Tensor | None = None) -> "Sum":
        """The sum of these layers themselves, which have no bias and are of one size, dtype and device."""
        if not parts:
            raise ArgumentError("a sum needs at least one part, found none")
        for i, part in enumerate(parts):
            if type(part).__name__ not in PARTS:
                raise ArgumentError(f"part {i} is a {type(part).__name__}, must be one of {', '.join(PARTS)}")
            if part.bias is not None:
                raise ArgumentError(f"part {i} has a bias; give it to the sum")
            for name in ("in_features", "out_features"):
                if getattr(part, name) != getattr(parts[0], name):
                    raise ShapeError(f"part {i} has {name} {getattr(part, name)}, part 0 has {getattr(parts[0], name)}")
            found, first = next(part.parameters()), next(parts[0].parameters())
            if found.dtype != first.dtype:
                raise DtypeError(f"part {i} has {found.dtype}, part 0 has {first.dtype}")
            if found.device != first.device:
                raise DeviceError(f"part {i} is on {found.device}, part 0 is on {first.device}")
        if bias is not None and bias.shape != (parts[0].out_features,):
            raise ShapeError(f"bias is {list(bias.shape)}, must be [{parts[0].out_features}]")
        if bias is not None and bias.dtype != first.dtype:
            raise DtypeError(f"bias has {bias.dtype}, the parts have {first.dtype}")
        if bias is not None and bias.device != first.device:
            raise DeviceError(f"bias is on {bias.device}, the parts are on {first.device}")
        layer = cls(parts[0].in_features, parts[0].out_features, [_described(part) for part in parts], bias is not None,
                    device="meta")
        layer.parts = nn.ModuleList(parts)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(memory_format=torch.contiguous_format))
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, parts: Sequence[dict[str, Any]]) -> "Sum":
        """Each part from what those before it leave of weight [out, in], by its own from_dense."""
        check_dense(weight)
        check_parts(parts)
        made, rest = [], weight
        for i, part in enumerate(parts):
            made.append(_numbered(i, lambda: PARTS[part["structure"]].from_dense(rest, **_arguments(part))))
            rest = rest - made[-1].dense()
        return cls.of(made, bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.parts[0](x)
        for part in self.parts[1:]:
            y = y + part(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # another one only under autocast, as in linear

    def dense(self) -> Tensor:
        return sum(part.dense() for part in self.parts)

    def shape(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features,
                "parts": [_described(part) for part in self.parts], "bias": self.bias is not None}

    def check_indices(self) -> None:
        for i, part in enumerate(self.parts):
            _numbered(i, part.check_indices)

    def macs(self) -> int:
        return sum(part.macs() for part in self.parts)


def check_parts(parts: Sequence[dict[str, Any]]) -> None:
    """ArgumentError for what is no list of structures with their arguments."""
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ArgumentError(f"parts must be a list of at least one structure, found {parts!r}")
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("structure") not in list(PARTS):  # a list compares where a dict would hash
            raise ArgumentError(f"part {i} must be a dictionary with a structure of {', '.join(PARTS)}; found {part!r}")
        for name in OURS:
            if name in part:
                raise ArgumentError(f"part {i} has its own {name}; that is the sum's")


def _arguments(part: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != "structure"}


def _described(part: Structure) -> dict[str, Any]:
    arguments = {name: value for name, value in part.shape().items() if name not in OURS}
    return {"structure": type(part).__name__} | arguments


def _numbered(i: int, call: Callable):
    """What a call of a part gives, or its error with the part's number."""
    try:
        return call()
    except LowfatError as error:
        raise type(error)(f"part {i}: {error}") from error
    except TypeError as error:  # an argument that it does not have
        raise ArgumentError(f"part {i}: {error}") from error
