"""The job behind `lowfat reproduce`: every recipe of a paper on its tasks, over seeds, resumable at any moment."""
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .. import progress, storage
from ..comparison.cell import SCORES, finite
from ..errors import ArgumentError, NumericsError
from ..evaluate import evaluate
from ..job import file_digests
from ..measured import header
from ..processes import threads_of, worked_out
from ..recovery import finetune
from ..strict_json import read_json
from .page import draw, markdown
from .papers import PAPERS, Paper
from .recipes import BATCH, RATE, RECIPES, Setting, new_classifier, peft
from .tasks import Data, open_task
from .verdict import judged

TEACHER_RATE, LONGER, FEWEST_STEPS = 1e-4, 4, 20
QUICK = {"steps": 60, "seeds": 1}
_OVERHEAD = 20  # steps that opening and judging a model are worth, for the time left


@dataclass(frozen=True)
class Cell:
    """One run. recipe "teacher": the dense model as it is."""
    task: str
    ratio: float
    recipe: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task.replace('/', '-')}-{self.recipe}-{self.ratio!r}-{self.steps}-seed{self.seed}"


@dataclass(frozen=True)
class Job:
    """What all cells share; sent to other processes."""
    data: Mapping[str, Data]
    teachers: Mapping[str, Path | None]
    encoder: Path
    states: Path
    autocast: bool | str


def reproduce(paper: str, *, out: str | Path, data: str | Path, encoder: str | Path,
              tasks: Mapping[str, float] | None = None, steps: int | None = None, seeds: int = 3, quick: bool = False,
              autocast: bool | str = "auto", jobs: int = 1, overwrite: bool = False,
              on_progress: Callable = lambda *_: None) -> dict:
    """Runs a paper's experiment and writes reproduce.json, reproduce.md and reproduce.png to `out`: its claims, what was
    measured over how many seeds, and whether each held. A claim that did not hold is tried once more with four times the
    steps for both of its sides, one seed, before it is called so.

    data: a folder with the tasks that bench/tasks.py derives, and where teachers are kept. encoder: the model that teachers
    are made of. tasks: {name: ratio} in the place of the paper's. quick: the first task and the claims' recipes, few
    texts and steps, one seed; says so everywhere.
    What is finished is kept beside `out` until all is. Returns what reproduce.json holds. ArgumentError before any work."""
    chosen = _paper(paper).quick() if quick else _paper(paper)
    tasks = dict(chosen.tasks if tasks is None else tasks)
    steps = chosen.steps if steps is None else steps
    if quick:
        steps, seeds = min(steps, QUICK["steps"]), QUICK["seeds"]
    _check(tasks, steps, seeds, jobs)
    _check_recipes(paper, chosen, tasks, steps)
    out, encoder = Path(out), Path(encoder)
    states = out.absolute().parent / f".{out.name}.progress"
    storage.check_target(out, overwrite or states.exists())
    rows = {name: open_task(name, Path(data), quick) for name in tasks}
    _check_kinds(paper, chosen, rows)
    options = {"paper": paper, "tasks": tasks, "steps": steps, "seeds": seeds, "quick": quick, "autocast": autocast,
               "rate": RATE, "batch_size": BATCH}
    fingerprint = {"encoder": file_digests(encoder), "options": options, "rows": {
        name: progress.json_digest([list(one.train), list(one.test)]) for name, one in rows.items()}}
    fingerprint |= progress.environment(torch.device("cpu")) | {"threads": threads_of(jobs)}
    storage.check_target(out, overwrite or (states.exists() and progress.holds_result(out, fingerprint)))
    with progress.opened(states, fingerprint):
        teachers = {name: teacher(one, encoder, Path(data), autocast, on_progress) for name, one in rows.items()}
        job = Job(rows, teachers, encoder.absolute(), states, autocast)
        found = {"about": header(threads_of(jobs)) | options | {
            "jobs": jobs, "reference": chosen.reference, "test_rows": {name: len(one.test) for name, one in rows.items()},
            "rows": fingerprint["rows"]}}
        cells = cells_of(chosen, tasks, steps, seeds, teachers)
        work = _Work(on_progress, quick)
        found["cells"] = _rows(job, cells, jobs, work)
        found["claims"] = judged(chosen.claims, found["cells"])
        longer = [] if quick or not steps else longer_cells(found["claims"], steps)
        found["longer"] = _rows(job, longer, jobs, work)
        found["claims"] = judged(chosen.claims, found["cells"], found["longer"])
        storage.stage("reproduced")

        def fill(target):
            storage.write_json(target / "reproduce.json", found)
            (target / "reproduce.md").write_text(markdown(found))
            draw(found, target / "reproduce.png")

        if not progress.holds_result(out, fingerprint):
            storage.write_folder(out, fill, overwrite=overwrite, facts={"job": fingerprint})
        progress.remove(states)
    return found


