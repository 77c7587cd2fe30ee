"""How transformers opens a lowfat checkpoint by itself: the structures take their places before the weights are read.

Imports transformers; everything else in lowfat imports this module inside functions.
"""
import os
from contextvars import ContextVar
from pathlib import Path

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import manifest
from .blocks import group_blocks
from .errors import FormatError, IntegrityError, LowfatError
from .layers import replace
from .shrink import resize
from .strict_json import read_json
from .structures import Structure, Wavelet, keep_indices_local
from .validate import (FORMAT, INDEX, WEIGHTS, build, check_config, check_layer, check_quantization, check_tensors, here,
                       read_headers, weight_files)

# set while `lowfat.load` runs: it has read every digest already, and accepts neither missing nor additional tensors
exact: ContextVar[bool] = ContextVar("exact", default=False)


class FactorConfig(QuantizationConfigMixin):
    """quantization_config of a lowfat checkpoint.

    modules: {name: {"structure": "LowRank", **layer.shape()}}. ties: {parameter: parameter it is}. weights: the file.
    shrunk: {block: its heads or neurons}, where they are not as many as the rest of config.json says.
    """

    def __init__(self, modules: dict, ties: dict, weights: str = WEIGHTS, format: int = FORMAT, quant_method: str = "lowfat",
                 shrunk: dict | None = None, **unknown):
        self.quant_method, self.format, self.weights, self.modules, self.ties = quant_method, format, weights, modules, ties
        if shrunk:
            self.shrunk = shrunk
        check_quantization({**self.to_dict(), **unknown})

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        check_quantization(config_dict)  # before the call, so that a missing key is named like any other mistake
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)


class FactorQuantizer(HfQuantizer):
    """Quantizes nothing: a quantizer is what transformers lets replace modules before the weights are read."""

    requires_calibration = True  # transformers then refuses a dense checkpoint with this config

    def update_attn_implementation(self, config):
        """The first hook that sees the model's config, and before files are looked up: names our file. (From 5.18 on.)"""
        config.transformers_weights = self.quantization_config.weights
        return config

    def update_tp_plan(self, config):
        """The same for transformers 5.17, which calls this one at that point."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        """The model is on the meta device here."""
        files = [Path(file) for file in checkpoint_files or ()]
        if files and not exact.get():
            _check_folder(files, self.quantization_config.weights)
        ties = self.quantization_config.ties
        modules = dict(model.named_modules(remove_duplicate=False))
        found = _resize(model, getattr(self.quantization_config, "shrunk", {}), modules)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, spec in self.quantization_config.modules.items():
            if (local := here(model, name, modules)) is not None:
                layer = build(name, spec)
                check_layer(name, layer, modules[local])
                # GPT-2 initializes `c_proj.weight` by that name even after loading: let it find one, without memory
                layer.weight = torch.empty(layer.out_features, layer.in_features, device="meta")
                replace(model, local, layer)
                found += 1
            elif exact.get():
                raise FormatError(f"config.json: quantization_config.modules.{name} is no module of {type(model).__name__}")
        if self.quantization_config.modules and not found:
            raise FormatError(f"config.json: no entry of quantization_config.modules is a module of {type(model).__name__}")
        keep_indices_local(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        declare_ties(model, {here(model, name, parameters): here(model, source, parameters) for name, source in ties.items()
                             if here(model, name, parameters) and here(model, source, parameters)})
        if files:
            check_tensors(model, read_headers(files), exact=exact.get())

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, layer in model.named_modules(remove_duplicate=False):
            if not isinstance(layer, Structure):
                continue
            layer.__dict__.pop("weight", None)
            for key, parameter in layer.named_parameters(recurse=False):
                loaded = getattr(parameter, "_is_hf_initialized", False) or f"{name}.{key}" in model.all_tied_weights_keys
                if not loaded:
                    raise IntegrityError(f"{self.quantization_config.weights}: {name}.{key} was not loaded")
            try:
                layer.check_indices()
            except LowfatError as error:
                raise type(error)(f"{self.quantization_config.weights}: {name}: {error}") from error
            if isinstance(layer, Wavelet):
                layer.base_layer.requires_grad_(False)  # loading made new parameters
        # an ordinary float model from here on: Trainer, .half() and .float() refuse "quantized" ones
        for name in ("hf_quantizer", "quantization_method"):
            if hasattr(model, name):
                delattr(model, name)
        model.is_quantized = False
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                module.config._is_quantized = False
        group_blocks(model)
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _resize(model, shrunk: dict[str, int], modules: dict) -> int:
    """How many blocks have other sizes now than their config says."""
    counts = {}
    for name, count in shrunk.items():
        if (local := here(model, name, modules)) is not None:
            counts[local] = count
        elif exact.get():
            raise FormatError(f"config.json: quantization_config.shrunk.{name} is no module of {type(model).__name__}")
    try:
        resize(model, counts)
    except LowfatError as error:
        raise FormatError(f"config.json: quantization_config.shrunk: {error}") from error
    return len(counts)


def declare_ties(model, ties: dict[str, str]) -> None:
    """Tells transformers which parameters are one and the same, for saving and for loading; those of an earlier call go."""
    old = getattr(model, "_lowfat_ties", {})
    for name in ("_tied_weights_keys", "all_tied_weights_keys"):
        known = {key: to for key, to in (getattr(model, name) or {}).items() if old.get(key) != to}
        setattr(model, name, known | ties)
    model._lowfat_ties = dict(ties)


def _check_folder(files: list[Path], weights: str) -> None:
    """Digests of config.json and of the weights, and the strict reading of both, for `from_pretrained`."""
    folder = files[0].parent
    if folder.parent.name == "snapshots" and not (folder / manifest.NAME).exists():  # transformers fetched what it knows of
        from huggingface_hub import hf_hub_download

        repository = folder.parents[1].name.removeprefix("models--").replace("--", "/")
        hf_hub_download(repository, manifest.NAME, revision=folder.name, cache_dir=folder.parents[2])
    listed = manifest.read_manifest(folder)["files"]
    due = {"config.json", weights, *(os.path.relpath(file, folder) for file in files)}
    if weights == INDEX:
        due |= {file.name for file in weight_files(folder, weights)}
    for name in sorted(due - set(listed)):
        raise IntegrityError(f"{name}: not listed in {manifest.NAME}")
    manifest.check(folder, only=due)
    check_config(read_json(folder / "config.json"))


if "lowfat" not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config("lowfat")(FactorConfig)
    register_quantizer("lowfat")(FactorQuantizer)
