"""Takes attention heads and feed-forward neurons out of a transformers model: its matrices become smaller, so its time does.

A unit is a head with its rows of query, key and value and its columns of the output; where queries share keys and values,
a key/value head with all queries that read it; or a neuron with its row of the first matrix (and of the gate) and its column
of the last. Blocks of one model may keep different numbers. Where transformers' config can say the sizes, it does, and the
model is an ordinary one; else a lowfat checkpoint holds them, as `shrunk` in config.json."""
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import ArgumentError, ShapeError, UnsupportedError
from .layers import is_linear, replace, sizes
from .structures import Structure
from .structures.structure import is_conv1d

Cuts = dict[str, list[tuple[int, Tensor]]]  # {parameter: what stays of its dimensions, as (dimension, indices), one by one}


@dataclass(frozen=True)
class Units:
    """The heads or neurons of one block.

    rows: {layer that makes them: [units, its outputs for each]}. writer: the layer that reads them, columns [units, its
    inputs for each], which follow each other. config: the key of their number in a model's config. cost: weights of one,
    biases not counted."""
    kind: str  # "heads" or "neurons"
    rows: dict[str, Tensor]
    writer: str
    columns: Tensor
    config: str
    cost: int

    @property
    def count(self) -> int:
        return len(self.columns)


def removable(model: nn.Module) -> dict[str, Units]:
    """{block: its units} of every attention and feed-forward block that is known: those of BERT, RoBERTa, ELECTRA, Llama,
    Mistral, Qwen2, Qwen3 and GPT-2. Blocks whose layers are neither dense nor structures are left out."""
    found = {}
    if getattr(getattr(model, "config", None), "model_type", None) not in _FAMILIES:  # its config may mean other blocks
        return found
    for name, module in model.named_modules():
        cls = getattr(type(module), "_lowfat_original", type(module))  # under the class that group_blocks() gave it
        if cls.__name__ in _KNOWN and cls.__module__.partition(".")[0] == "transformers":
            units = _KNOWN[cls.__name__](name, module, model)
            if units is not None:
                found[name] = units
    return found


def dense_size(units: Mapping[str, Units]) -> int:
    """Weights of all units together."""
    return sum(one.count * one.cost for one in units.values())


def shrink(model: nn.Module, kept: Mapping[str, Iterable[int]]) -> Cuts:
    """Keeps these units of the blocks named, in the order that they have, and all of the others, in place. Returns what was
    cut of which parameter.

    ArgumentError or ShapeError before any change for a block that is not known, a unit that there is not or that is named
    twice, and a block of which none would be left; UnsupportedError for one that is not dense."""
    known = removable(model)
    chosen = {}
    for name, indices in kept.items():
        indices = sorted(indices)
        if name not in known:
            raise ArgumentError(f"{name} is no block that can be shrunk; there are {', '.join(known) or 'none'}")
        if len(set(indices)) < len(indices) or not all(0 <= index < known[name].count for index in indices):
            raise ArgumentError(f"{name}: kept {known[name].kind} are {indices}; needs numbers below {known[name].count}, "
                                "each once")
        if not indices:
            raise ShapeError(f"{name} would keep none of its {known[name].kind}; needs one at least")
        check_dense(model, known[name])
        chosen[name] = torch.tensor(indices)
    cuts = _shrink(model, known, chosen)
    _settle(model)
    return cuts


def check_dense(model: nn.Module, units: Units) -> None:
    """UnsupportedError names a layer of the units that is made of factors."""
    for layer in (*units.rows, units.writer):
        if not is_linear(module := model.get_submodule(layer)):
            raise UnsupportedError(f"{layer} is a {type(module).__name__}; shrink the model before it is factorized")


