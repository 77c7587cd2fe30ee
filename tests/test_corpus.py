"""T-corpus: bad checkpoints, one per rule and field; each is refused by the right class, which names file and field.

A case changes a good folder. Unless it says otherwise the manifest is then made to agree again, as somebody who means harm
would do: the digests pass, and the next line of defence has to hold. Each is also opened the way transformers does it.
"""
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers.models.bert.modeling_bert  # noqa: F401  while tests are collected, where no clock runs: it takes seconds
from safetensors.torch import load_file, save_file

from lowfat import checkpoint, manifest
from lowfat.errors import (ArgumentError, CompatibilityError, FormatError, IndexRangeError, IntegrityError, LowfatError,
                           NumericsError)
from lowfat.layers import dense_weight, factorizable, replace
from lowfat.strict_json import dumps
from lowfat.structures import LowRank, Monarch
from lowfat.validate import INDEX, WEIGHTS

LAYER = "bert.encoder.layer.0.attention.self.query"
SHARD, NEXT = "lowfat-00001-of-00003.safetensors", "lowfat-00002-of-00003.safetensors"


class Case(NamedTuple):
    name: str
    change: Callable[[Path], None]
    error: type[Exception]
    words: str             # parts of the message, in this order
    sealed: bool = True    # the manifest agrees with the changed files
    base: str = "single"   # or "shards", "rows"
    plain: bool = True     # from_pretrained refuses it too; else what it does is transformers' own business


def put(name: str, data: bytes | str):
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def edit(name: str, change: Callable[[dict], object]):
    """A change to the value in a JSON file."""
    def apply(folder):
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))
    return apply


def config(**values):
    return edit("config.json", lambda value: value.update(values))


def without(key: str):
    return edit("config.json", lambda value: value.pop(key))


def section(**values):
    return edit("config.json", lambda value: value["quantization_config"].update(values))


def section_without(key: str):
    return edit("config.json", lambda value: value["quantization_config"].pop(key))


def layer(**values):
    return edit("config.json", lambda value: value["quantization_config"]["modules"][LAYER].update(values))


def layer_called(name: str):
    def change(value):
        modules = value["quantization_config"]["modules"]
        modules[name] = modules.pop(LAYER)
    return edit("config.json", change)


def resealed(change: Callable[[dict], object]):
    """A change to the manifest that keeps its own digest right."""
    def apply(value):
        change(value)
        value["digest"] = manifest._own_digest(value)
    return edit(manifest.NAME, apply)


def tensors(change: Callable[[dict], object], name: str = WEIGHTS):
    """A change to the tensors of a weight file."""
    def apply(folder):
        held = {key: value.clone() for key, value in load_file(folder / name).items()}
        change(held)
        save_file(held, folder / name, {"format": "pt"})
    return apply


def header(change: Callable[[dict], object], extra: bytes = b""):
    """A change to the header of the weight file, the data staying as it is. extra: bytes after the data."""
    def apply(folder):
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        value = json.loads(data[8:8 + length])
        text = (change(value) or json.dumps(value)).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length:] + extra)
    return apply


def entry(**values):
    """A change to the header entry of the first factor."""
    return header(lambda value: value[f"{LAYER}.v"].update(values))


def data(change: Callable[[bytes], bytes], name: str = WEIGHTS):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def instead(name: str, make: Callable[[Path], object]):
    """Something else in the place of a file."""
    def apply(folder):
        (folder / name).unlink()
        make(folder / name)
    return apply


def outside(path: Path):
    """The same file, outside the folder, and a link to it."""
    source = path.parent.parent / "good" / path.name
    path.symlink_to(source)


def offsets(change: Callable[[int, int], list]):
    def apply(value):
        value[f"{LAYER}.v"]["data_offsets"] = change(*value[f"{LAYER}.v"]["data_offsets"])
    return header(apply)


def shift_after(first: int):
    """Every tensor from byte `first` on starts later: a hole."""
    def apply(value):
        for key, item in value.items():
            if key != "__metadata__" and item["data_offsets"][0] >= first:
                item["data_offsets"] = [offset + 8 for offset in item["data_offsets"]]
    return apply


