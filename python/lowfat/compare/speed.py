"""How fast each compressed model answers, against the dense one in the same minute, and how large it is."""
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from ..data import batches
from ..model_inputs import padding
from .cell import Job, model_of
from .grid import DENSE, Cell

REPEATS, WARMUP = 15, 2
COUNTS = (1, 32)  # texts in a batch


def speeds(job: Job, cells: Sequence[Cell], on_progress: Callable[[int, int, str], None]) -> list[dict]:
    """For every method and ratio: bytes of the model, and how many times as fast as the dense model it is on the same test
    texts, one batch of them at a time, the two in turns; quartiles of the ratios. Nothing else should run meanwhile."""
    untrained = list(dict.fromkeys(Cell(cell.method, cell.arguments, cell.ratio, "none", None, None) for cell in cells))
    dense, tokenizer = model_of(job, DENSE)
    rows = [{"method": DENSE.label, "ratio": 1.0, "bytes": bytes_of(dense)}]
    for number, cell in enumerate(untrained):
        on_progress(number, len(untrained), f"speed of {cell.label} {cell.ratio:.0%}")
        model, _ = model_of(job, cell)
        row = {"method": cell.label, "ratio": cell.ratio, "bytes": bytes_of(model)}
        for count in COUNTS:
            found = batches(job.test[:count], tokenizer, job.task, batch_size=count, max_length=job.max_length,
                            labels=False, device=dense.device)[0]
            with padding(tokenizer, job.task, dense, model):
                row |= {f"faster_{count}": _faster(dense, model, found)}
        rows.append(row)
    return rows


def bytes_of(model) -> int:
    """Of all parameters, tied ones once: what the weight files hold."""
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in model.parameters())


@torch.inference_mode()
def _faster(dense, model, batch) -> list[float]:
    """[lower quartile, median, upper quartile] of the dense model's time over the other's, in pairs of neighbours."""
    ratios = []
    for number in range(-WARMUP, REPEATS):
        pair = (dense, model) if number % 2 else (model, dense)
        taken = {id(one): _seconds(one, batch) for one in pair}
        if number >= 0:
            ratios.append(taken[id(dense)] / taken[id(model)])
    ordered = sorted(ratios)
    return [round(value, 3) for value in (ordered[len(ordered) // 4], median(ordered), ordered[-1 - len(ordered) // 4])]


def _seconds(model, batch) -> float:
    started = time.perf_counter()
    model(**batch)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started
