"""A linear layer whose weight is stored in 8 or 4 bits a number: whole numbers, times a scale for a group of inputs of a row.

codes [n, k] int8, or [n, k / 2] uint8 with two numbers a byte, the first in the lower half   scales [n, k / group]
It takes less memory, not less time: the weight is multiplied out for each call."""
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import DtypeError, ShapeError, UnsupportedError
from ..linalg import require_finite
from .structure import Structure, check_counts, check_dense

BITS = (8, 4)


class Quantized(Structure):
    """y = x W^T + bias, W = codes * scales.   x [..., in_features], y [..., out_features]

    group: inputs that have one scale in each row; None for all of them. The weight of a new layer is zero. Its codes are no
    parameters, and stay as they are in training. Raises ArgumentError or ShapeError for bits other than 8 and 4 and for a
    group that does not divide the inputs."""

    def __init__(self, in_features: int, out_features: int, bits: int = 8, group: int | None = None, bias: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        check_counts(in_features=in_features, out_features=out_features, bits=bits)
        check_format(in_features, bits, group)
        self.in_features, self.out_features, self.bits, self.group = in_features, out_features, bits, group
        groups = in_features // (group or in_features)
        self.scales = nn.Parameter(torch.empty(out_features, groups, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        packed = {"size": (out_features, in_features), "dtype": torch.int8} if bits == 8 else {
            "size": (out_features, in_features // 2), "dtype": torch.uint8}
        self.register_buffer("codes", torch.zeros(**packed, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scales of one, and a bias as that of `nn.Linear`. The codes stay."""
        nn.init.ones_(self.scales)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -self.in_features**-0.5, self.in_features**-0.5)

    @classmethod
    def of(cls, numbers: Tensor, scales: Tensor, bias: Tensor | None = None, *, bits: int = 8) -> "Quantized":
        """The layer with these whole numbers and scales.   numbers [n, k] int8   scales [n, groups]   bias [n]

        Raises ShapeError or DtypeError for what does not fit together, and for numbers that need more bits."""
        check_dense(numbers)
        check_dense(scales)
        n, k = numbers.shape
        if numbers.dtype != torch.int8:
            raise DtypeError(f"numbers has {numbers.dtype}, must be int8")
        if len(scales) != n or not scales.shape[1] or k % scales.shape[1]:
            raise ShapeError(f"scales is {list(scales.shape)}, must be [{n}, a divisor of {k}]")
        if bits == 4 and ((numbers < -8) | (numbers > 7)).any():
            raise ShapeError(f"numbers from {int(numbers.min())} to {int(numbers.max())} do not fit 4 bits, -8 to 7")
        layer = cls(k, n, bits, None if scales.shape[1] == 1 else k // scales.shape[1], bias is not None, device="meta",
                    dtype=scales.dtype)
        if bias is not None and (bias.shape != (n,) or bias.dtype != scales.dtype):
            raise ShapeError(f"bias is {list(bias.shape)} of {bias.dtype}, must be [{n}] of {scales.dtype}")
        layer.codes = (numbers.clone() if bits == 8 else _packed(numbers)).to(scales.device).contiguous()
        for name, tensor in (("scales", scales), ("bias", bias)):
            if tensor is not None:
                layer.register_parameter(name, nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)))
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, bits: int = 8,
                   group: int | None = None) -> "Quantized":
        """weight [n, k] rounded by torchao, symmetrically, each group's largest number deciding its scale.

        Raises UnsupportedError where torchao is not installed, NumericsError for NaN or infinity."""
        check_dense(weight)
        check_counts(bits=bits)
        check_format(weight.shape[1], bits, group)
        require_finite(weight, "weight")
        numbers, scales = _rounded(weight, bits, group)
        return cls.of(numbers, scales, bias, bits=bits)

    def numbers(self) -> Tensor:
        """The whole numbers.   int8 [n, k]"""
        if self.bits == 8:
            return self.codes
        both = torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(1).to(torch.int8)
        return torch.where(both > 7, both - 16, both)

    def dense(self) -> Tensor:
        whole = self.numbers().to(self.scales.dtype)
        return (whole.unflatten(1, (self.scales.shape[1], -1)) * self.scales[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.dense(), self.bias)

    def shape(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "bits": self.bits, "group": self.group,
                "bias": self.bias is not None}

    def macs(self) -> int:
        return self.in_features * self.out_features


def check_format(in_features: int, bits: int, group: int | None) -> None:
    """ShapeError for bits other than 8 and 4, and for a group or packing that the inputs do not divide into."""
    if bits not in BITS:
        raise ShapeError(f"bits must be {' or '.join(map(str, BITS))}, found {bits}")
    if group is not None:
        check_counts(group=group)
        if in_features % group or group == in_features:
            raise ShapeError(f"group must divide in_features, which are {in_features}, into more than one (None for one); "
                             f"found {group}")
    if bits == 4 and in_features % 2:
        raise ShapeError(f"in_features must be even for 4 bits, two to a byte; found {in_features}")


def _packed(numbers: Tensor) -> Tensor:
    halves = (numbers.to(torch.int16) & 15).to(torch.uint8)
    return halves[:, ::2] | halves[:, 1::2] << 4


def _rounded(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """(whole numbers [n, k] int8, scales [n, groups]) by torchao."""
    try:
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    except ImportError as error:
        raise UnsupportedError(f"quantizing needs torchao ({error}); install lowfat[quantize]") from error
    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    source = weight.detach().contiguous()
    source = source.float() if source.dtype == torch.float64 else source  # which torchao does not round
    holder.weight = nn.Parameter(source, requires_grad=False)
    quantize_(holder, IntxWeightOnlyConfig(weight_dtype={8: torch.int8, 4: torch.int4}[bits],
                                           granularity=PerAxis(0) if group is None else PerGroup(group)))
    made = holder.weight
    if made.zero_point is not None and made.zero_point.any():
        raise UnsupportedError("torchao gave zero points; symmetric rounding has none")
    return made.qdata, made.scale.reshape(weight.shape[0], -1).to(weight.dtype)