def twice(value: dict) -> str:
    text = json.dumps(value)
    return text[:-1] + f', "{LAYER}.v": {json.dumps(value[f"{LAYER}.v"])}}}'


def crowd(value: dict) -> str:
    return json.dumps({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)})


def nan(held: dict) -> None:
    held[f"{LAYER}.v"][1, 2] = float("nan")


def infinite_norm(held: dict) -> None:
    held["bert.embeddings.LayerNorm.weight"][3] = float("inf")


def weight_map(change: Callable[[dict], object]):
    return edit(INDEX, lambda value: change(value["weight_map"]))


def swap(folder: Path) -> None:
    (folder / SHARD).rename(folder / "third")
    (folder / NEXT).rename(folder / SHARD)
    (folder / "third").rename(folder / NEXT)


def twin(folder: Path) -> None:
    for name in (SHARD, NEXT):
        tensors(lambda held: held.update(twin=torch.zeros(2)), name)(folder)


def first_of(names: dict) -> str:
    return sorted(names)[0]


F, I, C, N = FormatError, IntegrityError, CompatibilityError, NumericsError
HERE = "config.json: quantization_config"
KEEP = False  # for sealed: the manifest stays as it was written

MANIFEST_CASES = [
    Case("manifest missing", lambda folder: (folder / manifest.NAME).unlink(), I, "manifest.json: missing", KEEP),
    Case("manifest empty", put(manifest.NAME, ""), F, "manifest.json: not JSON", KEEP),
    Case("manifest cut", data(lambda text: text[:-9], manifest.NAME), F, "manifest.json: not JSON", KEEP),
    Case("manifest a list", put(manifest.NAME, "[]"), F, "manifest.json: has no format", KEEP),
    Case("manifest with a key twice", put(manifest.NAME, '{"format": 1, "format": 1}'),
         F, "manifest.json: key 'format'", KEEP),
    Case("manifest too deep", put(manifest.NAME, "[" * 99 + "]" * 99), F, "manifest.json: nested", KEEP),
    Case("manifest of a newer lowfat", resealed(lambda m: m.update(format=2)),
         C, "manifest.json: has format 2, reads up to 1", KEEP),
    Case("manifest format as text", resealed(lambda m: m.update(format="1")), F, "manifest.json: has no format", KEEP),
    Case("manifest without digest", edit(manifest.NAME, lambda m: m.pop("digest")),
         I, "manifest.json: its own digest", KEEP),
    Case("manifest edited", edit(manifest.NAME, lambda m: m["facts"].update(torch="0")),
         I, "manifest.json: its own digest", KEEP),
    Case("manifest with a key too many", resealed(lambda m: m.update(run="x.py")),
         F, "manifest.json: has the keys run", KEEP),
    Case("manifest files a list", resealed(lambda m: m.update(files=[])), F, "manifest.json: files", KEEP),
    Case("manifest facts a text", resealed(lambda m: m.update(facts="")), F, "manifest.json: facts", KEEP),
    Case("manifest entry empty", resealed(lambda m: m["files"].update({WEIGHTS: {}})),
         F, f"manifest.json: files.{WEIGHTS}", KEEP),
    Case("manifest wrong size", resealed(lambda m: m["files"][WEIGHTS].update(bytes=7)),
         I, f"{WEIGHTS}: bytes, says 7", KEEP),
    Case("manifest wrong digest", resealed(lambda m: m["files"]["config.json"].update(sha256="0")),
         I, "config.json: SHA-256", KEEP),
    Case("manifest without the weights", resealed(lambda m: m["files"].pop(WEIGHTS)), I, f"{WEIGHTS}: not listed", KEEP),
    Case("manifest without the config", resealed(lambda m: m["files"].pop("config.json")),
         I, "config.json: not listed", KEEP),
    *(Case(f"manifest names {name}", resealed(lambda m, name=name: m["files"].update({name: {"bytes": 0, "sha256": ""}})), F,
           f"manifest.json: {name}".replace("\\", "\\\\"), KEEP)
      for name in ("../config.json", "/etc/hostname", "a//b", "./config.json", "a\\b", "", "pytorch_model.bin", "state.pt")),
    Case("manifest names a missing file", resealed(lambda m: m["files"].update(x={"bytes": 0, "sha256": ""})), I,
         "x: listed in manifest.json, missing", KEEP, plain=False),
]

