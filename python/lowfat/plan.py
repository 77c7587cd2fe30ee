"""Which layer gets which method with which rank, so that all of them together keep `ratio` of their parameters."""
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import nn

from .allocate import Ladder, allocated, knapsack, per_matrix, uniform_rank
from .errors import ArgumentError, FormatError, LowfatError
from .layers import dense_weight, factorizable, sizes
from .methods import METHODS, Method, check_arguments
from .sharing import grouped, groups_of, joined, size_of
from .stats import merged
from .storage import write_json
from .strict_json import read_json

POLICIES = ("per_matrix", "uniform_rank", "allocated", "knapsack")
FORMAT = 1
_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Choice:
    """What becomes of one layer; method None leaves it dense, for the reason given."""
    method: str | None
    arguments: dict[str, Any]  # of the method, "rank" among them
    in_features: int
    out_features: int
    reason: str = ""
    dtype: str = "float32"
    group: tuple[str, ...] = ()  # names of the layers that share the first factor, its own among them; alone, none

    @property
    def dense_parameters(self) -> int:
        return self.in_features * self.out_features

    @property
    def parameters(self) -> int:
        """Of the layer by itself, a shared factor included."""
        if self.method is None:
            return self.dense_parameters
        return METHODS[self.method].stored(self.in_features, self.out_features, **self.arguments)[0]

    @property
    def shared_parameters(self) -> int:
        """Those that the group has once: what is stored of a weight without rows."""
        is_shared = self.group and self.method is not None
        return METHODS[self.method].stored(self.in_features, 0, **self.arguments)[0] if is_shared else 0

    @property
    def index_bytes(self) -> int:
        """Of masks and positions, stored beside the parameters."""
        if self.method is None:
            return 0
        return METHODS[self.method].stored(self.in_features, self.out_features, **self.arguments)[1]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; of a layer alone without a group."""
        return {name: value for name, value in asdict(self).items() if name != "group" or value}


class Plan(dict[str, Choice]):
    """{layer name: Choice}, with the ratio and the policy it was made for."""

    def __init__(self, choices: Mapping[str, Choice], *, ratio: float, policy: str):
        super().__init__(choices)
        self.ratio, self.policy = ratio, policy

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary for each layer, for tables: parameters and bytes of the weight, multiply-adds for one token. A
        factor that layers share is counted with the first of them."""
        rows = []
        for name, choice in self.items():
            itemsize = getattr(torch, choice.dtype).itemsize
            parameters = choice.parameters - (0 if name in choice.group[:1] else choice.shared_parameters)
            rows.append({"layer": name, "method": choice.method, "rank": choice.arguments.get("rank"),
                         "in_features": choice.in_features, "out_features": choice.out_features,
                         "dense_parameters": choice.dense_parameters, "parameters": parameters,
                         "dense_bytes": choice.dense_parameters * itemsize, "bytes": parameters * itemsize,
                         "index_bytes": choice.index_bytes,
                         "dense_macs": choice.dense_parameters, "macs": choice.parameters, "reason": choice.reason})
        return rows

    def totals(self) -> dict[str, Any]:
        """The sums of `rows`, and the ratio of parameters that is really kept, layers left dense included."""
        rows = self.rows()
        sums = {key: sum(row[key] for row in rows) for key in
                ("dense_parameters", "parameters", "dense_bytes", "bytes", "index_bytes", "dense_macs", "macs")}
        return sums | {"ratio": sums["parameters"] / sums["dense_parameters"] if rows else 1.0}

    def save(self, path: str | os.PathLike) -> None:
        write_json(path, {"format": FORMAT, "policy": self.policy, "ratio": self.ratio,
                          "layers": {name: choice.to_json() for name, choice in self.items()}})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """FormatError names the field that is missing, unknown, or not what it should be."""
        return _parse(read_json(path), os.path.basename(path))


