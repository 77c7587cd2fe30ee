"""Checkpoints: a Hugging Face folder with factors in safetensors, each layer's structure in config.json, and manifest.json.

Plain transformers finds no weight file by a name it knows in such a folder, and stops; after `import lowfat` it opens it.
"""
import copy
import functools
import re
import tempfile
from pathlib import Path

import torch
from torch import nn

from . import manifest, storage
from .errors import ArgumentError, FormatError, IntegrityError, LowfatError, NumericsError, UnsupportedError
from .on_import import when_imported
from .pooling import carry_pooling
from .shrink import recorded
from .strict_json import read_json
from .structures import STRUCTURES, LowRankGroup, Structure, keep_indices_local, structures
from .validate import (FORMAT, INDEX, SHRUNK, WEIGHTS, check_config, check_depth, check_quantization, read_headers,
                       weight_files)

# files of an earlier checkpoint that must not stay in a folder with a new one: transformers would find them first
STALE = re.compile(r"(lowfat|model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?|manifest\.json")
SHARD_SIZE = "5GB"


def save(model: nn.Module, out: str | Path, *, tokenizer=None, overwrite: bool = False,
         max_shard_size: int | str = SHARD_SIZE, facts: dict | None = None) -> None:
    """Writes a transformers model with factorized layers, its configs and its tokenizer; facts: plain JSON for the manifest.

    Raises ArgumentError for a model or folder that cannot be used, StorageError when the disk fails; `out` stays as it was.
    """
    attach(model)

    def fill(folder):
        _fill(model, folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    storage.write_folder(out, fill, overwrite=overwrite, facts=_versions() | (facts or {}), size=_stored_bytes(model))


def load(folder: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
         auto_class: type | str | None = None, finite: bool = True) -> nn.Module:
    """The model of a folder that `save` wrote, in eval mode; each tensor bit for bit as it was saved, unless dtype is given.

    auto_class: another class than the one that was saved (`AutoModel`, ...). finite=False accepts NaN and infinity.
    Raises ArgumentError (no folder), IntegrityError (digest, size), CompatibilityError (newer format), FormatError
    (content), NumericsError (NaN, infinity); nothing is built before all files are checked.
    """
    from . import quantizer

    storage.restore(folder)
    folder = Path(folder).absolute()  # it is how the files beside the model are found later
    if not folder.is_dir():
        raise ArgumentError(f"{folder}: no such folder")
    _check_kind(folder)
    listed = storage.verify(folder)["files"]
    config = read_json(folder / "config.json")
    check_config(config)
    check_quantization(config.get("quantization_config"))
    files = weight_files(folder, config["quantization_config"]["weights"])
    for name in ("config.json", *(file.name for file in files)):
        if name not in listed:
            raise IntegrityError(f"{name}: not listed in {manifest.NAME}")
    check_depth(config, len(read_headers(files)))
    saved, wanted = _saved_class(config), _wanted_class(auto_class)
    token = quantizer.exact.set(wanted is None)
    try:
        # use_safetensors: never a pickle; local_files_only: nothing is looked up elsewhere
        model = (wanted or saved).from_pretrained(folder, dtype=dtype or "auto", use_safetensors=True, local_files_only=True)
    except (LowfatError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a strange value in a config makes of the code of one of 400 models
        raise FormatError(f"config.json: {(wanted or saved).__name__} cannot be built from it: {error}") from error
    finally:
        quantizer.exact.reset(token)
    _compare(model, files, keep_dtype=dtype is None, finite=finite)
    return model if device is None else model.to(device)


@torch.no_grad()
def export_dense(model: nn.Module, out: str | Path, *, tokenizer=None, overwrite: bool = False,
                 max_shard_size: int | str = SHARD_SIZE) -> None:
    """Multiplies all factors out and writes a plain Hugging Face folder, which opens without lowfat. UnsupportedError for a
    model whose blocks have sizes that transformers' config cannot say."""
    from transformers.modeling_utils import PreTrainedModel

    check_model(model)
    if shrunk := recorded(model):
        name, count = next(iter(shrunk.items()))
        raise UnsupportedError(f"{name} has {count} units, which transformers' config cannot say; use save()")
    storage.check_target(out, overwrite)  # before the multiplication
    config = copy.deepcopy(model.config)
    _forget(config)
    with torch.device("meta"):
        dense = type(model)._from_config(config, dtype=model.dtype)
    if model.can_generate():
        dense.generation_config = model.generation_config
    state = model.state_dict()
    for name, layer in structures(model, remove_duplicate=False):
        for key in layer.state_dict():
            if key != "bias":
                del state[f"{name}.{key}"]
        is_linear = type(dense.get_submodule(name)) is nn.Linear
        state[f"{name}.weight"] = layer.dense() if is_linear else layer.dense().T  # Conv1D stores [k, n]
        if layer.bias is not None:  # an adapter's is its base layer's
            state[f"{name}.bias"] = layer.bias.detach()

    def fill(folder):
        _original(PreTrainedModel)(dense, folder, state_dict=state, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        carry_pooling(model, folder)

    size = sum(parameter.numel() for parameter in dense.parameters()) * model.dtype.itemsize
    storage.write_folder(out, fill, overwrite=overwrite, facts=_versions(), size=size)


def attach(model: nn.Module) -> None:
    """Records the factorized layers in `model.config` and makes `model.save_pretrained` write what `save` writes."""
    from . import quantizer

    check_model(model)
    _replace_save_pretrained()
    modules, ties = describe(model)
    keep_indices_local(model)
    quantizer.declare_ties(model, ties)
    model.config.quantization_config = quantizer.FactorConfig(modules, ties, shrunk=recorded(model))


def describe(model: nn.Module) -> tuple[dict[str, dict], dict[str, str]]:
    """What config.json says of a model: {module: {"structure", **shape}} and {parameter: the parameter that it is}."""
    modules, ties, first = {}, {}, {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, LowRankGroup):
            raise UnsupportedError(f"{name} is a LowRankGroup; put its layers() back before saving")
    for name, layer in structures(model, remove_duplicate=False):
        if type(layer).__name__ not in STRUCTURES:
            raise UnsupportedError(f"{name} is a {type(layer).__name__}; known structures: {', '.join(STRUCTURES)}")
        modules[name] = {"structure": type(layer).__name__, **layer.shape()}
        for key, parameter in layer.named_parameters(remove_duplicate=False):
            if (other := first.setdefault(id(parameter), f"{name}.{key}")) != f"{name}.{key}":
                ties[f"{name}.{key}"] = other
    return modules, ties


def _fill(model: nn.Module, folder: Path, *, max_shard_size: int | str, state_dict: dict | None = None, **options) -> None:
    """transformers writes configs and weights; then the weights get our names and config.json our section."""
    from transformers.modeling_utils import PreTrainedModel

    indices = {f"{name}.{key}": buffer.clone() for name, layer in model.named_modules(remove_duplicate=False)
               if isinstance(layer, Structure) for key, buffer in layer.named_buffers(recurse=False)}
    if indices:  # a copy for every name of a layer: transformers knows ties of parameters alone
        state_dict = {**(model.state_dict() if state_dict is None else state_dict), **indices}
    # save_original_format=False: tensors keep the model's own names, so that a reader can hold them against config.json
    _original(PreTrainedModel)(model, folder, max_shard_size=max_shard_size, save_original_format=False,
                               state_dict=state_dict, **options)
    for path in sorted(folder.glob("model*.safetensors")):
        path.rename(folder / path.name.replace("model", "lowfat", 1))
    weights, index = WEIGHTS, folder / "model.safetensors.index.json"
    if index.exists():
        weights, content = INDEX, read_json(index, manifest.MAX_BYTES)
        content["weight_map"] = {name: file.replace("model", "lowfat", 1) for name, file in content["weight_map"].items()}
        storage.write_json(folder / INDEX, content)
        index.unlink()
    modules, ties = describe(model)
    config = read_json(folder / "config.json")
    config["quantization_config"] = {"quant_method": "lowfat", "format": FORMAT, "weights": weights, "modules": modules,
                                     "ties": ties} | ({SHRUNK: shrunk} if (shrunk := recorded(model)) else {})
    storage.write_json(folder / "config.json", config)
    carry_pooling(model, folder)


def _replace_save_pretrained() -> None:
    """Trainer, push_to_hub and users call `model.save_pretrained`; for a factorized model it writes what `save` writes.

    Replaced on the class: a method on each instance would keep models alive in a cycle, and an inner model (`model.bert`)
    without it would be saved under the names that transformers opens with random weights.
    """
    from transformers.modeling_utils import PreTrainedModel

    original = PreTrainedModel.save_pretrained
    if hasattr(original, "without_lowfat"):
        return

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *arguments, **options):
        if any(isinstance(module, (Structure, LowRankGroup)) for module in self.modules()) or recorded(self):
            return _save_pretrained(self, save_directory, *arguments, **options)
        _forget(self.config)  # a config shared with a factorized model must not mark this one
        return original(self, save_directory, *arguments, **options)

    save_pretrained.without_lowfat = original
    PreTrainedModel.save_pretrained = save_pretrained


def _save_pretrained(model, out, is_main_process=True, state_dict=None, push_to_hub=False, max_shard_size=SHARD_SIZE,
                     **options) -> None:
    """`save` as save_pretrained does it: makes parents, replaces an old checkpoint, keeps other files of the folder."""
    for name in ("variant", "distributed_checkpoint"):
        if options.pop(name, None):
            raise UnsupportedError(f"save_pretrained: {name} is not supported for a factorized model")
    for name in ("save_original_format", "save_peft_format"):
        options.pop(name, None)
    attach(model)
    fill = functools.partial(_fill, model, max_shard_size=max_shard_size, state_dict=state_dict)
    if not is_main_process:  # takes part in gathering a sharded model, writes nothing
        with tempfile.TemporaryDirectory() as scratch:
            _original(type(model))(model, scratch, is_main_process=False, state_dict=state_dict)
        return
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    storage.write_folder(out, fill, facts=_versions(), size=_stored_bytes(model),
                         keep=lambda path: not (len(path.parts) == 1 and STALE.fullmatch(path.name)))
    if push_to_hub:
        repository = options.pop("repo_id", Path(out).name)
        model.push_to_hub(repository, max_shard_size=max_shard_size, **options)


def _original(cls):
    return getattr(cls.save_pretrained, "without_lowfat", cls.save_pretrained)


def check_model(model) -> None:
    """Raises ArgumentError or UnsupportedError for a model whose checkpoint could not be written."""
    from transformers.modeling_utils import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(f"model must be a transformers model, found {type(model).__name__}")
    other = getattr(model.config, "quantization_config", None)
    method = other.get("quant_method") if isinstance(other, dict) else getattr(other, "quant_method", "lowfat")
    if other is not None and method != "lowfat":
        raise UnsupportedError(f"model is quantized with {method}; lowfat saves float models only")


def _forget(config) -> None:
    """Removes our mark from a config."""
    mark = getattr(config, "quantization_config", None)
    if (mark.get("quant_method") if isinstance(mark, dict) else getattr(mark, "quant_method", None)) == "lowfat":
        del config.quantization_config


def _check_kind(folder: Path) -> None:
    """Says of a folder that is something else what it is, before a missing manifest does."""
    if not (folder / "config.json").exists():
        raise FormatError(f"config.json: missing in {folder}; not a model")
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and "quantization_config" not in config and not (folder / manifest.NAME).exists():
        raise FormatError(f"config.json: has no quantization_config; {folder} is no lowfat checkpoint, use transformers")
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        for path in sorted(folder.iterdir()):
            if path.suffix in manifest.PICKLES:
                raise FormatError(f"{path.name}: pickle files are never read; {WEIGHTS} is missing")
    if (folder / "adapter_config.json").exists():  # transformers would go and load whatever it names
        raise FormatError("adapter_config.json: an adapter is no part of a lowfat checkpoint")


def _saved_class(config: dict) -> type:
    """The class that config.architectures names, looked up in transformers."""
    import transformers

    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise FormatError(f"config.json: architectures is {names!r}, expected one class name")
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)) or found.config_class is None:
        raise FormatError(f"config.json: architectures names {names[0]}, unknown to transformers {transformers.__version__}")
    if (due := found.config_class.model_type) != config.get("model_type"):
        raise FormatError(f"config.json: model_type is {config.get('model_type')!r}, {names[0]} is a {due}")
    return found


