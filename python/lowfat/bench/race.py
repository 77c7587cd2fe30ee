"""`lowfat bench`: an op on the layers of some models at some batch sizes; what was found, as plain JSON and a picture."""
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import ArgumentError
from ..measured import header
from . import graphs, low_rank, low_rank_backward, low_rank_group, low_rank_swiglu
from .dictionary import Dictionary
from .low_rank_sparse import LowRankSparse
from .measure import measure
from .monarch import Monarch
from .monarch_backward import MonarchBackward
from .shapes import Layer, layers
from .sparse24 import Sparse24
from .timing import Pool

# modules as measure.py wants them, or objects that have the same; chains are for those that have measure_chain
OPS = {raced.OP: raced for raced in (low_rank, low_rank_group, low_rank_swiglu, low_rank_backward, Monarch(),
                                     MonarchBackward(), Sparse24(), Dictionary(), LowRankSparse())}
DTYPES = ("bfloat16", "float16", "float32")
MOST_ROWS = 1 << 16


@torch.no_grad()
def race(op: str, *, shapes: str, rows: str, dtype: str = "bfloat16", device: torch.device, ratio: float = 0.5,
         rank: int | None = None, blocks: int | None = None, seconds: float = 0.5, compiled: bool = False,
         on_progress: Callable[[int, int, str], None] = lambda done, total, what: None) -> dict:
    """{"header", "ceilings", "rows", "chains"} of the race; ceilings and chains only on a GPU.

    blocks: of an op that has them; the rank is then that of a block.
    Raises ArgumentError for an op, a shape, a count of rows or of blocks, or a dtype that there is not."""
    if op not in OPS:
        raise ArgumentError(f"op must be one of {', '.join(OPS)}; found {op!r}")
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype must be one of {', '.join(DTYPES)}; found {dtype!r}")
    if not 0 < seconds <= 3600:
        raise ArgumentError(f"seconds must be between 0 and 3600; found {seconds}")
    raced, about = in_blocks(OPS[op], blocks), {"op": op}
    if hasattr(raced, "blocks"):
        about["blocks"] = raced.blocks
    sized = {name: getattr(raced, name) for name in ("rank_for", "most") if hasattr(raced, name)}
    found_layers = layers(shapes, ratio=ratio, rank=rank, blocks=about.get("blocks", 1), **sized)
    counts = counts_of(rows)
    torch.manual_seed(0)
    found = {"header": about | header(torch.get_num_threads(), device), "ceilings": None, "rows": [], "chains": []}
    on_gpu = device.type == "cuda"
    if on_gpu:
        found["ceilings"] = graphs.ceilings(device)
    pool = new_pool(dtype, found_layers, raced.SCALE, device)
    steps = [(layer, m) for layer in found_layers for m in counts]
    for done, (layer, m) in enumerate(steps):
        on_progress(done, len(steps), f"{layer.k} -> {layer.n}, m = {m}")
        limits = found["ceilings"]
        found["rows"].append(measure(raced, pool, layer, m, seconds, limits=limits, compiled=compiled and on_gpu))
        if on_gpu and hasattr(raced, "measure_chain"):
            found["chains"].append(raced.measure_chain(pool, layer, m, found["ceilings"]))
    return found


def in_blocks(raced, blocks: int | None):
    """The same op raced with this many blocks."""
    if blocks is None:
        return raced
    if not hasattr(raced, "blocks"):
        raise ArgumentError(f"blocks: {raced.OP} has none")
    if blocks < 1:
        raise ArgumentError(f"blocks must be at least 1; found {blocks}")
    return replace(raced, blocks=blocks)


def new_pool(dtype: str, found: list[Layer], scale: float, device: torch.device) -> Pool:
    """Of weights: past the caches, and on a GPU enough for the largest chain."""
    if device.type == "cpu":
        return Pool(getattr(torch, dtype), scale)
    most = max(max(one.k * one.n, graphs.LAYERS * one.r * (one.k + one.n)) for one in found)
    return graphs.pool_for(getattr(torch, dtype), scale, device, most)


def counts_of(rows: str) -> list[int]:
    """The values of m in "1,4,8"."""
    try:
        counts = [int(word) for word in rows.split(",")]
    except ValueError:
        raise ArgumentError(f"rows must be whole numbers like 1,4,8; found {rows!r}") from None
    if not all(1 <= m <= MOST_ROWS for m in counts):
        raise ArgumentError(f"rows must be between 1 and {MOST_ROWS}; found {rows!r}")
    return counts


def failures(found: dict) -> list[dict]:
    """The rows, chains among them, whose results a gate refused."""
    return [row for row in found["rows"] + found["chains"] if row["failed_gates"]]


def name_of(about: dict) -> str:
    """Of what a header is about."""
    return f"{about['op']}, {about['blocks']} blocks" if "blocks" in about else about["op"]


def draw(found: dict, path: Path) -> None:
    """Speed-up over the pair against m, a panel for each model; dotted, where a kernel would be that runs at the floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models: dict[str, dict[str, list[dict]]] = {}
    for row in found["rows"]:
        lines = models.setdefault(row["model"], {})
        lines.setdefault(f"{row['k']} to {row['n']}, rank {row['r']}", []).append(row)
    about = found["header"]
    figure = Figure(figsize=(0.5 + 4.5 * len(models), 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{name_of(about)}, {found['rows'][0]['dtype']}, {about.get('gpu') or about['cpu']}", fontsize=10)
    for axes, (model, lines) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        for number, (name, rows) in enumerate(lines.items()):
            m = [row["m"] for row in rows]
            axes.plot(m, [row["faster"] for row in rows], color=f"C{number}", marker="o", markersize=3, label=name)
            axes.fill_between(m, [row["faster_low"] for row in rows], [row["faster_high"] for row in rows],
                              color=f"C{number}", alpha=0.15, linewidth=0)
            axes.plot(m, [row["pair_us"] / row["floor_us"] for row in rows], color=f"C{number}", linestyle=":")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(m, [str(count) for count in m])
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(model, fontsize=9)
        axes.set_xlabel("rows of x (dotted: at the floor)", fontsize=8)
        axes.legend(fontsize=7, frameon=False)
    figure.axes[0].set_ylabel("times as fast as torch's products", fontsize=8)
    figure.savefig(path)
