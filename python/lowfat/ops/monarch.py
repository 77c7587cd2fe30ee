"""y = blocks of rank r: two products with block-diagonal factors and a permutation between them (Dao et al. 2022, eq. 1).

x [..., k]   v [b_in, b_out r, p]   u [b_out, s, b_in r]   bias [n]   y [..., n]
p = ceil(k / b_in) and s = ceil(n / b_out): sizes that the blocks do not divide are padded with zeros

    z[i] = x[i-th p of k] v[i]^T            [m, r, b_out], its rows by rank and then by output block
    h[o] = z[:][:, :, o]                    [m, b_in r], by input block and then by rank: the middle, rounded once
    y[o] = h[o] u[o]^T + bias               [m, s]

Output block o owns the outputs o, o + b_out, o + 2 b_out ... (interleave: Monarch), or the o-th run of s (block-wise low rank).
Input block i and output block o share a matrix of rank r, u[o][:, i r:(i + 1) r] v[i][o::b_out].
In bf16 on a CPU, subnormal inputs, middles and sums may count as zero."""
from math import ceil, prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import DeviceError, DtypeError, ShapeError, UnsupportedError
from ._library import autocast, below_autograd, define, differentiable, in_transform, refuse
from .low_rank import DTYPES


def check(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, n: int, interleave: bool = True, dy: Tensor | None = None,
          h: Tensor | None = None) -> None:
    """Raise the error that names what is wrong with these arguments, if anything is."""
    tensors = {"x": x, "v": v, "u": u}
    tensors |= {name: t for name, t in (("bias", bias), ("dy", dy), ("h", h)) if t is not None}
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise DtypeError(f"monarch: {name} must be a tensor, found {type(t).__name__}")
        if t.layout is not torch.strided:
            raise UnsupportedError(f"monarch: {name} is {t.layout}, must be a dense tensor (call .to_dense())")
    for name, t in tensors.items():
        if t.device != x.device:
            raise DeviceError(f"monarch: {name} is on {t.device}, x is on {x.device}; all must be on one device")
        if t.dtype != x.dtype:
            raise DtypeError(f"monarch: {name} has {t.dtype}, x has {x.dtype}; all must have one dtype (or use autocast)")
    if x.dtype not in DTYPES:
        raise DtypeError(f"monarch: x has {x.dtype}, must be float64, float32, float16 or bfloat16")
    if v.dim() != 3 or u.dim() != 3:
        raise ShapeError(f"monarch: v {list(v.shape)} must be [b_in, b_out r, p] and u {list(u.shape)} [b_out, s, b_in r]")
    (b_in, q, p), (b_out, s, t) = v.shape, u.shape
    if min(b_in, b_out) < 1 or q * b_in != t * b_out or q % b_out:
        raise ShapeError(f"monarch: v {list(v.shape)} and u {list(u.shape)} do not share a rank; with b_in = {b_in} and b_out = "
                         f"{b_out} blocks of rank r they must be [b_in, b_out r, p] and [b_out, s, b_in r]")
    if x.dim() < 1 or ceil(x.shape[-1] / b_in) != p:
        raise ShapeError(f"monarch: x {list(x.shape)} must have {b_in * p} features, or up to {b_in - 1} less: {b_in} blocks of "
                         f"{p} (v {list(v.shape)})")
    if type(n) is not int or ceil(n / b_out) != s:
        raise ShapeError(f"monarch: n is {n}, must be {b_out * s}, or up to {b_out - 1} less: {b_out} blocks of {s} "
                         f"(u {list(u.shape)})")
    if bias is not None and bias.shape != (n,):
        raise ShapeError(f"monarch: bias {list(bias.shape)} must be [{n}]")
    for name, t, shape in (("dy", dy, (*x.shape[:-1], n)), ("h", h, (b_out, prod(x.shape[:-1]), u.shape[2]))):
        if t is not None and t.shape != shape:
            raise ShapeError(f"monarch: {name} {list(t.shape)} must be {list(shape)}")


# --- permutations ---

def split_inputs(x: Tensor, blocks: int, size: int) -> Tensor:
    """[m, k] -> [b_in, m, p]"""
    m, k = x.shape
    return pad(x, (0, blocks * size - k)).view(m, blocks, size).transpose(0, 1)


def join_inputs(x: Tensor, k: int) -> Tensor:
    """[b_in, m, p] -> [m, k]"""
    blocks, m, size = x.shape
    return x.transpose(0, 1).reshape(m, blocks * size)[:, :k].contiguous()  # as kernels make it


