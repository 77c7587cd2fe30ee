"""manifest.json: size and SHA-256 of each file, dtype, shape and SHA-256 of each tensor; written last, read first."""
import hashlib
import os
import stat
from pathlib import Path, PurePosixPath

from .errors import CompatibilityError, FormatError, IntegrityError
from .strict_json import dumps, read_json
from .tensor_file import read_header

NAME = "manifest.json"
FORMAT = 1
MAX_BYTES = 64 << 20  # about 200 bytes per tensor
CHUNK = 1 << 22       # bytes hashed at a time
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def describe(folder: Path, files: list[Path], facts: dict) -> str:
    """The manifest of `files` in `folder` as text. It ends with a digest of itself, so that no edit goes unseen."""
    manifest = {"format": FORMAT, "files": {}, "tensors": {}, "facts": facts}
    for path in files:
        name = plain_path(path.relative_to(folder).as_posix(), str(folder))  # write nothing that the reader refuses
        manifest["files"][name] = {"bytes": os.path.getsize(path), "sha256": digest(path)}
        if path.suffix == ".safetensors":
            manifest["tensors"][name] = {
                tensor: {"dtype": span["dtype"], "shape": span["shape"], "sha256": digest(path, span["start"], span["stop"])}
                for tensor, span in read_header(path).items()}
    return dumps({**manifest, "digest": _own_digest(manifest)})


def read_manifest(folder: str | os.PathLike) -> dict:
    """The manifest of a folder, checked in itself; says nothing about the other files.

    Raises IntegrityError when it is missing or changed, CompatibilityError when a newer lowfat wrote it, FormatError else.
    """
    if not (Path(folder) / NAME).exists():
        raise IntegrityError(f"{NAME}: missing in {folder}; lowfat did not finish writing this folder")
    manifest = read_json(Path(folder) / NAME, MAX_BYTES)
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise FormatError(f"{NAME}: has no format number")
    if manifest.get("digest") != _own_digest(manifest):  # first, and the same in every format: one bit makes format 1 a 5
        raise IntegrityError(f"{NAME}: does not match its own digest; it was changed after it was written")
    if manifest["format"] > FORMAT:
        raise CompatibilityError(f"{NAME}: has format {manifest['format']}, this lowfat reads up to {FORMAT}; upgrade it")
    if set(manifest) != {"format", "files", "tensors", "facts", "digest"}:
        raise FormatError(f"{NAME}: has the keys {', '.join(sorted(manifest))}")
    for field in ("files", "tensors", "facts"):
        if not isinstance(manifest[field], dict):
            raise FormatError(f"{NAME}: {field} is not an object")
    for name, entry in manifest["files"].items():
        plain_path(name, NAME)
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
            raise FormatError(f"{NAME}: files.{name} must have bytes and sha256")
    return manifest


def check(folder: Path, only: set[str] | None = None) -> dict:
    """The manifest, once every file it lists has the size and SHA-256 written there. only: look at these files alone."""
    manifest = read_manifest(folder)
    files = {name: entry for name, entry in manifest["files"].items() if only is None or name in only}
    for name, entry in files.items():  # all sizes before the first long read
        path = folder / name
        if not path.exists():
            raise IntegrityError(f"{name}: listed in {NAME}, missing in {folder}")
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FormatError(f"{name}: not a regular file")
        _inside(folder, name)
        if (size := os.path.getsize(path)) != entry["bytes"]:
            raise IntegrityError(f"{name}: {size} bytes, {NAME} says {entry['bytes']}; the file is truncated or changed")
    for name, entry in files.items():
        if digest(folder / name) != entry["sha256"]:
            raise IntegrityError(f"{name}: SHA-256 differs from {NAME}{_damaged_tensor(folder, name, manifest)}")
    return manifest


def plain_path(name: str, source: str) -> str:
    """`name` when it stays inside the folder it is written in; FormatError else. source: the file that names it."""
    parts = PurePosixPath(name).parts
    if not name or "\\" in name or "\0" in name or name.startswith("/") or ".." in parts or "/".join(parts) != name:
        raise FormatError(f"{source}: {name!r} is not a plain file name")
    if name.endswith(PICKLES):
        raise FormatError(f"{source}: names {name!r}; pickle files are never read")
    return name


def digest(path: Path, start: int = 0, stop: int | None = None) -> str:
    """SHA-256 of the bytes start to stop of a file, read in pieces."""
    sha256, left = hashlib.sha256(), (os.path.getsize(path) if stop is None else stop) - start
    with open(path, "rb") as file:
        file.seek(start)
        while left and (piece := file.read(min(left, CHUNK))):
            sha256.update(piece)
            left -= len(piece)
    return sha256.hexdigest()


def _inside(folder: Path, name: str) -> None:
    """Refuses a link that leaves the folder; the download cache of the hub keeps its files in `blobs` and links to them."""
    root, real = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (real.is_relative_to(root) or real.is_relative_to(blobs)):
        raise FormatError(f"{name}: links to {real}, outside {folder}")


def _own_digest(manifest: dict) -> str:
    return hashlib.sha256(dumps({key: value for key, value in manifest.items() if key != "digest"}).encode()).hexdigest()


def _damaged_tensor(folder: Path, name: str, manifest: dict) -> str:
    """For the message only: which tensor of a damaged file it is, as far as its header can still be read."""
    if name not in manifest["tensors"]:
        return ""
    try:
        spans = read_header(folder / name)
    except FormatError as error:
        return f" ({error})"
    for tensor, entry in manifest["tensors"][name].items():
        span = spans.get(tensor)
        if span is None or digest(folder / name, span["start"], span["stop"]) != entry["sha256"]:
            return f" (tensor {tensor})"
    return " (header)"
