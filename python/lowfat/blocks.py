"""Blocks of known models whose low-rank layers run in fewer calls: q/k/v in one, gate/up with SwiGLU, a layer of BERT with the
activation or the residual that follows it.

The block's class becomes a subclass of itself that differs in `forward` alone: the projections keep their places, names and
parameters, so that saving, loading and training see the model as it was.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops import low_rank, low_rank_group, low_rank_swiglu
from .structures import LowRank

_DECODERS, _ENCODERS = ("Llama", "Mistral", "Qwen2", "Qwen3"), ("Bert", "Roberta", "Electra")
_QKV, _BERT_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj")
_DENSE = ("dense",)


@dataclass
class Blocks:
    """What group_blocks() found, by module name."""
    grouped: dict[str, str] = field(default_factory=dict)  # what runs as one call
    others: dict[str, str] = field(default_factory=dict)  # low-rank projections of one input side by side, and why not


def group_blocks(model: nn.Module) -> Blocks:
    """Makes the blocks of a model compute what follows from one input in one call, where their layers are low-rank.

    Attention of Llama, Mistral, Qwen2, Qwen3, BERT, RoBERTa and ELECTRA; the gated MLP of the first four; of the others the
    layers followed by an activation or a residual. Parameters and their names stay; a layer that is replaced or watched by a
    hook later is called by itself again."""
    blocks = Blocks()
    for name, block in model.named_modules():
        if not _has_factors(block):
            continue
        if (reason := _why_not(block)) is not None:
            blocks.others[name] = reason
            continue
        block.__class__ = _grouped(_own(type(block)))
        blocks.grouped[name] = ", ".join(_siblings(block)) + _KNOWN[_own(type(block)).__name__].then
    return blocks


def ungroup_blocks(model: nn.Module) -> None:
    """Undoes group_blocks(): every block has its own class again."""
    for block in model.modules():
        if (own := _own(type(block))) is not type(block):
            block.__class__ = own


# --- which blocks ---

def _own(cls: type) -> type:
    """The class that a block's model gave it."""
    return cls.__dict__.get("_lowfat_original", cls)


def _has_factors(block: nn.Module) -> bool:
    """Whether it is a known block with a low-rank layer, or two of its low-rank layers may read the same input."""
    inputs = [layer.in_features for layer in block.children() if isinstance(layer, LowRank)]
    return len(set(inputs)) < len(inputs) or any(isinstance(layer, LowRank) for layer in _members(block))


def _siblings(block: nn.Module) -> tuple[str, ...]:
    """Names of the layers that would run in one call."""
    if (known := _KNOWN.get(_own(type(block)).__name__)) is not None:
        return known.layers
    return next((names for names in (_QKV, _BERT_QKV, _GATE_UP) if all(name in block._modules for name in names)), ())


def _members(block: nn.Module) -> list[nn.Module]:
    return [block._modules[name] for name in _siblings(block)]


def _why_not(block: nn.Module) -> str | None:
    cls = _own(type(block))
    if cls.__name__ not in _KNOWN or cls.__module__.partition(".")[0] != "transformers":
        return f"{cls.__name__} is not among the known blocks"
    for name, layer in zip(_siblings(block), _members(block)):
        if not isinstance(layer, LowRank):
            return f"{name} is a {type(layer).__name__}"
    if "act_fn" in block._modules and _activation(block.act_fn) != "silu":
        return f"its activation is {type(block.act_fn).__name__}, not SiLU"
    if hasattr(block, "intermediate_act_fn") and _activation(block.intermediate_act_fn) is None:
        return f"its activation, {type(block.intermediate_act_fn).__name__}, is none of low_rank's"
    return None


_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "ReLU": "relu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh"}


def _activation(module: Callable) -> str | None:
    """low_rank's name of an activation of transformers."""
    return _ACTIVATIONS.get(type(module).__name__)


def _can_run(block: nn.Module) -> bool:
    """Whether nothing has come between since: another layer in a projection's place, or a hook that wants to see its call."""
    return all(type(member) is LowRank and not member._forward_hooks and not member._forward_pre_hooks
               for member in _members(block))


def _factors(block: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    members = _members(block)
    return [m.v for m in members], [m.u for m in members], [m.bias for m in members]


# --- what they do ---

class _Projected:
    """An attention block for the length of one call, its projections of x computed already."""

    def __init__(self, block: nn.Module, x: Tensor, outputs: dict[str, Tensor]):
        self._block, self._x, self._outputs = block, x, outputs

    def __getattr__(self, name: str) -> Any:
        if name not in self._outputs:
            return getattr(self._block, name)
        return lambda x: self._outputs[name] if x is self._x else self._block._modules[name](x)


def _attention(original: Callable) -> Callable:
    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if not _can_run(self):
            return original(self, hidden_states, *args, **kwargs)
        outputs = dict(zip(_siblings(self), low_rank_group(hidden_states, *_factors(self))))
        return original(_Projected(self, hidden_states, outputs), hidden_states, *args, **kwargs)

    return forward


def _gated_mlp(original: Callable) -> Callable:
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(low_rank_swiglu(x, *_factors(self))) if _can_run(self) else original(self, x)

    return forward


def _activated(original: Callable) -> Callable:
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _can_run(self):
            return original(self, hidden_states)
        layer = self.dense
        return low_rank(hidden_states, layer.v, layer.u, layer.bias, activation=_activation(self.intermediate_act_fn))

    return forward


def _with_residual(original: Callable) -> Callable:
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        layer, has_dropout = self.dense, self.training and self.dropout.p > 0
        # dropout would come between the two; and the sum of mixed dtypes is of the wider one, as under autocast
        is_one_dtype = hidden_states.dtype == input_tensor.dtype and not torch.is_autocast_enabled(input_tensor.device.type)
        if has_dropout or not is_one_dtype or not _can_run(self):
            return original(self, hidden_states, input_tensor)
        return self.LayerNorm(low_rank(hidden_states, layer.v, layer.u, layer.bias, residual=input_tensor))

    return forward


class _Known(NamedTuple):
    layers: tuple[str, ...]  # in one call
    then: str  # what else is done in it
    forward: Callable[[Callable], Callable]  # the block's own forward -> the one to use


_KNOWN = {f"{family}Attention": _Known(_QKV, "", _attention) for family in _DECODERS}
_KNOWN |= {f"{family}MLP": _Known(_GATE_UP, " with SwiGLU", _gated_mlp) for family in _DECODERS}
_KNOWN |= {f"{family}SelfAttention": _Known(_BERT_QKV, "", _attention) for family in _ENCODERS}
_KNOWN |= {f"{family}Intermediate": _Known(_DENSE, " with its activation", _activated) for family in _ENCODERS}
_KNOWN |= {f"{family}{part}": _Known(_DENSE, " with the residual", _with_residual) for family in _ENCODERS
           for part in ("SelfOutput", "Output")}


@cache
def _grouped(cls: type) -> type:
    """The subclass of a block's class, one for all blocks of the class."""
    forward = _KNOWN[cls.__name__].forward(cls.forward)
    return type(f"Grouped{cls.__name__}", (cls,), {"forward": forward, "_lowfat_original": cls, "__module__": __name__})
