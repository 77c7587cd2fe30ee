"""The job behind `lowfat compare`: every cell of the grid, in as many processes as asked for, resumable at any moment."""
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from queue import Empty

import torch

from .. import progress, storage
from ..bench.timing import header
from ..data import task_for
from ..errors import ArgumentError
from ..evaluate import judged
from ..job import file_digests, open_model
from ..method_inputs import check_fit, needs_of
from ..model_inputs import fitting
from ..recovery.staged import FINAL_SHARE, stages_of, steps_of_a_stage
from ..strict_json import read_json
from .cell import SCORES, Job, run, statistics
from .grid import Cell, grid
from .speed import speeds
from .summary import chance, draw, markdown, summary

_OPTIONS = ("task", "steps", "batch_size", "max_length", "policy", "layers", "calibration_rows", "distill", "autocast")
_OVERHEAD = 20  # steps that opening and judging a model are worth, for the time left


def compare(folder: str | Path, train: Sequence[Mapping], test: Sequence[Mapping], *, out: str | Path,
            methods: Sequence[str] = ("svd", "block_low_rank", "monarch"), ratios: Sequence[float] = (0.5, 0.25),
            recoveries: Sequence[str] = ("none", "finetune"), learning_rates: Sequence[float] = (1e-4,), seeds: int = 3,
            steps: int = 150, policy: str = "per_matrix", layers: Sequence[str] | None = None, task: str | None = None,
            batch_size: int = 32, max_length: int | None = None, calibration_rows: int = 1024, distill: bool = False,
            autocast: bool | str = "auto", jobs: int = 1, device: str | torch.device = "cpu", overwrite: bool = False,
            on_progress=None) -> dict:
    """Every method at every ratio with every recovery, learning rate and seed, at equal parameters and equal steps: trained
    on the rows of train, judged on those of test. Writes compare.json, compare.md and compare.png to `out`.

    methods: names, with arguments as monarch:blocks=8. recoveries: none, finetune, staged. seeds: how many, from 0 on: of
    the order of texts, and dropout. distill: train towards the dense model's outputs (embeddings always do). jobs: cells
    at a time, each in a process with its share of the threads. What is finished is kept beside `out` until all is: the same
    call goes on after a kill, and may ask for more or less of the grid. Returns what compare.json holds.
    Raises ArgumentError before any work for everything that can be known by then."""
    cells = grid(methods, ratios, recoveries, learning_rates, seeds)
    folder, out, device = Path(folder), Path(out), torch.device(device)
    storage.check_target(out, overwrite)
    _check(device, steps=steps, batch_size=batch_size, calibration_rows=calibration_rows, jobs=jobs)
    model, tokenizer = open_model(folder, task=task)
    task, states = task_for(model, task), out.absolute().parent / f".{out.name}.progress"
    job = Job(folder.absolute(), list(train), list(test), states, task, steps, batch_size, fitting(max_length, model),
              policy, layers, calibration_rows, distill or task == "embedding", autocast, str(device))
    _check_model(model, tokenizer, job, cells)
    options = {name: getattr(job, name) for name in _OPTIONS}
    fingerprint = {"model": file_digests(folder), "train": progress.json_digest(job.train),
                   "test": progress.json_digest(job.test), "options": options}
    about = header(_threads(jobs), device) | options | fingerprint | {
        "jobs": jobs, "train_rows": len(job.train), "test_rows": len(job.test), "score": SCORES[task],
        "chance": chance(task, job.test, label2id=model.config.label2id, vocabulary=model.config.vocab_size)}
    fingerprint |= progress.environment(device) | {"threads": _threads(jobs)}
    tell = on_progress or (lambda *_: None)
    del model
    with progress.opened(states, fingerprint):
        found = {"about": about, "cells": _rows(job, cells, jobs, tell)}
        storage.stage("compared")
        found |= {"speed": _speeds(job, cells, tell)}
        found |= {"summary": summary(found)}

        def fill(target):
            storage.write_json(target / "compare.json", found)
            (target / "compare.md").write_text(markdown(found))
            draw(found, target / "compare.png")

        storage.write_folder(out, fill, overwrite=overwrite, facts={"job": fingerprint})
        progress.remove(states)
    return found