FILE_CASES = [
    Case("weights missing", lambda folder: (folder / WEIGHTS).unlink(), I, f"{WEIGHTS}: listed, missing", KEEP),
    Case("weights empty", put(WEIGHTS, ""), I, f"{WEIGHTS}: 0 bytes, truncated", KEEP),
    Case("weights one byte short", data(lambda old: old[:-1]), I, f"{WEIGHTS}: truncated", KEEP),
    Case("weights cut in the header", data(lambda old: old[:100]), I, f"{WEIGHTS}: 100 bytes, truncated", KEEP),
    Case("weights one byte long", data(lambda old: old + b"\0"), I, f"{WEIGHTS}: bytes, says", KEEP),
    Case("weights one bit wrong", data(lambda old: old[:-1] + bytes([old[-1] ^ 1])), I, f"{WEIGHTS}: SHA-256, tensor", KEEP),
    Case("weights with another header", entry(dtype="I32"), I, f"{WEIGHTS}: ", KEEP),
    Case("weights a folder", instead(WEIGHTS, Path.mkdir), F, f"{WEIGHTS}: not a regular file", KEEP),
    Case("weights a pipe", instead(WEIGHTS, os.mkfifo), F, f"{WEIGHTS}: not a regular file", KEEP),
    Case("weights a link outside", instead(WEIGHTS, outside), F, f"{WEIGHTS}: links to, outside", KEEP),
    Case("weights a dangling link", instead(WEIGHTS, lambda path: path.symlink_to("no")), I, f"{WEIGHTS}: missing", KEEP),
    Case("config a link outside", instead("config.json", outside), F, "config.json: links to, outside", KEEP),
    Case("config missing", lambda folder: (folder / "config.json").unlink(), F, "config.json: missing", KEEP),
    Case("config edited", config(num_labels=9), I, "config.json: bytes", KEEP),
    Case("config a pipe", instead("config.json", os.mkfifo),
         F, "config.json: not a regular file", KEEP, plain=False),  # waits
    Case("pickle instead of weights", lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), F,
         "pytorch_model.bin: pickle", KEEP),
    Case("adapter beside it", put("adapter_config.json", "{}"), F, "adapter_config.json: adapter", KEEP, plain=False),
    Case("a file, not a folder", lambda folder: (shutil.rmtree(folder), folder.write_text("")),
         ArgumentError, "no such folder", KEEP),
]

