"""Runs a model to hear what its layers read and answer, and leaves it as it was."""
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients; everything is as it was afterwards, whatever happens in between."""
    training = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    try:
        model.eval().requires_grad_(False)
        with torch.inference_mode(False):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
        if hasattr(config, "problem_type"):
            config.problem_type = problem  # a classifier writes down what its first labels looked like


@contextmanager
def listening(modules: Mapping[str, nn.Module], before: Callable | None = None,
              after: Callable | None = None) -> Iterator[None]:
    """before(name, x) when a layer is called; after(name, x, y) when it has answered, and what that returns replaces y."""
    handles = []
    try:
        for name, module in modules.items():
            if before:
                handles.append(module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: before(name, _input(args, kwargs)), with_kwargs=True))
            if after:
                handles.append(module.register_forward_hook(
                    lambda _, args, kwargs, y, name=name: after(name, _input(args, kwargs), y), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(model: nn.Module, batch: Mapping, *, labels: bool):
    """The model's answer to a batch, moved to its device; without labels no loss is computed."""
    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()
             if labels or name != "labels"}
    if "use_cache" in signature(model.forward).parameters:
        moved.setdefault("use_cache", False)  # a key/value cache is memory for nothing here
    return model(**moved)


def _input(args: tuple, kwargs: Mapping) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))
