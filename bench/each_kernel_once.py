"""Every GPU kernel on one small shape, its results judged by the gates: what a sanitizer runs."""
import sys

import torch
from torch.nn.functional import linear

from lowfat import _native
from lowfat.bench.gates import chain, failed_gates


def low_rank(m: int, dtype: torch.dtype) -> list[str]:
    """Forward, and forward with h for training; ragged against tiles of 16 rows and steps of 32."""
    k, n, r = 776, 520, 72
    x = torch.randn(m, k, device="cuda").to(dtype)
    v, u = (torch.randn(shape, device="cuda").mul_(0.05).to(dtype) for shape in ((r, k), (n, r)))
    bias = torch.randn(n, device="cuda").to(dtype)
    y, h = torch.ops.lowfat.low_rank_training(x, v, u, bias)
    failed = failed_gates(y, linear(linear(x, v), u, bias), chain(x, v.T, u.T, bias=bias))
    failed += failed_gates(h, linear(x, v), chain(x, v.T))
    if not torch.equal(torch.ops.lowfat.low_rank(x, v, u, bias), y):
        failed.append("other bits without h")
    return failed


def main() -> int:
    torch.manual_seed(0)
    before, status = _native.calls("low_rank", "cuda", "decode"), 0
    for dtype in (torch.bfloat16, torch.float16):
        for m in (1, 16):
            failed = low_rank(m, dtype)
            print("FAIL" if failed else "pass", "low_rank", dtype, f"m = {m}", *failed)
            status |= bool(failed)
    if _native.calls("low_rank", "cuda", "decode") == before:
        print("FAIL no kernel ran")
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
