"""The folder in which an unfinished job keeps what it has, and the fingerprint that says which job it belongs to."""
import fcntl
import hashlib
import json
import platform
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import storage
from .errors import ArgumentError, CompatibilityError, FormatError, IntegrityError, StorageError
from .manifest import read_manifest
from .strict_json import read_json

FINGERPRINT, LOCK = "fingerprint.json", "lock"


@contextmanager
def opened(folder: str | Path, fingerprint: Mapping) -> Iterator[Path]:
    """Opens or creates the folder for one job and keeps other processes out of it; the folder stays until remove().

    ArgumentError: it belongs to a job with another fingerprint (the differences are named), or to a running process."""
    folder = Path(folder)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made: {error.strerror}") from error
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArgumentError(f"{folder}: another process is at work on it") from error
        except OSError:
            pass  # a file system without locks
        if (folder / FINGERPRINT).exists():
            _refuse_differences(folder, read_json(folder / FINGERPRINT), _plain(fingerprint))
        else:
            _clear(folder)  # what a removal that was cut short has left
            storage.write_json(folder / FINGERPRINT, fingerprint)
        yield folder


def _refuse_differences(folder: Path, old: Mapping, new: Mapping) -> None:
    found = list(differences(old, new))
    if found:
        named = "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if found[4:] else "")
        raise ArgumentError(f"{folder} holds an unfinished job with other inputs ({named}); "
                            f"repeat that call to finish it, or remove the folder to start anew")


def differences(old: Mapping, new: Mapping, prefix: str = "") -> Iterator[str]:
    """What differs between two fingerprints, in words."""
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from differences(before, now, f"{prefix}{key}.")
        elif before != now:
            yield f"{prefix}{key} was {_short(before)}, is now {_short(now)}"


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "..."


def holds_result(out: str | Path, fingerprint: Mapping) -> bool:
    """Whether `out` is the complete result of the job with this fingerprint, written with facts={"job": fingerprint}."""
    storage.restore(out)
    try:
        return read_manifest(out)["facts"].get("job") == _plain(fingerprint)
    except (IntegrityError, FormatError, CompatibilityError):  # nothing there, or somebody else's
        return False


def _plain(fingerprint: Mapping) -> dict:
    return json.loads(json.dumps(fingerprint))  # as it is read back: tuples are lists


def remove(folder: Path) -> None:
    """Deletes a finished job's folder, its fingerprint last: what a kill leaves is never taken for another job's."""
    storage.stage("progress removal")
    _clear(folder)
    for name in (FINGERPRINT, LOCK):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _clear(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            discard(path)
        elif path.name not in (FINGERPRINT, LOCK):
            path.unlink()


def discard(folder: Path) -> None:
    """Deletes a folder under another name, so that what a kill leaves of it is not taken for the whole."""
    aside = folder.with_name(f".removed-{secrets.token_hex(4)}")
    folder.rename(aside)
    storage.stage("renamed")
    shutil.rmtree(aside)


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def json_digest(value) -> str:
    """SHA-256 of a JSON value, the order of keys aside."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def environment(device: torch.device) -> dict:
    """What else decides the bits: versions, and where it runs."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "device": device.type,
             "threads": torch.get_num_threads()}
    for name in ("lowfat", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
