"""What the options of several commands look like, and what their words mean."""
from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from . import hub
from .data import TASKS
from .demo import ENCODER, encoder_folder
from .errors import ArgumentError, DeviceError

Model = Annotated[str, typer.Argument(metavar="MODEL", hidden=True)]  # hidden: the help text says what it is, in fewer lines
Out = Annotated[Path, typer.Argument(metavar="OUT", hidden=True)]
Device = Annotated[str, typer.Option(metavar="WHERE", help="auto, cpu or cuda.")]
Task = Annotated[Optional[str], typer.Option(metavar="NAME", help=f"{', '.join(TASKS)}; default: the model's.")]
MaxLength = Annotated[Optional[int], typer.Option(metavar="TOKENS",
                                                 help="Longer texts are cut; default 128 or the model's limit.")]
BatchSize = Annotated[int, typer.Option(metavar="N", help="Texts in a batch.")]
Samples = Annotated[Optional[int], typer.Option(metavar="N", help="Read only the first N texts.")]
Dtype = Annotated[Optional[str], typer.Option(metavar="NAME", help="float32, bfloat16, float16; default: as stored.")]
Layers = Annotated[Optional[list[str]], typer.Option(metavar="PATTERN", help="Only names like '*.query'; may be repeated.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the order of texts, and dropout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def model_folder(name: str) -> Path:
    """The folder of a model: by its path, its hub name, or the short name of the demo's encoder."""
    is_demos = name in (ENCODER, f"sentence-transformers/{ENCODER}") and not Path(name).exists()
    return encoder_folder() if is_demos else hub.folder_of(name)


def device_of(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ArgumentError(f"--device is {name!r}; needs auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: this torch sees no CUDA device; `lowfat doctor` says why")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def dtype_of(name: str | None, stored: torch.dtype) -> torch.dtype:
    if name not in (None, "float32", "bfloat16", "float16"):
        raise ArgumentError(f"--dtype is {name!r}; needs float32, bfloat16 or float16")
    return getattr(torch, name) if name else stored


def check_file(path: Path) -> None:
    if not path.parent.is_dir():
        raise ArgumentError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ArgumentError(f"{path}: cannot be written")


def listed(text: str) -> list[str]:
    """The values of an option, commas between them; those inside brackets are of a value."""
    return re.split(r",(?![^\[]*\])", text)


def numbers(option: str, text: str) -> list[float]:
    try:
        return [float(value) for value in text.split(",")]
    except ValueError:
        raise ArgumentError(f"{option} must be numbers with commas between them; found {text!r}") from None


def first(rows: list[dict], samples: int | None) -> list[dict]:
    if samples is not None and samples < 1:
        raise ArgumentError(f"--samples is {samples}; needs at least 1")
    return rows[:samples]
