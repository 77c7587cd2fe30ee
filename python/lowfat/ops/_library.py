"""The torch library `lowfat`: how an op is declared, and how it gets its gradient.

A compiled kernel only overrides a device of an op declared here; whatever it does not cover runs the reference."""
import os
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from ..errors import LowfatError, UnsupportedError

_library = torch.library.Library("lowfat", "DEF")  # the registrations live as long as this object

CHECKS_INDICES = os.environ.get("LOWFAT_DEBUG_CHECK") == "1"  # on every call, not only where they are built or loaded
_AUTOCAST = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


def define(schema: str, reference: Callable, *, casts: bool = True) -> OpOverload:
    """Declare an op; its reference serves every device without a kernel, shape inference, and the tests.

    casts: under autocast, floating inputs are cast to its dtype, as for `linear`. False for a backward, which computes in
    the dtype that its forward had."""
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, reference, "CompositeExplicitAutograd")
    op = getattr(torch.ops.lowfat, name).default
    for device, key in _AUTOCAST.items():
        _library.impl(name, _under_autocast(op, device, casts), key.name)
    return op


def _under_autocast(op: OpOverload, device: str, casts: bool) -> Callable:
    off = torch._C.DispatchKeySet(_AUTOCAST["cpu"]) | torch._C.DispatchKeySet(_AUTOCAST["cuda"])

    def kernel(*args):
        with torch._C._ExcludeDispatchKeyGuard(off):  # the reference's own matmuls must not be cast a second time
            return op(*_cast(device, *args)) if casts else op(*args)

    return kernel


def autocast(*inputs):
    """The inputs as autocast wants them, where it is on for their device; a Function's own inputs must be cast before it."""
    device = inputs[0].device.type
    return _cast(device, *inputs) if device in _AUTOCAST and torch.is_autocast_enabled(device) else inputs


def _cast(device: str, *inputs):
    dtype = torch.get_autocast_dtype(device)

    def cast(t):
        if isinstance(t, (list, tuple)):
            return [cast(one) for one in t]
        return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t

    return tuple(map(cast, inputs))  # fp64 stays, as in linear


def below_autograd(op: OpOverload, *args):
    """Call an op where nobody records gradients: 0.4 us, where its autograd kernel takes 5 to find that out."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def in_transform() -> bool:
    """Whether vmap, func.grad or forward-mode AD is at work: these see through plain torch, and not through an op."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_recorded(*inputs) -> bool:
    """Whether somebody differentiates this call, or sees through it: then it must be made of differentiable ops."""
    if in_transform():
        return True
    if not torch.is_grad_enabled():
        return False
    return torch._C._any_requires_grad(*(t for i in inputs for t in (i if isinstance(i, (list, tuple)) else (i,))))


def composite_gradient(op: OpOverload, composition: Callable) -> None:
    """Give an op the gradient of a composition of differentiable ops, which then runs in its place, as under vmap."""
    def kernel(keyset, *inputs):
        if is_recorded(*inputs):
            return composition(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    _library.impl(op._opname, kernel, "Autograd", with_keyset=True)
    _library.impl(op._opname, composition, "FuncTorchBatched")


def count_writes(op: OpOverload) -> None:
    """Tell autograd what an op writes to, so that it refuses to go back through a tensor that was saved before."""
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.is_write]

    def kernel(keyset, *inputs):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *inputs)
        changed = (inputs[i] for i in written)
        torch.autograd.graph.increment_version(tuple(t for t in changed if t is not None and not t.is_inference()))
        return result

    _library.impl(op._opname, kernel, "ADInplaceOrView", with_keyset=True)


def refuse(error: Exception, op: str, check: Callable, *inputs) -> NoReturn:
    """Raise what check finds wrong with these inputs, which an op did not take; else the error that it raised itself."""
    if not isinstance(error, LowfatError):
        check(*inputs)
        if isinstance(error, NotImplementedError):
            raise UnsupportedError(f"{op}: not for these kinds of tensor: {error}") from error
    raise error


def differentiable(forward: OpOverload, training: OpOverload | None, backward: OpOverload, *, reference: Callable, read: int,
                   constants: int = 0, indices: tuple[int, ...] = (), reads_middle: int | None = None) -> Callable:
    """Give an op its gradient; the returned function is the same as the op with less overhead when gradients are recorded.

    forward(*inputs) -> y    training(*inputs) -> (y, h)    backward(dy, x, h, *factors, needs, *constants) -> gradients
    where x, *factors are the first `read` inputs, h may be None, bit i of needs says that the gradient of input i is wanted,
    and constants are the last inputs, which are no tensors and have no default (torch would leave one out). indices: the
    places of index tensors among the inputs; there is no gradient of them, not even an empty one. reads_middle: the input
    whose gradient alone reads h, by default the last factor. training None: an op without a middle, whose backward takes no
    h and whose reference gives y alone.
    """
    reads_middle = max(set(range(read)) - set(indices)) if reads_middle is None else reads_middle

    class Training(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            if training is None:
                outputs, middle = below_autograd(forward, *inputs), ()
            else:
                outputs = y, h = below_autograd(training, *inputs)
                ctx.mark_non_differentiable(h)
                middle = (h if ctx.needs_input_grad[reads_middle] else None,)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(inputs[0], *middle, *inputs[1:read])
            ctx.constants = inputs[len(inputs) - constants:]
            return outputs

        @staticmethod
        def backward(ctx, dy, *_):
            needs = ctx.needs_input_grad
            if dy is None:
                return (None,) * len(needs)
            found = iter(backward(dy, *ctx.saved_tensors, sum(flag << i for i, flag in enumerate(needs)), *ctx.constants))
            gradients = (None if i in indices else next(found, None) for i in range(len(needs)))
            return tuple(gradient if flag else None for gradient, flag in zip(gradients, needs))

    Training.__name__ = Training.__qualname__ = forward._opname

    def gradient_of(op, output):
        def kernel(keyset, *inputs):
            if in_transform():
                return output(reference(*inputs))
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                return output(Training.apply(*inputs))
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

        _library.impl(op._opname, kernel, "Autograd", with_keyset=True)

    torch.library.register_autograd(backward, _refuse_second, lib=_library)
    if training is None:
        gradient_of(forward, lambda y: y)
        return Training.apply
    gradient_of(forward, lambda outputs: outputs[0])
    gradient_of(training, lambda outputs: outputs)
    return lambda *inputs: Training.apply(*inputs)[0]


def _refuse_second(ctx, *_):
    raise UnsupportedError("second derivatives of a lowfat op: use its reference in lowfat.ops, which is plain torch")
