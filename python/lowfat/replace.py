"""Factorized layers for a model that is trained from scratch: every layer starts by its own rule, no weight is looked at."""
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import nn

from . import layers as selection
from .blocks import Blocks, group_blocks
from .errors import ArgumentError, LowfatError
from .factorize import is_hugging_face
from .structures import STRUCTURES, Quantized, Structure, Wavelet, keep_indices_local

NEW = [name for name, kind in STRUCTURES.items() if kind not in (Wavelet, Quantized)]  # that learn, and stand alone


@dataclass
class ReplaceReport:
    """What replace() did."""
    layers: dict[str, dict[str, Any]]  # by name: the structure and its shape, parameters, dense_parameters; without the bias
    skipped: dict[str, str] = field(default_factory=dict)  # every other weight matrix, and why
    blocks: Blocks = field(default_factory=Blocks)  # which now run their projections of one input as one call

    @property
    def parameters(self) -> int:
        return sum(layer["parameters"] for layer in self.layers.values())

    @property
    def dense_parameters(self) -> int:
        return sum(layer["dense_parameters"] for layer in self.layers.values())

    @property
    def ratio(self) -> float:
        """Parameters of the replaced layers over those of the dense ones."""
        return self.parameters / self.dense_parameters

    def to_json(self) -> dict:
        """Plain JSON."""
        return {"layers": self.layers, "skipped": self.skipped, "blocks": asdict(self.blocks), "parameters": self.parameters,
                "dense_parameters": self.dense_parameters, "ratio": self.ratio}


def replace(model: nn.Module, plan: Mapping[str, Any], *, layers: Sequence[str] | None = None) -> ReplaceReport:
    """Puts new, untrained structures in the place of a model's linear layers, each with the bias, dtype and device that its
    layer has. For a model made from a config; factorize() keeps what a trained one knows.

    plan: one structure for all layers, as {"structure": "LowRankSparse", "rank": 128, "density": 0.03}, with the arguments
    of its constructor but for sizes and bias; or {pattern: such a structure}, patterns as in fnmatch, of which the first
    that matches counts. layers: patterns of the layers that one structure for all is about, by default those of the blocks.
    A structure with a seed draws each layer's support from a seed of its own, counted on from the plan's.

    Raises before any layer changes: ArgumentError for a plan that names no known structure or that matches no layer, and
    what the structures say of their sizes, with the layer's name."""
    if is_hugging_face(model):
        from .checkpoint import attach, check_model  # not above: for Hugging Face models, replace for any

        check_model(model)
    wanted = _wanted(model, plan, layers)
    modules = selection.factorizable(model, ["*"])
    for name, spec in wanted.items():
        _built(name, modules[name], spec, "meta")  # all refusals come before the first change
    found = {}
    for name, spec in wanted.items():
        module = modules.pop(name)
        layer = _built(name, module, spec, module.weight.device)
        dense, bias = module.weight.numel(), 0 if module.bias is None else module.bias.numel()
        selection.replace(model, name, layer)
        found[name] = {"structure": type(layer).__name__, **layer.shape(), "dense_parameters": dense,
                       "parameters": sum(parameter.numel() for parameter in layer.parameters()) - bias}
    keep_indices_local(model)
    if is_hugging_face(model):
        attach(model)
    others = dict.fromkeys(modules, "not in the plan") | selection.skipped(model)
    return ReplaceReport(found, {name: reason for name, reason in others.items() if name not in found}, group_blocks(model))


def _wanted(model: nn.Module, plan: Any, layers: Sequence[str] | None) -> dict[str, dict]:
    """{layer name: its structure with its arguments}, in the model's order."""
    if not isinstance(plan, Mapping) or not plan:
        raise ArgumentError(f'plan must be {{"structure": "LowRank", "rank": 64}} or the like, or {{pattern: such a '
                            f"structure}}; found {plan!r}")
    if "structure" in plan:
        return {name: _spec(plan, number) for number, name in enumerate(selection.factorizable(model, layers))}
    if layers is not None:
        raise ArgumentError(f"layers {list(layers)}: a plan by patterns says itself which layers it is about")
    chosen: dict[str, Mapping] = {}
    for pattern, spec in plan.items():
        for name in selection.factorizable(model, [pattern]):
            chosen.setdefault(name, spec)
    ordered = [name for name in selection.factorizable(model, list(plan)) if name in chosen]
    return {name: _spec(chosen[name], number) for number, name in enumerate(ordered)}


def _spec(spec: Any, number: int) -> dict:
    if not isinstance(spec, Mapping) or spec.get("structure") not in NEW:
        found = spec.get("structure") if isinstance(spec, Mapping) else spec
        raise ArgumentError(f"plan: structure must be one of {', '.join(NEW)}; found {found!r}")
    if taken := sorted({"in_features", "out_features", "bias", "device", "dtype"} & set(spec)):
        raise ArgumentError(f"plan: {', '.join(taken)} of {spec['structure']} must not be given; the layer has it")
    return _seeded(spec, number)


def _seeded(spec: Mapping, number: int) -> dict:
    """With the seed of the layer of this number, in the parts of a sum too."""
    found, kind = dict(spec), spec.get("structure")
    if isinstance(found.get("parts"), (list, tuple)):
        found["parts"] = [_seeded(part, number) if isinstance(part, Mapping) else part for part in found["parts"]]
    seed = spec.get("seed", 0)
    if kind in STRUCTURES and "seed" in signature(STRUCTURES[kind]).parameters and type(seed) is int:
        found["seed"] = seed + number
    return found


def _built(name: str, module: nn.Module, spec: dict, device: torch.device | str) -> Structure:
    k, n = selection.sizes(module)
    arguments = {key: value for key, value in spec.items() if key != "structure"}
    try:
        return STRUCTURES[spec["structure"]](in_features=k, out_features=n, bias=module.bias is not None, device=device,
                                             dtype=module.weight.dtype, **arguments)
    except (LowfatError, TypeError) as error:  # TypeError: an argument that the constructor lacks
        kind = type(error) if isinstance(error, LowfatError) else ArgumentError
        raise kind(f"{name}: {str(error).replace('.__init__()', ' is')}") from error
