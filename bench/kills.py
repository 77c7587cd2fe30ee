"""kill -9 at random moments of the real commands on a real model, then the same command again:
`python bench/kills.py --out FILE [factorize] [finetune] [pretrain]`; what FILE says of other commands stays.

Each moment is drawn in the time that an uninterrupted run takes after its imports, most of it after the first finished
layer or training state. Every restart must end with the digests of the uninterrupted run."""
import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lowfat.demo import encoder_folder
from lowfat.docstrings import docstring_pairs

COMMANDS = ("factorize", "finetune", "pretrain")
EARLY = 4  # of the kills, anywhere; the others after the first finished layer or training state


def command(name: str, work: Path, out: Path) -> list[str]:
    lowfat, texts = [str(Path(sys.executable).with_name("lowfat"))], str(work / "texts.jsonl")
    if name == "factorize":
        return [*lowfat, "factorize", str(encoder_folder()), str(out), "--calibrate", texts, "--max-length", "64"]
    if name == "pretrain":
        return [*lowfat, "pretrain", "nano", str(out), "--data", texts, "--tokenizer", str(encoder_folder()), "--steps",
                "12", "--batch-size", "2", "--length", "64", "--save-every", "2", "--device", "cpu"]
    return [*lowfat, "finetune", str(work / "half"), str(out), "--train", texts, "--teacher", str(encoder_folder()),
            "--steps", "12", "--batch-size", "8", "--max-length", "64", "--save-every", "2"]


def states(name: str, out: Path) -> Path:
    return out.parent / f".{out.name}.{'progress' if name == 'factorize' else 'training'}"


def finished_parts(name: str, out: Path) -> int:
    """Layers or training states that are complete on disk."""
    pattern = "layers/layer-*.json" if name == "factorize" else "step-*"
    return len(list(states(name, out).glob(pattern)))


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.safetensors"))}


def start(name: str, work: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen(command(name, work, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})


def finish(process: subprocess.Popen) -> None:
    if process.wait():
        sys.exit(f"ended with {process.returncode}: {process.stderr.read().strip()}")


def uninterrupted(name: str, work: Path) -> tuple[dict[str, str], float, float]:
    """Its digests, seconds until the first part was finished, seconds in all."""
    out, started, first = work / f"{name}-whole", time.monotonic(), None
    process = start(name, work, out)
    while process.poll() is None:
        if first is None and finished_parts(name, out):
            first = time.monotonic() - started
        time.sleep(0.002)
    finish(process)
    return digests(out), first, time.monotonic() - started


def killed(name: str, work: Path, delay: float) -> dict:
    """Kills a run after delay seconds, counted from its first finished part when negative; then runs the command again."""
    out = work / f"{name}-killed"
    shutil.rmtree(out, ignore_errors=True)
    process = start(name, work, out)
    while delay < 0 and process.poll() is None and not finished_parts(name, out):
        time.sleep(0.001)
    time.sleep(abs(delay))
    process.send_signal(signal.SIGKILL)
    code, parts, had_result = process.wait(), finished_parts(name, out), out.exists()
    if not had_result or states(name, out).exists():  # else it was done before the kill
        finish(start(name, work, out))
    return {"exit": code, "finished_parts": parts, "result_there": had_result, "digests": digests(out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.commands) - set(COMMANDS):
        parser.error(f"there is no command {', '.join(unknown)}; there are {', '.join(COMMANDS)}")
    names = options.commands or COMMANDS
    results = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "texts.jsonl").write_text("".join(
            json.dumps({"text": f"{pair.first} {pair.rest}"}) + "\n" for pair in docstring_pairs("libs")[:96]))
        finish(start("factorize", work, work / "half"))
        for name in names:
            moments = random.Random(options.seed)
            expected, first, whole = uninterrupted(name, work)
            print(f"{name}: uninterrupted {whole:.1f} s, first finished part after {first:.1f} s", flush=True)
            rows = []
            for number in range(options.kills):
                delay = moments.uniform(0, first) if number < EARLY else -moments.uniform(0, whole - first)
                row = killed(name, work, delay)
                row["same"] = row.pop("digests") == expected
                rows.append({"seconds": delay, **row})
                print(f"{number + 1:2}  {'after the first part' if delay < 0 else 'from the start':20} {abs(delay):5.2f} s  exit "
                      f"{row['exit']}  {row['finished_parts']:2} parts kept  {'same digests' if row['same'] else 'DIFFERENT'}",
                      flush=True)
            results[name] = {"seed": options.seed, "uninterrupted_s": whole, "first_part_s": first, "kills": rows}
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    if not all(row["same"] for name in names for row in results[name]["kills"]):
        sys.exit("a restart ended with other bits")


if __name__ == "__main__":
    main()
