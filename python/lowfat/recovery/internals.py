"""What a model computes on the way to its answer: the hidden states between its blocks, and its attention scores.

Taken by hooks on the blocks, and where transformers hands queries and keys to an implementation of attention (eager, sdpa):
never from the layers, which may be factorized, or run several as one call."""
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import ArgumentError

_ONE_AT_A_TIME = threading.RLock()  # of the threads: transformers' choice of an attention function is the process's


@dataclass
class Attention:
    """What one layer's attention is computed from."""
    queries: Tensor  # [b, h, t, d]
    keys: Tensor  # [b, groups of heads, t, d]
    scaling: float
    is_causal: bool

    @property
    def heads(self) -> int:
        return self.queries.shape[1]

    def scores(self) -> Tensor:
        """Before mask and softmax, fp32.    [b, h, t, t]"""
        keys = self.keys.float().repeat_interleave(self.heads // self.keys.shape[1], dim=1)
        return self.queries.float() @ keys.mT * self.scaling


@dataclass
class Internals:
    """Of one forward pass, by the number of a layer."""
    hidden: dict[int, Tensor] = field(default_factory=dict)  # [b, t, d]; 0: what enters the first, N: what the head reads
    attention: dict[int, Attention] = field(default_factory=dict)  # from 1, of models that use transformers' interface

    def blank(self) -> "Internals":
        """Of a model that computes zeros."""
        attention = {number: replace(one, queries=torch.zeros_like(one.queries)) for number, one in self.attention.items()}
        return Internals({number: torch.zeros_like(states) for number, states in self.hidden.items()}, attention)


def blocks_of(model) -> nn.ModuleList:
    """The layers of a transformer, in order; ArgumentError for a model that has no list of them."""
    count = getattr(model.config, "num_hidden_layers", None)
    for module in model.base_model.modules():  # outer ones first
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ArgumentError(f"{type(model).__name__} has no list of its {count} layers, whose outputs could be taken")


@contextmanager
def overheard(model) -> Iterator[Internals]:
    """Inside, the model's forward fills in what is yielded. Its outputs, its config and its hooks stay as they are."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    blocks, found = blocks_of(model), Internals()
    owners = {module: number for number, block in enumerate(blocks, 1) for module in block.modules()}

    def enters(_, args, kwargs):
        found.hidden[0] = args[0] if args else kwargs["hidden_states"]

    def leaves(number: int) -> Callable:
        def hook(_, args, y):
            found.hidden[number] = y[0] if isinstance(y, tuple) else y
        return hook

    def ends(_, args, y):  # after the last block there may be a norm
        found.hidden[len(blocks)] = y[0]

    handles = [blocks[0].register_forward_pre_hook(enters, with_kwargs=True), model.base_model.register_forward_hook(ends),
               *(block.register_forward_hook(leaves(number)) for number, block in enumerate(blocks, 1))]
    try:
        with _ONE_AT_A_TIME, _patched(ALL_ATTENTION_FUNCTIONS, owners, found.attention):
            yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _patched(interface, owners: dict[nn.Module, int], found: dict[int, Attention]) -> Iterator[None]:
    """Inside, transformers' choice of an attention function answers with one that also fills in `found`."""
    original, before = interface.get_interface, vars(interface).get("get_interface")

    def get_interface(implementation, default):
        function = original(implementation, default)

        def attend(module, query, key, *args, **kwargs):
            number = owners.get(getattr(module, "_block", module))  # a grouped block passes a stand-in of itself
            if number is not None:
                scaling = kwargs.get("scaling")
                found[number] = Attention(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling,
                                          bool(getattr(module, "is_causal", False)))
            return function(module, query, key, *args, **kwargs)

        return attend

    interface.get_interface = get_interface
    try:
        yield
    finally:
        if before is None:
            del interface.get_interface
        else:
            interface.get_interface = before
