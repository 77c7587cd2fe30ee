"""Learns how many components each low-rank layer keeps, and which: gates on them are trained under one budget for all (FLOP,
Wang, Wohlwend, Lei 2020, 1910.04732)."""
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import nn

from ..errors import ArgumentError
from ..evaluate import evaluate
from ..factorize import Report, factorize, is_hugging_face
from ..methods import METHODS, low_rank_size
from ..plan import Choice, Plan
from ..structures import LowRank
from .making import Making
from .phases import Part, run_parts, saving_rank
from .training import TrainReport, check_numbers, in_order, prepared, ready, run_into

FINAL_SHARE, WARMUP, GATE_RATE, START = 0.3, 0.5, 0.1, 3.0  # of learned_ranks(), which says what they are


@dataclass
class LearnedRanksReport(TrainReport):
    """What learned_ranks() did."""
    shares: list[dict] = field(default_factory=list)  # {"step", "share", "target"} of parameters that are expected to stay
    factorized: Report | None = None  # with the ranks that were learned; its errors are those before the training

    def to_json(self) -> dict:
        return asdict(self) | {"factorized": self.factorized.to_json()}


def learned_ranks(model, train: Sequence[Mapping], *, tokenizer, task: str | None = None, method: str = "svd",
                  ratio: float = 0.5, arguments: Mapping | None = None, layers: Sequence[str] | None = None, steps: int,
                  final_share: float = FINAL_SHARE, warmup: float = WARMUP, gate_rate: float = GATE_RATE,
                  start: float = START, learning_rate: float = 1e-4, batch_size: int = 32, max_length: int | None = None,
                  calibration_rows: int = 1024, teacher=None, teacher_tokenizer=None, temperature: float = 2.0,
                  alpha: float = 0.5, autocast: bool | str = "auto", distill: Mapping | None = None, seed: int = 0,
                  validation: Sequence[Mapping] | None = None, out: str | Path | None = None, overwrite: bool = False,
                  save_every: int = 100, on_progress=None) -> LearnedRanksReport:
    """Factorizes a dense model in place into low-rank layers whose ranks are learned; with out, writes the result there.

    The method makes factors of full rank, and every component of theirs gets a hard-concrete gate. Gates and factors are
    trained together on the loss, and the gates on a Lagrangian besides: the parameters that are expected to stay are to be
    `ratio` of the dense ones, of all layers together, a target that is reached over the first `warmup` of the steps. Then
    the components with the largest gates stay, as many as the ratio pays for, and the last `final_share` of the steps
    train them as finetune() does. Every layer keeps one component at least, and fewer than would save nothing.

    method: any that makes low-rank layers. gate_rate: learning rate of the gates and of the multipliers. start: what
    log_alpha of every gate is at first; 3 is a gate of 0.92. While gates learn, a layer takes up to twice the memory and
    time of a dense one. The other arguments, out and on_progress are those of finetune() and staged(). ArgumentError before
    any work."""
    started = time.monotonic()
    check_numbers(alpha, {"steps": steps, "batch_size": batch_size, "save_every": save_every,
                          "calibration_rows": calibration_rows},
                  learning_rate=learning_rate, gate_rate=gate_rate, temperature=temperature)
    gated = gated_steps(steps, final_share, warmup)
    if not math.isfinite(start):
        raise ArgumentError(f"start is {start}; needs a finite number")
    making = Making(model, method=method, ratio=ratio, policy="per_matrix", arguments=arguments, layers=layers)
    if METHODS[method].size is not low_rank_size:
        able = ", ".join(name for name, known in METHODS.items() if known.size is low_rank_size)
        raise ArgumentError(f"method is {method}, whose layers have no rank components to learn; those of {able} have")
    if (form := making.arguments.get("form", "factors")) != "factors":
        raise ArgumentError(f"form is {form}; ranks are learned of factors")
    objective, data = prepared(model, train, tokenizer=tokenizer, task=task, teacher=teacher,
                               teacher_tokenizer=teacher_tokenizer, validation=validation, max_length=max_length,
                               temperature=temperature, alpha=alpha, autocast=autocast, distill=distill)
    making.read(train, tokenizer, objective.task, rows=calibration_rows, batch_size=batch_size, max_length=max_length)
    options = making.options() | {
        "task": objective.task, "steps": steps, "final_share": final_share, "warmup": warmup, "gate_rate": gate_rate,
        "start": start, "learning_rate": learning_rate, "batch_size": batch_size, "temperature": temperature, "alpha": alpha,
        "autocast": objective.autocast, "seed": seed}

    def run(states):
        from .gates import LOG_ALPHA, MULTIPLIERS, Constrained, RankGates

        with ready(objective, tokenizer):
            report = _opened(making)
            low_rank = {layer.name: model.get_submodule(layer.name) for layer in report.layers if layer.kept}
            gates = objective.gates = RankGates(low_rank, dense=report.dense_parameters, start=start, fixed=sum(
                layer.parameters for layer in report.layers if not layer.kept))

            def cut():
                gates.remove()
                del objective.gates  # neither trained nor saved from here on
                cuts = gates.cut(model, gates.chosen(int(ratio * report.dense_parameters)))
                report.layers = [_learned(layer, model) for layer in report.layers]
                return cuts

            learning = Part("gates", gated, "learning the ranks", rates={LOG_ALPHA: gate_rate, MULTIPLIERS: gate_rate},
                            callbacks=[Constrained(gates, target=ratio, warmup=round(warmup * gated))], after=cut)
            try:
                history, resumed_from = run_parts(
                    objective, in_order(data, steps * batch_size, seed), tokenizer,
                    [learning, Part("final", steps - gated, schedule="linear")], learning_rate=learning_rate, steps=steps,
                    states=states, batch_size=batch_size, seed=seed, save_every=save_every, on_progress=on_progress)
            finally:
                gates.remove()
        if is_hugging_face(model):
            from ..checkpoint import attach

            attach(model)  # with the ranks that there are by now
        return history, resumed_from, report

    history, resumed_from, factorized = run_into(out, run, objective, tokenizer, data, options, overwrite)
    report = LearnedRanksReport(
        objective.task, steps, resumed_from, str(model.device), objective.autocast, time.monotonic() - started,
        [entry for entry in history if "loss" in entry], None, [entry for entry in history if "share" in entry], factorized)
    if validation is not None:
        report.validation = evaluate(model, validation, tokenizer, task=objective.task, max_length=max_length)
    return report


