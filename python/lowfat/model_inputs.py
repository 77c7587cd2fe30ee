"""What one model can take of what the texts became: how many tokens, and which of them it knows to be padding."""
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .data import MAX_LENGTH, classifier_pad_id
from .errors import ArgumentError

log = logging.getLogger("lowfat")


def fitting(max_length: int | None, model) -> int:
    """max_length; for None MAX_LENGTH, or what the model takes where that is less. ArgumentError for more than it takes."""
    limit = _positions(model)
    if max_length is None:
        return min(MAX_LENGTH, limit or MAX_LENGTH)
    if limit and max_length > limit:
        raise ArgumentError(f"max_length is {max_length}; {type(model).__name__} takes {limit} tokens")
    return max_length


def _positions(model) -> int | None:
    """How many tokens a model takes, None for any number.

    RoBERTa and its kin keep the rows up to padding_idx of their position table for padding: 514 rows are 512 positions."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    rows = getattr(model.config, "max_position_embeddings", None)
    return rows if rows and rows > 0 else None


@contextmanager
def padding(tokenizer, task: str, *models) -> Iterator[None]:
    """Inside, classifiers know the token that `padded` fills with: GPT-2, Llama and others classify at the last token that
    is not config.pad_token_id, and refuse batches when it is not set, as in most of their checkpoints."""
    if task != "classification":
        yield
        return
    token = classifier_pad_id(tokenizer)
    if tokenizer.pad_token_id is None:
        log.warning("the tokenizer has no pad token: texts are padded with its end token %r", tokenizer.eos_token)
    before = [model.config.pad_token_id for model in models]
    for model in models:
        model.config.pad_token_id = token
    try:
        yield
    finally:
        for model, old in zip(models, before):
            model.config.pad_token_id = old
