"""What the strategies share: checks of their arguments, a phase of training by transformers.Trainer, the result on disk."""
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .. import progress, storage
from ..data import examples, label_ids, padded, task_for
from ..errors import ArgumentError, DeviceError
from ..evaluate import judged
from ..model_inputs import fitting, padding
from ..pooling import carry_pooling, pooling_of
from ..shrink import recorded
from ..structures import STRUCTURES, structures
from .distillation import Distillation, read_terms
from .objective import Objective


@dataclass
class TrainReport:
    """What a training run did; to_json() is plain JSON."""
    task: str
    steps: int
    resumed_from: int  # step; 0 when nothing was resumed
    device: str
    autocast: bool  # bf16
    seconds: float  # of this call
    losses: list[dict] = field(default_factory=list)  # {"step", "loss"}: mean since the entry before
    validation: dict | None = None  # evaluate() after the last step

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Phase:
    """Steps under one schedule of the learning rate, which rises over a tenth of them."""
    steps: int
    learning_rate: float
    total: int  # steps of the whole run
    start: int = 0  # those before this phase
    schedule: str = "linear"  # transformers' name: falls to 0 at the end; "constant_with_warmup" stays
    what: str = "training"


@dataclass(frozen=True)
class Updates:
    """What becomes of the gradients."""
    weight_decay: float = 0.01
    clip: float = 1.0  # the norm of all gradients together; 0 leaves them
    accumulate: int = 1  # passes over parts of a batch for one update
    warmup: int | None = None  # steps of a phase in which the rate rises; a tenth of them by default
    lowest: float = 0.0  # share of the rate at the end of schedule "cosine_with_min_lr"
    make: Callable | None = None  # make(model) -> its optimizer; by default AdamW


def check_numbers(alpha: float, whole: Mapping[str, int], **numbers: float) -> None:
    for name, value in whole.items():
        if not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} is {value!r}; needs a whole number, at least 1")
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ArgumentError(f"{name} is {value}; needs a number above 0")
    if not 0 <= alpha <= 1:
        raise ArgumentError(f"alpha is {alpha}; needs 0 to 1")


def prepared(model, train: Sequence[Mapping], *, tokenizer, task: str | None, teacher, teacher_tokenizer, validation,
             max_length: int | None, temperature: float, alpha: float, autocast: bool | str,
             distill: Mapping | None = None,
             kind: Callable[..., Objective] = Objective) -> tuple[Objective, list[dict]]:
    """(what to minimize, of this kind; the tokenized examples). ArgumentError or DeviceError where model, teacher and rows do
    not fit."""
    task = task_for(model, task)
    terms = read_terms(distill, task, teacher, alpha)
    _check_models(model, tokenizer, task, teacher, teacher_tokenizer)
    pooling = _pooling(model, teacher) if task == "embedding" else None
    autocast = _autocast(autocast, model.device)
    weight = terms["task"]["weight"] if "task" in terms else 1.0 if teacher is None else 1 - alpha
    has_labels = task != "embedding" and weight > 0
    label2id = label_ids(train, model.config.label2id)[1] if has_labels and task == "classification" else None
    data = examples(train, tokenizer, task, max_length=fitting(max_length, model), labels=has_labels, label2id=label2id)
    if validation is not None:
        judged(validation, tokenizer, task, model, max_length=max_length, label2id=label2id)
    distillation = Distillation(terms, model, teacher, padded(data[:1], tokenizer), pooling=pooling) if terms else None
    if label2id is not None:  # names learned from the rows
        model.config.label2id, model.config.id2label = label2id, {number: name for name, number in label2id.items()}
    return kind(model, task, teacher=teacher, temperature=temperature, alpha=alpha, autocast=autocast, pooling=pooling,
                distillation=distillation), data


