"""Which parts of many layers stay under one budget of parameters."""
from collections.abc import Mapping, Sequence

from torch import nn

from ..errors import ArgumentError
from ..shrink import Units, check_dense, dense_size, removable


def best(values: Mapping[str, Sequence[float]], cost: Mapping[str, int], budget: int,
         most: Mapping[str, int] | None = None) -> dict[str, list[int]]:
    """The numbers of the parts that stay of each layer, in order: those of all layers with the largest values, as many as
    the budget pays for, of each layer one at least and, where given, `most` at most.

    cost: of one part of a layer. Of equal values, the first parts of all layers come before any second."""
    kept = {name: [max(range(len(found)), key=found.__getitem__)] for name, found in values.items()}
    left = budget - sum(cost[name] for name in values)
    others = sorted((-value, index, name) for name, found in values.items() for index, value in enumerate(found)
                    if index != kept[name][0])
    for _, index, name in others:
        if cost[name] <= left and (most is None or len(kept[name]) < most[name]):
            kept[name].append(index)
            left -= cost[name]
    return {name: sorted(found) for name, found in kept.items()}


def even(values: Mapping[str, Sequence[float]], counts: Mapping[str, int]) -> dict[str, list[int]]:
    """So many parts of each layer, one at least: those with its largest values."""
    kept = {}
    for name, found in values.items():
        order = sorted(range(len(found)), key=lambda index: (-found[index], index))
        kept[name] = sorted(order[:max(1, counts[name])])
    return kept


def units_of(model: nn.Module, ratio: float, distill: Mapping | None) -> dict[str, Units]:
    """The units of a model that is to lose some; ArgumentError where there are none, where one of each block is more than
    the ratio, and where the teacher's heads would have no counterparts; UnsupportedError where a layer is not dense."""
    if distill and "attention" in distill:
        raise ArgumentError("distill: attention compares every head with the teacher's, and heads are taken out here")
    units = removable(model)
    if not units:
        raise ArgumentError(f"{type(model).__name__} has no block whose heads or neurons are known; BERT, RoBERTa, ELECTRA, "
                            "Llama, Mistral, Qwen2, Qwen3 and GPT-2 have")
    for one in units.values():
        check_dense(model, one)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise ArgumentError(f"ratio must be between 0 and 1, both excluded; found {ratio!r}")
    least = sum(one.cost for one in units.values()) / dense_size(units)
    if least > ratio:
        raise ArgumentError(f"ratio is {ratio}; one head or neuron of every block is {least:.3g} already")
    return units
