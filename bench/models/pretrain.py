"""Pre-training with low-rank + sparse layers against dense ones and low rank alone: `python bench/models/pretrain.py`, or
`--page` for the page alone, `--memory` for the memory alone. Needs bench/data/lm (`python bench/tasks.py --tasks lm`).

The grid below was fixed before the first run: the nano Llama of lowfat's presets on running text, equal tokens, one rate;
and of each the memory of a training step, what a formula says beside what was held. A finished training is kept under
bench/data/pretrain; results/pretrain.md is made from results/pretrain.json.
"""
import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

import lowfat
from lowfat.data import read_rows
from lowfat.presets import PRESETS
from lowfat.pretrain import made, pretrain
from lowfat.storage import write_json

sys.path.insert(0, str(Path(__file__).resolve().parent))
import quality  # noqa: E402  the script beside this one
from quality import tasks  # noqa: E402

NANO = PRESETS["nano"]
EQUAL = 69  # rank of low rank alone with the parameters of the sum, and not fewer
PLANS = {"dense": None, "low rank + sparse": NANO.plan(), "low rank, same rank": {"structure": "LowRank", "rank": NANO.rank},
         "low rank, same parameters": {"structure": "LowRank", "rank": EQUAL}}
FOLDER, RESULTS = quality.DATA / "pretrain", quality.RESULTS
KINDS = {"weights": "weights", "indices": "indices", "gradients": "gradients", "optimizer": "optimizer",
         "saved": "saved activations", "peak": "peak of the process"}


def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_file=str(quality.DATA / "lm" / "tokenizer.json"), pad_token="<pad>",
                                   bos_token="<s>", eos_token="</s>")


def train(name: str) -> dict:
    """The numbers of one training; from the folder where an earlier one of the same settings left them."""
    settings = {"plan": PLANS[name], "config": NANO.model_config(0).to_dict(), **NANO.options(), "torch": torch.__version__,
                "data": [tasks.sha256(quality.DATA / "lm" / f"{split}.jsonl") for split in ("train", "test")]}
    out = FOLDER / f"{name.replace(' ', '-').replace(',', '')}-{quality.digest(settings)}"
    if not (out / "numbers.json").exists():
        rows, test = (read_rows(quality.DATA / "lm" / f"{split}.jsonl") for split in ("train", "test"))
        words, seconds = tokenizer(), time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

        def tell(step: int, steps: int, what: str) -> None:
            if step % 20 == 0:
                print(f"{name}: {step} of {steps}, {what}", flush=True)

        _, report = pretrain(NANO.model_config(len(words)), rows, tokenizer=words, plan=PLANS[name], validation=test,
                             autocast=False, out=out / "model", overwrite=True, on_progress=tell, **NANO.options())
        write_json(out / "numbers.json", {
            "parameters": report.parameters, "losses": report.losses, "validation": report.validation,
            "ratio": report.replaced.ratio if report.replaced else 1.0, "resumed_from": report.resumed_from,
            "seconds": None if report.resumed_from else round(time.monotonic() - seconds, 1)})
    return json.loads((out / "numbers.json").read_text())


