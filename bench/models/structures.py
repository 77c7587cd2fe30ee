"""Low-rank against block-wise low-rank against Monarch, and staged factorization against one shot, on real classifiers:
`python bench/models/structures.py [sections] [pairs]`.

The grids below were fixed before the first run. Each is one `lowfat compare` of the teacher of bench/models/quality.py, and
goes on where it was stopped; its table, picture and numbers go to bench/results/structures_TASK.
"""
import sys
from pathlib import Path

import torch

import lowfat
from lowfat.data import read_rows

sys.path.insert(0, str(Path(__file__).resolve().parent))
import quality  # noqa: E402  the script beside this one

SEED = 0  # of the teacher
GRIDS = {
    "sections": {"methods": ("svd", "block_low_rank:blocks=4", "monarch:blocks=4", "whitened",
                             "block_low_rank:blocks=4:fit=outputs", "monarch:blocks=4:fit=outputs"),
                 "ratios": (0.5, 0.25), "recoveries": ("none", "finetune"), "learning_rates": (2e-4,), "steps": 150},
    "pairs": {"methods": ("svd",), "ratios": (0.5,), "recoveries": ("none", "finetune", "staged"),
              "learning_rates": (5e-5, 1e-4, 2e-4), "steps": 400},
}


def run(name: str) -> None:
    task = quality.TASKS[name]
    train, test = (read_rows(quality.DATA / name / f"{split}.jsonl") for split in ("train", "test"))

    def tell(done: int, total: int, what: str) -> None:
        print(f"{name}: {done} of {total} steps, {what}", flush=True)

    lowfat.compare(quality.teacher(task, SEED), train[:task.train_rows], test[:task.test_rows], seeds=3,
                   task="classification", out=quality.RESULTS / f"structures_{name}", max_length=task.max_length, autocast=False,
                   jobs=torch.get_num_threads(), on_progress=tell, overwrite=True, **GRIDS[name])


if __name__ == "__main__":
    for chosen in sys.argv[1:] or GRIDS:
        run(chosen)
