"""Decode of an op on the CPU against torch's products: `python bench/ops/decode_cpu.py monarch --out bench/results/monarch_cpu`.

Writes OUT.json and OUT.md. Each row is one of `lowfat bench OP`: one shape, dtype and m; medians over pairs of neighbouring
calls in one process, on weights that were not read for twice the last-level cache; beside them a pure read of the same number
of bytes, and the dense layer. What this script adds are the targets."""
import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowfat.bench import low_rank
from lowfat.bench.dictionary import Dictionary
from lowfat.bench.measure import measure, reads
from lowfat.bench.monarch import Monarch
from lowfat.bench.shapes import Layer, layers
from lowfat.bench.sparse24 import Sparse24
from lowfat.bench.timing import Pool, microseconds, paired
from lowfat.measured import header, markdown

ROWS = (1, 4, 8, 16)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COLUMNS = {"shape": "k → n, r", "m": "m", "ran": "ran", "us": "µs", "pair_us": "torch's products µs",
           "faster": "× faster", "quartiles": "quartiles", "gb_per_s": "GB/s", "read": "of a pure read",
           "low_rank_us": "low_rank of equal bytes µs", "dense_us": "dense F.linear µs",
           "dense_read_us": "a read of the dense weight µs", "gates": "gates"}  # those of them that a row has


@dataclass(frozen=True)
class Bench:
    cases: Sequence[tuple[Any, Layer]]  # (the op as `lowfat bench` races it, a layer)
    peer: str
    targets: Callable[[list[dict]], dict[str, dict]]


def low_rank_targets(rows: list[dict]) -> dict[str, dict]:
    found = {}
    for dtype, target in {"bfloat16": 2.2, "float32": 1.7}.items():
        mine = few_rows(rows, dtype)
        found[f"{dtype}: times faster than two F.linear, geometric mean at {counts(mine)}"] = {
            "found": geometric_mean([row["faster"] for row in mine]), "at_least": target,
            "pure_read": geometric_mean([row["pair_us"] / row["floor_us"] for row in mine])}
    large = [row["of_floor"] for row in rows if row["m"] == 1 and row["k"] == 4096]
    found["share of a pure read's bandwidth at m = 1, k = 4096, least"] = {"found": min(large, default=math.nan), "at_least": 0.75}
    slow = [row["faster"] for row in rows if row["pair_us"] > 20]
    found["times two F.linear where those take over 20 us, least"] = {"found": min(slow, default=math.nan), "at_least": 0.97}
    return found


def monarch_targets(rows: list[dict]) -> dict[str, dict]:
    found = {}
    for dtype in DTYPES:
        mine = few_rows(rows, dtype)
        least = min(mine, key=lambda row: row["faster"], default=None)
        if least:
            found[f"{dtype}: times faster than the bmm chain at {counts(mine)}, least ({shape(least)}, m = {least['m']})"] = {
                "found": least["faster"], "at_least": 2, "pure_read": least["pair_us"] / least["floor_us"]}
    return found


def sparse24_targets(rows: list[dict]) -> dict[str, dict]:
    found = {}
    for row in (row for row in rows if row["m"] == 1 and row["dtype"] == "bfloat16" and row["k"] == row["n"] == 4096):
        found[f"bfloat16: times faster than dense F.linear, {shape(row)}, m = 1"] = {
            "found": row["faster"], "at_least": 4, "pure_read": row["pair_us"] / row["floor_us"]}
        found[f"bfloat16: times faster than a pure read of the dense weight, {shape(row)}, m = 1"] = {
            "found": row["dense_read_us"] / row["us"], "at_least": 1.5, "pure_read": row["dense_read_us"] / row["floor_us"]}
    slow = [row["faster"] for row in rows if row["pair_us"] > 20]
    found["times dense F.linear where that takes over 20 us, least"] = {"found": min(slow, default=math.nan), "at_least": 1}
    return found


def dictionary_targets(rows: list[dict]) -> dict[str, dict]:
    found = {}
    half = [row for row in few_rows(rows, "bfloat16") if row["nonzeros"] * 2 == row["r"]]
    for m in sorted({row["m"] for row in half}):
        mine = [row for row in half if row["m"] == m]
        least = min(mine, key=lambda row: row["faster"])
        found[f"bfloat16, a / s = 2, m = {m}: times faster than two F.linear of equal bytes, least ({shape(least)})"] = {
            "found": least["faster"], "at_least": 1.5, "pure_read": least["pair_us"] / least["floor_us"]}
        least = min(mine, key=lambda row: row["low_rank_us"] / row["us"])
        found[f"bfloat16, a / s = 2, m = {m}: times faster than low_rank of equal bytes, least ({shape(least)})"] = {
            "found": least["low_rank_us"] / least["us"], "at_least": 0.85}
    return found


def few_rows(rows: list[dict], dtype: str) -> list[dict]:
    """What the targets of speed are about: m up to 8."""
    return [row for row in rows if row["dtype"] == dtype and row["m"] <= 8]