CONFIG_CASES = [
    Case("config empty", put("config.json", ""), F, "config.json: not JSON"),
    Case("config a list", put("config.json", "[]"), F, "config.json: not an object"),
    Case("config not UTF-8", put("config.json", b'{"a": "\xff"}'), F, "config.json: not JSON"),
    Case("config with NaN", data(lambda text: text.replace(b"0.02", b"NaN"), "config.json"), F, "config.json: NaN"),
    Case("config too deep", config(deep=json.loads("[" * 20 + "]" * 20)), F, "config.json: nested"),
    Case("config a bomb", config(padding="x" * (1 << 20)), F, "config.json: larger"),
    Case("config with a key twice", data(lambda text: text.replace(b"{", b'{"vocab_size": 9, ', 1), "config.json"), F,
         "config.json: key 'vocab_size'"),
    Case("two layers with one name", data(lambda text: text.replace(b"layer.1.output.dense", b"layer.0.output.dense"),
                                          "config.json"), F, "config.json: key 'bert.encoder.layer.0.output.dense'"),
    Case("auto_map", config(auto_map={"AutoModel": "evil.Model"}), F, "config.json: auto_map names code", plain=False),
    Case("auto_map inside", config(text_config={"auto_map": {}}), F, "config.json: auto_map names code"),
    Case("custom pipelines", config(custom_pipelines={}), F, "config.json: custom_pipelines names code"),
    Case("kernel of a stranger", config(_attn_implementation="evil/kernel"),
         F, "config.json: _attn_implementation names code"),
    Case("architectures missing", without("architectures"), F, "config.json: architectures", plain=False),
    Case("architectures empty", config(architectures=[]), F, "config.json: architectures", plain=False),
    Case("architectures a number", config(architectures=[1]), F, "config.json: architectures", plain=False),
    Case("architectures unknown", config(architectures=["BertForMoney"]), F, "config.json: architectures names BertForMoney",
         plain=False),
    Case("architectures no model", config(architectures=["BertTokenizer"]),
         F, "config.json: architectures names BertTokenizer",
         plain=False),
    Case("architectures no class", config(architectures=["logging"]),
         F, "config.json: architectures names logging", plain=False),
    Case("model_type of another", config(model_type="gpt2"), F, "config.json: model_type is 'gpt2'"),
    Case("model_type missing", without("model_type"), F, "config.json: model_type is None"),
    Case("a billion layers", config(num_hidden_layers=10 ** 9),
         F, "config.json: num_hidden_layers is 1000000000", plain=False),
    Case("a layer more", config(num_hidden_layers=3), F, f"{WEIGHTS}: tensor bert.encoder.layer.2 missing", plain=False),
    Case("a layer less", config(num_hidden_layers=1), F, f"{HERE}.modules.bert.encoder.layer.1 no module", plain=False),
    Case("another width", config(hidden_size=64), F, f"{HERE}.modules in_features 32, model has 64"),
    Case("width zero", config(hidden_size=0), F, "config.json: "),
    Case("width a text", config(hidden_size="32"), F, "config.json: cannot be built"),
    Case("a trillion words", config(vocab_size=10 ** 12), F, f"{WEIGHTS}: shape of bert.embeddings.word_embeddings.weight"),
    Case("more words than int64", config(vocab_size=10 ** 30), F, "config.json: cannot be built"),
    Case("unknown activation", config(hidden_act="money"), F, "config.json: cannot be built"),
    Case("more labels", config(id2label={str(i): "x" for i in range(9)}), F, f"{WEIGHTS}: shape of classifier.weight"),
]

