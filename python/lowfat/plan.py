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

    @property
    def dense_parameters(self) -> int:
        return self.in_features * self.out_features

    @property
    def parameters(self) -> int:
        if self.method is None:
            return self.dense_parameters
        return METHODS[self.method].stored(self.in_features, self.out_features, **self.arguments)[0]

    @property
    def index_bytes(self) -> int:
        """Of masks and positions, stored beside the parameters."""
        if self.method is None:
            return 0
        return METHODS[self.method].stored(self.in_features, self.out_features, **self.arguments)[1]

    def size(self) -> tuple[float, int]:
        """(parameters that one more rank costs, the largest rank) of the method with its arguments."""
        others = {name: value for name, value in self.arguments.items() if name != "rank"}
        return METHODS[self.method].size(self.in_features, self.out_features, **others)


class Plan(dict[str, Choice]):
    """{layer name: Choice}, with the ratio and the policy it was made for."""

    def __init__(self, choices: Mapping[str, Choice], *, ratio: float, policy: str):
        super().__init__(choices)
        self.ratio, self.policy = ratio, policy

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary for each layer, for tables: parameters and bytes of the weight, multiply-adds for one token."""
        rows = []
        for name, choice in self.items():
            itemsize = getattr(torch, choice.dtype).itemsize
            rows.append({"layer": name, "method": choice.method, "rank": choice.arguments.get("rank"),
                         "in_features": choice.in_features, "out_features": choice.out_features,
                         "dense_parameters": choice.dense_parameters, "parameters": choice.parameters,
                         "dense_bytes": choice.dense_parameters * itemsize, "bytes": choice.parameters * itemsize,
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
                          "layers": {name: asdict(choice) for name, choice in self.items()}})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """FormatError names the field that is missing, unknown, or not what it should be."""
        return _parse(read_json(path), os.path.basename(path))


@torch.no_grad()
def plan(model: nn.Module, *, method: str, ratio: float, policy: str = "per_matrix", stats: Mapping | None = None,
         layers: Sequence[str] | None = None, arguments: dict[str, Any] | None = None) -> Plan:
    """A rank for each layer so that the layers together keep at most `ratio` of their parameters.

    per_matrix: the same share everywhere. uniform_rank: the same rank everywhere. allocated: the least sum of what the
    method loses in each layer, from its loss curves; knapsack: the same for curves of any form, where allocated follows
    their convex hulls. layers: name patterns; arguments: of the method. Raises ArgumentError before any work for an unknown
    name, a ratio outside (0, 1) or too small, and statistics that the method needs."""
    arguments = dict(arguments or {})
    checked = check_arguments(method, arguments)
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not isfinite(ratio) or not 0 < ratio < 1:
        raise ArgumentError(f"ratio must be between 0 and 1, both excluded; found {ratio!r}")
    if policy not in POLICIES:
        raise ArgumentError(f"policy must be one of {', '.join(POLICIES)}; found {policy!r}")
    chosen = factorizable(model, layers)
    if checked.needs:
        _check_stats(checked, chosen, stats, arguments)
    ladders = ladders_of(checked, chosen, arguments)
    budget = budget_of(ladders, ratio)
    if policy in ("allocated", "knapsack"):
        solve = {"allocated": allocated, "knapsack": knapsack}[policy]
        picks = solve(ladders, budget, [_losses(checked, module, stats, name, ladder, arguments)
                                        for (name, module), ladder in zip(chosen.items(), ladders)])
    else:
        picks = {"per_matrix": per_matrix, "uniform_rank": uniform_rank}[policy](ladders, budget)
    return Plan({name: _choice(method, arguments, ladder, pick, dense_weight(module))
                 for (name, module), ladder, pick in zip(chosen.items(), ladders, picks)}, ratio=ratio, policy=policy)


def budget_of(ladders: Sequence[Ladder], ratio: float) -> int:
    """Parameters that all layers together may keep."""
    return int(ratio * sum(ladder.costs[-1] for ladder in ladders))


def ladders_of(method: Method, chosen: Mapping[str, nn.Module], arguments: dict[str, Any]) -> list[Ladder]:
    """The sizes that each layer can have; raises what the method says of sizes and arguments that do not fit, naming the
    layer."""
    ladders = []
    for name, module in chosen.items():
        k, n = sizes(module)
        try:
            ladders.append(Ladder(k, n, *method.size(k, n, **arguments),
                                  lambda rank, k=k, n=n: method.stored(k, n, rank=rank, **arguments)[0]))
        except LowfatError as error:
            raise type(error)(f"{name}: {error}") from error
    return ladders


def _check_stats(checked: Method, chosen: Mapping[str, nn.Module], stats: Mapping | None, arguments: dict[str, Any]) -> None:
    if stats is None:
        checked.require(None, **arguments)
    if missing := [name for name in chosen if name not in stats]:
        raise ArgumentError(f"stats: nothing for {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "") +
                            "; calibrate the same layers")
    checked.require(stats[next(iter(chosen))], **arguments)


def _losses(method: Method, module: nn.Module, stats: Mapping | None, name: str, ladder: Ladder,
            arguments: dict[str, Any]) -> list[float]:
    """The loss at each size of the ladder, made comparable between layers.

    Relative to what is lost at rank 1, not at rank 0: the first direction of a layer's outputs is mostly their mean, which
    is the same for every token and would hide that the rest is lost. Times what a rank costs, so that a rank counts by its share of the
    layer's spectrum, whatever it costs: the largest values of all normalized spectra are kept (pooled as in COMPOT,
    2602.15200). Absolute losses, or losses weighed by parameters, left MiniLM's embeddings further from the dense ones."""
    try:
        curve = method.losses(dense_weight(module), stats[name] if method.needs else None, **arguments)
    except LowfatError as error:
        raise type(error)(f"{name}: {error}") from error
    whole = float(curve[1]) if curve[1] > 1e-12 * curve[0] else inf  # a layer of rank 1 needs no more
    return [ladder.unit * float(curve[rank]) / whole for rank in ladder.ranks] + [0.0]


