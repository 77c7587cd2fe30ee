"""Dense shadow weights beside factors, for training that may still choose other factors.

Imported inside functions only, because it brings transformers."""
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import TrainerCallback

from ..errors import ArgumentError
from ..structures import Structure

NAME = "shadow"  # of the parameter that a layer has while its factors are learned


class _StraightThrough(torch.autograd.Function):
    """y as it is; backward also gives the shadow weight dy^T x, as if the layer computed x shadow^T (Bengio et al. 2013).

    y [..., n]   x [..., k]   shadow [n, k]"""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, shadow: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dtype = shadow.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, = ctx.saved_tensors
        dw = None
        if ctx.needs_input_grad[2]:
            dw = (dy.reshape(-1, dy.shape[-1]).mT @ x.to(dy.dtype).reshape(-1, x.shape[-1])).to(ctx.dtype)
        return dy, None, dw


class Shadows:
    """The shadow weights of a model's layers, and what makes factors of them.

    factorize(name, layer, weight) -> a layer like this one, for the weight [n, k] as it is by now. The layers' own
    forward stays; a hook adds to it, so that what runs several layers as one call runs them one by one meanwhile."""

    def __init__(self, layers: Mapping[str, Structure], weights: Mapping[str, nn.Parameter], factorize: Callable):
        self.layers, self._factorize = dict(layers), factorize
        self.blend = 0.0  # share of the outputs that is the shadow weight's, not the factors'
        self._hooks = []
        for name, layer in self.layers.items():
            layer.register_parameter(NAME, weights[name])
            self._hooks.append(layer.register_forward_hook(self._hook))

    def _hook(self, layer: Structure, inputs: tuple, y: Tensor) -> Tensor:
        x, = inputs
        y = _StraightThrough.apply(y, x, layer.shadow)
        return torch.lerp(y, linear(x, layer.shadow, layer.bias), self.blend) if self.blend else y

    @torch.no_grad()
    def refactorize(self, moments: Mapping[Tensor, dict]) -> float:
        """New factors for the shadow weights as they are; the optimizer's moments of the old ones become 0. Returns the mean
        over the layers of ||W - What||_F / ||W||_F."""
        errors = []
        for name, layer in self.layers.items():
            made = self._factorize(name, layer, layer.shadow.detach())
            found, due = (one.shape() | {"bias": None} for one in (made, layer))  # which stays as it is
            if found != due:
                raise ArgumentError(f"{name}: the method made {found} of a layer of {due}; needs one form")
            fresh = made.state_dict()
            for key, tensor in layer.state_dict(keep_vars=True).items():
                if key not in (NAME, "bias"):
                    tensor.copy_(fresh[key])
                    for moment in moments.get(tensor, {}).values():
                        moment.zero_()
            errors.append(float((layer.dense() - layer.shadow).norm() / layer.shadow.norm()))
        return sum(errors) / len(errors)

    @torch.no_grad()
    def pull(self, strength: float) -> None:
        """Adds to the gradients that of strength ||W - What||_F^2 in W."""
        for layer in self.layers.values():
            if layer.shadow.grad is not None:
                layer.shadow.grad.add_(layer.shadow - layer.dense(), alpha=2 * strength)

    def remove(self) -> None:
        for hook, layer in zip(self._hooks, self.layers.values()):
            hook.remove()
            del layer._parameters[NAME]


class Learning(TrainerCallback):
    """Makes the factors anew every so many steps and after the last, fades the outputs of the shadow weights out over the
    first `fade` steps, and pulls these weights to their factors, from 0 to `pull`."""

    def __init__(self, shadows: Shadows, *, every: int, steps: int, fade: int, pull: float):
        self.shadows, self.every, self.steps, self.fade, self.pull = shadows, every, steps, fade, pull

    def on_step_begin(self, args, state, control, **kwargs):
        self.shadows.blend = max(0.0, 1 - state.global_step / self.fade) ** 3 if self.fade else 0.0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.shadows.pull(self.pull * (state.global_step + 1) / self.steps)

    def on_step_end(self, args, state, control, *, optimizer, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == self.steps:
            state.log_history.append({"step": state.global_step, "error": self.shadows.refactorize(optimizer.state)})
