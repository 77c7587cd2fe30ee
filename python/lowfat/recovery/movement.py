"""Pruning while training: scores say which weights stay, the largest of them do, and the share that stays falls as a cubic.

movement (Sanh et al. 2005.07683): S takes part in y = x (W * M)^T only through its mask M = TopK(S), and learns straight
through it, dS = g * W with g = dL/d(W * M), so it grows with -g w: what moves away from zero stays. sensitivity (Molchanov et
al. 2019, 1906.10771): S is the moving average of |g * W|, what the loss would change by to first order; from the first step
on it knows something, where movement's sums are of noise for some hundred steps. magnitude, of zero order: S = |W|.
Imported inside functions only, because it brings transformers."""
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import TrainerCallback

from ..errors import ArgumentError
from ..layers import dense_weight, is_conv1d, sizes

NAME = "score"  # of the parameter that a layer has while it is pruned
PATTERNS, SCOPES = ("element", "block:SIZE", "row", "column"), ("matrix", "global")
CRITERIA = ("movement", "sensitivity", "magnitude")
_MEMORY = 0.9  # share of the moving average that a step leaves


class _Masked(torch.autograd.Function):
    """W * M. Backward: dW = g * M, and for the scores of blocks of weights the sums of g * W over them.

    weight [n, k]   score, kept: one of each block   block (rows, columns)   seen: gets the sums of |g * W|, or None"""

    @staticmethod
    def forward(ctx, weight: Tensor, score: Tensor | None, kept: Tensor, block: tuple[int, int], seen: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, kept)
        ctx.block, ctx.seen = block, seen
        return weight * expanded(kept, block, weight.shape)

    @staticmethod
    def backward(ctx, g: Tensor):
        weight, kept = ctx.saved_tensors
        dw = g * expanded(kept, ctx.block, weight.shape) if ctx.needs_input_grad[0] else None
        if ctx.seen is not None:
            ctx.seen.add_(summed((g * weight).abs(), ctx.block))
        return dw, summed(g * weight, ctx.block) if ctx.needs_input_grad[1] else None, None, None, None


