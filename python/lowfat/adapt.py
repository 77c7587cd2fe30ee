"""Adapters for a whole model: put on its linear layers with everything else frozen, merged, taken out, kept in a file."""
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from . import storage
from .errors import ArgumentError, FormatError, LowfatError, NumericsError
from .layers import adaptable, replace, skipped
from .structures import Wavelet
from .structures.structure import sizes
from .structures.wavelet import check_base, check_options
from .strict_json import read_json
from .tensor_file import read_tensors

ADAPTERS = {"wavelet": Wavelet}
TENSORS, DESCRIPTION, FORMAT = "adapter.safetensors", "adapter.json", 1


@dataclass
class AdaptReport:
    """What adapt() or load_adapter() did; to_json() is plain JSON."""
    method: str
    layers: dict[str, dict] = field(default_factory=dict)  # the adapter's options and its trained parameters, by name
    trained: list[str] = field(default_factory=list)  # other parameters that stay trainable
    skipped: dict[str, str] = field(default_factory=dict)  # every other weight matrix, and why
    parameters: int = 0  # trainable ones, of all kinds
    all_parameters: int = 0

    def to_json(self) -> dict:
        return asdict(self)


def adapt(model: nn.Module, method: str = "wavelet", *, layers: Sequence[str] | None = None,
          modules_to_save: Sequence[str] = (), **options) -> AdaptReport:
    """Puts an adapter on linear layers of the model, in place, and freezes everything but the adapters.

    layers: name patterns; by default every linear layer of the blocks, factorized ones included. modules_to_save: patterns
    of modules that are trained as they are, such as a new head. options: of the adapter (for wavelet rank, alpha, filter,
    levels, subbands, tiny; see Wavelet). What the model computes does not change before it is trained.

    Raises before anything changes: ArgumentError or ShapeError for options that there are not or that a layer cannot have,
    and for a pattern that matches nothing; UnsupportedError for a layer that has an adapter."""
    adapter = _adapter(method, options)
    found = adaptable(model, layers)
    for name, base in found.items():
        with _named(name):
            check_base(base)
            check_options(*sizes(base), **options)
    kept = _trained(model, modules_to_save, found)
    others = skipped(model, layers)
    _put(model, {name: (base, options) for name, base in found.items()}, adapter)
    _freeze(model, kept)
    return _report(model, method, others)


def unadapt(model: nn.Module, merge: bool = True) -> None:
    """Takes the adapters out: merged into the layers that they were on (one rounding), or with merge=False without a trace.
    Low-rank layers that shared a v have one each where an adapter went into it.

    Every parameter of the model can be trained again. Raises ArgumentError where there is none, and UnsupportedError before
    anything changes for a structure that cannot be merged into."""
    found = _adapters(model)
    for name, layer in found.items():
        with _named(name):
            if merge and not layer.merged:
                layer.check_mergeable()
    for name, layer in found.items():
        with _named(name):
            if merge is not layer.merged:
                layer.merge() if merge else layer.unmerge()
        replace(model, name, layer.base_layer)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def merge_adapters(model: nn.Module, keep_base: bool = False) -> None:
    """Merges every adapter into its base layer, in place; see Wavelet.merge. They stay, and unmerge_adapters() undoes it."""
    found = {name: layer for name, layer in _adapters(model).items() if not layer.merged}
    for name, layer in found.items():
        with _named(name):
            layer.check_mergeable()
    for name, layer in found.items():
        with _named(name):
            layer.merge(keep_base)


def unmerge_adapters(model: nn.Module) -> None:
    """Undoes merge_adapters(): with one rounding, or bit for bit where the base layers were kept."""
    for layer in _adapters(model).values():
        if layer.merged:
            layer.unmerge()


def save_adapter(model: nn.Module, out: str | Path, *, overwrite: bool = False) -> None:
    """Writes the adapters, and the other parameters that are trainable, without the rest of the model.

    Raises ArgumentError for a model without adapters or a folder that cannot be used, UnsupportedError for merged ones,
    StorageError when the disk fails; `out` stays as it was."""
    found = _adapters(model)
    inside = tuple(f"{name}." for name in found)
    trained = {name: parameter for name, parameter in model.named_parameters()
               if parameter.requires_grad and not name.startswith(inside)}
    tensors: dict[str, Tensor] = dict(trained)
    for name, layer in found.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict(prefix="").items()
                    if not key.startswith("base_layer.")}
    described = {"format": FORMAT, "method": "wavelet", "trained": sorted(trained), "layers": {
        name: {"in_features": layer.in_features, "out_features": layer.out_features} | layer.options()
        for name, layer in found.items()}}

    def fill(folder):
        storage.write_tensors(folder / TENSORS, tensors)
        storage.write_json(folder / DESCRIPTION, described)

    storage.write_folder(out, fill, overwrite=overwrite, size=sum(tensor.nbytes for tensor in tensors.values()))


