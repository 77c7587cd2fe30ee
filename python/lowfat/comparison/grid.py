"""What is compared: every method at every ratio, with every recovery, rate and seed, and the dense model itself."""
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

from ..errors import ArgumentError
from ..methods import check_arguments, named

RECOVERIES = ("none", "finetune", "staged", "straight_through", "mixed_rank", "theseus", "lpaf")


@dataclass(frozen=True)
class Cell:
    """One model to make and to judge. method None: the dense model as it is."""
    method: str | None
    arguments: str  # of the method, as JSON: a cell is a key
    ratio: float
    recovery: str
    learning_rate: float | None  # None: nothing is trained
    seed: int | None

    @property
    def settings(self) -> dict:
        return json.loads(self.arguments)

    @property
    def name(self) -> str:
        """Unique, and fit for a file: svd-0.5-finetune-0.0001-seed0"""
        if self.method is None:
            return "dense"
        trained = [] if self.learning_rate is None else [repr(self.learning_rate), f"seed{self.seed}"]
        return "-".join([self.label.replace(":", "-"), repr(self.ratio), self.recovery, *trained])

    @property
    def untrained(self) -> "Cell":
        return replace(self, recovery="none", learning_rate=None, seed=None)

    @property
    def label(self) -> str:
        """The method as it is asked for: monarch:blocks=8"""
        if self.method is None:
            return "dense"
        values = ((name, value if isinstance(value, str) else json.dumps(value, separators=(",", ":")))
                  for name, value in self.settings.items())
        return ":".join([self.method, *(f"{name}={value}" for name, value in values)])


DENSE = Cell(None, "{}", 1.0, "none", None, None)


def untrained(cells: Sequence[Cell]) -> list[Cell]:
    """Every method and ratio of the cells once."""
    return list(dict.fromkeys(cell.untrained for cell in cells))


def grid(methods: Sequence[str], ratios: Sequence[float], recoveries: Sequence[str], learning_rates: Sequence[float],
         seeds: int) -> list[Cell]:
    """Every cell, the dense model first. ArgumentError names the value that does not fit, or stands twice."""
    methods = _checked("methods", methods, parsed)
    ratios = _checked("ratios", ratios, lambda ratio: _number("ratios", ratio, 1))
    learning_rates = _checked("learning_rates", learning_rates, lambda rate: _number("learning_rates", rate, inf))
    recoveries = _checked("recoveries", recoveries, _recovery)
    if type(seeds) is not int or seeds < 1:
        raise ArgumentError(f"seeds is {seeds!r}; needs a whole number, at least 1")
    cells = [DENSE]
    for ratio in ratios:
        for method, arguments in methods:
            for recovery in recoveries:
                trained = [(None, None)] if recovery == "none" else [(rate, seed) for rate in learning_rates
                                                                     for seed in range(seeds)]
                cells += [Cell(method, arguments, ratio, recovery, *one) for one in trained]
    return cells


def parsed(text: str) -> tuple[str, str]:
    """("monarch", '{"blocks": 8}') of "monarch:blocks=8", both checked."""
    if not isinstance(text, str):
        raise ArgumentError(f"methods must be names like svd or monarch:blocks=8; found {text!r}")
    method, colon, rest = text.partition(":")
    settings = re.split(r":(?=\w+=)", rest) if colon else []  # a value like 2:4 has a colon of its own
    arguments = named(text, settings)
    check_arguments(method, arguments)
    return method, json.dumps(arguments, sort_keys=True)


def _checked(name: str, values: Sequence, check) -> list:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ArgumentError(f"{name} must be a list of at least one, found {values!r}")
    found = [check(value) for value in values]
    if len(set(found)) < len(found):
        raise ArgumentError(f"{name} has a value twice: {', '.join(map(str, values))}")
    return found


def _number(name: str, value: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or not 0 < value < most:
        limits = "above 0" + (f" and below {most}" if isfinite(most) else "")
        raise ArgumentError(f"{name} must lie {limits}; found {value!r}")
    return float(value)


def _recovery(name: str) -> str:
    if name not in RECOVERIES:
        raise ArgumentError(f"recoveries must be of {', '.join(RECOVERIES)}; found {name!r}")
    return name