class Movement:
    """The masks of some layers of a model, each nn.Linear or Conv1D, which compute with W * M until remove().

    pattern: what has one score and stays or goes as a whole: an element, block:32 (32 x 32 weights, fewer at the edges), a
    row (an output) or a column (an input). scope: whether the share `keep` of them is taken in each matrix, at least one, or
    of all together. criterion: what a score is; of magnitude the root mean square of a block's weights.

    Scores [blocks down, blocks across], 0 at the start, are parameters named `score`, of sensitivity buffers, which no
    optimizer moves; masks follow from them whenever `keep` is set, so that a training state needs no masks. ArgumentError for
    a pattern, scope, criterion or keep that there is not."""

    def __init__(self, layers: Mapping[str, nn.Module], *, pattern: str = "element", scope: str = "matrix",
                 criterion: str = "movement"):
        size = _block_of(pattern)
        if criterion not in CRITERIA:
            raise ArgumentError(f"criterion is {criterion!r}; needs one of {', '.join(CRITERIA)}")
        if scope not in SCOPES:
            raise ArgumentError(f"scope is {scope!r}; needs one of {', '.join(SCOPES)}")
        if not layers:
            raise ArgumentError("layers: nothing to prune")
        self.layers, self.pattern, self.scope, self.criterion = dict(layers), pattern, scope, criterion
        self.blocks, self._kept, self._seen = {}, {}, {}
        for name, layer in self.layers.items():
            k, n = sizes(layer)
            down, across = self.blocks[name] = {"row": (1, k), "column": (n, 1)}.get(pattern, (min(size, n), min(size, k)))
            weight = layer.weight
            score = torch.zeros(-(-n // down), -(-k // across), device=weight.device, dtype=weight.dtype)
            if criterion == "movement":
                layer.register_parameter(NAME, nn.Parameter(score))
            elif criterion == "sensitivity":
                layer.register_buffer(NAME, score)
                self._seen[name] = torch.zeros_like(score)
            layer.forward = partial(self._forward, name)
        self.keep = 1.0

    @property
    def keep(self) -> float:
        """The share that stays; to set it is to choose anew which."""
        return self._keep

    @keep.setter
    @torch.no_grad()
    def keep(self, share: float) -> None:
        check_keep(share)
        self._keep, scores = share, self.scores()
        if self.scope == "matrix":
            self._kept = {name: _largest(score, share) for name, score in scores.items()}
        else:
            whole = _largest(torch.cat([score.flatten() for score in scores.values()]), share)
            parts = whole.split([score.numel() for score in scores.values()])
            self._kept = {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts)}

    def scores(self) -> dict[str, Tensor]:
        """Of every layer, one of each block."""
        if self.criterion != "magnitude":
            return {name: layer.score.detach() for name, layer in self.layers.items()}
        return {name: _root_mean_squares(dense_weight(layer), self.blocks[name]) for name, layer in self.layers.items()}

    @torch.no_grad()
    def collect(self, step: int) -> None:
        """Moves the averages on by what the backward passes of a step, the first is 0, have left: their mean at first."""
        for name, seen in self._seen.items():
            self.layers[name].score.lerp_(seen, max(1 - _MEMORY, 1 / (step + 1)))
            seen.zero_()

    def masks(self) -> dict[str, Tensor]:
        """Of every layer, True where its weight stays.   [n, k]"""
        return {name: expanded(kept, self.blocks[name], dense_weight(self.layers[name]).shape)
                for name, kept in self._kept.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Writes W * M in the place of every W."""
        for name, mask in self.masks().items():
            dense_weight(self.layers[name]).masked_fill_(~mask, 0)

    def remove(self) -> None:
        """The layers are as they were, but for what their weights have learned."""
        for layer in self.layers.values():
            layer.__dict__.pop("forward", None)
            layer._parameters.pop(NAME, None)
            layer._buffers.pop(NAME, None)

    def _forward(self, name: str, x: Tensor) -> Tensor:
        layer = self.layers[name]
        weight = layer.weight.mT if is_conv1d(layer) else layer.weight
        score = layer._parameters.get(NAME)
        masked = _Masked.apply(weight, score, self._kept[name], self.blocks[name], self._seen.get(name))
        return linear(x, masked, layer.bias)


class Pruning(TrainerCallback):
    """Before every step the masks of cubic(step, start, end, final), and how much they keep beside the losses."""

    def __init__(self, movement: Movement, *, start: int, end: int, final: float):
        self.movement, self.schedule = movement, partial(cubic, start=start, end=end, final=final)

    def on_step_begin(self, args, state, control, **kwargs):
        self.movement.keep = self.schedule(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.movement.collect(state.global_step - 1)
        if state.global_step % args.logging_steps == 0:
            state.log_history.append({"step": state.global_step, "kept": self.movement.keep})


def cubic(step: int, start: int, end: int, final: float) -> float:
    """The share that stays: 1 until start, `final` from end on, and v + (1 - v)(1 - t)^3 in between (Zhu and Gupta 2017)."""
    if step < start:
        return 1.0
    return final if step >= end else final + (1 - final) * (1 - (step - start) / (end - start)) ** 3


def check_keep(keep: float) -> None:
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ArgumentError(f"keep is {keep!r}; needs a number above 0, at most 1")


def expanded(blocks: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """What each block has, for each of its elements.   [n, k]"""
    (down, across), (n, k) = block, shape
    if block == (1, 1):
        return blocks
    return blocks.repeat_interleave(down, 0)[:n].repeat_interleave(across, 1)[:, :k]


def summed(elements: Tensor, block: tuple[int, int]) -> Tensor:
    """The sums over blocks of a matrix [n, k], those at the edges smaller."""
    (down, across), (n, k) = block, elements.shape
    if block == (1, 1):
        return elements
    return pad(elements, (0, -k % across, 0, -n % down)).unflatten(1, (-1, across)).unflatten(0, (-1, down)).sum((1, 3))


def _root_mean_squares(weight: Tensor, block: tuple[int, int]) -> Tensor:
    if block == (1, 1):
        return weight.abs()
    return (summed(weight.square(), block) / summed(torch.ones_like(weight), block)).sqrt()


def _largest(scores: Tensor, share: float) -> Tensor:
    """True at exactly round(share * all) of the scores, at least one."""
    count = max(1, round(share * scores.numel()))
    kept = torch.full_like(scores, count == scores.numel(), dtype=torch.bool)
    if count < scores.numel():
        kept.view(-1)[scores.reshape(-1).topk(count, sorted=False).indices] = True
    return kept


def _block_of(pattern: str) -> int:
    """The side of a block: 1 of an element, and where rows or columns say it."""
    if pattern in ("element", "row", "column"):
        return 1
    word, _, size = str(pattern).partition(":")
    if word != "block" or not size.isdecimal() or int(size) < 1:
        raise ArgumentError(f"pattern is {pattern!r}; needs one of {', '.join(PATTERNS)}, as block:32")
    return int(size)
