"""The ways to call an op, each seen as low_rank(x, v, u, bias), and the errors that each promises."""
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from lowfat.errors import LowfatError
from lowfat.ops import low_rank as public_low_rank
from lowfat.ops import (dictionary, low_rank_group, low_rank_pivoted, low_rank_sparse, low_rank_swiglu, monarch,
                        sparse24, wavelet)
from lowfat.ops.bitmap import pack
from lowfat.ops.dwt import FILTERS

FILTERS["lazy"] = (1.0, 0.0)  # even and odd features as they are: the one transform without a rounding


@dataclass
class Caller:
    """One way to call an op; `named` where Python is the door and names every mistake, else C++ may say it in its words."""
    call: Callable[..., Tensor]
    named: bool
    words: tuple[str, str] = ("", "")  # what this op says, and what low_rank would
    has_gradient: bool = True
    gradient_is_ours: bool = True  # and not torch's own, whose backward follows the autocast that it runs in
    framework: Callable[..., Tensor] = lambda x, v, u, bias=None: linear(linear(x, v), u, bias)  # torch's own chain

    def __call__(self, *args) -> Tensor:
        return self.call(*args)

    @contextmanager
    def refuses(self, error: type[Exception], text: str) -> Iterator[None]:
        try:
            yield
        except error as found:
            said = str(found).replace("[0]", "").replace("[1]", "").replace(*self.words)  # numbers: a member of a group
            assert text in said, f"{text!r} not in {found}"
            assert "low_rank" in said and (not self.named or isinstance(found, LowfatError)), repr(found)
        except (RuntimeError, TypeError) as found:
            assert not self.named, f"{error.__name__} was promised, found {found!r}"
        else:
            raise AssertionError(f"{error.__name__} was promised, nothing was raised")


