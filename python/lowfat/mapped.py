"""Gives back the memory of weights that from_pretrained mapped from their file instead of reading them.

Pages of such a file, once touched, stay resident while any tensor of the file is alive: freeing one weight frees nothing.
"""
import bisect
import ctypes
import mmap
from pathlib import Path

import torch

_PAGEOUT = 21  # MADV_PAGEOUT, Linux 5.4: drops clean pages and keeps changed ones, so the content never changes


class MappedFiles:
    """The file mappings of this process, as they are now."""

    def __init__(self):
        maps = Path("/proc/self/maps")
        lines = [line.split(maxsplit=5) for line in maps.read_text().splitlines()] if maps.exists() else []
        spans = (line[0].split("-") for line in lines if len(line) == 6 and line[5].startswith("/"))
        self.spans = sorted((int(start, 16), int(stop, 16)) for start, stop in spans)
        self._madvise = ctypes.CDLL(None).madvise if self.spans else None

    def release(self, tensor: torch.Tensor) -> None:
        """Lets go of the resident pages that only this tensor covers, if a file is behind them; it stays readable.

        Best effort: the kernel declines for a file that this user could not write."""
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        index = bisect.bisect(self.spans, (start, float("inf"))) - 1
        if tensor.device.type == "cpu" and index >= 0 and stop <= self.spans[index][1]:
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                self._madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _PAGEOUT)
