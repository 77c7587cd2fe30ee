"""One cell: a model is opened, made smaller, trained, and judged on texts that it was not trained on."""
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import NumericsError
from ..evaluate import evaluate
from ..factorize import factorize
from ..job import open_model
from ..method_inputs import needs_of, spread, stats_for, texts_for
from ..plan import plan
from ..recovery import finetune, lpaf, mixed_rank, staged, straight_through, theseus
from .grid import Cell

SCORES = {"classification": "accuracy", "embedding": "mrr", "lm": "nats_per_token"}  # the last: less is better
CALIBRATION_BATCH = 8
STRATEGIES = {one.__name__: one for one in (staged, straight_through, mixed_rank, theseus, lpaf)}  # which factorize, too


@dataclass(frozen=True)
class Job:
    """What all cells share; sent to other processes."""
    folder: Path
    train: Sequence[Mapping]
    test: Sequence[Mapping]
    states: Path  # of what is finished
    task: str
    steps: int
    batch_size: int
    max_length: int
    policy: str
    layers: Sequence[str] | None
    calibration_rows: int
    distill: bool
    autocast: bool | str
    device: str


def run(job: Job, cell: Cell, on_progress=None) -> dict:
    """The numbers of a cell. Killed, the training of the same call goes on where its last state was kept; the seconds are
    None then, since nobody knows all of them."""
    started = time.monotonic()
    row = {"method": cell.label, "ratio": cell.ratio, "kept": None if cell.method else 1.0, "recovery": cell.recovery,
           "learning_rate": cell.learning_rate, "seed": cell.seed, "steps": 0, "stages_failed": 0, "score": None, "failed": "",
           "numbers": {}, "seconds": None}
    model, tokenizer = open_model(job.folder, task=job.task, device=job.device)
    resumed_from = 0
    try:
        if cell.method is not None:
            resumed_from = _make(job, cell, model, tokenizer, row, on_progress)
        row["numbers"] = evaluate(model, job.test, tokenizer, task=job.task, max_length=job.max_length)
        row["score"] = finite(row["numbers"][SCORES[job.task]])
    except NumericsError as error:  # a training that diverged is a result too
        row["failed"] = str(error)
    return row if resumed_from else row | {"seconds": round(time.monotonic() - started, 1)}


def finite(score: float) -> float | None:
    """None for a model that answers NaN."""
    return score if math.isfinite(score) else None


def model_of(job: Job, cell: Cell):
    """(model, tokenizer) of a cell, not trained."""
    model, tokenizer = open_model(job.folder, task=job.task, device=job.device)
    if cell.method is not None:
        _factorized(job, cell, model, tokenizer)
    return model, tokenizer


def statistics(job: Job, cell: Cell, model, tokenizer):
    """What the method needs to have seen, None where it needs nothing; gathered once for all cells that need the same."""
    needs, arguments = needs_of(cell.method, cell.settings, job.policy), cell.settings
    if not needs:
        return None
    found = texts_for(needs, model, tokenizer, spread(job.train, job.calibration_rows), job.task, batch_size=CALIBRATION_BATCH,
                      max_length=job.max_length)
    kind = "-".join(sorted(needs)) + ("-exact" if arguments.get("exact") else "")
    return stats_for(needs, arguments, model, tokenizer, found, job.task, layers=job.layers,
                     out=job.states / f"calibration-{kind}")


def _factorized(job: Job, cell: Cell, model, tokenizer) -> float:
    """The share of parameters that is kept."""
    stats = statistics(job, cell, model, tokenizer)
    choices = plan(model, method=cell.method, ratio=cell.ratio, policy=job.policy, layers=job.layers,
                   arguments=cell.settings, stats=stats)
    return factorize(model, choices, stats).ratio


def _make(job: Job, cell: Cell, model, tokenizer, row: dict, on_progress) -> int:
    """Fills the row in as far as it gets; the step that an earlier call had reached."""
    if cell.recovery not in STRATEGIES:
        row["kept"] = _factorized(job, cell, model, tokenizer)
    if cell.recovery == "none":
        return 0
    teacher = open_model(job.folder, task=job.task, device=job.device)[0] if job.distill else None
    training = {"tokenizer": tokenizer, "task": job.task, "teacher": teacher, "steps": job.steps,
                "learning_rate": cell.learning_rate, "batch_size": job.batch_size, "max_length": job.max_length,
                "autocast": job.autocast, "seed": cell.seed, "save_every": max(10, job.steps // 5),
                "out": job.states / f"{cell.name}.model", "overwrite": True, "on_progress": on_progress}
    if cell.recovery == "finetune":
        report = finetune(model, job.train, **training)
    else:
        report = STRATEGIES[cell.recovery](model, job.train, method=cell.method, ratio=cell.ratio, policy=job.policy,
                                           layers=job.layers, arguments=cell.settings,
                                           calibration_rows=job.calibration_rows, **training)
        row["kept"] = report.factorized.ratio
    if cell.recovery == "staged":
        row["stages_failed"] = sum(stage.failed for stage in report.stages)
    row["steps"] = report.steps
    return report.resumed_from