def gated_steps(steps: int, final_share: float, warmup: float) -> int:
    """The steps that gates or masks are learned in, before the last ones train what is left; ArgumentError for none."""
    if not 0 <= final_share < 1:
        raise ArgumentError(f"final_share is {final_share}; needs 0 or more, and less than 1")
    if not 0 <= warmup <= 1:
        raise ArgumentError(f"warmup is {warmup}; needs 0 to 1")
    if not (gated := steps - round(final_share * steps)):
        raise ArgumentError(f"steps is {steps}; final_share {final_share} leaves none to learn what stays")
    return gated


def _opened(making: Making) -> Report:
    """What came of factorizing every layer that can save something, in its full rank."""
    model, stats = making.model, making.stats(making.layers)
    planned = making.plan(stats)
    whole = {name: _whole(choice, making) for name, choice in planned.items()}
    report = factorize(model, Plan(whole, ratio=planned.ratio, policy=planned.policy), stats)
    if not any(layer.kept for layer in report.layers):
        raise ArgumentError(f"no layer was factorized; {report.layers[0].name}: {report.layers[0].reason}")
    return report


def _whole(choice: Choice, making: Making) -> Choice:
    k, n = choice.in_features, choice.out_features
    if not saving_rank(k, n):
        return choice  # dense
    return replace(choice, method=making.method, arguments={**making.arguments, "rank": min(k, n)}, reason="")


def _learned(layer, model: nn.Module):
    """The report of a layer, with its rank as it is by now."""
    if not layer.kept:
        return layer
    made: LowRank = model.get_submodule(layer.name)
    return replace(layer, shape=made.shape(), rank=made.rank, parameters=made.macs())
