"""What a model is worth on data: accuracy, perplexity, or how well it finds the other half of a pair."""
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.nn.functional import cross_entropy, normalize

from .data import IGNORED, Row, examples, padded, place, slices, task_for
from .errors import ArgumentError
from .model_inputs import fitting, padding
from .pooling import pooling_of


@torch.inference_mode()
def evaluate(model, rows: Sequence[Mapping], tokenizer, *, task: str | None = None, batch_size: int = 32,
             max_length: int | None = None, on_progress=None) -> dict:
    """Numbers of one task on the rows, with the counts behind them.

    classification: accuracy. lm: nats_per_token and perplexity over every token that has one before it in its piece.
    embedding: recall_at_1 and mrr of finding text_b from text_a among all text_b of the rows; pooling, "mean" or "cls".
    on_progress(done, total, what) counts rows, pieces or texts."""
    task = task_for(model, task)
    found = judged(rows, tokenizer, task, model, max_length=max_length)
    measure = {"classification": _accuracy, "lm": _perplexity, "embedding": _retrieval}[task]
    was_training = model.training
    model.eval()
    try:
        with padding(tokenizer, task, model):
            return {"task": task, "rows": len(rows)} | measure(model, found, tokenizer, batch_size, on_progress)
    finally:
        model.train(was_training)


def judged(rows: Sequence[Mapping], tokenizer, task: str, model, *, max_length: int | None,
           label2id: Mapping[str, int] | None = None) -> list[dict]:
    """The rows as the examples that this task is measured on; ArgumentError where they lack what it needs.

    label2id: instead of the model's own."""
    if not rows:
        raise ArgumentError("no rows to evaluate on")
    for number, row in enumerate(rows, 1) if task == "embedding" else ():
        for key in ("text_b", "text_a"):
            if key not in row:
                raise ArgumentError(f'{place(row, number)} has no "{key}"; retrieval needs "text_a" and "text_b" in every '
                                    "row")
    if task == "embedding":  # without a "text" of their own
        rows = [Row({key: row[key] for key in ("text_a", "text_b")}, place(row, number))
                for number, row in enumerate(rows, 1)]
    found = examples(rows, tokenizer, task, max_length=fitting(max_length, model),
                     label2id=label2id or model.config.label2id)
    if task == "lm" and all(len(piece["input_ids"]) < 2 for piece in found):
        raise ArgumentError("the texts have fewer than two tokens; perplexity needs a token to predict")
    return found


def _accuracy(model, found, tokenizer, batch_size, on_progress) -> dict:
    correct = 0
    for batch in _batches(model, found, tokenizer, batch_size, "accuracy", on_progress):
        labels = batch.pop("labels")
        correct += (model(**batch).logits.argmax(-1) == labels).sum().item()
    return {"accuracy": correct / len(found), "correct": correct}


def _perplexity(model, found, tokenizer, batch_size, on_progress) -> dict:
    nats, tokens = 0.0, 0
    for batch in _batches(model, found, tokenizer, batch_size, "perplexity", on_progress):
        labels = batch.pop("labels")
        losses, count = next_token_losses(model(**batch).logits, labels)
        nats, tokens = nats + losses.double().sum().item(), tokens + count
    return {"nats_per_token": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700)), "tokens": tokens}


def next_token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(nats of each token after the first, fp32, 0 where ignored; how many count).    logits [b, t, v]   labels [b, t]"""
    targets = labels[:, 1:].flatten().to(logits.device)
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="none")
    return losses, int((targets != IGNORED).sum())


def _retrieval(model, found, tokenizer, batch_size, on_progress) -> dict:
    pooling = pooling_of(model)
    embedded = _embed(model, found, tokenizer, pooling, batch_size, on_progress)
    return retrieval(embedded[0::2], embedded[1::2]) | {"pooling": pooling}


def retrieval(queries: torch.Tensor, answers: torch.Tensor) -> dict:
    """recall_at_1 and mrr of row i of answers for row i of queries, by cosine. Ties count against it.    both [N, d]"""
    cosine = normalize(queries.double(), dim=-1) @ normalize(answers.double(), dim=-1).T
    rank = (cosine >= cosine.diagonal()[:, None]).sum(1).clamp(min=1)  # its own answer counts itself; NaN counts nothing
    rank = torch.where(cosine.isfinite().all(1), rank, len(queries))
    return {"recall_at_1": (rank == 1).double().mean().item(), "mrr": (1 / rank.double()).mean().item()}


@torch.inference_mode()
def embed(model, tokenizer, texts: Sequence[str], *, batch_size: int = 32, max_length: int | None = None,
          on_progress=None) -> torch.Tensor:
    """The embedding of each text, pooled from the last hidden states as the model's folder says; fp32, CPU.    [N, d]"""
    rows = [{"text": text} for text in texts]
    found = examples(rows, tokenizer, "embedding", max_length=fitting(max_length, model))
    return _embed(model, found, tokenizer, pooling_of(model), batch_size, on_progress)


def _embed(model, found: list[dict], tokenizer, pooling: str, batch_size: int, on_progress) -> torch.Tensor:
    order = sorted(range(len(found)), key=lambda index: len(found[index]["input_ids"]))  # like lengths need no padding
    was_training = model.training
    model.eval()
    try:
        shuffled = _batches(model, [found[index] for index in order], tokenizer, batch_size, "embedding", on_progress)
        states = torch.cat([pooled(model, batch, pooling).cpu() for batch in shuffled])
    finally:
        model.train(was_training)
    return torch.empty_like(states).index_copy_(0, torch.tensor(order), states)


def pooled(model, batch: Mapping[str, torch.Tensor], pooling: str) -> torch.Tensor:
    """One embedding of each text from the base model's last hidden states, in fp32; texts are padded on the right.    [b, d]

    mean: over the attention mask. cls: that of the first token."""
    states = model.base_model(**batch).last_hidden_state.float()
    if pooling == "cls":
        return states[:, 0]
    mask = batch["attention_mask"].unsqueeze(-1).float()
    return (states * mask).sum(1) / mask.sum(1)


def _batches(model, found: list[dict], tokenizer, batch_size: int, what: str, on_progress) -> Iterator[dict]:
    for number, part in enumerate(slices(found, batch_size)):
        yield padded(part, tokenizer, model.device)
        if on_progress:
            on_progress(number * batch_size + len(part), len(found), what)
