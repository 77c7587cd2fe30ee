"""The one writer of files: a folder is complete under its name or it is not there, at every instant and after every fault.

A folder is filled under a temporary name beside its target, synced, given its manifest and renamed. The steps: S1 folder
made, S2 filled, S3 files synced, S4 manifest written, S5 manifest and folder synced, S6 renamed into place, S7 its parent
synced, S9 old copy removed. (S8, naming the latest of several folders, is its owner's: `write_json`.)
"""
import errno
import fcntl
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from . import manifest
from .errors import ArgumentError, StorageError
from .strict_json import dumps

PATIENCE = 5.0  # seconds to wait for a process that is between two renames


def stage(name: str) -> None:
    """Does nothing. Called after each step, so that a test can end the process right there."""


def check_target(path: str | os.PathLike, overwrite: bool = False, *, size: int = 0, foreign: bool = False) -> Path:
    """The absolute path of a folder that can be written now; ArgumentError says what stands in the way.

    size: bytes needed. foreign: a folder that lowfat did not write may be replaced too (the caller keeps its files).
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ArgumentError(f"{path}: the folder {target.parent} does not exist")
    if len(os.fsencode(_beside(target, "tmp").name)) > os.pathconf(target.parent, "PC_NAME_MAX"):
        raise ArgumentError(f"{path}: the name is too long")
    if os.path.lexists(target) and not target.is_dir():
        raise ArgumentError(f"{path}: a file is in the way")
    if _filled(target):
        if not overwrite:
            raise ArgumentError(f"{path}: exists already; overwrite (--overwrite) replaces it")
        if not foreign and not (target / manifest.NAME).is_file():  # never remove what somebody else put there
            raise ArgumentError(f"{path}: exists, not written by lowfat (it has no {manifest.NAME}); take another name")
    if target.is_dir() and (os.path.ismount(target) or Path.cwd().is_relative_to(target)):
        raise ArgumentError(f"{path}: a mount point or the current directory cannot be replaced; take a folder inside it")
    for folder in (target.parent, target):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise ArgumentError(f"{path}: the folder {folder} is read-only")
    if (free := shutil.disk_usage(target.parent).free) < size:
        raise ArgumentError(f"{path}: no space left: {size} bytes needed, {free} free")
    return target


def write_folder(target: str | os.PathLike, fill: Callable[[Path], None], *, overwrite: bool = False,
                 facts: dict | None = None, size: int = 0, keep: Callable[[Path], bool] | None = None) -> None:
    """Lets `fill(folder)` write files into an empty folder and puts that folder, with its manifest, at `target`.

    facts: plain JSON for the manifest. size: bytes expected, held against the free space first. keep(relative path): which
    files of the folder being replaced move to the new one, outside the manifest; given, any folder is replaced.
    After any error `target` is what it was. Raises ArgumentError if it cannot be written, StorageError for a failing disk.
    """
    with _disk(target):
        restore(target)
        path = check_target(target, overwrite or keep is not None, size=size, foreign=keep is not None)
        _clean(path)
        with _temporary(path) as temp:
            stage("S1")
            fill(temp)
            stage("S2")
            files = sorted(file for file in temp.rglob("*") if not file.is_dir())
            if keep is not None:
                _carry(path, temp, keep)
            for file in files:
                _set_mode(file)
                _sync(file)
            stage("S3")
            _write_text(temp / manifest.NAME, manifest.describe(temp, files, facts or {}))
            stage("S4")
            _sync(temp / manifest.NAME)
            for folder in (*(found for found in temp.rglob("*") if found.is_dir()), temp):
                _sync(folder)
            stage("S5")
            _swap(temp, path, replace=overwrite or keep is not None)


def write_json(path: str | os.PathLike, value) -> None:
    """Writes one JSON file: complete with the new content, or as it was."""
    _write_file(path, lambda temp: _write_text(temp, dumps(value)))


def write_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes one safetensors file: complete with the new content, or as it was."""
    from safetensors.torch import save_file

    # row-major first: a factor straight from an SVD is column-major, and the file has no strides to say so
    rows = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write_file(path, lambda temp: save_file(rows, temp, metadata))


def verify(folder: str | os.PathLike) -> dict:
    """The manifest of a folder, every file of which has the size and SHA-256 written there. Reads each file once, in pieces.

    Raises ArgumentError when there is no folder, IntegrityError or FormatError naming the first file that is wrong.
    """
    restore(folder)
    if not Path(folder).is_dir():
        raise ArgumentError(f"{folder}: no such folder")
    return manifest.check(Path(folder))


