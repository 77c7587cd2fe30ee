"""What is compared: every method at every ratio, with every recovery, rate and seed, and the dense model itself."""
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

from ..errors import ArgumentError
from ..methods import check_arguments, named

RECOVERIES = ("none", "finetune", "staged")


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
        trained = [] if self.learning_rate is None else [f"{self.learning_rate:g}", f"seed{self.seed}"]
        return "-".join([self.label.replace(":", "-").replace("/", "-"), f"{self.ratio:g}", self.recovery, *trained])

    @property
    def label(self) -> str:
        """The method as it is asked for: monarch:blocks=8"""
        if self.method is None:
            return "dense"
        values = ((name, value if isinstance(value, str) else json.dumps(value, separators=(",", ":")))
                  for name, value in self.settings.items())
        return ":".join([self.method, *(f"{name}={value}" for name, value in values)])


DENSE = Cell(None, "{}", 1.0, "none", None, None)


def grid(methods: Sequence[str], ratios: Sequence[float], recoveries: Sequence[str], learning_rates: Sequence[float],
         seeds: int) -> list[Cell]:
    """Every cell, the dense model first. ArgumentError names the value that does not fit, or stands twice."""
    for name, values in (("methods", methods), ("ratios", ratios), ("recoveries", recoveries),
                         ("learning_rates", learning_rates)):
        if isinstance(values, str) or not values:
            raise ArgumentError(f"{name} must be a list of at least one, found {values!r}")
        if len(set(values)) < len(values):
            raise ArgumentError(f"{name} has a value twice: {', '.join(map(str, values))}")
    for ratio in ratios:
        _check_number("ratios", ratio, 1)
    for rate in learning_rates:
        _check_number("learning_rates", rate, inf)
    for recovery in recoveries:
        if recovery not in RECOVERIES:
            raise ArgumentError(f"recoveries must be of {', '.join(RECOVERIES)}; found {recovery!r}")
    if type(seeds) is not int or seeds < 1:
        raise ArgumentError(f"seeds is {seeds!r}; needs a whole number, at least 1")
    cells = [DENSE]
    for ratio in ratios:
        for method, arguments in map(parsed, methods):
            for recovery in recoveries:
                trained = [(None, None)] if recovery == "none" else [(rate, seed) for rate in learning_rates
                                                                     for seed in range(seeds)]
                cells += [Cell(method, arguments, ratio, recovery, *one) for one in trained]
    return cells


def parsed(text: str) -> tuple[str, str]:
    """("monarch", '{"blocks": 8}') of "monarch:blocks=8", both checked."""
    if not isinstance(text, str):
        raise ArgumentError(f"methods must be names like svd or monarch:blocks=8; found {text!r}")
    method, *settings = text.split(":")
    arguments = named(text, settings)
    check_arguments(method, arguments)
    return method, json.dumps(arguments)


def _check_number(name: str, value: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or not 0 < value < most:
        limits = "above 0" + (f" and below {most}" if isfinite(most) else "")
        raise ArgumentError(f"{name} must lie {limits}; found {value!r}")
