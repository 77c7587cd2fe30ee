"""Ways to turn a dense weight and what a layer saw into factors: one file per algorithm.

factorize(weight, bias, stats, *, rank, **arguments) -> (Structure, events)   in the weight's dtype
losses(weight, stats, **arguments) -> [most + 1]   what is lost, in the method's own squared metric, at each rank
size(k, n, **arguments) -> (unit, most)   parameters that one more rank costs, and the largest rank
count(k, n, *, rank, **arguments) -> (parameters, bytes of indices)   where they are not (rank * unit, 0)
shared_size(k, [n, ...], **arguments)   size() of layers that hold one first factor, where the structure has such a factor

The rank is whatever grows: of low-rank factors theirs, of a dictionary its atoms, of N:M pruning the number kept of a group.
"""
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import ArgumentError, LowfatError
from ..structures import Structure
from . import (compot, cospadi, dictionary, dsformer, fwsvd, kfac, monarch, oats, pivoted, prune, rocket, sparsity_aware,
               svd, whitened)


def low_rank_size(k: int, n: int, **arguments) -> tuple[int, int]:
    return k + n, min(k, n)


def low_rank_shared_size(k: int, rows: Sequence[int], **arguments) -> tuple[int, int]:
    return k + sum(rows), min(k, *rows)  # a low-rank layer has no rank above its own sizes


def as_one(size: Callable) -> Callable:
    return lambda k, rows, **arguments: size(k, sum(rows), **arguments)


class Method(NamedTuple):
    factorize: Callable
    losses: Callable
    needs: frozenset[str] | Callable[..., frozenset[str]]  # of Stats: "gram", "fisher", "gram_out"; or by arguments
    arguments: dict[str, tuple | Callable]  # the values that each may have, its default first; or what raises for others
    require: Callable = lambda stats, **arguments: None  # ArgumentError for statistics that lack what it reads
    size: Callable[..., tuple[float, int]] = low_rank_size
    count: Callable[..., tuple[int, int]] | None = None
    refactorize: Callable[[Structure, Tensor], Structure] | None = None  # better factors of a weight, from those of a layer
    shared_size: Callable[..., tuple[float, int]] | None = None  # None: its layers have no factor that they could share

    def follow(self, layer: Structure, weight: Tensor, stats: Any, **arguments) -> Structure:
        """The layer's factors made anew for its weight [n, k] as it is by now: from those that it has where the method can,
        else from nothing."""
        return self.refactorize(layer, weight) if self.refactorize else self.factorize(weight, None, stats, **arguments)[0]

    def group_size(self, k: int, rows: Sequence[int], **arguments) -> tuple[float, int]:
        """size() of layers of so many outputs as one weight; of one layer its own."""
        return self.size(k, *rows, **arguments) if len(rows) == 1 else self.shared_size(k, rows, **arguments)

    def stored(self, k: int, n: int, *, rank: int, **arguments) -> tuple[int, int]:
        """(parameters, bytes of indices beside them)"""
        return self.count(k, n, rank=rank, **arguments) if self.count else (rank * self.size(k, n, **arguments)[0], 0)


def low_rank(factorize: Callable, losses: Callable, needs: frozenset[str], arguments: dict, require: Callable | None = None,
             shared_size: Callable | None = None) -> Method:
    """A method that makes a LowRank, which may be stored as rows of the weight instead: form="pivoted"."""
    return Method(pivoted.in_form(factorize), pivoted.without_form(losses), needs, arguments | {"form": pivoted.FORMS},
                  pivoted.without_form(require) if require else Method._field_defaults["require"], count=pivoted.count,
                  shared_size=shared_size and pivoted.of_factors(shared_size))


