"""Replaces the linear layers of a model by factors, one layer after the other, as a plan says."""
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from . import storage
from .blocks import Blocks, group_blocks
from .errors import ArgumentError, IntegrityError, LowfatError, NumericsError, ShapeError
from .layers import dense_weight, factorizable, replace, sizes, skipped
from .manifest import digest
from .mapped import MappedFiles
from .methods import METHODS, check_arguments
from .progress import opened, tensors_digest
from .sharing import check_group, groups_of, joined, size_of
from .stats import Stats, merged
from .strict_json import read_json
from .structures import STRUCTURES, Structure, share
from .tensor_file import read_tensors

_BLOCK = 1 << 22  # elements of the weight whose residual is computed at a time: 16 MiB in fp32


@dataclass
class LayerReport:
    """What became of one layer. Errors are relative and of the factors as stored, in the dtype of the model."""
    name: str
    method: str | None = None
    structure: str | None = None  # None: dense
    shape: dict = field(default_factory=dict)
    rank: int | None = None  # of the plan: of a dictionary its atoms, of N:M how many of each group stay
    error: float | None = None  # ||W - What||_F / ||W||_F
    output_error: float | None = None  # ||(W - What) X^T||_F / ||W X^T||_F over the calibration inputs X
    parameters: int = 0  # without the bias, nor a factor that another layer counts
    dense_parameters: int = 0
    index_bytes: int = 0  # stored beside the parameters
    kept: bool = False  # whether the factors took the place of the weight; reason says why not
    reason: str = ""
    events: list[str] = field(default_factory=list)  # what solvers had to try
    seconds: float = 0.0
    shares: str = ""  # the layer whose first factor is this one's too, and is counted there


@dataclass
class Report:
    """What factorize() did, layer by layer."""
    layers: list[LayerReport]
    skipped: dict[str, str] = field(default_factory=dict)  # every other weight matrix, and why
    blocks: Blocks = field(default_factory=Blocks)  # which now run their projections of one input as one call

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Parameters kept over dense ones, of the layers in the plan, those that stayed dense included."""
        return self.parameters / self.dense_parameters

    def to_json(self) -> dict:
        """Plain JSON."""
        return {"layers": [asdict(layer) for layer in self.layers], "skipped": self.skipped, "blocks": asdict(self.blocks),
                "parameters": self.parameters, "dense_parameters": self.dense_parameters, "ratio": self.ratio}


@torch.no_grad()
def factorize(model: nn.Module, plan: Mapping, stats: Mapping | None = None, *, resume: str | Path | None = None,
              on_progress=None) -> Report:
    """Factorizes the layers of the plan in place; the dense weights are freed on the way. Layers of a group become factors
    together, with the sum of what they saw, and hold the first factor as one parameter.

    resume: a folder where finished layers are kept; the same call after a kill continues there and ends with the same bits.
    Remove it when the model is saved. on_progress(done, total, layer name).
    Raises before any layer changes: ArgumentError or ShapeError for a plan that does not fit the model or the stats,
    DtypeError or DeviceError for layers of a group that differ there, NumericsError for a weight with NaN or infinity."""
    modules = _checked(model, plan, stats)
    others = left_alone(model, plan)
    if resume is None:
        report = _factorize(model, modules, plan, stats, None, on_progress)
    else:
        with opened(resume, _fingerprint(modules, plan, stats)) as folder:
            report = _factorize(model, modules, plan, stats, folder, on_progress)
    if is_hugging_face(model):
        from .checkpoint import attach

        attach(model)
    report.skipped, report.blocks = others, group_blocks(model)
    return report


def is_hugging_face(model: nn.Module) -> bool:
    """Others are factorized too, and saved by their owner; where transformers was never imported there can be none."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def left_alone(model: nn.Module, plan: Mapping) -> dict[str, str]:
    """Every weight matrix that is not in the plan, and why."""
    others = dict.fromkeys(factorizable(model, ["*"]), "not in the plan") | skipped(model)
    return {name: reason for name, reason in others.items() if name not in plan}


