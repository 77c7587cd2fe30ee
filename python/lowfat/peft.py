"""Wavelet adapters as layers of PEFT's LoRA, by its own door for layers it does not know; imports peft.

    config = LoraConfig(target_modules=["query", "value"], r=8, lora_alpha=16)
    config._register_custom_module(lowfat.peft.wavelet_layers(levels=2))
    model = get_peft_model(model, config)
    model = PeftModel.from_pretrained(base, folder, config=config)  # PEFT does not save what was registered

The tensors have names of their own, so that nobody takes them for a LoRA's, and the options are stored beside them: other
ones are refused at loading. `lowfat.adapt` needs nothing of this."""
from math import sqrt

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import FormatError, UnsupportedError
from .ops.dwt import FILTERS
from .ops.wavelet import SUBBANDS, layout, wavelet
from .structures import STRUCTURES, Structure, Wavelet
from .structures.structure import dense_weight, sizes
from .structures.wavelet import check_base, check_options, plain_factors


def wavelet_layers(filter: str = "haar", levels: int = 1, subbands: str = "diag") -> dict[type[nn.Module], type[nn.Module]]:
    """What LoraConfig._register_custom_module takes, so that its adapters are between subbands: all, diag or LL.

    r, lora_alpha, lora_dropout and use_rslora are LoraConfig's. Layers raise ArgumentError or ShapeError for options that
    their sizes do not have, UnsupportedError for others of LoraConfig, FormatError for tensors made with other options."""
    options = {"filter": filter, "levels": levels, "subbands": subbands}
    layer = type("WaveletLora", (_WaveletLora,), {"options": options, "__module__": __name__})
    return dict.fromkeys((nn.Linear, Conv1D, *(known for known in STRUCTURES.values() if known is not Wavelet)), layer)


class _Factor(nn.Linear):
    """A factor as weight [out, in], with the options that it was made for."""

    def __init__(self, columns: int, rows: int, options: dict):
        super().__init__(columns, rows, bias=False)
        self.options = options
        self.due = [list(FILTERS).index(options["filter"]), options["levels"], list(SUBBANDS).index(options["subbands"])]
        self.register_buffer("kind", torch.tensor(self.due, dtype=torch.int32))

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        kind = state_dict.get(f"{prefix}kind")
        if kind is not None and kind.tolist() != self.due:
            raise FormatError(f"{prefix}kind is {kind.tolist()}: made with other options than {self.options}")
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class _WaveletLora(nn.Module, LoraLayer):
    options: dict
    adapter_layer_names = ("lora_wavelet_v", "lora_wavelet_u")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, r: int, lora_alpha: float, **_):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        check_base(self.base_layer)
        self.k, self.n = sizes(self.base_layer)
        self.lora_wavelet_v, self.lora_wavelet_u = nn.ModuleDict(), nn.ModuleDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config, **_) -> None:
        check_options(self.k, self.n, r, lora_alpha, **self.options)
        for refused in ("use_dora", "lora_bias"):
            if getattr(config, refused):
                raise UnsupportedError(f"wavelet layers of PEFT have no {refused}")
        if config.init_lora_weights is not True or self.options["subbands"] == "shared+gain":
            raise UnsupportedError("wavelet layers of PEFT start at zero (init_lora_weights=True), and have no gains")
        self.pairs = layout(self.options["subbands"], self.options["levels"], self.k, self.n)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (sqrt(r) if config.use_rslora else r)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        self.lora_wavelet_v[adapter_name] = _Factor(self.pairs[-1].columns.stop, r, self.options)
        self.lora_wavelet_u[adapter_name] = _Factor(r, self.pairs[-1].rows.stop, self.options)
        nn.init.zeros_(self.lora_wavelet_u[adapter_name].weight)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *arguments, adapter_names=None, **named) -> Tensor:
        if adapter_names is not None:
            raise UnsupportedError("wavelet layers of PEFT take one adapter for a batch, found adapter_names")
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *arguments, **named)
        if self.disable_adapters or self.merged:
            return y
        for name in self._present(self.active_adapters):
            v, u = self._factors(name)
            rows = self.lora_dropout[name](self._cast_input_dtype(x, v.dtype))
            y = y + wavelet(rows, v, u, out_features=self.n, scale=self.scaling[name], **self.options).to(y.dtype)
        return y

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """In fp64.   [n, k]"""
        v, u = plain_factors(*self._factors(adapter), None, self.pairs, self.k, self.n, self.options["filter"])
        return self.scaling[adapter] * (u @ v)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Each adapter with one rounding. safe_merge: only where the sum is finite."""
        for name in self._present(self.active_adapters if adapter_names is None else adapter_names):
            if name not in self.merged_adapters:
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

    def _present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.lora_wavelet_v]

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_wavelet_v[name].weight, self.lora_wavelet_u[name].weight
