"""JSON that may come from a stranger: bounded size and depth, no key twice, finite numbers."""
import json
import math
import os
import stat
from pathlib import Path

from .errors import FormatError

MAX_BYTES = 1 << 20
MAX_DEPTH = 16


def read_json(path: str | os.PathLike, limit: int = MAX_BYTES):
    """The value in a JSON file of at most `limit` bytes; FormatError when it is no file, too large, too deep, no JSON."""
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path.name}: missing in {path.parent}")
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise FormatError(f"{path.name}: not a regular file")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FormatError(f"{path.name}: larger than {limit} bytes")
    return parse(data, path.name)


def parse(data: bytes, source: str):
    """The value written in `data`; FormatError names `source` and what is wrong with it."""
    def unique(pairs):
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            raise FormatError(f"{source}: key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
        return value

    def finite(text):
        if not math.isfinite(number := float(text)):
            raise FormatError(f"{source}: {text} is not a finite number")
        return number

    def whole(text):
        if text == "-0":  # an integer here, a float to the readers of other languages
            raise FormatError(f"{source}: -0 is no whole number")
        return int(text)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite,
                           parse_int=whole)
    except FormatError:
        raise
    except (RecursionError, ValueError) as error:  # not UTF-8, not JSON, nested beyond Python's stack, thousands of digits
        raise FormatError(f"{source}: not JSON that lowfat reads: {error}") from error
    if _depth(value) > MAX_DEPTH:
        raise FormatError(f"{source}: nested deeper than {MAX_DEPTH} levels")
    return value


def dumps(value) -> str:
    """The one way lowfat writes JSON: same value, same bytes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _depth(value) -> int:
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [item for parent in level for item in (parent.values() if isinstance(parent, dict) else parent)]
    return depth
