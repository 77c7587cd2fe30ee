"""The linear layers of real models, by the model's name, and the rank each gets.   k in   n out   r rank"""
import re
from collections.abc import Callable
from typing import NamedTuple

from ..errors import ArgumentError

# model -> (which layers of a block have this shape, k, n)
MODELS = {
    "llama-8b": [("query, output", 4096, 4096), ("key, value", 4096, 1024), ("gate, up", 4096, 14336),
                 ("down", 14336, 4096)],
    "bert-base": [("query, key, value, output", 768, 768), ("intermediate", 768, 3072), ("output", 3072, 768)],
    "minilm": [("query, key, value, output", 384, 384), ("intermediate", 384, 1536), ("output", 1536, 384)],
}


class Layer(NamedTuple):
    model: str  # or, for sizes given as such, what was given
    name: str
    k: int
    n: int
    r: int


def rank_for(k: int, n: int, ratio: float) -> int:
    return max(8, int(ratio * k * n / (k + n)) // 8 * 8)


def layers(names: str, *, ratio: float = 0.5, rank: int | None = None, blocks: int = 1,
           rank_for: Callable[[int, int, float], int] = rank_for,
           most: Callable[[int, int], int] | None = None) -> list[Layer]:
    """The layers of "llama-8b,minilm", or of sizes "4096:14336:1024" (k:n:r). The rank keeps `ratio` of a weight's
    parameters, in multiples of 8, if none is given; in blocks it is that of a block, and they share those parameters.
    rank_for and most (k, n): what r is for ops that are no products of low rank, and how large it can be.

    Raises ArgumentError for an unknown name, a ratio outside (0, 1) or a rank that no such layer has."""
    if not 0 < ratio < 1:
        raise ArgumentError(f"ratio must be between 0 and 1; found {ratio}")
    found = []
    for name in names.split(","):
        if sizes := re.fullmatch(r"(\d+):(\d+):(\d+)", name):
            found.append(Layer(name, "", *(int(size) for size in sizes.groups())))
        elif name in MODELS:
            found += [Layer(name, kind, k, n, max(1, rank_for(k, n, ratio) // blocks) if rank is None else rank)
                      for kind, k, n in MODELS[name]]
        else:
            raise ArgumentError(f"shapes: {name!r} is neither one of {', '.join(MODELS)} nor sizes k:n:r like 4096:4096:512")
    for _, _, k, n, r in found:
        largest = most(k, n) if most else min(-(-k // blocks), -(-n // blocks))
        if not 1 <= r <= largest:
            raise ArgumentError(f"rank must be between 1 and {largest} for {k} -> {n}; found {r}")
    return found
