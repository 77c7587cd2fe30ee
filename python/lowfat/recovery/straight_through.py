"""Learns which factors to use: a dense shadow weight of each layer is trained through its factors, which are made of it anew
every few steps (the straight-through factorizer of DSFormer, 2312.13211; for N:M masks SR-STE, Zhou et al. 2021).

The papers leave the schedule open; ours: methods of any structure, the dense model fades out, factors learn in between."""
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor, nn

from ..errors import ArgumentError, LowfatError
from ..evaluate import evaluate
from ..factorize import Report, factorize
from ..layers import dense_weight, factorizable
from ..methods import METHODS
from ..structures import Structure
from .making import Making
from .training import Phase, TrainReport, check_numbers, in_order, prepared, ready, run_into, train_phase

EVERY, FADE, FREEZE, PULL, SHADOW_RATE = 20, 0.4, 0.2, 1e-4, 3e-5  # of straight_through(), which says what they are


@dataclass
class StraightThroughReport(TrainReport):
    """What straight_through() did."""
    refactorized: list[dict] = field(default_factory=list)  # {"step", "error"}: mean relative error to the shadow weights
    factorized: Report | None = None  # at the start

    def to_json(self) -> dict:
        return asdict(self) | {"factorized": self.factorized.to_json()}


def straight_through(model, train: Sequence[Mapping], *, tokenizer, task: str | None = None, method: str = "svd",
                     ratio: float = 0.5, policy: str = "per_matrix", arguments: Mapping | None = None,
                     layers: Sequence[str] | None = None, steps: int, every: int = EVERY, fade: float = FADE,
                     freeze: float = FREEZE, pull: float = PULL, learning_rate: float = 1e-4,
                     shadow_rate: float = SHADOW_RATE, batch_size: int = 32, max_length: int | None = None,
                     calibration_rows: int = 1024, teacher=None, teacher_tokenizer=None,
                     temperature: float = 2.0, alpha: float = 0.5, autocast: bool | str = "auto",
                     distill: Mapping | None = None, seed: int = 0, validation: Sequence[Mapping] | None = None,
                     out: str | Path | None = None, overwrite: bool = False, save_every: int = 100,
                     on_progress=None) -> StraightThroughReport:
    """Factorizes a dense model in place and trains it; with out, writes the result there.

    Every layer computes with its factors and learns twice: the factors by their own gradients at learning_rate, and a dense
    weight, at shadow_rate, by the gradient that the product of the factors has. Every `every` steps the method makes new
    factors of the dense weight, with the statistics that the dense model had; so which entries of a sparse factor there are
    is learned too. Over the first `fade` of the steps the outputs of the dense weights fade out, as (1 - t)^3; the last
    `freeze` of them train the factors alone, as finetune() does, and the dense weights are gone. pull: weight of
    ||W - What||^2 in the dense weight's gradient at the end of it, from 0.

    The memory of a layer's training is more than that of a dense one's; what comes out is the factors. The other arguments,
    out and on_progress are those of finetune() and staged(). ArgumentError before any work."""
    started = time.monotonic()
    check_numbers(alpha, {"steps": steps, "every": every, "batch_size": batch_size, "save_every": save_every,
                          "calibration_rows": calibration_rows},
                  learning_rate=learning_rate, shadow_rate=shadow_rate, temperature=temperature)
    learning = _check(steps, fade, freeze, pull)
    if (arguments or {}).get("grouped"):
        raise ArgumentError("grouped: rows that share a block may be others every time; straight_through needs fixed sizes")
    making = Making(model, method=method, ratio=ratio, policy=policy, arguments=arguments, layers=layers)
    objective, data = prepared(model, train, tokenizer=tokenizer, task=task, teacher=teacher,
                               teacher_tokenizer=teacher_tokenizer, validation=validation, max_length=max_length,
                               temperature=temperature, alpha=alpha, autocast=autocast, distill=distill)
    making.read(train, tokenizer, objective.task, rows=calibration_rows, batch_size=batch_size, max_length=max_length)
    options = making.options() | {
        "task": objective.task, "steps": steps, "every": every, "fade": fade, "freeze": freeze, "pull": pull,
        "learning_rate": learning_rate, "shadow_rate": shadow_rate, "batch_size": batch_size, "temperature": temperature,
        "alpha": alpha, "autocast": objective.autocast, "seed": seed}

    def run(states):
        from .shadow import NAME, Learning

        settings = {"batch_size": batch_size, "seed": seed, "save_every": save_every, "on_progress": on_progress}
        with ready(objective, tokenizer):
            shadows, factorized = _shadowed(making)
            order = in_order(data, steps * batch_size, seed)
            try:
                state, moments = train_phase(
                    objective, order, tokenizer,
                    Phase(learning, learning_rate, steps, schedule="constant_with_warmup", what="learning the factors"),
                    states=_folder(states, "learning"), rates={NAME: shadow_rate},
                    callbacks=[Learning(shadows, every=every, steps=learning, fade=round(fade * steps), pull=pull)],
                    **settings)
            finally:
                shadows.remove()
            objective.zero_grad()
            history, resumed_from = state.log_history, state.resumed_from
            if learning < steps:
                state, _ = train_phase(objective, order, tokenizer, Phase(steps - learning, learning_rate, steps, learning),
                                       states=_folder(states, "frozen"), moments=moments, **settings)
                history = history + state.log_history
                resumed_from = state.resumed_from if state.resumed_from > learning else resumed_from
        return history, resumed_from, factorized

    history, resumed_from, factorized = run_into(out, run, objective, tokenizer, data, options, overwrite)
    report = StraightThroughReport(
        objective.task, steps, resumed_from, str(model.device), objective.autocast, time.monotonic() - started,
        [entry for entry in history if "loss" in entry], None, [entry for entry in history if "error" in entry], factorized)
    if validation is not None:
        report.validation = evaluate(model, validation, tokenizer, task=objective.task, max_length=max_length)
    return report


