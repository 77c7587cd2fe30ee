"""Sparse codes against low rank at equal stored bits, nothing trained: `python bench/models/sparse.py [sections]
[docstrings]`, or `--page` for the page alone.

The grid below was fixed before the first run: two models (a classifier of `sections`, and the encoder that finds the rest of
a docstring), three ratios, three samples of calibration texts. A value counts 16 bits and a place in a mask one, so that a
dictionary gets fewer parameters than low-rank factors. Every finished cell is kept under bench/data/sparse, so a run that
was stopped goes on; results/sparse.md is made from results/sparse.json.
"""
from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import lowfat
from lowfat.data import batches, read_rows
from lowfat.demo import ENCODER_SHA256, encoder_folder
from lowfat.docstrings import docstring_pairs
from lowfat.evaluate import evaluate

sys.path.insert(0, str(Path(__file__).resolve().parent))
import quality  # noqa: E402  the script beside this one

RATIOS = (0.8, 0.7, 0.5)
SEEDS = (0, 1, 2)  # of the calibration sample
POLICIES = {"whitened": ("per_matrix", "knapsack"), "rocket": ("per_matrix", "knapsack"),
            "compot": ("per_matrix", "knapsack"), "cospadi": ("per_matrix",)}  # minutes each
ORDER = ("whitened", "rocket", "compot", "cospadi")  # of the papers, worst first
CALIBRATION_ROWS, CALIBRATION_BATCH = 1024, 8
TEXTS, MAX_LENGTH = 400, 64  # of the docstrings
TEACHER = 0  # seed of the classifier
SOLVER_SECONDS = {"rocket": 60, "compot": 60, "cospadi": 900}  # at most, for all linears of the model
TIE = 0.01
CACHE = quality.DATA / "sparse"


@dataclass(frozen=True)
class Subject:
    """One model and what is asked of it."""
    name: str
    measure: str  # the number of the table, of those that evaluate() gives
    key: str  # of the cells: model and data
    load: Callable[[], nn.Module]
    material: Callable[[], list[dict]]  # rows to draw the calibration sample from
    rows: Callable[[], list[dict]]  # to evaluate on
    task: str
    tokenizer: Callable
    max_length: int


def sections() -> Subject:
    task = quality.TASKS["sections"]
    folder = quality.teacher(task, TEACHER)
    return Subject("sections", "accuracy", folder.name,
                   lambda: AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval(),
                   lambda: read_rows(quality.DATA / task.name / "train.jsonl")[:task.train_rows],
                   lambda: read_rows(quality.DATA / task.name / "test.jsonl")[:task.test_rows], "classification",
                   lambda: AutoTokenizer.from_pretrained(folder), task.max_length)


def docstrings() -> Subject:
    folder = encoder_folder()
    return Subject("docstrings", "recall_at_1", quality.digest([ENCODER_SHA256, TEXTS, MAX_LENGTH]),
                   lambda: AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
                   lambda: [{"text": f"{pair.first} {pair.rest}"} for pair in docstring_pairs("libs")],
                   lambda: [{"text_a": pair.first, "text_b": pair.rest} for pair in docstring_pairs("stdlib")[:TEXTS]],
                   "embedding", lambda: AutoTokenizer.from_pretrained(folder), MAX_LENGTH)


SUBJECTS = {"sections": sections, "docstrings": docstrings}


def cells() -> list[dict]:
    """Every (method, ratio, policy, seed), the dense model first."""
    return [{"method": "dense", "ratio": 1.0, "policy": "", "seed": 0}] + [
        {"method": method, "ratio": ratio, "policy": policy, "seed": seed}
        for method, policies in POLICIES.items() for ratio in RATIOS for policy in policies for seed in SEEDS]


