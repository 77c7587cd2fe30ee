"""Low-rank prune-and-factorize (LPAF, 2306.14152): weights that first-order pruning made sparse are closer to low rank than
dense ones, are factorized with the scores of the pruning as weights, and trained with mixed ranks.

Each of the three steps can be switched off or replaced. Constants that the paper leaves open are ours."""
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..evaluate import evaluate
from ..factorize import Report
from ..layers import dense_weight, factorizable
from ..stats import Calibration, Stats
from .making import Making
from .mixed_rank import CONSISTENCY, P_INIT, UNTIL, MixedObjective, Mixing, factorized_and_mixed
from .training import Phase, TrainReport, check_numbers, in_order, prepared, ready, run_into, train_phase

PRUNE_SHARE, SCORE_RATE, WARMUP, COOL_DOWN = 0.5, 1e-2, 0.1, 0.3  # of lpaf(), which says what they are
WEIGHTINGS, CRITERION = ("scores", "mask", "none"), "sensitivity"
_FLOOR = 1e-3  # of the mean, added to every weight of an element


@dataclass
class LpafReport(TrainReport):
    """What lpaf() did."""
    pruning: list[dict] = field(default_factory=list)  # {"step", "kept"}: share of the weights that was kept by then
    factorized: Report | None = None

    def to_json(self) -> dict:
        return asdict(self) | {"factorized": self.factorized.to_json()}


