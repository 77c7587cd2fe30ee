"""What is left of a real classifier without any training: `python bench/models/quality.py [--tasks ...] [--seeds 0,1,2]`.

A teacher is fine-tuned for each task and seed (cached, the longest part), then factorized by every method, ratio and policy
and asked again. Every finished cell is kept under bench/data/quality, so a run that was stopped continues; the table in
bench/results/quality.md is made from bench/results/quality.json. The task data come from bench/tasks.py.
"""
from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lowfat
from lowfat.data import batches, read_rows
from lowfat.demo import ENCODER_SHA256, encoder_folder
from lowfat.evaluate import evaluate
from lowfat.recovery.finetune import finetune

BENCH = Path(__file__).resolve().parents[1]
DATA, RESULTS = BENCH / "data", BENCH / "results"
sys.path.insert(0, str(BENCH))
import tasks  # noqa: E402  the script beside this folder, which is no package

METHODS = ("svd", "fwsvd", "whitened")
POLICIES = ("per_matrix", "allocated")
CALIBRATION_ROWS, CALIBRATION_BATCH = 1024, 8
# fp32: where bf16 has no matrix unit (AVX512-BF16 without AMX) autocast takes 1.7 times as long on `pairs`. The other
# settings are finetune's own.
TEACHER = {"learning_rate": 1e-4, "batch_size": 32, "autocast": False}


@dataclass(frozen=True)
class Task:
    name: str
    train_rows: int  # of the teacher
    steps: int  # two epochs of them
    max_length: int  # tokens
    test_rows: int
    ratios: tuple[float, ...]
    reference: float  # accuracy of a teacher of seed 0 trained by an independent script with these settings


TASKS = {task.name: task for task in (
    Task("sections", 16384, 1024, 32, 2000, (0.5, 0.25), 0.724),
    Task("pairs", 10240, 640, 72, 1536, (0.5,), 0.902),  # at 25 % every method is at chance
)}


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def code_digest() -> str:
    """Of the package's files that decide a cell's number, so that no cell outlives the code it was made with."""
    package = Path(lowfat.__file__).parent
    names = ["allocate.py", "calibrate.py", "factorize.py", "layers.py", "linalg.py", "plan.py", "evaluate.py", "data.py",
             "model_inputs.py"]
    files = [package / name for name in names] + sorted([*package.glob("methods/*.py"), *package.glob("structures/*.py")])
    return digest([path.read_text() for path in files])


def data_digests(task: Task) -> dict[str, str]:
    for split in tasks.SPLITS:
        if not (DATA / task.name / f"{split}.jsonl").exists():
            sys.exit(f"quality: no {split} data of {task.name} in {DATA}: run  python bench/tasks.py")
    return {split: tasks.sha256(DATA / task.name / f"{split}.jsonl") for split in tasks.SPLITS}


def teacher_folder(task: Task, seed: int) -> Path:
    key = digest({"data": data_digests(task), "encoder": ENCODER_SHA256, "task": asdict(task), "settings": TEACHER,
                  "seed": seed})
    return DATA / "teachers" / f"{task.name}-{seed}-{key}"


