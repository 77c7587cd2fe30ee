"""Trains factors while the dense weights still take their places at random, less and less often: mixed-rank fine-tuning of
LPAF (2306.14152) matrix by matrix, and BERT-of-Theseus (Xu et al., 2002.02925) block by block.

y = (1 - z) A B x + z W x, z ~ Bernoulli(p), one z for a matrix (or a block) and a pass; p falls to 0."""
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax

from ..errors import ArgumentError
from ..evaluate import evaluate
from ..factorize import Report, factorize
from ..layers import dense_weight, factorizable
from .making import Making
from .objective import Objective
from .staged import stages_of
from .training import Phase, TrainReport, check_numbers, in_order, prepared, ready, run_into, train_phase

P_INIT, UNTIL, CONSISTENCY = 0.5, 0.6, 1.0  # of mixed_rank()
REPLACED = 0.3  # of theseus()
SCHEDULES = ("linear", "constant")


@dataclass
class MixedReport(TrainReport):
    """What mixed_rank() or theseus() did."""
    factorized: Report | None = None

    def to_json(self) -> dict:
        return asdict(self) | {"factorized": self.factorized.to_json()}


@dataclass(frozen=True)
class Mixing:
    """How often the dense weights compute in the place of the factors. ArgumentError for what is out of range."""
    p_init: float = P_INIT
    until: float = UNTIL  # share of the steps
    consistency: float = CONSISTENCY
    train_dense: bool = False
    by: str = "matrix"  # what is drawn together; or "block"
    schedule: str = "linear"

    def __post_init__(self):
        for name in ("p_init", "until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; needs 0 to 1")
        if not 0 <= self.consistency < math.inf:
            raise ArgumentError(f"consistency is {self.consistency}; needs a number, at least 0")
        if self.schedule not in SCHEDULES:
            raise ArgumentError(f"schedule is {self.schedule!r}; needs one of {', '.join(SCHEDULES)}")

    def check(self, model: nn.Module) -> None:
        """ArgumentError where the backward pass would compute the first of two passes again, by then with other branches."""
        repeats = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        if self.consistency and self.p_init and self.until and repeats:
            raise ArgumentError("model: gradient checkpointing cannot repeat a pass with its branches; switch it off, or set "
                                "consistency to 0, which makes one pass a step")

    def options(self) -> dict:
        return asdict(self)


