"""Wavelet adapters beside LoRA and PEFT's WaveFT of as many parameters: `python bench/models/adapters.py`, or `--page` for
the page alone.

The grid below was fixed before the first run: the pretrained encoder and a new head on `sections`, adapters on all linear
layers of its blocks, equal steps. Each adapter takes the rate that is best on the validation rows with the first seed; the
test rows are read at that rate, with three seeds of head, adapter and order. Every finished training is kept under
bench/data/adapters; results/adapters.md is made from results/adapters.json.
"""
import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import peft
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lowfat
from lowfat.data import read_rows
from lowfat.demo import ENCODER_SHA256, encoder_folder
from lowfat.evaluate import evaluate
from lowfat.layers import adaptable
from lowfat.measured import header
from lowfat.storage import write_json
from lowfat.structures.structure import sizes

sys.path.insert(0, str(Path(__file__).resolve().parent))
import quality  # noqa: E402  the script beside this one
from quality import tasks  # noqa: E402

RANK, ALPHA = 8, 16
RATES, SEEDS, STEPS, BATCH, VALIDATION_ROWS = (1e-4, 3e-4, 1e-3, 3e-3), (0, 1, 2), 150, 32, 1000
TASK = quality.TASKS["sections"]
CACHE = quality.DATA / "adapters"


def lora(model: nn.Module) -> None:
    peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(adaptable(model, None))))


def waveft(model: nn.Module) -> None:
    """At PEFT's own scale; as many coefficients in each layer as a LoRA has parameters there."""
    counts = {re.escape(name): RANK * sum(sizes(layer)) for name, layer in adaptable(model, None).items()}
    peft.get_peft_model(model, peft.WaveFTConfig(n_frequency=1, n_frequency_pattern=counts, wavelet_family="db1",
                                                 target_modules=list(adaptable(model, None))))


def wavelet(rank: int = RANK, **options) -> Callable[[nn.Module], object]:
    return partial(lowfat.adapt, rank=rank, alpha=ALPHA * rank / RANK, **options)


