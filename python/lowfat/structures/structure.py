"""What every factorized linear layer has in common with the others, and with `nn.Linear`."""
from typing import Any

from torch import Tensor, nn


class Structure(nn.Module):
    """A linear layer of `in_features` to `out_features` whose weight [n, k] is stored as factors.

    The constructor takes sizes, allocates and initializes, and nothing else, so that it works on the meta device."""

    in_features: int
    out_features: int

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

    def check_indices(self) -> None:
        """IndexRangeError where a buffer holds indices that the layer cannot use: asked of every layer that comes from a
        file."""

    def macs(self) -> int:
        """Multiply-adds for one token."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.shape().items())
