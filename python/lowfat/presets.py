"""Models and hyperparameters to pre-train with: those of SLTrain (2406.02214, its scripts), and one for a CPU.

Rates of 3e-3, no weight decay, a cosine that ends at a tenth of the rate, 512 texts of 256 tokens an update."""
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What `pretrain` is given for a model of this size."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    rank: int
    density: float
    alpha: float
    steps: int
    warmup: int
    batch_size: int = 512
    length: int = 256
    optimizer: str = "adamw"
    clip: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)  # more of transformers.LlamaConfig

    def plan(self) -> dict[str, Any]:
        """Of its low-rank + sparse layers, as replace() takes it."""
        return {"structure": "LowRankSparse", "rank": self.rank, "density": self.density, "alpha": self.alpha}

    def options(self) -> dict[str, Any]:
        """Arguments of pretrain()."""
        return {name: getattr(self, name) for name in ("steps", "warmup", "batch_size", "length", "optimizer", "clip")}

    def model_config(self, vocabulary: int):
        """The transformers.LlamaConfig of a model with so many tokens."""
        from transformers import LlamaConfig

        return LlamaConfig(hidden_size=self.hidden, intermediate_size=self.intermediate, num_hidden_layers=self.layers,
                           num_attention_heads=self.heads, vocab_size=vocabulary,
                           **{"max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "bos_token_id": None,
                              "eos_token_id": None} | self.config)


PRESETS = {
    "nano": Preset(256, 704, 6, 4, rank=64, density=0.03, alpha=16, steps=1000, warmup=60, batch_size=8,
                   config={"tie_word_embeddings": True}),
    "60m": Preset(512, 1376, 8, 8, rank=128, density=0.03, alpha=32, steps=11_000, warmup=1_100),
    "130m": Preset(768, 2048, 12, 12, rank=256, density=0.03, alpha=16, steps=22_000, warmup=2_200),
    "350m": Preset(1024, 2736, 24, 16, rank=256, density=0.03, alpha=16, steps=65_000, warmup=6_500),
    "1b": Preset(2048, 5461, 24, 32, rank=512, density=0.03, alpha=8, steps=140_000, warmup=10_000),
    "7b": Preset(4096, 11008, 32, 32, rank=1024, density=0.05, alpha=8, steps=150_000, warmup=15_000, optimizer="adam8bit",
                 clip=1.0, config={"max_position_embeddings": 2048}),
}