def _choice(method: str, arguments: dict[str, Any], ladder: Ladder, pick: int, weight: torch.Tensor) -> Choice:
    dtype = str(weight.dtype).removeprefix("torch.")
    if pick < len(ladder.ranks):
        return Choice(method, {**arguments, "rank": ladder.ranks[pick]}, ladder.k, ladder.n, dtype=dtype)
    reason = "the budget has room for the dense weight" if ladder.ranks else "rank 1 would not save a parameter"
    return Choice(None, {}, ladder.k, ladder.n, reason, dtype)


def _parse(value: Any, file: str) -> Plan:
    top = _fields(value, {"format": int, "policy": str, "ratio": (int, float), "layers": dict}, file)
    if top["format"] != FORMAT:
        raise FormatError(f"{file}: format {top['format']}, this version of lowfat reads {FORMAT}")
    if top["policy"] not in POLICIES:
        raise FormatError(f"{file}: policy must be one of {', '.join(POLICIES)}; found {top['policy']!r}")
    if not 0 < top["ratio"] < 1:
        raise FormatError(f"{file}: ratio must be between 0 and 1; found {top['ratio']!r}")
    return Plan({name: _parse_choice(entry, f"{file}: layers.{name}") for name, entry in top["layers"].items()},
                ratio=top["ratio"], policy=top["policy"])


def _parse_choice(value: Any, where: str) -> Choice:
    entry = _fields(value, {"method": (str, type(None)), "arguments": dict, "in_features": int, "out_features": int,
                            "reason": str, "dtype": str}, where)
    for name in ("in_features", "out_features"):
        if entry[name] < 1:
            raise FormatError(f"{where}.{name} must be at least 1; found {entry[name]}")
    if entry["dtype"] not in _DTYPES:
        raise FormatError(f"{where}.dtype must be one of {', '.join(_DTYPES)}; found {entry['dtype']!r}")
    if entry["method"] is None:
        if entry["arguments"]:
            raise FormatError(f"{where}.arguments must be empty for a layer left dense; found {entry['arguments']!r}")
        return Choice(**entry)
    arguments = dict(entry["arguments"])
    rank = arguments.pop("rank", None)
    try:
        _, most = check_arguments(entry["method"], arguments).size(entry["in_features"], entry["out_features"], **arguments)
    except LowfatError as error:
        raise FormatError(f"{where}: {error}") from error
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
        raise FormatError(f"{where}.arguments.rank must be a whole number between 1 and {most}; found {rank!r}")
    return Choice(**entry)


def _fields(value: Any, types: dict[str, Any], where: str) -> dict[str, Any]:
    """value, which must be an object with exactly these fields of these types."""
    if not isinstance(value, dict):
        raise FormatError(f"{where} must be an object; found {value!r}")
    for name in value:
        if name not in types:
            raise FormatError(f"{where}: unknown field {name!r}")
    for name, kind in types.items():
        if name not in value:
            raise FormatError(f"{where}: field {name!r} is missing")
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            raise FormatError(f"{where}: field {name!r} cannot be {value[name]!r}")
    return value
