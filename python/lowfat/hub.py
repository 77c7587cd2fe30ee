"""Where a model's files are: a local folder, or the copy that the Hugging Face hub's client keeps of a model."""
import errno
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import ArgumentError, StorageError

WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # no pickle is ever fetched
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG)


def folder_of(name: str) -> Path:
    """The folder that is meant by a path or by a hub name. ArgumentError: neither is there.

    What cannot be a hub name is a path, and whoever opens it says what is wrong with it."""
    if Path(name).exists() or not _is_hub_name(name):
        return Path(name)
    return fetched(name, otherwise=", or give the path of a folder")


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None


def fetched(name: str, *, otherwise: str = "") -> Path:
    """The hub's model on this disk, downloaded if need be. otherwise: what else the user could do, for the message.

    ArgumentError: not to be had. StorageError: the disk does not take it."""
    from huggingface_hub import snapshot_download

    with _named(f"{name}: no such folder, and not to be fetched from the Hugging Face hub", otherwise):
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))


def beside(name: str, key: str, patterns: Sequence[str]) -> Path | None:
    """Where a hub's model that is on this disk lies, once its files of these patterns are there too.

    key: the one of them that the others come with; None where the model has no such file. Raises as `fetched`, and
    ArgumentError where the model is not on this disk: a name that was opened may be that of a folder which is gone."""
    from huggingface_hub import errors, hf_hub_download, snapshot_download, try_to_load_from_cache

    with _named(f"{name}: not to be fetched from the Hugging Face hub"):
        config = try_to_load_from_cache(name, "config.json") if _is_hub_name(name) else None
    if not isinstance(config, str):
        raise ArgumentError(f"{name}: neither a folder from here, nor in the cache of the Hugging Face hub")
    folder = Path(config).parent  # named after the commit
    with _named(f"{name}: not to be fetched from the Hugging Face hub"):
        known = try_to_load_from_cache(name, key, revision=folder.name)
        if known is not None:  # a path, or the client's mark for a file that the hub does not have
            return folder if isinstance(known, str) else None
        try:
            # alone and last: a call that was cut short begins anew
            snapshot_download(name, revision=folder.name, allow_patterns=list(patterns), ignore_patterns=[key])
            return Path(hf_hub_download(name, key, revision=folder.name)).parent
        except errors.RemoteEntryNotFoundError:
            return None


@contextmanager
def _named(what: str, otherwise: str = "") -> Iterator[None]:
    """Turns the client's errors, and the network's and disk's that come through it, into ours."""
    from huggingface_hub import errors

    try:
        yield
    except (OSError, ValueError, errors.HTTPError) as error:
        if getattr(error, "errno", None) in _DISK:
            raise StorageError(f"{what}: {error.filename or 'the disk'}: {error.strerror}") from error
        raise ArgumentError(f"{what}: {_explained(error, otherwise)}") from error


def _explained(error: Exception, otherwise: str) -> str:
    """Why, and what to do."""
    from huggingface_hub import errors, is_offline_mode

    if isinstance(error, errors.GatedRepoError):
        return "it asks for permission first; request it on the model's page, then log in with  hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such model, or it is private; check the name, or log in with  hf auth login"
    if isinstance(error, errors.HFValidationError):
        return f"this cannot be a name on it; check the spelling{otherwise}"
    # what the network does to a download reaches us as Python's errors or as those of the client's HTTP library
    is_network = isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError, socket.gaierror)) or (
        isinstance(error, errors.HTTPError) and not isinstance(error, errors.HfHubHTTPError))
    if not is_network:
        return next(iter(str(error).splitlines()), type(error).__name__)
    if is_offline_mode():
        return f"HF_HUB_OFFLINE is set, and no copy is kept here; unset it{otherwise}"
    return f"it cannot be reached, and no copy is kept here; check the network{otherwise}"
