"""Low-rank layers stored with r^2 numbers less and no loss: as r of the weight's own rows and the others by those (PIFA)."""
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .blocks import group_blocks
from .errors import ArgumentError, NumericsError
from .factorize import is_hugging_face
from .layers import replace
from .structures import LowRank, LowRankPivoted, structures

_PROBES = 64  # random inputs on which the two forms are compared
_ROUNDING = 2.0**-9  # one rounding to bf16: an error below it is no loss, in whatever dtype


@dataclass
class PivotedLayer:
    """What became of one low-rank layer. Errors are relative, of outputs in the layer's dtype against fp64."""
    parameters_before: int  # without the bias
    parameters: int
    error_before: float  # of the two factors
    error: float  # of the pivoted form, of the same weight
    kept: bool = False  # whether it took the place of the factors; reason says why not
    reason: str = ""


@dataclass
class PivotReport:
    """What pivot() did, by layer."""
    layers: dict[str, PivotedLayer]

    @property
    def parameters_before(self) -> int:
        return sum(layer.parameters_before for layer in self.layers.values())

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers.values())

    def to_json(self) -> dict:
        """Plain JSON."""
        return {"layers": {name: asdict(layer) for name, layer in self.layers.items()}, "parameters": self.parameters,
                "parameters_before": self.parameters_before}


@torch.no_grad()
def pivot(model: nn.Module, *, layers: Sequence[str] | None = None, growth: float = 2.0) -> PivotReport:
    """Stores the model's LowRank layers as LowRankPivoted, in place: the same weights, r (n + k - r) numbers for r (n + k).

    layers: name patterns, by default all. A layer stays as it is, with the reason in the report, where its factors have a
    lower rank than they have room for, where it shares its v with another layer, and where its rounding error in its own
    dtype would be above `growth` times that of its factors and above one rounding to bf16. In bf16 it is about 4 times as
    large (ranks of some hundreds: a row that is not a pivot adds up r rounded numbers, larger than itself), so that by
    default such layers keep their factors. Raises ArgumentError for a model without low-rank layers, a pattern that matches
    none, and a growth below 1."""
    if not isinstance(growth, (int, float)) or isinstance(growth, bool) or not growth >= 1:
        raise ArgumentError(f"growth must be a number, at least 1; found {growth!r}")
    found = low_rank_layers(model, (LowRank,), layers)
    if is_hugging_face(model):
        from .checkpoint import attach, check_model  # not above: for Hugging Face models, pivot for any

        check_model(model)
    users = Counter(id(layer.v) for _, layer in structures(model) if isinstance(layer, LowRank))
    report = {}
    for name, layer in found.items():
        made, report[name] = _judged(layer, growth, is_shared=users[id(layer.v)] > 1)
        if report[name].kept:
            for key in ("v", "c"):
                getattr(made, key).requires_grad_(layer.v.requires_grad)
            made.bias = layer.bias  # the parameter itself: a layer may share it
            replace(model, name, made)
    if is_hugging_face(model):
        attach(model)
    group_blocks(model)
    return PivotReport(report)


def low_rank_layers(model: nn.Module, kinds: tuple[type, ...], patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    """The model's layers of these kinds whose names match, all without patterns; ArgumentError where there is none."""
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns or ()):
        raise ArgumentError(f"layers must be a list of name patterns, found {patterns!r}")
    every = {name: layer for name, layer in structures(model) if type(layer) in kinds}
    if not every:
        raise ArgumentError("model: has no low-rank layer; factorize() it first")
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in every):
            raise ArgumentError(f"layers: {pattern!r} matches no low-rank layer; there are {', '.join(every)}")
    return {name: layer for name, layer in every.items()
            if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)}


def _judged(layer: LowRank, growth: float, *, is_shared: bool) -> tuple[LowRankPivoted | None, PivotedLayer]:
    count = layer.v.numel() + layer.u.numel()
    report = PivotedLayer(count, count, 0.0, 0.0)
    if is_shared:
        report.reason = "its v is another layer's too"
        return None, report
    try:
        made = LowRankPivoted.from_factors(layer.v, layer.u)
    except NumericsError as error:
        report.reason = str(error)
        return None, report
    x = torch.randn(_PROBES, layer.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(layer.v.device, layer.v.dtype)
    exact = x.double() @ (layer.u.double() @ layer.v.double()).mT
    report.error_before, report.error = (_relative(low(x), exact) for low in (LowRank.of(layer.v, layer.u), made))
    if report.error > max(growth * report.error_before, _ROUNDING):
        report.reason = f"its rounding error would grow {report.error / max(report.error_before, 1e-300):.1f} times"
        return None, report
    report.kept, report.parameters = True, made.v.numel() + made.c.numel()
    return made, report


def _relative(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny))
