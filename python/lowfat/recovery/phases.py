"""A run of several phases of training, each of which may end by making the model smaller."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..shrink import Cuts
from .training import Phase, train_phase


@dataclass(frozen=True)
class Part:
    """A phase of so many steps, and what becomes of the model after them.

    rates, callbacks: as train_phase() has them. after: makes the model smaller, and says what it cut of which parameters of
    the student, so that the optimizer's moments can follow."""
    name: str  # of the folder of its training state, too
    steps: int
    what: str = "training"
    schedule: str = "constant_with_warmup"
    rates: Mapping[str, float] = field(default_factory=dict)
    callbacks: Sequence = ()
    after: Callable[[], Cuts] | None = None


def saving_rank(k: int, n: int) -> int:
    """The largest rank of two factors that has fewer parameters than the matrix [n, k]."""
    return (k * n - 1) // (k + n)


def run_parts(objective, order: list[dict], tokenizer, parts, *, learning_rate: float, steps: int, states: Path | None,
              **settings) -> tuple[list[dict], int]:
    """(log entries of all parts, the step where this call began). parts: an iterable that is asked for the next one when the
    one before is done, as that depends on what the model is by then; those of no steps are not trained."""
    start, history, resumed_from, moments = 0, [], 0, {}
    for part in parts:
        if part.steps:
            phase = Phase(part.steps, learning_rate, steps, start, part.schedule, part.what)
            state, moments = train_phase(objective, order, tokenizer, phase, states=_folder(states, part.name),
                                         moments=moments, rates=part.rates, callbacks=part.callbacks, **settings)
            history += state.log_history
            resumed_from = state.resumed_from if not start or state.resumed_from > start else resumed_from
            start += part.steps
        if part.after:
            cut_moments(moments, part.after())
        objective.zero_grad()
    return history, resumed_from


def cut_moments(moments: dict[str, Tensor], cuts: Cuts) -> None:
    """What is left of the optimizer's moments, in place, for parameters of which this is left."""
    for name, cut in cuts.items():
        for key, moment in moments.items():
            if key.startswith(f"optimizer.student.{name}.") and getattr(moment, "dim", int)():
                for dimension, index in cut:
                    moment = moment.index_select(dimension, index.to(moment.device))
                moments[key] = moment


def _folder(states: Path | None, name: str) -> Path | None:
    if states is None:
        return None
    (states / name).mkdir(exist_ok=True)
    return states / name