def to_middle(z: Tensor, b_out: int) -> Tensor:
    """[b_in, m, r b_out] -> [b_out, m, b_in r]"""
    b_in, m, q = z.shape
    return z.view(b_in, m, q // b_out, b_out).permute(3, 1, 0, 2).reshape(b_out, m, b_in * (q // b_out)).contiguous()


def from_middle(h: Tensor, b_in: int) -> Tensor:
    """[b_out, m, b_in r] -> [b_in, m, r b_out]"""
    b_out, m, t = h.shape
    return h.view(b_out, m, b_in, t // b_in).permute(2, 1, 3, 0).reshape(b_in, m, t // b_in * b_out)


def split_outputs(y: Tensor, blocks: int, size: int, interleave: bool) -> Tensor:
    """[m, n] -> [b_out, m, s]"""
    m, n = y.shape
    y = pad(y, (0, blocks * size - n))
    return y.view(m, size, blocks).permute(2, 0, 1) if interleave else y.view(m, blocks, size).transpose(0, 1)


def join_outputs(y: Tensor, n: int, interleave: bool) -> Tensor:
    """[b_out, m, s] -> [m, n]"""
    blocks, m, size = y.shape
    return (y.permute(1, 2, 0) if interleave else y.transpose(0, 1)).reshape(m, blocks * size)[:, :n].contiguous()


# --- references ---

def reference(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, n: int, interleave: bool = True) -> Tensor:
    return reference_training(x, v, u, bias, n, interleave)[0]


def reference_training(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, n: int,
                       interleave: bool = True) -> tuple[Tensor, Tensor]:
    check(x, v, u, bias, n, interleave)
    (b_in, _, p), (b_out, s, _) = v.shape, u.shape
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    h = to_middle(torch.bmm(split_inputs(rows, b_in, p), v.mT), b_out)
    if bias is None:
        y = torch.bmm(h, u.mT)
    else:  # added before the only rounding
        y = torch.baddbmm(split_outputs(bias[None], b_out, s, interleave), h, u.mT)
    return join_outputs(y, n, interleave).view(*x.shape[:-1], n), h


def reference_backward(dy: Tensor, x: Tensor, h: Tensor | None, v: Tensor, u: Tensor, needs: int, n: int, interleave: bool):
    """Bit i of needs: gradient i of (dx, dv, du, db) is wanted, else it comes back empty."""
    check(x, v, u, None, n, interleave, dy=dy, h=h)
    (b_in, _, p), (b_out, s, _) = v.shape, u.shape
    k, rows = x.shape[-1], prod(x.shape[:-1])
    dy = dy.reshape(rows, n)
    blocks_dy = split_outputs(dy, b_out, s, interleave)  # [b_out, m, s]
    blocks_x = split_inputs(x.reshape(rows, k), b_in, p)  # [b_in, m, p]
    dx = dv = du = db = None
    if needs & 0b0011:
        dz = from_middle(torch.bmm(blocks_dy, u), b_in)  # [b_in, m, q]
        dx = join_inputs(torch.bmm(dz, v), k).reshape(x.shape) if needs & 0b0001 else None
        dv = torch.bmm(dz.mT, blocks_x) if needs & 0b0010 else None
    if needs & 0b0100:
        h = to_middle(torch.bmm(blocks_x, v.mT), b_out) if h is None else h
        du = torch.bmm(blocks_dy.mT, h)
    if needs & 0b1000:
        db = dy.sum(0)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in (dx, dv, du, db))


_forward = define("monarch(Tensor x, Tensor v, Tensor u, Tensor? bias, int n, bool interleave) -> Tensor", reference)
_training = define("monarch_training(Tensor x, Tensor v, Tensor u, Tensor? bias, int n, bool interleave)"
                   " -> (Tensor y, Tensor h)", reference_training)
_backward = define("monarch_backward(Tensor dy, Tensor x, Tensor? h, Tensor v, Tensor u, int needs, int n, bool interleave)"
                   " -> (Tensor dx, Tensor dv, Tensor du, Tensor db)", reference_backward, casts=False)
_recorded = differentiable(_forward, _training, _backward, reference=reference_training, read=3, constants=2)


def monarch(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, *, out_features: int | None = None,
            interleave: bool = True) -> Tensor:
    """Multiply by a weight whose b_in x b_out blocks have rank r each, never forming it.

    x [..., k]   v [b_in, b_out r, p]   u [b_out, s, b_in r]   bias [n]   returns [..., n], n = out_features or b_out s
    interleave: output o + b_out j is row j of block o (Monarch); else row o s + j (block-wise low rank).

    Raises ShapeError, DtypeError or DeviceError, naming the argument. Second derivatives raise UnsupportedError, and so do
    tensors that torch cannot route to the op (sparse, sharded)."""
    n = out_features
    try:
        n = u.shape[0] * u.shape[1] if n is None else n
        if torch.compiler.is_compiling():
            return _forward(x, v, u, bias, n, interleave)
        if in_transform():
            return reference(x, v, u, bias, n, interleave)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, v, u, bias)):
            return below_autograd(_forward, x, v, u, bias, n, interleave)
        return _recorded(*autocast(x, v, u, bias), n, interleave)
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        refuse(error, "monarch", check, x, v, u, bias, 0 if n is None else n)