def restore(target: str | os.PathLike) -> None:
    """Puts an old folder back whose replacement never arrived, because a process died between the two renames."""
    target = Path(os.path.realpath(target))
    deadline = time.monotonic() + PATIENCE
    while not os.path.lexists(target) and (asides := _beside_all(target, "old")):
        for aside in asides:
            with _claim(aside) as ours:
                if ours and not os.path.lexists(target):
                    os.rename(aside, target)
        if time.monotonic() > deadline:
            raise StorageError(f"{target}: another process has been replacing it for {PATIENCE:.0f} s")
        time.sleep(0.01)


def _swap(temp: Path, target: Path, replace: bool) -> None:
    """Renames temp to target; a folder already there is moved aside first, removed last. A step that fails undoes all."""
    aside = _beside(target, "old") if replace and _filled(target) else None
    with _claim(target) if aside else nullcontext(True) as ours:
        if not ours:
            raise ArgumentError(f"{target}: another process is replacing it")
        done = []  # renames to undo, last first
        try:
            for old, new in ([(target, aside)] if aside else []) + [(temp, target)]:
                os.rename(old, new)
                done.append((new, old))
                stage("aside" if new == aside else "S6")
            _sync(target.parent)
            stage("S7")
        except BaseException as error:
            for new, old in reversed(done):
                os.rename(new, old)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise ArgumentError(f"{target}: another process wrote it in the meantime") from error
            raise
        if aside:
            _remove(aside)
    stage("S9")


def _carry(source: Path, temp: Path, keep: Callable[[Path], bool]) -> None:
    """Brings the kept files of `source` into `temp`, by links: nothing is copied, the old folder stays whole."""
    for path in sorted(source.rglob("*")) if source.is_dir() else []:
        relative = path.relative_to(source)
        if path.is_dir() and not path.is_symlink():
            (temp / relative).mkdir(exist_ok=True)
        elif keep(relative) and not os.path.lexists(temp / relative):
            try:
                os.link(path, temp / relative, follow_symlinks=False)
            except PermissionError:  # a file system without links
                shutil.copy2(path, temp / relative, follow_symlinks=False)


def _write_file(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ArgumentError(f"{path}: the folder {target.parent} does not exist")
    with _disk(path):
        _clean(target)
        with _temporary(target) as temp:
            write(temp / target.name)
            _set_mode(temp / target.name)
            _sync(temp / target.name)
            os.replace(temp / target.name, target)
            os.rmdir(temp)
            _sync(target.parent)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _set_mode(path: Path) -> None:
    """What open() would have given: safetensors makes its files for their owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _beside(target: Path, kind: str) -> Path:
    """A new name in the same folder: "tmp" for what is being written, "old" for what is being replaced."""
    return target.parent / f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"


def _beside_all(target: Path, kind: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{kind}-\d+-[0-9a-f]{{8}}")
    return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name)) if target.parent.is_dir() else []


def _clean(target: Path) -> None:
    """Removes what dead processes left beside a target."""
    for path in _beside_all(target, "tmp") + (_beside_all(target, "old") if os.path.lexists(target) else []):
        with _claim(path) as ours:
            if ours:
                _remove(path)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        warnings.warn(f"{folder} could not be removed ({error}); the next save tries again", stacklevel=2)


@contextmanager
def _temporary(target: Path):
    """A new folder beside the target, ours alone; gone again when the block ends and has not renamed it."""
    while True:
        temp = _beside(target, "tmp")
        os.mkdir(temp)
        try:
            if target.is_dir():
                shutil.copymode(target, temp)
            with _claim(temp) as ours:
                if ours:
                    yield temp
                    return
        finally:
            shutil.rmtree(temp, ignore_errors=True)  # nothing to do after the rename


@contextmanager
def _claim(folder: Path):
    """Whether no other process works on this folder; holds it until the block ends.

    A lock, not the process id in the name: it ends with its process, and holds between containers that share a disk.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # renamed or removed between the two calls: what we hold is not what has the name
            ours = os.path.lexists(folder) and os.path.samestat(os.fstat(handle), os.stat(folder))
        except BlockingIOError:
            ours = False
        except OSError:  # a file system without locks
            ours = _process_gone(folder)
        yield ours
    finally:
        with suppress(OSError):  # nothing was written through it
            os.close(handle)


def _process_gone(folder: Path) -> bool:
    """Whether the process named in a temporary folder's name is gone, or is this one."""
    named = re.search(r"\.(?:tmp|old)-(\d+)-[0-9a-f]{8}$", folder.name)
    if named is None or int(named[1]) == os.getpid():
        return True
    try:
        os.kill(int(named[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it runs, for somebody else
        return False
    return False


@contextmanager
def _disk(target: str | os.PathLike):
    """Says which target it was when the disk fails; safetensors has its own error for what is an OSError elsewhere."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.__cause__ or error if isinstance(error, StorageError) else error  # of a file inside this folder
        raise StorageError(f"{target}: could not be written: {reason}; nothing is left half-written") from reason
