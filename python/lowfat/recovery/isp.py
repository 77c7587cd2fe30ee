"""Iterative structured pruning: the heads and neurons that matter least go in rounds, with training in between."""
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ArgumentError
from ..evaluate import evaluate
from ..shrink import Units, dense_size, removable, shrink
from .choosing import best, even, units_of
from .phases import Part, run_parts
from .training import TrainReport, check_numbers, in_order, prepared, ready, run_into

FINAL_SHARE, ROUNDS = 0.3, 5  # of isp(), which says what they are
POLICIES = ("pooled", "per_block")


@dataclass
class StructuredReport(TrainReport):
    """What a strategy did that takes units out."""
    shares: list[dict] = field(default_factory=list)  # {"step", "share"}: of the weights that stay
    units: dict[str, list[int]] = field(default_factory=dict)  # {block: heads or neurons that it had, and has}
    ratio: float = 1.0  # weights of the blocks kept over those that there were


def counted(before: Mapping[str, Units], after: Mapping[str, Units]) -> tuple[dict[str, list[int]], float]:
    """(units, ratio) of a report."""
    return {name: [one.count, after[name].count] for name, one in before.items()}, dense_size(after) / dense_size(before)


def isp(model, train: Sequence[Mapping], *, tokenizer, task: str | None = None, ratio: float = 0.5, policy: str = "pooled",
        rounds: int = ROUNDS, steps: int, final_share: float = FINAL_SHARE, learning_rate: float = 1e-4,
        batch_size: int = 32, max_length: int | None = None, teacher=None, teacher_tokenizer=None, temperature: float = 2.0,
        alpha: float = 0.5, autocast: bool | str = "auto", distill: Mapping | None = None, seed: int = 0,
        validation: Sequence[Mapping] | None = None, out: str | Path | None = None, overwrite: bool = False,
        save_every: int = 100, on_progress=None) -> StructuredReport:
    """Takes heads and neurons out of a dense model in place while it is trained; with out, writes the result there.

    All steps but the last `final_share` are `rounds` of training. Each adds up how much the loss would change without a
    unit, |dL/dxi| of a factor xi = 1 on it, over the batches; at its end the units that are worth least go, so that the
    share of weights that stays falls as a cubic to `ratio`. Matrices shrink at once, and later rounds are faster. Then the
    model is trained as by finetune().

    ratio: of the weights of all attention and feed-forward matrices of the blocks. policy: pooled compares units of all
    blocks by what they are worth for each of their weights; per_block takes the same share of every block, and leaves a
    model that opens in plain transformers where its config can say how many heads of which size there are (Llama's and
    Mistral's can). Every block keeps one unit at least. The other arguments, out and on_progress are those of finetune();
    beside out, the training state at the end of every round stays until the run is done. ArgumentError before any work."""
    started = time.monotonic()
    check_numbers(alpha, {"steps": steps, "rounds": rounds, "batch_size": batch_size, "save_every": save_every},
                  learning_rate=learning_rate, temperature=temperature)
    if policy not in POLICIES:
        raise ArgumentError(f"policy must be one of {', '.join(POLICIES)}; found {policy!r}")
    if not 0 <= final_share < 1:
        raise ArgumentError(f"final_share is {final_share}; needs 0 or more, and less than 1")
    each = (steps - round(final_share * steps)) // rounds
    if not each:
        raise ArgumentError(f"steps is {steps}; {rounds} rounds, and {final_share:g} of the steps after them, need more")
    units = units_of(model, ratio, distill)
    counts, dense = {name: one.count for name, one in units.items()}, dense_size(units)
    if policy == "per_block" and (few := [name for name, count in counts.items() if int(ratio * count) < 1]):
        raise ArgumentError(f"ratio is {ratio}; of the {counts[few[0]]} units of {few[0]} that leaves none, and every block "
                            f"keeps one: needs more, or policy pooled")
    objective, data = prepared(model, train, tokenizer=tokenizer, task=task, teacher=teacher,
                               teacher_tokenizer=teacher_tokenizer, validation=validation, max_length=max_length,
                               temperature=temperature, alpha=alpha, autocast=autocast, distill=distill)
    options = {"task": objective.task, "ratio": ratio, "policy": policy, "rounds": rounds, "steps": steps,
               "final_share": final_share, "learning_rate": learning_rate, "batch_size": batch_size,
               "temperature": temperature, "alpha": alpha, "autocast": objective.autocast, "seed": seed}

    def run(states):
        from .structured import Importance, Scoring

        shares = []

        def parts() -> Iterator[Part]:
            for number in range(1, rounds + 1):
                share = ratio + (1 - ratio) * (1 - number / rounds) ** 3
                importance = objective.importance = Importance(model, removable(model))

                def cut():
                    importance.remove()
                    del objective.importance
                    left = removable(model)
                    values, cost = importance.values(), {name: one.cost for name, one in left.items()}
                    worth = {name: [value / cost[name] for value in found] for name, found in values.items()}
                    if policy == "pooled":
                        kept = best(worth, cost, int(share * dense))
                    else:
                        kept = even(worth, {name: int(share * count) for name, count in counts.items()})
                    cuts = shrink(model, kept)
                    shares.append({"step": number * each, "share": dense_size(removable(model)) / dense})
                    return cuts

                try:
                    yield Part(f"round-{number:03d}", each, f"round {number} of {rounds}", callbacks=[Scoring(importance)],
                               after=cut)
                finally:
                    importance.remove()
            yield Part("final", steps - rounds * each, schedule="linear")

        with ready(objective, tokenizer):
            with closing(parts()) as rounds_and_rest:  # what a round has put into the model leaves it, whatever happens
                history, resumed_from = run_parts(
                    objective, in_order(data, steps * batch_size, seed), tokenizer, rounds_and_rest,
                    learning_rate=learning_rate, steps=steps, states=states, batch_size=batch_size, seed=seed,
                    save_every=save_every, on_progress=on_progress)
        return history, resumed_from, shares

    history, resumed_from, shares = run_into(out, run, objective, tokenizer, data, options, overwrite)
    report = StructuredReport(
        objective.task, steps, resumed_from, str(model.device), objective.autocast, time.monotonic() - started,
        [entry for entry in history if "loss" in entry], None, shares, *counted(units, removable(model)))
    if validation is not None:
        report.validation = evaluate(model, validation, tokenizer, task=objective.task, max_length=max_length)
    return report