SECTION_CASES = [
    Case("section missing", without("quantization_config"), F, HERE),
    Case("section null", config(quantization_config=None), F, HERE),
    Case("section a list", config(quantization_config=[]), F, HERE),
    Case("method missing", section_without("quant_method"), F, f"{HERE}.quant_method is None"),
    Case("method of another", section(quant_method="gptq"), F, f"{HERE}.quant_method is 'gptq'"),
    *(Case(f"format {value!r}", section(format=value), F, f"{HERE}.format is") for value in (0, -1, "1", True, 1.0, None)),
    Case("format missing", section_without("format"), F, f"{HERE}.format is None"),
    Case("format of a newer lowfat", section(format=2, new=1), C, f"{HERE}.format is 2, reads up to 1"),
    Case("unknown key", section(ratio=-1), F, f"{HERE} unknown keys ratio"),
    *(Case(f"{key} missing", section_without(key), F, f"{HERE} lacks {key}") for key in ("weights", "modules", "ties")),
    *(Case(f"weights {value!r}", section(weights=value), F, f"{HERE}.weights is")
      for value in ("../x.safetensors", "model.safetensors", "pytorch_model.bin", 1, [])),
    Case("weights the index", section(weights=INDEX), F, f"{INDEX}: missing"),
    Case("modules a list", section(modules=[]), F, f"{HERE}.modules"),
    Case("modules empty", section(modules={}), F, f"{WEIGHTS}: tensor bert.encoder.layer.0 missing", plain=False),
    Case("module a number", section(modules={LAYER: 5}), F, f"{HERE}.modules.{LAYER}"),
    Case("module not in the model", layer_called("bert.encoder.layer.7.query"), F, f"{HERE}.modules.bert.encoder.layer.7",
         plain=False),
    Case("module without a name", layer_called(""), F, f"{HERE}.modules."),
    Case("module a container", layer_called("bert.encoder"), F, f"{HERE}.modules.bert.encoder replaces a BertEncoder"),
    Case("module an embedding", layer_called("bert.embeddings.word_embeddings"), F, "replaces a Embedding"),
    Case("module left out", edit("config.json", lambda c: c["quantization_config"]["modules"].pop(LAYER)), F,
         f"{WEIGHTS}: tensor {LAYER}.weight is missing", plain=False),
    Case("structure unknown", layer(structure="Monarchy"),
         F, f"{HERE}.modules.{LAYER}.structure is 'Monarchy', known: LowRank"),
    Case("structure a list", layer(structure=[]), F, f"{HERE}.modules.{LAYER}.structure"),
    Case("structure a base class", layer(structure="Structure"), F, f"{HERE}.modules.{LAYER}.structure is 'Structure'"),
    *(Case(f"rank {value!r}", layer(rank=value), F, f"{HERE}.modules.{LAYER}: rank")
      for value in (0, -1, 33, "5", 5.0, True, None, [5], 2 ** 63, 10 ** 30)),
    Case("rank of another layer", layer(rank=6), F, f"{WEIGHTS}: shape of {LAYER}.v is [5, 32], implies [6, 32]"),
    *(Case(f"in_features {value!r}", layer(in_features=value), F, f"{HERE}.modules.{LAYER}: in_features")
      for value in (-32, 0, "32")),
    Case("in_features of another layer", layer(in_features=48), F, f"{HERE}.modules.{LAYER} in_features 48, model has 32"),
    Case("out_features beyond int64", layer(out_features=2 ** 80), F, f"{HERE}.modules.{LAYER}"),
    Case("bias a text", layer(bias="yes"), F, f"{HERE}.modules.{LAYER}"),
    Case("bias taken away", layer(bias=False), F, f"{WEIGHTS}: tensor {LAYER}.bias is no part", plain=False),
    Case("device in a layer", layer(device="cpu"), F, f"{HERE}.modules.{LAYER}"),
    Case("dtype in a layer", layer(dtype=None), F, f"{HERE}.modules.{LAYER}"),
    Case("unknown key in a layer", layer(scale=2.0), F, f"{HERE}.modules.{LAYER}: scale"),
    Case("ties a list", section(ties=[]), F, f"{HERE}.ties"),
    Case("ties of no module", section(ties={"classifier.weight": f"{LAYER}.v"}),
         F, f"{HERE}.ties names 'classifier.weight'"),
    Case("ties to a number", section(ties={f"{LAYER}.v": 1}), F, f"{HERE}.ties names 1"),
    Case("ties to no parameter", section(ties={f"{LAYER}.v": f"{LAYER}.x"}), F, f"{HERE}.ties names '{LAYER}.x'"),
    Case("ties of two shapes", section(ties={f"{LAYER}.v": f"{LAYER}.u"}),
         F, f"{HERE}.ties makes {LAYER}.v and {LAYER}.u one"),
]