# ------------------------------------------------------------------------------------------------ memory
def memory(name: str, per_layer: bool) -> dict[str, int]:
    """Bytes, measured in a process of its own."""
    told = subprocess.run([sys.executable, __file__, "--measure", name, *(["--per-layer"] if per_layer else [])],
                          stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(told.stdout.splitlines()[-1])


def measure(name: str, per_layer: bool) -> dict[str, int]:
    """What a training step of the nano model holds; the peak is that of the process above what it held before the model."""
    words, started = tokenizer(), resident()
    model, _ = made(NANO.model_config(len(words)), words, PLANS[name], None, 0)
    groups = lowfat.parameter_groups(model, weight_decay=0.0)
    optimizer = lowfat.PerLayer(groups, lr=1e-3) if per_layer else torch.optim.AdamW(groups, lr=1e-3)
    tokens = torch.randint(0, len(words), (NANO.batch_size, NANO.length))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved, gradients = {}, 0

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for step in range(3):
        with torch.autograd.graph.saved_tensors_hooks(keep if step == 2 else lambda tensor: tensor, lambda tensor: tensor):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        gradients = sum(one.grad.nbytes for one in model.parameters() if one.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    state = sum(value.nbytes for one in optimizer.state.values() for value in one.values()
                if isinstance(value, torch.Tensor))
    gc.collect()
    return {"weights": sum(one.nbytes for one in model.parameters()), "indices": sum(
                one.nbytes for name, one in model.named_buffers() if name.rpartition(".")[2] in ("starts", "columns")),
            "gradients": gradients, "optimizer": state, "saved": sum(saved.values()), "peak": peak() - started}


def formula(name: str) -> int:
    """Values of the layers of the blocks: k n dense, r (k + n) of low rank, floor(density k n) more of the sum."""
    layers = NANO.layers * [*4 * [(NANO.hidden, NANO.hidden)], *2 * [(NANO.hidden, NANO.intermediate)],
                            (NANO.intermediate, NANO.hidden)]
    plan = PLANS[name]
    if plan is None:
        return sum(k * n for k, n in layers)
    return sum(plan["rank"] * (k + n) + math.floor(plan.get("density", 0) * k * n) for k, n in layers)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM")) * 1024


# ------------------------------------------------------------------------------------------------ the page
def page(found: dict) -> str:
    about = found["about"]
    lines = ["# Pre-training with low-rank + sparse layers", "",
             "Made by `python bench/models/pretrain.py --page` from `pretrain.json`; do not edit.",
             f"Llama, hidden {NANO.hidden}, {NANO.layers} layers, {NANO.steps} steps of {NANO.batch_size} x {NANO.length} "
             "tokens, rate 3e-3, cosine to a tenth,",
             f"AdamW, no weight decay, fp32, one seed. SLTrain (2406.02214): rank {NANO.rank}, density "
             f"{NANO.density:.0%}, alpha {NANO.alpha:g}. {about['cpu']}, {about['threads']} thread(s), torch "
             f"{about['torch']}.", "",
             "| layers of the blocks | their parameters | of dense | all parameters | nats a token, test | perplexity | s |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for name in PLANS:
        one = found["trained"].get(name)
        if one is None:
            lines.append(f"| {name} | {formula(name):,} | {formula(name) / formula('dense'):.1%} | not run | | | |")
            continue
        nats = one["validation"]["nats_per_token"]
        lines.append(f"| {name} | {formula(name):,} | {formula(name) / formula('dense'):.1%} | {one['parameters']:,} | "
                     f"{nats:.3f} | {math.exp(nats):.1f} | {one['seconds'] or 'in parts'} |")
    lines += ["", "Megabytes of one training step (AdamW, fp32; the embedding included):", "",
              "| layers | updates | " + " | ".join(KINDS.values()) + " |", "| --- " * (2 + len(KINDS)) + "|"]
    for one in found["memory"]:
        lines.append(f"| {one['name']} | {'per layer' if one['per_layer'] else 'after the pass'} | "
                     + " | ".join(f"{one[kind] / 1e6:.1f}" for kind in KINDS) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="make the page alone")
    parser.add_argument("--memory", action="store_true", help="measure the memory, train nothing")
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--per-layer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.per_layer)))
        return
    table = RESULTS / "pretrain.json"
    found = json.loads(table.read_text()) if table.exists() else {"trained": {}, "memory": []}
    if not options.page:
        from lowfat.measured import header

        found["about"] = header(torch.get_num_threads())
        found["memory"] = [{"name": name, "per_layer": per_layer, **memory(name, per_layer)}
                           for name in PLANS for per_layer in (False, True)]
        for name in () if options.memory else PLANS:
            found["trained"][name] = train(name)
            write_json(table, found)
        write_json(table, found)
    (RESULTS / "pretrain.md").write_text(page(found))


if __name__ == "__main__":
    main()
