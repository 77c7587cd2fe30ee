"""Reads what a safetensors file says about itself, and believes none of it before the sizes agree with the file."""
import math
import os
import stat
import struct
from pathlib import Path

import torch

from .errors import FormatError
from .strict_json import parse

WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2,  # bytes per element
         "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
MAX_TENSORS = 1_000_000
MAX_HEADER = 100_000_000  # bytes, the limit of the format itself


def read_header(path: str | os.PathLike) -> dict[str, dict]:
    """{tensor: {"dtype", "shape", "start", "stop"}} in file order; start and stop are bytes from the start of the file.

    Raises FormatError unless the tensors fill the file exactly: no hole, no overlap, no byte too many.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path.name}: missing in {path.parent}")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FormatError(f"{path.name}: not a regular file")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise FormatError(f"{path.name}: {size} bytes, too short for a safetensors header")
        length = struct.unpack("<Q", prefix)[0]
        if length > size - 8:
            raise FormatError(f"{path.name}: header of {length} bytes announced, the file has {size}")
        if length > min(MAX_HEADER, size // 100 + (1 << 20)):
            raise FormatError(f"{path.name}: header of {length} bytes is too large for a file of {size}")
        header = parse(file.read(length), path.name)
    if not isinstance(header, dict):
        raise FormatError(f"{path.name}: header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path.name}: __metadata__ must map text to text")
    if len(header) > MAX_TENSORS:
        raise FormatError(f"{path.name}: {len(header)} tensors, at most {MAX_TENSORS}")
    begin = 8 + length
    spans = {name: _span(entry, path.name, name, size - begin) for name, entry in header.items()}
    spans = dict(sorted(spans.items(), key=lambda item: (item[1]["start"], item[1]["stop"])))
    end = 0
    for name, span in spans.items():
        if span["start"] != end:
            raise FormatError(f"{path.name}: data_offsets of {name} start at {span['start']}, expected {end}")
        end = span["stop"]
    if end != size - begin:
        raise FormatError(f"{path.name}: tensors take {end} bytes, the file holds {size - begin}")
    for span in spans.values():
        span["start"] += begin
        span["stop"] += begin
    return spans


def read_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, its header checked first; FormatError for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:  # it is stricter in a point that is not known here
        raise FormatError(f"{Path(path).name}: {error}") from error


def _span(entry, file: str, name: str, limit: int) -> dict:
    """Checks one header entry; Python integers do not overflow, so the product is exact."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{file}: {name} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTH:
        raise FormatError(f"{file}: dtype of {name} is {dtype!r}; known: {', '.join(WIDTH)}")
    if not _sizes(shape):
        raise FormatError(f"{file}: shape of {name} is {shape!r}, expected a list of sizes")
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= limit:
        raise FormatError(f"{file}: data_offsets of {name} are {offsets!r}, the file has {limit} bytes of data")
    stored, needed = offsets[1] - offsets[0], math.prod(shape) * WIDTH[dtype]
    if stored != needed:
        raise FormatError(f"{file}: {name} stores {stored} bytes, shape {shape} of {dtype} needs {needed}")
    return {"dtype": dtype, "shape": shape, "start": offsets[0], "stop": offsets[1]}


def _sizes(value) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)  # bool is an int to isinstance
