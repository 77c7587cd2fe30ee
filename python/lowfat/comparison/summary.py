"""What the cells say together: means over seeds, runs that never left chance, who is ahead; as a table and a picture."""
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from ..data import label_ids
from ..measured import markdown as table
from ..progress import json_digest

TIE = 0.02  # of an accuracy or MRR: smaller differences are called ties
_KEY = ("ratio", "method", "recovery", "learning_rate")


def chance(task: str, rows: Sequence[Mapping], *, label2id: Mapping[str, int], vocabulary: int) -> float:
    """The score of a model that knows nothing of the text: the most frequent label's share; for lm, ln of the vocabulary
    (nats); for embeddings the mean reciprocal rank of a random order."""
    if task == "lm":
        return math.log(vocabulary)
    if task == "embedding":
        return sum(1 / rank for rank in range(1, len(rows) + 1)) / len(rows)
    labels = Counter(label_ids(rows, label2id)[0])
    return max(labels.values()) / len(rows)


def summary(found: Mapping) -> list[dict]:
    """A row for every cell of the grid without its seeds: mean, spread, share of collapsed seeds, time, size, speed."""
    speed = {(row["method"], row["ratio"]): row for row in found["speed"]}
    groups: dict[tuple, list[dict]] = {}
    for row in found["cells"]:
        groups.setdefault(tuple(row[key] for key in _KEY), []).append(row)
    rows = []
    for key, cells in groups.items():
        scores, kept, seconds = ([cell[name] for cell in cells if cell[name] is not None]
                                 for name in ("score", "kept", "seconds"))
        rows.append(dict(zip(_KEY, key)) | {
            "kept": max(kept, default=None), "seeds": len(cells), "steps": max(cell["steps"] for cell in cells),
            "stages_failed": sum(cell["stages_failed"] for cell in cells),
            "mean": mean(scores) if scores else None, "spread": stdev(scores) if len(scores) > 1 else 0.0,
            "lowest": min(scores, default=None), "highest": max(scores, default=None),
            "collapsed": sum(is_collapsed(cell["score"], found["about"]) for cell in cells) / len(cells),
            "seconds": mean(seconds) if seconds else None}
            | {name: value for name, value in speed[key[1], key[0]].items() if name not in _KEY})
    return rows


def is_collapsed(score: float | None, about: Mapping) -> bool:
    """Diverged, or not above chance by more than two standard errors of a share of the test rows."""
    base = about["chance"]
    if score is None:
        return True
    if about["score"] == "nats_per_token":
        return score >= base
    return score <= base + 2 * math.sqrt(base * (1 - base) / about["test_rows"])


def findings(found: Mapping) -> list[str]:
    """At each ratio, recovery and rate the methods in order of their means; then the recoveries of each method."""
    if found["about"]["score"] == "nats_per_token":
        return []
    lines = []
    rows = [row for row in found["summary"] if row["method"] != "dense" and row["mean"] is not None]
    for what, fixed in (("method", ("ratio", "recovery", "learning_rate")),
                        ("recovery", ("ratio", "method", "learning_rate"))):
        groups: dict[tuple, list[dict]] = {}
        for row in rows:
            groups.setdefault(tuple(row[key] for key in fixed), []).append(row)
        for key, members in groups.items():
            if len(members) < 2:
                continue
            if all(row["collapsed"] == 1 for row in members):
                lines.append(f"- {_setting(dict(zip(fixed, key)))}: every run ended at chance, which tells nothing")
                continue
            members.sort(key=lambda row: -row["mean"])
            best = members[0]["mean"]
            behind = [f"{row[what]} {_behind(best - row['mean'])}" for row in members[1:]]
            lines.append(f"- {_setting(dict(zip(fixed, key)))}: {members[0][what]} first; {', '.join(behind)}")
    return lines


def _behind(difference: float) -> str:
    return f"{100 * difference:.1f} points lower" + (" (a tie)" if difference < TIE else "")


def _setting(values: Mapping) -> str:
    words = [f"{values['ratio']:.0%}"] + [str(values[name]) for name in ("method", "recovery") if name in values]
    return ", ".join(words + ([f"rate {values['learning_rate']:g}"] if values["learning_rate"] else []))


COLUMNS = {"ratio": "ratio", "kept": "kept", "method": "method", "recovery": "recovery", "learning_rate": "rate",
           "seeds": "seeds", "mean": "mean", "spread": "spread", "range": "lowest to highest", "collapsed": "collapsed",
           "seconds": "s", "megabytes": "MB", "one": "faster, 1 text", "many": "a batch"}