def _paper(name: str) -> Paper:
    if name not in PAPERS:
        raise ArgumentError(f"paper must be one of {', '.join(PAPERS)}; found {name!r}")
    return PAPERS[name]


def _check(tasks: Mapping[str, float], steps: int, seeds: int, jobs: int) -> None:
    if not tasks:
        raise ArgumentError("tasks is empty; needs at least one")
    for name, ratio in tasks.items():
        if not 0 < ratio <= 1:
            raise ArgumentError(f"ratio of {name} is {ratio}; needs above 0 and at most 1")
    for name, value, least in (("steps", steps, 0), ("seeds", seeds, 1), ("jobs", jobs, 1)):
        if type(value) is not int or value < least:
            raise ArgumentError(f"{name} is {value!r}; needs a whole number, at least {least}")


def _check_recipes(name: str, paper: Paper, tasks: Mapping[str, float], steps: int) -> None:
    if any(RECIPES[recipe].trains for recipe in paper.recipes()) and steps < FEWEST_STEPS:
        raise ArgumentError(f"steps is {steps}; {name} trains, some of it in rounds: needs at least {FEWEST_STEPS}")
    if full := [task for task, ratio in tasks.items() if ratio == 1 and max(paper.tasks.values()) < 1]:
        raise ArgumentError(f"ratio of {full[0]} is 1; {name} makes models smaller: needs below 1")
    if {"lora", "waveft"} & set(paper.recipes()):
        peft()


def _check_kinds(name: str, paper: Paper, rows: Mapping[str, Data]) -> None:
    """A paper about language models has recipes for those alone."""
    due = "lm" if any(recipe.endswith("_lm") for recipe in paper.recipes()) else "classification"
    for one in rows.values():
        if one.kind.task != due:
            raise ArgumentError(f"{one.name} is a task of {one.kind.task}; {name} needs {due}")


def teacher(data: Data, encoder: Path, folder: Path, autocast: bool | str, on_progress: Callable) -> Path | None:
    """The folder of the dense model fine-tuned on the task's train rows, trained now unless it was before."""
    if not data.kind.teacher_steps:
        return None
    settings = {"encoder": file_digests(encoder), "rows": progress.json_digest(list(data.train)), "steps":
                data.kind.teacher_steps, "max_length": data.kind.max_length, "autocast": autocast, "rate": TEACHER_RATE, "batch_size": BATCH,
                **progress.environment(torch.device("cpu"))}
    target = folder / "teachers" / f"{data.name.replace('/', '-')}-{progress.json_digest(settings)[:16]}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        model, tokenizer = new_classifier(encoder, data, 0)
        model.config.id2label, model.config.label2id = dict(enumerate(data.labels)), {
            label: number for number, label in enumerate(data.labels)}
        finetune(model, data.train, tokenizer=tokenizer, task=data.kind.task, steps=data.kind.teacher_steps,
                 learning_rate=TEACHER_RATE, batch_size=BATCH, max_length=data.kind.max_length, autocast=autocast,
                 out=target, on_progress=lambda step, steps, _: on_progress(step, steps, f"teacher of {data.name}"))
    return target.absolute()