def _checked(model: nn.Module, plan: Mapping, stats: Mapping | None) -> dict[str, nn.Module]:
    """The module of every name in the plan, after all that can be refused without work."""
    if not plan:
        raise ArgumentError("plan: no layers")
    if is_hugging_face(model):
        from .checkpoint import check_model  # not above: checkpoint is for Hugging Face models, factorize for any

        check_model(model)
    eligible = factorizable(model, ["*"])
    for name, choice in plan.items():
        if name not in eligible:
            raise ArgumentError(f"plan: {_why_not(model, name)}")
        found, planned = sizes(eligible[name]), (choice.in_features, choice.out_features)
        if found != planned:
            raise ShapeError(f"plan: {name} has {planned[0]} inputs and {planned[1]} outputs; in the model they are "
                             f"{found[0]} and {found[1]}")
    for group in _groups(plan):
        if plan[group[0]].method is not None:
            _check_choices(group, plan, stats)
            check_group({name: eligible[name] for name in group}, plan[group[0]].method)
    _check_fisher(plan, stats)
    modules = {name: module for name, module in eligible.items() if name in plan}  # in the order of the model
    check_weights(modules)
    return modules


def check_weights(modules: Mapping[str, nn.Module]) -> None:
    """NumericsError names the first layer whose weight holds NaN or infinity."""
    mapped = MappedFiles()
    for name, module in modules.items():
        weight = dense_weight(module)
        if weight.is_meta:
            raise ArgumentError(f"{name}: the weight is on the meta device; load the weights first")
        if not all(block.isfinite().all() for block in _row_blocks(weight)):
            raise NumericsError(f"{name}: the weight holds NaN or infinity")
        mapped.release(weight)


def _why_not(model: nn.Module, name: str) -> str:
    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    if module is None:
        return f"{name} is not in the model"
    reason = skipped(model, ["*"]).get(name)
    return f"{name} cannot be factorized: {reason or f'it is a {type(module).__name__}'}"


def _groups(plan: Mapping) -> list[tuple[str, ...]]:
    try:
        return groups_of(plan)
    except LowfatError as error:
        raise type(error)(f"plan: {error}") from error


def _check_choices(names: Sequence[str], plan: Mapping, stats: Mapping | None) -> None:
    """Of the layers of a group, or of one alone."""
    choice = plan[names[0]]
    rank = choice.arguments.get("rank")
    try:
        _, most = size_of([plan[name] for name in names])
    except LowfatError as error:
        raise type(error)(f"plan: {', '.join(names)}: {error}") from error
    if not isinstance(rank, int) or not 1 <= rank <= most:
        raise ShapeError(f"plan: {', '.join(names)} has the rank {rank!r}; needs a whole number from 1 to {most}")
    for name in names:
        if _needs(choice) and (stats is None or name not in stats):
            raise ArgumentError(f"stats: {name} is missing; {choice.method} needs what calibrate(model, batches) returns")


def _check_fisher(plan: Mapping, stats: Mapping | None) -> None:
    """On one layer for each form of a method, because reading stored statistics takes time and all of a calibration are
    alike."""
    asked = set()
    for name, choice in plan.items():
        arguments = {key: value for key, value in choice.arguments.items() if key != "rank"}
        if choice.method is None or "fisher" not in _needs(choice) or (form := f"{choice.method} {arguments}") in asked:
            continue
        asked.add(form)
        if (its := stats[name]).tensors().keys() == {"gram"}:
            raise ArgumentError(f"stats: {name} has no Fisher information; {choice.method} needs batches with labels")
        METHODS[choice.method].require(its, **arguments)


def _needs(choice) -> frozenset[str]:
    return check_arguments(choice.method, {name: value for name, value in choice.arguments.items() if name != "rank"}).needs


def _fingerprint(modules: Mapping[str, nn.Module], plan: Mapping, stats: Mapping | None) -> dict:
    tensors = ((name, parameter) for name, module in modules.items() for parameter in module.parameters())
    return {"weights": tensors_digest(tensors), "plan": {name: choice.to_json() for name, choice in plan.items()},
            "stats": None if stats is None else stats.fingerprint(), "torch": torch.__version__}


