"""The tasks that experiments run on: docstrings, derived ones from a folder, the papers' own through `datasets`."""
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from ..data import read_rows
from ..docstrings import MODULES, docstring_pairs
from ..errors import ArgumentError


@dataclass(frozen=True)
class Kind:
    """How a task is run: the settings that every recipe shares on it."""
    task: str  # classification or lm
    max_length: int  # tokens
    train_rows: int | None = None  # None: all
    test_rows: int | None = None
    teacher_steps: int = 0  # two epochs of the train rows; 0: the recipes start from nothing
    texts: tuple[str, ...] = ()  # columns of a dataset on the hub
    test: str = "validation"  # its split that has labels and is not trained on


BUILT_IN = {"modules": Kind("classification", 64, teacher_steps=120)}  # which module's docstring is it?
DERIVED = {  # by bench/tasks.py of the repository
    "sections": Kind("classification", 32, 16384, 2000, 1024),
    "pairs": Kind("classification", 72, 10240, 1536, 640),
    "lm": Kind("lm", 256),
}
GLUE = {
    "glue/sst2": Kind("classification", 64, 16384, None, 1024, ("sentence",)),
    "glue/cola": Kind("classification", 64, None, None, 536, ("sentence",)),
    "glue/mrpc": Kind("classification", 128, None, None, 230, ("sentence1", "sentence2")),
    "glue/rte": Kind("classification", 256, None, None, 156, ("sentence1", "sentence2")),
    "glue/qqp": Kind("classification", 128, 16384, 2000, 1024, ("question1", "question2")),
    "glue/qnli": Kind("classification", 128, 16384, 2000, 1024, ("question", "sentence")),
    "glue/mnli": Kind("classification", 128, 16384, 2000, 1024, ("premise", "hypothesis"), "validation_matched"),
}
TEXTS = {"c4": Kind("lm", 256, 20_000, 400, texts=("text",))}
TASKS = BUILT_IN | DERIVED | GLUE | TEXTS
QUICK_ROWS, QUICK_TEACHER_STEPS = {"train_rows": 4096, "test_rows": 512}, 192


@dataclass(frozen=True)
class Data:
    """A task with its rows."""
    name: str
    kind: Kind
    train: Sequence[Mapping]
    test: Sequence[Mapping]
    labels: list[str] | None = None
    tokenizer: Path | None = None  # of a task that starts from nothing


def kind_of(name: str, quick: bool) -> Kind:
    """ArgumentError, with what there is, for a name that is no task's."""
    if name not in TASKS:
        raise ArgumentError(f"task must be one of {', '.join(TASKS)}; found {name!r}")
    kind = TASKS[name]
    if not quick:
        return kind
    rows = {name: min(most, getattr(kind, name) or most) for name, most in QUICK_ROWS.items()}
    return replace(kind, **rows, teacher_steps=min(kind.teacher_steps, QUICK_TEACHER_STEPS))


def open_task(name: str, folder: Path, quick: bool = False) -> Data:
    """The rows of a task: of docstrings, from folder/NAME where it was derived, else from the hub.

    ArgumentError where the one is missing, or the package or network for the other."""
    kind = kind_of(name, quick)
    read = _docstrings if name in BUILT_IN else _derived if name in DERIVED else _downloaded
    train, test, labels, tokenizer = read(name, kind, folder)
    return Data(name, kind, train[:kind.train_rows], test[:kind.test_rows], labels, tokenizer)


def _docstrings(name: str, kind: Kind, folder: Path):
    """Three in four docstrings to train on. A module with fewer than 40 is left out."""
    modules = " ".join(MODULES.values()).split()
    found = [(pair, max((module for module in modules if pair.name.startswith(f"{module}.")), key=len))
             for source in MODULES for pair in docstring_pairs(source)]
    counts = Counter(module for _, module in found)
    labels = sorted(module for module, count in counts.items() if count >= 40)
    rows = [{"text": f"{pair.first} {pair.rest}", "label": labels.index(module)} for pair, module in found
            if module in labels]
    return [row for number, row in enumerate(rows) if number % 4], rows[::4], labels, None


def _derived(name: str, kind: Kind, folder: Path):
    place = Path(folder) / name
    if not (place / "train.jsonl").is_file():
        raise ArgumentError(f"{place}: there is no task {name}; derive it with `python bench/tasks.py` of the repository, "
                            f"or take one of {', '.join([*BUILT_IN, *GLUE])}")
    train, test = (read_rows(place / f"{split}.jsonl") for split in ("train", "test"))
    labels = json.loads((place / "labels.json").read_text()) if kind.task == "classification" else None
    return train, test, labels, place if (place / "tokenizer.json").is_file() else None


def _downloaded(name: str, kind: Kind, folder: Path):
    try:
        import datasets
    except ImportError as error:
        raise ArgumentError(f"{name} comes from the hub; needs the package datasets (pip install datasets)") from error
    where = ("allenai/c4", "en") if name == "c4" else ("nyu-mll/glue", name.removeprefix("glue/"))
    keys = ("text",) if len(kind.texts) == 1 else ("text_a", "text_b")
    try:  # streamed: of C4 nobody wants all
        found = [datasets.load_dataset(*where, split=split, streaming=True) for split in ("train", kind.test)]
        train, test = ([dict(zip(keys, (row[text] for text in kind.texts)), **_label(kind, row))
                        for row in islice(part, rows)] for part, rows in zip(found, (kind.train_rows, kind.test_rows)))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{name}: cannot be downloaded: {str(error).splitlines()[0]}") from error
    return train, test, list(found[0].features["label"].names) if kind.task == "classification" else None, None


def _label(kind: Kind, row: Mapping) -> dict:
    return {"label": row["label"]} if kind.task == "classification" else {}
