"""What a checkpoint must say and hold before anything is built from it: config.json, index, headers of the weight files."""
import re
from pathlib import Path

import torch
from torch import nn

from .errors import CompatibilityError, FormatError, LowfatError
from .layers import is_linear, sizes
from .manifest import plain_path
from .strict_json import read_json
from .structures import STRUCTURES, Structure
from .tensor_file import read_header

FORMAT = 1
WEIGHTS = "lowfat.safetensors"              # never a name that transformers looks for by itself: without lowfat it must stop
INDEX = "lowfat.safetensors.index.json"     # the same for weights in several files
SHARD = re.compile(r"lowfat-\d{5}-of-\d{5}\.safetensors")
MAX_INDEX = 64 << 20  # bytes
KEYS = {"quant_method", "format", "weights", "modules", "ties"}
SHRUNK = "shrunk"  # the one key that may be missing: {block: units it has}, where config.json says another number
CODE_KEYS = {"auto_map", "custom_pipelines"}  # they name Python files to run
# safetensors' names of the structures' buffers
INDEX_DTYPES = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
HERE = "config.json: quantization_config"


def check_quantization(config) -> None:
    """Raises FormatError for what is no quantization_config of a lowfat checkpoint, CompatibilityError for a newer one."""
    if not isinstance(config, dict):
        raise FormatError(f"{HERE} is missing; this is no lowfat checkpoint")
    if config.get("quant_method") != "lowfat":
        raise FormatError(f"{HERE}.quant_method is {config.get('quant_method')!r}, not 'lowfat'")
    found = config.get("format")
    if type(found) is not int or found < 1:
        raise FormatError(f"{HERE}.format is {found!r}, expected a whole number from 1")
    if found > FORMAT:
        raise CompatibilityError(f"{HERE}.format is {found}, this lowfat reads up to {FORMAT}; a newer lowfat is needed")
    if set(config) - {SHRUNK} != KEYS:
        unknown, missing = sorted(set(config) - KEYS - {SHRUNK}), sorted(KEYS - set(config))
        raise FormatError(f"{HERE} has unknown keys {unknown}" if unknown else f"{HERE} lacks {missing}")
    if config["weights"] not in (WEIGHTS, INDEX):
        raise FormatError(f"{HERE}.weights is {config['weights']!r}, expected {WEIGHTS} or {INDEX}")
    if not isinstance(config["modules"], dict):
        raise FormatError(f"{HERE}.modules is not an object")
    for name, spec in config["modules"].items():
        build(name, spec)
    shrunk = config.get(SHRUNK, {})
    if not isinstance(shrunk, dict) or not all(type(count) is int and count >= 1 for count in shrunk.values()):
        raise FormatError(f"{HERE}.{SHRUNK} is {shrunk!r}, expected numbers of units by block")
    if not isinstance(config["ties"], dict):
        raise FormatError(f"{HERE}.ties is not an object")
    for pair in config["ties"].items():
        if len({_shape(name, config["modules"]) for name in pair}) > 1:
            raise FormatError(f"{HERE}.ties makes {pair[0]} and {pair[1]} one, their shapes differ")


def build(name: str, spec) -> Structure:
    """The layer that an entry of modules describes, on the meta device; FormatError names the entry and what is wrong."""
    if not isinstance(spec, dict):
        raise FormatError(f"{HERE}.modules.{name} is not an object")
    shape = {key: value for key, value in spec.items() if key != "structure"}
    if spec.get("structure") not in list(STRUCTURES):  # a list compares where a dict would need a hash
        raise FormatError(f"{HERE}.modules.{name}.structure is {spec.get('structure')!r}; known: {', '.join(STRUCTURES)}")
    try:
        layer = STRUCTURES[spec["structure"]](**shape, device="meta")
    except (LowfatError, TypeError, RuntimeError) as error:  # TypeError: an unknown key; RuntimeError: sizes beyond int64
        raise FormatError(f"{HERE}.modules.{name}: {error}") from error
    if layer.shape() != shape:  # a key left out, or a value that was converted on the way
        raise FormatError(f"{HERE}.modules.{name} is {shape}, expected a form like {layer.shape()}")
    return layer


def _shape(name, modules: dict[str, dict]) -> torch.Size:
    """The shape of the parameter that ties call `name`."""
    owners = [module for module in modules if isinstance(name, str) and name.startswith(f"{module}.")]
    for module in owners:
        parameters = dict(build(module, modules[module]).named_parameters())
        if (key := name.removeprefix(f"{module}.")) in parameters:
            return parameters[key].shape
    raise FormatError(f"{HERE}.ties names {name!r}, which is no parameter of an entry of modules")


def check_config(config) -> None:
    """Raises FormatError for a config.json that names code to run, at any depth."""
    if not isinstance(config, dict):
        raise FormatError("config.json: not an object")
    level = [config]
    while level:
        for part in level:
            for key, value in part.items():
                kernel = key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value)
                if key in CODE_KEYS or kernel:  # transformers fetches and runs a kernel named "owner/repository"
                    raise FormatError(f"config.json: {key} names code; lowfat runs none that comes with a checkpoint")
        level = [value for part in level for value in part.values() if isinstance(value, dict)]