def load_adapter(model: nn.Module, folder: str | Path) -> AdaptReport:
    """Puts on the model what save_adapter wrote, as adapt does: the model is the one that was adapted then, as it was.

    Adapters get the dtype and device of their base layers, bit for bit where that is the dtype they had. Raises before
    anything changes: ArgumentError (no folder), IntegrityError (digest, size), FormatError (content, or another model),
    NumericsError (NaN, infinity), UnsupportedError for a layer that has an adapter."""
    storage.restore(folder)
    folder = Path(folder)
    if not folder.is_dir():
        raise ArgumentError(f"{folder}: no such folder")
    storage.verify(folder)
    described, tensors = _read(folder)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    bases = {}
    for name, entry in described["layers"].items():
        if name not in modules:
            raise FormatError(f"{DESCRIPTION}: layers.{name} is no module of this model")
        with _named(name):
            check_base(modules[name])
        due = entry["in_features"], entry["out_features"]
        if (here := sizes(modules[name])) != due:
            raise FormatError(f"{DESCRIPTION}: layers.{name} is for {due[0]} to {due[1]} features, the model has {here[0]} "
                              f"to {here[1]}")
        bases[name] = modules[name], _options(entry)
    for name in described["trained"]:
        if name not in parameters or parameters[name].shape != tensors[name].shape:
            raise FormatError(f"{DESCRIPTION}: trained names {name}, which this model lacks or has in another shape")
    _put(model, bases, ADAPTERS[described["method"]], tensors)
    with torch.no_grad():
        for name in described["trained"]:
            parameters[name].copy_(tensors[name])
    _freeze(model, [parameters[name] for name in described["trained"]])
    return _report(model, described["method"], skipped(model))


# --- files ---

def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """(adapter.json, the tensors) of a folder, which fit each other; FormatError or NumericsError else."""
    described, tensors = read_json(folder / DESCRIPTION), read_tensors(folder / TENSORS)
    if not isinstance(described, dict) or set(described) != {"format", "method", "layers", "trained"}:
        raise FormatError(f"{DESCRIPTION}: must have format, method, layers and trained, and nothing else")
    if described["format"] != FORMAT or described["method"] not in list(ADAPTERS):
        raise FormatError(f"{DESCRIPTION}: format {described['format']!r} of method {described['method']!r}; this lowfat "
                          f"reads format {FORMAT} of {', '.join(ADAPTERS)}")
    layers, trained = described["layers"], described["trained"]
    if not isinstance(layers, dict) or not layers or not isinstance(trained, list):
        raise FormatError(f"{DESCRIPTION}: layers must be an object with at least one entry, trained a list of names")
    due = {}
    for name, entry in layers.items():
        due |= {f"{name}.{key}": tensor.shape for key, tensor in _empty(name, entry, described["method"]).items()}
    for name, shape in due.items():
        if name not in tensors or tensors[name].shape != shape or not tensors[name].is_floating_point():
            found = list(tensors[name].shape) if name in tensors else "nothing"
            raise FormatError(f"{TENSORS}: {name} must be numbers {list(shape)}, found {found}")
    if set(tensors) != due.keys() | set(map(str, trained)) or due.keys() & set(map(str, trained)):
        raise FormatError(f"{TENSORS}: holds other tensors than those of {DESCRIPTION}")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NumericsError(f"{TENSORS}: {name} holds NaN or infinity")
    return described, tensors


def _empty(name: str, entry, method: str) -> dict[str, Tensor]:
    """The tensors of the adapter that an entry describes, on the meta device."""
    here = f"{DESCRIPTION}: layers.{name}"
    if not isinstance(entry, dict) or not {"in_features", "out_features"} <= set(entry):
        raise FormatError(f"{here} must have in_features, out_features and the adapter's options")
    base = {"structure": "Linear", "in_features": entry["in_features"], "out_features": entry["out_features"]}
    options = _options(entry)
    try:
        layer = ADAPTERS[method](base, **options, device="meta")
    except (LowfatError, TypeError, RuntimeError) as error:  # TypeError: an unknown key; RuntimeError: sizes beyond int64
        raise FormatError(f"{here}: {error}") from error
    if layer.options() != options:
        raise FormatError(f"{here} is {options}, expected a form like {layer.options()}")
    return {key: tensor for key, tensor in layer.state_dict().items() if not key.startswith("base_layer.")}