def texts(found: Mapping) -> list[dict[str, str]]:
    """The rows of the summary as they are shown."""
    shown = []
    points = found["about"]["score"] != "nats_per_token"

    def score(value):
        return "diverged" if value is None else f"{100 * value:.1f}" if points else f"{value:.3f}"

    for row in found["summary"]:
        trained = row["learning_rate"] is not None
        shown.append({
            "ratio": f"{row['ratio']:.0%}", "method": row["method"],
            "kept": "" if row["kept"] is None else f"{100 * row['kept']:.1f} %",
            "recovery": row["recovery"], "learning_rate": f"{row['learning_rate']:g}" if trained else "",
            "seeds": str(row["seeds"]) if trained else "", "mean": score(row["mean"]),
            "spread": score(row["spread"]) if trained else "",
            "range": f"{score(row['lowest'])} to {score(row['highest'])}" if trained else "",
            "collapsed": "" if row["method"] == "dense" else f"{row['collapsed']:.0%}",
            "seconds": "" if row["seconds"] is None else f"{row['seconds']:.0f}",
            "megabytes": f"{row['bytes'] / 1e6:.1f}",
            **{name: f"{row[f'{name}_faster'][1]:.2f} x" if f"{name}_faster" in row else "" for name in ("one", "many")}})
    return shown


def markdown(found: Mapping) -> str:
    about = found["about"]
    machine = f"{about.get('gpu') or about['cpu']}, {about['cores']} cores, {about['threads']} thread(s) a cell, " \
              f"{about['jobs']} at a time"
    timed = next(row for row in found["speed"] if row["method"] != "dense")
    many, threads = timed["many_texts"], timed["threads"]
    unit = "nats a token" if about["score"] == "nats_per_token" else "%"
    base = about["chance"] if unit != "%" else 100 * about["chance"]
    lines = [f"# Comparison: {about['score']} in {unit}", "",
             f"- {machine}; torch {about['torch']}; {about['date']}",
             f"- {about['test_rows']:,} test rows, chance {base:.1f}; trained on {about['train_rows']:,} rows, "
             f"{about['steps']} steps of {about['batch_size']}, {about['max_length']} tokens, ranks {about['policy']}",
             f"- SHA-256: model `{json_digest(about['model'])[:16]}`, train rows `{about['train'][:16]}`, "
             f"test rows `{about['test'][:16]}`",
             "- kept: parameters of the factorized layers over the dense ones, the most of any seed: more than the ratio where "
             "stages failed and stayed dense. spread: standard deviation over seeds. collapsed: share of seeds that diverged or "
             "ended within two standard errors of chance. s: seconds of a cell that was not interrupted, with whatever else "
             "the machine did. MB: of all parameters. faster: dense time over compressed time, median, of one text and of "
             f"{many}, {threads} thread(s).", "",
             table(COLUMNS, texts(found))]
    if said := findings(found):
        lines += [f"Differences of the means, under {100 * TIE:.0f} points called ties:", "", *said, ""]
    return "\n".join(lines)


def draw(found: Mapping, path: Path) -> None:
    """The mean and range over seeds of every method, a panel for each recovery and rate; dotted: dense, and chance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = found["about"]["score"] != "nats_per_token"
    scale = 100 if points else 1
    panels: dict[tuple, dict[str, list[dict]]] = {}
    for row in found["summary"]:
        if row["method"] != "dense" and row["mean"] is not None and row["kept"] is not None:
            panel = panels.setdefault((row["recovery"], row["learning_rate"]), {})
            panel.setdefault(row["method"], []).append(row)
    dense = next(row["mean"] for row in found["summary"] if row["method"] == "dense")
    figure = Figure(figsize=(1 + 3.5 * max(1, len(panels)), 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    colours = {method: f"C{number}" for number, method in enumerate(dict.fromkeys(
        method for panel in panels.values() for method in panel))}
    for axes, ((recovery, rate), lines) in zip(
            figure.subplots(1, max(1, len(panels)), squeeze=False, sharey=True)[0], panels.items()):
        for method, rows in lines.items():
            rows = sorted(rows, key=lambda row: row["kept"])
            low, high = ([scale * abs(row["mean"] - row[end]) for row in rows] for end in ("lowest", "highest"))
            axes.errorbar([100 * row["kept"] for row in rows], [scale * row["mean"] for row in rows], yerr=[low, high],
                          color=colours[method], marker="o", markersize=4, capsize=3, label=method)
        for height, name, side in ((dense, "dense", "bottom"), (found["about"]["chance"], "chance", "top")):
            if height is None:
                continue
            axes.axhline(scale * height, color="black", linestyle=":", linewidth=0.8)
            axes.annotate(name, (1, scale * height), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va=side)
        axes.set_title(recovery + (f", rate {rate:g}" if rate else ""), fontsize=9)
        axes.set_xlabel("parameters kept, %", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    figure.axes[0].set_ylabel(found["about"]["score"] + (", %" if points else ""), fontsize=8)
    figure.savefig(path)
