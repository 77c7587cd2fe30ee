"""A base that is cheap to store, in few bits or 2:4, and low rank for what it lost: W ~ base + u v.

The correction is the best one of its rank for the layer's outputs, a whitened SVD of W - base (EoRA, 2410.21271; QERA), over
a base of 8 or 4 bits or of pruned weights (SLiM, 2410.09615)."""
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import inf

import torch
from torch import Tensor, nn

from .blocks import group_blocks
from .errors import ArgumentError, LowfatError, ShapeError
from .factorize import is_hugging_face, residuals
from .layers import dense_weight, factorizable, origin_of, replace, sizes
from .methods import METHODS, check_arguments
from .stats import Stats
from .structures import LowRank, Quantized, Structure, Sum, structures
from .structures.sum import PARTS


@dataclass
class CorrectedLayer:
    """What became of one layer. Errors are relative: of the outputs on the calibration inputs, without statistics of the
    weight."""
    structure: str  # of the base
    bytes_before: int  # what the layer stores, without the bias
    bytes: int
    error_before: float
    error: float
    rank: int = 0
    kept: bool = True  # whether the correction is there: not where it is no better in the layer's dtype


@dataclass
class CorrectionReport:
    """What quantize() or correct() did, by layer."""
    layers: dict[str, CorrectedLayer]

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers.values())

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers.values())

    def to_json(self) -> dict:
        """Plain JSON."""
        return {"layers": {name: asdict(layer) for name, layer in self.layers.items()}, "bytes": self.bytes,
                "bytes_before": self.bytes_before}


@torch.no_grad()
def quantize(model: nn.Module, *, bits: int = 8, group: int | None = None, layers: Sequence[str] | None = None,
             stats: Mapping | None = None) -> CorrectionReport:
    """Stores the model's linear layers in 8 or 4 bits a number, in place; torchao rounds (pip install lowfat[quantize]).

    group: inputs that have one scale in each row, None for all of them. layers: name patterns, by default those of the
    blocks. stats: of calibrate(), for errors of outputs in the report. What is stored needs torchao no more. Raises before
    any layer changes: UnsupportedError without torchao, ArgumentError, ShapeError or NumericsError for what a layer cannot
    have, by its name."""
    found = factorizable(model, layers)
    _check_model(model)
    made, report = {}, {}
    for name, module in found.items():
        with _named(name):
            made[name] = Quantized.from_dense(dense_weight(module), module.bias, bits=bits, group=group)
        error = _error(dense_weight(module), made[name], stats.get(name) if stats else None)
        report[name] = CorrectedLayer("Quantized", module.weight.nbytes, _bytes(made[name]), 0.0, error)
    for name, layer in made.items():
        layer.requires_grad_(found[name].weight.requires_grad)
        replace(model, name, layer)
    _finish(model)
    return CorrectionReport(report)


@torch.no_grad()
def correct(model: nn.Module, dense: nn.Module, stats: Mapping | None = None, *, rank: int | float = 0.1,
            method: str = "whitened", layers: Sequence[str] | None = None) -> CorrectionReport:
    """Adds to each layer that is Quantized, Sparse24 or another part of sums the best low rank for what it lost, in place.

    dense: the model that it was made of. stats: calibrate(dense, ...), which whitened needs. rank: of all corrections, or
    below 1 a share of the smaller side of each. method: whitened, svd or kfac. layers: name patterns. A layer becomes a Sum
    of what it was and a LowRank, unless that is no better. Raises before any layer changes: ArgumentError for options,
    statistics or a dense model that do not fit, ShapeError for sizes and ranks that do not."""
    if method not in ("whitened", "svd", "kfac"):
        raise ArgumentError(f"method must be one of whitened, svd, kfac; found {method!r}")
    is_number = isinstance(rank, (int, float)) and not isinstance(rank, bool) and 0 < rank < inf
    if not is_number or (rank > 1 and rank != int(rank)):
        raise ArgumentError(f"rank must be a whole number, or a share below 1; found {rank!r}")
    found = _bases(model, layers)
    _check_model(model)
    method_of = check_arguments(method, {})
    for name, base in found.items():
        origin_of(dense, name, base)
        if method_of.needs and (stats is None or name not in stats):
            raise ArgumentError(f"stats: {name} is missing; {method} needs what calibrate(dense, batches) returns")
        if _rank_of(base, rank) > min(sizes(base)):
            raise ShapeError(f"{name}: rank must be at most {min(sizes(base))}, found {rank}")
    if method_of.needs:
        method_of.require(stats[next(iter(found))])
    made, report = {}, {}
    for name, base in found.items():
        made[name], report[name] = _corrected(name, base, dense_weight(dense.get_submodule(name)),
                                              stats.get(name) if stats else None, _rank_of(base, rank), method)
    for name, low in made.items():
        if low is not None:
            _put(model, name, found[name], low)
    _finish(model)
    return CorrectionReport(report)


