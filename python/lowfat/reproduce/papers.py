"""The papers' claims, each as two recipes of which one is said to be ahead, with the figures that the paper prints."""
from typing import NamedTuple


class Claim(NamedTuple):
    """What a paper says, and the recipes that tell."""
    text: str
    ahead: str
    behind: str
    published: str  # the paper's own figures
    of_no_loss: bool = False  # a tie is what it says


class Paper(NamedTuple):
    """Its experiment here: tasks with the ratio on each, steps, and recipes that stand beside those of the claims."""
    reference: str
    claims: tuple[Claim, ...]
    tasks: dict[str, float] = {"sections": 0.25}  # parameters kept
    steps: int = 300
    beside: tuple[str, ...] = ()
    one_seed: tuple[str, ...] = ()  # tasks that are not repeated

    def quick(self) -> "Paper":
        """Its first task, and the recipes of its claims alone."""
        return self._replace(tasks=dict([next(iter(self.tasks.items()))]), beside=())

    def recipes(self) -> list[str]:
        """Every one once, in the order of the claims."""
        return list(dict.fromkeys([*(name for claim in self.claims for name in (claim.ahead, claim.behind)), *self.beside]))


PAPERS = {
    "gupta": Paper("Gupta et al., 2406.11307", (
        Claim("trained low rank is ahead of Monarch", "svd", "monarch", "GLUE, four models: ahead at every size"),
        Claim("trained low rank is ahead of block-wise low rank", "svd", "block_low_rank", "the same"),
        Claim("factorized in stages, a model ends higher than at once", "staged", "svd", "most failed runs are gone"))),
    "fwsvd": Paper("FWSVD, 2207.00112", (
        Claim("Fisher weights beat none before training", "fwsvd_only", "svd_only", "BERT-base at 33 %: +17.5"),
        Claim("and after it", "fwsvd", "svd", "ALBERT-large, 14 % smaller: 84.3 against 77.1")),
        beside=("whitened_only", "whitened")),
    "lpaf": Paper("LPAF, 2306.14152, and the baselines of its table", (
        Claim("LPAF is ahead of fine-tuned SVD", "lpaf", "svd", "MNLI: 82.6 against 79.9"),
        Claim("first-order pruning beats magnitude pruning", "lpaf", "lpaf_magnitude", "its patterns are of lower rank"),
        Claim("weighting by scores beats no weighting", "lpaf", "lpaf_even", "SST-2: 90.7 against 89.2"),
        Claim("weighting by scores beats weighting by the mask", "lpaf", "lpaf_mask", "SST-2: 90.7 against 90.4"),
        Claim("mixed ranks beat plain fine-tuning", "lpaf", "lpaf_plain", "SST-2: 90.7 against 89.5"),
        Claim("the consistency of two passes helps", "lpaf", "lpaf_one_pass", "SST-2: 90.7 against 89.8"),
        Claim("distillation beats the labels alone", "logits", "svd", "no such row in the paper"),
        Claim("learned ranks beat uniform ones", "learned_ranks", "svd", "FLOP and SVD_Ft, MNLI: 79.9 each")),
        {"sections": 0.25, "pairs": 0.5},
        beside=("lpaf_movement", "tinybert", "pkd", "ckd", "distilbert", "meta_distill", "theseus", "mixed_rank", "isp", "block_movement",
                "fwsvd", "kfac", "whitened", "staged"), one_seed=("pairs",)),
    "dsformer": Paper("DSFormer, 2312.13211", (
        Claim("learned dense x sparse factors are ahead of fine-tuned low rank", "dsformer_learned", "svd",
              "up to 40 % more compression at equal scores"),
        Claim("learning which factors to use beats training those of the start", "dsformer_learned", "dsformer",
              "no figure read")), {"sections": 0.5}, beside=("whitened",)),
    "cospadi": Paper("CoSpaDi, 2509.22075; COMPOT, 2602.15200; ROCKET, 2602.11008", (
        Claim("a sparse dictionary is ahead of whitened low rank, nothing trained", "cospadi_only", "whitened_only",
              "Llama-3-8B, a fifth removed: 61.8 against 54.1"),
        Claim("COMPOT is ahead of CoSpaDi", "compot_only", "cospadi_only", "the same: 64.5 against 61.8"),
        Claim("ROCKET is ahead of CoSpaDi", "rocket_only", "cospadi_only", "the same: 66.8 against 61.8")),
        {"sections": 0.5}, 0),
    "sltrain": Paper("SLTrain, 2406.02214", (
        Claim("low rank + sparse is ahead of low rank alone", "low_rank_sparse_lm", "low_rank_lm",
              "60 M on C4: perplexity 34.2 against 78.2"),
        Claim("and loses nothing against dense layers", "low_rank_sparse_lm", "dense_lm", "34.2 against 34.1", True)),
        {"lm": 1.0}, 1000),
    "wara": Paper("WaRA, 2506.24092", (
        Claim("a wavelet adapter is ahead of LoRA of as many parameters", "wavelet", "lora", "no figure read"),
        Claim("and of WaveFT", "wavelet", "waveft", "no figure read")), {"sections": 1.0}, 150, ("head",)),
}