def _check(steps: int, fade: float, freeze: float, pull: float) -> int:
    """The steps that learn which factors to use."""
    if not 0 <= fade <= 1:
        raise ArgumentError(f"fade is {fade}; needs 0 to 1")
    if not 0 <= freeze < 1:
        raise ArgumentError(f"freeze is {freeze}; needs 0 or more, and less than 1")
    if fade + freeze > 1:
        raise ArgumentError(f"fade is {fade} and freeze {freeze}; together they must not exceed 1")
    if not 0 <= pull < math.inf:
        raise ArgumentError(f"pull is {pull}; needs a number, at least 0")
    learning = steps - round(freeze * steps)
    if not learning:
        raise ArgumentError(f"steps is {steps}; freeze {freeze} leaves none to learn the factors in")
    return learning


def _shadowed(making: Making):
    """(the shadow weights of the model, which is factorized now; the report of that)"""
    from .shadow import Shadows

    model, stats = making.model, making.stats(making.layers)
    planned, modules = making.plan(stats), factorizable(making.model, making.layers)
    weights = {name: nn.Parameter(dense_weight(modules[name]).clone(), requires_grad=modules[name].weight.requires_grad)
               for name, choice in planned.items() if choice.method}
    del modules  # the dense weights are freed on the way
    report = factorize(model, planned, stats)
    layers = {layer.name: model.get_submodule(layer.name) for layer in report.layers if layer.kept}
    if not layers:
        raise ArgumentError(f"no layer was factorized; {report.layers[0].name}: {report.layers[0].reason}")

    def again(name: str, layer: Structure, weight: Tensor) -> Structure:
        choice = planned[name]
        try:
            return METHODS[choice.method].follow(layer, weight, stats and stats[name], **choice.arguments)
        except LowfatError as error:
            raise type(error)(f"{name}: {error}") from error

    return Shadows(layers, weights, again), report


def _folder(states: Path | None, name: str) -> Path | None:
    if states is None:
        return None
    (states / name).mkdir(exist_ok=True)
    return states / name