def resize(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Gives the blocks so many units, in place: for weights that are still to come. Raises as shrink() does."""
    known = removable(model)
    for name, count in counts.items():
        if name not in known or type(count) is not int or not 1 <= count <= known[name].count:
            raise ArgumentError(f"{name} cannot have {count!r} units; it has " +
                                (str(known[name].count) if name in known else "none that can be taken out"))
    _shrink(model, known, {name: torch.arange(count) for name, count in counts.items()})


def recorded(model: nn.Module) -> dict[str, int]:
    """{block: its units} of the blocks that have another number than the model's config says."""
    return {name: units.count for name, units in removable(model).items() if units.count != _said(model.config, units)}


@torch.no_grad()
def _shrink(model: nn.Module, known: Mapping[str, Units], chosen: Mapping[str, Tensor]) -> Cuts:
    cuts: Cuts = {}
    for name, index in chosen.items():
        units = known[name]
        for layer, rows in units.rows.items():
            _take(model, layer, rows[index].flatten().sort().values, None, cuts)
        _take(model, units.writer, None, units.columns[index].flatten(), cuts)
        if units.kind == "heads":
            block, width = model.get_submodule(name), len(index) * units.columns.shape[1]
            for key, value in (("num_attention_heads", len(index)), ("num_heads", len(index)), ("all_head_size", width),
                               ("split_size", width)):
                if key in vars(block):
                    setattr(block, key, value)
    return cuts


def _take(model: nn.Module, name: str, rows: Tensor | None, columns: Tensor | None, cuts: Cuts) -> None:
    """A dense layer of only these outputs, or of only these inputs, in the place of one."""
    layer = model.get_submodule(name)
    (k, n), bias = sizes(layer), layer.bias
    index = rows if columns is None else columns
    dimension = int(columns is not None) ^ is_conv1d(layer)  # Conv1D stores [k, n]
    k, n = (k, len(index)) if columns is None else (len(index), n)
    with torch.device("meta"):
        made = type(layer)(n, k) if is_conv1d(layer) else nn.Linear(k, n, bias=bias is not None)
    weight = layer.weight
    made.weight = nn.Parameter(weight.index_select(dimension, index.to(weight.device)), weight.requires_grad)
    cuts.setdefault(f"{name}.weight", []).append((dimension, index))
    if bias is not None:
        taken = bias if columns is not None else bias.index_select(0, index.to(bias.device))
        made.bias = nn.Parameter(taken.clone(), bias.requires_grad)
        if columns is None:
            cuts.setdefault(f"{name}.bias", []).append((0, index))
    replace(model, name, made)


def _settle(model: nn.Module) -> None:
    """Lets the config say what it can: a number that all blocks have in common; of heads where it has their size, too."""
    config, found = model.config, {}
    for units in removable(model).values():
        found.setdefault(units.config, set()).add(units.count)
    for key, counts in found.items():
        if len(counts) > 1 or key == "num_attention_heads" or (key == "num_key_value_heads" and
                                                               getattr(config, "head_dim", None) is None):
            continue
        if key == "num_key_value_heads":
            config.num_attention_heads = config.num_attention_heads // config.num_key_value_heads * min(counts)
        setattr(config, key, min(counts))


def _said(config, units: Units) -> int:
    found = getattr(config, units.config)
    return 4 * config.hidden_size if found is None else found  # GPT-2's n_inner


# --- the blocks: what makes their units, and what reads them ---

def _units(model: nn.Module, kind: str, config: str, readers: Iterable[str], writer: str, *, width: int,
           parts: int = 1) -> Units | None:
    """readers: layers that make the units, of which the first has `width` outputs for each, and that as often as it has
    parts."""
    layers = {name: model.get_submodule(name) for name in (*readers, writer)}
    if not all(is_linear(layer) or isinstance(layer, Structure) for layer in layers.values()):
        return None
    (k, _), reading = sizes(layers[writer]), {name: sizes(layer) for name, layer in layers.items() if name != writer}
    count = next(iter(reading.values()))[1] // (width * parts)
    cost = sum(k * n for k, n in map(sizes, layers.values())) // count
    rows = {name: torch.arange(n).view(parts, count, -1).transpose(0, 1).flatten(1) for name, (_, n) in reading.items()}
    return Units(kind, rows, writer, torch.arange(k).view(count, -1), config, cost)


def _encoder_heads(name: str, block: nn.Module, model: nn.Module) -> Units | None:
    return _units(model, "heads", "num_attention_heads", [f"{name}.{layer}" for layer in ("query", "key", "value")],
                  f"{name.rpartition('.')[0]}.output.dense", width=block.attention_head_size)


def _encoder_neurons(name: str, block: nn.Module, model: nn.Module) -> Units | None:
    return _units(model, "neurons", "intermediate_size", [f"{name}.dense"], f"{name.rpartition('.')[0]}.output.dense",
                  width=1)


def _decoder_heads(name: str, block: nn.Module, model: nn.Module) -> Units | None:
    return _units(model, "heads", "num_key_value_heads", [f"{name}.{layer}_proj" for layer in "kvq"], f"{name}.o_proj",
                  width=block.head_dim)


def _decoder_neurons(name: str, block: nn.Module, model: nn.Module) -> Units | None:
    return _units(model, "neurons", "intermediate_size", [f"{name}.gate_proj", f"{name}.up_proj"], f"{name}.down_proj",
                  width=1)


def _gpt2_heads(name: str, block: nn.Module, model: nn.Module) -> Units | None:
    if block.is_cross_attention:
        return None
    return _units(model, "heads", "num_attention_heads", [f"{name}.c_attn"], f"{name}.c_proj", width=block.head_dim, parts=3)


def _gpt2_neurons(name: str, block: nn.Module, model: nn.Module) -> Units | None:
    return _units(model, "neurons", "n_inner", [f"{name}.c_fc"], f"{name}.c_proj", width=1)


_KNOWN: dict[str, Callable[[str, nn.Module, nn.Module], Units | None]] = {
    "GPT2Attention": _gpt2_heads, "GPT2MLP": _gpt2_neurons}
_ENCODERS, _DECODERS = ("Bert", "Roberta", "Electra"), ("Llama", "Mistral", "Qwen2", "Qwen3")
_FAMILIES = {family.lower() for family in ("GPT2", *_ENCODERS, *_DECODERS)}  # transformers' model_type
for _family in _ENCODERS:
    _KNOWN |= {f"{_family}SelfAttention": _encoder_heads, f"{_family}Intermediate": _encoder_neurons}
for _family in _DECODERS:
    _KNOWN |= {f"{_family}Attention": _decoder_heads, f"{_family}MLP": _decoder_neurons}
