"""low_rank_sparse on the CPU against SLTrain's published method.

    python bench/ops/low_rank_sparse_cpu.py [--out bench/results/low_rank_sparse_cpu]

Writes OUT.json and OUT.md. The published method, in plain torch (2406.02214 and its code): W = scale u v by one product,
scatter_add of the values at flat int64 places, a dense product; backward makes W again, and dW, from which it takes all
gradients. Steps are forward and backward with the gradients of everything; decode is a forward of few rows. Medians over
neighbouring calls in one process; decode's weights were not read for twice the last-level cache."""
import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor
from torch.nn.functional import linear

from lowfat import LowRankSparse, _native
from lowfat.bench.gates import Chain, chain, failed_gates
from lowfat.bench.low_rank_sparse import known, products
from lowfat.bench.timing import last_level_cache_bytes
from lowfat.measured import header, markdown
from lowfat.ops import low_rank_sparse

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DENSITY, SCALE, TARGET = 0.03, 0.25, 1.1
STEPS = ((512, 512, 128, 2048), (1024, 1024, 256, 2048), (512, 2048, 128, 1024), (2048, 2048, 512, 512),
         (4096, 4096, 512, 512), (512, 512, 128, 64))  # k, n, r, m
DECODE = ((4096, 4096, 512), (4096, 14336, 1024), (768, 768, 192), (512, 512, 128))  # k, n, r
ROWS = (1, 4, 8, 16)
STEP_COLUMNS = {"shape": "k → n, r", "m": "m", "plan": "plan", "ran": "ran", "ms": "step ms",
                "forward_ms": "of it forward", "published_ms": "published method ms", "faster": "× faster",
                "quartiles": "quartiles", "dense_ms": "dense layer ms", "dense_faster": "× dense", "gates": "gates"}
DECODE_COLUMNS = {"shape": "k → n, r", "m": "m", "ran": "ran", "us": "µs", "published_us": "published method µs",
                  "faster": "× faster", "quartiles": "quartiles", "gb_per_s": "GB/s", "dense_us": "dense F.linear µs",
                  "dense_faster": "× dense", "gates": "gates"}


@dataclass(frozen=True)
class Layer:
    v: Tensor  # [r, k]
    u: Tensor  # [n, r]
    values: Tensor  # [nnz]
    starts: Tensor
    columns: Tensor
    bias: Tensor
    places: Tensor  # int64 [nnz], flat
    weight: Tensor  # [n, k], of the dense layer

    def ours(self, x: Tensor) -> Tensor:
        return low_rank_sparse(x, *self.operands, scale=SCALE)

    def published(self, x: Tensor) -> Tensor:
        return Published.apply(x, self.v, self.u, self.values, self.places, self.bias)

    def dense(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def failed(self, x: Tensor) -> list[str]:
        """Gates of the forward."""
        return failed_gates(self.ours(x), products(x, *self.operands, scale=SCALE), known(x, *self.operands, scale=SCALE))

    def leaves(self, name: str) -> list[Tensor]:
        return [self.weight, self.bias] if name == "dense" else [self.v, self.u, self.values, self.bias]

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return self.v, self.u, self.values, self.starts, self.columns, self.bias

    @property
    def read_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.operands)


class Published(torch.autograd.Function):
    """SLTrain as published: W in both directions, dense dW."""

    @staticmethod
    def weight(v: Tensor, u: Tensor, values: Tensor, places: Tensor) -> Tensor:
        return (SCALE * (u @ v)).flatten().scatter_add(0, places, values).view(u.shape[0], v.shape[1])

    @staticmethod
    def forward(ctx, x, v, u, values, places, bias):
        ctx.save_for_backward(x, v, u, values, places)
        return linear(x, Published.weight(v, u, values, places), bias)

    @staticmethod
    def backward(ctx, dy):
        x, v, u, values, places = ctx.saved_tensors
        dx, dw = dy @ Published.weight(v, u, values, places), dy.T @ x
        return dx, SCALE * (u.T @ dw), SCALE * (dw @ v.T), dw.flatten()[places], None, dy.sum(0)


def made(k: int, n: int, r: int, dtype: torch.dtype, support: LowRankSparse) -> Layer:
    rows = torch.repeat_interleave(torch.arange(n), support.starts.long().diff())
    factors = torch.randn(r, k) / k**0.5, torch.randn(n, r) / r**0.5, torch.randn(len(rows)) / (DENSITY * k)**0.5
    v, u, values, bias, weight = (t.to(dtype) for t in (*factors, torch.randn(n), torch.randn(n, k) / k**0.5))
    places = rows * k + support.columns.long()
    return Layer(v, u, values, support.starts.clone(), support.columns.clone(), bias, places, weight)


