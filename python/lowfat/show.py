"""What the commands show: progress on stderr, tables of 80 columns on stdout."""
from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .spectra import SHARES

out, err = Console(highlight=False), Console(stderr=True)
MINUTE = 60.0  # seconds


@contextmanager
def bar(what: str) -> Iterator[Callable[..., None]]:
    """Gives tell(done, total, what, stage=what, of_all=False): on a terminal a bar with the time left, elsewhere a line for
    each stage. of_all: done and total are of all stages together."""
    if not err.is_terminal:
        stages = Lines(what)
        yield stages.tell
        stages.end()
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.percentage:>3.0f} %"),
               TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def tell(done: float, total: float, now: str, stage: str | None = None, of_all: bool = False) -> None:
            nonlocal task
            if done < progress.tasks[0].completed:  # another phase: it has its own speed
                progress.remove_task(task)
                task = progress.add_task(now)
            progress.update(task, completed=done, total=total, description=now[:30])

        yield tell


class Lines:
    """A flushed line when a stage has ended, and every minute within a long one: for pipes, files and the logs of a job."""

    def __init__(self, stage: str):
        self._start(stage)

    def _start(self, stage: str) -> None:
        self.stage = stage
        self.started = self.spoken = time.monotonic()

    def tell(self, done: float, total: float, now: str, stage: str | None = None, of_all: bool = False) -> None:
        if (stage or now) != self.stage:
            self.end()
            self._start(stage or now)
        elif time.monotonic() - self.spoken >= MINUTE:
            share = "" if of_all else f" ({100 * done / total:.0f} %)"  # beside seconds of the stage, only that of the stage
            self._print(f"{now}: {self._seconds()} so far{share}")

    def end(self) -> None:
        self._print(f"{self.stage}: {self._seconds()}")

    def _seconds(self) -> str:
        return f"{time.monotonic() - self.started:.0f} s"

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        self.spoken = time.monotonic()


