"""Pre-training of a causal language model with factorized layers, through transformers.Trainer, resumable at any moment."""
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ArgumentError, DeviceError
from .evaluate import evaluate
from .optimizers import PerLayer, parameter_groups
from .recovery.training import Phase, TrainReport, Updates, check_numbers, in_order, prepared, ready, run_into, train_phase
from .replace import ReplaceReport, replace

OPTIMIZERS = ("adamw", "adam8bit")


@dataclass
class PretrainReport(TrainReport):
    """What pretrain() did."""
    parameters: int = 0
    replaced: ReplaceReport | None = None  # None: every layer stayed dense

    def to_json(self) -> dict:
        return asdict(self) | {"replaced": self.replaced and self.replaced.to_json()}


def pretrain(config, train: Sequence[Mapping], *, tokenizer, plan: Mapping[str, Any] | None = None,
             layers: Sequence[str] | None = None, steps: int, batch_size: int = 512, length: int = 256,
             learning_rate: float = 3e-3, warmup: int | None = None, lowest: float = 0.1, weight_decay: float = 0.0,
             clip: float = 0.0, accumulate: int = 1, per_layer: bool = False, optimizer: str = "adamw",
             validation: Sequence[Mapping] | None = None, autocast: bool | str = "auto", device: torch.device | str = "cpu",
             seed: int = 0, out: str | Path | None = None, overwrite: bool = False, save_every: int = 100,
             on_progress=None) -> tuple[nn.Module, PretrainReport]:
    """Makes a causal model from a config, with new structures where the plan wants them, and trains it on texts.

    Data are lists of Python numbers on the way, about 100 bytes a token: for some hundred million tokens at most.

    config: a transformers config, or the folder of one. plan, layers: of replace(); no plan: all layers stay dense. Texts
    are joined by the end token and cut in pieces of `length` tokens, batch_size of them an update, in `accumulate` parts.
    The rate rises over warmup steps (a tenth by default), then falls as a cosine to `lowest` of it. weight_decay: see
    parameter_groups(). clip: norm of all gradients together, 0 leaves them. per_layer: updates inside the backward pass, see
    PerLayer. optimizer: adamw, or adam8bit (a GPU and the package bitsandbytes). seed: of the first weights, the supports of
    sparse parts and the order of texts.

    With out, the training state goes to .NAME.training beside it every save_every steps: the same call continues from there
    and ends with the same bits. Returns (the model, a report with the losses). ArgumentError before any work."""
    started, device = time.monotonic(), torch.device(device)
    check_numbers(0.0, {"steps": steps, "batch_size": batch_size, "length": length, "accumulate": accumulate,
                        "save_every": save_every}, learning_rate=learning_rate)
    _check(steps, batch_size, accumulate, warmup, lowest, clip, per_layer)
    make = _maker(optimizer, per_layer, device, learning_rate, weight_decay)
    model, replaced = made(config, tokenizer, plan, layers, seed)
    model.to(device)
    objective, data = prepared(model, train, tokenizer=tokenizer, task="lm", teacher=None, teacher_tokenizer=None,
                               validation=validation, max_length=length, temperature=1.0, alpha=0.0, autocast=autocast)
    options = {"steps": steps, "batch_size": batch_size, "length": length, "learning_rate": learning_rate, "warmup": warmup,
               "lowest": lowest, "weight_decay": weight_decay, "clip": clip, "accumulate": accumulate,
               "per_layer": per_layer, "optimizer": optimizer, "autocast": objective.autocast, "seed": seed}

    def run(states):
        hooked = []

        def made_once(model: nn.Module):
            hooked.append(make(model))
            return hooked[-1]

        try:
            with ready(objective, tokenizer):
                return train_phase(objective, in_order(data, steps * batch_size, seed), tokenizer,
                                   Phase(steps, learning_rate, total=steps, schedule="cosine_with_min_lr"),
                                   updates=Updates(weight_decay, clip, accumulate, warmup, lowest, made_once),
                                   batch_size=batch_size, seed=seed, states=states, save_every=save_every,
                                   on_progress=on_progress)[0]
        finally:
            for one in hooked if per_layer else ():
                one.remove()

    state = run_into(out, run, objective, tokenizer, data, options, overwrite)
    report = PretrainReport("lm", steps, state.resumed_from, str(device), objective.autocast, time.monotonic() - started,
                            state.log_history, parameters=sum(one.numel() for one in model.parameters()), replaced=replaced)
    if validation is not None:
        report.validation = evaluate(model, validation, tokenizer, task="lm", max_length=length)
    return model, report


def made(config, tokenizer, plan: Mapping[str, Any] | None, layers: Sequence[str] | None,
         seed: int) -> tuple[nn.Module, ReplaceReport | None]:
    """(the causal model of a config in fp32 on the CPU, what was replaced), the same for the same seed."""
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    if not isinstance(config, PretrainedConfig):
        if not Path(config).exists():
            raise ArgumentError(f"config {config} does not exist; needs the folder of a config.json, or that file")
        config = AutoConfig.from_pretrained(config)
    if len(tokenizer) > config.vocab_size:
        raise ArgumentError(f"tokenizer has {len(tokenizer)} tokens, the config {config.vocab_size}; needs as many")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model, None if plan is None else replace(model, plan, layers=layers)


def _check(steps: int, batch_size: int, accumulate: int, warmup: int | None, lowest: float, clip: float,
           per_layer: bool) -> None:
    if batch_size % accumulate:
        raise ArgumentError(f"batch_size is {batch_size}; needs a multiple of accumulate, which is {accumulate}")
    if warmup is not None and not (type(warmup) is int and 0 <= warmup <= steps):
        raise ArgumentError(f"warmup is {warmup!r}; needs a whole number from 0 to the {steps} steps")
    if not 0 <= lowest <= 1:
        raise ArgumentError(f"lowest is {lowest}; needs 0 to 1, a share of learning_rate")
    if not 0 <= clip < math.inf:
        raise ArgumentError(f"clip is {clip}; needs a number, at least 0, which leaves the gradients as they are")
    if per_layer and accumulate > 1:
        raise ArgumentError(f"per_layer with accumulate {accumulate}: a gradient is used and freed in the pass that makes "
                            "it; needs accumulate 1")
    if per_layer and clip:
        raise ArgumentError(f"per_layer with clip {clip}: the norm of all gradients is never known; needs clip 0")


def _maker(name: str, per_layer: bool, device: torch.device, rate: float, decay: float) -> Callable:
    if name not in OPTIMIZERS:
        raise ArgumentError(f"optimizer is {name!r}; needs one of {', '.join(OPTIMIZERS)}")
    if name == "adam8bit":
        if device.type != "cuda":
            raise DeviceError(f"optimizer adam8bit needs a GPU; the device is {device}")
        if find_spec("bitsandbytes") is None:
            raise ArgumentError("optimizer adam8bit needs the package bitsandbytes: pip install bitsandbytes")
        from bitsandbytes.optim import AdamW8bit as kind
    else:
        kind = torch.optim.AdamW

    def make(model: nn.Module):
        groups = parameter_groups(model, weight_decay=decay)
        return PerLayer(groups, kind, lr=rate) if per_layer else kind(groups, lr=rate)

    return make


def draw(report: PretrainReport, path: str | Path) -> None:
    """The loss of every step that was recorded, in nats a token, and that of the validation texts as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([entry["step"] for entry in report.losses], [entry["loss"] for entry in report.losses], label="training")
    if report.validation:
        axes.axhline(report.validation["nats_per_token"], color="black", linestyle=":", linewidth=0.8, label="validation")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("nats per token", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path)
