"""What the commands show: a progress bar on stderr, tables of 80 columns on stdout."""
from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

out, err = Console(highlight=False), Console(stderr=True)


@contextmanager
def bar(what: str) -> Iterator[Callable[..., None]]:
    """Gives on_progress(done, total, what): a bar with the time left on stderr, nothing where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.percentage:>3.0f} %"),
               TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def tell(done: float, total: float, now: str = "") -> None:
            nonlocal task
            if done < progress.tasks[0].completed:  # another phase: it has its own speed
                progress.remove_task(task)
                task = progress.add_task(now)
            progress.update(task, completed=done, total=total, description=now[:30] or what)

        yield tell


def print_json(value) -> None:
    print(json.dumps(value, indent=1))


def plain_table(*columns: str, title: str | None = None) -> Table:
    """First column left, the others right, no lines but one."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="ellipsis", no_wrap=True)
    return table


def short_names(names: list[str]) -> tuple[str, list[str]]:
    """(the start that all names share, up to a dot; what is left of each)"""
    start = os.path.commonprefix(names)
    start = start[:start.rfind(".") + 1]
    return start, [name[len(start):] for name in names]


def millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def show_report(report, folder: Path) -> None:
    start, names = short_names([layer.name for layer in report.layers])
    table = plain_table("layer", "out x in", "rank", "kept", "error", "of outputs", title=start.rstrip("."))
    for name, layer in zip(names, report.layers):
        size = f"{layer.shape['out_features']} x {layer.shape['in_features']}" if layer.shape else ""
        table.add_row(name, size, str(layer.rank or "dense"), percent(layer.parameters / layer.dense_parameters),
                      percent(layer.error), percent(layer.output_error))
    out.print(table)
    for layer in report.layers:
        for note in ([f"stays dense: {layer.reason}"] if not layer.kept else []) + layer.events:
            out.print(f"{layer.name}: {note}", soft_wrap=True)
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


def show_numbers(found: dict) -> None:
    for name, value in found.items():
        out.print(f"{name:16} {value:.4f}" if isinstance(value, float) else f"{name:16} {value}")


def show_spectra(found: list, left_out: dict[str, str], model, plot: Path | None) -> None:
    start, names = short_names([one.name for one in found])
    has_error = any(one.error is not None for one in found)
    table = plain_table("layer", "out x in", "rank", "kept", "50 %", "90 %", "99 %", "pays below",
                        *(["error"] if has_error else []), title=start.rstrip("."))
    for name, one in zip(names, found):
        table.add_row(name, f"{one.out_features} x {one.in_features}", str(one.rank or "dense"),
                      percent(one.parameters / one.dense_parameters), *(str(rank) for rank in one.energy_ranks()),
                      str(one.break_even + 1), *([percent(one.error)] if has_error else []))
    out.print(table)
    out.print("50, 90, 99 %: ranks that hold so much of the squared singular values.", soft_wrap=True)
    for (kind, reason), count in Counter((re.sub(r"\d+", "*", name), reason) for name, reason in left_out.items()).items():
        if not reason.startswith("already"):
            out.print(f"left alone: {kind}{f' ({count} times)' if count > 1 else ''}: {reason}", soft_wrap=True)
    kept, dense = sum(one.parameters for one in found), sum(one.dense_parameters for one in found)
    total = sum(parameter.numel() for parameter in model.parameters())
    out.print(f"{millions(kept)} of {millions(dense)} parameters in these layers ({percent(kept / dense)}), "
              f"{millions(total)} in the whole model{f'; picture: {plot}' if plot else ''}", soft_wrap=True)


def show_doctor(known: dict, advice: list[str]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("versions", ", ".join(f"{name} {version or 'missing'}" for name, version in known["versions"].items()))
    table.add_row("library", known["library"] or f"none: {known['why_not']}")
    for op, devices in known["kernels"].items():
        for device, levels in devices.items():
            table.add_row(f"{op}, {device}", ", ".join(levels) or "none: its plain torch reference runs")
    if known["build"]:
        table.add_row("build", ", ".join(f"{name} {value}" for name, value in known["build"].items() if value))
    cpu = known["cpu"]
    table.add_row("processor", f"{cpu['name']}, {cpu['threads']} threads, kernels at {cpu['level'] or 'no level'}")
    for gpu in known["gpus"] or []:
        table.add_row("GPU", ", ".join(f"{name} {value}" for name, value in gpu.items()))
    cuda = known["cuda"]
    table.add_row("CUDA", f"torch built with {cuda['built'] or 'none'}, {len(cuda['devices'])} usable devices")
    for name, value in known["environment"].items():
        table.add_row(name, value)
    out.print(table)
    for line in advice:
        out.print(f"- {line}")
    out.print("" if advice else "No problem found.")


def show_demo(result, folder: Path, job) -> None:
    dense, *others = result.rows
    final = others[-1]
    table = plain_table("model", "kept", "found first", "MRR", "cosine", "parameters", "weights",
                        title=f"{job.ENCODER}: find a docstring's continuation among {result.texts}")
    for row in result.rows:
        table.add_row(row.name, percent(row.ratio), percent(row.recall_at_1), f"{row.mrr:.3f}", f"{row.cosine:.3f}",
                      millions(row.parameters), f"{row.bytes / 1e6:.0f} MB")
    out.print(table)
    out.print("kept: share of the parameters of the encoder's 36 matrices; cosine: to the dense embedding.\n",
              soft_wrap=True)
    timed = plain_table("time", "dense", "factorized", "speed-up",
                        title=f"The last row against dense, {result.threads} thread(s)")
    for one in result.layers:
        what = f"1 token, {one['in_features']} to {one['out_features']}, rank {one['rank']} ({one['path']})"
        timed.add_row(what, f"{one['dense_us']:.0f} us",
                      f"{one['us']:.0f} us", f"{one['speedup']:.2f} x")
    for one in result.latency:
        timed.add_row(f"whole model, {one['texts']} text(s) of {one['tokens']} tokens", f"{one['dense_ms']:.1f} ms",
                      f"{one['ms']:.1f} ms", f"{one['speedup']:.2f} x")
    timed.add_row("folder on disk", *(f"{size / 1e6:.1f} MB" for size in result.folder_bytes.values()), "")
    out.print(timed)
    lost = result.dense_found - result.final_found
    out.print(f"\nLost: of the {result.dense_found} texts that the dense model finds first, {final.name} finds {lost} fewer "
              f"({result.final_found} of {result.texts}). Most of the file is the embedding table, which stays.",
              soft_wrap=True)
    model = folder / job.MODEL
    out.print(f"Took {result.seconds:.0f} s. Picture: {folder / job.PICTURE}. The last row's model, loaded again "
              f"{'with the same bits' if result.reloaded_equal else 'WITH OTHER BITS'}:\n", soft_wrap=True)
    out.print(f'    import lowfat, transformers\n    model = lowfat.load("{model}")\n'
              f'    tokenizer = transformers.AutoTokenizer.from_pretrained("{model}")', soft_wrap=True)
