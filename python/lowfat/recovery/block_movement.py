"""Block movement pruning: scores of blocks of the attention matrices and of neurons learn, while the model is trained, what
of it goes; heads and neurons then leave for good (Lagunas et al. 2021, 2109.04838, their "hybrid filled")."""
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..errors import ArgumentError
from ..evaluate import evaluate
from ..shrink import Units, dense_size, removable, shrink
from .choosing import best, units_of
from .isp import StructuredReport, counted
from .learned_ranks import gated_steps
from .phases import Part, run_parts
from .training import check_numbers, in_order, prepared, ready, run_into

FINAL_SHARE, WARMUP, SCORE_RATE, BLOCK = 0.3, 0.1, 1e-2, 32  # of block_movement(), which says what they are


def block_movement(model, train: Sequence[Mapping], *, tokenizer, task: str | None = None, ratio: float = 0.5,
                   block: int = BLOCK, scope: str = "global", steps: int, final_share: float = FINAL_SHARE,
                   warmup: float = WARMUP, score_rate: float = SCORE_RATE, learning_rate: float = 1e-4, batch_size: int = 32,
                   max_length: int | None = None, teacher=None, teacher_tokenizer=None, temperature: float = 2.0,
                   alpha: float = 0.5, autocast: bool | str = "auto", distill: Mapping | None = None, seed: int = 0,
                   validation: Sequence[Mapping] | None = None, out: str | Path | None = None, overwrite: bool = False,
                   save_every: int = 100, on_progress=None) -> StructuredReport:
    """Takes heads and neurons out of a dense model in place while it is trained; with out, writes the result there.

    Every block x block weights of the attention matrices, and every neuron's column, have a score that learns at score_rate
    by movement: what grows stays, the rest is masked. The share that stays falls as a cubic to `ratio`, from 1 after the
    first `warmup` of these steps. Then masked neurons go, with their rows, and heads, those first of which the masks leave
    least, until what is stored is `ratio` of the dense weights. The last `final_share` of the steps train all that is
    left as finetune() does, also the masked blocks of heads that stay: they begin at 0, and are stored anyhow.

    ratio: of the weights of all attention and feed-forward matrices of the blocks. scope: "global" compares the scores of
    all attention blocks, and those of all neurons, "matrix" takes the same share of each. Every block keeps one head and one
    neuron at least. The other arguments, out and on_progress are those of finetune(). ArgumentError before any work."""
    started = time.monotonic()
    check_numbers(alpha, {"steps": steps, "block": block, "batch_size": batch_size, "save_every": save_every},
                  learning_rate=learning_rate, score_rate=score_rate, temperature=temperature)
    if scope not in ("global", "matrix"):
        raise ArgumentError(f"scope is {scope!r}; needs one of global, matrix")
    masked = gated_steps(steps, final_share, warmup)
    units = units_of(model, ratio, distill)
    objective, data = prepared(model, train, tokenizer=tokenizer, task=task, teacher=teacher,
                               teacher_tokenizer=teacher_tokenizer, validation=validation, max_length=max_length,
                               temperature=temperature, alpha=alpha, autocast=autocast, distill=distill)
    options = {"task": objective.task, "ratio": ratio, "block": block, "scope": scope, "steps": steps,
               "final_share": final_share, "warmup": warmup, "score_rate": score_rate, "learning_rate": learning_rate,
               "batch_size": batch_size, "temperature": temperature, "alpha": alpha, "autocast": objective.autocast,
               "seed": seed}

    def run(states):
        from .movement import NAME, Movement, Pruning

        with ready(objective, tokenizer):
            heads = {layer: model.get_submodule(layer) for one in units.values() if one.kind == "heads"
                     for layer in (*one.rows, one.writer)}
            readers = {one.writer: model.get_submodule(one.writer) for one in units.values() if one.kind == "neurons"}
            movements = [Movement(layers, pattern=pattern, scope=scope)
                         for layers, pattern in ((heads, f"block:{block}"), (readers, "column"))]
            together = _Together(movements)

            def cut():
                together.keep = ratio  # from the scores after the last step, which a resumed run has too
                masks, scores = ({name: one.cpu() for movement in movements for name, one in found(movement).items()}
                                 for found in (Movement.masks, Movement.scores))
                for movement in movements:
                    movement.apply()
                    movement.remove()
                return shrink(model, _staying(units, masks, scores, ratio))

            schedule = Pruning(together, start=round(warmup * masked), end=masked - 1, final=ratio)
            pruning = Part("masks", masked, "pruning", rates={NAME: score_rate}, callbacks=[schedule], after=cut)
            try:
                return run_parts(
                    objective, in_order(data, steps * batch_size, seed), tokenizer,
                    [pruning, Part("final", steps - masked, schedule="linear")], learning_rate=learning_rate, steps=steps,
                    states=states, batch_size=batch_size, seed=seed, save_every=save_every, on_progress=on_progress)
            finally:
                for movement in movements:
                    movement.remove()

    history, resumed_from = run_into(out, run, objective, tokenizer, data, options, overwrite)
    shares = [{"step": entry["step"], "share": entry["kept"]} for entry in history if "kept" in entry]
    report = StructuredReport(
        objective.task, steps, resumed_from, str(model.device), objective.autocast, time.monotonic() - started,
        [entry for entry in history if "loss" in entry], None, shares, *counted(units, removable(model)))
    if validation is not None:
        report.validation = evaluate(model, validation, tokenizer, task=objective.task, max_length=max_length)
    return report


class _Together:
    """Movements that keep the same share, as one."""

    def __init__(self, movements: Sequence):
        self.movements = movements

    @property
    def keep(self) -> float:
        return self.movements[0].keep

    @keep.setter
    def keep(self, share: float) -> None:
        for movement in self.movements:
            movement.keep = share

    def collect(self, step: int) -> None:
        for movement in self.movements:
            movement.collect(step)


def _staying(units: Mapping[str, Units], masks: Mapping[str, Tensor], scores: Mapping[str, Tensor],
             ratio: float) -> dict[str, list[int]]:
    """The units of each block that stay: neurons that the masks keep, as long as there is room for one head of every block
    beside them, and as many heads as there is room for then, by how many of their weights the masks keep.

    masks: of a layer [n, k]. scores: of the layers that read neurons, one of each."""
    cost = {name: one.cost for name, one in units.items()}
    neurons, heads, most = {}, {}, {}
    for name, one in units.items():
        if one.kind == "neurons":
            neurons[name] = scores[one.writer].flatten().tolist()
            most[name] = int(masks[one.writer].any(0).sum())
        else:
            left = masks[one.writer].sum(0)[one.columns.flatten()].view_as(one.columns).sum(1)
            for layer, rows in one.rows.items():
                left = left + masks[layer].sum(1)[rows.flatten()].view_as(rows).sum(1)
            heads[name] = left.tolist()
    budget = int(ratio * dense_size(units))
    kept = best(neurons, cost, budget - sum(cost[name] for name in heads), most)
    return kept | best(heads, cost, budget - sum(len(found) * cost[name] for name, found in kept.items()))
