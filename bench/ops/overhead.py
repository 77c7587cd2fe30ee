"""What a call of lowfat.low_rank costs beyond its arithmetic: tiny tensors, against two F.linear in turn.

    python bench/ops/overhead.py [--out bench/results/overhead]"""
import argparse
import json
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from torch.nn.functional import linear

import lowfat
from lowfat.measured import header, markdown

TARGET = 1.7  # times two F.linear at most, without gradients
COLUMNS = {"gradients": "gradients recorded", "us": "low_rank µs", "pair_us": "two F.linear µs", "ratio": "ratio",
           "quartiles": "quartiles"}


def us_per_call(call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def measure(gradients: bool, rounds: int, calls: int) -> dict:
    x, v, u, bias = torch.randn(1, 16), torch.randn(4, 16), torch.randn(16, 4), torch.randn(16)
    for t in (v, u, bias):
        t.requires_grad_(gradients)
    ours, pair = [], []
    with torch.set_grad_enabled(gradients):
        for _ in range(rounds):  # in turn, so that a slow moment hits both
            ours.append(us_per_call(lambda: lowfat.low_rank(x, v, u, bias), calls))
            pair.append(us_per_call(lambda: linear(linear(x, v), u, bias), calls))
    low, middle, high = quantiles([a / b for a, b in zip(ours, pair, strict=True)], n=4)
    return {"gradients": "yes" if gradients else "no", "us": round(median(ours), 2), "pair_us": round(median(pair), 2),
            "ratio": round(middle, 2), "quartiles": f"{low:.2f}–{high:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--calls", type=int, default=1000, help="in one round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about, rows = header(1), [measure(gradients, options.rounds, options.calls) for gradients in (False, True)]
    met = rows[0]["ratio"] <= TARGET
    text = (f"# Overhead of a call\n\n{about['cpu']}, one thread, load {about['load'][0]} at the start; torch {about['torch']}, "
            f"lowfat {about['lowfat']}; {about['date']}. x [1, 16], rank 4, 16 outputs, with bias. "
            f"Without gradients at most {TARGET}: {'met' if met else 'MISSED'}.\n\n" + markdown(COLUMNS, rows))
    print(text)
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps({"header": about, "rows": rows}, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
