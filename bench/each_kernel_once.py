"""Every GPU kernel on one small shape, its results judged by the gates: what a sanitizer runs."""
import sys

import torch
from torch.nn.functional import linear

from lowfat import _native
from lowfat.bench.gates import chain, failed_gates

OPS = torch.ops.lowfat
K, N, R = 776, 520, 72  # ragged against tiles of 16 and 64 rows and steps of 32 and 64


def operands(m: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """x, dy, v, u, bias."""
    x, dy = (torch.randn(m, size, device=device).to(dtype) for size in (K, N))
    v, u = (torch.randn(shape, device=device).mul_(0.05).to(dtype) for shape in ((R, K), (N, R)))
    return x, dy, v, u, torch.randn(N, device=device).to(dtype)


def low_rank(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    """Forward, and forward with h for training."""
    x, _, v, u, bias = operands(m, dtype, device)
    y, h = OPS.low_rank_training(x, v, u, bias)
    failed = failed_gates(y, linear(linear(x, v), u, bias), chain(x, v.T, u.T, bias=bias))
    failed += failed_gates(h, linear(x, v), chain(x, v.T))
    if not torch.equal(OPS.low_rank(x, v, u, bias), y):
        failed.append("other bits without h")
    return failed


def low_rank_backward(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    x, dy, v, u, _ = operands(m, dtype, device)
    h = linear(x, v)
    dx, dv, du, db = OPS.low_rank_backward(dy, x, h, v, u, 15)
    ones = torch.ones(1, m, device=device, dtype=dtype)
    return [*failed_gates(dx, linear(linear(dy, u.T), v.T), chain(dy, u, v)),
            *failed_gates(dv, linear(linear(u.T, dy), x.T), chain(u.T, dy.T, x)),
            *failed_gates(du, linear(dy.T, h.T), chain(dy.T, h)),
            *failed_gates(db[None], linear(ones, dy.T), chain(ones, dy))]


def kernels_here() -> list[tuple[str, str]]:
    """(op, path) of every kernel that this GPU is meant to run."""
    paths = {(8, 0): ("decode", "small batch sm_80"), (9, 0): ("decode", "small batch", "chain")}
    here = paths.get(torch.cuda.get_device_capability(), ("decode",))
    return [*(("low_rank", path) for path in here), ("low_rank_backward", "kernels")]


def main() -> int:
    torch.manual_seed(0)
    before, status = {(op, path): _native.calls(op, "cuda", path) for op, path in kernels_here()}, 0
    for dtype in (torch.bfloat16, torch.float16):
        for op, m in ((low_rank, 1), (low_rank, 16), (low_rank, 100), (low_rank, 300), (low_rank_backward, 100)):
            failed = op(m, dtype)
            print("FAIL" if failed else "pass", op.__name__, dtype, f"m = {m}", *failed)
            status |= bool(failed)
    for (op, path), calls in before.items():
        if _native.calls(op, "cuda", path) == calls:
            print("FAIL", op, path, "no kernel ran")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