@torch.no_grad()
def plan(model: nn.Module, *, method: str, ratio: float, policy: str = "per_matrix", stats: Mapping | None = None,
         layers: Sequence[str] | None = None, arguments: dict[str, Any] | None = None,
         share: int | Sequence[Sequence[str]] | None = None) -> Plan:
    """A rank for each layer so that the layers together keep at most `ratio` of their parameters.

    per_matrix: the same share everywhere. uniform_rank: the same rank everywhere. allocated: the least sum of what the
    method loses in each layer, from its loss curves; knapsack: the same for curves of any form, where allocated follows
    their convex hulls. layers: name patterns; arguments: of the method. Raises ArgumentError before any work for an unknown
    name, a ratio outside (0, 1) or too small, and statistics that the method needs.

    share: layers whose first factor (a dictionary, the v of low rank) is one, as their weights make one problem: a number of
    neighbouring blocks, whose layers of one name share; or lists of names of layers with as many inputs. It counts once."""
    arguments = dict(arguments or {})
    checked = check_arguments(method, arguments)
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not isfinite(ratio) or not 0 < ratio < 1:
        raise ArgumentError(f"ratio must be between 0 and 1, both excluded; found {ratio!r}")
    if policy not in POLICIES:
        raise ArgumentError(f"policy must be one of {', '.join(POLICIES)}; found {policy!r}")
    chosen = factorizable(model, layers)
    if checked.needs:
        _check_stats(checked, chosen, stats, arguments)
    groups = grouped(chosen, share, method)
    ladders = ladders_of(checked, groups, arguments)
    budget = budget_of(ladders, ratio)
    if policy in ("allocated", "knapsack"):
        solve = {"allocated": allocated, "knapsack": knapsack}[policy]
        picks = solve(ladders, budget, [_losses(checked, group, stats, ladder, arguments)
                                        for group, ladder in zip(groups, ladders)])
    else:
        picks = {"per_matrix": per_matrix, "uniform_rank": uniform_rank}[policy](ladders, budget)
    choices = {name: _choice(method, arguments, ladder, pick, module, tuple(group))
               for group, ladder, pick in zip(groups, ladders, picks) for name, module in group.items()}
    return Plan({name: choices[name] for name in chosen}, ratio=ratio, policy=policy)


def budget_of(ladders: Sequence[Ladder], ratio: float) -> int:
    """Parameters that all layers together may keep."""
    return int(ratio * sum(ladder.costs[-1] for ladder in ladders))


def ladders_of(method: Method, groups: Sequence[Mapping[str, nn.Module]], arguments: dict[str, Any]) -> list[Ladder]:
    """The sizes that each group of layers can have, alone or as one weight; raises what the method says of sizes and
    arguments that do not fit, naming the layers."""
    ladders = []
    for group in groups:
        (k, *_), rows = zip(*map(sizes, group.values()))
        try:
            ladders.append(Ladder(k, sum(rows), *method.group_size(k, rows, **arguments),
                                  lambda rank, k=k, n=sum(rows): method.stored(k, n, rank=rank, **arguments)[0]))
        except LowfatError as error:
            raise type(error)(f"{', '.join(group)}: {error}") from error
    return ladders


def _check_stats(checked: Method, chosen: Mapping[str, nn.Module], stats: Mapping | None, arguments: dict[str, Any]) -> None:
    if stats is None:
        checked.require(None, **arguments)
    if missing := [name for name in chosen if name not in stats]:
        raise ArgumentError(f"stats: nothing for {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "") +
                            "; calibrate the same layers")
    checked.require(stats[next(iter(chosen))], **arguments)


def _losses(method: Method, group: Mapping[str, nn.Module], stats: Mapping | None, ladder: Ladder,
            arguments: dict[str, Any]) -> list[float]:
    """The loss at each size of the ladder, made comparable between layers.

    Relative to what is lost at rank 1, not at rank 0: the first direction of a layer's outputs is mostly their mean, which
    is the same for every token and would hide that the rest is lost. Times what a rank costs, so that a rank counts by its share of the
    layer's spectrum, whatever it costs: the largest values of all normalized spectra are kept (pooled as in COMPOT,
    2602.15200). Absolute losses, or losses weighed by parameters, left MiniLM's embeddings further from the dense ones."""
    try:
        curve = method.losses(joined([dense_weight(module) for module in group.values()]),
                              merged([stats[name] for name in group]) if method.needs else None, **arguments)
    except LowfatError as error:
        raise type(error)(f"{', '.join(group)}: {error}") from error
    whole = float(curve[1]) if curve[1] > 1e-12 * curve[0] else inf  # a layer of rank 1 needs no more
    return [ladder.unit * float(curve[rank]) / whole for rank in ladder.ranks] + [0.0]