ADAPTERS: dict[str, Callable[[nn.Module], object]] = {
    "none, the head alone": lambda model: model.requires_grad_(False), "LoRA": lora, "WaveFT": waveft,
    "Wavelet, haar, diag": wavelet(), "Wavelet, db2, diag": wavelet(filter="db2"),
    "Wavelet, haar, all": wavelet(RANK // 2, subbands="all")}


def trained(name: str, rate: float, seed: int) -> dict:
    """The numbers of one training: read where they are kept, computed and kept where they are not."""
    settings = {"adapter": name, "rank": RANK, "alpha": ALPHA, "rate": rate, "seed": seed, "steps": STEPS, "batch": BATCH,
                "validation": VALIDATION_ROWS, "data": quality.data_digests(TASK), "encoder": ENCODER_SHA256,
                "versions": [torch.__version__, peft.__version__], "code": code_digest()}
    kept = CACHE / f"{quality.digest(settings)}.json"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        row = {"adapter": name, "rate": rate, "seed": seed} | train(name, rate, seed)
        write_json(kept, row)
        print(f"{name}, rate {rate:g}, seed {seed}: {row['validation']:.1%} validation, {row['test']:.1%} test, "
              f"{row['parameters']:,} parameters, {row['seconds']} s", flush=True)
    return json.loads(kept.read_text())


def code_digest() -> str:
    package = Path(lowfat.__file__).parent
    names = ("adapt.py", "ops/wavelet.py", "ops/dwt.py", "structures/wavelet.py", "recovery/training.py",
             "recovery/finetune.py")
    return quality.digest([(package / name).read_text() for name in names])


def train(name: str, rate: float, seed: int) -> dict:
    torch.manual_seed(seed)  # of the head and the adapter
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    labels = json.loads((quality.DATA / TASK.name / "labels.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(encoder_folder(), num_labels=len(labels),
                                                               dtype=torch.float32)
    ADAPTERS[name](model)
    parameters = sum(one.numel() for one in model.parameters() if one.requires_grad)
    model.classifier.requires_grad_(True)
    rows, validation, test = (read_rows(quality.DATA / TASK.name / f"{split}.jsonl") for split in tasks.SPLITS)
    started = time.process_time()
    lowfat.finetune(model, rows[:TASK.train_rows], tokenizer=tokenizer, task="classification", steps=STEPS,
                    learning_rate=rate, batch_size=BATCH, max_length=TASK.max_length, autocast=False, seed=seed)
    seconds = time.process_time() - started
    found = {split: evaluate(model, some, tokenizer, task="classification", max_length=TASK.max_length)["accuracy"]
             for split, some in (("validation", validation[:VALIDATION_ROWS]), ("test", test[:TASK.test_rows]))}
    return found | {"parameters": parameters, "seconds": round(seconds, 1)}


# ------------------------------------------------------------------------------------------------ the page
def page(found: dict) -> str:
    about, rows = found["about"], found["rows"]
    lines = ["# Wavelet adapters, LoRA and WaveFT", "",
             "Made by `python bench/models/adapters.py --page` from `adapters.json`; do not edit. all-MiniLM-L6-v2 and a",
             f"new head on `sections`, adapters on its encoder linears (LoRA of rank {RANK}, alpha {ALPHA}, and as many",
             f"parameters for the others; WaveFT at PEFT's own scale), {STEPS} steps of {BATCH} texts, fp32; peft "
             f"{about['peft']}, torch {about['torch']}.",
             f"The rate is the best of {', '.join(f'{rate:g}' for rate in RATES)} on {VALIDATION_ROWS:,} validation rows "
             f"with seed {SEEDS[0]};",
             f"accuracy in % on {TASK.test_rows:,} test rows with three seeds. Seconds: of the process, for all steps.", "",
             "| adapter | parameters | rate | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean | spread | s |",
             "| --- " * (6 + len(SEEDS)) + "|"]
    for name in ADAPTERS:
        rate = best_rate(name, rows)
        own = [row for row in rows if (row["adapter"], row["rate"]) == (name, rate)]
        values = [100 * row["test"] for row in own]
        lines.append(f"| {name} | {own[0]['parameters']:,} | {rate:g} | " + " | ".join(f"{value:.1f}" for value in values)
                     + f" | {mean(values):.1f} | {stdev(values):.1f} | {mean(row['seconds'] for row in own):.0f} |")
    lines += ["", f"Accuracy on the validation rows, seed {SEEDS[0]}:", "",
              "| adapter | " + " | ".join(f"rate {rate:g}" for rate in RATES) + " |", "| --- " * (1 + len(RATES)) + "|"]
    for name in ADAPTERS:
        values = {row["rate"]: row["validation"] for row in rows if (row["adapter"], row["seed"]) == (name, SEEDS[0])}
        lines.append(f"| {name} | " + " | ".join(f"{100 * values[rate]:.1f}" for rate in RATES) + " |")
    return "\n".join(lines) + "\n"


def best_rate(name: str, rows: list[dict]) -> float:
    return max((row for row in rows if (row["adapter"], row["seed"]) == (name, SEEDS[0])),
               key=lambda row: row["validation"])["rate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="make the page alone")
    table = quality.RESULTS / "adapters.json"
    if not parser.parse_args().page:
        rows = [trained(name, rate, SEEDS[0]) for name in ADAPTERS for rate in RATES]
        rows += [trained(name, best_rate(name, rows), seed) for name in ADAPTERS for seed in SEEDS[1:]]
        write_json(table, {"about": header(torch.get_num_threads()) | {"peft": peft.__version__}, "rows": rows})
    (quality.RESULTS / "adapters.md").write_text(page(json.loads(table.read_text())))


if __name__ == "__main__":
    main()
