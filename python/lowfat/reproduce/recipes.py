"""What can be done with a task: a model is made smaller and trained, or trained from nothing; the same steps for everybody.

A recipe is a function of a Setting. It returns the model with what it says of itself; nothing in it looks at test rows."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..comparison.cell import CALIBRATION_BATCH
from ..errors import ArgumentError
from ..factorize import factorize
from ..job import open_model, open_tokenizer
from ..method_inputs import needs_of, spread, stats_for, texts_for
from ..plan import plan
from ..recovery import (block_movement, finetune, isp, learned_ranks, lpaf, meta_distill, mixed_rank, staged,
                        straight_through, theseus)
from .tasks import Data

RATE, BATCH, CALIBRATION_ROWS = 2e-4, 32, 1024


@dataclass(frozen=True)
class Setting:
    """One run of a recipe."""
    data: Data
    teacher: Path | None  # the task's fine-tuned dense model; None: the task starts from nothing
    encoder: Path  # what the teacher was made of
    ratio: float
    steps: int
    seed: int
    states: Path  # a place for what a killed run has kept
    autocast: bool | str
    on_progress: Callable = field(default=lambda *_: None, repr=False)

    def open(self):
        """(model, tokenizer) of the teacher."""
        return open_model(self.teacher, task=self.data.kind.task)

    def training(self) -> dict[str, Any]:
        """The arguments that every strategy shares."""
        return {"task": self.data.kind.task, "steps": self.steps, "learning_rate": RATE, "batch_size": BATCH,
                "max_length": self.data.kind.max_length, "autocast": self.autocast, "seed": self.seed,
                "save_every": max(10, self.steps // 5), "out": self.states, "overwrite": True,
                "on_progress": self.on_progress}


class Made(NamedTuple):
    """What a recipe made."""
    model: Any
    tokenizer: Any
    kept: float  # of the parameters of the layers that were made smaller
    facts: dict[str, Any] = {}


class Recipe(NamedTuple):
    """In words, how, and whether it trains: what does not has one seed."""
    what: str
    make: Callable[[Setting], Made]
    trains: bool = True


def nearest(s: Setting, method: str, arguments: Mapping, policy: str = "per_matrix"):
    """(model, tokenizer, kept) with factors by a method, not trained."""
    model, tokenizer = s.open()
    needs, stats = needs_of(method, arguments, policy), None
    if needs:
        rows = spread(s.data.train, CALIBRATION_ROWS)
        found = texts_for(needs, model, tokenizer, rows, s.data.kind.task, batch_size=CALIBRATION_BATCH,
                          max_length=s.data.kind.max_length)
        stats = stats_for(needs, arguments, model, tokenizer, found, s.data.kind.task)
    choices = plan(model, method=method, ratio=s.ratio, policy=policy, arguments=arguments, stats=stats)
    return model, tokenizer, factorize(model, choices, stats).ratio


def untrained(method: str, **arguments) -> Recipe:
    return Recipe(f"{method}, not trained", lambda s: Made(*nearest(s, method, arguments)), trains=False)


def finetuned(method: str, **arguments) -> Recipe:
    """Factors, then training on the task alone."""
    def make(s: Setting) -> Made:
        model, tokenizer, kept = nearest(s, method, arguments)
        finetune(model, s.data.train, tokenizer=tokenizer, **s.training())
        return Made(model, tokenizer, kept)

    return Recipe(f"{method}, then fine-tuned", make)


def distilled(what: str, strategy: Callable = finetune, **terms: float) -> Recipe:
    """svd, trained towards the teacher: half the task's loss and half the distance to its logits, and these terms."""
    def make(s: Setting) -> Made:
        model, tokenizer, kept = nearest(s, "svd", {})
        strategy(model, s.data.train, tokenizer=tokenizer, teacher=s.open()[0], distill=terms or None, **s.training())
        return Made(model, tokenizer, kept)

    return Recipe(f"svd, then {what}", make)


def by_strategy(strategy: Callable, what: str, method: str = "svd", **options) -> Recipe:
    """A strategy that factorizes the dense model itself."""
    def make(s: Setting) -> Made:
        model, tokenizer = s.open()
        report = strategy(model, s.data.train, tokenizer=tokenizer, method=method, ratio=s.ratio, **options, **s.training())
        return Made(model, tokenizer, report.factorized.ratio)

    return Recipe(what, make)


def shrunk(strategy: Callable, what: str, **options) -> Recipe:
    """A strategy that takes heads and neurons away; it follows the teacher where its paper does."""
    def make(s: Setting) -> Made:
        model, tokenizer = s.open()
        report = strategy(model, s.data.train, tokenizer=tokenizer, teacher=s.open()[0], ratio=s.ratio, **options,
                          **s.training())
        return Made(model, tokenizer, report.ratio)

    return Recipe(what, make)


# --- language models from nothing ---

