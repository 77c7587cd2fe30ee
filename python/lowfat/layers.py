"""Which layers of a model can be factorized, and what is done to them: read the sizes, read the weight, replace."""
import inspect
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

import torch
from torch import Tensor, nn

from .errors import ArgumentError, NumericsError, ShapeError, UnsupportedError
from .structures import Structure, structures
from .structures.structure import dense_weight, is_conv1d, sizes  # noqa: F401  (of layers, for whoever works on them)

_READ_FROM_OUTSIDE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # these use `.weight` of their parts, not the parts
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ROWS = 1024  # of a weight that are looked at together


def factorizable(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The linear layers to factorize, by name, in the model's order; a module with several names comes once.

    Without patterns: every `nn.Linear` and `Conv1D` of the blocks in an `nn.ModuleList`, so neither heads nor poolers. With
    patterns (as in fnmatch): those that match. Raises ArgumentError where nothing matches, UnsupportedError for a sharded
    weight."""
    _check_patterns(patterns, model)
    linear, reasons = _sort(model, patterns)
    if not linear:
        found = _forms(name for name, module in model.named_modules() if is_linear(module))
        why = next((f"; {name}: {reason}" for name, reason in reasons.items() if name in _matched(model, patterns)), "")
        raise ArgumentError(f"layers: nothing to factorize{why}; linear layers of this model: {found or 'none'}")
    for name, module in linear.items():
        if hasattr(module.weight, "full_tensor"):  # a DTensor: one shard must never pass for the matrix
            raise UnsupportedError(f"{name}: the weight is sharded over processes; gather the model first")
    return linear


def adaptable(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """What factorizable selects, and the structures that have taken the place of such layers. Raises as it does."""
    if isinstance(patterns, str):
        _check_patterns(patterns, model)
    linear = _sort(model, patterns)[0]
    matched = _matched(model, patterns)
    made = {name: module for name, module in structures(model) if name in matched}
    if not made:
        return factorizable(model, patterns)
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in linear | made):
            _check_patterns([pattern], model)
    return {name: module for name, module in model.named_modules() if name in linear or name in made}


def skipped(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, str]:
    """Every other weight matrix of the model, and why it is left alone."""
    return _sort(model, patterns)[1]


def is_linear(module: nn.Module) -> bool:
    """Whether this is exactly `nn.Linear` or GPT-2's `Conv1D`: a subclass may read or store its weight in its own way."""
    return type(module) is nn.Linear or is_conv1d(module)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put module in the place of model's `name`, and of every other name of the same module."""
    modules = dict(model.named_modules(remove_duplicate=False))
    old = modules[name]
    module.train(old.training)
    for other in [other for other, found in modules.items() if found is old]:
        parent, _, leaf = other.rpartition(".")
        setattr(modules[parent], leaf, module)


def origin_of(dense: nn.Module, name: str, layer: Structure) -> nn.Module:
    """The linear layer of this name in the model that a factorized one was made of.

    ArgumentError for a model that has none or another kind there, ShapeError for other sizes, NumericsError for NaN or
    infinity in its weight."""
    try:
        origin = dense.get_submodule(name)
    except AttributeError as error:
        raise ArgumentError(f"dense: has no {name}; it must be the model that this one was made of") from error
    if not is_linear(origin):
        raise ArgumentError(f"dense: {name} is a {type(origin).__name__}, must be a linear layer")
    if sizes(origin) != sizes(layer):
        raise ShapeError(f"dense: {name} has {sizes(origin)[0]} inputs and {sizes(origin)[1]} outputs, in the model they "
                         f"are {layer.in_features} and {layer.out_features}")
    if (origin.bias is None) != (layer.bias is None):
        raise ArgumentError(f"dense: {name} has {'no bias' if origin.bias is None else 'a bias'}, in the model it is the "
                            "other way round")
    if not all(block.isfinite().all() for block in dense_weight(origin).split(_ROWS)):
        raise NumericsError(f"dense: {name}: the weight holds NaN or infinity")
    return origin


def _sort(model: nn.Module, patterns: Sequence[str] | None) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(layers to factorize by name, reason by name of every other weight matrix)"""
    modules = dict(model.named_modules(remove_duplicate=False))
    names, users = {}, {}
    for name, module in modules.items():
        names.setdefault(id(module), []).append(name)
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(_storage_key(parameter), []).append(f"{name}.{leaf}".lstrip("."))
    matched = _matched(model, patterns)
    linear, reasons, factorized = {}, {}, dict(structures(model))
    inside = tuple(f"{name}." for name in factorized)
    for name, module in model.named_modules():
        if name.startswith(inside):  # a part of a structure, or what an adapter is on
            continue
        if is_linear(module):
            others = [user for user in users[_storage_key(module.weight)] if user != f"{name}.weight".lstrip(".")]
            reason = _why_not(module, {other: modules[other.rpartition(".")[0]] for other in names[id(module)]}, others)
            if reason is None and not matched.intersection(names[id(module)]):
                reason = "outside the blocks" if patterns is None else "not matched"
            if reason is None:
                linear[name] = module
            else:
                reasons[name] = reason
        elif name in factorized:
            reasons[name] = f"already {type(module).__name__}"
        elif not isinstance(module, Structure):
            for leaf, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() > 1:
                    reasons[f"{name}.{leaf}".lstrip(".")] = _why_no_linear(module, parameter)
    return linear, reasons


def _why_not(module: nn.Module, parents: dict[str, nn.Module], tied: list[str]) -> str | None:
    if tied:
        return f"tied to {', '.join(tied)}"
    for name, parent in parents.items():
        if isinstance(parent, _READ_FROM_OUTSIDE) or f"self.{name.rpartition('.')[2]}.weight" in _source(type(parent)):
            return f"{type(parent).__name__} reads its weight directly"
    if module.weight.dtype not in _DTYPES:
        return f"stored as {module.weight.dtype}"
    if module.weight.numel() == 0:
        return "empty"
    return None


@lru_cache(maxsize=None)
def _source(cls: type) -> str:
    """The code of a class: T5's blocks, for one, ask a linear layer for `.weight.dtype`, which factors do not have."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # built in, or typed at a prompt
        return ""


def _why_no_linear(module: nn.Module, parameter: Tensor) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__}, a subclass of nn.Linear"
    if parameter.dim() == 3:
        return f"a stack of {parameter.shape[0]} matrices in one parameter (experts); not supported yet"
    return f"not a linear layer ({type(module).__name__})"


