"""How a strategy that factorizes a dense model itself makes the factors: one plan, and statistics of the training rows."""
from collections.abc import Mapping, Sequence

from torch import nn

from ..method_inputs import check_fit, needs_of, spread, stats_for, texts_for
from ..model_inputs import fitting
from ..plan import Plan, plan
from ..progress import tensors_digest
from ..stats import Calibration


class Making:
    """A method with its arguments, a budget, and the texts that the method reads.

    ArgumentError or ShapeError where they do not fit the model, before any work."""

    def __init__(self, model: nn.Module, *, method: str, ratio: float, policy: str, arguments: Mapping | None,
                 layers: Sequence[str] | None):
        self.model, self.method, self.arguments, self.layers = model, method, dict(arguments or {}), layers
        self.needs = needs_of(method, self.arguments, policy)
        check_fit(model, method=method, arguments=self.arguments, ratio=ratio, layers=layers)
        self._planned = {"method": method, "ratio": ratio, "policy": policy, "arguments": self.arguments, "layers": layers}
        self._texts: list[dict] = []

    def read(self, train: Sequence[Mapping], tokenizer, task: str, *, rows: int, batch_size: int,
             max_length: int | None) -> None:
        """Takes so many of the rows, spread evenly, to calibrate on; none where the method needs nothing."""
        self._tokenizer, self._task = tokenizer, task
        if self.needs:
            self._texts = texts_for(self.needs, self.model, tokenizer, spread(train, rows), task, batch_size=batch_size,
                                    max_length=fitting(max_length, self.model))

    def options(self) -> dict:
        """All that the factors depend on besides the model, as plain JSON."""
        return self._planned | {"calibration": [tensors_digest(batch.items()) for batch in self._texts] or None}

    def stats(self, layers: Sequence[str] | None) -> Calibration | None:
        """What these layers see in the model as it is."""
        if not self._texts:
            return None
        return stats_for(self.needs, self.arguments, self.model, self._tokenizer, self._texts, self._task, layers=layers)

    def plan(self, stats: Calibration | None) -> Plan:
        return plan(self.model, stats=stats, **self._planned)