def _options(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if key not in ("in_features", "out_features")}


# --- models ---

def _adapter(method: str, options: Mapping) -> type[Wavelet]:
    if method not in list(ADAPTERS):
        raise ArgumentError(f"method is {method!r}, must be one of {', '.join(ADAPTERS)}")
    known = list(inspect.signature(check_options).parameters)[2:]
    for name in options:
        if name not in known:
            raise ArgumentError(f"{name} is no option of {method}; there are {', '.join(known)}")
    return ADAPTERS[method]


def _trained(model: nn.Module, patterns: Sequence[str], found: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """The parameters of the modules that are trained as they are."""
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentError(f"modules_to_save must be a list of name patterns, found {patterns!r}")
    kept = []
    for pattern in patterns:
        names = {name: module for name, module in model.named_modules() if name and fnmatchcase(name, pattern)}
        if not names:
            heads = ", ".join(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name, _ in model.named_children()))
            raise ArgumentError(f"modules_to_save: {pattern!r} matches no module; the outermost are {heads}")
        for name in names:
            if inside := next((other for other in found if f"{other}.".startswith(f"{name}.")), None):
                raise ArgumentError(f"modules_to_save: {name} holds {inside}, which gets an adapter; take one or the other")
        kept += [parameter for module in names.values() for parameter in module.parameters()]
    return kept


def _put(model: nn.Module, bases: Mapping[str, tuple[nn.Module, Mapping]], adapter: type[Wavelet],
         tensors: Mapping[str, Tensor] | None = None) -> None:
    """All adapters are made before the first takes its place; where one cannot be, the model is as it was."""
    before = [(parameter, parameter.requires_grad) for base, _ in bases.values() for parameter in base.parameters()]
    made = {}
    try:
        for name, (base, options) in bases.items():
            with _named(name):
                made[name] = adapter(base, **options, device=None if tensors is None else "meta")
                if tensors is not None:
                    found = {key: tensors.get(f"{name}.{key}") for key in ("v", "u", "gain")}
                    _fill(made[name], {key: tensor for key, tensor in found.items() if tensor is not None})
    except BaseException:
        for parameter, required in before:
            parameter.requires_grad_(required)
        raise
    for name, layer in made.items():
        replace(model, name, layer)


def _fill(layer: Wavelet, tensors: Mapping[str, Tensor]) -> None:
    like = next(layer.base_layer.parameters())
    for key, tensor in tensors.items():
        tensor = tensor.to(like.device, like.dtype, copy=True)  # no view of the file, which may go
        setattr(layer, key, tensor if key in layer._buffers else nn.Parameter(tensor))


def _freeze(model: nn.Module, kept: Sequence[nn.Parameter]) -> None:
    """Everything but the adapters and what is kept."""
    model.requires_grad_(False)
    for layer in _adapters(model).values():
        for _, parameter in layer.named_parameters(recurse=False):
            parameter.requires_grad_(True)
    for parameter in kept:
        parameter.requires_grad_(True)


def _adapters(model: nn.Module) -> dict[str, Wavelet]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, tuple(ADAPTERS.values()))}
    if not found:
        raise ArgumentError("the model has no adapters; adapt() it first")
    if "" in found:
        raise ArgumentError("model is an adapter itself; use its merge(), unmerge() and base_layer")
    return found


def _report(model: nn.Module, method: str, others: dict[str, str]) -> AdaptReport:
    report = AdaptReport(method, skipped=others)
    found = _adapters(model)
    inside = tuple(f"{name}." for name in found)
    for name, layer in found.items():
        count = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
        report.layers[name] = layer.options() | {"parameters": count}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    report.trained = [name for name in trainable if not name.startswith(inside)]
    report.parameters = sum(parameter.numel() for parameter in trainable.values())
    report.all_parameters = sum(parameter.numel() for parameter in model.parameters())
    return report


@contextmanager
def _named(name: str) -> Iterator[None]:
    """An error of ours with the layer's name before it."""
    try:
        yield
    except LowfatError as error:
        raise type(error)(f"{name}: {error}") from error
