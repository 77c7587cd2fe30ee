"""y = silu(gate) * up, both low-rank products of one x: gate = (x v[0]^T) u[0]^T + bias[0], up the same with member 1.

x [..., k]   v [[r_gate, k], [r_up, k]]   u [[n, r_gate], [n, r_up]]   bias [[n] or None, [n] or None]   y [..., n]"""
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..errors import ShapeError
from ._library import below_autograd, composite_gradient, define, is_recorded, refuse
from .low_rank_group import check as check_group
from .low_rank_group import composition as group_composition
from .low_rank_group import is_list
from .low_rank_group import reference as group_reference
from .low_rank_group import without


def check(x: Tensor, v: Sequence[Tensor], u: Sequence[Tensor], bias: Sequence[Tensor | None] | None) -> None:
    """Raise the error that names what is wrong with these arguments, and of which member, if anything is."""
    check_group(x, v, u, bias, op="low_rank_swiglu")
    if len(v) != 2:
        raise ShapeError(f"low_rank_swiglu: v has {len(v)} members, must have two, gate and up")
    if u[0].shape[0] != u[1].shape[0]:
        raise ShapeError(f"low_rank_swiglu: u[0] (gate) has {u[0].shape[0]} rows, u[1] (up) has {u[1].shape[0]}; "
                         "gate and up are multiplied element by element")


def reference(x: Tensor, v: list[Tensor], u: list[Tensor], bias: list[Tensor | None]) -> Tensor:
    check(x, v, u, bias)
    gate, up = group_reference(x, v, u, bias)
    return silu(gate) * up


def composition(x: Tensor, v: list[Tensor], u: list[Tensor], bias: list[Tensor | None]) -> Tensor:
    """The same, of ops that have a gradient."""
    check(x, v, u, bias)
    gate, up = group_composition(x, v, u, bias)
    return silu(gate) * up


_forward = define("low_rank_swiglu(Tensor x, Tensor[] v, Tensor[] u, Tensor?[] bias) -> Tensor", reference)
composite_gradient(_forward, composition)


def low_rank_swiglu(x: Tensor, v: Sequence[Tensor], u: Sequence[Tensor],
                    bias: Sequence[Tensor | None] | None = None) -> Tensor:
    """The first half of a gated MLP, silu(gate) * up, of low-rank weights; in one launch where there is a kernel for it.

    x [..., k]   returns [..., n]. v, u and bias have two members each, gate's first:
    v = (v_gate [r_gate, k], v_up [r_up, k])   u = (u_gate [n, r_gate], u_up [n, r_up])   bias = (bias_gate [n], bias_up [n])
    or None, for one or both.

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
        refuse(error, "low_rank_swiglu", check, x, v, u, bias)
