"""Loads the compiled part: liblowfat_ops.so, whose kernels replace references, and _C, which says what was built.

Both are optional. Without them, or with LOWFAT_DISABLE_KERNELS=1, every op runs its reference and `kernels()` is empty."""
import ctypes
import importlib
import os
import sys
import warnings
from pathlib import Path

import torch

from .errors import ArgumentError, CompatibilityError

CPU_LEVELS = ("avx512_bf16", "avx2_fma", "scalar")


def check_environment() -> bool:
    """Whether kernels are wanted. A variable with a value it cannot have raises ArgumentError."""
    disable, level = os.environ.get("LOWFAT_DISABLE_KERNELS", ""), os.environ.get("LOWFAT_CPU_LEVEL", "")
    for name in ("LOWFAT_DISABLE_KERNELS", "LOWFAT_DEBUG_CHECK"):
        if (value := os.environ.get(name, "")) not in ("", "0", "1"):
            raise ArgumentError(f"{name} is {value!r}, must be 0 or 1")
    if level not in ("", *CPU_LEVELS):
        raise ArgumentError(f"LOWFAT_CPU_LEVEL is {level!r}, must be one of {', '.join(CPU_LEVELS)}")
    return disable != "1"


def check_torch(minimum: str) -> None:
    """Raise CompatibilityError for a torch that lacks functions the library calls: said here, not as an undefined symbol."""
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < tuple(int(part) for part in minimum.split(".")):
        raise CompatibilityError(f"lowfat's kernels were built for torch >= {minimum}, found {torch.__version__}; "
                                 "install a newer torch, or set LOWFAT_DISABLE_KERNELS=1 to run without them")


def find_library() -> Path | None:
    package = sys.modules[__package__]
    for folder in package.__path__:  # an editable install has two: the sources and the binaries
        if (found := Path(folder) / "liblowfat_ops.so").is_file():
            return found
    return None


def load() -> tuple[Path | None, object | None, str | None]:
    """The library's path and the module _C, or neither and why not."""
    if not check_environment():
        return None, None, "LOWFAT_DISABLE_KERNELS=1"
    path = find_library()
    if path is None:
        return _missing(f"no compiled library in {' or '.join(map(str, sys.modules[__package__].__path__))}")
    try:
        module = importlib.import_module(f"{__package__}._C")
    except ImportError as error:
        found = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        return _missing(f"{path.parent} holds no module _C that {found} can load ({error})", error)
    check_torch(module.build_info()["torch_minimum"])
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return _missing(f"{path} does not load with torch {torch.__version__} ({error})", error)
    return path, module, None


def _missing(reason: str, error: Exception | None = None) -> tuple[None, None, str]:
    warning = RuntimeWarning(f"lowfat: {reason}; the reference path is in use: same results, slower. Install lowfat again, "
                             "or set LOWFAT_DISABLE_KERNELS=1")
    warning.__cause__ = error
    warnings.warn(warning, stacklevel=3)
    return None, None, reason


library_path, native, why_not = load()


def kernels() -> dict[str, dict[str, list[str]]]:
    """What is compiled: op -> device -> instruction set levels or GPU architectures, best first. Empty: references only."""
    return native.kernels() if native else {}


def build_info() -> dict:
    """How the library was built: versions of lowfat, torch, Python, compiler and CUDA. Empty without it."""
    return native.build_info() if native else {}


def cpu_level() -> str | None:
    """The instruction set level that CPU kernels use here; LOWFAT_CPU_LEVEL lowers it. None without the library."""
    return native.cpu_level() if native else None


def calls(op: str, device: str, path: str) -> int:
    """How often op has taken path ("decode", "library") in this process: how a test or a bench knows what it ran."""
    if library_path is None:
        return 0
    count = _counter()(op.encode(), device.encode(), path.encode())
    if count < 0:
        raise ArgumentError(f"no op counts its calls as ({op!r}, {device!r}, {path!r})")
    return count


def _counter():
    function = ctypes.CDLL(str(library_path)).lowfat_calls
    function.argtypes, function.restype = [ctypes.c_char_p] * 3, ctypes.c_int64
    return function
