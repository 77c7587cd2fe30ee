"""The job behind `lowfat compare`: every cell of the grid, in as many processes as asked for, resumable at any moment."""
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from .. import progress, storage
from ..data import task_for
from ..errors import ArgumentError
from ..evaluate import judged
from ..job import file_digests, open_model
from ..measured import header
from ..method_inputs import check_fit, check_task, needs_of
from ..model_inputs import fitting
from ..processes import threads_of, worked_out
from ..recovery.lpaf import PRUNE_SHARE, pruning_steps
from ..recovery.staged import FINAL_SHARE, stages_of, steps_of_a_stage
from ..strict_json import read_json
from .cell import SCORES, Job, model_of, run, statistics
from .grid import DENSE, Cell, grid, untrained
from .speed import speed
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

    methods: names, with arguments as monarch:blocks=8. recoveries: none, finetune, staged, straight_through, mixed_rank,
    theseus, lpaf. seeds: how many, from 0 on: of the order of texts, and dropout. distill: train towards the dense model's
    outputs (embeddings always do). jobs: cells at a time, each in a process with its share of the threads. What is finished
    is kept beside `out` until all is: the same call goes on after a kill, and may ask for more or less of the grid. Returns
    what compare.json holds. Raises ArgumentError before any work for everything that can be known by then."""
    cells = grid(methods, ratios, recoveries, learning_rates, seeds)
    folder, out, device = Path(folder), Path(out), torch.device(device)
    states = out.absolute().parent / f".{out.name}.progress"
    storage.check_target(out, overwrite or states.exists())
    _check(device, steps=steps, batch_size=batch_size, calibration_rows=calibration_rows, jobs=jobs)
    model, tokenizer = open_model(folder, task=task)
    task = task_for(model, task)
    job = Job(folder.absolute(), list(train), list(test), states, task, steps, batch_size, fitting(max_length, model),
              policy, layers, calibration_rows, distill or task == "embedding", autocast, str(device))
    _check_model(model, tokenizer, job, cells)
    options = {name: getattr(job, name) for name in _OPTIONS}
    fingerprint = {"model": file_digests(folder), "train": progress.json_digest(job.train),
                   "test": progress.json_digest(job.test), "options": options}
    about = header(threads_of(jobs), device) | options | fingerprint | {
        "jobs": jobs, "train_rows": len(job.train), "test_rows": len(job.test), "score": SCORES[task],
        "chance": chance(task, job.test, label2id=model.config.label2id, vocabulary=model.config.vocab_size)}
    fingerprint |= progress.environment(device) | {"threads": threads_of(jobs)}
    storage.check_target(out, overwrite or (states.exists() and progress.holds_result(out, fingerprint)))
    del model
    with progress.opened(states, fingerprint):
        work = _Work(job, cells, on_progress or (lambda *_: None))
        found = {"about": about, "cells": _rows(job, cells, jobs, work)}
        storage.stage("compared")
        found |= {"speed": _speeds(job, cells, work)}
        storage.stage("timed")
        found |= {"summary": summary(found)}

        def fill(target):
            storage.write_json(target / "compare.json", found)
            (target / "compare.md").write_text(markdown(found))
            draw(found, target / "compare.png")

        if not progress.holds_result(out, fingerprint):
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
    for cell in dict.fromkeys(cell.untrained for cell in cells[1:]):
        check_fit(model, method=cell.method, arguments=cell.settings, ratio=cell.ratio, layers=job.layers)
        check_task(needs_of(cell.method, cell.settings, job.policy), job.task)
    if any(cell.recovery == "staged" for cell in cells):
        steps_of_a_stage(job.steps, FINAL_SHARE, len(stages_of(model, job.layers, "block")))
    if any(cell.recovery == "lpaf" for cell in cells):
        pruning_steps(job.steps, PRUNE_SHARE, None)


# ------------------------------------------------------------------------------------------------ the cells
class _Work:
    """How far all cells are, in training steps: opening, judging and timing a model count as some."""

    def __init__(self, job: Job, cells: list[Cell], on_progress):
        self.steps = {cell: _OVERHEAD + (0 if cell.learning_rate is None else job.steps) for cell in cells}
        self.number = {cell: f"{number} of {len(cells)}" for number, cell in enumerate(cells, 1)}
        self.done: dict[Cell, int] = {}
        self.total = sum(self.steps.values()) + _OVERHEAD * len(untrained(cells))
        self.timed = 0
        self.on_progress = on_progress

    def tell(self, cell: Cell, step: int) -> None:
        self.done[cell] = max(step, self.done.get(cell, 0))
        self._tell(f"{self.number[cell]}, {cell.label} {cell.ratio:.0%} {cell.recovery}")

    def finish(self, cell: Cell) -> None:
        self.tell(cell, self.steps[cell])

    def finish_speed(self, cell: Cell) -> None:
        self.timed += _OVERHEAD
        self._tell(f"speed of {cell.label} {cell.ratio:.0%}")

    def _tell(self, what: str) -> None:
        self.on_progress(sum(self.done.values()) + self.timed, self.total, what)


def _rows(job: Job, cells: list[Cell], jobs: int, work: _Work) -> list[dict]:
    """The numbers of every cell: read where they are kept, else worked out and kept."""
    paths = {cell: job.states / f"{cell.name}.json" for cell in cells}
    todo = [cell for cell in cells if not paths[cell].exists()]
    for cell in cells:
        if cell not in todo:
            work.finish(cell)
    if jobs > 1 and todo:
        _gather(job, todo)
    for cell, row in worked_out(partial(run, job), todo, jobs, work.tell):
        storage.write_json(paths[cell], row)
        work.finish(cell)
        trained = job.states / f"{cell.name}.model"
        if trained.exists():
            progress.discard(trained)
    return [read_json(paths[cell]) for cell in cells]


def _gather(job: Job, cells: list[Cell]) -> None:
    """The statistics that cells share, before several processes want to write them."""
    model, tokenizer = open_model(job.folder, task=job.task, device=job.device)
    for cell in {(cell.method, cell.arguments): cell for cell in cells if cell.method}.values():
        statistics(job, cell, model, tokenizer)


def _speeds(job: Job, cells: list[Cell], work: _Work) -> list[dict]:
    """One after the other, when nothing else of this job runs; kept like the cells."""
    rows, dense = [], None
    for cell in untrained(cells):
        path = job.states / f"speed-{cell.name}.json"
        if not path.exists():
            dense = dense or model_of(job, DENSE)
            storage.write_json(path, speed(job, cell, *dense))
        rows.append(read_json(path))
        work.finish_speed(cell)
    return rows
