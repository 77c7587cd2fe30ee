"""What an op asks of its tensors before their sizes: that they are dense tensors, on one device and of the right dtypes."""
import torch
from torch import Tensor

from ..errors import DeviceError, DtypeError, UnsupportedError
from .low_rank import DTYPES


def check_kinds(op: str, x: Tensor, factors: dict[str, Tensor], optional: dict[str, Tensor | None],
                indices: dict[str, Tensor], index_dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise the error that names the first tensor that is not as x is (factors, and what is given of optional), or that is
    no index tensor (indices)."""
    floating = {"x": x} | factors | {name: t for name, t in optional.items() if t is not None}
    for name, t in (floating | indices).items():
        if not isinstance(t, Tensor):
            raise DtypeError(f"{op}: {name} must be a tensor, found {type(t).__name__}")
        if t.layout is not torch.strided:
            raise UnsupportedError(f"{op}: {name} is {t.layout}, must be a dense tensor (call .to_dense())")
    for name, t in (floating | indices).items():
        if t.device != x.device:
            raise DeviceError(f"{op}: {name} is on {t.device}, x is on {x.device}; all must be on one device")
        if name in floating and t.dtype != x.dtype:
            raise DtypeError(f"{op}: {name} has {t.dtype}, x has {x.dtype}; all must have one dtype (or use autocast)")
        if name in indices and t.dtype not in index_dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in index_dtypes)
            raise DtypeError(f"{op}: {name} has {t.dtype}, must be {wanted}")
    if x.dtype not in DTYPES:
        raise DtypeError(f"{op}: x has {x.dtype}, must be float64, float32, float16 or bfloat16")
