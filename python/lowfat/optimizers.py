"""For the training of models with factorized layers: which parameters decay, and updates that free each gradient at once."""
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import ArgumentError, UnsupportedError
from .structures import Structure


def parameter_groups(model: nn.Module, *, weight_decay: float = 0.01, learning_rate: float | None = None,
                     factor_rate: float | None = None) -> list[dict[str, Any]]:
    """Groups for an optimizer of torch: what stands for a weight matrix decays, biases and norms do not.

    That is: every parameter of a structure but its bias, the values of a sparse part among them although they are one row,
    and of other modules those with two dimensions or more. learning_rate, factor_rate: of all parameters, and of those of
    structures, where they are to differ from the optimizer's. Frozen parameters are left out, shared ones come once; empty
    groups do not come. Raises ArgumentError for rates below zero, or where nothing can be trained."""
    for name, value in (("weight_decay", weight_decay), ("learning_rate", learning_rate), ("factor_rate", factor_rate)):
        if value is not None and not 0 <= value < float("inf"):
            raise ArgumentError(f"{name} is {value}; needs a number, at least 0")
    kinds = {"factors": (weight_decay, _rate(factor_rate, learning_rate)), "weights": (weight_decay, _rate(learning_rate)),
             "others": (0.0, _rate(learning_rate))}
    groups: dict[str, dict[str, Any]] = {name: {"params": [], "name": name, "weight_decay": decay, **rate}
                                         for name, (decay, rate) in kinds.items()}
    factors = {id(parameter) for module in model.modules() if isinstance(module, Structure)
               for name, parameter in module.named_parameters() if name.rpartition(".")[2] != "bias"}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "factors" if id(parameter) in factors else "weights" if parameter.dim() > 1 else "others"
            groups[kind]["params"].append(parameter)
    found = [group for group in groups.values() if group["params"]]
    if not found:
        raise ArgumentError("model: every parameter is frozen; needs one with requires_grad")
    return found


def _rate(*rates: float | None) -> dict[str, float]:
    rate = next((rate for rate in rates if rate is not None), None)
    return {} if rate is None else {"lr": rate}


class PerLayer(Optimizer):
    """Another optimizer, stepped for each parameter inside the backward pass, as soon as its gradient is whole; the gradient
    is freed there, so that never more than a few exist (LOMO, 2306.09782; the per-layer updates of GaLore and SLTrain).

    make: what makes that optimizer, as torch.optim.AdamW; params and options are for it. It computes what a step after the
    backward pass would, bit for bit, unless it looks at several parameters at a time. step() only says that a pass has ended;
    learning-rate schedulers and state_dict() work as always, closures do not. Frozen parameters stay as they are.

    A backward pass is an update: neither can gradients be accumulated over several (a second pass before step() raises
    ArgumentError) nor clipped by their common norm, nor scaled (a GradScaler), nor averaged over processes (UnsupportedError
    where there are several).
    remove() ends it."""

    def __init__(self, params: Iterable[Any], make: Callable[..., Optimizer] = torch.optim.AdamW, **options: Any):
        if torch.distributed.is_available() and torch.distributed.is_initialized() and (
                count := torch.distributed.get_world_size()) > 1:
            raise UnsupportedError(f"per-layer updates in {count} processes: a gradient would be used before it is averaged "
                                   "over them")
        whole = make(params, **options)
        super().__init__(whole.param_groups, whole.defaults)
        self._make, self._options, self._updated = make, options, set()
        self._link()
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._update)
                       for group in self.param_groups for parameter in group["params"] if parameter.requires_grad]

    def _link(self) -> None:
        """One optimizer for each parameter, its state in this one's."""
        self._single = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                single = self._make([{**group, "params": [parameter]}], **self._options)
                single.state = self.state
                self._single[parameter] = single, group

    def _update(self, parameter: Tensor) -> None:
        if parameter in self._updated:
            raise ArgumentError("a second backward pass before step(): per-layer updates cannot accumulate gradients")
        self._updated.add(parameter)
        single, group = self._single[parameter]
        single.param_groups[0].update({name: value for name, value in group.items() if name != "params"})
        single.step()
        parameter.grad = None

    def step(self, closure: Callable | None = None) -> None:
        """Ends a pass; the parameters were updated in it."""
        if closure is not None:
            raise ArgumentError("closure: per-layer updates happen in the backward pass, which a closure would repeat")
        self._updated.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Each parameter's part by the optimizer's own rule: one that keeps moments in 8 bits takes them as they are."""
        super().load_state_dict({**state_dict, "state": {}})
        self._link()
        for number, (single, _) in enumerate(self._single.values()):
            if number in state_dict["state"]:
                options = {**single.param_groups[0], "params": [0]}
                single.load_state_dict({"state": {0: state_dict["state"][number]}, "param_groups": [options]})
                self.state.update(single.state)
                single.state = self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the hooks are there: what came later would never be updated."""
        if hasattr(self, "_hooks"):
            raise UnsupportedError("add_param_group: per-layer updates know their parameters from the start; make a new one")
        super().add_param_group(param_group)

    def remove(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