def _factorize(model, modules, plan, stats, folder, on_progress) -> Report:
    reports, mapped, numbers = {}, MappedFiles(), {name: number for number, name in enumerate(modules)}
    for group in sorted(groups_of(plan), key=lambda group: numbers[group[0]]):
        members = {name: modules.pop(name) for name in group}  # the last references but the model's own
        files = [folder / f"layer-{numbers[name]:05d}.json" for name in group] if folder else []
        if files and all(file.exists() for file in files):
            made = [_read_layer(file, module.weight.device) for file, module in zip(files, members.values())]
        else:
            made = _factorized(members, plan, stats)
            for file, (layer, report) in zip(files, made):
                _write_layer(file, layer, report)
                storage.stage(f"layer {numbers[report.name] + 1}")
        _put(model, members, [layer for layer, _ in made], mapped)
        for _, report in made:
            reports[report.name] = report
            if on_progress:
                on_progress(len(reports), len(plan), report.name)
    return Report([reports[name] for name in numbers])


def _put(model: nn.Module, members: Mapping[str, nn.Module], layers: Sequence[Structure | None],
         mapped: MappedFiles) -> None:
    """Layers in the places of the dense ones that they were made of; what they share learns where one of those does."""
    learns = {name for name, module in members.items() if module.weight.requires_grad}
    placed = {name: layer for name, layer in zip(members, layers) if layer is not None}
    for name, layer in placed.items():
        replace(model, name, layer.requires_grad_(name in learns))
    if len(placed) > 1:
        first, *_ = share(placed.values())
        getattr(first, first.first).requires_grad_(not learns.isdisjoint(placed))
    for module in members.values():
        mapped.release(dense_weight(module))


def _factorized(members: Mapping[str, nn.Module], plan: Mapping,
                stats: Mapping | None) -> list[tuple[Structure | None, LayerReport]]:
    """Of each layer of a group (the layer made of factors, None where it stays dense; the report)."""
    started, names = time.monotonic(), list(members)
    choice, weights = plan[names[0]], [dense_weight(module) for module in members.values()]
    seen, layers, events, made = [None] * len(names), [None] * len(names), [], []
    if choice.method is not None:
        seen = [stats[name] if stats is not None and name in stats else None for name in names]
        biases = [module.bias for module in members.values()]
        try:
            layers, events = _solved(METHODS[choice.method].factorize, weights, biases, seen, choice.arguments)
        except LowfatError as error:
            raise type(error)(f"{', '.join(names)}: {error}") from error
    owner = ""  # of what they share: the first that is kept
    for name, weight, layer, its in zip(names, weights, layers, seen):
        layer, report = _judged(name, plan[name], weight, layer, its)
        if report.kept and owner:
            report.shares, report.parameters = owner, report.parameters - getattr(layer, layer.first).numel()
        elif report.kept:
            owner = name
        report.events, events = events, []
        report.seconds, started = time.monotonic() - started, time.monotonic()
        made.append((layer, report))
    return made


def _solved(factorize: Callable, weights: Sequence[Tensor], biases: Sequence[Tensor | None], seen: Sequence[Stats | None],
            arguments: dict) -> tuple[list[Structure], list[str]]:
    """(layers, events) of what a method makes of one weight, or of several that share a factor."""
    if len(weights) == 1:
        layer, events = factorize(weights[0], biases[0], seen[0], **arguments)
        return [layer], events
    known = None if None in seen else merged(seen)
    whole, events = factorize(joined(weights), None, known, **arguments)
    return whole.split([len(weight) for weight in weights], biases), events


