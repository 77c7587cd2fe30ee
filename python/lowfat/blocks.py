"""Blocks of known models whose low-rank projections of one input run as one call: q/k/v, and gate/up with SwiGLU.

The block's class becomes a subclass of itself that differs in `forward` alone: the projections keep their places, names and
parameters, so that saving, loading and training see the model as it was.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn

from .ops import low_rank_group, low_rank_swiglu
from .structures import LowRank

_QKV, _BERT_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj")


@dataclass
class Blocks:
    """What group_blocks() found, by module name."""
    grouped: dict[str, str] = field(default_factory=dict)  # what runs as one call
    others: dict[str, str] = field(default_factory=dict)  # low-rank projections of one input side by side, and why not


def group_blocks(model: nn.Module) -> Blocks:
    """Makes the blocks of a model compute their low-rank projections of one input in one call; those that it knows.

    Attention of Llama, Mistral, Qwen2, Qwen3, BERT, RoBERTa and ELECTRA, and the gated MLP of the first four. Parameters and
    their names stay; a projection that is replaced or watched by a hook later is called by itself again."""
    blocks = Blocks()
    for name, block in model.named_modules():
        if not _has_factors_of_one_input(block):
            continue
        if (reason := _why_not(block)) is not None:
            blocks.others[name] = reason
            continue
        if _original(type(block)) is None:
            block.__class__ = _grouped(type(block))
        blocks.grouped[name] = ", ".join(_siblings(block))
    return blocks


def ungroup_blocks(model: nn.Module) -> None:
    """Undoes group_blocks(): every block has its own class again."""
    for block in model.modules():
        if (original := _original(type(block))) is not None:
            block.__class__ = original


# --- which blocks ---

def _has_factors_of_one_input(block: nn.Module) -> bool:
    """Whether two of its low-rank layers, or one and a sibling by name, may read the same input."""
    inputs = [layer.in_features for layer in block.children() if isinstance(layer, LowRank)]
    return len(set(inputs)) < len(inputs) or any(isinstance(layer, LowRank) for layer in _members(block))


def _siblings(block: nn.Module) -> tuple[str, ...]:
    """Names of the block's projections of one input, as models call them."""
    return next((names for names in (_QKV, _BERT_QKV, _GATE_UP) if all(name in block._modules for name in names)), ())


def _members(block: nn.Module) -> list[nn.Module]:
    return [block._modules[name] for name in _siblings(block)]


def _why_not(block: nn.Module) -> str | None:
    cls = _original(type(block)) or type(block)
    if cls.__name__ not in _FORWARDS or cls.__module__.partition(".")[0] != "transformers":
        return f"{cls.__name__} is not among the known blocks"
    for name, layer in zip(_siblings(block), _members(block)):
        if not isinstance(layer, LowRank):
            return f"{name} is a {type(layer).__name__}"
    if "act_fn" in block._modules and not _is_silu(block.act_fn):
        return f"its activation is {type(block.act_fn).__name__}, not SiLU"
    return None


def _is_silu(activation: nn.Module) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


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


_FORWARDS = {f"{family}Attention": _attention for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}
_FORWARDS |= {f"{family}SelfAttention": _attention for family in ("Bert", "Roberta", "Electra")}
_FORWARDS |= {f"{family}MLP": _gated_mlp for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}


@cache
def _grouped(cls: type) -> type:
    """The subclass of a block's class, one for all blocks of the class."""
    forward = _FORWARDS[cls.__name__](cls.forward)
    return type(f"Grouped{cls.__name__}", (cls,), {"forward": forward, "_lowfat_original": cls, "__module__": __name__})


def _original(cls: type) -> type | None:
    """What a grouped block was before; None for any other."""
    return cls.__dict__.get("_lowfat_original")
