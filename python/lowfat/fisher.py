"""The empirical Fisher information of weights: the mean over samples of the squared gradient of each sample's own loss.

Squaring the gradient of a batch would estimate something else. A linear layer's gradient is g^T x, so one
backward pass over a batch is enough where inputs x [B, T, k] and output gradients g [B, T, n] are kept: g_b^T x_b is that of
sample b.

For Kronecker factors, F ~ C_x (x) C_g (KFAC), C_g = sum of g g^T is kept over tokens, as KFAC-SVD does: each token's norm
within a tenth and ten times the mean of its sample's, and the first and last eighth of a text left out, which in language
models have gradients of another kind. Where a text has one label, that is read at one of its ends, and all of it counts.
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
_NORMS = 0.1, 10.0  # of the mean norm of a sample's tokens: between these the norms are kept
_ENDS = 8  # one part in so many is left out at each end of a text


@dataclass
class FisherSums:
    """Sums over samples for one layer.   into [k]   out [n]   elements [n, k] and gram_out [n, n], where they are wanted"""
    into: Tensor
    out: Tensor
    elements: Tensor | None
    gram_out: Tensor | None = None
    waiting: int = 0  # calls of the layer whose gradient has not arrived
    arrived: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (x, g) of those whose gradient has

    @classmethod
    def of(cls, module: nn.Module, *, elements: bool = False, gram_out: torch.dtype | None = None) -> "FisherSums":
        """Zeros; gram_out: the dtype of that sum, where it is wanted."""
        (k, n), zeros = sizes(module), lambda *shape: torch.zeros(shape, device=module.weight.device)
        return cls(zeros(k), zeros(n), zeros(n, k) if elements else None,
                   None if gram_out is None else zeros(n, n).to(gram_out))

    def add(self, counts: Tensor, shape: tuple[int, ...], name: str, inner: Tensor | None = None) -> None:
        """Take in one backward pass, whose loss was the sum, not the mean, over all terms of all samples.

        inner: the tokens whose gradients go into gram_out, by default all.   bool [B, T]"""
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
                if self.gram_out is not None:
                    for _, g in pairs:
                        self._add_tokens(g[sample], None if inner is None else inner[sample])

    def _add_tokens(self, gradients: Tensor, inner: Tensor | None) -> None:
        """gradients [T, n] of one sample's loss, the sum of its terms, so that a token weighs as much in a long text."""
        if inner is not None and len(inner) == len(gradients):  # a layer may read fewer tokens than there are: it pools
            gradients = gradients[inner.to(gradients.device)]
        norms = torch.linalg.vector_norm(gradients.double(), dim=1)
        reached = norms > 0  # a token that the loss does not depend on says nothing of how large gradients are
        if reached.any():
            norms, mean = norms[reached], norms[reached].mean()
            clipped = norms.clamp(_NORMS[0] * mean, _NORMS[1] * mean) / norms
            rows = (gradients[reached].double() * clipped[:, None]).to(self.gram_out.dtype)
            with torch.autocast(rows.device.type, enabled=False):
                self.gram_out.addmm_(rows.mT, rows)

    def means(self, samples: int) -> dict:
        """The fields of Stats."""
        parts = {"fisher_in": self.into, "fisher_out": self.out, "fisher": self.elements}
        found = {"samples": samples} | {name: (part / samples).cpu() for name, part in parts.items() if part is not None}
        return found if self.gram_out is None else found | {"gram_out": self.gram_out.float().cpu()}


def add_fisher(model: nn.Module, batch: Mapping[str, Tensor], modules: Mapping[str, nn.Module],
               sums: Mapping[str, FisherSums]) -> int:
    """One forward and backward pass over one of the `parts` of a batch; returns how many samples had a loss.

    The model's parameters must not require gradients."""
    shape, counts = batch_shape(batch), label_counts(model, batch)
    inner = inner_tokens(batch) if any(layer.gram_out is not None for layer in sums.values()) else None
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
            sums[name].add(counts, shape, name, inner)

    with torch.enable_grad(), listening(modules, after=after):
        loss = getattr(forward(model, batch, labels=True), "loss", None)
        if loss is None:
            raise ArgumentError(f"fisher needs a model with a loss; {type(model).__name__} returned none")
        if counts.any():
            (loss * counts.sum()).backward()
    for name, layer in sums.items():
        layer.add(counts, shape, name, inner)  # calls that no gradient reached have left others waiting
    return int((counts > 0).sum())


def label_counts(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
    """How many terms of the mean that the model returns as its loss belong to each sample.   [B]

    None where that is not known: then only a batch of one sample has a loss that is certainly the sample's own."""
    labels, kind = batch["labels"], getattr(model, "loss_type", None)
    if _has_one_label(labels):
        return torch.ones(batch_shape(batch)[0], dtype=torch.long)
    if kind in _SHIFTED or type(model).__name__.endswith("LMHeadModel"):
        return (labels[:, 1:] != IGNORED).sum(1)
    if kind in _PER_TOKEN:
        return (labels != IGNORED).sum(1)
    return None


def inner_tokens(batch: Mapping[str, Tensor]) -> Tensor | None:
    """The tokens that are neither padding nor, where tokens have labels, in the first or last eighth of their text; None for
    what is no batch of sequences.   bool [B, T]"""
    shape = batch_shape(batch)
    if len(shape) < 2:
        return None
    mask = batch.get("attention_mask")
    inside = mask != 0 if isinstance(mask, Tensor) and mask.shape == shape else torch.ones(shape, dtype=torch.bool)
    if _has_one_label(batch["labels"]):
        return inside
    place, length = inside.cumsum(1) - 1, inside.sum(1, keepdim=True)
    return inside & (place >= length // _ENDS) & (place < length - length // _ENDS)


def _has_one_label(labels: Tensor) -> bool:
    """Whether a sample has one label, not one for each token."""
    return labels.dim() < 2 or labels.is_floating_point() or labels.shape[1] == 1


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