def print_json(value) -> None:
    print(json.dumps(value, indent=1))


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]], *, title: str) -> None:
    """First column left, the others right; in a narrow terminal only the first gives way."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    for number, cells in enumerate(zip(header, *rows)):
        table.add_column(header[number], justify="right" if number else "left", overflow="ellipsis", no_wrap=True,
                         min_width=max(map(len, cells)) if number else None)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def short_names(names: list[str]) -> tuple[str, list[str]]:
    """(the start that all names share, up to a dot; what is left of each)"""
    start = os.path.commonprefix(names)
    start = start[:start.rfind(".") + 1]
    return start, [name[len(start):] for name in names]


def millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def show_report(report, folder: Path) -> None:
    start, names = short_names([layer.name for layer in report.layers])
    rows = []
    for name, layer in zip(names, report.layers):
        size = f"{layer.shape['out_features']} x {layer.shape['in_features']}" if layer.shape else ""
        rows.append((name, size, str(layer.rank or "dense"), percent(layer.parameters / layer.dense_parameters),
                     percent(layer.error), percent(layer.output_error)))
    print_table(("layer", "out x in", "rank", "kept", "error", "of outputs"), rows, title=start.rstrip("."))
    for layer in report.layers:
        for note in ([f"stays dense: {layer.reason}"] if not layer.kept else []) + layer.events:
            out.print(f"{layer.name}: {note}", soft_wrap=True)
    if shared := sum(bool(layer.shares) for layer in report.layers):
        out.print(f"{counted(shared, 'layer')} with the first factor of another, which is counted there", soft_wrap=True)
    for reason, count in Counter(report.skipped.values()).items():
        out.print(f"{counted(count, 'other weight')} left alone: {reason}", soft_wrap=True)
    for what, count in Counter(report.blocks.grouped.values()).items():
        out.print(f"{counted(count, 'block')}: {what} in one call", soft_wrap=True)
    for reason, count in Counter(report.blocks.others.values()).items():
        out.print(f"{counted(count, 'block')} with a call for each layer: {reason}", soft_wrap=True)
    out.print(f"{millions(report.parameters)} of {millions(report.dense_parameters)} parameters kept in these layers "
              f"({percent(report.ratio)}); written to {folder}", soft_wrap=True)


def show_training(report, folder: Path) -> None:
    if report.losses:
        out.print(f"loss {report.losses[0]['loss']:.3f} at step {report.losses[0]['step']}, "
                  f"{report.losses[-1]['loss']:.3f} at step {report.losses[-1]['step']}")
    show_numbers(report.validation or {})
    resumed = f", resumed from step {report.resumed_from}" if report.resumed_from else ""
    out.print(f"{report.steps} steps on {report.device} in {report.seconds:.0f} s{resumed}; written to {folder}",
              soft_wrap=True)


def show_pretraining(report, folder: Path) -> None:
    if report.replaced:
        found = report.replaced
        out.print(f"{len(found.layers)} layers replaced: {found.parameters:,} of {found.dense_parameters:,} parameters "
                  f"({found.ratio:.1%})")
    out.print(f"{report.parameters:,} parameters in all")
    show_training(report, folder)


def show_staged(report, folder: Path) -> None:
    start, names = short_names([stage.name for stage in report.stages])
    rows = [(name, str(stage.steps), *("not finite" if loss is None else f"{loss:.3f}"
                                       for loss in (stage.loss_before, stage.loss_after)),
             "failed" if stage.failed else "second attempt" if stage.retried else "")
            for name, stage in zip(names, report.stages)]
    print_table(("stage", "steps", "loss before", "after", ""), rows, title=start.rstrip("."))
    for stage in report.stages:
        if stage.failed:
            out.print(f"{stage.name}: {stage.reason}", soft_wrap=True)
    _show_kept(report.factorized)
    show_training(report, folder)


def show_straight_through(report, folder: Path) -> None:
    shown = report.refactorized[::max(1, len(report.refactorized) - 1)]  # the first and the last
    out.print(f"factors made anew {counted(len(report.refactorized), 'time')}; relative error to the dense weights: "
              + ", ".join(f"{percent(one['error'])} at step {one['step']}" for one in shown), soft_wrap=True)
    _show_kept(report.factorized)
    show_training(report, folder)


def show_lpaf(report, folder: Path) -> None:
    if report.pruning:
        last = report.pruning[-1]
        out.print(f"pruned to {percent(last['kept'])} of the weights by step {last['step']}")
    dropped = sum(layer.structure == "Submatrix" for layer in report.factorized.layers)
    if dropped:
        out.print(f"{counted(dropped, 'layer')} without empty rows and columns")
    _show_kept(report.factorized)
    show_training(report, folder)


def _show_kept(found) -> None:
    out.print(f"{millions(found.parameters)} of {millions(found.dense_parameters)} parameters kept in these layers "
              f"({percent(found.ratio)})", soft_wrap=True)


def show_numbers(found: dict) -> None:
    for name, value in found.items():
        out.print(f"{name:16} {value:.4f}" if isinstance(value, float) else f"{name:16} {value}")


def show_spectra(found: list, left_out: dict[str, str], model, plot: Path | None) -> None:
    start, names = short_names([one.name for one in found])
    has_error = any(one.error is not None for one in found)
    rows = []
    for name, one in zip(names, found):
        rows.append((name, f"{one.out_features} x {one.in_features}", "dense" if one.rank is None else str(one.rank),
                     percent(one.parameters / one.dense_parameters), *map(str, one.energy_ranks()),
                     *([percent(one.error)] if has_error else [])))
    header = ("layer", "out x in", "rank", "kept", *(f"{100 * share:.0f} %" for share in SHARES),
              *(["error"] if has_error else []))
    print_table(header, rows, title=start.rstrip("."))
    out.print("50, 90, 99 %: ranks that hold so much of the squared singular values.", soft_wrap=True)
    for (kind, reason), count in Counter((re.sub(r"\d+", "*", name), reason) for name, reason in left_out.items()).items():
        if not reason.startswith("already"):
            out.print(f"left alone: {kind}{f' ({count} times)' if count > 1 else ''}: {reason}", soft_wrap=True)
    kept, dense = sum(one.parameters for one in found), sum(one.dense_parameters for one in found)
    total = sum(parameter.numel() for parameter in model.parameters())
    out.print(f"{millions(kept)} of {millions(dense)} parameters in these layers ({percent(kept / dense)}), "
              f"{millions(total)} in the whole model{f'; picture: {plot}' if plot else ''}", soft_wrap=True)


def show_bench(found: dict) -> None:
    """A table of the calls, on a GPU also one of the chains."""
    from .bench.race import name_of

    about, ceilings, rows = found["header"], found["ceilings"], found["rows"]
    kernels = sorted({row["ran"] for row in rows} - {"library", "reference"})
    out.print(f"{about.get('gpu') or about['cpu']}, {about['threads']} thread(s), load {about['load'][0]}; "
              f"torch {about['torch']}; {', '.join(kernels) or 'no kernel'} ran; {about['date']}")
    if ceilings:
        out.print(f"The floor: {ceilings['bytes_per_s'] / 1e12:.2f} TB/s, as a copy reaches, and "
                  f"{ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s, as a large product does")
    _show_race(rows, f"{name_of(about)}, {rows[0]['dtype']}: microseconds of a call, weights from memory")
    print_wrapped("", "pair: the best composition of torch's own products. faster: its time over ours, median of neighbouring "
                  "calls. floor: the time of a kernel that only moves the numbers, over ours.")
    if found["chains"]:
        _show_race(found["chains"], f"The same of one layer in a chain of {found['chains'][0]['layers']}")


def _show_race(rows: list[dict], title: str) -> None:
    """Where a gate refused a result, its name stands in place of the speed-up."""
    peers = [name for name in ("pair", "compiled", "low_rank", "dense") if f"{name}_us" in rows[0]]
    print_table(("k -> n, rank", "m", "ran", "µs", *peers, "faster", "floor"),
                [(f"{row['k']} -> {row['n']}, {row['r']}", f"{row['m']}", row["ran"].split()[0], f"{row['us']:.1f}",
                  *(f"{row[f'{name}_us']:.1f}" for name in peers),
                  "FAIL " + " ".join(row["failed_gates"]) if row["failed_gates"] else f"{row['faster']:.2f} x",
                  f"{row['of_floor']:.0%}") for row in rows], title=title)


def show_comparison(found: dict, folder: Path) -> None:
    from .comparison.summary import COLUMNS, findings, texts

    about = found["about"]
    shown = ("method", "ratio", "recovery", "learning_rate", "mean", "spread", "collapsed", "many")
    out.print(f"{about['score']} on {about['test_rows']:,} texts, {about['steps']} steps; chance {about['chance']:.3f}")
    print_table(tuple(COLUMNS[name] for name in shown), [tuple(row[name] for name in shown) for row in texts(found)], title="")
    for line in findings(found):
        out.print(line, soft_wrap=True)
    out.print(f"table, picture and numbers: {folder}", soft_wrap=True)


def show_reproduced(found: dict, folder: Path) -> None:
    from .reproduce.page import COLUMNS, sentences, texts

    about, shown = found["about"], {"task": "task", "name": "recipe"} | {
        name: COLUMNS[name] for name in ("kept", "steps", "mean", "each")}
    quick = "quick run: " if about["quick"] else ""
    out.print(f"{quick}{about['reference']}")
    print_table(tuple(shown.values()),
                [tuple(row[name] for name in shown) for row in texts(found["cells"], about["quick"])], title="")
    for line in sentences(found):
        out.print(line, soft_wrap=True)
    out.print(f"{quick}table, picture and numbers: {folder}", soft_wrap=True)


def show_doctor(known: dict, summary: str, advice: list[str]) -> None:
    build, cpu, cuda = known["build"], known["cpu"], known["cuda"]
    rows = [("versions", ", ".join(f"{name} {version or 'missing'}" for name, version in known["versions"].items())),
            ("library", known["library"] or f"none: {known['why_not']}")]
    for op, devices in known["kernels"].items():
        rows.append((op, "; ".join(f"{device}: {', '.join(names) or 'none, its plain torch reference runs'}"
                                   for device, names in devices.items())))
    if build:
        written = {name: value for name, value in build.items() if value and isinstance(value, str)}
        rows.append(("build", ", ".join(f"{name} {value}" for name, value in written.items())))
    rows.append(("processor", f"{cpu['name']}, {counted(cpu['threads'], 'thread')}, "
                 f"kernels at {cpu['level'] or 'no level'}"))
    rows += [("GPU", ", ".join(f"{name} {value}" for name, value in gpu.items())) for gpu in known["gpus"] or []]
    rows.append(("CUDA", f"torch is built with CUDA {cuda['built']} and can use {counted(len(cuda['devices']), 'GPU')}"
                 if cuda["built"] else "torch is built without CUDA"))
    rows += known["environment"].items()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print_wrapped(f"{name:{width}}  ", value)
    print()
    print_wrapped("", summary)
    for line in advice or ["No problem found."]:
        print_wrapped("- " if advice else "", line)


def print_wrapped(first: str, text: str) -> None:
    """Wraps between words, further lines indented like the first; a path longer than a line stays whole, to be copied."""
    print(textwrap.fill(first + text, out.width, subsequent_indent=" " * len(first), break_long_words=False,
                        break_on_hyphens=False))


def show_demo(result, folder: Path, job) -> None:
    rows = [(row.name, f"{100 * row.ratio:.0f} %", percent(row.recall_at_1), f"{row.mrr:.3f}", f"{row.cosine:.3f}",
             f"{row.parameters / 1e6:.1f} M", f"{row.bytes / 1e6:.0f} MB") for row in result.rows]
    print_table(("model", "kept", "first", "MRR", "cosine", "params", "size"), rows,
                title=f"{job.ENCODER}: find a docstring's continuation among {result.texts}")
    out.print("kept: of the parameters of the encoder's 36 matrices. first: found at the first\nplace. "
              "cosine: to the dense embedding.\n")
    rows = [(f"1 token, {one['in_features']} to {one['out_features']}, rank {one['rank']} ({one['path']})",
             f"{one['dense_us']:.0f} us", f"{one['us']:.0f} us", f"{one['speedup']:.2f} x") for one in result.layers]
    rows += [(f"whole model, {counted(one['texts'], 'text')} of {one['tokens']} tokens", f"{one['dense_ms']:.1f} ms",
              f"{one['ms']:.1f} ms", f"{one['speedup']:.2f} x") for one in result.latency]
    rows.append(("folder on disk", *(f"{size / 1e6:.1f} MB" for size in result.folder_bytes.values()), ""))
    print_table(("time", "dense", "factorized", "speed-up"), rows,
                title=f"The last row against dense, {counted(result.threads, 'thread')}")
    if result.load > result.threads + 1:
        out.print(f"\nOther programs kept this machine busy (load {result.load:.1f}, this demo {counted(result.threads, 'thread')}): "
                  "these times say little.")
    out.print(f"\nWhat was lost: the dense model finds {result.dense_found} of {result.texts} continuations first, the last "
              f"row {result.final_found}. The embedding table, most of the file, stays as it is.\n")
    out.print(f"Took {result.seconds:.0f} s. Picture: {folder / job.PICTURE}", soft_wrap=True)
    out.print(f"The last row's model, which came back from disk {'bit for bit' if result.reloaded_equal else 'CHANGED'}:\n")
    model = folder / job.MODEL
    out.print(f'    import lowfat, transformers\n    model = lowfat.load("{model}")\n'
              f'    tokenizer = transformers.AutoTokenizer.from_pretrained("{model}")', soft_wrap=True)