def counts(rows: list[dict]) -> str:
    return "m = " + ", ".join(str(m) for m in sorted({row["m"] for row in rows}))


def on_layers(raced, sizes: str) -> list[tuple[Any, Layer]]:
    return [(raced, layer) for layer in layers(sizes, blocks=getattr(raced, "blocks", 1))]


BENCHES = {
    "low_rank": Bench(on_layers(low_rank, "4096:4096:512,4096:14336:1024,768:3072:192,384:1536:96"), "two `F.linear`",
                      low_rank_targets),
    "monarch": Bench(on_layers(Monarch(64), "4096:4096:1") + on_layers(Monarch(32), "4096:4096:4,1024:1024:1"),
                     "two `torch.bmm` with the permutations between them", monarch_targets),
    "sparse24": Bench(on_layers(Sparse24(), "4096:4096:2,4096:14336:2,768:3072:2,384:1536:2"), "dense `F.linear`",
                      sparse24_targets),
    "dictionary": Bench(on_layers(Dictionary(), "4096:4096:1024,4096:14336:2048,768:3072:192,384:1536:96")
                        + on_layers(Dictionary(blocks=4), "4096:4096:256")
                        + on_layers(Dictionary(share=32), "4096:4096:1024"),
                        "two `F.linear` of equal bytes", dictionary_targets),
}


def summary(bench: Bench, rows: list[dict]) -> dict:
    """The targets of this bench, each with what was found; and what a kernel would reach that did nothing but read."""
    return {name: one | {"met": one["found"] >= one["at_least"]} for name, one in bench.targets(rows).items()}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def verdict(one: dict) -> str:
    words = "met" if one["met"] else "MISSED"
    return words + (f"; a pure read of the factors {one['pure_read']:.2f}" if "pure_read" in one else "")


def report(op: str, result: dict) -> str:
    about = result["header"]
    text = [f"# {op}: decode on the CPU against {BENCHES[op].peer}", "",
            f"{about['cpu']}, {about['cores']} cores, {about['threads']} thread(s), load {about['load'][0]} at the start; "
            f"torch {about['torch']}, lowfat {about['lowfat']} ({about['compiler']}), level {about['level']}; "
            f"{about['date']}. Medians of one process; × faster is the median over pairs of neighbouring calls. Weights come "
            f"from memory: a pool of over twice the last-level cache goes around. Made by `python bench/ops/decode_cpu.py {op}`.", ""]
    for dtype in DTYPES:
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        if rows:
            columns = {key: title for key, title in COLUMNS.items() if key in in_words(rows[0])}
            text += [f"## {dtype}", "", markdown(columns, [in_words(row) for row in rows])]
    text += ["## Targets", ""]
    text += [f"* {name}: **{one['found']:.3f}** (at least {one['at_least']}: {verdict(one)})"
             for name, one in result["summary"].items()]
    return "\n".join(text) + "\n"


def shape(row: dict) -> str:
    return (f"{row['k']} → {row['n']}, {row['r']}" + (f", {row['nonzeros']} kept" if "nonzeros" in row else "")
            + (f" in {row['blocks']} blocks" if row.get("blocks", 1) > 1 else ""))


def in_words(row: dict) -> dict:
    times = {name: f"{us:.0f}" for name, us in row.items() if name in COLUMNS and name.endswith("us")}
    return row | times | {
        "shape": shape(row), "read": f"{row['of_floor']:.2f}", "faster": f"{row['faster']:.2f}",
        "quartiles": f"{row['faster_low']:.2f}–{row['faster_high']:.2f}", "gb_per_s": f"{row['gb_per_s']:.1f}",
        "gates": "pass" if not row["failed_gates"] else "FAIL " + " ".join(row["failed_gates"])}


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=list(BENCHES))
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long each candidate of a row runs")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="values of m")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    result = {"header": header(options.threads), "rows": []}
    bench = BENCHES[options.op]
    for dtype in options.dtypes:
        for raced, layer in bench.cases:
            pool = Pool(DTYPES[dtype], raced.SCALE)
            for m in options.rows:
                row = measure(raced, pool, layer, m, options.seconds)
                if hasattr(raced, "blocks"):
                    row["blocks"] = raced.blocks
                if hasattr(raced, "nonzeros"):
                    row["nonzeros"] = raced.nonzeros(layer.r)
                if raced.OP == "sparse24":  # the limit of a dense layer, whoever computes it
                    timed = paired(reads(layer.k * layer.n), pool, repeats=row["repeats"])
                    row["dense_read_us"] = min(map(microseconds, timed.values()))
                result["rows"].append(row)
                shown = in_words(row)
                print(dtype, *(f"{key}={shown[key]}" for key in COLUMNS if key in shown), flush=True)
    result["summary"] = summary(bench, result["rows"])
    text = report(options.op, result)
    print("\n" + text[text.index("## Targets"):])
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)
    return 1 if any(row["failed_gates"] for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
