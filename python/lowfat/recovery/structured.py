"""Factors on the heads and neurons of a model: what they are worth, and what is left when some are 0.

Imported inside functions only, because it brings transformers."""
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..shrink import Units


class UnitScales:
    """Multiplies what every unit hands to the layer that reads it by factor(block), one number of each unit, until
    remove()."""

    def __init__(self, model: nn.Module, units: Mapping[str, Units], factor: Callable[[str], Tensor]):
        self._handles = [model.get_submodule(one.writer).register_forward_pre_hook(_scaling(name, one, factor))
                         for name, one in units.items()]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _scaling(name: str, units: Units, factor: Callable[[str], Tensor]):
    width = units.columns.shape[1]

    def scaled(module, inputs: tuple) -> tuple:
        x, *others = inputs
        return x * factor(name).repeat_interleave(width).to(x.dtype), *others

    return scaled


class Importance(nn.Module):
    """What a first-order Taylor series says that the loss changes by when a unit is taken out: |dL/dxi| of a factor xi = 1
    on it, summed over batches (Michel et al. 2019, 1905.10650; Molchanov et al. 2019, 1906.10771).

    The sums are buffers, so that a training state has them; the factors are no parameters: no optimizer moves them, and the
    norm that gradients are clipped to leaves them out."""

    def __init__(self, model: nn.Module, units: Mapping[str, Units]):
        super().__init__()
        self.names = {name: f"sum{number}" for number, name in enumerate(units)}
        self._factors = {}
        for name, buffer in self.names.items():
            device = model.get_submodule(units[name].writer).weight.device
            self.register_buffer(buffer, torch.zeros(units[name].count, device=device))
            self._factors[name] = torch.ones(units[name].count, device=device, requires_grad=True)
        self._scales = UnitScales(model, units, self._factors.__getitem__)

    @torch.no_grad()
    def collect(self) -> None:
        """Adds what the backward passes since the last call have left."""
        for name, factor in self._factors.items():
            if factor.grad is not None:
                getattr(self, self.names[name]).add_(factor.grad.abs())
                factor.grad = None

    def values(self) -> dict[str, list[float]]:
        return {name: getattr(self, buffer).tolist() for name, buffer in self.names.items()}

    def remove(self) -> None:
        self._scales.remove()


class Scoring(TrainerCallback):
    """Collects the importance of a step's batches."""

    def __init__(self, importance: Importance):
        self.importance = importance

    def on_step_end(self, args, state, control, **kwargs):
        self.importance.collect()