def pretrained(what: str, plan_of: Callable) -> Recipe:
    """plan_of(preset) -> what pretrain() puts in the layers of the nano Llama; None: nothing."""
    def make(s: Setting) -> Made:
        from transformers import PreTrainedTokenizerFast

        from ..presets import PRESETS
        from ..pretrain import pretrain

        preset = PRESETS["nano"]
        words = open_tokenizer(s.encoder) if s.data.tokenizer is None else PreTrainedTokenizerFast(
            tokenizer_file=str(s.data.tokenizer / "tokenizer.json"), pad_token="<pad>", bos_token="<s>", eos_token="</s>")
        options = preset.options() | {"steps": s.steps, "warmup": None if s.steps != preset.steps else preset.warmup}
        model, report = pretrain(preset.model_config(len(words)), s.data.train, tokenizer=words, plan=plan_of(preset),
                                 autocast=s.autocast, seed=s.seed, out=s.states, overwrite=True,
                                 save_every=max(10, s.steps // 5), on_progress=s.on_progress, **options)
        kept = report.replaced.ratio if report.replaced else 1.0
        return Made(model, words, kept, {"parameters": report.parameters})

    return Recipe(what, make)


# --- adapters ---

ADAPTER_RANK, ADAPTER_RATE = 8, 1e-3


def adapted(what: str, put: Callable) -> Recipe:
    """put(model) -> an adapter on the encoder's layers, and the rest frozen; the task's new head is trained beside it."""
    def make(s: Setting) -> Made:
        model, tokenizer = new_classifier(s.encoder, s.data, s.seed)
        put(model)
        count = sum(one.numel() for one in model.parameters() if one.requires_grad)
        model.classifier.requires_grad_(True)
        training = s.training() | {"learning_rate": ADAPTER_RATE, "out": None}  # what PEFT made is no folder of ours
        finetune(model, s.data.train, tokenizer=tokenizer, **training)
        return Made(model, tokenizer, 1.0, {"parameters": count})

    return Recipe(what, make)


def new_classifier(encoder: Path, data: Data, seed: int):
    """(model with a new head for the labels of the task, tokenizer)"""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=len(data.labels), dtype=torch.float32)
    return model, open_tokenizer(encoder)


def _lora(model) -> None:
    from ..layers import adaptable

    package, layers = peft(), list(adaptable(model, None))
    package.get_peft_model(model, package.LoraConfig(r=ADAPTER_RANK, lora_alpha=2 * ADAPTER_RANK, target_modules=layers))


def _waveft(model) -> None:
    """As many coefficients in each layer as a LoRA has parameters there."""
    import re

    from ..layers import adaptable
    from ..structures.structure import sizes

    package, found = peft(), adaptable(model, None)
    counts = {re.escape(name): ADAPTER_RANK * sum(sizes(layer)) for name, layer in found.items()}
    package.get_peft_model(model, package.WaveFTConfig(n_frequency=1, n_frequency_pattern=counts, wavelet_family="db1",
                                                       target_modules=list(found)))


def _wavelet(model) -> None:
    from ..adapt import adapt

    adapt(model, rank=ADAPTER_RANK, alpha=2 * ADAPTER_RANK)


def peft():
    """The package; ArgumentError where it is missing."""
    try:
        import peft as package
    except ImportError as error:
        raise ArgumentError("LoRA and WaveFT are PEFT's; needs the package peft (pip install peft)") from error
    return package


RECIPES = {
    "svd_only": untrained("svd"), "fwsvd_only": untrained("fwsvd"), "whitened_only": untrained("whitened"),
    "cospadi_only": untrained("cospadi"), "compot_only": untrained("compot"), "rocket_only": untrained("rocket"),
    "svd": finetuned("svd"), "fwsvd": finetuned("fwsvd"), "whitened": finetuned("whitened"),
    "monarch": finetuned("monarch", blocks=4), "block_low_rank": finetuned("block_low_rank", blocks=4),
    "kfac": finetuned("kfac"), "kfac_only": untrained("kfac"),
    "logits": distilled("logits"), "tinybert": distilled("TinyBERT", hidden=1.0, attention=1.0),
    "pkd": distilled("patient KD", cls=10.0), "ckd": distilled("contextual KD", relations=1.0),
    "distilbert": distilled("DistilBERT", cosine=1.0), "meta_distill": distilled("MetaDistil", meta_distill),
    "theseus": by_strategy(theseus, "svd, its blocks replaced at random (BERT-of-Theseus)"),
    "mixed_rank": by_strategy(mixed_rank, "svd, trained with mixed ranks"),
    "lpaf": by_strategy(lpaf, "LPAF, all three steps", "sparsity_aware"),
    "lpaf_magnitude": by_strategy(lpaf, "LPAF, pruned by magnitude", "sparsity_aware", criterion="magnitude"),
    "lpaf_movement": by_strategy(lpaf, "LPAF, pruned by movement scores", "sparsity_aware", criterion="movement"),
    "lpaf_mask": by_strategy(lpaf, "LPAF, weighted by the mask", "sparsity_aware", weighting="mask"),
    "lpaf_even": by_strategy(lpaf, "LPAF, not weighted", "sparsity_aware", weighting="none"),
    "lpaf_plain": by_strategy(lpaf, "LPAF, trained without mixed ranks", "sparsity_aware", p_init=0.0),
    "lpaf_one_pass": by_strategy(lpaf, "LPAF, without the consistency of two passes", "sparsity_aware", consistency=0.0),
    "learned_ranks": by_strategy(learned_ranks, "svd, its ranks learned by gates (FLOP)"),
    "isp": shrunk(isp, "heads and neurons taken away in rounds (ISP)"),
    "block_movement": shrunk(block_movement, "blocks and neurons by movement (BP_hybrid)"),
    "staged": by_strategy(staged, "svd in stages, trained in between"),
    "dsformer": finetuned("dsformer"),
    "dsformer_learned": by_strategy(straight_through, "dsformer, its factors learned", "dsformer"),
    "dense_lm": pretrained("dense layers", lambda preset: None),
    "low_rank_sparse_lm": pretrained("low rank + sparse", lambda preset: preset.plan()),
    "low_rank_lm": pretrained("low rank alone, of the same rank", lambda preset: {"structure": "LowRank",
                                                                                 "rank": preset.rank}),
    "head": adapted("the new head alone", lambda model: model.requires_grad_(False)),
    "lora": adapted("LoRA", _lora), "waveft": adapted("WaveFT", _waveft),
    "wavelet": adapted("WaRA's wavelet adapter", _wavelet),
}
