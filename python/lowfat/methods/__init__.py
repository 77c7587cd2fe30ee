"""Ways to turn a dense weight and what a layer saw into factors: one file per algorithm.

factorize(weight, bias, stats, *, rank, **arguments) -> (LowRank, events)   in the weight's dtype
losses(weight, stats, **arguments) -> [min(n, k) + 1]   what is lost, in the method's own squared metric, at each rank
"""
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import ArgumentError
from . import fwsvd, svd, whitened


class Method(NamedTuple):
    factorize: Callable
    losses: Callable
    needs: frozenset[str]  # what of Stats it reads: "gram", "fisher"
    arguments: dict[str, tuple]  # the values that each argument may have, its default first
    require: Callable = lambda stats, **arguments: None  # ArgumentError for statistics that lack what it reads


METHODS = {
    "svd": Method(svd.factorize, svd.losses, frozenset(), {}),
    "fwsvd": Method(fwsvd.factorize, fwsvd.losses, frozenset({"fisher"}),
                    {"side": ("in", "out", "both"), "exact": (False, True)}, fwsvd.require),
    "whitened": Method(whitened.factorize, whitened.losses, frozenset({"gram"}),
                       {"solver": ("auto", "cholesky", "eigen", "output")}, whitened.require),
}


def check_arguments(method: Any, arguments: dict[str, Any]) -> Method:
    """The method of this name; ArgumentError if there is none, or for an argument or value that it does not have."""
    if not isinstance(method, str) or method not in METHODS:
        raise ArgumentError(f"method must be one of {', '.join(METHODS)}; found {method!r}")
    allowed = METHODS[method].arguments
    for name, value in arguments.items():
        if name not in allowed:
            raise ArgumentError(f"{method} has no argument {name!r}; it has {', '.join(allowed) or 'none'}")
        if not any(type(value) is type(known) and value == known for known in allowed[name]):
            raise ArgumentError(f"{method}: {name} must be one of {', '.join(map(repr, allowed[name]))}; found {value!r}")
    return METHODS[method]