METHODS = {
    "svd": low_rank(svd.factorize, svd.losses, frozenset(), {}, shared_size=low_rank_shared_size),
    "fwsvd": low_rank(fwsvd.factorize, fwsvd.losses, frozenset({"fisher"}),
                      {"side": ("in", "out", "both"), "exact": (False, True)}, fwsvd.require),
    "whitened": low_rank(whitened.factorize, whitened.losses, frozenset({"gram"}),
                         {"solver": ("auto", "cholesky", "eigen", "output")}, whitened.require, low_rank_shared_size),
    "kfac": low_rank(kfac.factorize, kfac.losses, frozenset({"gram", "fisher", "gram_out"}), kfac.ARGUMENTS, kfac.require,
                     low_rank_shared_size),
    "monarch": Method(monarch.factorize, monarch.losses, monarch.needs, monarch.ARGUMENTS, monarch.require, monarch.size,
                      monarch.count),
    "block_low_rank": Method(monarch.factorize_blockwise, monarch.losses_blockwise, monarch.needs, monarch.ARGUMENTS,
                             monarch.require, monarch.size, monarch.count),
    "magnitude": Method(prune.magnitude, prune.magnitude_losses, frozenset(), prune.ARGUMENTS, size=prune.size,
                        count=prune.count),
    "wanda": Method(prune.wanda, prune.wanda_losses, frozenset({"gram"}), prune.ARGUMENTS, prune.require, prune.size,
                    prune.count),
    "sparsegpt": Method(prune.sparsegpt, prune.sparsegpt_losses, frozenset({"gram"}), prune.ARGUMENTS, prune.require,
                        prune.size, prune.count),
    "rocket": Method(rocket.factorize, rocket.losses, frozenset({"gram"}), dictionary.ARGUMENTS, dictionary.require,
                     dictionary.size, dictionary.count, shared_size=as_one(dictionary.size)),
    "compot": Method(compot.factorize, compot.losses, frozenset({"gram"}), dictionary.ARGUMENTS, dictionary.require,
                     dictionary.size, dictionary.count, shared_size=as_one(dictionary.size)),
    "cospadi": Method(cospadi.factorize, cospadi.losses, frozenset({"gram"}), cospadi.ARGUMENTS, dictionary.require,
                      cospadi.size, dictionary.count, shared_size=as_one(cospadi.size)),
    "dsformer": Method(dsformer.factorize, dsformer.losses, frozenset(), dsformer.ARGUMENTS, size=dsformer.size,
                       count=dsformer.count, refactorize=dsformer.refactorized),
    "sparsity_aware": Method(sparsity_aware.factorize, sparsity_aware.losses, frozenset({"fisher"}), sparsity_aware.ARGUMENTS,
                             sparsity_aware.require),
    "oats": Method(oats.factorize, oats.losses, frozenset({"gram"}), oats.ARGUMENTS, oats.require, oats.size, oats.count),
}


def check_arguments(method: Any, arguments: dict[str, Any]) -> Method:
    """The method of this name, with what it needs for these arguments; ArgumentError if there is none, or for an argument or
    value that it does not have."""
    if not isinstance(method, str) or method not in METHODS:
        raise ArgumentError(f"method must be one of {', '.join(METHODS)}; found {method!r}")
    allowed = METHODS[method].arguments
    for name, value in arguments.items():
        if name not in allowed:
            raise ArgumentError(f"{method} has no argument {name!r}; it has {', '.join(allowed) or 'none'}")
        if callable(allowed[name]):
            try:
                allowed[name](value)
            except LowfatError as error:
                raise ArgumentError(f"{method}: {error}") from error
        elif not any(type(value) is type(known) and value == known for known in allowed[name]):
            raise ArgumentError(f"{method}: {name} must be one of {', '.join(map(repr, allowed[name]))}; found {value!r}")
    found = METHODS[method]
    return found._replace(needs=found.needs(**arguments)) if callable(found.needs) else found


def named(what: str, settings: Sequence[str]) -> dict[str, Any]:
    """{"blocks": 8} of ["blocks=8"]: values are JSON, or else words. ArgumentError says `what` needs them like this."""
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ArgumentError(f"{what} needs NAME=VALUE like blocks=8; found {setting!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found
