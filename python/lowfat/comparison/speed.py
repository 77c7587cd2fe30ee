"""How fast each compressed model answers, against the dense one in the same minute, and how large it is."""
import time
from statistics import median

import torch

from ..data import batches
from ..model_inputs import padding
from .cell import Job, model_of
from .grid import Cell

REPEATS, WARMUP = 15, 2
COUNTS = {"one": 1, "many": 32}  # texts in a batch, at most


def speed(job: Job, cell: Cell, dense, tokenizer) -> dict:
    """Bytes of the cell's model, and how many times as fast as the dense model it is on the same test texts, one batch of
    them at a time, the two in turns; quartiles of the ratios."""
    row = {"method": cell.label, "ratio": cell.ratio, "threads": torch.get_num_threads()}
    if cell.method is None:
        return row | {"bytes": bytes_of(dense)}
    model, _ = model_of(job, cell)
    row["bytes"] = bytes_of(model)
    for name, most in COUNTS.items():
        texts = job.test[:most]
        found = batches(texts, tokenizer, job.task, batch_size=most, max_length=job.max_length, labels=False,
                        device=dense.device)[0]
        with padding(tokenizer, job.task, dense, model):
            row |= {f"{name}_texts": len(texts), f"{name}_faster": _faster(dense, model, found)}
    return row


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
