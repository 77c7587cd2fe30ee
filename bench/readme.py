"""Makes the tables of README.md from bench/results/: `python bench/readme.py` (with --check it only compares, exit code 1)."""
import argparse
import json
import re
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[1]
RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"


def demo() -> str:
    result = json.loads((RESULTS / "demo.json").read_text())
    dense = result["rows"][0]
    lines = [f"`lowfat demo` on all-MiniLM-L6-v2: find a docstring's continuation among {result['texts']} "
             f"({result['threads']} threads, {result['seconds']:.0f} s for everything in this table).", "",
             "| encoder parameters kept | recall@1 | MRR | cosine to dense | whole model |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        kept = "dense" if row is dense else f"{row['ratio']:.0%}, {row['name']}"
        lines.append(f"| {kept} | {100 * row['recall_at_1']:.1f} | {100 * row['mrr']:.1f} | {row['cosine']:.2f} | "
                     f"{row['bytes'] / 1e6:.0f} MB ({row['bytes'] / dense['bytes']:.0%}) |")
    lines += ["", "| one token through a layer, then the whole model | dense | factorized | times as fast |", "|---|---|---|---|"]
    lines += [f"| {layer['in_features']} → {layer['out_features']}, rank {layer['rank']} ({layer['path']}) | "
              f"{layer['dense_us']:.0f} µs | {layer['us']:.0f} µs | {layer['speedup']:.2f} × |" for layer in result["layers"]]
    lines += [f"| whole model, {one['texts']} × {one['tokens']} tokens | {one['dense_ms']:.0f} ms | {one['ms']:.0f} ms | "
              f"{one['speedup']:.2f} × |" for one in result["latency"]]
    return "\n".join(lines)


def quality() -> str:
    result = json.loads((RESULTS / "quality.json").read_text())
    lines = ["| task | kept | method, policy | teachers | accuracy in %, mean | lost, points |", "|---|---|---|---|---|---|"]
    cells: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        cells.setdefault((row["task"], row["ratio"], row["method"], row["policy"]), []).append(row)
    for (task, ratio, method, policy), rows in cells.items():
        dense = {row["seed"]: row["accuracy"] for row in cells[next(key for key in cells if key[0] == task)]}
        found = 100 * mean(row["accuracy"] for row in rows)
        lost = 100 * mean(dense[row["seed"]] for row in rows) - found
        name = "dense teacher" if method == "dense" else f"{method}, {policy}"
        lines.append(f"| {task} | {ratio:.0%} | {name} | {len(rows)} | {found:.1f} | {'' if method == 'dense' else f'{lost:.1f}'} |")
    chance = ", ".join(f"{100 * facts['chance']:.1f} for {name}" for name, facts in result["about"]["tasks"].items())
    return "\n".join(lines) + f"\n\nChance: {chance}. Per seed, with data hashes and settings: `bench/results/quality.md`."


def sparse() -> str:
    result = json.loads((RESULTS / "sparse.json").read_text())["rows"]
    lost: dict[tuple, dict[tuple, float]] = {}
    for task in dict.fromkeys(row["task"] for row in result):
        own = [row for row in result if row["task"] == task]
        dense = 100 * own[0]["value"]
        for key in dict.fromkeys((row["method"], row["policy"], row["ratio"]) for row in own[1:]):
            values = [100 * row["value"] for row in own if (row["method"], row["policy"], row["ratio"]) == key]
            lost.setdefault(key[:2], {})[task, key[2]] = dense - mean(values)
    columns = list(next(iter(lost.values())))
    lines = ["| method, policy | " + " | ".join(f"{task}, {ratio:.0%}" for task, ratio in columns) + " |",
             "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {method}, {policy} | " + " | ".join(f"{found[column]:.1f}" for column in columns) + " |"
              for (method, policy), found in lost.items()]
    dense = ", ".join(f"{task} {100 * row['value']:.1f}" for task in dict.fromkeys(task for task, _ in columns)
                      for row in result if row["task"] == task and row["method"] == "dense")
    return "\n".join(lines) + f"\n\nPoints lost, mean over three calibration samples; dense: {dense}."


def pure_read(one: dict) -> str:
    return f"; {one['pure_read']:.2f} if its bytes were only read" if "pure_read" in one else ""


def low_rank() -> str:
    result = json.loads((RESULTS / "low_rank_cpu.json").read_text())
    about = result["header"]
    lines = [f"{about['cpu']}, torch {about['torch']}, {about['date']}.", "",
             "| k → n, rank | dtype | m = 1 | m = 4 | m = 8 | m = 16 |", "|---|---|---|---|---|---|"]
    shapes: dict[tuple, dict[int, dict]] = {}
    for row in result["rows"]:
        shapes.setdefault((row["k"], row["n"], row["r"], row["dtype"]), {})[row["m"]] = row
    for (k, n, r, dtype), rows in shapes.items():
        cells = (f"{rows[m]['faster']:.2f} × ({rows[m]['ran'].split()[0]})" for m in (1, 4, 8, 16))
        lines.append(f"| {k} → {n}, {r} | {dtype} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *targets("low_rank")])


def targets(op: str) -> list[str]:
    summary = json.loads((RESULTS / f"{op}_cpu.json").read_text())["summary"]
    return [f"* {name}: " + (f"{one['found']:.2f} (target {one['at_least']}" if one["met"] else
                             f"{one['found']:.3f} (target {one['at_least']}, MISSED") + f"{pure_read(one)})"
            for name, one in summary.items()]


def other_ops() -> str:
    return "\n".join(f"\n`{op}` (`bench/results/{op}_cpu.md`):\n\n" + "\n".join(targets(op)) for op in OTHERS).strip()


def structures() -> str:
    result = json.loads((RESULTS / "structures_sections" / "compare.json").read_text())
    about, rows = result["about"], [row for row in result["summary"] if row["method"] != "dense"]
    dense = next(row["mean"] for row in result["summary"] if row["method"] == "dense")
    found = {(row["method"], row["ratio"], row["recovery"]): row for row in rows}
    ratios = sorted({row["ratio"] for row in rows}, reverse=True)
    titles = [f"{ratio:.0%}, {words}" for ratio in ratios for words in ("not trained", f"{about['steps']} steps")]
    lines = ["| method | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for ratio in ratios:
            trained = found[method, ratio, "finetune"]
            cells += [f"{100 * found[method, ratio, 'none']['mean']:.1f}",
                      f"{100 * trained['mean']:.1f} ± {100 * trained['spread']:.1f}"]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + (f"\n\nAccuracy in % on {about['test_rows']:,} texts of `sections`, dense {100 * dense:.1f}, chance "
                               f"{100 * about['chance']:.1f}; mean ± standard deviation over three seeds of the training.")


def staging() -> str:
    result = json.loads((RESULTS / "structures_pairs" / "compare.json").read_text())
    about, rows = result["about"], {(row["recovery"], row["learning_rate"]): row for row in result["summary"]}
    rates = sorted(rate for recovery, rate in rows if recovery == "staged")
    lines = ["| svd at 50% | " + " | ".join(f"rate {rate:g}" for rate in rates) + " |", "|---" * (1 + len(rates)) + "|"]
    for recovery, words in (("finetune", "one shot, then trained"), ("staged", "in stages")):
        cells = (f"{100 * row['mean']:.1f} ± {100 * row['spread']:.1f}, {row['collapsed']:.0%} at chance"
                 for row in (rows[recovery, rate] for rate in rates))
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    dense = next(row["mean"] for row in result["summary"] if row["method"] == "dense")
    return "\n".join(lines) + (f"\n\nAccuracy in % on {about['test_rows']:,} couples of `pairs`, dense {100 * dense:.1f}, chance "
                               f"{100 * about['chance']:.1f}; {about['steps']} steps in all, three seeds.")


def learned() -> str:
    found = {method: json.loads((RESULTS / f"learned_{method}" / "compare.json").read_text())
             for method in ("svd", "whitened", "dsformer", "rocket")}
    about, dense = found["svd"]["about"], found["svd"]["summary"][0]["mean"]
    lines = ["| method, training | 50% of the bits | 28% |", "|---|---|---|"]
    for method, one in found.items():
        rows = {(row["recovery"], row["ratio"]): row for row in one["summary"][1:]}
        ratios = sorted({ratio for _, ratio in rows}, reverse=True)
        for recovery in dict.fromkeys(recovery for recovery, _ in rows):
            cells = (f"{100 * row['mean']:.1f}" + (f" ± {100 * row['spread']:.1f}" if row["learning_rate"] else "")
                     for row in (rows[recovery, ratio] for ratio in ratios))
            lines.append(f"| {method}, {recovery} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + (f"\n\nAccuracy in % on {about['test_rows']:,} texts of `sections`, dense {100 * dense:.1f}; "
                               f"{about['steps']} steps, mean ± standard deviation over three seeds of the training.")


OTHERS = ("monarch", "sparse24", "dictionary")
TABLES = {"demo": demo, "quality": quality, "structures": structures, "staging": staging, "sparse": sparse,
          "learned": learned, "low_rank": low_rank, "other_ops": other_ops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    old = new = README.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        new = re.sub(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", lambda found: f"{found[1]}{table()}\n{found[2]}", new,
                     flags=re.DOTALL)
    if check and new != old:
        sys.exit("README.md: its tables are not those of bench/results; run python bench/readme.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
