"""The gradients of low_rank, those of the weights added to float32 tensors: nothing is rounded on the way there.

dy [..., n]   x [..., k]   h [..., r] or None   v [r, k]   u [n, r]   dv [r, k], du [n, r], db [n] or None   dx [..., k]"""
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import DeviceError, DtypeError, ShapeError, UnsupportedError
from ._library import below_autograd, composite_gradient, count_writes, define, is_recorded, refuse
from .low_rank import check as check_factors

OP = "low_rank_backward_into"


def check(dy: Tensor, x: Tensor, h: Tensor | None, v: Tensor, u: Tensor, dv: Tensor | None, du: Tensor | None,
          db: Tensor | None, needs_dx: bool = True) -> None:
    """Raise the error that names what is wrong with these arguments, if anything is."""
    check_factors(x, v, u, dy=dy, h=h, op=OP)
    total = torch.promote_types(x.dtype, torch.float32)
    for name, t, shape in (("dv", dv, v.shape), ("du", du, u.shape), ("db", db, u.shape[:1])):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise DtypeError(f"{OP}: {name} must be a tensor or None, found {type(t).__name__}")
        if t.dtype != total:
            raise DtypeError(f"{OP}: {name} has {t.dtype}, must be {total} to add gradients of {x.dtype} to it")
        if t.device != x.device:
            raise DeviceError(f"{OP}: {name} is on {t.device}, x is on {x.device}; all must be on one device")
        if t.shape != shape:
            raise ShapeError(f"{OP}: {name} {list(t.shape)} must be {list(shape)}")


def reference(dy: Tensor, x: Tensor, h: Tensor | None, v: Tensor, u: Tensor, dv: Tensor | None, du: Tensor | None,
              db: Tensor | None, needs_dx: bool) -> Tensor:
    check(dy, x, h, v, u, dv, du, db)
    m, (n, r), k = prod(x.shape[:-1]), u.shape, v.shape[1]
    dy, rows = dy.reshape(m, n), x.reshape(m, k)
    dh = dy @ u if needs_dx or dv is not None else None  # [m, r], rounded once, as in low_rank_backward
    if dv is not None:
        dv += dh.mT.to(dv.dtype) @ rows.to(dv.dtype)
    if du is not None:
        du += dy.mT.to(du.dtype) @ (linear(rows, v) if h is None else h.reshape(m, r)).to(du.dtype)
    if db is not None:
        db += dy.to(db.dtype).sum(0)
    return (dh @ v).reshape(x.shape) if needs_dx else x.new_empty(0)


def _refuse_gradients(*_):
    raise UnsupportedError(f"{OP}: nobody can differentiate a sum that is changed in place; call it under torch.no_grad()")


_op = define("low_rank_backward_into(Tensor dy, Tensor x, Tensor? h, Tensor v, Tensor u, Tensor(a!)? dv, Tensor(b!)? du,"
             " Tensor(c!)? db, bool needs_dx) -> Tensor", reference, casts=False)
composite_gradient(_op, _refuse_gradients)
count_writes(_op)


def low_rank_backward_into(dy: Tensor, x: Tensor, h: Tensor | None, v: Tensor, u: Tensor, dv: Tensor | None = None,
                           du: Tensor | None = None, db: Tensor | None = None, *, needs_dx: bool = True) -> Tensor:
    """Add the weights' gradients of y = low_rank(x, v, u, bias) to dv, du and db, those that are given, and return dx.

    For training that keeps its gradients in float32 beside half-precision weights, over several steps: nothing is rounded on
    the way there. In the backward of an autograd.Function, with h from torch.ops.lowfat.low_rank_training (None: computed
    again) and float32 tensors in `main_grad`:

        x, h, v, u, bias = ctx.saved_tensors
        dx = low_rank_backward_into(dy, x, h, v, u, v.main_grad, u.main_grad, bias.main_grad)
        return dx, None, None, None

    dv [r, k], du [n, r] and db [n] are float32, float64 for float64 inputs. needs_dx=False returns an empty tensor.
    Raises ShapeError, DtypeError or DeviceError, naming the argument, and UnsupportedError where gradients are recorded."""
    if torch.compiler.is_compiling():
        return _op(dy, x, h, v, u, dv, du, db, needs_dx)
    try:
        if is_recorded(dy, x, h, v, u, dv, du, db):
            _refuse_gradients()
        return below_autograd(_op, dy, x, h, v, u, dv, du, db, needs_dx)
    except (RuntimeError, TypeError, AttributeError) as error:
        refuse(error, OP, check, dy, x, h, v, u, dv, du, db)
