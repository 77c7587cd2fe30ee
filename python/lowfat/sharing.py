"""Which layers share one factor: what was asked for, and whether the groups of a plan go together.

The layers of a group are factorized as one weight, one below the other (Basis Sharing, 2410.03765; the groups of CoSpaDi,
2509.22075): each keeps the rows that are its own, and the first factor is one parameter of them all."""
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import ArgumentError, DeviceError, DtypeError, ShapeError
from .layers import sizes
from .methods import METHODS, check_arguments


def grouped(chosen: Mapping[str, nn.Module], share: int | Sequence[Sequence[str]] | None,
            method: str) -> list[dict[str, nn.Module]]:
    """All layers in groups, in the order of the model; a layer that shares with no other is a group of one.

    share: so many neighbours of a kind (the same name but for the number of the block, the same sizes and dtype), where
    the rest of a kind is a smaller group; or lists of names. ArgumentError for what is neither, for a number where no two
    layers are of a kind, for a name that is not chosen or twice there, and for a method whose layers share nothing; ShapeError, DtypeError or DeviceError for layers
    that differ."""
    home = {name: name for name in chosen}
    for names in _asked(chosen, share):
        home |= dict.fromkeys(names, names[0])
    groups: dict[str, dict[str, nn.Module]] = {}
    for name, module in chosen.items():
        groups.setdefault(home[name], {})[name] = module
    for group in groups.values():
        check_group(group, method)
    return list(groups.values())


def check_group(group: Mapping[str, nn.Module], method: str | None) -> None:
    """Raises what is in the way of layers that share a factor; nothing is in that of one alone."""
    (first, its), *others = group.items()
    if others:
        _check_method(method)
    for name, module in others:
        (k, _), (found, _) = sizes(its), sizes(module)
        if found != k:
            raise ShapeError(f"share: {first} has {k} inputs and {name} {found}; layers that share a factor need as many")
        if module.weight.dtype != its.weight.dtype:
            raise DtypeError(f"share: {first} has {its.weight.dtype} and {name} {module.weight.dtype}; needs one dtype")
        if module.weight.device != its.weight.device:
            raise DeviceError(f"share: {first} is on {its.weight.device} and {name} on {module.weight.device}; "
                              f"needs one device")


def groups_of(plan: Mapping) -> list[tuple[str, ...]]:
    """Names of the layers that a plan makes factors of together, alone those without a group.

    ArgumentError or ShapeError names two layers whose entries do not go together."""
    groups = {}
    for name, choice in plan.items():
        group = tuple(choice.group) or (name,)
        groups[group] = None
        if name not in group or len(set(group)) < len(group):
            raise ArgumentError(f"{name}: its group must name it and others once each; found {', '.join(group)}")
        for other in group:
            if other != name:
                _check_pair(name, choice, other, plan.get(other))
    return list(groups)


def size_of(choices: Sequence) -> tuple[float, int]:
    """(parameters that one more rank costs, the largest rank) of the layers of a group together, or of one."""
    arguments = {name: value for name, value in choices[0].arguments.items() if name != "rank"}
    method = check_arguments(choices[0].method, arguments)
    if len(choices) > 1:
        _check_method(choices[0].method)
    return method.group_size(choices[0].in_features, [choice.out_features for choice in choices], **arguments)


def joined(weights: Sequence[Tensor]) -> Tensor:
    """The weights [n, k] of a group, one below the other; of one layer the weight itself."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _asked(chosen: Mapping[str, nn.Module], share) -> list[list[str]]:
    if share is None:
        return []
    if isinstance(share, int) and not isinstance(share, bool) and share > 0:
        kinds = _kinds(chosen)
        if share > 1 and all(len(names) == 1 for names in kinds):
            raise ArgumentError(f"share is {share}: no two layers have the same sizes and, but for one number, the same name; "
                                "lists of names say which ones share")
        return [names[at:at + share] for names in kinds for at in range(0, len(names), share)]
    if not isinstance(share, (list, tuple)) or not all(_is_names(names) for names in share):
        raise ArgumentError(f"share must be how many layers share a factor, at least 1, or lists of their names; "
                            f"found {share!r}")
    seen = set()
    for name in (name for names in share for name in names):
        if name not in chosen:
            raise ArgumentError(f"share: {name} is not among the layers to factorize")
        if name in seen:
            raise ArgumentError(f"share: {name} is there twice; a layer shares in one group")
        seen.add(name)
    return [list(names) for names in share]


def _kinds(chosen: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names of layers of the same sizes that differ in one number: the first of those in their names by which any differ,
    which is that of the block, also where others stand around it (a list of modules, stages, experts)."""
    kinds: dict[tuple, list[str]] = {}
    for place in range(max((len(_numbers(name)) for name in chosen), default=0)):
        kinds = {}
        for name, module in chosen.items():
            numbers = _numbers(name)
            start, end = numbers[place] if place < len(numbers) else (0, 0)
            kinds.setdefault((name[:start], name[end:], *sizes(module), module.weight.dtype), []).append(name)
        if len(kinds) < len(chosen):
            return list(kinds.values())
    return [[name] for name in chosen]


def _numbers(name: str) -> list[tuple[int, int]]:
    """Where the numbers of a name are that stand for themselves between dots."""
    return [found.span() for found in re.finditer(r"(?<![^.])\d+(?![^.])", name)]


def _is_names(names) -> bool:
    return isinstance(names, (list, tuple)) and bool(names) and all(isinstance(name, str) for name in names)


def _check_method(method: str | None) -> None:
    if METHODS[method].shared_size is None:
        able = ", ".join(name for name, known in METHODS.items() if known.shared_size)
        raise ArgumentError(f"share: layers cannot share a factor by {method}; they can by {able}")


def _check_pair(name: str, choice, other: str, found) -> None:
    """Two entries of a plan, of which the first says that it shares with the other."""
    if found is None:
        raise ArgumentError(f"{name} shares a factor with {other}, which is not in the plan")
    if tuple(found.group) != tuple(choice.group):
        raise ArgumentError(f"{name} shares a factor with {other}, which is in another group: "
                            f"{', '.join(found.group) or 'none'}")
    if None in (choice.method, found.method):
        dense = name if choice.method is None else other
        raise ArgumentError(f"{name} shares a factor with {other}, and {dense} stays dense")
    if found.in_features != choice.in_features:
        raise ShapeError(f"{name} shares a factor with {other}, and has {choice.in_features} inputs where that has "
                         f"{found.in_features}")
    if (found.method, found.arguments) != (choice.method, choice.arguments):
        raise ArgumentError(f"{name} shares a factor with {other}, and has {choice.method} {choice.arguments} where that "
                            f"has {found.method} {found.arguments}")