def _corrected(name: str, base: Structure, weight: Tensor, stats: Stats | None, rank: int,
               method: str) -> tuple[LowRank | None, CorrectedLayer]:
    """(the correction, None where it is no better; the report)"""
    first = next(base.parameters())
    weight = weight.to(first.device)
    rest = weight.to(torch.promote_types(weight.dtype, torch.float32)) - _multiplied_out(base)
    with _named(name):
        low, _ = METHODS[method].factorize(rest, None, stats, rank=rank)
    low = LowRank.of(low.v.to(first.dtype), low.u.to(first.dtype))
    trial = deepcopy(base)
    trial.bias = None
    before, after = _error(weight, base, stats), _error(weight, Sum.of([trial, low]), stats)
    kept = after < before
    stored = _bytes(base)
    report = CorrectedLayer(type(base).__name__, stored, stored + _bytes(low) if kept else stored, before,
                            after if kept else before, rank, kept)
    return low if kept else None, report


def _put(model: nn.Module, name: str, base: Structure, low: LowRank) -> None:
    low.requires_grad_(next(base.parameters()).requires_grad)
    bias, base.bias = base.bias, None
    whole = Sum.of([base, low], bias)
    whole.bias = bias  # the parameter itself: another layer may have it too
    replace(model, name, whole)


def _bases(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, Structure]:
    """The layers that can be a part of a sum with low rank, by name."""
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns or ()):
        raise ArgumentError(f"layers must be a list of name patterns, found {patterns!r}")
    every = {name: layer for name, layer in structures(model)
             if type(layer).__name__ in PARTS and type(layer) is not LowRank}
    if not every:
        raise ArgumentError("model: has no layer to correct; quantize() it first, or factorize() it by a method that prunes")
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in every):
            raise ArgumentError(f"layers: {pattern!r} matches no layer to correct; there are {', '.join(every)}")
    return {name: layer for name, layer in every.items()
            if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)}


def _rank_of(base: Structure, rank: int | float) -> int:
    return int(rank) if rank >= 1 else max(1, int(rank * min(sizes(base))))


def _multiplied_out(layer: Structure) -> Tensor:
    """Its weight, multiplied out in at least fp32.   [n, k]"""
    dtype = torch.promote_types(next(layer.parameters()).dtype, torch.float32)
    return deepcopy(layer).to(dtype).dense()


def _error(weight: Tensor, layer: Structure, stats: Stats | None) -> float:
    of_weight, of_outputs = residuals(weight, layer, None if stats is None else stats.gram)
    return of_weight if of_outputs is None else of_outputs


def _bytes(layer: Structure) -> int:
    tensors = (tensor for key, tensor in layer.state_dict().items() if key != "bias")
    return sum(tensor.nbytes for tensor in tensors)


def _check_model(model: nn.Module) -> None:
    if is_hugging_face(model):
        from .checkpoint import check_model  # not above: checkpoint is for Hugging Face models, this for any

        check_model(model)


def _finish(model: nn.Module) -> None:
    if is_hugging_face(model):
        from .checkpoint import attach

        attach(model)
    group_blocks(model)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors with the layer's name before them."""
    try:
        yield
    except LowfatError as error:
        raise type(error)(f"{name}: {error}") from error
