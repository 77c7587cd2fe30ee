"""What every kernel's tests share: the gates G1-G4 (those that benches use too), the data they are fed, and a call that
catches stray writes."""
import ctypes
import mmap
from collections.abc import Callable, Sequence
from math import pi, prod, sqrt

import torch
from torch import Tensor
from torch.utils import deterministic

from lowfat.bench.gates import (ACTIVATIONS, ROUNDOFF, SLOPES, Chain, chain, element_gate, exact_gate,  # noqa: F401
                                failed_gates, finished, max_gate, norm_gate, product_of)

# name -> ((tokens m, in k, rank r, out n), what is done to x); ragged on purpose
RECIPES = {
    "normal": ((64, 1073, 33, 130), None),
    "scaled rows": ((65, 1073, 33, 130), "rows"),
    "long": ((64, 4101, 64, 256), None),
    "small scaled rows": ((3, 100, 5, 9), "rows"),
    "large channels": ((129, 257, 16, 64), "channels"),
    "decode": ((1, 769, 1, 255), None),
}


def inputs(recipe: str, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [m, k], v [r, k], u [n, r], bias [n] of a recipe."""
    (m, k, r, n), special = RECIPES[recipe]
    g = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(m, k, generator=g), torch.randn(n, generator=g)
    v, u = torch.randn(r, k, generator=g) / sqrt(k), torch.randn(n, r, generator=g) / sqrt(r)
    if special == "rows":
        x *= 2.0 ** torch.randint(-12, 13, (m, 1), generator=g)
    elif special == "channels":
        x[:, torch.randperm(k, generator=g)[: max(1, k // 64)]] *= 100
    return tuple(t.to(device, dtype) for t in (x, v, u, bias))


def whole_inputs(m: int, k: int, r: int, n: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Small whole numbers for G4: as dense as they can be while x v^T and the result are exact in the dtype."""
    g = torch.Generator().manual_seed(seed)
    largest = min(1 / ROUNDOFF[dtype], 2**24)
    density = {"v": 1.0, "u": 1.0}

    def ternary(*shape, keep=1.0):
        return torch.randint(-1, 2, shape, generator=g) * (torch.rand(shape, generator=g) < keep)

    while True:
        x, v, u = ternary(m, k), ternary(r, k, keep=density["v"]), ternary(n, r, keep=density["u"])
        bias = torch.randint(-9, 10, (n,), generator=g)
        h = x @ v.T
        y = h @ u.T + bias
        worst_h, worst_y = (int(t.abs().max()) if t.numel() else 0 for t in (h, y))
        if max(worst_h, worst_y) <= largest:
            return tuple(t.to(dtype) for t in (x, v, u, bias))
        density["v" if 8 * worst_h > largest else "u"] *= 0.7


def gradient_chains(dy: Tensor, x: Tensor, v: Tensor, u: Tensor) -> dict[str, Chain]:
    """dx, dv, du, db of y = (x v^T) u^T + bias as chains; dy, x are [m, .]. du comes transposed."""
    ones = torch.ones(1, dy.shape[0], dtype=dy.dtype, device=dy.device)
    return {"dx": chain(dy, u, v), "dv": chain(u.T, dy.T, x), "du": chain(v, x.T, dy), "db": chain(ones, dy)}


# --- layouts, guard zones, guard pages ---

def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another layout: contiguous, transposed, strided, or offset (aligned to its element size only)."""
    if layout == "contiguous" or t.dim() == 0:
        return t.clone()
    if layout == "transposed":
        return t.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "strided":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"), dtype=t.dtype, device=t.device)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if layout == "offset":
        flat = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
        flat[1:] = t.reshape(-1)
        return flat[1:].view(t.shape)
    raise ValueError(layout)


LAYOUTS = ("contiguous", "transposed", "strided", "offset")

_ZONE_BYTES = 4096
_SUBNORMAL = 3  # as a float a subnormal: even an added 0.0 flushes it where subnormals are flushed


def check_call(op: Callable, args: Sequence, *, finite: bool = True):
    """Call an op and return what it gives, having seen that it neither mutates nor aliases its inputs, writes beyond them,
    leaves a piece of its outputs unwritten, nor gives other bits the second time."""
    fenced = [_between_zones(a) if isinstance(a, Tensor) else (a, None) for a in args]
    given = [a for a, _ in fenced]
    before = [None if buffer is None else buffer.clone() for _, buffer in fenced]
    first = _poisoned_call(op, given)
    _poison_free_memory(first)
    second = _poisoned_call(op, given)
    for i, ((_, buffer), was) in enumerate(zip(fenced, before)):
        assert buffer is None or torch.equal(buffer, was), f"argument {i}, or the memory around it, was written to"
    for y, again in zip(_outputs(first), _outputs(second)):
        assert torch.equal(_bits(y), _bits(again)), "other bits the second time"
        assert not finite or y.isfinite().all(), "a piece of the output was not written, or overflowed"
        for a in given:
            assert not isinstance(a, Tensor) or not _share(y, a), "an output aliases an input"
    return first


def _poisoned_call(op: Callable, args: Sequence):
    was, filled = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # fills whatever torch allocates with NaN
    deterministic.fill_uninitialized_memory = True
    try:
        return op(*args)
    finally:
        torch.use_deterministic_algorithms(was)
        deterministic.fill_uninitialized_memory = filled


def _poison_free_memory(result) -> None:
    """Leave NaN where the next outputs are likely to lie: what our library allocates through torch's C interface torch does
    not fill on a CPU. Held together, so that each is another piece."""
    blanks = [torch.full_like(y, float("nan") if y.is_floating_point() else -1) for _ in range(8) for y in _outputs(result)]
    del blanks


def _between_zones(t: Tensor) -> tuple[Tensor, Tensor]:
    size = t.numel() * t.element_size()
    buffer = torch.full(((2 * _ZONE_BYTES + size + 3) // 4,), _SUBNORMAL, dtype=torch.int32, device=t.device)
    inside = buffer.view(torch.uint8)[_ZONE_BYTES:_ZONE_BYTES + size].view(t.dtype).view(t.shape)
    inside.copy_(t.detach())
    return inside, buffer


def _outputs(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8) if t.numel() else t


def _share(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and b.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def at_guard_page(t: Tensor, *, end: bool = True) -> Tensor:
    """A copy on the CPU that ends where a page without access begins (or starts where one ends): one element further, and
    the process dies."""
    page = mmap.PAGESIZE
    size = prod(t.shape) * t.element_size()
    pages = max(1, -(-size // page))
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    forbidden = address + pages * page if end else address
    if libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    if size == 0:
        return t.clone()
    start = pages * page - size if end else page
    inside = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=start).view(t.shape)
    return inside.copy_(t)