CALLERS = {
    "low_rank": Caller(public_low_rank, named=True),
    "torch.ops.lowfat.low_rank": Caller(torch.ops.lowfat.low_rank, named=False),
    "torch.ops.lowfat.low_rank_training": Caller(lambda *args: torch.ops.lowfat.low_rank_training(*args)[0], named=False),
    "torch.ops.lowfat.low_rank_backward": Caller(lambda *args: through_backward(*args), named=False,
                                                 framework=lambda *args: product_and_bias(*args)),
    "torch.ops.lowfat.low_rank_backward_into": Caller(lambda *args: through_backward(*args, into=True), named=False,
                                                      framework=lambda *args: product_and_bias(*args), has_gradient=False),
    "torch.ops.lowfat.low_rank_epilogue": Caller(lambda *args: through_epilogue(*args), named=False),
    "low_rank_group": Caller(lambda *args: through_group(low_rank_group, *args), named=True),
    "torch.ops.lowfat.low_rank_group": Caller(lambda *args: through_group(torch.ops.lowfat.low_rank_group, *args),
                                              named=False),
    "low_rank_swiglu": Caller(lambda *args: through_swiglu(low_rank_swiglu, *args), named=True),
    "torch.ops.lowfat.low_rank_swiglu": Caller(lambda *args: through_swiglu(torch.ops.lowfat.low_rank_swiglu, *args),
                                               named=False),
    "low_rank_pivoted": Caller(lambda *args: through_pivoted(low_rank_pivoted, *args), named=False, words=(": c ", ": u "),
                               framework=lambda *args: product_and_bias(*args), gradient_is_ours=False),
    "torch.ops.lowfat.low_rank_pivoted": Caller(lambda *args: through_pivoted(torch.ops.lowfat.low_rank_pivoted, *args),
                                                named=False, words=(": c ", ": u "),
                                                framework=lambda *args: product_and_bias(*args), gradient_is_ours=False),
    "monarch": Caller(lambda *args: through_monarch(public_monarch, *args), named=False, words=("monarch", "low_rank")),
    "torch.ops.lowfat.monarch": Caller(lambda *args: through_monarch(torch.ops.lowfat.monarch, *args), named=False,
                                       words=("monarch", "low_rank")),
    "torch.ops.lowfat.monarch_training": Caller(
        lambda *args: through_monarch(lambda *a: torch.ops.lowfat.monarch_training(*a)[0], *args), named=False,
        words=("monarch", "low_rank")),
    "torch.ops.lowfat.monarch_backward": Caller(lambda *args: through_backward(*args, op=monarch_gradients), named=False,
                                                words=("monarch", "low_rank"),
                                                framework=lambda *args: product_and_bias(*args)),
    "sparse24": Caller(lambda *args: through_sparse24(every_one(public_sparse24), *args), named=False),
    "torch.ops.lowfat.sparse24": Caller(lambda *args: through_sparse24(two_of_four(torch.ops.lowfat.sparse24), *args),
                                        named=False),
    "torch.ops.lowfat.sparse24_backward": Caller(
        lambda *args: through_sparse24(every_one(sparse24_gradient), *args), named=False,
        framework=lambda *args: rows_times_columns(*args)),
    "dictionary": Caller(lambda *args: through_dictionary(dictionary, every_place, *args), named=False),
    "torch.ops.lowfat.dictionary": Caller(lambda *args: through_dictionary(torch.ops.lowfat.dictionary, every_bit, *args),
                                          named=False),
    "torch.ops.lowfat.dictionary_training": Caller(
        lambda *args: through_dictionary(lambda *a: torch.ops.lowfat.dictionary_training(*a)[0], every_place, *args),
        named=False),
    "torch.ops.lowfat.dictionary_backward": Caller(
        lambda *args: through_backward(*args, op=dictionary_gradients), named=False, words=("dictionary", "low_rank"),
        framework=lambda *args: product_and_bias(*args)),
    "low_rank_sparse": Caller(lambda *args: through_low_rank_sparse(public_low_rank_sparse, *args), named=True),
    "torch.ops.lowfat.low_rank_sparse": Caller(
        lambda *args: through_sparse24(every_entry(torch.ops.lowfat.low_rank_sparse), *args), named=False),
    "torch.ops.lowfat.low_rank_sparse_training": Caller(
        lambda *args: through_low_rank_sparse(lambda *a: torch.ops.lowfat.low_rank_sparse_training(*a)[0], *args),
        named=False),
    "torch.ops.lowfat.low_rank_sparse_backward": Caller(
        lambda *args: through_backward(*args, op=low_rank_sparse_gradients), named=False,
        framework=lambda *args: rows_times_columns(*args)),
    "wavelet": Caller(lambda *args: through_wavelet(public_wavelet, *args), named=False,
                      framework=lambda *args: product_and_bias(*args)),
    "torch.ops.lowfat.wavelet": Caller(lambda *args: through_wavelet(torch.ops.lowfat.wavelet, *args), named=False,
                                       framework=lambda *args: product_and_bias(*args)),
    "torch.ops.lowfat.wavelet_training": Caller(
        lambda *args: through_wavelet(lambda *a: torch.ops.lowfat.wavelet_training(*a)[0], *args), named=False,
        framework=lambda *args: product_and_bias(*args)),
    "torch.ops.lowfat.wavelet_backward": Caller(
        lambda *args: through_backward(*args, op=wavelet_gradients), named=False, words=("wavelet", "low_rank"),
        framework=lambda *args: product_and_bias(*args)),
}


def product_and_bias(x, v, u, bias=None):
    """Torch's own chain where the bias is added outside, and rounds once more."""
    return linear(linear(x, v), u) + (0 if bias is None else bias)


def rows_times_columns(x, v, u, bias=None):
    """The same, by the products of a gradient: its weights transposed in memory."""
    return x @ v.T.contiguous() @ u.T.contiguous() + (0 if bias is None else bias)


def through_epilogue(x, v, u, bias=None):
    """With a residual of zeros."""
    has_sizes = isinstance(x, Tensor) and isinstance(u, Tensor) and x.dim() and u.dim()
    residual = torch.zeros_like(x[..., :1]).expand(*x.shape[:-1], u.shape[0]) if has_sizes and x.shape[-1] else None
    return torch.ops.lowfat.low_rank_epilogue(x, v, u, bias, "none", residual)


def through_group(op, x, v, u, bias=None):
    """A member of two."""
    return op(x, [v, v], [u, u], [bias, bias])[0]


