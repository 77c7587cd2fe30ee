"""Where a model's files are: a local folder, or the copy that the Hugging Face hub's client keeps of a model."""
import re
from pathlib import Path

from .errors import ArgumentError

WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # no pickle is ever fetched


def folder_of(name: str) -> Path:
    """The folder that is meant by a path or by a hub name. ArgumentError: neither is there.

    What cannot be a hub name is a path, and whoever opens it says what is wrong with it."""
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        return Path(name)
    return fetched(name)


def fetched(name: str) -> Path:
    """The hub's model on this disk, downloaded if need be."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except (OSError, ValueError) as error:  # the client's own errors derive from these two
        why, what_to_do = _explained(error)
        raise ArgumentError(f"{name}: no such folder, and not to be fetched from the Hugging Face hub: {why}; "
                            f"{what_to_do}") from error


def _explained(error: Exception) -> tuple[str, str]:
    """(why, what to do)"""
    from huggingface_hub import errors, is_offline_mode

    if isinstance(error, errors.GatedRepoError):
        return "it asks for permission first", "request it on the model's page, then log in with  hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such model, or it is private", "check the name, or log in with  hf auth login"
    if isinstance(error, ValueError):
        return "this cannot be a name on it", "check the spelling, or give the path of a folder"
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set, and no copy is kept here", "unset it, or give the path of a folder"
    return "it cannot be reached, and no copy is kept here", "check the network, or give the path of a folder"
