"""What a student may learn of a teacher besides its answers, in terms that combine freely: {"hidden": 1, "attention": 1}.

    hidden      MSE of the hidden states, through a learned projection where their widths differ (TinyBERT, 1909.10351)
    attention   MSE of the attention scores before softmax (TinyBERT)
    cls         squared distance of the normalized vectors that stand for the text (patient KD, 1908.09355)
    relations   distances and angles between tokens that are near, and between the layers of a token (CKD, 2109.08359), as
                relational KD measures them: distances over their mean, Huber (1904.05068)
    cosine      1 - cosine of the last hidden states (DistilBERT, 1910.01108)
    task, logits, embedding   weights of the answers' own losses, in the place of 1 - alpha, alpha and 1

Each is a mean over texts, tokens that are no padding, and entries, and a sum over layers. A weight may come with options:
{"relations": {"weight": 10, "window": 4}}. Every one has from and until, shares of the steps between which it counts:
{"hidden": {"weight": 1, "until": 0.5}, "task": 0, "logits": {"weight": 1, "from": 0.5}} is TinyBERT's order.
"""
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss, normalize

from ..errors import ArgumentError
from ..listen import untouched
from ..methods import named
from .internals import Internals, blocks_of, overheard
from .relations import difference, near, related

ANSWERS = {"classification": ("task", "logits"), "lm": ("task", "logits"), "embedding": ("embedding",)}  # by task
MAPS = ("uniform", "skip", "last")
_TIMES = {"from": 0.0, "until": 1.0}


def read_terms(distill: Mapping | None, task: str, teacher, alpha: float) -> dict[str, dict]:
    """{term: {"weight": 1.0, its options}} with every default filled in; ArgumentError for what cannot be had.

    alpha: what the weight of the teacher's answers is where distill does not say."""
    if not distill:
        return {}
    if not isinstance(distill, Mapping):
        raise ArgumentError(f'distill is {distill!r}; needs weights by name, like {{"hidden": 1.0}}')
    known = (*TERMS, *ANSWERS[task])
    for name in distill:
        if name not in known:
            raise ArgumentError(f"distill has {name!r}; for {task} needs one of {', '.join(known)}")
    if teacher is None:
        raise ArgumentError(f"distill ({', '.join(distill)}) has no teacher to follow; needs one")
    if task == "lm" and "cls" in distill:
        raise ArgumentError("distill: cls needs one vector that stands for the text; a language model has none")
    terms = {name: _read(name, value) for name, value in distill.items()}
    weights = (1.0,) if task == "embedding" else (1 - alpha, alpha)
    others = {name: {"weight": weight} | _TIMES for name, weight in zip(ANSWERS[task], weights)}
    _check_cover(others | terms)
    return terms


def _check_cover(terms: Mapping[str, Mapping]) -> None:
    weighty = [term for term in terms.values() if term["weight"]]
    for moment in sorted({0.0, *(term["until"] for term in weighty)} - {1.0}):
        if not any(_is_time(term, moment) for term in weighty):
            raise ArgumentError(f"distill: from {moment:g} of the steps on every weight is 0, so there is nothing to learn")


def _is_time(term: Mapping, progress: float) -> bool:
    return term["from"] <= progress < term["until"]


def _read(name: str, value) -> dict:
    defaults = _TIMES | (TERMS[name].options if name in TERMS else {})
    given = dict(value) if isinstance(value, Mapping) else {"weight": value}
    for option in given:
        if option not in ("weight", *defaults):
            raise ArgumentError(f"distill: {name} has no option {option!r}; it has {', '.join(('weight', *defaults))}")
    if "weight" not in given:
        raise ArgumentError(f"distill: {name} has no weight")
    found = defaults | given
    for option, number in found.items():
        if option == "layers":
            _check_layers(name, number)
        elif option == "window":
            if type(number) is not int or number < 1:
                raise ArgumentError(f"distill: {name} has window {number!r}; needs a whole number, at least 1")
        elif isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < math.inf:
            raise ArgumentError(f"distill: {name} has {option} {number!r}; needs a number, at least 0")
    if not 0 <= found["from"] < found["until"] <= 1:
        raise ArgumentError(f"distill: {name} counts from {found['from']} until {found['until']}; needs shares of the "
                            "steps, the first below the second")
    return {option: _plain(number) if option == "layers" else number for option, number in found.items()}


def _is_pair(value) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(type(number) is int for number in value)


def _plain(layers) -> str | list[list[int]]:
    return layers if isinstance(layers, str) else [list(pair) for pair in layers]


def _check_layers(name: str, layers) -> None:
    if isinstance(layers, str):
        if layers not in MAPS:
            raise ArgumentError(f"distill: {name} has layers {layers!r}; needs {', '.join(MAPS)} or pairs of numbers")
    elif not isinstance(layers, Sequence) or not layers or not all(map(_is_pair, layers)):
        raise ArgumentError(f"distill: {name} has layers {layers!r}; needs pairs (student's layer, teacher's layer)")


