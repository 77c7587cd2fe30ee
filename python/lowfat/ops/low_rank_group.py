"""y[i] = (x v[i]^T) u[i]^T + bias[i]: several products of one x.

x [..., k]   v[i] [r_i, k]   u[i] [n_i, r_i]   bias[i] [n_i] or None   y[i] [..., n_i]"""
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DtypeError, ShapeError
from ._library import below_autograd, composite_gradient, define, is_recorded, refuse
from .low_rank import check as check_member
from .low_rank import low_rank
from .low_rank import reference as reference_member


def check(x: Tensor, v: Sequence[Tensor], u: Sequence[Tensor], bias: Sequence[Tensor | None] | None, *,
          op: str = "low_rank_group") -> None:
    """Raise the error that names what is wrong with these arguments, and of which member, if anything is."""
    bias = without(v) if bias is None else bias
    for name, members in (("v", v), ("u", u), ("bias", bias)):
        if not is_list(members):
            raise DtypeError(f"{op}: {name} must be a list of tensors, one per member, found {type(members).__name__}")
    if not len(v) == len(u) == len(bias):
        raise ShapeError(f"{op}: v has {len(v)} members, u {len(u)} and bias {len(bias)}; must be one number for all")
    if not v:
        raise ShapeError(f"{op}: v has no members, must have at least one")
    for i, member in enumerate(zip(v, u, bias)):
        check_member(x, *member, op=op, names=(f"v[{i}]", f"u[{i}]", f"bias[{i}]"))


def is_list(members) -> bool:
    """No tensor: an op would take one for the list of its rows, and the composition that is differentiated would not."""
    return isinstance(members, (list, tuple))


def without(v: Sequence[Tensor]) -> list[None]:
    """The bias of a group that has none."""
    return [None] * len(v) if is_list(v) else []


def reference(x: Tensor, v: list[Tensor], u: list[Tensor], bias: list[Tensor | None]) -> list[Tensor]:
    check(x, v, u, bias)
    return [reference_member(x, *member) for member in zip(v, u, bias)]


def composition(x: Tensor, v: list[Tensor], u: list[Tensor], bias: list[Tensor | None]) -> list[Tensor]:
    """The same, of ops that have a gradient."""
    check(x, v, u, bias)
    return [low_rank(x, *member) for member in zip(v, u, bias)]


_forward = define("low_rank_group(Tensor x, Tensor[] v, Tensor[] u, Tensor?[] bias) -> Tensor[]", reference)
composite_gradient(_forward, composition)


def low_rank_group(x: Tensor, v: Sequence[Tensor], u: Sequence[Tensor],
                   bias: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """Multiply by several low-rank weights that read the same input (q/k/v), in one launch where there is a kernel for it.

    x [..., k]   v[i] [r_i, k]   u[i] [n_i, r_i]   bias[i] [n_i] or None   returns y[i] [..., n_i] of each member

    Raises ShapeError, DtypeError or DeviceError, naming the argument and its member; UnsupportedError as `low_rank` does."""
    bias = without(v) if bias is None else bias
    if not (is_list(v) and is_list(u) and is_list(bias)):
        check(x, v, u, bias)
    if torch.compiler.is_compiling():
        return _forward(x, v, u, bias)
    try:
        if is_recorded(x, *v, *u, *bias):
            return composition(x, v, u, bias)
        return below_autograd(_forward, x, v, u, bias)
    except (RuntimeError, TypeError, AttributeError) as error:
        refuse(error, "low_rank_group", check, x, v, u, bias)
