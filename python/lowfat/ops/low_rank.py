"""y = (x v^T) u^T + bias, the rank-r middle h rounded once.   x [..., k]   v [r, k]   u [n, r]   bias [n]   y [..., n]

low_rank_epilogue: then an activation of y, and a residual [..., n] that is added to it, in this order. An op of its own: a
string among the arguments makes a call of 4.4 us one of 4.8.

In bf16 on a CPU, subnormal inputs, middles and sums may count as zero, as they do in torch's own products there. So they may
in the ops that are made of this one."""
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from ..errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from ._library import autocast, below_autograd, composite_gradient, define, differentiable, in_transform, is_recorded, refuse

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = {"none": lambda y: y, "relu": relu, "gelu": gelu, "gelu_tanh": partial(gelu, approximate="tanh"), "silu": silu}


def check(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, dy: Tensor | None = None,
          h: Tensor | None = None, *, activation: str = "none", residual: Tensor | None = None, op: str = "low_rank",
          names: tuple[str, str, str] = ("v", "u", "bias"), is_pivoted: bool = False) -> None:
    """Raise the error that names what is wrong with these arguments, if anything is. names: what another op calls v, u and
    bias. is_pivoted: y has a column for each row of v, too."""
    v_name, u_name, bias_name = names
    tensors = {"x": x, v_name: v, u_name: u}
    others = ((bias_name, bias), ("dy", dy), ("h", h), ("residual", residual))
    tensors |= {name: t for name, t in others if t is not None}
    if activation not in list(ACTIVATIONS):  # a list: what cannot be hashed is no activation either
        raise ArgumentError(f"{op}: activation is {activation!r}, must be one of {', '.join(ACTIVATIONS)}")
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise DtypeError(f"{op}: {name} must be a tensor, found {type(t).__name__}")
        if t.layout is not torch.strided:
            raise UnsupportedError(f"{op}: {name} is {t.layout}, must be a dense tensor (call .to_dense())")
    for name, t in tensors.items():
        if t.device != x.device:
            raise DeviceError(f"{op}: {name} is on {t.device}, x is on {x.device}; all must be on one device")
        if t.dtype != x.dtype:
            raise DtypeError(f"{op}: {name} has {t.dtype}, x has {x.dtype}; all must have one dtype (or use autocast)")
    if x.dtype not in DTYPES:
        raise DtypeError(f"{op}: x has {x.dtype}, must be float64, float32, float16 or bfloat16")
    if x.dim() < 1:
        raise ShapeError(f"{op}: x has no dimensions, must be [..., k]")
    if v.dim() != 2 or u.dim() != 2:
        raise ShapeError(f"{op}: {v_name} {list(v.shape)} must be [r, k] and {u_name} {list(u.shape)} must be [n, r]")
    if x.shape[-1] != v.shape[1]:
        raise ShapeError(f"{op}: x has {x.shape[-1]} features, {v_name} has {v.shape[1]} "
                         f"(x {[*x.shape]}, {v_name} {[*v.shape]})")
    if u.shape[1] != v.shape[0]:
        raise ShapeError(f"{op}: {u_name} has rank {u.shape[1]}, {v_name} has rank {v.shape[0]} "
                         f"({u_name} {[*u.shape]}, {v_name} {[*v.shape]})")
    n = u.shape[0] + v.shape[0] * is_pivoted
    if bias is not None and bias.shape != (n,):
        rows = f"{v_name} {list(v.shape)} and of " * is_pivoted + f"{u_name} {list(u.shape)}"
        raise ShapeError(f"{op}: {bias_name} {list(bias.shape)} must be [{n}], the rows of {rows}")
    for name, t, size in (("dy", dy, u.shape[0]), ("h", h, v.shape[0]), ("residual", residual, u.shape[0])):
        if t is not None and t.shape != (*x.shape[:-1], size):
            raise ShapeError(f"{op}: {name} {list(t.shape)} must be {[*x.shape[:-1], size]}")