def cells_of(paper: Paper, tasks: Mapping[str, float], steps: int, seeds: int, teachers: Mapping) -> list[Cell]:
    """What is not trained has one seed; the teacher comes first."""
    cells = [Cell(task, 1.0, "teacher", 0, 0) for task in tasks if teachers[task]]
    for task, ratio in tasks.items():
        for recipe in paper.recipes():
            trains = RECIPES[recipe].trains
            count = seeds if trains and task not in paper.one_seed else 1
            cells += [Cell(task, ratio, recipe, steps if trains else 0, seed) for seed in range(count)]
    return cells


def longer_cells(claims: Sequence[Mapping], steps: int) -> list[Cell]:
    """Both sides of every claim that did not hold and is about training, with more steps."""
    found = []
    for claim in claims:
        sides = claim["ahead"], claim["behind"]
        if claim["verdict"] != "held" and all(RECIPES[side].trains for side in sides):
            found += [Cell(claim["task"], claim["ratio"], side, LONGER * steps, 0) for side in sides]
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------------ the cells
class _Work:
    """How far the cells are, in training steps."""

    def __init__(self, on_progress: Callable, quick: bool):
        self.on_progress, self.prefix = on_progress, "quick: " if quick else ""
        self.cells: dict[Cell, int] = {}

    def add(self, cells: Sequence[Cell]) -> None:
        self.cells |= {cell: 0 for cell in cells}

    def tell(self, cell: Cell, step: int) -> None:
        self.cells[cell] = max(step, self.cells[cell])
        total = sum(one.steps + _OVERHEAD for one in self.cells)
        self.on_progress(sum(self.cells.values()), total, f"{self.prefix}{cell.recipe}, {cell.task}, seed {cell.seed}")


def _rows(job: Job, cells: Sequence[Cell], jobs: int, work: _Work) -> list[dict]:
    """The numbers of every cell: read where they are kept, else worked out and kept."""
    paths = {cell: job.states / f"{cell.name}.json" for cell in cells}
    work.add(cells)
    for cell, row in worked_out(partial(run, job), [cell for cell in cells if not paths[cell].exists()], jobs, work.tell):
        storage.write_json(paths[cell], row)
        work.tell(cell, cell.steps + _OVERHEAD)
        trained = job.states / f"{cell.name}.model"
        if trained.exists():
            progress.discard(trained)
    return [read_json(paths[cell]) for cell in cells]


def run(job: Job, cell: Cell, on_progress: Callable) -> dict:
    """The numbers of a cell. Killed, the training of the same call goes on where its last state was kept."""
    started, data = time.monotonic(), job.data[cell.task]
    setting = Setting(data, job.teachers[cell.task], job.encoder, cell.ratio, cell.steps, cell.seed,
                      job.states / f"{cell.name}.model", job.autocast, on_progress)
    row = {"task": cell.task, "ratio": cell.ratio, "recipe": cell.recipe, "steps": cell.steps, "seed": cell.seed,
           "kept": None, "score": None, "failed": "", "score_is": SCORES[data.kind.task], "facts": {}}
    try:
        if cell.recipe == "teacher":
            model, tokenizer = setting.open()
            row["kept"] = 1.0
        else:
            model, tokenizer, row["kept"], row["facts"] = RECIPES[cell.recipe].make(setting)
        row["score"] = finite(evaluate(model, data.test, tokenizer, task=data.kind.task,
                                       max_length=data.kind.max_length)[row["score_is"]])
    except NumericsError as error:  # a training that diverged is a result too
        row["failed"] = str(error)
    return row | {"seconds": round(time.monotonic() - started, 1)}