WEIGHT_CASES = [
    Case("seven bytes", put(WEIGHTS, b"\7\0\0\0\0\0\0"), F, f"{WEIGHTS}: 7 bytes, too short"),
    Case("header beyond the file", data(lambda old: struct.pack("<Q", len(old)) + old[8:]),
         F, f"{WEIGHTS}: header, announced"),
    Case("header of 2^63 bytes", data(lambda old: struct.pack("<Q", 1 << 63) + old[8:]), F, f"{WEIGHTS}: header, announced"),
    Case("header length the other way round", data(lambda old: old[:8][::-1] + old[8:]), F, f"{WEIGHTS}: header, announced"),
    Case("archive in front", data(lambda old: b"PK\3\4\0\0\0\0" + old), F, f"{WEIGHTS}: "),
    Case("header shorter than it is", data(lambda old: struct.pack("<Q", 50) + old[8:]), F, f"{WEIGHTS}: not JSON"),
    Case("header a list", header(lambda value: "[]"), F, f"{WEIGHTS}: header is not an object"),
    Case("header not JSON", header(lambda value: "{]"), F, f"{WEIGHTS}: not JSON"),
    Case("header with a tensor twice", header(twice), F, f"{WEIGHTS}: key '{LAYER}.v' appears twice"),
    Case("header of 100,000 tensors", header(crowd), F, f"{WEIGHTS}: too large"),
    Case("header metadata a number", header(lambda value: value.update(__metadata__={"a": 1})),
         F, f"{WEIGHTS}: __metadata__"),
    Case("dtype unknown", entry(dtype="F31"), F, f"{WEIGHTS}: dtype of {LAYER}.v is 'F31'"),
    Case("dtype a number", entry(dtype=32), F, f"{WEIGHTS}: dtype of {LAYER}.v is 32"),
    Case("dtype a list", entry(dtype=["F32"]), F, f"{WEIGHTS}: dtype of {LAYER}.v"),
    Case("dtype integer", entry(dtype="I32"), F, f"{WEIGHTS}: dtype of {LAYER}.v is I32"),
    Case("dtype half, twice as many", entry(dtype="F16", shape=[10, 32]), F, f"{WEIGHTS}: shape of {LAYER}.v"),
    Case("dtype double", entry(dtype="F64"), F, f"{WEIGHTS}: {LAYER}.v stores 640 bytes"),
    Case("shape transposed", entry(shape=[32, 5]), F, f"{WEIGHTS}: shape of {LAYER}.v is [32, 5]"),
    Case("shape flat", entry(shape=[160]), F, f"{WEIGHTS}: shape of {LAYER}.v is [160]"),
    *(Case(f"shape {value!r}", entry(shape=value), F, f"{WEIGHTS}: shape of {LAYER}.v")
      for value in ([-5, -32], [5.0, 32], ["5", 32], [True, 160], "x", None)),
    Case("shape beyond int64", entry(shape=[2 ** 40, 2 ** 40]), F, f"{WEIGHTS}: {LAYER}.v stores 640 bytes"),
    Case("shape with a product of zero", entry(shape=[2 ** 63, 0]), F, f"{WEIGHTS}: {LAYER}.v stores 640 bytes"),
    Case("offsets backwards", offsets(lambda a, b: [b, a]), F, f"{WEIGHTS}: data_offsets of {LAYER}.v"),
    Case("offsets negative", offsets(lambda a, b: [-640, 0]), F, f"{WEIGHTS}: data_offsets of {LAYER}.v"),
    Case("offsets three", offsets(lambda a, b: [a, b, b]), F, f"{WEIGHTS}: data_offsets of {LAYER}.v"),
    Case("offsets beyond the file", offsets(lambda a, b: [10 ** 9, 10 ** 9 + 640]),
         F, f"{WEIGHTS}: data_offsets of {LAYER}.v"),
    Case("offsets over another tensor", offsets(lambda a, b: [a - 640, b - 640]), F, f"{WEIGHTS}: data_offsets"),
    Case("hole between tensors", header(shift_after(1000), b"\0" * 8), F, f"{WEIGHTS}: data_offsets, expected"),
    Case("bytes after the tensors", data(lambda old: old + b"\0" * 8), F, f"{WEIGHTS}: tensors take"),
    Case("entry with a key too many", entry(code="x"), F, f"{WEIGHTS}: {LAYER}.v must have"),
    Case("entry without a dtype", header(lambda value: value[f"{LAYER}.v"].pop("dtype") and None),
         F, f"{WEIGHTS}: {LAYER}.v must"),
    Case("entry a list", header(lambda value: value.update({f"{LAYER}.v": []})), F, f"{WEIGHTS}: {LAYER}.v must have"),
    Case("factor missing", tensors(lambda held: held.pop(f"{LAYER}.v")), F, f"{WEIGHTS}: tensor {LAYER}.v is missing"),
    Case("bias of a factor missing", tensors(lambda held: held.pop(f"{LAYER}.bias")), F, f"{WEIGHTS}: tensor {LAYER}.bias"),
    Case("embedding missing", tensors(lambda held: held.pop("bert.embeddings.word_embeddings.weight")), F,
         f"{WEIGHTS}: tensor bert.embeddings.word_embeddings.weight is missing", plain=False),
    Case("tensor too many", tensors(lambda held: held.update(extra=torch.zeros(1))),
         F, f"{WEIGHTS}: tensor extra is no part",
         plain=False),
    Case("factor renamed", tensors(lambda held: held.update({f"{LAYER}.w": held.pop(f"{LAYER}.v")})),
         F, f"{WEIGHTS}: {LAYER}.v"),
    Case("no tensors", tensors(dict.clear), F, "config.json: num_hidden_layers is 2, 0 tensors"),
    Case("another model's weights", lambda folder: shutil.copy(folder.parent / "llama" / WEIGHTS, folder), F,
         f"{WEIGHTS}: tensor bert.embeddings"),
    Case("NaN in a factor", tensors(nan), N, f"{WEIGHTS}: {LAYER}.v holds NaN", plain=False),
    Case("infinity in a norm", tensors(infinite_norm),
         N, f"{WEIGHTS}: bert.embeddings.LayerNorm.weight holds NaN", plain=False),
]

