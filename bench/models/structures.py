"""Low-rank against block-wise low-rank against Monarch, and staged factorization against one shot, on real classifiers:
`python bench/models/structures.py [sections] [pairs]`, or `--page` for the page alone.

The grids below were fixed before the first run. Each is one `lowfat compare` of the teacher of bench/models/quality.py, and
goes on where it was stopped; its table, picture and numbers go to bench/results/structures_TASK. From those that are there
bench/results/structures.md is made: what each finding of the paper (Gupta et al., 2406.11307) becomes here.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

import lowfat
from lowfat.comparison.summary import TIE
from lowfat.data import read_rows

sys.path.insert(0, str(Path(__file__).resolve().parent))
import quality  # noqa: E402  the script beside this one

SEED = 0  # of the teacher
PAGE = quality.RESULTS / "structures.md"
GRIDS = {
    "sections": {"methods": ("svd", "block_low_rank:blocks=4", "monarch:blocks=4", "whitened",
                             "block_low_rank:blocks=4:fit=outputs", "monarch:blocks=4:fit=outputs"),
                 "ratios": (0.5, 0.25), "recoveries": ("none", "finetune"), "learning_rates": (2e-4,), "steps": 150},
    "pairs": {"methods": ("svd",), "ratios": (0.5,), "recoveries": ("none", "finetune", "staged"),
              "learning_rates": (5e-5, 1e-4, 2e-4), "steps": 400},
}
FITS = {"nearest weights": ("svd", "block_low_rank:blocks=4", "monarch:blocks=4"),
        "nearest outputs": ("whitened", "block_low_rank:blocks=4:fit=outputs", "monarch:blocks=4:fit=outputs")}


def run(name: str) -> None:
    task = quality.TASKS[name]
    train, test = (read_rows(quality.DATA / name / f"{split}.jsonl") for split in ("train", "test"))

    def tell(done: int, total: int, what: str) -> None:
        print(f"{name}: {done} of {total} steps, {what}", flush=True)

    lowfat.compare(quality.teacher(task, SEED), train[:task.train_rows], test[:task.test_rows], seeds=3,
                   task="classification", out=folder_of(name), max_length=task.max_length, autocast=False,
                   jobs=torch.get_num_threads(), on_progress=tell, overwrite=True, **GRIDS[name])


def folder_of(name: str) -> Path:
    return quality.RESULTS / f"structures_{name}"


# ------------------------------------------------------------------------------------------------ the page
def page() -> str:
    text = ["# Which structure, and at once or in stages", "",
            "Made by `python bench/models/structures.py --page` from `structures_sections` and `structures_pairs`; do not edit.",
            "all-MiniLM-L6-v2, fine-tuned on a task, its 36 encoder linears factorized, equal parameters, equal steps. "
            f"Means over three seeds of the training; differences under {100 * TIE:.0f} points are called ties.", ""]
    for name, findings in (("sections", structures), ("pairs", staging)):
        path = folder_of(name) / "compare.json"
        if path.exists():
            found = json.loads(path.read_text())
            text += [f"## {name}", "", *findings(found["summary"]), "",
                     *(folder_of(name) / "compare.md").read_text().splitlines()[1:], ""]
    return "\n".join(text)


def structures(summary: list[dict]) -> list[str]:
    """The paper: trained, low rank is ahead of Monarch at every ratio; block-wise low rank lies close to Monarch, its
    relative. The verdict is on what was trained; what was not stands beside it."""
    lines = []
    for fit, (low_rank, blockwise, monarch) in FITS.items():
        for claim, ahead, behind in (("low rank is ahead of Monarch", low_rank, monarch),
                                     ("low rank is ahead of block-wise low rank", low_rank, blockwise),
                                     ("block-wise low rank is ahead of Monarch", blockwise, monarch)):
            rows = [row for row in summary if row["method"] == ahead]
            trained, untrained = ({row["ratio"]: gain(summary, row, ahead, behind) for row in rows
                                   if (row["recovery"] == "none") is plain} for plain in (False, True))
            lines.append(f"* {fit}: {claim}: **{verdict(trained.values())}** (points, trained: {in_points(trained)}; not "
                         f"trained: {in_points(untrained)}).")
    return lines


def in_points(gains: dict[float, float]) -> str:
    return ", ".join(f"{100 * value:+.1f} at {ratio:.0%}" for ratio, value in gains.items())


def gain(summary: list[dict], row: dict, ahead: str, behind: str) -> float:
    mean = {one["method"]: one["mean"] for one in summary
            if all(one[key] == row[key] for key in ("ratio", "recovery", "learning_rate"))}
    return math.nan if None in (mean[ahead], mean[behind]) else mean[ahead] - mean[behind]


def verdict(gains) -> str:
    gains = list(gains)
    if any(map(math.isnan, gains)):
        return "not decided, every run of a method diverged"
    if min(gains) >= TIE:
        return "supported"
    if max(gains) <= -TIE:
        return "contradicted"
    if all(abs(value) < TIE for value in gains):
        return "not supported, ties"
    return "supported in part" if min(gains) > -TIE else "not supported, mixed"


def staging(summary: list[dict]) -> list[str]:
    """The paper: factorized in stages, fewer runs collapse and the mean is higher."""
    lines = []
    pairs = [(one, next(other for other in summary if other["recovery"] == "staged"
                        and all(one[key] == other[key] for key in ("method", "ratio", "learning_rate"))))
             for one in summary if one["recovery"] == "finetune"]
    fewer = [once["collapsed"] - staged["collapsed"] for once, staged in pairs]
    words = "supported" if min(fewer) >= 0 < max(fewer) else "contradicted" if max(fewer) <= 0 > min(fewer) else \
        "not supported" if max(fewer) == 0 else "mixed"
    lines.append(f"* staging keeps runs from staying at chance: **{words}** (share of collapsed runs, one shot against staged: "
                 + ", ".join(f"{once['collapsed']:.0%} against {staged['collapsed']:.0%} at rate {once['learning_rate']:g}"
                             for once, staged in pairs) + ").")
    gains = [math.nan if None in (staged["mean"], once["mean"]) else staged["mean"] - once["mean"] for once, staged in pairs]
    lines.append(f"* staging raises the mean: **{verdict(gains)}** ("
                 + ", ".join(f"rate {once['learning_rate']:g} {100 * value:+.1f}" for (once, _), value in zip(pairs, gains))
                 + f" points, {pairs[0][0]['steps']} steps in all).")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="*", metavar="GRID", help=", ".join(GRIDS))
    parser.add_argument("--page", action="store_true", help="make the page alone")
    options = parser.parse_args()
    if unknown := set(options.grids) - GRIDS.keys():
        parser.error(f"there is no grid {', '.join(unknown)}; there are {', '.join(GRIDS)}")
    for chosen in () if options.page else options.grids or GRIDS:
        run(chosen)
    PAGE.write_text(page())