@dataclass(frozen=True)
class Pruned:
    """How the weights are pruned, and what of that weighs in the factorization. ArgumentError for what is out of range."""
    keep: float
    steps: int
    weighting: str = "scores"
    criterion: str = CRITERION
    scope: str = "matrix"
    score_rate: float = SCORE_RATE
    warmup: float = WARMUP  # shares of these steps
    cool_down: float = COOL_DOWN

    def __post_init__(self):
        from .movement import CRITERIA, SCOPES, check_keep

        check_keep(self.keep)
        for name, allowed in (("weighting", WEIGHTINGS), ("criterion", CRITERIA), ("scope", SCOPES)):
            if getattr(self, name) not in allowed:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}; needs one of {', '.join(allowed)}")
        if not 0 < self.score_rate < math.inf:
            raise ArgumentError(f"score_rate is {self.score_rate}; needs a number above 0")
        for name in ("warmup", "cool_down"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; needs 0 to 1")
        if self.warmup + self.cool_down > 1:
            raise ArgumentError(f"warmup is {self.warmup} and cool_down {self.cool_down}; together they must not exceed 1")


def lpaf(model, train: Sequence[Mapping], *, tokenizer, task: str | None = None, method: str = "sparsity_aware",
         ratio: float = 0.5, policy: str = "per_matrix", arguments: Mapping | None = None,
         layers: Sequence[str] | None = None, steps: int, prune_share: float = PRUNE_SHARE, keep: float | None = None,
         criterion: str = CRITERION, scope: str = "matrix", score_rate: float = SCORE_RATE, warmup: float = WARMUP,
         cool_down: float = COOL_DOWN, weighting: str = "scores", p_init: float = P_INIT, until: float = UNTIL,
         consistency: float = CONSISTENCY, train_dense: bool = False, learning_rate: float = 1e-4, batch_size: int = 32,
         max_length: int | None = None, calibration_rows: int = 1024, teacher=None, teacher_tokenizer=None,
         temperature: float = 2.0, alpha: float = 0.5, autocast: bool | str = "auto",
         distill: Mapping | None = None, seed: int = 0, validation: Sequence[Mapping] | None = None,
         out: str | Path | None = None, overwrite: bool = False, save_every: int = 100, on_progress=None) -> LpafReport:
    """Prunes a dense model while it trains, factorizes what is left in place and trains that; with out, writes the result
    there. steps is all of it, to be compared with as many of finetune().

    1. For prune_share of the steps only the best `keep` of the weights compute, by default as many as ratio; the share falls
    to that between the first warmup and the last cool_down of these steps. criterion: best by sensitivity, by
    movement scores, which learn at score_rate, or by magnitude (see recovery/movement.py); the paper's first order is either
    of the first two. scope: in each matrix, or global. prune_share 0 or keep 1 skips this step.
    2. method with ratio, policy and arguments; of sparsity_aware, weighting says with which weights: the scores above 0 of
    what is kept (of magnitude its own), the mask, or none. Another method reads calibration_rows of the rows as ever.
    3. The other steps are mixed_rank() with p_init, until (share of these steps), consistency and train_dense; the dense
    branch is the pruned weight. p_init 0 is plain training of the factors.

    The other arguments, out and on_progress are those of finetune() and staged(). ArgumentError before any work."""
    started = time.monotonic()
    check_numbers(alpha, {"steps": steps, "batch_size": batch_size, "save_every": save_every,
                          "calibration_rows": calibration_rows}, learning_rate=learning_rate, temperature=temperature)
    mixing = Mixing(p_init, until, consistency, train_dense)
    mixing.check(model)
    making = Making(model, method=method, ratio=ratio, policy=policy, arguments=arguments, layers=layers)
    pruned = Pruned(ratio if keep is None else keep, pruning_steps(steps, prune_share, keep), weighting, criterion, scope,
                    score_rate, warmup, cool_down)
    objective, data = prepared(model, train, tokenizer=tokenizer, task=task, teacher=teacher,
                               teacher_tokenizer=teacher_tokenizer, validation=validation, max_length=max_length,
                               temperature=temperature, alpha=alpha, autocast=autocast, distill=distill,
                               kind=partial(MixedObjective, consistency=consistency))
    if method != "sparsity_aware":
        making.read(train, tokenizer, objective.task, rows=calibration_rows, batch_size=batch_size, max_length=max_length)
    options = making.options() | mixing.options() | asdict(pruned) | {
        "task": objective.task, "steps": steps, "pruning_steps": pruned.steps, "learning_rate": learning_rate,
        "batch_size": batch_size, "temperature": temperature, "alpha": alpha, "autocast": objective.autocast, "seed": seed}

    def run(states):
        settings = {"batch_size": batch_size, "seed": seed, "save_every": save_every, "on_progress": on_progress}
        order, history, moments, reached = in_order(data, steps * batch_size, seed), [], None, 0
        with ready(objective, tokenizer):
            weights = None
            if pruned.steps:
                phase = Phase(pruned.steps, learning_rate, steps, what="pruning")
                state, moments, weights = _prune(objective, order, tokenizer, phase, pruned, layers,
                                                 states=_folder(states, "pruning"), **settings)
                history, reached = state.log_history, state.resumed_from
            stats = _weights(weights or _even(model, layers)) if method == "sparsity_aware" else making.stats(layers)
            state, factorized = factorized_and_mixed(
                objective, making, stats, mixing, order, tokenizer, Phase(steps - pruned.steps, learning_rate, steps,
                                                                          pruned.steps),
                states=_folder(states, "mixed"), moments=moments, **settings)
        reached = state.resumed_from if state.resumed_from > pruned.steps else reached
        return history + state.log_history, reached, factorized

    history, resumed_from, factorized = run_into(out, run, objective, tokenizer, data, options, overwrite)
    report = LpafReport(
        objective.task, steps, resumed_from, str(model.device), objective.autocast, time.monotonic() - started,
        [entry for entry in history if "loss" in entry], None, [entry for entry in history if "kept" in entry], factorized)
    if validation is not None:
        report.validation = evaluate(model, validation, tokenizer, task=objective.task, max_length=max_length)
    return report


def pruning_steps(steps: int, prune_share: float, keep: float | None) -> int:
    """0 where all weights are kept. ArgumentError for a share that leaves one of the steps none."""
    if not 0 <= prune_share < 1:
        raise ArgumentError(f"prune_share is {prune_share}; needs 0 or more, and less than 1")
    if keep == 1:
        return 0
    if not prune_share and keep is not None:
        raise ArgumentError(f"keep is {keep} and prune_share 0; pruning needs steps")
    pruning = round(prune_share * steps)
    if prune_share and not 0 < pruning < steps:
        raise ArgumentError(f"steps is {steps}; prune_share {prune_share} leaves none to " +
                            ("train the factors in" if pruning else "prune in"))
    return pruning


def _prune(objective: MixedObjective, order: list[dict], tokenizer, phase: Phase, pruned: Pruned, layers, **settings):
    """(the Trainer's state, the optimizer's moments, the weight of every element [n, k] by layer): the student's matrices are
    pruned and trained, and hold zeros in the end."""
    from .movement import NAME, Movement, Pruning

    movement = Movement(factorizable(objective.student, layers), scope=pruned.scope, criterion=pruned.criterion)
    pruning = Pruning(movement, start=round(pruned.warmup * phase.steps),
                      end=phase.steps - round(pruned.cool_down * phase.steps), final=pruned.keep)
    try:
        state, moments = train_phase(objective, order, tokenizer, phase, rates={NAME: pruned.score_rate},
                                     callbacks=[pruning], **settings)
        movement.keep = pruned.keep
        weights = {name: _omega(score, mask, pruned.weighting)
                   for (name, score), mask in zip(movement.scores().items(), movement.masks().values())}
        movement.apply()
    finally:
        movement.remove()
    objective.zero_grad()
    return state, moments, weights


def _omega(score: Tensor, mask: Tensor, weighting: str) -> Tensor:
    """What the error of each element counts. A kept weight that is leaving counts as little as one that is gone."""
    if weighting == "none":
        return torch.ones_like(score)
    found = mask.to(score.dtype) if weighting == "mask" else score.clamp(min=0) * mask
    return found + _FLOOR * found.mean()


def _even(model, layers) -> dict[str, Tensor]:
    return {name: torch.ones_like(dense_weight(layer)) for name, layer in factorizable(model, layers).items()}


def _weights(omega: Mapping[str, Tensor]) -> Calibration:
    """Where sparsity_aware looks for them."""
    return Calibration({name: Stats(None, 0, weights.sum(0), weights.sum(1), weights, samples=1)
                        for name, weights in omega.items()})


def _folder(states: Path | None, name: str) -> Path | None:
    if states is None:
        return None
    (states / name).mkdir(exist_ok=True)
    return states / name
