"""Which entries of a row are stored: a bitmap of int32 words, entry j bit j % 32 of word j // 32, with zeros after the last.

The stored values of a row are in ascending order of their entries. Everything here is a gather whose places are in range for
any bitmap whatever, and is found without reading it: a bad one gives wrong numbers, never an access out of bounds."""
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ShapeError

WORD = 32
MAX_ON_GPU = 2**30  # entries of a row: compiled code counts them in 32 bits


def words(entries: int) -> int:
    return -(-entries // WORD)


def check_entries(op: str, device: torch.device, entries: int) -> None:
    """Raise ShapeError where a row of the sparse factor has more entries than a GPU counts."""
    if device.type == "cuda" and entries > MAX_ON_GPU:
        raise ShapeError(f"{op}: the sparse factor has {entries} columns, a GPU takes {MAX_ON_GPU} at most")


def pack(kept: Tensor) -> Tensor:
    """bool [..., entries] -> int32 [..., words]"""
    entries = kept.shape[-1]
    bits = pad(kept.to(torch.int32), (0, words(entries) * WORD - entries)).unflatten(-1, (words(entries), WORD))
    return (bits << torch.arange(WORD, dtype=torch.int32, device=kept.device)).sum(-1, dtype=torch.int32)


def unpack(mask: Tensor, entries: int) -> Tensor:
    """int32 [..., words] -> bool [..., entries]"""
    shifts = torch.arange(WORD, dtype=torch.int32, device=mask.device)
    return ((mask[..., None] >> shifts) & 1).flatten(-2)[..., :entries].bool()


def expand(values: Tensor, kept: Tensor) -> Tensor:
    """values [..., stored] at the entries that are kept, zeros elsewhere.   kept bool [..., entries]"""
    if values.shape[-1] == 0:
        return values.new_zeros(kept.shape)
    order = (kept.cumsum(-1) - 1).clamp(0, values.shape[-1] - 1)
    return torch.where(kept, values.gather(-1, order), 0)


def places(kept: Tensor, stored: int) -> Tensor:
    """The first `stored` kept entries of each row, in their order, int64.   kept bool [..., entries] -> [..., stored]"""
    ordinals = torch.arange(1, stored + 1, device=kept.device).expand(*kept.shape[:-1], stored).contiguous()
    return torch.searchsorted(kept.cumsum(-1), ordinals).clamp(max=max(kept.shape[-1] - 1, 0))