def _wanted_class(auto_class: type | str | None) -> type | None:
    import transformers

    found = getattr(transformers, auto_class, None) if isinstance(auto_class, str) else auto_class
    if auto_class is not None and not hasattr(found, "from_pretrained"):
        raise ArgumentError(f"auto_class must be a transformers model class, found {auto_class!r}")
    return found


@torch.no_grad()
def _compare(model: nn.Module, files: list[Path], *, keep_dtype: bool, finite: bool) -> None:
    """Holds every tensor of the finished model against the file: some transformers releases initialized loaded ones anew."""
    from safetensors import safe_open

    parameters, held = dict(model.named_parameters(remove_duplicate=False)), model.state_dict(keep_vars=True)
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                stored = file.get_tensor(name)
                if name not in held:  # another class was asked for
                    continue
                if finite and name in parameters and not stored.isfinite().all():
                    raise NumericsError(f"{path.name}: {name} holds NaN or infinity; finite=False loads it all the same")
                if not keep_dtype:
                    continue
                if held[name].dtype != stored.dtype:  # transformers gives a whole model one dtype
                    held[name].data = stored
                if not torch.equal(_bits(held[name]), _bits(stored)):
                    raise IntegrityError(f"{path.name}: {name} is not in the model as it is in the file")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)  # NaN equals itself, 0 does not equal -0


def _stored_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _versions() -> dict:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _register() -> None:
    from . import quantizer  # noqa: F401  importing it registers; where this runs amid its import, nothing more may be asked


when_imported("transformers.quantizers", _register)
when_imported("transformers.modeling_utils", _replace_save_pretrained)