class MixedObjective(Objective):
    """The mean loss of two passes, each with branches of its own, and consistency times how far their answers are apart: the
    mean of KL(a, b) and KL(b, a), of embeddings 1 - cosine. One pass where consistency is 0; as Objective where p is."""

    def __init__(self, *args, consistency: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.consistency, self.branches = consistency, None
        self._answers: list[Tensor] = []

    def forward(self, **batch) -> dict[str, Tensor]:
        if not (self.branches and self.branches.p):
            return super().forward(**batch)
        losses, self._answers = [], []
        for _ in range(2 if self.consistency else 1):
            self.branches.draw()
            losses.append(super().forward(**batch)["loss"])
        loss = sum(losses) / len(losses)
        if self.consistency:
            loss = loss + self.consistency * self._disagreement(batch["attention_mask"].to(loss.device))
        self._answers = []
        if torch.is_grad_enabled() and not loss.requires_grad:
            loss.requires_grad_()  # no branch that was drawn learns: a step that changes nothing
        return {"loss": loss}

    def _compared(self, batch) -> tuple:
        found = super()._compared(batch)
        if self.branches and self.branches.p:
            self._answers.append(found[0])
        return found

    def _disagreement(self, mask: Tensor) -> Tensor:
        if self.task == "embedding":
            return (1 - cosine_similarity(*self._answers, dim=-1)).mean()
        one, other = (log_softmax(logits, dim=-1) for logits in self._answers)
        distances = ((one.exp() - other.exp()) * (one - other)).sum(-1) / 2  # [b] or, for lm, [b, t]
        weights = mask.float() if self.task == "lm" else torch.ones_like(distances)
        return (distances * weights).sum() / weights.sum()


def mixed_rank(model, train: Sequence[Mapping], *, tokenizer, task: str | None = None, method: str = "svd",
               ratio: float = 0.5, policy: str = "per_matrix", arguments: Mapping | None = None,
               layers: Sequence[str] | None = None, steps: int, p_init: float = P_INIT, until: float = UNTIL,
               consistency: float = CONSISTENCY, train_dense: bool = False, schedule: str = "linear",
               learning_rate: float = 1e-4, batch_size: int = 32, max_length: int | None = None,
               calibration_rows: int = 1024, teacher=None, teacher_tokenizer=None, temperature: float = 2.0,
               alpha: float = 0.5, autocast: bool | str = "auto", distill: Mapping | None = None, seed: int = 0,
               validation: Sequence[Mapping] | None = None, out: str | Path | None = None, overwrite: bool = False,
               save_every: int = 100, on_progress=None) -> MixedReport:
    """Factorizes a dense model in place and trains it with mixed ranks; with out, writes the result there.

    Each matrix computes with its dense weight instead of its factors with a probability that falls from p_init, as schedule
    says (linear; constant), to 0 after the share `until` of the steps. Until then each step makes two passes with draws of
    their own; consistency weighs the distance of their answers, 0 makes it one pass. train_dense: the dense weights learn
    too, else they stay. p_init 0 is finetune() of the factorized model, bit for bit.

    The paper leaves p_init, until and consistency open; these are ours. The dense weights take memory until the end, and are
    not in the result. The other arguments, out and on_progress are those of finetune() and staged(). ArgumentError before
    any work."""
    mixing = Mixing(p_init, until, consistency, train_dense, schedule=schedule)
    return _strategy(model, train, mixing, tokenizer=tokenizer, task=task, method=method, ratio=ratio, policy=policy,
                     arguments=arguments, layers=layers, steps=steps, learning_rate=learning_rate, batch_size=batch_size,
                     max_length=max_length, calibration_rows=calibration_rows, teacher=teacher,
                     teacher_tokenizer=teacher_tokenizer, temperature=temperature, alpha=alpha, autocast=autocast,
                     distill=distill, seed=seed, validation=validation, out=out, overwrite=overwrite, save_every=save_every,
                     on_progress=on_progress)


def theseus(model, train: Sequence[Mapping], *, tokenizer, task: str | None = None, method: str = "svd", ratio: float = 0.5,
            policy: str = "per_matrix", arguments: Mapping | None = None, layers: Sequence[str] | None = None, steps: int,
            replaced: float = REPLACED, until: float = UNTIL, schedule: str = "linear", learning_rate: float = 1e-4,
            batch_size: int = 32, max_length: int | None = None, calibration_rows: int = 1024, teacher=None,
            teacher_tokenizer=None, temperature: float = 2.0, alpha: float = 0.5, autocast: bool | str = "auto",
            distill: Mapping | None = None, seed: int = 0, validation: Sequence[Mapping] | None = None,
            out: str | Path | None = None, overwrite: bool = False, save_every: int = 100, on_progress=None) -> MixedReport:
    """Factorizes a dense model in place and lets the factors of each block replace its dense weights at random.

    A block computes with its factors with probability `replaced` at the first step, which rises in a line to 1 after the
    share `until` of the steps, or with schedule constant jumps there; then all of them train as finetune() does. The dense
    weights are frozen, what has no factors (biases, norms, embeddings, head) is of both and learns; the paper, whose
    successors are smaller blocks of their own, needs no factors. The other arguments, out and on_progress are those of
    mixed_rank(). ArgumentError before any work."""
    if not 0 <= replaced <= 1:
        raise ArgumentError(f"replaced is {replaced}; needs 0 to 1")
    return _strategy(model, train, Mixing(1 - replaced, until, 0.0, by="block", schedule=schedule), tokenizer=tokenizer,
                     task=task, method=method, ratio=ratio, policy=policy, arguments=arguments, layers=layers, steps=steps,
                     learning_rate=learning_rate, batch_size=batch_size, max_length=max_length,
                     calibration_rows=calibration_rows, teacher=teacher, teacher_tokenizer=teacher_tokenizer,
                     temperature=temperature, alpha=alpha, autocast=autocast, distill=distill, seed=seed,
                     validation=validation, out=out, overwrite=overwrite, save_every=save_every, on_progress=on_progress)


def _strategy(model, train, mixing: Mixing, *, tokenizer, task, method, ratio, policy, arguments, layers, steps,
              learning_rate, batch_size, max_length, calibration_rows, teacher, teacher_tokenizer, temperature, alpha,
              autocast, distill, seed, validation, out, overwrite, save_every, on_progress) -> MixedReport:
    started = time.monotonic()
    check_numbers(alpha, {"steps": steps, "batch_size": batch_size, "save_every": save_every,
                          "calibration_rows": calibration_rows}, learning_rate=learning_rate, temperature=temperature)
    mixing.check(model)
    making = Making(model, method=method, ratio=ratio, policy=policy, arguments=arguments, layers=layers)
    objective, data = prepared(model, train, tokenizer=tokenizer, task=task, teacher=teacher,
                               teacher_tokenizer=teacher_tokenizer, validation=validation, max_length=max_length,
                               temperature=temperature, alpha=alpha, autocast=autocast, distill=distill,
                               kind=partial(MixedObjective, consistency=mixing.consistency))
    making.read(train, tokenizer, objective.task, rows=calibration_rows, batch_size=batch_size, max_length=max_length)
    options = making.options() | mixing.options() | {
        "task": objective.task, "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size,
        "temperature": temperature, "alpha": alpha, "autocast": objective.autocast, "seed": seed}

    def run(states):
        with ready(objective, tokenizer):
            return factorized_and_mixed(
                objective, making, making.stats(layers), mixing, in_order(data, steps * batch_size, seed), tokenizer,
                Phase(steps, learning_rate, steps), states=states, batch_size=batch_size, seed=seed, save_every=save_every,
                on_progress=on_progress)

    state, factorized = run_into(out, run, objective, tokenizer, data, options, overwrite)
    report = MixedReport(objective.task, steps, state.resumed_from, str(model.device), objective.autocast,
                         time.monotonic() - started, state.log_history, None, factorized)
    if validation is not None:
        report.validation = evaluate(model, validation, tokenizer, task=objective.task, max_length=max_length)
    return report


def factorized_and_mixed(objective: MixedObjective, making: Making, stats, mixing: Mixing, order: list[dict], tokenizer,
                         phase: Phase, **settings):
    """(the Trainer's state, the report of the factorization): the student is factorized as it is now, then trained for the
    phase, and has no dense weights in the end."""
    from .branches import Branches, Fading

    end = round(mixing.until * phase.steps) if mixing.p_init else 0
    planned, model = making.plan(stats), making.model
    weights, groups = _dense(model, planned, making.layers, mixing.by) if end else ({}, [])
    factorized = factorize(model, planned, stats)
    layers = {layer.name: model.get_submodule(layer.name) for layer in factorized.layers
              if layer.kept and layer.name in weights}
    if not layers:
        return train_phase(objective, order, tokenizer, phase, **settings)[0], factorized
    groups = [members for group in groups if (members := [name for name in group if name in layers])]
    objective.branches = Branches(layers, weights, groups, learn=mixing.train_dense)
    del weights  # of layers that stay dense
    try:
        fading = Fading(objective.branches, first=mixing.p_init, end=end, schedule=mixing.schedule)
        return train_phase(objective, order, tokenizer, phase, callbacks=[fading], **settings)[0], factorized
    finally:
        objective.branches.remove()
        objective.branches = None


def _dense(model: nn.Module, planned: Mapping, layers: Sequence[str] | None,
           by: str) -> tuple[dict[str, Tensor], list[list[str]]]:
    """(weights of the layers that are to be factorized, the names of those that are drawn together)"""
    modules = factorizable(model, layers)
    weights = {name: dense_weight(modules[name]) for name, choice in planned.items() if choice.method}
    return weights, list(stages_of(model, layers, by).values())