def _check_models(model, tokenizer, task: str, teacher, teacher_tokenizer) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ArgumentError("model: every parameter is frozen; needs one with requires_grad")
    if teacher is None:
        if task == "embedding":
            raise ArgumentError("teacher is missing; training an embedding needs the dense model to follow")
        return
    if teacher is model:
        raise ArgumentError("teacher is the model that is trained; needs a copy of the dense one")
    if teacher.device != model.device:
        raise DeviceError(f"teacher is on {teacher.device}, the model on {model.device}; needs the same device")
    ours, theirs = model.config, teacher.config
    if teacher_tokenizer is not None and teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ArgumentError("teacher_tokenizer has another vocabulary than tokenizer; needs the same")
    if ours.vocab_size != theirs.vocab_size:
        raise ArgumentError(f"teacher knows {theirs.vocab_size} tokens, the model {ours.vocab_size}; needs as many")
    if task == "classification" and ours.id2label != theirs.id2label:
        raise ArgumentError(f"teacher has the labels {theirs.id2label}, the model {ours.id2label}; needs the same")
    if task == "embedding" and ours.hidden_size != theirs.hidden_size:
        raise ArgumentError(f"teacher has hidden_size {theirs.hidden_size}, the model {ours.hidden_size}; needs the same")


def _pooling(model, teacher) -> str:
    ours, theirs = pooling_of(model), pooling_of(teacher)
    if ours != theirs:
        raise ArgumentError(f"teacher is pooled by {theirs}, the model by {ours}; needs the same")
    return ours


def _autocast(wanted: bool | str, device: torch.device) -> bool:
    if wanted not in (True, False, "auto"):
        raise ArgumentError(f'autocast is {wanted!r}; needs "auto", True or False')
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def run_into(out: str | Path | None, run: Callable, objective: Objective, tokenizer, data, options: dict, overwrite: bool):
    """What run(folder for its state, or None) returns; with out, the trained model is there then, and the folder gone.

    data, options: what the run depends on besides its models; a resumed one must have the same."""
    if out is None:
        return run(None)
    states, fingerprint = Path(out).parent / f".{Path(out).name}.training", _fingerprint(objective, data, options)
    storage.check_target(out, overwrite or (states.exists() and progress.holds_result(out, fingerprint)))
    with progress.opened(states, fingerprint):
        found = run(states)
        if not progress.holds_result(out, fingerprint):
            _save(objective.student, tokenizer, out, overwrite, facts={"job": fingerprint})
        progress.remove(states)
    return found


def _fingerprint(objective: Objective, data, options: dict) -> dict:
    model, teacher = objective.student, objective.teacher
    return {"model": _digest(model), "teacher": teacher and _digest(teacher), "pooling": objective.pooling,
            "trained": progress.json_digest([name for name, one in model.named_parameters() if one.requires_grad]),
            "data": progress.json_digest(data), "options": options,
            } | _distilled(objective) | progress.environment(model.device)


def _distilled(objective: Objective) -> dict:
    return {"distill": objective.distillation.terms} if objective.distillation else {}


def _digest(model) -> str:
    """Of what a model computes: its tensors, the arguments of its structures, its config but for where it lies."""
    config = {key: value for key, value in model.config.to_dict().items()
              if key not in ("quantization_config", "_name_or_path")}
    shapes = {name: {"structure": type(layer).__name__, **layer.shape()} for name, layer in structures(model)}
    return progress.json_digest([progress.tensors_digest(model.state_dict().items()), shapes,
                                 json.loads(json.dumps(config, default=str))])


@contextmanager
def ready(objective: Objective, tokenizer, *, fp32: bool = True) -> Iterator[None]:
    """Inside, every phase of a run repeats bit for bit, and half-precision weights are fp32; afterwards all is as before,
    and the model in eval mode."""
    from .training_state import same_bits

    student = objective.student
    models = [model for model in (student, objective.teacher) if model is not None]
    with (same_bits(student.device), _in_fp32(student) if fp32 else nullcontext(),
          padding(tokenizer, objective.task, *models)):
        try:
            yield
        finally:
            student.eval()


