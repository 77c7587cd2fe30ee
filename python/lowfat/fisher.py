"""The empirical Fisher information of weights: the mean over samples of the squared gradient of each sample's own loss.

Squaring the gradient of a batch would estimate something else. A linear layer's gradient is g^T x, so one
backward pass over a batch is enough where inputs x [B, T, k] and output gradients g [B, T, n] are kept: g_b^T x_b is that of
sample b.
"""
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .data import IGNORED
from .errors import ArgumentError, UnsupportedError
from .layers import sizes
from .listen import forward, listening

_SHIFTED = ("ForCausalLM", "ForConditionalGeneration")  # losses of transformers that compare token t with label t + 1
_PER_TOKEN = ("ForMaskedLM", "ForTokenClassification")


@dataclass
class FisherSums:
    """Sums over samples for one layer.   into [k]   out [n]   elements [n, k], or None when only the other two are kept"""
    into: Tensor
    out: Tensor
    elements: Tensor | None
    waiting: int = 0  # calls of the layer whose gradient has not arrived
    arrived: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (x, g) of those whose gradient has

    @classmethod
    def of(cls, module: nn.Module, *, elements: bool) -> "FisherSums":
        (k, n), zeros = sizes(module), lambda *shape: torch.zeros(shape, device=module.weight.device)
        return cls(zeros(k), zeros(n), zeros(n, k) if elements else None)

    def add(self, counts: Tensor, shape: tuple[int, ...], name: str) -> None:
        """Take in one backward pass, whose loss was the sum, not the mean, over all terms of all samples."""
        pairs = [(_by_sample(x, shape, name), _by_sample(g, shape, name)) for x, g in self.arrived]
        self.waiting, self.arrived = 0, []
        for sample, count in enumerate(counts.tolist()):
            if count and pairs:
                with torch.autocast(self.into.device.type, enabled=False):  # it would round products of fp32
                    # a layer that is called more than once has one gradient, the sum over its calls
                    gradient = sum(g[sample].mT.float() @ x[sample].float() for x, g in pairs) / count  # [n, k]
                square = gradient.square_()
                self.into += square.sum(0)
                self.out += square.sum(1)
                if self.elements is not None:
                    self.elements += square

    def means(self, samples: int) -> dict:
        """The fields of Stats."""
        parts = {"fisher_in": self.into, "fisher_out": self.out, "fisher": self.elements}
        return {"samples": samples} | {name: (part / samples).cpu() for name, part in parts.items() if part is not None}


def add_fisher(model: nn.Module, batch: Mapping[str, Tensor], modules: Mapping[str, nn.Module],
               sums: Mapping[str, FisherSums]) -> int:
    """One forward and backward pass over one of the `parts` of a batch; returns how many samples had a loss.

    The model's parameters must not require gradients."""
    shape, counts = batch_shape(batch), label_counts(model, batch)
    if counts is None:
        counts = torch.ones(1)  # whatever the mean is taken over, it is this sample's own

    def after(name: str, x: Tensor, y: Tensor) -> Tensor:
        if not y.requires_grad:  # the first layers: gradients start here; a clone, as a leaf must not be written to in place
            y = y.detach().requires_grad_().clone()
        sums[name].waiting += 1
        y.register_hook(lambda g, x=x.detach(): arrive(name, x, g))
        return y

    def arrive(name: str, x: Tensor, g: Tensor) -> None:
        sums[name].waiting -= 1
        sums[name].arrived.append((x, g))
        if not sums[name].waiting:  # at once, so that no gradient is kept longer than needed
            sums[name].add(counts, shape, name)

    with torch.enable_grad(), listening(modules, after=after):
        loss = getattr(forward(model, batch, labels=True), "loss", None)
        if loss is None:
            raise ArgumentError(f"fisher needs a model with a loss; {type(model).__name__} returned none")
        if counts.any():
            (loss * counts.sum()).backward()
    for name, layer in sums.items():
        layer.add(counts, shape, name)  # calls that no gradient reached have left others waiting
    return int((counts > 0).sum())


def label_counts(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
    """How many terms of the mean that the model returns as its loss belong to each sample.   [B]

    None where that is not known: then only a batch of one sample has a loss that is certainly the sample's own."""
    labels, kind = batch["labels"], getattr(model, "loss_type", None)
    if labels.dim() < 2 or labels.is_floating_point() or labels.shape[1] == 1:
        return torch.ones(batch_shape(batch)[0], dtype=torch.long)
    if kind in _SHIFTED or type(model).__name__.endswith("LMHeadModel"):
        return (labels[:, 1:] != IGNORED).sum(1)
    if kind in _PER_TOKEN:
        return (labels != IGNORED).sum(1)
    return None


def batch_shape(batch: Mapping) -> tuple[int, ...]:
    """(B, T) of a batch of sequences, (B,) of any other."""
    for name in ("input_ids", "attention_mask"):
        if isinstance(batch.get(name), Tensor):
            return tuple(batch[name].shape[:2])
    first = next((value for value in batch.values() if isinstance(value, Tensor) and value.dim()), None)
    if first is None:
        raise ArgumentError(f"batches: a batch holds no tensor; found {', '.join(map(str, batch)) or 'nothing'}")
    return tuple(first.shape[:1])


def parts(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """The batch, or its samples one by one where it is not known how the model's loss is made of theirs."""
    (samples, *_), counts = batch_shape(batch), label_counts(model, batch)
    if counts is not None or samples == 1:
        yield batch
        return
    for sample in range(samples):
        yield {name: value[sample:sample + 1] if isinstance(value, Tensor) and value.shape[:1] == (samples,) else value
               for name, value in batch.items()}


def _by_sample(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """[B, T, features] of a layer's input or gradient."""
    flattened = tensor.dim() == 2 and len(tensor) == torch.Size(shape).numel()
    if shape[0] == 1 or tensor.shape[:len(shape)] == shape or flattened:
        return tensor.reshape(shape[0], -1, tensor.shape[-1])
    raise UnsupportedError(f"{name}: inputs {list(tensor.shape)} cannot be told apart for {shape[0]} samples; "
                           "use batches of one sample for the Fisher information")