def run(name: str) -> list[dict]:
    """The rows of one subject: read where they are kept, computed and kept where they are not."""
    CACHE.mkdir(parents=True, exist_ok=True)
    subject, code, rows, loaded = SUBJECTS[name](), quality.code_digest(), [], {}
    for cell in cells():
        kept = CACHE / f"{name}-{quality.digest([subject.key, cell, code, CALIBRATION_ROWS, torch.__version__])}.json"
        if not kept.exists():
            row = {"task": name, **cell, **one_cell(subject, cell, loaded)}
            staged = kept.with_suffix(".tmp")
            staged.write_text(json.dumps(row))
            os.replace(staged, kept)
            print(f"{name} {cell['method']} {cell['policy']} {cell['ratio']:.0%} seed {cell['seed']}: "
                  f"{row['value']:.1%}, {row['solver_cpu_seconds']:.0f} s", flush=True)
        rows.append(json.loads(kept.read_text()))
    return rows


def one_cell(subject: Subject, cell: dict, loaded: dict) -> dict:
    """loaded: what cells share, the dense model and the statistics of each seed."""
    tokenizer = subject.tokenizer()
    if "dense" not in loaded:
        loaded["dense"] = subject.load()
    model, seconds, bits, errors = copy.deepcopy(loaded["dense"]), 0.0, 1.0, {}
    if cell["method"] != "dense":
        seed = cell["seed"]
        if seed not in loaded:
            loaded[seed] = calibrated(subject, loaded["dense"], tokenizer, seed)
        plan, bits = plan_of(model, cell, loaded[seed])
        started = time.process_time()
        report = lowfat.factorize(model, plan, loaded[seed])
        seconds, errors = time.process_time() - started, errors_of(report)
    found = evaluate(model, subject.rows(), tokenizer, task=subject.task, max_length=subject.max_length, batch_size=64)
    return {"value": found[subject.measure], "rows": found["rows"], "bits": bits, "output_errors": errors,
            "solver_cpu_seconds": round(seconds, 2)}


def calibrated(subject: Subject, model: nn.Module, tokenizer, seed: int):
    material = subject.material()
    order = torch.randperm(len(material), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_ROWS]
    found = batches([material[index] for index in order.tolist()], tokenizer, subject.task, batch_size=CALIBRATION_BATCH,
                    max_length=subject.max_length)
    return lowfat.calibrate(model, found)


def plan_of(model: nn.Module, cell: dict, stats) -> tuple[lowfat.Plan, float]:
    """(the plan, its bits over those of the dense weights): the parameters that leave room for the masks."""
    ratio = cell["ratio"]
    while True:
        plan = lowfat.plan(model, method=cell["method"], ratio=ratio, policy=cell["policy"], stats=stats)
        totals = plan.totals()
        bits = (totals["parameters"] + totals["index_bytes"] / 2) / totals["dense_parameters"]
        if bits <= cell["ratio"]:
            return plan, bits
        ratio *= cell["ratio"] / bits


def errors_of(report) -> dict[str, float]:
    """Mean relative error of the outputs, by what a matrix does: where the methods differ."""
    kinds: dict[str, list[float]] = {}
    for layer in report.layers:
        kind = f"{layer.shape.get('in_features')} to {layer.shape.get('out_features')}" if layer.kept else "dense"
        kinds.setdefault(kind, []).append(layer.output_error or 0.0)
    return {kind: mean(values) for kind, values in sorted(kinds.items())}


