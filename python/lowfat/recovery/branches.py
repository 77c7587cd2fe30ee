"""Dense weights beside factors, of which one or the other computes a layer's outputs, drawn anew for every pass.

Imported inside functions only, because it brings transformers."""
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import TrainerCallback

from ..structures import Structure

NAME = "full"  # of the dense weight that a layer has meanwhile: a parameter where it learns, else a buffer outside the state


class Branches:
    """y = x W^T + bias or the layer's own, by layers' names.   weights [n, k]

    groups: names of layers that are drawn together. The bias is one of both. With p = 0, as at the start and in the end, the
    layers compute by their factors alone, and several in one call where they can."""

    def __init__(self, layers: Mapping[str, Structure], weights: Mapping[str, Tensor], groups: Iterable[Iterable[str]], *,
                 learn: bool = False):
        self.layers, self.groups = dict(layers), [list(group) for group in groups]
        self._p, self._is_dense = 0.0, dict.fromkeys(self.layers, False)
        for name, layer in self.layers.items():
            if learn:
                weight = weights[name].clone(memory_format=torch.contiguous_format)
                layer.register_parameter(NAME, nn.Parameter(weight, next(layer.parameters()).requires_grad))
            else:
                layer.register_buffer(NAME, weights[name], persistent=False)

    @property
    def p(self) -> float:
        """The probability of the dense weight."""
        return self._p

    @p.setter
    def p(self, p: float) -> None:
        if bool(p) != bool(self._p):
            for name, layer in self.layers.items():
                if p:
                    layer.forward = partial(self._forward, name)
                else:
                    del layer.forward
        self._p = p

    def draw(self) -> None:
        """Chooses for each group, from torch's generator of the CPU."""
        for group, dense in zip(self.groups, (torch.rand(len(self.groups)) < self._p).tolist()):
            self._is_dense.update(dict.fromkeys(group, dense))

    def remove(self) -> None:
        self.p = 0.0
        for layer in self.layers.values():
            delattr(layer, NAME)

    def _forward(self, name: str, x: Tensor) -> Tensor:
        layer = self.layers[name]
        return linear(x, layer.full, layer.bias) if self._is_dense[name] else type(layer).forward(layer, x)


class Fading(TrainerCallback):
    """Sets p before every step: probability() of it."""

    def __init__(self, branches: Branches, *, first: float, end: int, schedule: str):
        self.branches, self.schedule = branches, partial(probability, first=first, end=end, schedule=schedule)

    def on_step_begin(self, args, state, control, **kwargs):
        self.branches.p = self.schedule(state.global_step)


def probability(step: int, first: float, end: int, schedule: str) -> float:
    """Of the dense weight: from `first` at step 0 in a line to 0 at step `end`, or constant until there."""
    if step >= end:
        return 0.0
    return first if schedule == "constant" else first * (1 - step / end)
