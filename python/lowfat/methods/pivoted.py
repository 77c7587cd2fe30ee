"""Low rank stored as rows of the weight (PIFA, 2501.19090): what a method's factors become with form="pivoted".

r (n + k - r) numbers and r indices, so that the same budget has room for a larger rank, and every rank below min(n, k) saves
something."""
from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor

from ..errors import ArgumentError, NumericsError
from ..structures import LowRankPivoted, Structure

FORMS = ("factors", "pivoted")


def in_form(factorize: Callable) -> Callable:
    """The method with form as an argument. A weight of a lower rank than asked for keeps its factors; an event says so."""
    @wraps(factorize)
    def made(weight: Tensor, bias: Tensor | None, stats=None, *, form: str = "factors",
             **arguments) -> tuple[Structure, list[str]]:
        layer, events = factorize(weight, bias, stats, **arguments)
        if form == "factors":
            return layer, events
        try:
            return LowRankPivoted.from_factors(layer.v, layer.u, layer.bias), events
        except NumericsError as error:
            return layer, [*events, f"not pivoted: {error}"]

    return made


def without_form(function: Callable) -> Callable:
    """A function that the form means nothing to."""
    @wraps(function)
    def called(*inputs, form: str = "factors", **arguments):
        return function(*inputs, **arguments)

    return called


def of_factors(shared_size: Callable) -> Callable:
    """The size of layers that share v, which pivots of their own do not let them."""
    @wraps(shared_size)
    def asked(k: int, rows: Sequence[int], *, form: str = "factors", **arguments) -> tuple[int, int]:
        if form != "factors":
            raise ArgumentError("share: layers whose low rank is pivoted have rows of their own, and no factor to share")
        return shared_size(k, rows, **arguments)

    return asked


def count(k: int, n: int, *, rank: int, form: str = "factors", **arguments) -> tuple[int, int]:
    """(parameters, bytes of indices)"""
    if form == "factors":
        return rank * (k + n), 0
    return rank * (k + n - rank), rank * torch.int64.itemsize
