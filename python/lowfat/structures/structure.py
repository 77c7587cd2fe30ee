"""What every factorized linear layer has in common with the others, and with `nn.Linear`."""
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, IndexRangeError, ShapeError, UnsupportedError


class Structure(nn.Module):
    """A linear layer of `in_features` to `out_features` whose weight [n, k] is stored as factors.

    The constructor takes sizes, allocates and initializes, and nothing else, so that it works on the meta device."""

    in_features: int
    out_features: int
    first: str = ""  # the factor that reads the input, where layers of as many inputs can share one

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, **sizes: int) -> "Structure":
        """Factorize one weight [n, k] the plain way; methods/ has better ones."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The factors multiplied out.   [n, k]"""
        raise NotImplementedError

    def shape(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON: `type(layer)(**layer.shape())` rebuilds the layer, empty."""
        raise NotImplementedError

    def split(self, rows: Sequence[int], biases: Sequence[Tensor | None]) -> list["Structure"]:
        """Layers of so many of this one's outputs each, in their order, that hold its first factor as one parameter."""
        raise NotImplementedError

    def check_indices(self) -> None:
        """IndexRangeError where a buffer holds indices that the layer cannot use: asked of every layer that comes from a
        file, and after load_state_dict(), which raises torch's RuntimeError with the same words."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        try:
            self.check_indices()
        except IndexRangeError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}" if prefix else str(error))

    def macs(self) -> int:
        """Multiply-adds for one token."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.shape().items())


def share(layers: Sequence[Structure]) -> list[Structure]:
    """The layers, the first factor of the first one now that of them all."""
    layers = list(layers)
    for layer in layers[1:]:
        setattr(layer, layer.first, getattr(layers[0], layer.first))
    return layers


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's layer, which stores its weight as [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def sizes(module: nn.Module) -> tuple[int, int]:
    """(k, n): features in, features out."""
    if isinstance(module, (Structure, nn.Linear)):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight as [n, k], whichever way the module stores it: a view of it, of a structure its factors multiplied out."""
    if isinstance(module, Structure):
        return module.dense().detach()
    return module.weight.detach().mT if is_conv1d(module) else module.weight.detach()


def keep_indices_local(model: nn.Module) -> None:
    """Tells DistributedDataParallel to leave int16 buffers alone, which neither gloo nor NCCL can send. They come from a seed
    or a file, and are the same in every process."""
    names = {name for name, buffer in model.named_buffers() if buffer.dtype == torch.int16}
    if names:
        model._ddp_params_and_buffers_to_ignore = names.union(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))


def check_dense(weight: Tensor) -> None:
    """UnsupportedError or ShapeError for what is no whole matrix [n, k]."""
    if hasattr(weight, "full_tensor"):
        raise UnsupportedError(f"weight is a {type(weight).__name__}, perhaps a shard; gather it with .full_tensor() first")
    if weight.dim() != 2:
        raise ShapeError(f"weight must be [out, in], found {list(weight.shape)}")


def check_counts(least: int = 1, **counts: int) -> None:
    """ArgumentError for what is no whole number, ShapeError for less than the least."""
    for name, count in counts.items():
        if type(count) is not int:
            raise ArgumentError(f"{name} must be a whole number, found {count!r}")
        if count < least:
            raise ShapeError(f"{name} must be at least {least}, found {count}")


def structures(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, Structure]]:
    """(name, layer) of a model's structures, without those that are a part of another."""
    outer = None
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, Structure) and (outer is None or not name.startswith(outer)):
            outer = f"{name}." if name else ""
            yield name, module