SHARD_CASES = [
    Case("index missing", lambda folder: (folder / INDEX).unlink(), F, f"{INDEX}: missing"),
    Case("index empty", put(INDEX, ""), F, f"{INDEX}: not JSON"),
    Case("index a list", put(INDEX, "[]"), F, f"{INDEX}: weight_map"),
    Case("index without a map", put(INDEX, "{}"), F, f"{INDEX}: weight_map"),
    Case("index map a list", put(INDEX, '{"weight_map": []}'), F, f"{INDEX}: weight_map"),
    *(Case(f"shard {value!r}", weight_map(lambda names, value=value: names.update({first_of(names): value})), F, INDEX)
      for value in ("/etc/hostname", f"../good/{SHARD}", f"sub/{SHARD}", "pytorch_model.bin", "config.json", 1, None, "")),
    Case("shard not in the folder", data(lambda text: text.replace(b"00001-of", b"00009-of"), INDEX), F,
         "lowfat-00009-of-00003.safetensors: missing"),
    Case("shard not in the manifest", resealed(lambda m: m["files"].pop(SHARD)), I, f"{SHARD}: not listed", KEEP),
    Case("shard missing", lambda folder: (folder / SHARD).unlink(), I, f"{SHARD}: listed, missing", KEEP),
    Case("shard cut", data(lambda old: old[:-3], SHARD), I, f"{SHARD}: truncated", KEEP),
    Case("shard of another place", data(lambda old: old.replace(b"F32", b"I32"), SHARD), I, f"{SHARD}: SHA-256", KEEP),
    Case("shard a link outside", instead(SHARD, outside), F, f"{SHARD}: links to, outside", KEEP),
    Case("shards swapped", swap, F, f"{INDEX}: weight_map and {SHARD} differ"),
    Case("tensor in the wrong shard", weight_map(lambda names: names.update({first_of(names): max(names.values())})), F,
         f"{INDEX}: weight_map, differ"),
    Case("tensor not in the index", weight_map(lambda names: names.pop(first_of(names))), F, f"{INDEX}: weight_map, differ"),
    Case("tensor that no shard has", weight_map(lambda names: names.update(ghost=SHARD)), F, f"{INDEX}: differ in ghost"),
    Case("tensor in two shards", twin, F, f"{INDEX}: differ in twin"),
]
SHARD_CASES = [case._replace(base="shards") for case in SHARD_CASES]


def rows(change: Callable[[torch.Tensor], torch.Tensor]):
    """A change to the permutation of a Monarch layer's rows."""
    return tensors(lambda held: held.update({f"{LAYER}.rows": change(held[f"{LAYER}.rows"])}))