def check_depth(config: dict, tensors: int) -> None:
    """Every block has a tensor, so no number of layers exceeds that of the tensors; FormatError, before a model is built."""
    for key, value in config.items():
        if isinstance(value, dict):
            if key != "quantization_config":  # whose numbers are sizes, and held against the model
                check_depth(value, tensors)
        elif "layer" in key and type(value) is int and value > tensors:
            raise FormatError(f"config.json: {key} is {value}, the weights hold {tensors} tensors")


def weight_files(folder: Path, weights: str) -> list[Path]:
    """The files that hold the weights; FormatError for an index that names anything else."""
    if weights == WEIGHTS:
        return [folder / WEIGHTS]
    index = read_json(folder / INDEX, MAX_INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise FormatError(f"{INDEX}: weight_map is missing")
    for tensor, name in index["weight_map"].items():
        if not isinstance(name, str) or not SHARD.fullmatch(plain_path(name, INDEX)):
            raise FormatError(f"{INDEX}: weight_map.{tensor} is {name!r}, expected lowfat-00001-of-00002.safetensors")
    files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    for file in files:
        listed = {tensor for tensor, name in index["weight_map"].items() if name == file.name}
        if (differing := listed ^ set(read_header(file))):
            raise FormatError(f"{INDEX}: weight_map and {file.name} differ in {sorted(differing)[0]}")
    return files


def read_headers(files: list[Path]) -> dict[str, tuple[str, dict]]:
    """{tensor: (file name, header entry)} over all files; FormatError for a tensor that is stored twice."""
    tensors = {}
    for file in files:
        for name, span in read_header(file).items():
            if name in tensors:
                raise FormatError(f"{file.name}: tensor {name} is stored in {tensors[name][0]} too")
            tensors[name] = file.name, span
    return tensors


def check_tensors(model: nn.Module, tensors: dict[str, tuple[str, dict]], *, exact: bool) -> None:
    """Holds the headers against a model on the meta device: names, shapes, kinds of number. Raises FormatError.

    exact: no tensor may be missing or left over. Else only the factors must be there: a base model may load from a head's
    checkpoint.
    """
    factors = {f"{name}.{key}" for name, module in model.named_modules() if isinstance(module, Structure)
               for key in module.state_dict()}
    shared = {}
    for target, source in model.all_tied_weights_keys.items():
        shared.setdefault(source, {source}).add(target)
    shared = {name: group for group in shared.values() for name in group}
    unsaved = set(model._keys_to_ignore_on_save or ())
    used = set()
    for name, due in model.state_dict(keep_vars=True).items():
        found = here(model, name, tensors)
        if found is None:
            elsewhere = any(here(model, other, tensors) for other in shared.get(name, ()))
            if (exact or name in factors) and not elsewhere and name not in unsaved:
                raise FormatError(f"{_source(tensors)}: tensor {name} is missing")
            continue
        used.add(found)
        file, span = tensors[found]
        if tuple(span["shape"]) != tuple(due.shape):
            raise FormatError(f"{file}: shape of {found} is {span['shape']}, config.json implies {list(due.shape)}")
        is_index = name in factors and not due.is_floating_point()  # of factors: what an index is stored as is ours to say
        if ("F" in span["dtype"]) != due.is_floating_point() or (is_index and span["dtype"] != INDEX_DTYPES[due.dtype]):
            raise FormatError(f"{file}: dtype of {found} is {span['dtype']}, the model needs {due.dtype}")
    if exact and (extra := sorted(set(tensors) - used)):
        raise FormatError(f"{tensors[extra[0]][0]}: tensor {extra[0]} is no part of {type(model).__name__}")


def here(model: nn.Module, name: str, names) -> str | None:
    """`name` as `names` spell it: a head model calls its base `bert.x` what the base model itself calls `x`."""
    prefix = f"{model.base_model_prefix}."
    return next((form for form in (name, prefix + name, name.removeprefix(prefix)) if form in names), None)


def check_layer(name: str, layer: Structure, dense: nn.Module) -> None:
    """Raises FormatError unless `layer` can stand in for `dense`, the module of that name in the model."""
    if not is_linear(dense):
        raise FormatError(f"{HERE}.modules.{name} replaces a {type(dense).__name__}, only linear layers can be replaced")
    if sizes(layer) != sizes(dense):
        raise FormatError(f"{HERE}.modules.{name} has in_features {layer.in_features} and out_features "
                          f"{layer.out_features}, the model has {sizes(dense)[0]} and {sizes(dense)[1]}")


def _source(tensors: dict) -> str:
    files = sorted({file for file, _ in tensors.values()})
    return files[0] if len(files) == 1 else f"{WEIGHTS} or its parts"
