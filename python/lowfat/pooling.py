"""How the hidden states of a text become its embedding: as the files of sentence-transformers beside the model say.

modules.json lists what follows the model, 1_Pooling/config.json says how to pool. Where neither is, it is by mean.
"""
import logging
import shutil
from pathlib import Path

from . import hub
from .errors import ArgumentError, FormatError, StorageError, UnsupportedError
from .manifest import plain_path
from .strict_json import read_json

log = logging.getLogger("lowfat")
MODULES, CONFIG = "modules.json", "config.json"
_PROMPTS, _READING = "config_sentence_transformers.json", "sentence_bert_config.json"
_FILES = (MODULES, _PROMPTS, _READING)
_NO_CHANGE = ("Transformer", "Pooling", "Normalize")  # that embeddings are compared by cosine makes the last one nothing
_CARRIED = (".json", ".safetensors", ".txt")
_FETCHED = (*_FILES, *(f"[1-9]_*/*{suffix}" for suffix in _CARRIED))  # 0_Transformer holds the weights once more


def pooling_of(model) -> str:
    """"mean" or "cls", from the folder or hub name that the model was opened from.

    UnsupportedError: another mode, or a module that changes embeddings further; FormatError: files that say neither.
    Warns where the files cannot be had, and of what else they ask for and is not done."""
    folder = _folder(model, "texts are pooled by mean, which may not be what it was trained for")
    if folder is None:
        return "mean"
    modules = _modules(folder)
    for kind, path in modules:
        if kind not in _NO_CHANGE:
            raise UnsupportedError(f"{folder / MODULES}: {kind} after the pooling is not supported")
    _warn_of_the_rest(folder)
    listed = next((path for kind, path in modules if kind == "Pooling"), None)
    file = folder / ("1_Pooling" if listed is None else listed) / CONFIG
    if not file.is_file():
        if listed is not None:
            raise FormatError(f"{file}: missing, and {MODULES} lists it")
        return "mean"
    mode = _mode(file)
    if mode not in ("mean", "cls"):
        raise UnsupportedError(f"{file}: pooling by {mode} is not supported; mean and cls are")
    return mode


def pooling_files(folder: Path) -> dict[str, Path]:
    """The files of sentence-transformers in a model's folder, by their path in it: what a smaller model still needs."""
    folders = {folder / "1_Pooling", *(folder / path for _, path in _modules(folder) if path)}
    inside = [file for path in sorted(folders) if path.is_dir() for file in sorted(path.iterdir())]
    found = [folder / name for name in _FILES] + [file for file in inside if file.suffix in _CARRIED]
    return {file.relative_to(folder).as_posix(): file for file in found if file.is_file()}


def carry_pooling(model, target: Path) -> None:
    """Copies those files from where the model was opened; warns where they cannot be had.

    The hub is asked for encoders without a head alone, as sentence-transformers keeps them."""
    if (folder := _folder(model, "they are not copied", asks_hub=model.base_model is model)) is None:
        return
    for name, file in pooling_files(folder).items():
        (target / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(file, target / name)


def _folder(model, otherwise: str, *, asks_hub: bool = True) -> Path | None:
    """Where the files beside a model are; None where there are none. otherwise: what follows, if they cannot be had.

    A model that transformers took from the hub has them there only: it fetches none that it does not read itself."""
    name = getattr(model.config, "name_or_path", "")
    if name and Path(name).is_dir():
        return Path(name)
    if not name or not asks_hub:
        return None
    try:
        return hub.beside(name, MODULES, _FETCHED)
    except (ArgumentError, StorageError) as error:
        log.warning("sentence-transformers files of the model cannot be read, if it has any; %s (%s)", otherwise, error)
        return None


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(last part of the class, folder inside the model's) of each module."""
    if not (folder / MODULES).is_file():
        return []
    listed = read_json(folder / MODULES)
    if not isinstance(listed, list) or not all(isinstance(entry, dict) and isinstance(entry.get("type"), str)
                                               and isinstance(entry.get("path"), str) for entry in listed):
        raise FormatError(f"{folder / MODULES}: needs a list of modules, each with type and path")
    return [(entry["type"].rpartition(".")[2], entry["path"] and plain_path(entry["path"], MODULES)) for entry in listed]


def _warn_of_the_rest(folder: Path) -> None:
    found, reading = (_settings(folder / name) for name in (_PROMPTS, _READING))
    default, prompts = found.get("default_prompt_name"), found.get("prompts")
    if isinstance(default, str) and not (isinstance(prompts, dict) and prompts.get(default) == ""):
        log.warning("%s: default_prompt_name is %r; that prompt is not put before texts", folder / _PROMPTS, default)
    if reading.get("do_lower_case") is True:
        log.warning("%s: do_lower_case is set; texts go to the tokenizer as they are", folder / _READING)


def _settings(file: Path) -> dict:
    found = read_json(file) if file.is_file() else {}
    if not isinstance(found, dict):
        raise FormatError(f"{file}: needs an object")
    return found


def _mode(file: Path) -> str:
    """"mean", or "mean and cls" where both are appended to each other; older files have a switch for each mode."""
    config = _settings(file)
    if isinstance(mode := config.get("pooling_mode"), str):
        return mode
    switches = [key for key, on in config.items() if on is True]
    modes = [key.removeprefix("pooling_mode_") for key in switches if key.startswith("pooling_mode_")]
    if not modes:
        raise FormatError(f"{file}: names no pooling mode")
    return " and ".join(mode.removesuffix("_tokens").removesuffix("_token") for mode in modes)
