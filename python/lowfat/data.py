"""Rows of text from a file, and the tokenized batches that calibration, training and evaluation share."""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .errors import ArgumentError, FormatError

MAX_LENGTH = 128  # tokens; the default of everything that tokenizes
TASKS = ("classification", "lm", "embedding")
IGNORED = -100  # label of a token without loss, such as padding, as torch and transformers have it


class Row(dict):
    """A row that knows where it stands, like texts.jsonl:17, for whoever finds something wrong with it."""

    def __init__(self, values: Mapping, where: str):
        super().__init__(values)
        self.where = where


def place(row: Mapping, number: int) -> str:
    """Where the row with this number, from 1, is."""
    return getattr(row, "where", f"row {number}")


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a .jsonl file ({"text"} or {"text_a", "text_b"}, "label" optional), or of a .txt file with one text a line.

    FormatError names file and line; ArgumentError: no such file, unknown suffix, no rows."""
    path = Path(path)
    if not path.is_file():
        raise ArgumentError(f"{path}: no such file")
    if path.suffix not in (".jsonl", ".txt"):
        raise ArgumentError(f"{path}: unknown kind {path.suffix!r}; needs .jsonl (an object a line) or .txt (a text a line)")
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    rows.append(Row({"text": line.strip()} if path.suffix == ".txt" else _row(line, where), where))
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not rows:
        raise ArgumentError(f"{path}: no rows")
    return rows


def _row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise FormatError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    keys = ("text_a", "text_b") if isinstance(row, dict) and "text" not in row else ("text",)
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
        raise FormatError(f'{where}: needs {{"text": ...}} or {{"text_a": ..., "text_b": ...}} with strings')
    label = row.get("label")
    if label is not None and (isinstance(label, bool) or not isinstance(label, int | str)):
        raise FormatError(f"{where}: label is {label!r}; needs a whole number or a string")
    return row


def task_of(model) -> str:
    """"classification", "lm" or "embedding", from the class of a model or the architectures of its config."""
    config = getattr(model, "config", model)
    names = (getattr(config, "architectures", None) or []) if model is config else [type(model).__name__]
    for name in names:
        if "ForSequenceClassification" in name:
            return "classification"
        if "ForCausalLM" in name or "LMHead" in name:
            return "lm"
    return "embedding"


def task_for(model, task: str | None) -> str:
    """The task, or without one the model's own; ArgumentError for one that the model has no output for."""
    own = task_of(model)
    if task not in (None, *TASKS):
        raise ArgumentError(f"task is {task!r}; needs one of {', '.join(TASKS)}")
    if task not in (None, own, "embedding"):  # hidden states are in every model
        raise ArgumentError(f"task is {task!r}; {type(model).__name__} is a model for {own}")
    return task or own


def label_ids(rows: Sequence[Mapping], label2id: Mapping[str, int] | None = None) -> tuple[list[int], dict[str, int]]:
    """(label of every row as a number, the names used for it).

    Strings go through label2id where it knows them, else through the sorted names that occur (as many as label2id has).
    ArgumentError: a row without label, a number out of range, mixed kinds, names that cannot be mapped."""
    labels = [row.get("label") for row in rows]
    if None in labels:
        number = labels.index(None)
        raise ArgumentError(f'{place(rows[number], number + 1)} has no "label"; classification needs one in every row')
    names = dict(label2id or {})
    strings = {label for label in labels if isinstance(label, str)}
    if not strings:
        for number, label in enumerate(labels, 1):
            if label < 0 or (names and label >= len(names)):
                raise ArgumentError(f"{place(rows[number - 1], number)} has label {label}; the model knows 0 to "
                                    f"{len(names) - 1}")
        return labels, names
    if len(strings) < len(set(labels)):
        raise ArgumentError("label: some rows have numbers and some have strings; needs one kind")
    if not strings <= names.keys():
        unnamed = all(name.startswith("LABEL_") for name in names)  # what transformers fills in when nobody said
        if not unnamed or (names and len(names) != len(strings)):
            unknown = sorted(strings - names.keys())[:3]
            raise ArgumentError(f"label: the rows have {len(strings)} names, such as {unknown}; "
                                f"the model has {len(names)}: {sorted(names)[:5]}")
        names = {name: number for number, name in enumerate(sorted(strings))}
    return [names[label] for label in labels], names