def _matched(model: nn.Module, patterns: Sequence[str] | None) -> set[str]:
    """All names that the patterns, or without patterns the default, select."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if patterns is not None:
        return {name for name in modules if name and any(fnmatchcase(name, pattern) for pattern in patterns)}
    lists = [f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    # a list's own entries are blocks; a linear layer that is an entry itself is a head
    return {name for name in modules for start in lists if name.startswith(start) and "." in name[len(start):]}


def _check_patterns(patterns: Sequence[str] | None, model: nn.Module) -> None:
    if patterns is None:
        return
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentError(f"layers must be a list of name patterns, found {patterns!r}")
    names = [name for name, module in model.named_modules(remove_duplicate=False) if is_linear(module)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ArgumentError(f"layers: {pattern!r} matches no linear layer; there are {_forms(names) or 'none'}")


def _forms(names) -> str:
    """Names with their numbers starred, so that a hundred layers fit one line."""
    return ", ".join(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))


def _storage_key(parameter: Tensor) -> tuple:
    """Equal for parameters that share memory; a meta or empty tensor has no address, there only the object itself counts."""
    if parameter.is_meta or parameter.numel() == 0 or hasattr(parameter, "full_tensor"):
        return (id(parameter),)
    return parameter.data_ptr(), parameter.device