# ------------------------------------------------------------------------------------------------ the page
def page(rows: list[dict], about: dict) -> str:
    lines = ["# Sparse codes against low rank at equal bits", "",
             "Made by `python bench/models/sparse.py --page` from `sparse.json`; do not edit. all-MiniLM-L6-v2, its 36",
             "encoder linears factorized, nothing trained afterwards. Bits: 16 for each value and one for each place of a",
             "mask, over 16 for each dense weight.", "",
             f"- machine: {about['machine']['cpu']}, {about['machine']['cores']} cores, {about['machine']['threads']} "
             f"thread(s); Python {about['versions']['python']}, torch {about['versions']['torch']}",
             f"- calibration: {CALIBRATION_ROWS} texts, samples of seeds {', '.join(map(str, SEEDS))}; evaluation in fp32",
             *solver_times(rows), ""]
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        dense = next(row for row in own if row["method"] == "dense")
        lines += [f"## {task}", "", f"{dense['rows']:,} rows, {'accuracy' if task == 'sections' else 'found first'} in %; "
                  f"dense {100 * dense['value']:.1f}.", "",
                  "| bits | method | policy | " + " | ".join(f"seed {seed}" for seed in SEEDS)
                  + " | mean | lost | solver, s |",
                  "| --- " * (6 + len(SEEDS)) + "|"]
        for ratio in RATIOS:
            for method, policies in POLICIES.items():
                for policy in policies:
                    found = [row for row in own if (row["method"], row["ratio"], row["policy"]) == (method, ratio, policy)]
                    values = [100 * row["value"] for row in found]
                    lines.append(f"| {mean(row['bits'] for row in found):.1%} | {method} | {policy} | "
                                 + " | ".join(f"{value:.1f}" for value in values)
                                 + f" | {mean(values):.1f} | {100 * dense['value'] - mean(values):.1f} | "
                                 + f"{mean(row['solver_cpu_seconds'] for row in found):.0f} |")
        lines += ["", *orderings(own), ""]
    return "\n".join(lines)


def solver_times(rows: list[dict]) -> list[str]:
    """CPU seconds for all matrices, the slowest cell of each method."""
    slowest = {method: max(row["solver_cpu_seconds"] for row in rows if row["method"] == method)
               for method in SOLVER_SECONDS}
    return ["- solver, all matrices, most CPU seconds of a cell: " + "; ".join(
        f"{method} {found:.0f} (at most {SOLVER_SECONDS[method]}{'' if found <= SOLVER_SECONDS[method] else ', MISSED'})"
        for method, found in slowest.items())]


def orderings(rows: list[dict]) -> list[str]:
    """The order of the papers, neighbour by neighbour, and where it does not hold, the errors of the outputs behind it."""
    lines = []
    for ratio in RATIOS:
        for worse, better in pairwise(ORDER):
            for policy in POLICIES[better]:
                pair = [[row for row in rows if (row["method"], row["ratio"], row["policy"]) == (method, ratio, policy)]
                        for method in (worse, better)]
                gains = [b["value"] - a["value"] for a, b in zip(*pair)]
                lines.append(f"- {better} above {worse} at {ratio:.0%}, {policy}: {verdict(gains)} "
                             f"({', '.join(f'{100 * gain:+.1f}' for gain in gains)} points)"
                             + ("" if min(gains) > 0 else "; relative error of the outputs, "
                                + "; ".join(f"{rows[0]['method']}: {in_words(rows)}" for rows in pair)))
    return lines


def verdict(gains: list[float]) -> str:
    if abs(mean(gains)) < TIE:
        return "a tie"
    return "holds" if min(gains) > 0 else "holds in the mean" if mean(gains) > 0 else "**does not hold**"


def in_words(rows: list[dict]) -> str:
    kinds = dict.fromkeys(kind for row in rows for kind in row["output_errors"])
    return ", ".join(f"{kind} {mean(row['output_errors'].get(kind, 0.0) for row in rows):.3f}" for kind in kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--page", action="store_true", help="make the page alone")
    options = parser.parse_args()
    if unknown := set(options.subjects) - SUBJECTS.keys():
        parser.error(f"there is no subject {', '.join(unknown)}; there are {', '.join(SUBJECTS)}")
    table = quality.RESULTS / "sparse.json"
    if not options.page:
        rows = [row for name in options.subjects or SUBJECTS for row in run(name)]
        about = quality.facts([quality.TASKS["sections"]], [TEACHER])
        table.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    found = json.loads(table.read_text())
    (quality.RESULTS / "sparse.md").write_text(page(found["rows"], found["about"]))


if __name__ == "__main__":
    main()
