"""Which path an op takes on this processor."""
import torch

from lowfat import _native


def cpu_path(op: str, m: int, dtype: torch.dtype, **sizes: int) -> str:
    """For m rows; test_native.py says what is due."""
    return _native.native.choose_config(op, m=m, dtype=str(dtype).removeprefix("torch."), **sizes)["path"]
