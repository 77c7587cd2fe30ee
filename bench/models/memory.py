"""Peak memory of factorizing a Llama-type model of more than a billion random bf16 parameters with statistics kept on disk.

    python bench/models/memory.py --work DIR [--out bench/results/memory.json]

Three processes, so that no peak hides another: one makes the model, one calibrates into DIR/stats, one factorizes.
The target: peak RSS - RSS before loading <= weight bytes + 1.5 x (fp32 weight + Gram + factors) of the largest layer.
"""
import argparse
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from lowfat.measured import header

LLAMA_1B = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                vocab_size=32768, tie_word_embeddings=True, max_position_embeddings=2048)
RATIO, BATCHES, TOKENS = 0.5, 2, 256  # few tokens: what is measured does not depend on them


def rss_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def make(work: Path) -> dict:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_1B, dtype="bfloat16")).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.ones_(p)
    model.tie_weights()
    model.save_pretrained(work / "dense")
    return {"parameters": sum(p.numel() for p in model.parameters())}


def measured(load_and_run) -> dict:
    start = rss_bytes("VmRSS")
    facts, t0 = {}, time.perf_counter()
    load_and_run(facts)
    return {**facts, "seconds": round(time.perf_counter() - t0, 1), "rss_before": start, "peak_above": rss_bytes("VmHWM") - start}


def calibrate(work: Path) -> dict:
    from transformers import AutoModelForCausalLM

    import lowfat

    def run(facts):
        model = AutoModelForCausalLM.from_pretrained(work / "dense", dtype="auto")
        torch.manual_seed(1)
        batches = [{"input_ids": torch.randint(0, LLAMA_1B["vocab_size"], (1, TOKENS))} for _ in range(BATCHES)]
        lowfat.calibrate(model, batches, out=work / "stats", memory=1 << 30)
        facts["tokens"] = BATCHES * TOKENS
    return measured(run)


def factorize(work: Path) -> dict:
    from transformers import AutoModelForCausalLM

    import lowfat
    from lowfat.calibrate import Calibration

    def run(facts):
        model = AutoModelForCausalLM.from_pretrained(work / "dense", dtype="auto")
        facts["weight_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
        stats = Calibration.load(work / "stats")  # read layer by layer
        plan = lowfat.plan(model, method="whitened", ratio=RATIO, policy="per_matrix", stats=stats)
        largest = max(4 * (c.out_features * c.in_features + c.in_features**2
                           + c.arguments.get("rank", 0) * (c.in_features + c.out_features)) for c in plan.values())
        facts["largest_layer_bytes"] = largest
        report = lowfat.factorize(model, plan, stats)
        facts["layers"] = len(report.layers)
        facts["bound"] = facts["weight_bytes"] + int(1.5 * largest)
    return measured(run)


STEPS = {"make": make, "calibrate": calibrate, "factorize": factorize}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model (2 GB) and the statistics (5 GB)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", choices=STEPS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.step:
        print(json.dumps(STEPS[args.step](args.work)))
        return
    results = {"about": header(torch.get_num_threads()) | {"transformers": version("transformers")}}
    for step in STEPS:
        child = subprocess.run([sys.executable, __file__, "--work", str(args.work), "--step", step],
                               stdout=subprocess.PIPE, text=True, check=True)
        results[step] = json.loads(child.stdout.splitlines()[-1])
        print(step, results[step], flush=True)
    done = results["factorize"]
    results["holds"] = done["peak_above"] <= done["bound"]
    print(f"peak above start {done['peak_above'] / 2**20:.0f} MiB, bound {done['bound'] / 2**20:.0f} MiB: "
          f"{'holds' if results['holds'] else 'DOES NOT HOLD'}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