def examples(rows: Sequence[Mapping], tokenizer, task: str, *, max_length: int = MAX_LENGTH, labels: bool = True,
             label2id: Mapping[str, int] | None = None) -> list[dict]:
    """Rows as lists of token ids, not padded yet: input_ids, token_type_ids where the tokenizer has them, labels.

    Classification: one per row. Embedding: one per text, text_b after its text_a. lm: the texts joined by the end token and
    cut in pieces of max_length, so that no token is dropped or seen twice. ArgumentError names a row without tokens."""
    if task not in TASKS:
        raise ArgumentError(f"task is {task!r}; needs one of {', '.join(TASKS)}")
    if max_length < 2:
        raise ArgumentError(f"max_length is {max_length}; needs at least 2")
    if not rows:
        raise ArgumentError("no rows of text")
    if task == "lm":
        return _pieces(rows, tokenizer, max_length, labels)
    if task == "embedding":
        places = [(number, key) for number, row in enumerate(rows, 1) for key in ("text", "text_a", "text_b") if key in row]
        found = _tokens(tokenizer, [rows[number - 1][key] for number, key in places], None, max_length)
        return _filled(found, [f"{place(rows[number - 1], number)}: {key}" for number, key in places])
    classifier_pad_id(tokenizer)
    if len({"text" in row for row in rows}) > 1:
        raise ArgumentError('some rows have "text" and some have "text_a" and "text_b"; needs one kind')
    first, second = ("text", None) if "text" in rows[0] else ("text_a", "text_b")
    found = _tokens(tokenizer, [row[first] for row in rows], second and [row[second] for row in rows], max_length)
    _filled(found, [place(row, number) for number, row in enumerate(rows, 1)])
    if labels:
        for example, label in zip(found, label_ids(rows, label2id)[0]):
            example["labels"] = label
    return found


def _tokens(tokenizer, texts: list[str], pairs: list[str] | None, max_length: int) -> list[dict]:
    fields = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    kept = [name for name in ("input_ids", "token_type_ids") if name in fields]
    return [dict(zip(kept, values)) for values in zip(*(fields[name] for name in kept))]


def _filled(found: list[dict], places: list[str]) -> list[dict]:
    """What is found. Where a tokenizer adds no token of its own, an empty text has none, and its mean would be NaN."""
    empty = next((place for example, place in zip(found, places) if not example["input_ids"]), None)
    if empty:
        raise ArgumentError(f"{empty} has no tokens; leave out texts that are empty")
    return found


def _pieces(rows, tokenizer, max_length: int, labels: bool) -> list[dict]:
    if any("text" not in row for row in rows):
        raise ArgumentError('lm needs rows with "text"')
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = []
    for text in tokenizer([row["text"] for row in rows], add_special_tokens=False, verbose=False)["input_ids"]:
        ids += text + end
    if not ids:
        raise ArgumentError("the texts have no tokens; leave out texts that are empty")
    cut = [ids[start:start + max_length] for start in range(0, len(ids), max_length)]
    return [{"input_ids": piece, "labels": piece} if labels else {"input_ids": piece} for piece in cut]


def padded(found: Sequence[Mapping], tokenizer, device=None) -> dict[str, torch.Tensor]:
    """One batch, padded on the right: input_ids, attention_mask [b, t], labels [b] or, for lm, [b, t].

    lm labels repeat input_ids, not shifted: the models and our losses shift them by themselves."""
    length = max(len(example["input_ids"]) for example in found)
    fill = {"input_ids": _pad_id(tokenizer) or 0, "labels": IGNORED}  # 0 where there is none: masked anyway

    def column(name):
        values = [example[name] for example in found]
        if isinstance(values[0], int):
            return torch.tensor(values, device=device)
        return torch.tensor([value + [fill.get(name, 0)] * (length - len(value)) for value in values], device=device)

    lengths = torch.tensor([len(example["input_ids"]) for example in found])
    mask = (torch.arange(length) < lengths[:, None]).long().to(device)
    return {"attention_mask": mask} | {name: column(name) for name in found[0]}


def classifier_pad_id(tokenizer) -> int:
    """The token that fills up texts, for models that look for it. ArgumentError: the tokenizer has none that could."""
    if (found := _pad_id(tokenizer)) is None:
        raise ArgumentError("tokenizer: has neither a pad nor an end token, and batches need one; set tokenizer.pad_token")
    return found


def _pad_id(tokenizer) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def batches(rows: Sequence[Mapping], tokenizer, task: str, *, batch_size: int = 32, max_length: int = MAX_LENGTH,
            labels: bool = True, label2id: Mapping[str, int] | None = None, device=None) -> list[dict[str, torch.Tensor]]:
    """Tokenized, padded batches of the rows in their order, ready for model(**batch)."""
    found = examples(rows, tokenizer, task, max_length=max_length, labels=labels, label2id=label2id)
    return [padded(part, tokenizer, device) for part in slices(found, batch_size)]


def slices(items: Sequence, batch_size: int) -> list[Sequence]:
    """Slices of at most batch_size items, in order."""
    if batch_size < 1:
        raise ArgumentError(f"batch_size is {batch_size}; needs at least 1")
    return [items[start:start + batch_size] for start in range(0, len(items), batch_size)]
