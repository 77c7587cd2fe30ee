"""The report of an experiment as a page and a picture. Every line of a quick run says that it was one."""
import math
from collections.abc import Mapping
from pathlib import Path

from ..measured import markdown as table
from ..progress import json_digest
from .recipes import RECIPES
from .verdict import TIES, summary

COLUMNS = {"task": "task", "recipe": "recipe", "kept": "kept", "steps": "steps", "seeds": "seeds", "mean": "mean",
           "spread": "spread", "each": "each seed", "seconds": "s"}


def what(recipe: str) -> str:
    return "dense teacher" if recipe == "teacher" else RECIPES[recipe].what


def score(value: float | None, kind: str) -> str:
    if value is None:
        return "diverged"
    return f"{100 * value:.1f}" if kind == "accuracy" else f"{math.exp(value):.1f}"


def difference(value: float, kind: str) -> str:
    """Positive where the claim holds: points of accuracy, or the share of the perplexity that is less."""
    return f"{100 * value:+.1f}" if kind == "accuracy" else f"{100 * (1 - math.exp(-value)):+.1f} %"


def texts(cells: list[Mapping], quick: bool = False) -> list[dict[str, str]]:
    """The rows of the table as they are shown."""
    return [{"task": row["task"], "name": row["recipe"], "recipe": f"`{row['recipe']}`: {what(row['recipe'])}",
             "kept": "" if row["kept"] is None else f"{row['kept']:.1%}",
             "steps": f"{row['steps']}{' (quick run)' if quick else ''}",
             "seeds": f"{row['seeds']}" + (f", {row['failed']} diverged" if row["failed"] else ""), "mean": score(row["mean"], row["score_is"]),
             "spread": "" if row["spread"] is None else score_spread(row),
             "each": ", ".join(score(value, row["score_is"]) for value in row["scores"]), "seconds": f"{row['seconds']:.0f}"}
            for row in summary(cells)]


def score_spread(row: Mapping) -> str:
    """The standard deviation over seeds: points, or the share of the perplexity."""
    return f"{100 * row['spread']:.1f}" + ("" if row["score_is"] == "accuracy" else " %")


def sentences(found: Mapping) -> list[str]:
    """What became of each claim, in a line."""
    lines, quick = [], "quick run: " if found["about"]["quick"] else ""
    kinds = {cell["task"]: cell["score_is"] for cell in found["cells"]}
    for claim in found["claims"]:
        kind = kinds[claim["task"]]
        lines.append(f"{quick}{claim['text']} ({claim['task']}, {claim['ratio']:.0%}): {claim['verdict']}"
                     + _measured(claim, kind) + f". Published: {claim['published']}."
                     + (f" With {claim['longer']['steps']} steps: {claim['longer']['verdict']}"
                        f"{_measured(claim['longer'], kind)}." if "longer" in claim else ""))
    return [*lines, *(f"{quick}{line}" for line in _best(found["cells"]))]


def _best(cells: list[Mapping]) -> list[str]:
    """The highest mean on each task that has a teacher, against the teacher's."""
    rows = [row for row in summary(cells) if row["mean"] is not None]
    lines = []
    for teacher in (row for row in rows if row["recipe"] == "teacher"):
        if mine := [row for row in rows if row["task"] == teacher["task"] and row is not teacher]:
            best = max(mine, key=lambda row: row["mean"])
            lines.append(f"the best recipe on {best['task']} is {best['recipe']}, "
                         f"{difference(best['mean'] - teacher['mean'], 'accuracy')} of the teacher.")
    return lines


def _measured(one: Mapping, kind: str) -> str:
    if one["gain"] is None:
        return ", since a side diverged"
    seeds = ", ".join(difference(gain, kind) for gain in one["gains"])
    return f", {difference(one['gain'], kind)}" + (f" ({seeds} by seed)" if len(one["gains"]) > 1 else ", one seed")


def markdown(found: Mapping) -> str:
    about = found["about"]
    units = {"accuracy": "accuracy in %", "nats_per_token": "perplexity"}
    kinds = dict.fromkeys(cell["score_is"] for cell in found["cells"])
    ties = ", ".join(f"{100 * TIES[kind]:.0f} {'points' if kind == 'accuracy' else '% of the perplexity'}" for kind in kinds)
    lines = [f"# {'Quick run: ' if about['quick'] else ''}{about['reference']}", "",
             f"Made by `lowfat reproduce {about['paper']}{' --quick' if about['quick'] else ''}`; do not edit. "
             f"{'; '.join(units[kind] for kind in kinds)}; differences under {ties} are ties.", "",
             *(f"* {line}" for line in sentences(found)), "",
             f"- {about['cpu']}, {about['cores']} cores, {about['threads']} thread(s) a run, {about['jobs']} at a time; "
             f"torch {about['torch']}; {about['date']}",
             "- s: seconds of the call that finished a run. " + "; ".join(
                 f"{name}: {rows:,} test rows, SHA-256 of all rows `{about['rows'][name][:16]}`"
                 for name, rows in about["test_rows"].items()),
             f"- {about['steps']} steps of {about['batch_size']}, rate {about['rate']:g} for every recipe; options "
             f"`{json_digest({key: about[key] for key in ('tasks', 'steps', 'seeds', 'autocast')})[:16]}`", "",
             table(COLUMNS, texts(found["cells"], about["quick"]))]
    if found["longer"]:
        lines += ["Claims that did not hold, with more steps for both sides:", "", table(COLUMNS, texts(found["longer"]))]
    return "\n".join(lines)


def draw(found: Mapping, path: Path) -> None:
    """The mean of every recipe and each seed, a panel for each task; dotted: the teacher."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = summary(found["cells"])
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    most = max(len([row for row in rows if row["task"] == task]) for task in tasks)
    figure = Figure(figsize=(1.5 + 4.5 * len(tasks), 1.2 + 0.3 * most), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        mine = [row for row in rows if row["task"] == task and row["recipe"] != "teacher" and row["mean"] is not None]
        is_share = all(row["score_is"] == "accuracy" for row in mine)

        def shown(value: float, is_share=is_share) -> float:
            return 100 * value if is_share else math.exp(value)

        for height, row in enumerate(reversed(mine)):
            axes.plot([shown(value) for value in row["scores"]], [height] * len(row["scores"]), "o", color="C0", alpha=0.4,
                      markersize=4)
            axes.plot(shown(row["mean"]), height, "|", color="C0", markersize=14, markeredgewidth=2)
        axes.set_yticks(range(len(mine)), [row["recipe"] for row in reversed(mine)], fontsize=8)
        for row in rows:
            if (row["task"], row["recipe"]) == (task, "teacher"):
                axes.axvline(shown(row["mean"]), color="black", linestyle=":", linewidth=0.8)
        axes.set_title(("quick run: " if found["about"]["quick"] else "") + task, fontsize=9)
        axes.set_xlabel("accuracy, %" if is_share else "perplexity, less is better", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