def teacher(task: Task, seed: int) -> Path:
    """The folder of the fine-tuned dense model, trained now unless it was before."""
    folder = teacher_folder(task, seed)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    torch.manual_seed(seed)  # of the classifier's first weights
    labels = json.loads((DATA / task.name / "labels.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(encoder_folder(), num_labels=len(labels), dtype=torch.float32)
    rows = read_rows(DATA / task.name / "train.jsonl")[:task.train_rows]
    started = time.monotonic()

    def tell(step, steps, *_):
        if step % 16 == 0:
            left = (time.monotonic() - started) / max(step, 1) * (steps - step)
            print(f"teacher {task.name} seed {seed}: step {step} of {steps}, {left / 60:.1f} min left", flush=True)

    finetune(model, rows, tokenizer=tokenizer, task="classification", steps=task.steps, max_length=task.max_length,
             seed=seed, on_progress=tell, **TEACHER)
    staged = folder.with_name(f".{folder.name}")
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    os.replace(staged, folder)
    return folder


def cells(task: Task) -> list[dict]:
    """Every (method, ratio, policy) of a task, the dense teacher first."""
    dense = {"method": "dense", "ratio": 1.0, "policy": ""}
    return [dense] + [{"method": method, "ratio": ratio, "policy": policy}
                      for ratio in task.ratios for method in METHODS for policy in POLICIES]


def measure(task: Task, seed: int, cache: Path) -> list[dict]:
    """The rows of one teacher: read where they are kept, computed and kept where they are not."""
    folder = teacher(task, seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    code, rows, loaded = code_digest(), [], None
    for cell in cells(task):
        kept = cache / f"{folder.name}-{digest([cell, code, CALIBRATION_ROWS, torch.__version__])}.json"
        if not kept.exists():
            loaded = loaded or load(task, folder, tokenizer)
            row = {"task": task.name, "seed": seed, **cell, **one_cell(task, cell, *loaded, tokenizer)}
            staged = kept.with_suffix(".tmp")
            staged.write_text(json.dumps(row))
            os.replace(staged, kept)
            about = f"{task.name} seed {seed} {cell['method']} {cell['policy']} {cell['ratio']:.0%}"
            print(f"{about}: {row['accuracy']:.1%}", flush=True)
        rows.append(json.loads(kept.read_text()))
    return rows


def load(task: Task, folder: Path, tokenizer):
    """The teacher and its statistics over the first training rows."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = read_rows(DATA / task.name / "train.jsonl")[:CALIBRATION_ROWS]
    found = batches(rows, tokenizer, "classification", batch_size=CALIBRATION_BATCH, max_length=task.max_length)
    return model, lowfat.calibrate(model, found)


def one_cell(task: Task, cell: dict, dense, stats, tokenizer) -> dict:
    model, seconds, kept, dense_parameters = copy.deepcopy(dense), 0.0, 1, 1
    if cell["method"] != "dense":
        started = time.process_time()
        plan = lowfat.plan(model, method=cell["method"], ratio=cell["ratio"], policy=cell["policy"], stats=stats)
        lowfat.factorize(model, plan, stats)
        seconds = time.process_time() - started
        totals = plan.totals()
        kept, dense_parameters = totals["parameters"], totals["dense_parameters"]
    found = evaluate(model, read_rows(DATA / task.name / "test.jsonl")[:task.test_rows], tokenizer, task="classification",
                     max_length=task.max_length, batch_size=64)
    accuracy = found["accuracy"]
    error = math.sqrt(accuracy * (1 - accuracy) / found["rows"])
    return {"kept": kept / dense_parameters, "accuracy": accuracy, "standard_error": error, "rows": found["rows"],
            "factorize_cpu_seconds": round(seconds, 2)}


def chance(task: Task) -> float:
    """Share of the most frequent label in the test rows."""
    labels = [row["label"] for row in read_rows(DATA / task.name / "test.jsonl")[:task.test_rows]]
    return max(labels.count(label) for label in set(labels)) / len(labels)


def facts(chosen: list[Task], seeds: list[int]) -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "encoder": f"all-MiniLM-L6-v2, SHA-256 {ENCODER_SHA256}",
        "teacher": TEACHER | {"dtype": "fp32", "steps": {task.name: task.steps for task in chosen},
                              "rows": {task.name: task.train_rows for task in chosen}},
        "calibration": {"rows": CALIBRATION_ROWS, "batch_size": CALIBRATION_BATCH, "dtype": "fp32"},
        "evaluation_dtype": "fp32",
        "seeds": seeds,
        "tasks": {task.name: {"sha256": data_digests(task), "test_rows": task.test_rows, "max_length": task.max_length,
                              "chance": chance(task), "reference_teacher": task.reference} for task in chosen},
    }


# ------------------------------------------------------------------------------------------------ the table
def orderings(rows: list[dict], task: str) -> list[str]:
    """The claims of the methods' papers on these rows, and for which seeds they hold."""
    found = {(row["method"], row["ratio"], row["policy"], row["seed"]): row["accuracy"]
             for row in rows if row["task"] == task}
    claims = (("whitened", "fwsvd"), ("whitened", "svd")) + ((("fwsvd", "svd"),) if task == "sections" else ())
    lines = []
    for better, worse in claims:
        for ratio, policy in sorted({key[1:3] for key in found if key[0] == better}, reverse=True):
            seeds = sorted(seed for method, r, p, seed in found if (method, r, p) == (better, ratio, policy))
            gains = [found[better, ratio, policy, seed] - found[worse, ratio, policy, seed] for seed in seeds]
            holds = "holds" if min(gains) > 0 else "**does not hold**"
            points = ", ".join(f"{100 * gain:+.1f}" for gain in gains)
            lines.append(f"- {better} above {worse} at {ratio:.0%}, {policy}: {holds} ({points} points for seeds {seeds})")
    return lines


def table(rows: list[dict], about: dict) -> str:
    lines = ["# Accuracy without training", "",
             "Made by `bench/models/quality.py` from `quality.json`; do not edit. all-MiniLM-L6-v2 fine-tuned on a task",
             "(the teacher), its 36 encoder linears factorized, nothing trained afterwards. Kept: parameters of these",
             "linears over the dense ones.", "",
             f"- machine: {about['machine']['cpu']}, {about['machine']['cores']} cores, {about['machine']['threads']} "
             f"thread(s); Python {about['versions']['python']}, torch {about['versions']['torch']}, "
             f"transformers {about['versions']['transformers']}",
             f"- teacher: AdamW, learning rate {about['teacher']['learning_rate']}, batch {about['teacher']['batch_size']}, "
             f"{about['teacher']['dtype']}; calibration: first {about['calibration']['rows']} training rows in batches of "
             f"{about['calibration']['batch_size']}; evaluation in {about['evaluation_dtype']}", ""]
    for task, facts_of in about["tasks"].items():
        own = [row for row in rows if row["task"] == task]
        seeds = sorted({row["seed"] for row in own})
        teachers = {row["seed"]: row["accuracy"] for row in own if row["method"] == "dense"}
        error = max(row["standard_error"] for row in own)
        lines += [f"## {task}", "",
                  f"First {facts_of['test_rows']:,} test rows, accuracy in %, chance {100 * facts_of['chance']:.1f}, "
                  f"standard error up to {100 * error:.1f} points. "
                  f"Teachers trained {about['teacher']['steps'][task]:,} steps on {about['teacher']['rows'][task]:,} rows "
                  f"(reference for seed 0: {100 * facts_of['reference_teacher']:.1f}).",
                  "Data, SHA-256: "
                  + ", ".join(f"{split} `{value[:16]}`" for split, value in facts_of["sha256"].items()) + ".", "",
                  "| kept | method | policy | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | lost |",
                  "| --- " * (5 + len(seeds)) + "|"]
        order = {}
        for row in own:
            order.setdefault((row["ratio"], row["method"], row["policy"]), {})[row["seed"]] = row
        for (ratio, method, policy), by_seed in order.items():
            values = [100 * by_seed[seed]["accuracy"] for seed in seeds]
            lost = mean(100 * teachers[seed] for seed in seeds) - mean(values)
            kept = mean(row["kept"] for row in by_seed.values())
            lines.append(f"| {kept:.1%} | {method} | {policy} | " + " | ".join(f"{value:.1f}" for value in values)
                         + f" | {mean(values):.1f} | {'' if method == 'dense' else format(lost, '.1f')} |")
        lines += ["", *orderings(rows, task), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="sections,pairs")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--teachers-only", action="store_true", help="train what is missing and stop")
    parser.add_argument("--ready", action="store_true", help="only teachers that are trained already; the table shows which")
    options = parser.parse_args()
    chosen, seeds = [TASKS[name] for name in options.tasks.split(",")], [int(seed) for seed in options.seeds.split(",")]
    teachers = [(task, seed) for task in chosen for seed in seeds
                if not options.ready or teacher_folder(task, seed).exists()]
    for task, seed in teachers:
        teacher(task, seed)
    if options.teachers_only:
        return
    cache = DATA / "quality"
    cache.mkdir(parents=True, exist_ok=True)
    rows = [row for task, seed in teachers for row in measure(task, seed, cache)]
    about = facts(list(dict.fromkeys(task for task, _ in teachers)), seeds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    (RESULTS / "quality.md").write_text(table(rows, about))


if __name__ == "__main__":
    main()