def _judged(name: str, choice, weight: Tensor, layer: Structure | None,
            seen: Stats | None) -> tuple[Structure | None, LayerReport]:
    """(the layer, None where it stays dense; the report)"""
    gram = None if seen is None else seen.gram
    report = LayerReport(name, choice.method, parameters=weight.numel(), dense_parameters=weight.numel(),
                         reason=choice.reason)
    if layer is None:
        return None, report
    report.error, report.output_error = residuals(weight, layer, gram)
    needs = _needs(choice)
    deciding = report.output_error if "gram" in needs and report.output_error is not None else report.error
    if "fisher" in needs and seen.fisher is not None:
        deciding = min(deciding, weighted_error(weight, layer, seen.fisher.to(weight.device)))
    report.shape, report.rank = layer.shape(), choice.arguments["rank"]
    if not all(parameter.isfinite().all() for parameter in layer.parameters()):
        layer, report.reason = None, "the factors are not finite"
    elif not deciding < 1:  # 1 is what a weight of zeros has
        layer, report.reason = None, f"no better than a weight of zeros: relative error {deciding:.3g}"
    else:
        report.kept, report.structure = True, type(layer).__name__
        report.parameters = sum(parameter.numel() for key, parameter in layer.named_parameters() if key != "bias")
        report.index_bytes = sum(buffer.nbytes for buffer in layer.buffers())
    return layer, report


def residuals(weight: Tensor, layer: Structure, gram: Tensor | None) -> tuple[float, float | None]:
    """(||W - What||_F / ||W||_F, the same of the outputs over inputs with this Gram matrix) of the stored factors."""
    dtype = torch.promote_types(weight.dtype, torch.float32)  # the factors are multiplied out in fp32, as the ops accumulate
    difference = deepcopy(layer).to(dtype).dense().neg_().add_(weight)
    return _relative(difference, weight, None), None if gram is None else _relative(difference, weight, gram.to(difference))


def weighted_error(weight: Tensor, layer: Structure, fisher: Tensor) -> float:
    """Root of sum_ij F_ij (W - What)_ij^2 / sum_ij F_ij W_ij^2, F [n, k]."""
    root = fisher.to(torch.promote_types(weight.dtype, torch.float32)).sqrt()
    return _relative((deepcopy(layer).to(root.dtype).dense() - weight) * root, weight * root, None)


def _relative(difference: Tensor, weight: Tensor, gram: Tensor | None) -> float:
    """Root of tr(D C D^T) / tr(W C W^T), or without C of the squared norms; in blocks, for the memory."""
    numerator, denominator = (sum(_square(block.to(difference.dtype), gram) for block in _row_blocks(matrix))
                              for matrix in (difference, weight))
    if numerator == 0:
        return 0.0  # of zero too
    return math.sqrt(numerator / denominator) if denominator else math.inf


def _square(block: Tensor, gram: Tensor | None) -> float:
    return (block * (block if gram is None else block @ gram)).sum(dtype=torch.float64).clamp(min=0).item()


def _row_blocks(matrix: Tensor) -> Iterable[Tensor]:
    return matrix.split(max(1, _BLOCK // matrix.shape[1]))


def _write_layer(path: Path, layer: Structure | None, report: LayerReport) -> None:
    """The factors first, then the report: a layer counts as finished when its report is there."""
    tensors = path.with_suffix(".safetensors")
    if layer is not None:
        storage.write_tensors(tensors, layer.state_dict())
    storage.write_json(path, {"report": asdict(report), "sha256": None if layer is None else digest(tensors)})


def _read_layer(path: Path, device: torch.device) -> tuple[Structure | None, LayerReport]:
    stored, tensors = read_json(path), path.with_suffix(".safetensors")
    report = LayerReport(**stored["report"])
    if report.structure is None:
        return None, report
    if digest(tensors) != stored["sha256"]:
        raise IntegrityError(f"{tensors}: not as it was written; remove {path.parent} to start anew")
    with torch.device("meta"):
        layer = STRUCTURES[report.structure](**report.shape)
    # to the device, or a copy: not a view of the file, which is removed later
    factors = {name: tensor.to(device, copy=True) for name, tensor in read_tensors(tensors).items()}
    layer.load_state_dict(factors, assign=True)
    return layer, report
