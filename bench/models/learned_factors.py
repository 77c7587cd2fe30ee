"""Learned sparse factors against fine-tuned low rank at equal bits and steps: `python bench/models/learned_factors.py`, or
`--page` for the page alone.

The grid below was fixed before the first run: the classifier of `sections`, two ratios, three seeds, the steps and the rate
of bench/models/structures.py. A value counts 16 bits and a place in a mask one, as in bench/models/sparse.py, so that a
dictionary gets fewer parameters than low-rank factors. Each method is one `lowfat compare`, which goes on where it was
stopped; its table, picture and numbers go to bench/results/learned_METHOD, the page made of them to learned_factors.md.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

import lowfat
from lowfat.data import read_rows
from lowfat.methods import METHODS as SOLVERS

sys.path.insert(0, str(Path(__file__).resolve().parent))
import quality  # noqa: E402  the scripts beside this one
import sparse  # noqa: E402
import structures  # noqa: E402

RATIOS = (0.5, 0.28)  # of the bits
RECOVERIES = {"svd": ("none", "finetune"), "whitened": ("none", "finetune"),
           "dsformer": ("none", "finetune", "straight_through"), "rocket": ("none", "finetune", "straight_through")}
GRID = {"learning_rates": (2e-4,), "steps": 150, "seeds": 3}
CLAIMS = (("learned DSFormer factors are ahead of fine-tuned SVD", ("dsformer", "straight_through"), ("svd", "finetune")),
          ("learned DSFormer factors are ahead of fine-tuned whitened low rank", ("dsformer", "straight_through"),
           ("whitened", "finetune")),
          ("learned ROCKET factors are ahead of fine-tuned whitened low rank", ("rocket", "straight_through"),
           ("whitened", "finetune")),
          ("ROCKET's factors, fine-tuned where they are, are ahead of fine-tuned whitened low rank", ("rocket", "finetune"),
           ("whitened", "finetune")),
          ("learning which factors to use beats fine-tuning those of the start, DSFormer", ("dsformer", "straight_through"),
           ("dsformer", "finetune")),
          ("learning which factors to use beats fine-tuning those of the start, ROCKET", ("rocket", "straight_through"),
           ("rocket", "finetune")))
PAGE = quality.RESULTS / "learned_factors.md"


def folder_of(method: str) -> Path:
    return quality.RESULTS / f"learned_{method}"


def run(method: str) -> None:
    task = quality.TASKS["sections"]
    train, test = (read_rows(quality.DATA / task.name / f"{split}.jsonl") for split in ("train", "test"))

    def tell(done: int, total: int, what: str) -> None:
        print(f"{method}: {done} of {total} steps, {what}", flush=True)

    lowfat.compare(quality.teacher(task, structures.SEED), train[:task.train_rows], test[:task.test_rows],
                   task="classification", out=folder_of(method), methods=(method,), recoveries=RECOVERIES[method],
                   ratios=parameter_ratios(method), max_length=task.max_length, autocast=False,
                   jobs=torch.get_num_threads(), on_progress=tell, overwrite=True, **GRID)


def parameter_ratios(method: str) -> tuple[float, ...]:
    """The shares of the parameters that take RATIOS of the bits."""
    subject = sparse.sections()
    model = subject.load()
    stats = sparse.calibrated(subject, model, subject.tokenizer(), 0) if SOLVERS[method].needs else None
    plans = [sparse.plan_of(model, {"method": method, "ratio": ratio, "policy": "per_matrix"}, stats)[0] for ratio in RATIOS]
    return tuple(plan.totals()["parameters"] / plan.totals()["dense_parameters"] for plan in plans)


# ------------------------------------------------------------------------------------------------ the page
def page() -> str:
    found = {method: json.loads((folder_of(method) / "compare.json").read_text()) for method in RECOVERIES}
    rows = {}
    for method, one in found.items():
        ratios = sorted({row["ratio"] for row in one["summary"] if row["ratio"] < 1}, reverse=True)
        rows |= {(method, row["recovery"], RATIOS[ratios.index(row["ratio"])]): row for row in one["summary"]
                 if row["ratio"] in ratios}
    dense = next(row for row in found["svd"]["summary"] if row["method"] == "dense")
    lines = ["# Learned sparse factors against fine-tuned low rank", "",
             "Made by `python bench/models/learned_factors.py --page` from `learned_*`; do not edit. all-MiniLM-L6-v2,",
             f"fine-tuned on `sections` ({100 * dense['mean']:.1f} % dense), its 36 encoder linears factorized, equal stored",
             f"bits (16 a value, one a place in a mask), {GRID['steps']} steps for everything that is trained, rate "
             f"{GRID['learning_rates'][0]:g}.", "Points of accuracy, means over three seeds; differences under "
             f"{100 * structures.TIE:.0f} points are called ties.", ""]
    for claim, ahead, behind in CLAIMS:
        pairs = {bits: (rows[*ahead, bits]["mean"], rows[*behind, bits]["mean"]) for bits in RATIOS}
        gains = {bits: math.nan if None in pair else pair[0] - pair[1] for bits, pair in pairs.items()}
        lines.append(f"* {claim}: **{structures.verdict(gains.values())}** ({structures.in_points(gains)}).")
    lines += ["", "| bits | method | training | parameters | mean | spread | lowest to highest | s |",
              "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for bits in RATIOS:
        for method, recoveries in RECOVERIES.items():
            for recovery in recoveries:
                row = rows[method, recovery, bits]
                lines.append(f"| {bits:.0%} | {method} | {recovery} | {row['kept']:.1%} | {in_words(row)} | "
                             f"{row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def in_words(row: dict) -> str:
    """Mean, spread and range of a row of the summary."""
    if row["mean"] is None:
        return "diverged | | "
    mean = f"{100 * row['mean']:.1f}"
    return f"{mean} | | " if row["seeds"] in (None, 1) else (f"{mean} | {100 * row['spread']:.1f} | "
                                                             f"{100 * row['lowest']:.1f} to {100 * row['highest']:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(RECOVERIES))
    parser.add_argument("--page", action="store_true", help="make the page alone")
    options = parser.parse_args()
    if unknown := set(options.methods) - RECOVERIES.keys():
        parser.error(f"there is no method {', '.join(unknown)}; there are {', '.join(RECOVERIES)}")
    for chosen in () if options.page else options.methods or RECOVERIES:
        run(chosen)
    if all((folder_of(method) / "compare.json").exists() for method in RECOVERIES):
        PAGE.write_text(page())
