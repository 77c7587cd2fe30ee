"""What layers saw during calibration: in memory, or in a folder from which one layer at a time is read."""
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import ArgumentError, FormatError, IntegrityError
from .storage import check_target, write_json, write_tensors
from .strict_json import read_json
from .tensor_file import read_header

INDEX = "calibration.json"
FORMAT = 1
_MAX_INDEX = 64 << 20  # bytes
_FIELDS = ("gram", "fisher_in", "fisher_out", "fisher", "gram_out")


@dataclass
class Stats:
    """What one layer saw during calibration.   k features in, n out"""
    gram: Tensor | None  # [k, k] fp32, sum over rows of x x^T; None of weights that no inputs were seen with
    rows: int  # tokens that were counted, padding left out
    fisher_in: Tensor | None = None  # [k] fp32, mean squared gradient of a sample, summed over the outputs
    fisher_out: Tensor | None = None  # [n] fp32, the same summed over the inputs
    fisher: Tensor | None = None  # [n, k] fp32, the same element by element
    samples: int = 0  # that the Fisher information is the mean of
    gram_out: Tensor | None = None  # [n, n] fp32, sum over tokens of g g^T, g the gradient of y (see fisher.py)

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by field name."""
        return {name: getattr(self, name) for name in _FIELDS if getattr(self, name) is not None}


def merged(layers: Sequence[Stats]) -> Stats:
    """What these layers saw together, for factors that they share: the sums of their Gram matrices and rows, those of their
    gradients one after the other on the diagonal, no other Fisher information. Of one layer its own. ArgumentError for Gram
    matrices of different sizes."""
    first, *others = layers
    if not others:
        return first
    gram = first.gram.clone()
    for other in others:
        if other.gram.shape != gram.shape:
            raise ArgumentError(f"stats: Gram matrices of {list(gram.shape)} and {list(other.gram.shape)} do not add up")
        gram += other.gram.to(gram.device)
    known = all(stats.gram_out is not None for stats in layers)
    gram_out = torch.block_diag(*(stats.gram_out.to(gram.device) for stats in layers)) if known else None
    return Stats(gram, sum(stats.rows for stats in layers), gram_out=gram_out)


class Calibration(Mapping[str, Stats]):
    """{layer name: Stats}; layers that read the same input share one Gram matrix."""

    def __init__(self, layers: Mapping[str, Stats]):
        self._layers = dict(layers)

    def __getitem__(self, name: str) -> Stats:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def fingerprint(self) -> str:
        """SHA-256 over all names, counts and tensors: the same in memory and in a folder."""
        return _fingerprint(entries("", self._layers))

    def save(self, folder: str | os.PathLike) -> None:
        """Write all statistics to a new folder; the index comes last, so a folder without one is not complete."""
        path = check_target(folder)
        path.mkdir(exist_ok=True)
        groups: dict[int, dict[str, Stats]] = {}
        for name, stats in self.items():
            groups.setdefault(id(stats.gram), {})[name] = stats
        index = {}
        for number, group in enumerate(groups.values()):
            index |= write_group(path, number, group)
        write_index(path, {name: index[name] for name in self})

    @staticmethod
    def load(folder: str | os.PathLike) -> "Calibration":
        """The statistics in a folder, each layer read when it is asked for.

        ArgumentError: no such folder. FormatError: not one of calibrate's. IntegrityError, when a layer is read: its numbers
        are not those that were written."""
        return _Stored(Path(folder))


class _Stored(Calibration):
    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ArgumentError(f"{folder}: no such folder")
        if not (folder / INDEX).is_file():
            raise FormatError(f"{folder}: no {INDEX}; not a calibration, or one that did not finish")
        value = read_json(folder / INDEX, _MAX_INDEX)
        if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("layers"), list):
            raise FormatError(f"{folder / INDEX}: needs format {FORMAT} and layers")
        self._folder, self._layers = folder, {}
        for number, entry in enumerate(value["layers"]):
            _check_entry(entry, f"{folder / INDEX}: layer {number}")
            if (name := entry.pop("name")) in self._layers:
                raise FormatError(f"{folder / INDEX}: {name} appears twice")
            self._layers[name] = entry

    def __getitem__(self, name: str) -> Stats:
        return read_entry(self._folder, name, self._layers[name])

    def fingerprint(self) -> str:
        return _fingerprint(self._layers)

    def save(self, folder: str | os.PathLike) -> None:
        raise ArgumentError(f"this calibration is in {self._folder} already; copy that folder to {folder}")


def entries(file: str, layers: Mapping[str, Stats]) -> dict[str, dict]:
    """What the index says of each layer: its file, counts, and a digest of each tensor."""
    digests: dict[int, str] = {}

    def digest(tensor: Tensor) -> str:
        if id(tensor) not in digests:  # a shared Gram matrix once
            digests[id(tensor)] = hashlib.sha256(_bytes(tensor.detach().cpu().contiguous())).hexdigest()
        return digests[id(tensor)]

    return {name: {"file": file, "rows": stats.rows, "samples": stats.samples,
                   "digests": {field: digest(tensor) for field, tensor in stats.tensors().items()}}
            for name, stats in layers.items()}


def group_file(folder: Path, number: int) -> Path:
    return folder / f"group-{number:05d}.safetensors"


def write_group(folder: Path, number: int, layers: Mapping[str, Stats], settings: str = "") -> dict[str, dict]:
    """One file for the layers that share a Gram matrix; returns their entries, which the file holds too."""
    file = group_file(folder, number)
    found = entries(file.name, layers)
    first, *_ = layers.values()
    tensors = {"gram": first.gram} | {f"{name}.{field}": tensor for name, stats in layers.items()
                                      for field, tensor in stats.tensors().items() if field != "gram"}
    write_tensors(file, tensors, {"settings": settings, "layers": json.dumps(found)})
    return found


def read_group(folder: Path, number: int, settings: str) -> dict[str, dict] | None:
    """The entries of a group written earlier with the same settings; None when it is not there."""
    from safetensors import safe_open

    file = group_file(folder, number)
    if not file.exists():
        return None
    read_header(file)
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata() or {}
    if metadata.get("settings") != settings:
        raise ArgumentError(f"{file}: holds a calibration of other layers or settings; choose an empty folder")
    return json.loads(metadata["layers"])


def write_index(folder: Path, layers: Mapping[str, dict]) -> None:
    write_json(folder / INDEX, {"format": FORMAT, "layers": [{"name": name} | entry for name, entry in layers.items()]})


def read_entry(folder: Path, name: str, entry: dict) -> Stats:
    """Copies in memory of torch's own, no views of the file: how a matrix is aligned may change the bits of a product."""
    path = folder / entry["file"]
    header, tensors = read_header(path), {}
    for field, digest in entry["digests"].items():
        key = "gram" if field == "gram" else f"{name}.{field}"
        if key not in header:
            raise FormatError(f"{path}: {key} is missing")
        if header[key]["dtype"] not in ("F32", "F64"):
            raise FormatError(f"{path}: {key} is stored as {header[key]['dtype']}, needs F32")
        dtype = torch.float32 if header[key]["dtype"] == "F32" else torch.float64
        tensors[field] = torch.empty(header[key]["shape"], dtype=dtype)
        with open(path, "rb") as file:
            file.seek(header[key]["start"])
            file.readinto(_bytes(tensors[field]))
        if hashlib.sha256(_bytes(tensors[field])).hexdigest() != digest:
            raise IntegrityError(f"{path}: {key} is not what was written")
    return Stats(rows=entry["rows"], samples=entry["samples"], **tensors)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _fingerprint(layers: Mapping[str, dict]) -> str:
    parts = {name: {field: entry[field] for field in ("rows", "samples", "digests")} for name, entry in layers.items()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_entry(entry, where: str) -> None:
    kinds = {"name": str, "file": str, "rows": int, "samples": int, "digests": dict}
    if not isinstance(entry, dict) or set(entry) != set(kinds):
        raise FormatError(f"{where}: needs {', '.join(kinds)}")
    for field, kind in kinds.items():
        if not isinstance(entry[field], kind) or isinstance(entry[field], bool):
            raise FormatError(f"{where}: {field} cannot be {entry[field]!r}")
    if os.path.basename(entry["file"]) != entry["file"] or not entry["file"].endswith(".safetensors"):
        raise FormatError(f"{where}: file {entry['file']!r} is not a plain name of a .safetensors file")
    if "gram" not in entry["digests"] or not set(entry["digests"]) <= set(_FIELDS):
        raise FormatError(f"{where}: digests must be of gram and of {', '.join(_FIELDS[1:])}")
