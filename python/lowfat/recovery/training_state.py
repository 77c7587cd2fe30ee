"""A Trainer that keeps its state in safetensors and JSON instead of pickles, and resumes from it bit for bit.

Imported inside functions only, because it brings transformers."""
import dataclasses
import math
import os
import random
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from .. import storage
from ..errors import NumericsError
from ..progress import discard
from ..strict_json import read_json
from ..tensor_file import read_tensors

TENSORS, STATE, TRAINER = "state.safetensors", "state.json", "trainer_state.json"  # the last name is transformers'


class ResumableTrainer(Trainer):
    """states: the folder that gets one subfolder per saved step, of which the newest complete one stays.

    start: steps of the run before this phase of it. moments: what moments_of() said at their end. rates: learning rates of
    parameters by their last name. make: what makes the optimizer of a model, in the place of transformers' AdamW."""

    def __init__(self, *args, states: Path | None, start: int, moments: dict[str, torch.Tensor] | None,
                 rates: dict[str, float], make: Callable | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.states, self.start, self.moments, self.rates = states, start, moments, rates
        self.make = make
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, *args, **kwargs):
        if self.make:
            self.optimizer = self.make(self.model)
        optimizer = super().create_optimizer(*args, **kwargs)  # keeps one that is there
        if self.rates:
            self._split_by_rate(optimizer)
        if self.moments:
            restore_optimizer(self.model, optimizer, self.moments, optimizer.state_dict()["param_groups"])
        return optimizer

    def _split_by_rate(self, optimizer):
        rate_of = {id(parameter): self.rates.get(name.rpartition(".")[2])
                   for name, parameter in self.model.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            for rate in (None, *dict.fromkeys(self.rates.values())):
                if part := [parameter for parameter in group["params"] if rate_of[id(parameter)] == rate]:
                    groups.append(group | {"params": part, "lr": group["lr"] if rate is None else rate})
        optimizer.param_groups = groups

    def log(self, logs, start_time=None):
        loss, step = logs.get("loss"), self.start + self.state.global_step
        if loss is None:
            return  # the summary at the end, which is written elsewhere
        if not math.isfinite(loss):
            raise NumericsError(f"training loss {loss} at step {step}; needs a smaller learning_rate")
        self.state.log_history.append({"step": step, "loss": loss})

    def _save_checkpoint(self, model, trial):
        target = self.states / f"step-{self.state.global_step:08d}"

        def fill(folder):
            tensors, state = training_state(self.model, self.optimizer, self.lr_scheduler)
            storage.write_tensors(folder / TENSORS, tensors)
            storage.write_json(folder / STATE, state)
            storage.write_json(folder / TRAINER, dataclasses.asdict(self.state))

        storage.write_folder(target, fill, overwrite=True)
        for older in sorted(self.states.glob("step-*")):
            if older != target:
                discard(older)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        storage.verify(Path(resume_from_checkpoint))
        restore_model(self.model, self._tensors(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            state = read_json(Path(checkpoint) / STATE)
            restore_optimizer(self.model, self.optimizer, self._tensors(checkpoint) | state["numbers"], state["optimizer"])
            self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_rng_state(self, checkpoint):
        if checkpoint is not None:
            restore_rng(self._tensors(checkpoint), read_json(Path(checkpoint) / STATE)["rng"])

    def _tensors(self, checkpoint):
        return read_tensors(Path(checkpoint) / TENSORS)


class ProgressCallback(TrainerCallback):
    """Tells on_progress(step, steps, what) after every step of a phase, in steps of the whole run."""

    def __init__(self, on_progress, phase):
        self.on_progress, self.phase = on_progress, phase

    def on_train_begin(self, args, state, control, **kwargs):
        state.resumed_from = self.phase.start + state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        step = self.phase.start + state.global_step
        storage.stage(f"step {step}")
        if self.on_progress:
            loss = next((f", loss {entry['loss']:.3f}" for entry in reversed(state.log_history) if "loss" in entry), "")
            self.on_progress(step, self.phase.total, f"{self.phase.what}{loss}")


class Clock(TrainerCallback):
    """Tells a distillation how much of the run is over, before every step."""

    def __init__(self, distillation, phase):
        self.distillation, self.phase = distillation, phase

    def on_step_begin(self, args, state, control, **kwargs):
        self.distillation.progress = (self.phase.start + state.global_step) / self.phase.total


@contextmanager
def same_bits(device: torch.device):
    """Deterministic kernels where a GPU has a choice; leaves the caller's random generators and settings as they were."""
    before = rng_state()
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        restore_rng(*before)


def newest_state(states: Path) -> Path | None:
    """The folder of the last saved step, if there is one."""
    return max(states.glob("step-*"), default=None)


def training_state(model, optimizer, scheduler) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, JSON) of everything that training from here on depends on."""
    tensors, rng = rng_state()
    moments = moments_of(model, optimizer)
    numbers = {name: value for name, value in moments.items() if not isinstance(value, torch.Tensor)}
    tensors |= model_tensors(model) | {name: value for name, value in moments.items() if name not in numbers}
    return tensors, {"optimizer": optimizer.state_dict()["param_groups"], "numbers": numbers,
                     "scheduler": scheduler.state_dict(), "rng": rng}


def model_tensors(model) -> dict[str, torch.Tensor]:
    """{"model.NAME": tensor}, as restore_model() takes them back; not copies."""
    return {f"model.{name}": tensor.detach() for name, tensor in _stored(model)}


def moments_of(model, optimizer) -> dict[str, torch.Tensor]:
    """{"optimizer.NAME.KEY": tensor, or number} by the parameter's name: its own number changes when layers are replaced; not
    copies."""
    names = _names(model, optimizer)
    return {f"optimizer.{names[index]}.{key}": value for index, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()}


def _names(model, optimizer) -> list[str]:
    """Of the parameters, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _stored(model):
    """Parameters and the buffers that belong to the state, tied ones once."""
    kept = model.state_dict().keys()
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


@torch.no_grad()
def restore_model(model, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in _stored(model):
        tensor.copy_(tensors[f"model.{name}"])


def restore_optimizer(model, optimizer, tensors: dict[str, torch.Tensor], groups: list[dict]) -> None:
    """The moments of every parameter of the model that they are there for; the others start without."""
    state, numbers = {}, {name: number for number, name in enumerate(_names(model, optimizer))}
    for full, tensor in tensors.items():
        name, _, key = full.removeprefix("optimizer.").rpartition(".")
        if full.startswith("optimizer.") and name in numbers:
            # a copy: neither a view of the file, which is removed later, nor of what a second attempt starts from
            state.setdefault(numbers[name], {})[key] = tensor.clone() if isinstance(tensor, torch.Tensor) else tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def rng_state() -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, JSON) of the random generators of torch, its CUDA devices, Python and numpy."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, words, position, has_gauss, gauss = numpy.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [kind, words.tolist(), position, has_gauss, gauss]}


def restore_rng(tensors: dict[str, torch.Tensor], state: dict) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    for name, tensor in tensors.items():
        if name.startswith("rng.cuda."):
            torch.cuda.set_rng_state(tensor, int(name.removeprefix("rng.cuda.")))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy.random.set_state(tuple(state["numpy"]))
