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
from torch.nn.modules.module import _has_any_global_hook

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
    layers followed by an activation or a residual. Parameters and their names stay. A block calls its layers one by one again
    while one of them is replaced, patched or watched by a hook."""
    blocks = Blocks()
    for name, block in model.named_modules():
        if not _has_factors(block):
            continue
        if (reason := _why_not(block)) is not None:
            blocks.others[name] = reason
            continue
        if type(block) is _own(type(block)):
            block.__class__ = _grouped(type(block))
        blocks.grouped[name] = ", ".join(_siblings(block)) + _known(block).then
    return blocks


def ungroup_blocks(model: nn.Module) -> None:
    """Undoes group_blocks(): every block has its own class again. A block that others gave a class of theirs since (FSDP2
    does) keeps it."""
    for block in model.modules():
        own = _own(type(block))
        if own is not type(block) and type(block) is _grouped(own):
            block.__class__ = own


# --- which blocks ---

def _own(cls: type) -> type:
    """The class that a block's model gave it."""
    return getattr(cls, "_lowfat_original", cls)


def _known(block: nn.Module) -> "_Known | None":
    cls = _own(type(block))
    return _KNOWN.get(cls.__name__) if cls.__module__.partition(".")[0] == "transformers" else None


def _has_factors(block: nn.Module) -> bool:
    """Whether it is a known block with a low-rank layer, or two of its low-rank layers may read the same input."""
    inputs = [layer.in_features for layer in block.children() if isinstance(layer, LowRank)]
    return len(set(inputs)) < len(inputs) or any(isinstance(layer, LowRank) for layer in _members(block))


def _siblings(block: nn.Module) -> tuple[str, ...]:
    """Names of the layers that would run in one call; none where a block lacks one of them."""
    known = _known(block)
    several = (_QKV, _BERT_QKV, _GATE_UP) if known is None else (known.layers,)
    return next((names for names in several if all(name in block._modules for name in names)), ())


def _members(block: nn.Module) -> list[nn.Module]:
    return [block._modules[name] for name in _siblings(block)]


def _why_not(block: nn.Module) -> str | None:
    known = _known(block)
    if known is None:
        return f"{_own(type(block)).__name__} is not among the known blocks"
    for name, layer in zip(_siblings(block), _members(block)):
        if type(layer) is not LowRank:
            return f"{name} is a {type(layer).__name__}"
    if known.activation and _activation(block, known) is None:
        return f"its activation is {type(getattr(block, known.activation)).__name__}, which low_rank has not in its place"
    return None


# --- whether one may run as one call, asked at every call ---

_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "ReLU": "relu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh"}


def _activation(block: nn.Module, known: "_Known") -> str | None:
    """low_rank's name of the block's activation, if it has it and the block's call can do it."""
    name = _ACTIVATIONS.get(type(getattr(block, known.activation)).__name__)
    return name if known.forward is not _gated_mlp or name == "silu" else None


def _is_untouched(module: nn.Module) -> bool:
    """Whether calling it is nothing but its class's forward: nobody patched it, and nobody listens."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in module.__dict__


def _can_run(block: nn.Module, *others: nn.Module) -> bool:
    """Whether the layers are low-rank, and they and the others, which the call makes up for, are as the model had them."""
    members = _members(block)
    return (bool(members) and all(type(member) is LowRank and _is_untouched(member) for member in members)
            and all(_is_untouched(other) for other in others if isinstance(other, nn.Module)) and not _has_any_global_hook())


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
        if _activation(self, _known(self)) != "silu" or not _can_run(self, self.act_fn):
            return original(self, x)
        return self.down_proj(low_rank_swiglu(x, *_factors(self)))

    return forward


def _activated(original: Callable) -> Callable:
    def forward(self, hidden_states: Tensor) -> Tensor:
        layer, activation = self.dense, _activation(self, _known(self))
        if activation is None or not _can_run(self, self.intermediate_act_fn):
            return original(self, hidden_states)
        return low_rank(hidden_states, layer.v, layer.u, layer.bias, activation=activation)

    return forward


def _with_residual(original: Callable) -> Callable:
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        layer, has_dropout = self.dense, type(self.dropout) is not nn.Dropout or (self.training and self.dropout.p > 0)
        # dropout would come between the two; and the sum of mixed dtypes is of the wider one, as under autocast
        is_one_dtype = hidden_states.dtype == input_tensor.dtype and not _is_autocast(input_tensor.device.type)
        if has_dropout or not is_one_dtype or not _can_run(self, self.dropout):
            return original(self, hidden_states, input_tensor)
        return self.LayerNorm(low_rank(hidden_states, layer.v, layer.u, layer.bias, residual=input_tensor))

    return forward


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class _Known(NamedTuple):
    layers: tuple[str, ...]  # in one call
    then: str  # what else is done in it
    forward: Callable[[Callable], Callable]  # the block's own forward -> the one to use
    activation: str = ""  # the attribute that holds it, where the call does it


_KNOWN = {f"{family}Attention": _Known(_QKV, "", _attention) for family in _DECODERS}
_KNOWN |= {f"{family}MLP": _Known(_GATE_UP, " with SwiGLU", _gated_mlp, "act_fn") for family in _DECODERS}
_KNOWN |= {f"{family}SelfAttention": _Known(_BERT_QKV, "", _attention) for family in _ENCODERS}
_KNOWN |= {f"{family}Intermediate": _Known(_DENSE, " with its activation", _activated, "intermediate_act_fn")
           for family in _ENCODERS}
_KNOWN |= {f"{family}{part}": _Known(_DENSE, " with the residual", _with_residual) for family in _ENCODERS
           for part in ("SelfOutput", "Output")}


@cache
def _grouped(cls: type) -> type:
    """The subclass of a block's class, one for all blocks of the class. It is pickled by the name of that class."""
    def reduced(self, protocol):
        _, _, *state = super(made, self).__reduce_ex__(protocol)
        return _new, (cls,), *state

    forward = _KNOWN[cls.__name__].forward(cls.forward)
    made = type(f"Grouped{cls.__name__}", (cls,), {"forward": forward, "__reduce_ex__": reduced, "_lowfat_original": cls,
                                                   "__module__": __name__})
    return made


def _new(cls: type) -> nn.Module:
    return _grouped(cls).__new__(_grouped(cls))