def spelled(text: str | None) -> dict | None:
    """The terms of a command line: hidden=1,relations=10:window=4:layers=last"""
    if text is None:
        return None
    found = {}
    for part in re.split(r",(?=\w+=)", text):  # pairs of layers have commas of their own
        first, *options = re.split(r":(?=\w+=)", part)
        (name, weight), = named("--distill", [first]).items()
        if name in found:
            raise ArgumentError(f"--distill has {name} twice")
        found[name] = {"weight": weight, **named("--distill", options)} if options else weight
    return found


def paired(layers: str | Sequence, ours: int, theirs: int, first: int) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer): uniform spreads the student's layers over the teacher's (TinyBERT's g), skip
    leaves the last one out (patient KD), last is that alone. Layer 0, where first is 0, is what enters the blocks."""
    if not isinstance(layers, str):
        return [(mine, other) for mine, other in layers]
    if layers == "last":
        return [(ours, theirs)]
    spread = [(mine, -(-mine * theirs // ours)) for mine in range(1, ours + (layers == "uniform"))]
    return [(0, 0)] * (first == 0 and layers == "uniform") + spread


class Distillation(nn.Module):
    """The terms of one student and one teacher, with the projections that they train.

    batch: one that both can read, to hear once what there is. ArgumentError names a term that it does not make possible."""

    def __init__(self, terms: Mapping[str, Mapping], student, teacher, batch: Mapping[str, Tensor], *, pooling: str | None):
        super().__init__()
        self.terms, self.pooling = {name: dict(term) for name, term in terms.items()}, pooling
        self.answers = {name: term["weight"] for name, term in terms.items() if name not in TERMS}
        self.used = [name for name, term in terms.items() if name in TERMS and term["weight"]]
        self.progress = 0.0  # share of the run's steps that are taken
        self.pairs: dict[str, list[tuple[int, int]]] = {}
        self.projections = nn.ModuleDict()
        if self.used:
            ours, theirs = _heard_once(student, "the model", batch), _heard_once(teacher, "teacher", batch)
            counts = [len(blocks_of(model)) for model in (student, teacher)]
            for name in self.used:
                self.pairs[name] = _mapped(name, self.terms[name], *counts)
                TERMS[name].check(self, name, ours, theirs)
            self.to(student.device)

    def forward(self, ours: Internals, theirs: Internals, mask: Tensor) -> Tensor:
        """The weighted sum of the terms.    mask [b, t]"""
        mask = mask.bool()
        return sum(self.terms[name]["weight"] * TERMS[name].loss(self, name, ours, theirs, mask) for name in self.counting())

    def counting(self) -> list[str]:
        """The terms that count by now."""
        return [name for name in self.used if _is_time(self.terms[name], self.progress)]

    def answers_now(self) -> dict[str, float]:
        return {name: weight if _is_time(self.terms[name], self.progress) else 0.0 for name, weight in self.answers.items()}

    @property
    def changes(self) -> bool:
        """Whether the loss is another later in the run."""
        return any(term[name] != value for term in self.terms.values() for name, value in _TIMES.items())

    def projected(self, layer: int, states: Tensor) -> Tensor:
        """The student's hidden states as wide as the teacher's; what enters the blocks has a projection of its own."""
        name = "entering" if layer == 0 else "hidden"
        return self.projections[name](states) if name in self.projections else states


def _heard_once(model, which: str, batch) -> Internals:
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ArgumentError(f"distill: {which} has gradient checkpointing on, which throws away what its layers compute")
    moved = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    try:
        with torch.no_grad(), untouched(model), overheard(model) as found:
            model(**moved)
    except ArgumentError as error:
        raise ArgumentError(f"distill: {which}: {error}") from error
    return found


def _mapped(name: str, term: Mapping, ours: int, theirs: int) -> list[tuple[int, int]]:
    first = TERMS[name].first
    pairs = paired(term["layers"], ours, theirs, first)
    for mine, other in pairs:
        if not first <= mine <= ours or not first <= other <= theirs:
            raise ArgumentError(f"distill: {name} pairs layer {mine} with {other}; the model has {first} to {ours}, the "
                                f"teacher {first} to {theirs}")
    if not pairs:
        raise ArgumentError(f"distill: {name} with layers {term['layers']!r} is left without one; the model has {ours}")
    return pairs


# --- the terms: check(distillation, name, ours, theirs) before any work, loss(..., mask) of a batch ---

def _check_hidden(terms: Distillation, name: str, ours: Internals, theirs: Internals) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for mine, other in terms.pairs[name]:
            one = "entering" if mine == 0 else "hidden"
            sizes = ours.hidden[mine].shape[-1], theirs.hidden[other].shape[-1]
            if sizes[0] != sizes[1] and one not in terms.projections:
                terms.projections[one] = nn.Linear(*sizes, bias=False)


def _hidden(terms: Distillation, name: str, ours: Internals, theirs: Internals, mask: Tensor) -> Tensor:
    return sum(mse_loss(terms.projected(mine, ours.hidden[mine].float()[mask]), theirs.hidden[other].float()[mask])
               for mine, other in terms.pairs[name])


def _check_attention(terms: Distillation, name: str, ours: Internals, theirs: Internals) -> None:
    for mine, other in terms.pairs[name]:
        for which, heard, layer in (("the model", ours, mine), ("teacher", theirs, other)):
            if layer not in heard.attention:
                raise ArgumentError(f"distill: attention: layer {layer} of {which} does not go through transformers' "
                                    "attention interface, where its scores could be taken; leave attention out")
        heads = ours.attention[mine].heads, theirs.attention[other].heads
        if heads[0] != heads[1]:
            raise ArgumentError(f"distill: attention: layer {mine} of the model has {heads[0]} heads, layer {other} of the "
                                f"teacher {heads[1]}; needs as many")


def _attention(terms: Distillation, name: str, ours: Internals, theirs: Internals, mask: Tensor) -> Tensor:
    seen, total = mask[:, :, None] & mask[:, None, :], 0
    for mine, other in terms.pairs[name]:
        entries = seen.tril() if ours.attention[mine].is_causal else seen
        squares = (ours.attention[mine].scores() - theirs.attention[other].scores()).square().mean(1)  # over heads
        total = total + squares[entries].mean()
    return total


def _check_widths(terms: Distillation, name: str, ours: Internals, theirs: Internals) -> None:
    for mine, other in terms.pairs[name]:
        sizes = ours.hidden[mine].shape[-1], theirs.hidden[other].shape[-1]
        if sizes[0] != sizes[1]:
            raise ArgumentError(f"distill: {name}: the hidden states of the model are {sizes[0]} wide, the teacher's "
                                f"{sizes[1]}; needs the same (hidden has a projection, relations need none)")


def _check_cls(terms: Distillation, name: str, ours: Internals, theirs: Internals) -> None:
    _check_widths(terms, name, ours, theirs)
    if terms.pooling is None and not (ours.attention and theirs.attention):
        raise ArgumentError("distill: cls: attention does not go through transformers' interface, which would say whether a "
                            "text is read at its first token or its last; leave cls out")


def _cls(terms: Distillation, name: str, ours: Internals, theirs: Internals, mask: Tensor) -> Tensor:
    def vector(heard: Internals, layer: int) -> Tensor:
        states = heard.hidden[layer].float()
        if terms.pooling == "mean":
            return normalize((states * mask[:, :, None]).sum(1), dim=-1)  # the count of tokens cancels
        # where a text is read: its first token, or the last of a model whose tokens see only those before them
        is_causal = terms.pooling is None and any(one.is_causal for one in heard.attention.values())
        place = mask.sum(1) - 1 if is_causal else torch.zeros_like(mask[:, 0], dtype=torch.long)
        return normalize(states[torch.arange(len(states), device=states.device), place], dim=-1)

    return sum((vector(ours, mine) - vector(theirs, other)).square().sum(-1).mean() for mine, other in terms.pairs[name])


def _cosine(terms: Distillation, name: str, ours: Internals, theirs: Internals, mask: Tensor) -> Tensor:
    return sum((1 - cosine_similarity(ours.hidden[mine].float()[mask], theirs.hidden[other].float()[mask], dim=-1)).mean()
               for mine, other in terms.pairs[name])


def _check_relations(terms: Distillation, name: str, ours: Internals, theirs: Internals) -> None:
    if terms.terms[name]["between"] and len(terms.pairs[name]) < 2:
        raise ArgumentError("distill: relations between layers need two or more; needs other layers, or between=0")


def _relations(terms: Distillation, name: str, ours: Internals, theirs: Internals, mask: Tensor) -> Tensor:
    term, pairs = terms.terms[name], terms.pairs[name]
    counts = near(mask[..., None], term["window"]).squeeze(-1)
    counts = counts & mask[..., None] & (torch.arange(counts.shape[-1], device=mask.device) != term["window"])  # not itself
    total = 0
    for mine, other in pairs:
        total = total + difference(*(related(states, near(states, term["window"]), counts) for states in
                                      (ours.hidden[mine].float(), theirs.hidden[other].float())), term["triples"])
    if term["between"]:
        layers = [torch.stack([states.float()[mask] for states in some], dim=1)  # [tokens, layers, d]
                  for some in ([ours.hidden[mine] for mine, _ in pairs], [theirs.hidden[other] for _, other in pairs])]
        others = ~torch.eye(len(pairs), dtype=torch.bool, device=mask.device).expand(len(layers[0]), -1, -1)
        total = total + term["between"] * difference(
            *(related(points, points[:, None], others) for points in layers), term["triples"])
    return total


class _Term(NamedTuple):
    loss: Callable[..., Tensor]
    check: Callable[..., None]
    options: dict  # with defaults
    first: int = 0  # the least number of a layer


TERMS = {
    "hidden": _Term(_hidden, _check_hidden, {"layers": "uniform"}),
    "attention": _Term(_attention, _check_attention, {"layers": "uniform"}, first=1),
    "cls": _Term(_cls, _check_cls, {"layers": "skip"}, first=1),
    "relations": _Term(_relations, _check_relations, {"layers": "uniform", "window": 4, "triples": 1.0, "between": 1.0}),
    "cosine": _Term(_cosine, _check_widths, {"layers": "last"}, first=1),
}
