"""How the hidden states of a text become its embedding: as the files of sentence-transformers beside the model say.

modules.json lists what follows the model, 1_Pooling/config.json says how to pool. A folder without them is pooled by mean.
"""
import shutil
from pathlib import Path

from .errors import FormatError, UnsupportedError
from .manifest import plain_path
from .strict_json import read_json

MODULES, CONFIG = "modules.json", "config.json"
_FILES = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
_NO_CHANGE = ("Transformer", "Pooling", "Normalize")  # that embeddings are compared by cosine makes the last one nothing
_CARRIED = (".json", ".safetensors", ".txt")


def pooling_of(model) -> str:
    """"mean" or "cls", from the folder that the model was opened from.

    UnsupportedError: another mode, or a module that changes embeddings further; FormatError: files that say neither."""
    folder = _folder(model)
    if folder is None:
        return "mean"
    modules = _modules(folder)
    for kind, path in modules:
        if kind not in _NO_CHANGE:
            raise UnsupportedError(f"{folder / MODULES}: {kind} after the pooling is not supported")
    path = next((path for kind, path in modules if kind == "Pooling"), "1_Pooling")
    if not (folder / path / CONFIG).is_file():
        return "mean"
    mode = _mode(read_json(folder / path / CONFIG))
    if mode not in ("mean", "cls"):
        raise UnsupportedError(f"{folder / path / CONFIG}: pooling by {mode} is not supported; mean and cls are")
    return mode


def pooling_files(folder: Path) -> dict[str, Path]:
    """The files of sentence-transformers in a model's folder, by their path in it: what a smaller model still needs."""
    folders = {folder / "1_Pooling", *(folder / path for _, path in _modules(folder) if path)}
    inside = [file for path in sorted(folders) if path.is_dir() for file in sorted(path.iterdir())]
    found = [folder / name for name in _FILES] + [file for file in inside if file.suffix in _CARRIED]
    return {file.relative_to(folder).as_posix(): file for file in found if file.is_file()}


def carry_pooling(model, target: Path) -> None:
    """Copies those files from the folder that the model was opened from."""
    if (folder := _folder(model)) is None:
        return
    for name, file in pooling_files(folder).items():
        (target / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(file, target / name)


def _folder(model) -> Path | None:
    name = getattr(model.config, "name_or_path", "")
    return Path(name) if name and Path(name).is_dir() else None


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(last part of the class, folder inside the model's) of each module."""
    if not (folder / MODULES).is_file():
        return []
    listed = read_json(folder / MODULES)
    if not isinstance(listed, list) or not all(isinstance(entry, dict) and isinstance(entry.get("type"), str)
                                               and isinstance(entry.get("path"), str) for entry in listed):
        raise FormatError(f"{folder / MODULES}: needs a list of modules, each with type and path")
    return [(entry["type"].rpartition(".")[2], entry["path"] and plain_path(entry["path"], MODULES)) for entry in listed]


def _mode(config) -> str:
    """"mean", or "mean and cls" where both are appended to each other; older files have a switch for each mode."""
    if isinstance(config, dict) and isinstance(mode := config.get("pooling_mode"), str):
        return mode
    switches = [] if not isinstance(config, dict) else [key for key, on in config.items() if on is True]
    modes = [key.removeprefix("pooling_mode_") for key in switches if key.startswith("pooling_mode_")]
    if not modes:
        raise FormatError("1_Pooling/config.json: names no pooling mode")
    return " and ".join(mode.removesuffix("_tokens").removesuffix("_token") for mode in modes)
