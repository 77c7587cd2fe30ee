"""Factorizes one block after the other and trains in between, then all together (staged factorization, Gupta et al.
2406.11307): what is factorized at once may not train stably. Order, guard and schedule are ours."""
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

from torch import nn

from ..data import padded, slices
from ..errors import ArgumentError
from ..evaluate import evaluate
from ..factorize import Report
from ..layers import factorizable
from ..method_inputs import spread
from .making import Making
from .staged_run import StagedRun, StageReport
from .training import TrainReport, check_numbers, in_order, prepared, ready, run_into

BY, ORDERS = ("block", "matrix"), ("backward", "forward", "sensitivity")
FINAL_SHARE = 0.5  # of the steps, for all of the model after the stages
_SAMPLE = 256  # training examples that the loss before and after a stage is measured on


@dataclass
class StagedReport(TrainReport):
    """What staged() did; losses leave out those of attempts that were undone."""
    stages: list[StageReport] = field(default_factory=list)
    factorized: Report | None = None

    def to_json(self) -> dict:
        return asdict(self) | {"factorized": self.factorized.to_json()}


def staged(model, train: Sequence[Mapping], *, tokenizer, task: str | None = None, method: str = "svd", ratio: float = 0.5,
           policy: str = "per_matrix", arguments: Mapping | None = None, layers: Sequence[str] | None = None,
           by: str = "block", order: str = "backward", steps: int, final_share: float = FINAL_SHARE,
           learning_rate: float = 1e-4, batch_size: int = 32, max_length: int | None = None, calibration_rows: int = 1024,
           teacher=None, teacher_tokenizer=None, temperature: float = 2.0, alpha: float = 0.5, autocast: bool | str = "auto",
           distill: Mapping | None = None, seed: int = 0, guard: float = 1.5, validation: Sequence[Mapping] | None = None,
           out: str | Path | None = None, overwrite: bool = False, save_every: int = 100, on_progress=None) -> StagedReport:
    """Factorizes the model in place stage by stage, training all of it after each; with out, writes the result there.

    The ranks are planned once, on the dense model; each stage factorizes the weights as they are by then, with statistics of
    calibration_rows of the rows where the method needs them. by: a stage is a block (an entry of a ModuleList) or a matrix.
    order: backward, forward, or sensitivity (first the stage that costs the dense model least, each tried alone).

    steps is the whole budget, to be compared with as many of finetune(): final_share of it trains at the end as finetune()
    does, the others are divided evenly between the stages, each of which warms up over a tenth and then keeps its rate. The
    optimizer keeps its moments of every parameter that stays. 0 steps: as factorize().

    guard: a stage after which the loss is more than guard times what it was (or than a tenth of what a model that knows
    nothing has, where that is more) or not finite is undone and repeated with twice the steps, taken from those at the end,
    at half the rate. When that fails too the stage is marked; the factors stay if the loss is finite, else the layers stay
    dense. The other arguments, out and on_progress are those of finetune(). ArgumentError before any work."""
    started = time.monotonic()
    _check(by, order, steps, final_share, guard)
    check_numbers(alpha, {"batch_size": batch_size, "save_every": save_every, "calibration_rows": calibration_rows},
                  learning_rate=learning_rate, temperature=temperature)
    making = Making(model, method=method, ratio=ratio, policy=policy, arguments=arguments, layers=layers)
    stages = stages_of(model, layers, by)
    each = steps_of_a_stage(steps, final_share, len(stages))
    objective, data = prepared(model, train, tokenizer=tokenizer, task=task, teacher=teacher,
                               teacher_tokenizer=teacher_tokenizer, validation=validation, max_length=max_length,
                               temperature=temperature, alpha=alpha, autocast=autocast, distill=distill)
    if objective.distillation and objective.distillation.changes:
        raise ArgumentError("distill: from and until change the loss on the way, and staged compares losses of its stages")
    making.read(train, tokenizer, objective.task, rows=calibration_rows, batch_size=batch_size, max_length=max_length)
    sample = [padded(part, tokenizer) for part in slices(spread(data, _SAMPLE), batch_size)]
    options = making.options() | {
        "task": objective.task, "by": by, "order": order, "steps": steps, "final_share": final_share, "guard": guard,
        "learning_rate": learning_rate, "batch_size": batch_size, "temperature": temperature, "alpha": alpha,
        "autocast": objective.autocast, "seed": seed}

    def run(states):
        found = StagedRun(objective, in_order(data, steps * batch_size, seed), sample, stages, making.stats, states,
                          on_progress, tokenizer=tokenizer, steps=steps, each=each, learning_rate=learning_rate, guard=guard,
                          batch_size=batch_size, seed=seed, save_every=save_every)
        with ready(objective, tokenizer, fp32=steps > 0):
            found.run(lambda: making.plan(making.stats(layers)), order)
        return found

    found = run_into(out, run, objective, tokenizer, data, options, overwrite)
    report = StagedReport(objective.task, steps, found.resumed_from or 0, str(model.device), objective.autocast,
                          time.monotonic() - started, found.losses, None, found.stages, found.factorized())
    if validation is not None:
        report.validation = evaluate(model, validation, tokenizer, task=objective.task, max_length=max_length)
    return report


def _check(by: str, order: str, steps: int, final_share: float, guard: float) -> None:
    for name, value, allowed in (("by", by, BY), ("order", order, ORDERS)):
        if value not in allowed:
            raise ArgumentError(f"{name} is {value!r}; needs one of {', '.join(allowed)}")
    if not isinstance(steps, int) or steps < 0:
        raise ArgumentError(f"steps is {steps!r}; needs a whole number, at least 0")
    if not 0 <= final_share <= 1:
        raise ArgumentError(f"final_share is {final_share}; needs 0 to 1")
    if not guard > 0:
        raise ArgumentError(f"guard is {guard}; needs a number above 0")


def stages_of(model: nn.Module, layers: Sequence[str] | None, by: str) -> dict[str, list[str]]:
    """{name of the stage: its layers}, in the order of the model; a layer outside every ModuleList is its own block."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]  # outer ones first
    stages = {}
    for name in factorizable(model, layers):
        home = next((home for home in lists if name.startswith(f"{home}.")), None) if by == "block" else None
        stages.setdefault(name if home is None else f"{home}.{name[len(home) + 1:].partition('.')[0]}", []).append(name)
    return stages


def steps_of_a_stage(steps: int, final_share: float, stages: int) -> int:
    """ArgumentError names the least number that is enough."""
    def each(budget):
        return (budget - round(budget * final_share)) // stages

    if steps and final_share < 1 and not each(steps):
        least = next(budget for budget in count(int((stages - 0.5) / (1 - final_share))) if each(budget))
        raise ArgumentError(f"steps is {steps}; {stages} stages, and {final_share:g} of the steps after them, need {least}")
    return each(steps)