def _check(device: torch.device, **counts: int) -> None:
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise ArgumentError(f"{name} is {count!r}; needs a whole number, at least 1")
    if counts["jobs"] > 1 and device.type != "cpu":
        raise ArgumentError(f"jobs is {counts['jobs']}; a {device.type} device takes one cell at a time")


def _check_model(model, tokenizer, job: Job, cells: list[Cell]) -> None:
    """Whether it can be judged on these texts, and made smaller in all these ways."""
    for rows in (job.test,) if job.task == "embedding" else (job.test, job.train):
        judged(rows, tokenizer, job.task, model, max_length=job.max_length)
    for cell in cells[1:]:
        check_fit(model, method=cell.method, arguments=cell.settings, ratio=cell.ratio, layers=job.layers)
        if "fisher" in needs_of(cell.method, cell.settings, job.policy) and job.task == "embedding":
            raise ArgumentError(f"{cell.label} needs a task with a loss, classification or lm; this model makes embeddings")
    if any(cell.recovery == "staged" for cell in cells):
        steps_of_a_stage(job.steps, FINAL_SHARE, len(stages_of(model, job.layers, "block")))


def _threads(jobs: int) -> int:
    return max(1, torch.get_num_threads() // jobs)


# ------------------------------------------------------------------------------------------------ the cells
def _rows(job: Job, cells: list[Cell], jobs: int, on_progress) -> list[dict]:
    """The numbers of every cell: read where they are kept, else worked out and kept."""
    paths = {cell: job.states / f"{cell.name}.json" for cell in cells}
    todo = [cell for cell in cells if not paths[cell].exists()]
    total = sum(_work(job, cell) for cell in cells)
    done = {cell: _work(job, cell) for cell in cells if cell not in todo}

    def tell(cell: Cell, step: int) -> None:
        done[cell] = step
        on_progress(sum(done.values()), total, f"{cell.label} {cell.ratio:.0%} {cell.recovery}")

    for cell, row in _worked_out(job, todo, jobs, tell):
        storage.write_json(paths[cell], row)
        tell(cell, _work(job, cell))
        trained = job.states / f"{cell.name}.model"
        if trained.exists():
            progress.discard(trained)
    return [read_json(paths[cell]) for cell in cells]


def _work(job: Job, cell: Cell) -> int:
    """In training steps, as far as it matters for the time left."""
    return _OVERHEAD + (0 if cell.learning_rate is None else job.steps)


def _worked_out(job: Job, cells: list[Cell], jobs: int, tell) -> Iterator[tuple[Cell, dict]]:
    if jobs == 1 or len(cells) < 2:
        for cell in cells:
            yield cell, run(job, cell, lambda step, *_: tell(cell, step))
        return
    _gather(job, cells)
    from transformers.utils.logging import is_progress_bar_enabled

    context = multiprocessing.get_context("spawn")
    steps = context.Queue()
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start,
                             initargs=(_threads(jobs), steps, os.getpid(), is_progress_bar_enabled())) as pool:
        cell_of = {pool.submit(_run, job, cell): cell for cell in cells}
        try:
            waiting = set(cell_of)
            while waiting:
                finished, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield cell_of[future], future.result()
                _hear(steps, tell)
        finally:
            pool.shutdown(cancel_futures=True)


def _gather(job: Job, cells: list[Cell]) -> None:
    """The statistics that cells share, before several processes want to write them."""
    model, tokenizer = open_model(job.folder, task=job.task, device=job.device)
    for cell in {(cell.method, cell.arguments): cell for cell in cells if cell.method}.values():
        statistics(job, cell, model, tokenizer)


def _hear(steps, tell) -> None:
    try:
        while True:
            tell(*steps.get_nowait())
    except Empty:
        pass


# --- in the other processes ---

def _start(threads: int, steps, parent: int, has_bars: bool) -> None:
    global _steps
    _steps = steps
    if not has_bars:
        from transformers.utils import logging

        logging.disable_progress_bar()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed job must leave no process behind that still writes to its folder."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(job: Job, cell: Cell) -> dict:
    return run(job, cell, lambda step, *_: _steps.put((cell, step)))


def _speeds(job: Job, cells: list[Cell], on_progress) -> list[dict]:
    path = job.states / "speed.json"
    if not path.exists():
        storage.write_json(path, speeds(job, cells[1:], on_progress))
    return read_json(path)
