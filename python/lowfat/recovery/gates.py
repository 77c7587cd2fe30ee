"""Hard-concrete gates, which learn what of a model stays, and the Lagrangian that holds them to a budget (Louizos et al.
2018, 1712.01312; FLOP, 1910.04732).

Imported inside functions only, because it brings transformers."""
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..layers import replace
from ..ops import low_rank
from ..shrink import Cuts
from ..structures import LowRank
from .choosing import best
from .phases import saving_rank

LOW, HIGH = -0.1, 1.1  # what a gate is stretched to before it is cut to 0..1, so that 0 and 1 themselves are drawn
BETA = 1.0  # temperature: the smaller, the closer to a coin
SHRINK = 0.8  # of an evaluated gate: sigmoid(log_alpha / beta * 0.8), as FLOP has it
LOG_ALPHA, MULTIPLIERS = "log_alpha", "multipliers"  # last names of the parameters, by which they get rates of their own


class HardConcrete(nn.Module):
    """Gates in 0..1: drawn anew at every call in training, of which some are 0 and some 1; smooth and fixed in evaluation.

    log_alpha [count], fp32: a gate is open where it is large. start: what it begins with."""

    def __init__(self, count: int, *, start: float, beta: float = BETA, device: torch.device | str | None = None):
        super().__init__()
        self.beta = beta
        self.log_alpha = nn.Parameter(torch.full((count,), float(start), device=device))

    def forward(self) -> Tensor:
        return self.drawn() if self.training else self.evaluated()

    def drawn(self) -> Tensor:
        tiny = torch.finfo(self.log_alpha.dtype).eps
        noise = torch.rand_like(self.log_alpha).clamp(tiny, 1 - tiny)
        soft = torch.sigmoid((noise.logit() + self.log_alpha) / self.beta)
        return (soft * (HIGH - LOW) + LOW).clamp(0, 1)

    def evaluated(self) -> Tensor:
        return torch.sigmoid(self.log_alpha / self.beta * SHRINK)

    def open(self) -> Tensor:
        """The probability that a drawn gate is not 0, whose sum is the expected L0 norm.   [count]"""
        return torch.sigmoid(self.log_alpha - self.beta * math.log(-LOW / HIGH))


class Lagrangian(nn.Module):
    """l1 (s - t) + l2 (s - t)^2 for a share s that is to be t: the gates descend on it, the multipliers ascend."""

    def __init__(self, device: torch.device | str | None = None):
        super().__init__()
        # l2 is there from the first step: from 0 it was l1 that had grown when the share fell below the target, and of 2000
        # gates under Adam the share went on to 0.01; with 100 it follows a target within 0.05
        self.multipliers = nn.Parameter(torch.tensor([0.0, 100.0], device=device))

    def forward(self, share: Tensor, target: float) -> Tensor:
        gap = share - target
        return self.multipliers[0] * gap + self.multipliers[1] * gap.square()


class Gates(nn.Module):
    """Gates of any kind with their Lagrangian; who inherits says what share of the parameters is expected to stay."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.lagrangian = Lagrangian(device)

    def share(self) -> Tensor:
        raise NotImplementedError

    def remove(self) -> None:
        """The model computes without gates again."""
        raise NotImplementedError


class RankGates(Gates):
    """A gate on every rank component of low-rank layers, whose weights are u diag(z) v meanwhile.

    dense: parameters that all layers had which count for the share; fixed: those of them that stay whatever the gates say. A
    layer's forward is replaced, so that what runs several layers as one call runs them one by one."""

    def __init__(self, layers: Mapping[str, LowRank], *, dense: int, fixed: int = 0, start: float):
        super().__init__(next(iter(layers.values())).u.device)
        self.layers, self.dense, self.fixed = dict(layers), dense, fixed  # a dict hides them: they are the student's
        self.gates = nn.ModuleList(HardConcrete(layer.rank, start=start, device=layer.u.device)
                                   for layer in self.layers.values())
        for layer, gate in zip(self.layers.values(), self.gates):
            layer.forward = _gated(layer, gate)

    def share(self) -> Tensor:
        expected = sum(gate.open().sum() * _unit(layer) for layer, gate in zip(self.layers.values(), self.gates))
        return (expected + self.fixed) / self.dense

    def chosen(self, budget: int) -> dict[str, list[int]]:
        """The components of each layer that stay, in order: those of all layers whose gates are furthest open, as many as so
        many parameters pay for; in each layer one at least, and no more than what saves parameters."""
        values = {name: gate.log_alpha.tolist() for name, gate in zip(self.layers, self.gates)}
        cost = {name: _unit(layer) for name, layer in self.layers.items()}
        most = {name: saving_rank(layer.in_features, layer.out_features) for name, layer in self.layers.items()}
        return best(values, cost, budget - self.fixed, most)

    @torch.no_grad()
    def cut(self, model: nn.Module, kept: Mapping[str, list[int]]) -> Cuts:
        """Layers of only these components take the places, each component times its gate as it is in evaluation."""
        cuts = {}
        for (name, layer), gate in zip(self.layers.items(), self.gates):
            index = torch.tensor(kept[name], device=layer.u.device)
            made = LowRank.of(layer.v[index], layer.u[:, index] * gate.evaluated()[index].to(layer.u), layer.bias)
            for key, parameter in made.named_parameters():
                parameter.requires_grad_(getattr(layer, key).requires_grad)
            replace(model, name, made)
            cuts |= {f"{name}.v": [(0, index)], f"{name}.u": [(1, index)]}
        return cuts

    def remove(self) -> None:
        for layer in self.layers.values():
            layer.__dict__.pop("forward", None)


def _gated(layer: LowRank, gate: HardConcrete) -> Callable[[Tensor], Tensor]:
    return lambda x: low_rank(x, layer.v, layer.u * gate(), layer.bias)


def _unit(layer: LowRank) -> int:
    """Parameters of one component."""
    return layer.in_features + layer.out_features


class Constrained(TrainerCallback):
    """Adds to the gates' gradients that of the Lagrangian, whose target falls from the share that there is to `target` over
    the first `warmup` steps, and to those of the multipliers its negative. After the clipping of all gradients: the training
    loss and the other parameters' steps are what they would be without it. No weight decay on any of them."""

    def __init__(self, gates: Gates, *, target: float, warmup: int):
        self.gates, self.final, self.warmup = gates, target, warmup
        self.first = gates.share().item()

    def target(self, step: int) -> float:
        """step: from 0"""
        return self.first + (self.final - self.first) * (min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0)

    def on_train_begin(self, args, state, control, *, optimizer, **kwargs):
        own = {id(parameter) for parameter in self.gates.parameters()}
        for group in optimizer.param_groups:  # which hold parameters of one rate, so either these or others
            if any(id(parameter) in own for parameter in group["params"]):
                group["weight_decay"] = 0.0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parameters = [parameter for parameter in self.gates.parameters() if parameter.requires_grad]
        penalty = self.gates.lagrangian(self.gates.share(), self.target(state.global_step))
        for parameter, grad in zip(parameters, torch.autograd.grad(penalty, parameters, allow_unused=True)):
            if grad is not None:
                grad = -grad if parameter is self.gates.lagrangian.multipliers else grad
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.logging_steps == 0 or state.global_step == state.max_steps:
            state.log_history.append({"step": state.global_step, "share": self.gates.share().item(),
                                      "target": self.target(state.global_step - 1)})
