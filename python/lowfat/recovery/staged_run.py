"""One run of staged(): its stages, what a stage that fails goes back to, and what is kept so that the run can be resumed."""
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import storage
from ..blocks import group_blocks
from ..errors import NumericsError
from ..factorize import LayerReport, Report, factorize, left_alone
from ..layers import replace
from ..listen import untouched
from ..manifest import MAX_BYTES
from ..plan import Plan
from ..progress import discard
from ..strict_json import read_json
from ..structures import STRUCTURES
from ..tensor_file import read_tensors
from .objective import Objective
from .training import Phase, train_phase

_FLOOR = 0.1  # of the loss of a model that knows nothing: a smaller loss counts as this much for the guard


@dataclass
class StageReport:
    """What one stage did. Losses are means over a fixed sample of the training rows, without dropout; None: not finite."""
    name: str  # of the block, or of the layer
    layers: list[str]
    steps: int  # those of both attempts
    loss_before: float | None
    loss_after: float | None
    retried: bool = False
    failed: bool = False
    reason: str = ""  # of the failure


class StagedRun:
    """What a run of staged() was given, and what it has got to; the latter is written to a folder after every stage."""

    def __init__(self, objective: Objective, examples: list[dict], sample: list[dict], stages: Mapping[str, list[str]],
                 stats: Callable, states: Path | None, on_progress, *, tokenizer, steps: int, each: int,
                 learning_rate: float, guard: float, batch_size: int, seed: int, save_every: int):
        self.objective, self.examples, self.sample, self.names, self.stats = objective, examples, sample, stages, stats
        self.states, self.on_progress, self.tokenizer = states, on_progress, tokenizer
        self.steps, self.each, self.learning_rate, self.guard = steps, each, learning_rate, guard  # each: steps of a stage
        self.settings = {"batch_size": batch_size, "seed": seed, "save_every": save_every}
        self.start, self.resumed_from = 0, None  # steps taken; those taken by an earlier call
        self.loss: float | None = None  # on the sample
        self.stages: list[StageReport] = []
        self.layers: list[LayerReport] = []
        self.losses: list[dict] = []
        self.moments: dict[str, Tensor] = {}

    @property
    def model(self):
        return self.objective.student

    def run(self, make_plan: Callable[[], Plan], order: str) -> None:
        self._begin(make_plan, order)
        for number in range(len(self.stages), len(self.order)):
            self._stage(number, self.order[number])
        if self.steps > self.start:
            self._train(Phase(self.steps - self.start, self.learning_rate, self.steps, self.start), len(self.order), 0)

    def factorized(self) -> Report:
        """Of all stages, in the order of the plan."""
        layers = {layer.name: layer for layer in self.layers}
        return Report([layers[name] for name in self.plan], self.others, group_blocks(self.model))

    def _begin(self, make_plan, order: str) -> None:
        """Plan and order, from the dense model; then what an earlier call has left."""
        self.plan = self._kept("plan.json", make_plan, lambda path, made: made.save(path), Plan.load)
        self.others = left_alone(self.model, self.plan)
        storage.stage("planned")
        dense = self._kept("dense.json", lambda: self._dense(order), storage.write_json, partial(read_json, limit=MAX_BYTES))
        storage.stage("ordered")
        self.order, self.loss, self.floor = dense["order"], dense["loss"], _FLOOR * dense["blank_loss"]
        if self.states:
            self._resume()

    def _kept(self, name: str, make: Callable, write: Callable, read: Callable):
        """What make() returns, or what it returned to an earlier call."""
        path = self.states and self.states / name
        if path and path.exists():
            return read(path)
        made = make()
        if path:
            write(path, made)
        return made

    def _dense(self, order: str) -> dict:
        """What the dense model says: its loss, that of a model that knows nothing, the order of the stages."""
        loss, names = self._loss(), list(self.names)
        if not math.isfinite(loss):
            raise NumericsError(f"the loss on the training rows is {loss} before any layer is factorized")
        if order == "sensitivity":
            names.sort(key=self._cost)
        return {"loss": loss, "blank_loss": self._loss(self.objective.blank_loss),
                "order": names[::-1] if order == "backward" else names}

    def _cost(self, name: str) -> float:
        """The loss with this stage alone."""
        dense = self._modules(name)
        self._factorize(name)
        loss = self._loss()
        self._put(dense)
        return loss if math.isfinite(loss) else math.inf

    def _stage(self, number: int, name: str) -> None:
        """Factorizes and trains, a second time where the guard asks for it, and writes what came of it."""
        from .training_state import model_tensors, restore_model

        begun, before, dense, moments, losses = self.start, self.loss, self._modules(name), self.moments, self.losses
        snapshot = {key: tensor.clone() for key, tensor in model_tensors(self.objective).items()} if self.each else {}

        def undo():
            self._put(dense)
            restore_model(self.objective, snapshot)
            self.moments, self.losses = moments, losses

        limit = self.guard * max(before, self.floor) if self.each else math.nan
        attempts = self._attempts(number)
        for attempt, (steps, rate) in enumerate(attempts):
            phase = Phase(steps, rate, self.steps, self.start, "constant_with_warmup",
                          f"stage {number + 1} of {len(self.order)}, {name}")
            self.start = phase.start + steps
            if self.states and self._folder(number, attempt + 1).exists():
                continue  # this attempt failed in an earlier call
            if attempt:
                undo()
            found, after = self._factorize(name, phase.start), self._trained(phase, number, attempt)
            if after <= limit or not self.each:
                break
        entry = StageReport(name, self.names[name], self.start - begun, before, after, retried=attempt > 0,
                            failed=bool(self.each) and not after <= limit)
        if not math.isfinite(after):
            entry.loss_after = None
        if entry.failed and entry.loss_after is None:
            undo()
            entry.loss_after, entry.reason = before, "the loss is not finite; its layers stay dense"
            found = [_dense_again(layer) for layer in found]
        elif entry.failed:
            entry.reason = f"the loss is {after:.4g}, above {limit:.4g}"
        self.loss = entry.loss_after
        self.stages, self.layers = self.stages + [entry], self.layers + found
        if self.states:
            self._write()

    def _attempts(self, number: int) -> list[tuple[int, float]]:
        """(steps, rate) of the first, and of the second where there are steps left that no other stage needs."""
        spare = self.steps - self.start - self.each * (len(self.order) - number)
        second = [(min(2 * self.each, spare), self.learning_rate / 2)] if self.each and spare else []
        return [(self.each, self.learning_rate), *second]

    def _trained(self, phase: Phase, number: int, attempt: int) -> float:
        """The loss on the sample after the steps; NaN where training itself stopped at one that is not finite."""
        if phase.steps:
            try:
                self._train(phase, number, attempt)
            except NumericsError:
                return math.nan
        return self._loss()

    def _train(self, phase: Phase, number: int, attempt: int) -> None:
        folder = self.states and self._folder(number, attempt)
        if folder:
            folder.mkdir(exist_ok=True)
        self.objective.zero_grad()
        state, self.moments = train_phase(self.objective, self.examples, self.tokenizer, phase, states=folder,
                                          on_progress=self.on_progress, moments=self.moments, **self.settings)
        self.losses = self.losses + state.log_history
        if self.resumed_from is None:
            self.resumed_from = state.resumed_from

    def _loss(self, measure: Callable | None = None) -> float:
        """The mean over the sample; a teacher's dropout, too, is off."""
        measure, total = measure or (lambda **batch: self.objective(**batch)["loss"]), 0.0
        with torch.no_grad(), untouched(self.model), untouched(self.objective.teacher or self.model):
            for batch in self.sample:
                total += measure(**batch).item() * len(batch["input_ids"])
        return total / sum(len(batch["input_ids"]) for batch in self.sample)

    def _factorize(self, name: str, step: int = 0) -> list[LayerReport]:
        names = self.names[name]
        if self.on_progress:
            self.on_progress(step, self.steps, f"factorizing {name}")
        return factorize(self.model, {layer: self.plan[layer] for layer in names}, self.stats(names)).layers

    def _modules(self, name: str) -> dict:
        return {layer: self.model.get_submodule(layer) for layer in self.names[name]}

    def _put(self, modules: Mapping) -> None:
        for name, module in modules.items():
            replace(self.model, name, module)

    # --- on disk: stage-N when N stages are done, attempt-N-A while the next trains ---

    def _folder(self, number: int, attempt: int) -> Path:
        return self.states / f"attempt-{number:05d}-{attempt}"

    def _write(self) -> None:
        from .training_state import STATE, TENSORS, model_tensors

        target = self.states / f"stage-{len(self.stages):05d}"

        def fill(folder):
            storage.write_tensors(folder / TENSORS, model_tensors(self.objective) | self.moments)
            storage.write_json(folder / STATE, {
                "start": self.start, "loss": self.loss, "losses": self.losses,
                "stages": [asdict(stage) for stage in self.stages], "layers": [asdict(layer) for layer in self.layers]})

        storage.write_folder(target, fill, overwrite=True)
        for older in [*self.states.glob("stage-*"), *self.states.glob("attempt-*")]:
            if older != target:
                discard(older)
        storage.stage(f"stage {len(self.stages)}")

    def _resume(self) -> None:
        from .training_state import STATE, TENSORS, restore_model

        folder = max(self.states.glob("stage-*"), default=None)
        if folder is None:
            return
        storage.verify(folder)
        tensors, state = read_tensors(folder / TENSORS), read_json(folder / STATE, MAX_BYTES)
        self.start, self.loss, self.losses = state["start"], state["loss"], state["losses"]
        self.stages = [StageReport(**stage) for stage in state["stages"]]
        self.layers = [LayerReport(**layer) for layer in state["layers"]]
        for layer in self.layers:
            if layer.kept:
                self._put({layer.name: self._empty(layer)})
        restore_model(self.objective, tensors)
        self.moments = {name: tensor.clone() for name, tensor in tensors.items() if name.startswith("optimizer.")}

    def _empty(self, layer: LayerReport):
        """A layer of that shape in the place of a dense one, its numbers still to come."""
        weight = self.model.get_submodule(layer.name).weight
        empty = STRUCTURES[layer.structure](**layer.shape, device=weight.device, dtype=weight.dtype)
        return empty.requires_grad_(weight.requires_grad)


def _dense_again(layer: LayerReport) -> LayerReport:
    return LayerReport(layer.name, layer.method, parameters=layer.dense_parameters, dense_parameters=layer.dense_parameters,
                       reason="its stage failed", events=layer.events, seconds=layer.seconds)
