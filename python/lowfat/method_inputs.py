"""What a method wants before it can start: options that fit the model, and statistics of the texts it reads."""
from collections.abc import Mapping, Sequence

from .allocate import per_matrix
from .calibrate import calibrate
from .data import batches
from .errors import ArgumentError
from .factorize import check_weights
from .layers import factorizable
from .methods import check_arguments
from .model_inputs import padding
from .plan import POLICIES, budget_of, ladders_of, plan
from .sharing import grouped
from .stats import Calibration


def needs_of(method: str, arguments: dict, policy: str) -> frozenset[str]:
    """What of Stats the method reads; ArgumentError for a method, argument or policy that there is not."""
    needs = check_arguments(method, arguments).needs
    if policy not in POLICIES:
        raise ArgumentError(f"policy must be one of {', '.join(POLICIES)}; found {policy!r}")
    return needs


def check_fit(model, *, method: str, arguments: dict, ratio: float, layers: Sequence[str] | None,
              share: int | Sequence[Sequence[str]] | None = None) -> None:
    """Raises what is wrong with ratio, patterns, sizes or weights, without the work of a plan."""
    plan(model, method="svd", ratio=ratio, layers=layers)
    chosen = factorizable(model, layers)
    ladders = ladders_of(check_arguments(method, arguments), grouped(chosen, share, method), arguments)
    per_matrix(ladders, budget_of(ladders, ratio))
    check_weights(chosen)


def spread(items: Sequence, most: int) -> list:
    """At most so many of them, evenly spread: files are often sorted."""
    return [items[index * len(items) // most] for index in range(most)] if len(items) > most else list(items)


def check_task(needs: frozenset[str], task: str) -> None:
    if "fisher" in needs and task == "embedding":
        raise ArgumentError("Fisher information needs a task with a loss, classification or lm; this model makes embeddings")


def texts_for(needs: frozenset[str], model, tokenizer, rows: Sequence[Mapping], task: str, *, batch_size: int,
              max_length: int) -> list[dict]:
    """The batches to calibrate on, with labels where the method needs them."""
    check_task(needs, task)
    return batches(rows, tokenizer, task, batch_size=batch_size, max_length=max_length,
                   labels="fisher" in needs, label2id=model.config.label2id, device=model.device)


def stats_for(needs: frozenset[str], arguments: Mapping, model, tokenizer, data: list[dict], task: str,
              **options) -> Calibration:
    """calibrate() on what texts_for() returned, for what the method needs and no more."""
    kind = "kronecker" if "gram_out" in needs else "elements" if arguments.get("exact") else "sums"
    with padding(tokenizer, task, model):
        return calibrate(model, data, fisher=kind if "fisher" in needs else False, **options)