def train_phase(objective: Objective, order: list[dict], tokenizer, phase: Phase, *, batch_size: int, seed: int,
                states: Path | None, save_every: int, on_progress, moments: dict | None = None,
                rates: Mapping[str, float] | None = None, callbacks: Sequence = (), updates: Updates = Updates()):
    """(the Trainer's state after the last step, the optimizer's moments by parameter name).

    order: the examples of the whole run. moments: those that an earlier phase left; a parameter they do not name starts
    without. rates: of parameters with such a last name, in the place of the phase's. callbacks: transformers', which come
    before a state is saved. The state's resumed_from is the step where this call began."""
    from transformers import TrainingArguments

    from .training_state import Clock, ProgressCallback, ResumableTrainer, moments_of, newest_state

    student = objective.student
    arguments = TrainingArguments(
        output_dir=str(states or tempfile.gettempdir()),  # has to exist; with states None nothing is written
        max_steps=phase.steps, per_device_train_batch_size=batch_size // updates.accumulate,
        gradient_accumulation_steps=updates.accumulate, train_sampling_strategy="sequential",
        seed=seed + phase.start, learning_rate=phase.learning_rate, lr_scheduler_type=phase.schedule,
        lr_scheduler_kwargs={"min_lr_rate": updates.lowest} if phase.schedule == "cosine_with_min_lr" else {},
        warmup_steps=phase.steps // 10 if updates.warmup is None else updates.warmup, weight_decay=updates.weight_decay,
        max_grad_norm=updates.clip, use_cpu=student.device.type == "cpu",
        dataloader_pin_memory=student.device.type == "cuda", save_strategy="no" if states is None else "steps",
        save_steps=save_every, logging_steps=max(1, phase.total // 50), logging_nan_inf_filter=False, disable_tqdm=True,
        remove_unused_columns=False, report_to="none")
    arguments._n_gpu = min(arguments.n_gpu, 1)  # no DataParallel: the model stays on its device
    first = phase.start * batch_size
    clock = [Clock(objective.distillation, phase)] if objective.distillation else []
    trainer = ResumableTrainer(objective, arguments, states=states, start=phase.start, moments=moments, rates=rates or {},
                               make=updates.make, callbacks=[*clock, *callbacks, ProgressCallback(on_progress, phase)],
                               train_dataset=order[first:first + phase.steps * batch_size],
                               data_collator=lambda part: padded(part, tokenizer))
    newest = states and newest_state(states)
    trainer.train(resume_from_checkpoint=newest and str(newest))
    return trainer.state, moments_of(trainer.model, trainer.optimizer)


@contextmanager
def _in_fp32(student) -> Iterator[None]:
    """Half-precision weights as fp32, so that small steps add up; afterwards as they were, factors as the weight that they
    replaced."""
    half = {name: parameter.dtype for name, parameter in student.named_parameters() if parameter.dtype.itemsize < 4}
    for name in half:
        parameter = student.get_parameter(name)
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, parameter in student.named_parameters():
            dtype, layer = half.get(name), name
            while dtype is None and layer:  # a part of what came in the place of a layer, or of its part
                layer = layer.rpartition(".")[0]
                dtype = half.get(f"{layer}.weight")
            parameter.data = parameter.data.to(dtype or parameter.dtype)


def in_order(data: list, count: int, seed: int) -> list:
    """The examples of the whole run in the order of their use: passes over the data, each shuffled anew."""
    generator = torch.Generator().manual_seed(seed)
    order = []
    while len(order) < count:
        order += torch.randperm(len(data), generator=generator).tolist()
    return [data[index] for index in order[:count]]


def _save(model, tokenizer, out: str | Path, overwrite: bool, facts: dict) -> None:
    """Through lowfat.save when the model has factors, or sizes that transformers' config cannot say; else as the plain
    Hugging Face folder that it is."""
    if any(isinstance(module, tuple(STRUCTURES.values())) for module in model.modules()) or recorded(model):
        from ..checkpoint import save

        save(model, out, tokenizer=tokenizer, overwrite=overwrite, facts=facts)
        return

    def fill(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        carry_pooling(model, folder)

    storage.write_folder(out, fill, overwrite=overwrite, facts=facts)