def ratio(peer: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Of neighbouring calls: lower quartile, median, upper quartile."""
    low, middle, high = quantiles([a / b for a, b in zip(peer, ours, strict=True)], n=4)
    return low, middle, high


def ran(paths: list[tuple[str, str]], call: Callable) -> str:
    """`kernel` where a call was counted under these paths."""
    before = [_native.calls(op, "cpu", path) for op, path in paths] if _native.library_path else []
    call()
    is_kernel = bool(before) and all(_native.calls(op, "cpu", path) > was for (op, path), was in zip(paths, before))
    return "kernel" if is_kernel else "reference"


# --- judged before it is timed ---

def gradient_gates(x: Tensor, dy: Tensor, layer: Layer) -> list[str]:
    """Of dvalues, which no dense product gives; the others are judged by the tests."""
    found, theirs = (torch.autograd.grad(call(x), [layer.values], dy)[0] for call in (layer.ours, layer.published))
    full, k = chain(dy.T, x.detach()), x.shape[1]
    at = layer.places // k, layer.places % k
    return failed_gates(found, theirs, Chain(full.y64[at], [], full.magnitude[at], full.length, full.roundings))


# --- rows ---

def step_row(k: int, n: int, r: int, m: int, dtype: torch.dtype, seconds: float) -> dict:
    layer = made(k, n, r, dtype, LowRankSparse(k, n, rank=1, density=DENSITY, bias=False))
    x, dy = torch.randn(m, k, dtype=dtype).requires_grad_(), torch.randn(m, n, dtype=dtype)
    calls = {"ours": layer.ours, "published": layer.published, "dense": layer.dense}
    for name in ("ours", "dense"):
        for t in layer.leaves(name):
            t.requires_grad_()
    plan = _native.native.choose_config("low_rank_sparse", m=m, n=n, k=k, r=r, entries=len(layer.values),
                                        dtype=str(dtype).removeprefix("torch."))["path"] if _native.native else "reference"

    def step(name: str) -> tuple[float, float]:
        start = time.perf_counter()
        y = calls[name](x)
        between = time.perf_counter()
        torch.autograd.grad(y, [x, *layer.leaves(name)], dy)
        return between - start, time.perf_counter() - start

    slowest = max(step(name)[1] for name in calls)
    kernel = ran([("low_rank_sparse", plan), ("low_rank_sparse_backward", "kernels")], lambda: step("ours"))
    with torch.no_grad():
        gates = layer.failed(x)
    gates += gradient_gates(x, dy, layer)
    times = {name: [] for name in calls}
    for i in range(max(3, round(seconds / slowest))):
        for name in calls if i % 2 else reversed(calls):
            times[name].append(step(name))
    whole = {name: [total * 1e3 for _, total in pairs] for name, pairs in times.items()}
    low, middle, high = ratio(whole["published"], whole["ours"])
    return {"k": k, "n": n, "r": r, "m": m, "dtype": str(dtype).removeprefix("torch."), "plan": plan, "ran": kernel,
            "repeats": len(times["ours"]), "ms": median(whole["ours"]), "least_ms": min(whole["ours"]),
            "forward_ms": median(forward * 1e3 for forward, _ in times["ours"]), "published_ms": median(whole["published"]),
            "published_least_ms": min(whole["published"]), "dense_ms": median(whole["dense"]), "faster": middle, "faster_low": low,
            "faster_high": high, "dense_faster": ratio(whole["dense"], whole["ours"])[1], "failed_gates": gates}


def decode_rows(k: int, n: int, r: int, rows: list[int], dtype: torch.dtype, seconds: float) -> list[dict]:
    support = LowRankSparse(k, n, rank=1, density=DENSITY, bias=False)
    least = made(k, n, r, dtype, support).read_bytes
    layers = [made(k, n, r, dtype, support) for _ in range(max(2, 2 * last_level_cache_bytes() // least))]
    found = []
    for m in rows:
        x = torch.randn(m, k, dtype=dtype)
        names = ("ours", "published", "dense")
        kernel = ran([("low_rank_sparse", "decode")], lambda: layers[0].ours(x))
        gates = layers[0].failed(x)
        times, spent, i = {name: [] for name in names}, 0.0, 0
        while spent < seconds or i < 5:
            for name in names if i % 2 else reversed(names):
                call = getattr(layers[i % len(layers)], name)
                start = time.perf_counter()
                call(x)
                times[name].append((time.perf_counter() - start) * 1e6)
            i, spent = i + 1, spent + sum(each[-1] for each in times.values()) / 1e6
        low, middle, high = ratio(times["published"], times["ours"])
        us = median(times["ours"])
        found.append({"k": k, "n": n, "r": r, "m": m, "dtype": str(dtype).removeprefix("torch."), "ran": kernel,
                      "repeats": i, "us": us, "least_us": min(times["ours"]), "published_us": median(times["published"]),
                      "dense_us": median(times["dense"]), "faster": middle, "faster_low": low, "faster_high": high,
                      "dense_faster": ratio(times["dense"], times["ours"])[1], "gb_per_s": least / us / 1e3,
                      "failed_gates": gates})
    return found


# --- the page ---

def summary(result: dict) -> dict:
    """What must hold, and what was found: of every step and every decode the least."""
    found = {}
    for kind in ("steps", "decode"):
        for dtype in DTYPES:
            mine = [row for row in result[kind] if row["dtype"] == dtype]
            if not mine:
                continue
            least = min(mine, key=lambda row: row["faster"])
            what = f"{dtype}: {kind}, times faster than the published method, least ({shape(least)}, m = {least['m']})"
            found[what] = {"found": least["faster"], "at_least": TARGET, "met": least["faster"] >= TARGET}
            least = min(mine, key=lambda row: row["dense_faster"])
            what = f"{dtype}: {kind}, times faster than a dense layer, least ({shape(least)}, m = {least['m']})"
            found[what] = {"found": least["dense_faster"]}
    return found


def shape(row: dict) -> str:
    return f"{row['k']} → {row['n']}, {row['r']}"


def in_words(row: dict) -> dict:
    times = {name: f"{value:.{0 if name.endswith('us') else 1}f}" for name, value in row.items()
             if name.endswith(("us", "ms")) and isinstance(value, float)}
    words = {"shape": shape(row), "faster": f"{row['faster']:.2f}", "dense_faster": f"{row['dense_faster']:.2f}",
             "quartiles": f"{row['faster_low']:.2f}–{row['faster_high']:.2f}",
             "gates": "pass" if not row["failed_gates"] else "FAIL " + " ".join(row["failed_gates"])}
    return row | times | words | ({"gb_per_s": f"{row['gb_per_s']:.1f}"} if "gb_per_s" in row else {})


def verdict(one: dict) -> str:
    return f" (at least {one['at_least']}: {'met' if one['met'] else 'MISSED'})" if "met" in one else ""


def report(result: dict) -> str:
    about = result["header"]
    text = ["# low_rank_sparse on the CPU against SLTrain's published method", "",
            f"{about['cpu']}, {about['cores']} cores, {about['threads']} thread(s), load {about['load'][0]} at the start; "
            f"torch {about['torch']}, lowfat {about['lowfat']} ({about['compiler']}), level {about['level']}; "
            f"{about['date']}. {DENSITY:.0%} of the entries, scale {SCALE}, with bias. The published method in plain torch: "
            f"one product and `scatter_add` make W, in forward and again in backward, and all gradients come from a dense "
            f"dW. Medians of one process; × faster is the median over pairs of neighbouring calls, below 1 a loss. Decode "
            f"reads weights from memory. Made by `python bench/ops/low_rank_sparse_cpu.py`.", ""]
    for kind, columns, title in (("steps", STEP_COLUMNS, "forward and backward, all gradients"),
                                 ("decode", DECODE_COLUMNS, "decode, a forward of few rows")):
        for dtype in DTYPES:
            rows = [in_words(row) for row in result[kind] if row["dtype"] == dtype]
            if rows:
                text += [f"## {dtype}: {title}", "", markdown(columns, rows)]
    text += ["## Targets", ""]
    text += [f"* {name}: **{one['found']:.2f}**{verdict(one)}" for name, one in result["summary"].items()]
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2, help="about how long the slowest candidate of a row runs")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="values of m in decode; none leaves decode out")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--most", type=int, default=4096, help="leave out layers with more inputs than this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    result = {"header": header(options.threads), "steps": [], "decode": []}
    for dtype in options.dtypes:
        for k, n, r, m in (case for case in STEPS if case[0] <= options.most):
            result["steps"].append(step_row(k, n, r, m, DTYPES[dtype], options.seconds))
            shown = in_words(result["steps"][-1])
            print(dtype, *(f"{key}={shown[key]}" for key in STEP_COLUMNS), flush=True)
        with torch.no_grad():
            for k, n, r in (case for case in DECODE if case[0] <= options.most and options.rows):
                for row in decode_rows(k, n, r, options.rows, DTYPES[dtype], options.seconds):
                    result["decode"].append(row)
                    shown = in_words(row)
                    print(dtype, *(f"{key}={shown[key]}" for key in DECODE_COLUMNS), flush=True)
    result["summary"] = summary(result)
    text = report(result)
    print("\n" + text[text.index("## Targets"):])
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)
    return 1 if any(row["failed_gates"] for row in result["steps"] + result["decode"]) else 0


if __name__ == "__main__":
    sys.exit(main())