def _choice(method: str, arguments: dict[str, Any], ladder: Ladder, pick: int, module: nn.Module,
            group: tuple[str, ...]) -> Choice:
    (k, n), dtype = sizes(module), str(module.weight.dtype).removeprefix("torch.")
    if pick < len(ladder.ranks):
        return Choice(method, {**arguments, "rank": ladder.ranks[pick]}, k, n, dtype=dtype,
                      group=group if len(group) > 1 else ())
    reason = "the budget has room for the dense weight" if ladder.ranks else "rank 1 would not save a parameter"
    return Choice(None, {}, k, n, reason, dtype)


def _parse(value: Any, file: str) -> Plan:
    top = _fields(value, {"format": int, "policy": str, "ratio": (int, float), "layers": dict}, file)
    if top["format"] != FORMAT:
        raise FormatError(f"{file}: format {top['format']}, this version of lowfat reads {FORMAT}")
    if top["policy"] not in POLICIES:
        raise FormatError(f"{file}: policy must be one of {', '.join(POLICIES)}; found {top['policy']!r}")
    if not 0 < top["ratio"] < 1:
        raise FormatError(f"{file}: ratio must be between 0 and 1; found {top['ratio']!r}")
    made = Plan({name: _parse_choice(entry, f"{file}: layers.{name}") for name, entry in top["layers"].items()},
                ratio=top["ratio"], policy=top["policy"])
    try:
        groups = groups_of(made)
    except LowfatError as error:
        raise FormatError(f"{file}: {error}") from error
    for group in groups:
        if made[group[0]].method is not None:
            _check_rank([made[name] for name in group], f"{file}: layers.{group[0]}")
    return made


def _parse_choice(value: Any, where: str) -> Choice:
    entry = _fields(value, {"method": (str, type(None)), "arguments": dict, "in_features": int, "out_features": int,
                            "reason": str, "dtype": str, "group": list}, where, default={"group": []})
    for name in ("in_features", "out_features"):
        if entry[name] < 1:
            raise FormatError(f"{where}.{name} must be at least 1; found {entry[name]}")
    if entry["dtype"] not in _DTYPES:
        raise FormatError(f"{where}.dtype must be one of {', '.join(_DTYPES)}; found {entry['dtype']!r}")
    if not all(isinstance(name, str) for name in entry["group"]):
        raise FormatError(f"{where}.group must be names of layers; found {entry['group']!r}")
    entry["group"] = tuple(entry["group"])
    if entry["method"] is None and entry["arguments"]:
        raise FormatError(f"{where}.arguments must be empty for a layer left dense; found {entry['arguments']!r}")
    return Choice(**entry)


def _check_rank(choices: list[Choice], where: str) -> None:
    rank = choices[0].arguments.get("rank")
    try:
        _, most = size_of(choices)
    except LowfatError as error:
        raise FormatError(f"{where}: {error}") from error
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
        raise FormatError(f"{where}.arguments.rank must be a whole number between 1 and {most}; found {rank!r}")


def _fields(value: Any, types: dict[str, Any], where: str, default: Mapping[str, Any] = {}) -> dict[str, Any]:
    """value, which must be an object with exactly these fields of these types, or without those that have a default."""
    if not isinstance(value, dict):
        raise FormatError(f"{where} must be an object; found {value!r}")
    value = {**default, **value}
    for name in value:
        if name not in types:
            raise FormatError(f"{where}: unknown field {name!r}")
    for name, kind in types.items():
        if name not in value:
            raise FormatError(f"{where}: field {name!r} is missing")
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            raise FormatError(f"{where}: field {name!r} cannot be {value[name]!r}")
    return value