def reference(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    return reference_training(x, v, u, bias)[0]


def reference_training(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check(x, v, u, bias)
    h = linear(x.contiguous(), v.contiguous())  # contiguous: the same bits for every layout of the same values
    return linear(h, u.contiguous(), bias), h


def reference_backward(dy: Tensor, x: Tensor, h: Tensor | None, v: Tensor, u: Tensor, needs: int):
    """Bit i of needs: gradient i of (dx, dv, du, db) is wanted, else it comes back empty."""
    check(x, v, u, dy=dy, h=h, op="low_rank_backward")
    m, (n, r), k = prod(x.shape[:-1]), u.shape, v.shape[1]
    dy, rows = dy.reshape(m, n), x.reshape(m, k)
    dx = dv = du = db = None
    if needs & 0b0011:
        dh = dy @ u  # [m, r]
        dx = (dh @ v).reshape(x.shape) if needs & 0b0001 else None
        dv = dh.mT @ rows if needs & 0b0010 else None
    if needs & 0b0100:
        du = dy.mT @ (linear(rows, v) if h is None else h.reshape(m, r))
    if needs & 0b1000:
        db = dy.sum(0)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in (dx, dv, du, db))


def reference_epilogue(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, activation: str,
                       residual: Tensor | None = None) -> Tensor:
    check(x, v, u, bias, activation=activation, residual=residual)
    return _finished(reference(x, v, u, bias), activation, residual)


def composition_epilogue(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, activation: str,
                         residual: Tensor | None = None) -> Tensor:
    """The same, of ops that have a gradient."""
    check(x, v, u, bias, activation=activation, residual=residual)
    return _finished(low_rank(x, v, u, bias), activation, residual)


def _finished(y: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


_forward = define("low_rank(Tensor x, Tensor v, Tensor u, Tensor? bias=None) -> Tensor", reference)
_training = define("low_rank_training(Tensor x, Tensor v, Tensor u, Tensor? bias=None) -> (Tensor y, Tensor h)",
                   reference_training)
_backward = define("low_rank_backward(Tensor dy, Tensor x, Tensor? h, Tensor v, Tensor u, int needs)"
                   " -> (Tensor dx, Tensor dv, Tensor du, Tensor db)", reference_backward, casts=False)
_recorded = differentiable(_forward, _training, _backward, reference=reference_training, read=3)
_epilogue = define("low_rank_epilogue(Tensor x, Tensor v, Tensor u, Tensor? bias, str activation, Tensor? residual=None)"
                   " -> Tensor", reference_epilogue)
composite_gradient(_epilogue, composition_epilogue)


def low_rank(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, *, activation: str = "none",
             residual: Tensor | None = None) -> Tensor:
    """Multiply by a rank-r weight u v, never forming it.   x [..., k]   v [r, k]   u [n, r]   bias [n]   returns [..., n]

    activation: of the result, one of none, relu, gelu (exact), gelu_tanh (its approximation) and silu.
    residual [..., n]: added to that, in the dtype of x; under autocast it is cast like every other argument.

    Raises ShapeError, DtypeError, DeviceError or ArgumentError, naming the argument. Second derivatives raise
    UnsupportedError, and so do tensors that torch cannot route to the op (sparse, sharded)."""
    if activation != "none" or residual is not None:
        return _with_epilogue(x, v, u, bias, activation, residual)
    if torch.compiler.is_compiling():
        return _forward(x, v, u, bias)
    try:  # the ops check their arguments: asking what was wrong only when they refuse saves a third of a small call
        if in_transform():
            return reference(x, v, u, bias)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, v, u, bias)):
            return below_autograd(_forward, x.contiguous(), v.contiguous(), u.contiguous(), bias)
        x, v, u, bias = autocast(x, v, u, bias)
        return _recorded(x.contiguous(), v.contiguous(), u.contiguous(), bias)
    except (RuntimeError, TypeError, AttributeError) as error:
        refuse(error, "low_rank", check, x, v, u, bias)


def _with_epilogue(x, v, u, bias, activation, residual):
    if torch.compiler.is_compiling():
        return _epilogue(x, v, u, bias, activation, residual)
    try:
        if is_recorded(x, v, u, bias, residual):
            return composition_epilogue(*autocast(x, v, u, bias, activation, residual))
        return below_autograd(_epilogue, x, v, u, bias, activation, residual)
    except (RuntimeError, TypeError, AttributeError) as error:
        refuse(error, "low_rank", lambda: check(x, v, u, bias, activation=activation, residual=residual))
