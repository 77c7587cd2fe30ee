"""Wavelet adapters as layers of PEFT's LoRA, by its own door for layers it does not know; imports peft.

    config = LoraConfig(target_modules=["query", "value"], r=8, lora_alpha=16)
    config._register_custom_module(lowfat.peft.wavelet_layers(levels=2))
    model = get_peft_model(model, config)
    model = PeftModel.from_pretrained(base, folder, config=config)  # PEFT does not save what was registered

Every command of PEFT's then finds lora_A and lora_B, which hold v and u. Given another config than before, PEFT takes their
columns for features, and refuses them for their sizes. `lowfat.adapt` needs nothing of this."""
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import UnsupportedError
from .ops.wavelet import layout, wavelet
from .structures import STRUCTURES, Structure, Wavelet
from .structures.structure import dense_weight, sizes
from .structures.wavelet import check_base, check_options, plain_factors


def wavelet_layers(filter: str = "haar", levels: int = 1, subbands: str = "diag") -> dict[type[nn.Module], type[nn.Module]]:
    """What LoraConfig._register_custom_module takes, so that its adapters are between subbands: all, diag or LL.

    r and lora_alpha are LoraConfig's. Layers raise ArgumentError or ShapeError for options that their sizes do not have."""
    options = {"filter": filter, "levels": levels, "subbands": subbands}
    layer = type("WaveletLora", (_WaveletLora,), {"options": options, "__module__": __name__})
    return dict.fromkeys((nn.Linear, Conv1D, *(known for known in STRUCTURES.values() if known is not Wavelet)), layer)


class _WaveletLora(nn.Module, LoraLayer):
    options: dict

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, r: int, lora_alpha: float, **_):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        check_base(self.base_layer)
        self.k, self.n = sizes(self.base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config, **others) -> None:
        check_options(self.k, self.n, r, lora_alpha, **self.options)
        if self.options["subbands"] == "shared+gain" or config.lora_bias:
            raise UnsupportedError("wavelet layers of PEFT have no gains and no lora_bias")
        if config.init_lora_weights not in (True, "gaussian"):
            raise UnsupportedError(f"init_lora_weights is {config.init_lora_weights!r}; wavelet layers take True or 'gaussian'")
        self.pairs = layout(self.options["subbands"], self.options["levels"], self.k, self.n)
        self.in_features, self.out_features = self.pairs[-1].columns.stop, self.pairs[-1].rows.stop  # of lora_A and lora_B
        super().update_layer(adapter_name, r, lora_alpha, config, **others)

    def forward(self, x: Tensor, *arguments, adapter_names=None, **named) -> Tensor:
        if adapter_names is not None:
            raise UnsupportedError("wavelet layers of PEFT take one adapter for a batch, found adapter_names")
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *arguments, **named)
        if self.disable_adapters or self.merged:
            return y
        for name in (name for name in self.active_adapters if name in self.lora_A):
            v, u = self.lora_A[name].weight, self.lora_B[name].weight
            rows = self.lora_dropout[name](self._cast_input_dtype(x, v.dtype))
            y = y + wavelet(rows, v, u, out_features=self.n, scale=self.scaling[name], **self.options).to(y.dtype)
        return y

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """In fp64.   [n, k]"""
        v, u = plain_factors(self.lora_A[adapter].weight, self.lora_B[adapter].weight, None, self.pairs, self.k, self.n,
                             self.options["filter"])
        return self.scaling[adapter] * (u @ v)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Each adapter with one rounding. safe_merge: only where the sum is finite."""
        chosen = self.active_adapters if adapter_names is None else adapter_names
        for name in chosen:
            if name in self.lora_A and name not in self.merged_adapters:
                self._add(self.get_delta_weight(name), only_finite=safe_merge)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        while self.merged_adapters:
            self._add(-self.get_delta_weight(self.merged_adapters.pop()))

    def _add(self, delta: Tensor, only_finite: bool = False) -> None:
        if isinstance(self.base_layer, Structure):
            raise UnsupportedError(f"the base layer is a {type(self.base_layer).__name__}; only Linear and Conv1D can be "
                                   "merged")
        weight = dense_weight(self.base_layer)
        found = (weight.double() + delta).to(weight.dtype)
        if only_finite and not found.isfinite().all():
            raise ValueError("the merged weight would not be finite")  # as PEFT says it
        weight.copy_(found)
