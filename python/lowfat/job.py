"""The job behind `lowfat factorize`: a model folder in, a smaller one out, resumable at any moment from load to rename."""
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from . import progress, storage
from .checkpoint import load, save
from .data import task_for, task_of
from .errors import ArgumentError, IntegrityError, LowfatError, StorageError
from .factorize import Report, factorize
from .manifest import digest
from .method_inputs import check_fit, needs_of, stats_for, texts_for
from .model_inputs import fitting
from .plan import Plan, plan
from .pooling import pooling_files

log = logging.getLogger("lowfat")
AUTO_CLASSES = {"classification": "AutoModelForSequenceClassification", "lm": "AutoModelForCausalLM",
                "embedding": "AutoModel"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model",
                    "sentencepiece.bpe.model")
_MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")  # what decides a model and its tokenizer


def factorize_folder(folder: str | Path, out: str | Path, *, method: str, ratio: float, policy: str = "per_matrix",
                     layers: Sequence[str] | None = None, arguments: Mapping | None = None, share: int | None = None,
                     rows: Sequence[Mapping] | None = None, task: str | None = None, batch_size: int = 8,
                     max_length: int | None = None, device: str | torch.device = "cpu", overwrite: bool = False,
                     on_progress=None) -> Report:
    """Loads a model, calibrates it on the rows, plans, factorizes and saves.

    What is finished is kept in .NAME.progress beside `out` until the result is there: the same call, after a kill at any
    moment, continues and writes the same bits. on_progress(phase, done, total, what), phase "calibrate" or "factorize".
    LowfatError, before any work, for everything that can be known by then."""
    folder, out, arguments = Path(folder), Path(out), dict(arguments or {})
    needs, states = needs_of(method, arguments, policy), out.parent / f".{out.name}.progress"
    if needs and rows is None:
        raise ArgumentError(f"{method} needs texts to calibrate on (--calibrate)")
    storage.check_target(out, overwrite or states.exists())  # before a long look at the model
    model, tokenizer = open_model(folder, task=task, device=device, reads_text=rows is not None)
    max_length = None if rows is None else fitting(max_length, model)  # as it is used, said or not
    options = {"method": method, "arguments": arguments, "ratio": ratio, "policy": policy, "layers": layers, "task": task,
               "batch_size": batch_size, "max_length": max_length, "share": share}
    fingerprint = {"model": file_digests(folder), "rows": progress.json_digest(rows), "options": options}
    fingerprint |= progress.environment(torch.device(device))
    storage.check_target(out, overwrite or (states.exists() and progress.holds_result(out, fingerprint)))
    check_fit(model, method=method, arguments=arguments, ratio=ratio, layers=layers, share=share)
    task = task_for(model, task)
    data = None if rows is None else texts_for(needs, model, tokenizer, rows, task, batch_size=batch_size,
                                               max_length=max_length)
    with progress.opened(states, fingerprint):
        try:
            stats = data and stats_for(needs, arguments, model, tokenizer, data, task, layers=layers,
                                       out=states / "calibration", on_progress=_phase(on_progress, "calibrate"))
            storage.stage("calibrated")
            choices = _plan(states / "plan.json", model, method=method, ratio=ratio, policy=policy, stats=stats,
                            layers=layers, arguments=arguments, share=share)
            storage.stage("planned")
            report = factorize(model, choices, stats, resume=states / "layers",
                               on_progress=_phase(on_progress, "factorize"))
            if not progress.holds_result(out, fingerprint):
                save(model, out, tokenizer=tokenizer, overwrite=overwrite, facts={"job": fingerprint})
            storage.stage("saved")
        except LowfatError as error:
            if not isinstance(error, (StorageError, IntegrityError)):  # would come again: there is nothing to continue
                progress.remove(states)
            raise
        progress.remove(states)
    return report


def open_model(folder: str | Path, *, task: str | None = None, device: str | torch.device = "cpu", reads_text: bool = True):
    """(model in eval mode, tokenizer) of a folder, dense or lowfat's own, in the class saved or the one the task needs.

    reads_text False: the tokenizer may be missing, and is None then. ArgumentError: not a model, or one without the weights
    that the task needs, or without a tokenizer."""
    import transformers

    folder = Path(folder)
    if task not in (None, *AUTO_CLASSES):
        raise ArgumentError(f"task is {task!r}; needs one of {', '.join(AUTO_CLASSES)}")
    if not (folder / "config.json").is_file():
        raise ArgumentError(f"{folder}: {'no config.json, so not a model' if folder.is_dir() else 'no such folder'}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = open_tokenizer(folder) if reads_text or _has_tokenizer(folder) else None
        names = getattr(config, "architectures", None) or [None]
        fits = task in (None, task_of(config)) and hasattr(transformers, names[0] or "")
        name = names[0] if fits else AUTO_CLASSES[task or task_of(config)]
        if hasattr(config, "quantization_config"):
            model = load(folder, auto_class=None if fits else name)
        else:
            model, missing = _dense(folder, name)
            if missing and (task or task_of(config)) == "embedding":
                model, missing = _encoder(folder, name, model, missing)
            if missing:
                raise ArgumentError(f"{folder}: has no weights for {', '.join(missing[:3])}; {name} needs them"
                                    + (f" (task {task})" if task else ""))
    except (OSError, ValueError) as error:
        if isinstance(error, LowfatError):
            raise
        raise ArgumentError(f"{folder}: cannot be opened: {str(error).splitlines()[0]}") from error
    return model.eval().to(device), tokenizer


def open_tokenizer(folder: str | Path):
    """The tokenizer of a folder; ArgumentError where there is none: transformers makes an empty one up then, and every text
    becomes unknown tokens."""
    from transformers import AutoTokenizer

    if not _has_tokenizer(Path(folder)):
        raise ArgumentError(f"{folder}: has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); save it with the model")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _dense(folder: Path, name: str):
    """(model of this class, names of the parameters that the folder has no weights for)"""
    import transformers

    # absolute: it is how the files beside the model are found later, wherever the process is by then
    model, found = getattr(transformers, name).from_pretrained(folder.absolute(), dtype="auto", use_safetensors=True,
                                                               local_files_only=True, output_loading_info=True)
    return model, sorted(found["missing_keys"])


@torch.no_grad()
def _encoder(folder: Path, name: str, model, missing: list[str]):
    """The same for embeddings, which read neither the head that a checkpoint may lack nor the pooler.

    A pooler without weights becomes zeros: a random one would give other files each time, and look like a real one."""
    if model.base_model is not model:
        log.warning("%s: has no weights for %s of %s; opened without that head", folder, ", ".join(missing[:3]), name)
        model, missing = _dense(folder, AUTO_CLASSES["embedding"])
    if poolers := [key for key in missing if "pooler" in key.split(".")]:
        log.warning("%s: has no weights for %s; set to zero, embeddings do not read them", folder, ", ".join(poolers))
    for key in poolers:
        model.get_parameter(key).zero_()
    return model, [key for key in missing if key not in poolers]


def file_digests(folder: Path) -> dict[str, str]:
    """Digest of every file that the model is made of."""
    if not folder.is_dir():
        raise ArgumentError(f"{folder}: no such folder")
    found = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in _MODEL_FILES and path.is_file()}
    return {name: digest(path) for name, path in (found | pooling_files(folder)).items()}


def _phase(on_progress, phase: str):
    return on_progress and partial(on_progress, phase)


def _plan(path: Path, model, **options) -> Plan:
    if not path.exists():
        plan(model, **options).save(path)
    return Plan.load(path)
