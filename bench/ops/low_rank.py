"""low_rank decode on the CPU against two F.linear of torch: `python bench/ops/low_rank.py --out bench/results/low_rank_cpu`.

Writes OUT.json and OUT.md. Each row is one of `lowfat bench low_rank`: one shape, dtype and m; medians over pairs of
neighbouring calls in one process, on weights that were not read for twice the last-level cache; beside them a pure read of the
same number of bytes, and the dense layer. What this script adds are the targets."""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

from lowfat.bench import low_rank
from lowfat.bench.measure import measure
from lowfat.bench.shapes import layers
from lowfat.bench.timing import Pool, header, markdown

LAYERS = layers("4096:4096:512,4096:14336:1024,768:3072:192,384:1536:96")
ROWS = (1, 4, 8, 16)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TARGETS = {"bfloat16": 2.2, "float32": 1.7}  # times two F.linear, geometric mean over the shapes at m = 1, 4, 8
COLUMNS = {"shape": "k → n, r", "m": "m", "ran": "ran", "us": "low_rank µs", "pair_us": "two F.linear µs",
           "faster": "× faster", "quartiles": "quartiles", "gb_per_s": "GB/s", "read": "of a pure read",
           "dense_us": "dense F.linear µs", "gates": "gates"}


def summary(rows: list[dict]) -> dict:
    """The targets of this bench, each with what was found; and what a kernel would reach that did nothing but read."""
    found = {}
    for dtype, target in TARGETS.items():
        mine = [row for row in rows if row["dtype"] == dtype and row["m"] <= 8]
        found[f"{dtype}: times faster than two F.linear, geometric mean at m = 1, 4, 8"] = {
            "found": geometric_mean([row["faster"] for row in mine]), "at_least": target,
            "pure_read": geometric_mean([row["pair_us"] / row["floor_us"] for row in mine])}
    large = [row["of_floor"] for row in rows if row["m"] == 1 and row["k"] == 4096]
    found["share of a pure read's bandwidth at m = 1, k = 4096, least"] = {"found": min(large, default=math.nan), "at_least": 0.75}
    slow = [row["faster"] for row in rows if row["pair_us"] > 20]
    found["times two F.linear where those take over 20 us, least"] = {"found": min(slow, default=math.nan), "at_least": 0.97}
    return {name: one | {"met": one["found"] >= one["at_least"]} for name, one in found.items()}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def verdict(one: dict) -> str:
    words = "met" if one["met"] else "MISSED"
    return words + (f"; a pure read of the factors {one['pure_read']:.2f}" if "pure_read" in one else "")


def report(result: dict) -> str:
    about = result["header"]
    text = ["# low_rank decode on the CPU against two `F.linear`", "",
            f"{about['cpu']}, {about['cores']} cores, {about['threads']} thread(s), load {about['load'][0]} at the start; "
            f"torch {about['torch']}, lowfat {about['lowfat']} ({about['compiler']}), level {about['level']}; "
            f"{about['date']}. Medians of one process; × faster is the median over pairs of neighbouring calls. Weights come "
            "from memory: a pool of over twice the last-level cache goes around. Made by `python bench/ops/low_rank.py`.", ""]
    for dtype in DTYPES:
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        if rows:
            text += [f"## {dtype}", "", markdown(COLUMNS, [in_words(row) for row in rows])]
    text += ["## Targets", ""]
    text += [f"* {name}: **{one['found']:.2f}** (at least {one['at_least']}: {verdict(one)})"
             for name, one in result["summary"].items()]
    return "\n".join(text) + "\n"


def in_words(row: dict) -> dict:
    return row | {"shape": f"{row['k']} → {row['n']}, {row['r']}", "us": f"{row['us']:.0f}",
                  "pair_us": f"{row['pair_us']:.0f}", "dense_us": f"{row['dense_us']:.0f}", "read": f"{row['of_floor']:.2f}",
                  "faster": f"{row['faster']:.2f}", "quartiles": f"{row['faster_low']:.2f}–{row['faster_high']:.2f}",
                  "gb_per_s": f"{row['gb_per_s']:.1f}",
                  "gates": "pass" if not row["failed_gates"] else "FAIL " + " ".join(row["failed_gates"])}


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long each candidate of a row runs")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="values of m")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    result = {"header": header(options.threads), "rows": []}
    for dtype in options.dtypes:
        pool = Pool(DTYPES[dtype], low_rank.SCALE)
        for layer in LAYERS:
            for m in options.rows:
                row = measure(low_rank, pool, layer, m, options.seconds)
                result["rows"].append(row)
                shown = in_words(row)
                print(dtype, *(f"{key}={shown[key]}" for key in COLUMNS), flush=True)
    result["summary"] = summary(result["rows"])
    text = report(result)
    print("\n" + text[text.index("## Targets"):])
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)
    return 1 if any(row["failed_gates"] for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