def through_swiglu(op, x, v, u, bias=None):
    """With a gate that is 64 everywhere: so is its silu, in every dtype."""
    gate = (torch.zeros_like(v), torch.zeros_like(u)) if isinstance(v, Tensor) and isinstance(u, Tensor) else (v, u)
    constant = u.new_full(u.shape[:1], 64) if isinstance(u, Tensor) else None
    return op(x, [gate[0], v], [gate[1], u], [constant, bias]) / 64


def through_pivoted(op, x, v, u, bias=None):
    """The columns that are no pivots, u being c."""
    if not isinstance(v, Tensor) or not isinstance(u, Tensor) or not v.dim() or not u.dim():
        return op(x, v, u, torch.arange(2), bias)
    r, n = v.shape[0], v.shape[0] + u.shape[0]
    pivots = torch.arange(r, device=v.device) * n // max(r, 1)
    rest = torch.tensor(sorted({*range(n)} - {i * n // r for i in range(r)}), dtype=torch.int64, device=v.device)
    if isinstance(bias, Tensor):
        bias = bias.new_zeros(n).scatter(0, rest.to(bias.device), bias)
    return op(x, v, u, pivots, bias).index_select(-1, rest)


def through_monarch(op, x, v, u, bias=None):
    """One block, which is all of the matrix."""
    if not isinstance(v, Tensor) or not isinstance(u, Tensor) or not u.dim():
        return op(x, v, u, bias, 1, True)
    return op(x, v[None], u[None], bias, u.shape[0], True)


def public_monarch(x, v, u, bias, n, interleave):
    return monarch(x, v, u, bias, out_features=n, interleave=interleave)


def monarch_gradients(dy, x, h, v, u, needs):
    """Those of one block."""
    return torch.ops.lowfat.monarch_backward(dy, x, h, v[None], u[None], needs, dy.shape[-1] if dy.dim() else 1, True)


@contextmanager
def renamed(**words: str) -> Iterator[None]:
    """An error of ours in the words of low_rank."""
    try:
        yield
    except LowfatError as error:
        said = str(error)
        for word, due in words.items():
            said = re.sub(rf"\b{word}\b", due, said)
        raise type(error)(said) from error


def through_sparse24(product: Callable, x, v, u, bias=None):
    """One product after the other."""
    with renamed(sparse24="low_rank", values="v"):
        h = product(x, v, None)
    with renamed(sparse24="low_rank", values="u"):
        return product(h, u, bias)


def public_sparse24(x, values, mask, bias, kept, group):
    return sparse24(x, values, mask, bias, kept=kept, group=group)


def every_one(op: Callable) -> Callable:
    """A product whose weight keeps one of every one input."""
    def product(x, weight, bias):
        return op(x, weight, every_bit(weight), bias, 1, 1)

    return product


def two_of_four(op: Callable) -> Callable:
    """A product with zeros among the inputs, so that its weight keeps two of every four."""
    def product(x, weight, bias):
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or not x.dim() or weight.dim() != 2:
            return op(x, weight, every_bit(weight), bias, 1, 1)

        def even(t):
            return pad(t, (0, t.shape[-1] % 2))

        groups = -(-x.shape[-1] // 2)
        wide = pad(even(x).unflatten(-1, (groups, 2)), (1, 1)).flatten(-2)
        kept = torch.tensor([False, True, True, False], device=x.device).repeat(weight.shape[0], groups)
        return op(wide, even(weight), pack(kept), bias, 2, 4)

    return product


def sparse24_gradient(dy, weight, mask, bias, kept, group):
    """The gradient of x for the transposed weight is a product with the weight."""
    both = isinstance(dy, Tensor) and isinstance(weight, Tensor)
    transposed = weight.mT if both and weight.dim() == 2 else weight
    x = dy.new_zeros((*dy.shape[:-1], *weight.shape[:1])) if both and dy.dim() else dy
    dx, *_ = torch.ops.lowfat.sparse24_backward(dy, x, transposed, every_bit(transposed), 1, kept, group)
    return dx if bias is None else dx + bias


def every_bit(values, _=None) -> Tensor:
    """The bitmap of rows that keep all."""
    if not isinstance(values, Tensor) or values.dim() != 2:
        return torch.zeros(1, 1, dtype=torch.int32)
    return pack(torch.ones(values.shape, dtype=torch.bool, device=values.device))


def every_place(values, d) -> Tensor:
    """The positions of rows that keep all."""
    if not isinstance(values, Tensor) or not isinstance(d, Tensor) or values.dim() != 2:
        return torch.zeros(1, 1, dtype=torch.int16)
    return torch.arange(d.shape[0], dtype=torch.int16, device=values.device).expand(len(values), -1)


def through_dictionary(op: Callable, support: Callable, x, v, u, bias=None):
    """One block, all of whose atoms are kept."""
    with renamed(dictionary="low_rank", d="v", values="u"):
        return op(x, v[None, None] if isinstance(v, Tensor) else v, u, support(u, v), bias)


def dictionary_gradients(dy, x, h, v, u, needs):
    return torch.ops.lowfat.dictionary_backward(dy, x, h, v[None, None], u, every_bit(u), needs)


def through_low_rank_sparse(op: Callable, x, v, u, bias=None):
    """Without a sparse part."""
    return op(x, v, u, *no_entries(u), bias, 1.0)


def public_low_rank_sparse(*args):
    return low_rank_sparse(*args[:7], scale=args[7])


def low_rank_sparse_gradients(dy, x, h, v, u, needs):
    return torch.ops.lowfat.low_rank_sparse_backward(dy, x, h, v, u, *no_entries(u), needs, 1.0)


def no_entries(u):
    """values, starts, columns"""
    u = u if isinstance(u, Tensor) and u.dim() else torch.zeros(1)
    return u.new_zeros(0), u.new_zeros(u.shape[0] + 1, dtype=torch.int32), u.new_zeros(0, dtype=torch.int16)


def every_entry(op: Callable) -> Callable:
    """A product whose sparse part is all of the weight, beside a low-rank part of rank 0."""
    def product(x, weight, bias):
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            return op(x, torch.zeros(0, 0), torch.zeros(0, 0), weight, *no_entries(weight)[1:], bias, 1.0)
        n, k = weight.shape
        starts = torch.arange(n + 1, dtype=torch.int32, device=weight.device) * k
        columns = torch.arange(k, dtype=torch.int16, device=weight.device).repeat(n)
        return op(x, weight.new_zeros(0, k), weight.new_zeros(n, 0), weight.flatten(), starts, columns, bias, 1.0)

    return product


LOW = "lazy", 1, "LL"  # between the even features alone


def twice_as_wide(t):
    """With a zero behind every feature."""
    return pad(t[..., None], (0, 1)).flatten(-2) if isinstance(t, Tensor) and t.dim() else t


def through_wavelet(op: Callable, x, v, u, bias=None):
    """Between the even features, the odd ones being zero."""
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError("bias is no tensor")
    with renamed(wavelet="low_rank"):
        n = 2 * u.shape[0] if isinstance(u, Tensor) and u.dim() else 2
        y = op(twice_as_wide(x), v, None, u, *LOW, n, 1.0)[..., ::2]
        return y if bias is None else y + bias.to(y.dtype)


def public_wavelet(x, v, gain, u, filter, levels, subbands, n, scale):
    return wavelet(x, v, u, gain, out_features=n, filter=filter, levels=levels, subbands=subbands, scale=scale)


def wavelet_gradients(dy, x, h, v, u, needs):
    """That of the even features."""
    n = 2 * dy.shape[-1] if dy.dim() else 2
    dx, *others = torch.ops.lowfat.wavelet_backward(twice_as_wide(dy), twice_as_wide(x), h, v, None, u, needs, *LOW, n, 1.0)
    return dx[..., ::2], *others


def through_backward(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, into: bool = False,
                     op: Callable = torch.ops.lowfat.low_rank_backward) -> Tensor:
    """The backward op seen as a forward: the gradient of x for u -> v^T, v -> u^T is x v^T u^T."""
    for name, t in (("x", x), ("v", v), ("u", u)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is no tensor")
    y = x.new_zeros((*x.shape[:-1], u.shape[0])) if x.dim() else x  # only its shape matters
    given = (x, y, None, u.mT if u.dim() == 2 else u, v.mT if v.dim() == 2 else v)
    if into:
        with torch.no_grad():
            dx = torch.ops.lowfat.low_rank_backward_into(*given, None, None, None, True)
    else:
        dx, *_ = op(*given, 1)
    return dx if bias is None else dx + bias


def framework(x, v, u, bias=None):
    return linear(linear(x, v), u, bias)