ROW_CASES = [
    Case("row twice", rows(lambda held: held.index_fill(0, torch.tensor([1]), int(held[0]))), IndexRangeError,
         f"{WEIGHTS}: {LAYER}: rows twice"),
    Case("row beyond the outputs", rows(lambda held: held + 1), IndexRangeError, f"{WEIGHTS}: {LAYER}: rows found 32"),
    Case("row below zero", rows(lambda held: held - 1), IndexRangeError, f"{WEIGHTS}: {LAYER}: rows found -1"),
    Case("rows in 64 bits", rows(torch.Tensor.long), F, f"{WEIGHTS}: dtype of {LAYER}.rows is I64"),
    Case("rows in 8 bits", rows(lambda held: held.to(torch.uint8)), F, f"{WEIGHTS}: dtype of {LAYER}.rows is U8"),
    Case("rows as numbers with a point", rows(torch.Tensor.float), F, f"{WEIGHTS}: dtype of {LAYER}.rows is F32"),
    Case("a row less", rows(lambda held: held[:-1].clone()), F, f"{WEIGHTS}: shape of {LAYER}.rows is [31]"),
    Case("rows missing", tensors(lambda held: held.pop(f"{LAYER}.rows")), F, f"{WEIGHTS}: tensor {LAYER}.rows is missing"),
    Case("rows that config.json has not", layer(grouped=False), F, f"{WEIGHTS}: tensor {LAYER}.rows is no part",
         plain=False),
    Case("grouped a text", layer(grouped="yes"), F, f"{HERE}.modules.{LAYER}"),
    Case("grouped left out", edit("config.json", lambda c: c["quantization_config"]["modules"][LAYER].pop("grouped")), F,
         f"{HERE}.modules.{LAYER}"),
]
ROW_CASES = [case._replace(base="rows") for case in ROW_CASES]
CASES = MANIFEST_CASES + FILE_CASES + CONFIG_CASES + SECTION_CASES + WEIGHT_CASES + SHARD_CASES + ROW_CASES


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The folders that the cases start from."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
    folder = tmp_path_factory.mktemp("corpus")
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=40, initializer_range=0.02))
    other = LlamaForCausalLM(LlamaConfig(**sizes))
    for each in (model, other):
        for name, module in factorizable(each).items():
            replace(each, name, LowRank.from_dense(dense_weight(module), module.bias, rank=5))
    checkpoint.save(model, folder / "single")
    checkpoint.save(model, folder / "shards", max_shard_size="20KB")
    checkpoint.save(other, folder / "llama")
    permuted = BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=40, initializer_range=0.02))
    for name, module in factorizable(permuted).items():
        order = torch.randperm(module.out_features)
        replace(permuted, name, Monarch.from_dense(dense_weight(module), module.bias, blocks=2, rank=4, rows=order))
    checkpoint.save(permuted, folder / "rows")
    return folder


def seal(folder: Path) -> None:
    """The manifest of the folder as it now is, made without looking into the files."""
    content = json.loads((folder / manifest.NAME).read_text())
    paths = [path for path in sorted(folder.iterdir()) if path.name != manifest.NAME]
    content["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": manifest.digest(path)} for path in paths}
    (folder / manifest.NAME).write_text(dumps({**content, "digest": manifest._own_digest(content)}))


def make(case: Case, good: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bad"
    shutil.copytree(good / case.base, folder)
    shutil.copytree(good / case.base, tmp_path / "good")
    shutil.copytree(good / "llama", tmp_path / "llama")
    case.change(folder)
    if case.sealed:
        seal(folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_checkpoint_is_refused(case, good, tmp_path):
    from transformers import AutoModelForSequenceClassification
    folder = make(case, good, tmp_path)
    start = time.process_time()
    with pytest.raises(case.error) as caught:
        checkpoint.load(folder)
    assert isinstance(caught.value, LowfatError)
    text, place = str(caught.value), 0
    for words in case.words.split(", "):
        for word in words.split():
            place = text.find(word, place)
            assert place >= 0, f"{word!r} of {case.words!r} is not in {text!r}"
    assert time.process_time() - start < 5  # seconds, reliability of a loader that others feed
    if case.plain:
        with pytest.raises(Exception):
            AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)


def test_the_corpus_starts_from_good_folders(good, tmp_path):
    """Sealing alone must not break a folder: else every case above would pass for the wrong reason."""
    for base in ("single", "shards", "rows"):
        folder = shutil.copytree(good / base, tmp_path / base)
        seal(folder)
        checkpoint.load(folder)
    assert len(CASES) >= 80


def test_infinity_is_loaded_when_asked_for(good, tmp_path):
    folder = make(next(case for case in CASES if case.name == "NaN in a factor"), good, tmp_path)
    assert checkpoint.load(folder, finite=False).get_parameter(f"{LAYER}.v")[1, 2].isnan()
