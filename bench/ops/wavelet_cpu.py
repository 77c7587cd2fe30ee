"""Training a WaRA adapter on the CPU against a LoRA and against the op's reference:

    python bench/ops/wavelet_cpu.py [--out bench/results/wavelet_cpu]

Each row is one layer, dtype, rank and number of tokens: a frozen `nn.Linear` with what `lowfat.Wavelet` adds to it (haar,
one level, diag), with a LoRA of as many parameters in plain torch, and with the same adapter by its reference; forward and
backward with gradients of x and of the factors, in turn in one process. Beside them the adapter's own share, without the
base layer. Times are medians, ratios those of neighbouring calls. Results and gradients are judged before, by the norm of
their errors."""
import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowfat import _native
from lowfat.bench.gates import norm_gate
from lowfat.measured import header, markdown
from lowfat.ops import wavelet
from lowfat.ops.wavelet import reference

SHAPES = ((768, 768), (768, 3072), (4096, 4096))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALPHA = 16.0
COLUMNS = {"shape": "k → n, r", "tokens": "tokens", "ran": "ran", "wavelet_ms": "base + wavelet ms",
           "lora_ms": "base + LoRA ms", "reference_ms": "base + reference ms", "against_lora": "× LoRA's time",
           "faster": "× faster than the reference", "alone_ms": "wavelet alone ms", "lora_alone_ms": "LoRA alone ms",
           "alone_faster": "alone × faster than the reference", "gates": "gates"}
RATIOS = "against_lora", "faster", "alone_faster"


class Lora(nn.Module):
    """base(x) + alpha / r (x A^T) B^T, as it is written everywhere."""

    def __init__(self, v: Tensor, u: Tensor):
        super().__init__()
        self.a, self.b = nn.Parameter(v.clone()), nn.Parameter(u.clone())

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.a), self.b) * (ALPHA / len(self.a))


class Adapter(nn.Module):
    def __init__(self, v: Tensor, u: Tensor, by_reference: bool):
        super().__init__()
        self.v, self.u, self.by_reference = nn.Parameter(v.clone()), nn.Parameter(u.clone()), by_reference

    def forward(self, x: Tensor) -> Tensor:
        scale = ALPHA / len(self.v)
        if self.by_reference:
            return reference(x, self.v, None, self.u, "haar", 1, "diag", len(self.u), scale)
        return wavelet(x, self.v, self.u, out_features=len(self.u), scale=scale)


def step(base: nn.Module | None, adapter: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        y = adapter(x) if base is None else base(x) + adapter(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *adapter.parameters()], dy)]

    return call


def in_turn(calls: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each, the order turned around every time."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-1, repeats):
        for name in calls if i % 2 else reversed(calls):
            start = time.perf_counter()
            calls[name]()
            if i >= 0:
                found[name].append((time.perf_counter() - start) * 1e3)
    return found


def measure(k: int, n: int, r: int, tokens: int, dtype: str, repeats: int) -> dict:
    base = nn.Linear(k, n, bias=False, dtype=DTYPES[dtype]).requires_grad_(False)
    v, u = (torch.randn(r, k) / k ** 0.5).to(DTYPES[dtype]), torch.randn(n, r).to(DTYPES[dtype])
    x, dy = torch.randn(tokens, k).to(DTYPES[dtype]).requires_grad_(), torch.randn(tokens, n).to(DTYPES[dtype])
    adapters = {"wavelet": Adapter(v, u, False), "lora": Lora(v, u), "reference": Adapter(v, u, True)}
    wide = Adapter(v.double(), u.double(), True)
    found, plain = (step(None, adapters[name], x, dy)() for name in ("wavelet", "reference"))
    exact = step(None, wide, x.detach().double().requires_grad_(), dy.double())()
    results = zip(("y", "dx", "dv", "du"), found, plain, exact)
    failed = [name for name, mine, theirs, due in results if not norm_gate(mine, theirs, due)]
    whole = in_turn({name: step(base, adapter, x, dy) for name, adapter in adapters.items()}, repeats)
    alone = in_turn({name: step(None, adapter, x, dy) for name, adapter in adapters.items()}, repeats)
    ran = "reference"
    if _native.native:
        ran = _native.native.choose_config("wavelet", m=tokens, n=n, k=k, r=r, dtype=dtype)["path"]
    return {"k": k, "n": n, "r": r, "tokens": tokens, "dtype": dtype, "ran": ran,
            "failed_gates": failed, **{f"{name}_ms": median(ms) for name, ms in whole.items()},
            "against_lora": ratio(whole["wavelet"], whole["lora"]), "faster": ratio(whole["reference"], whole["wavelet"]),
            "alone_ms": median(alone["wavelet"]), "lora_alone_ms": median(alone["lora"]),
            "alone_faster": ratio(alone["reference"], alone["wavelet"])}


def ratio(over: list[float], under: list[float]) -> list[float]:
    """Its quartiles, over pairs of neighbouring calls."""
    return quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)


def in_words(row: dict) -> dict:
    numbers = {key: f"{value:.2f}" for key, value in row.items() if key.endswith("_ms")}
    ratios = {key: f"{row[key][1]:.2f} ({row[key][0]:.2f}–{row[key][2]:.2f})" for key in RATIOS}
    return row | numbers | ratios | {"shape": f"{row['k']} → {row['n']}, {row['r']}",
                                     "gates": "pass" if not row["failed_gates"] else "FAIL " + " ".join(row["failed_gates"])}


def report(result: dict) -> str:
    about = result["header"]
    text = ["# wavelet: training an adapter on the CPU", "",
            f"{about['cpu']}, {about['cores']} cores, {about['threads']} thread(s), load {about['load'][0]} at the start; "
            f"torch {about['torch']}, lowfat {about['lowfat']} ({about['compiler']}); {about['date']}. Forward and "
            "backward, gradients of x and the factors; medians, and ratios of neighbouring calls with their quartiles. "
            "Made by `python bench/ops/wavelet_cpu.py`.", ""]
    for dtype in DTYPES:
        rows = [in_words(row) for row in result["rows"] if row["dtype"] == dtype]
        if rows:
            text += [f"## {dtype}", "", markdown(COLUMNS, rows)]
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--small", action="store_true", help="the first layer alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result = {"header": header(options.threads), "rows": []}
    for dtype in options.dtypes:
        for k, n in SHAPES[:1] if options.small else SHAPES:
            for r in options.ranks:
                for tokens in options.tokens:
                    result["rows"].append(measure(k, n, r, tokens, dtype, options.repeats))
                    shown = in_words(result["rows"][-1])
                    print(dtype, *(f"{key}={shown[key]}" for key in COLUMNS), flush=True)
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(report(result))
    return 1 if any(row["failed_gates"] for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
