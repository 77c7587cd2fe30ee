"""The `lowfat` command: reads options, shows progress and tables, and exits; the work is done by the library."""
from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from .bench.shapes import MODELS
from .cli_training import finetune, lpaf, pretrain, staged, straight_through
from .data import read_rows
from .demo import ENCODER
from .errors import ArgumentError, LowfatError
from .methods import METHODS, named
from .options import (BatchSize, Device, Dtype, Json, Layers, MaxLength, Model, Out, Overwrite, Samples, Task, check_file,
                      device_of, dtype_of, first, listed, model_folder, numbers)
from .plan import POLICIES
from .show import (bar, print_json, show_bench, show_comparison, show_demo, show_doctor, show_numbers, show_report,
                   show_reproduced, show_spectra)

UsageError = typer.BadParameter.__base__  # click's, or that of the copy inside newer typers


class OneLine(typer.core.TyperGroup):
    """What the user can put right is one line on stderr and exit code 2; a bug keeps its traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (LowfatError, UsageError) as error:
            message = error.format_message() if isinstance(error, UsageError) else str(error)
            print("lowfat:", " ".join(message.split()), file=sys.stderr)
            raise typer.Exit(2) from None


app = typer.Typer(cls=OneLine, add_completion=False, no_args_is_help=True, rich_markup_mode=None,
                  pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
                  help="Makes transformers smaller by factorizing their linear layers.")


def main() -> None:
    """The entry point."""
    app()


@app.callback()
def quiet() -> None:
    """Only what is ours on the terminal: transformers' bars and load reports go, warnings shrink to a line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    warnings.showwarning = lambda message, *_, **__: print("lowfat:", str(message).removeprefix("lowfat: "), file=sys.stderr)
    from transformers.utils import logging

    logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------------ commands
@app.command(short_help="A real sentence encoder made smaller, in two minutes.")
def demo(folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")] = Path("lowfat-demo"),
         overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it is there.")] = False,
         device: Device = "auto") -> None:
    """Makes a real sentence encoder smaller, on text that every installation has: what is gained, what is lost. Two minutes
    on two idle cores. DIR gets the model, a picture, the numbers, and the texts for the examples of the other commands.

    Example:  lowfat demo
    """
    from . import demo as job

    with bar("opening") as tell:
        result = job.run(folder, overwrite=overwrite, device=device_of(device),
                         on_progress=lambda share, what: tell(share, 1, what, of_all=True))
    show_demo(result, folder, job)


@app.command(short_help="Write a smaller copy of a model.")
def factorize(
    model: Model, out_folder: Out,
    method: Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(METHODS)}.")] = "whitened",
    ratio: Annotated[float, typer.Option(metavar="SHARE", help="Parameters to keep in these layers.")] = 0.5,
    calibrate: Annotated[Optional[Path], typer.Option(metavar="TEXTS",
                                                      help=".jsonl or .txt; most need it, fwsvd labels too.")] = None,
    policy: Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(POLICIES)}.", show_default=False)] = "allocated",
    arguments: Annotated[Optional[list[str]], typer.Option("--set", metavar="NAME=VALUE",
                                                           help="Of the method: blocks=8, fit=outputs.")] = None,
    share: Annotated[Optional[int], typer.Option(metavar="G", help="Blocks whose layers of a name share a factor.")] = None,
    task: Task = None, layers: Layers = None, samples: Samples = None, max_length: MaxLength = None,
    batch_size: BatchSize = 8, device: Device = "auto", overwrite: Overwrite = False, as_json: Json = False,
) -> None:
    """Writes a smaller copy of MODEL, a folder or hub name. If killed, repeat it.

    Example:  lowfat factorize all-MiniLM-L6-v2 half --calibrate texts.jsonl
    """
    from .job import factorize_folder

    where, rows = device_of(device), calibrate and first(read_rows(calibrate), samples)
    with bar("opening") as tell:
        report = factorize_folder(model_folder(model), out_folder, method=method, ratio=ratio, policy=policy,
                                  layers=layers or None, arguments=named("--set", arguments or []), share=share, rows=rows,
                                  task=task, batch_size=batch_size, max_length=max_length, device=where, overwrite=overwrite,
                                  on_progress=lambda phase, done, total, what: tell(done, total, phase))
    print_json(report.to_json()) if as_json else show_report(report, out_folder)


for strategy, what in ((finetune, "Train a model on labels or on its dense teacher."),
                       (staged, "Factorize block by block, training in between."),
                       (straight_through, "Learn which factors to use."),
                       (lpaf, "Prune, factorize, train with mixed ranks."),
                       (pretrain, "Train a new model with factors in its layers.")):
    app.command(short_help=what)(strategy)


@app.command(short_help="Accuracy, perplexity, or how often text_b is found.")
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(metavar="TEXTS", help=".jsonl or .txt file.", show_default=False)],
    task: Task = None, samples: Samples = None, max_length: MaxLength = None, batch_size: BatchSize = 32,
    dtype: Dtype = None, device: Device = "auto", as_json: Json = False,
) -> None:
    """Accuracy or perplexity of MODEL, a folder or hub name; of an encoder, how often it finds text_b from text_a.

    Example:  lowfat evaluate lowfat-demo/model --data lowfat-demo/test.jsonl
    """
    from .evaluate import evaluate as judge
    from .job import open_model

    where, rows = device_of(device), first(read_rows(data), samples)
    with bar("opening") as tell:
        opened, tokenizer = open_model(model_folder(model), task=task, device=where)
        found = judge(opened.to(dtype_of(dtype, opened.dtype)), rows, tokenizer, task=task, batch_size=batch_size,
                      max_length=max_length, on_progress=tell)
    print_json(found) if as_json else show_numbers(found)


@app.command(short_help="Which method is worth it, on one's own model and data.")
def compare(
    model: Model, out_folder: Out,
    train: Annotated[Path, typer.Option(metavar="TEXTS", help=".jsonl or .txt file.", show_default=False)],
    data: Annotated[Path, typer.Option(metavar="TEXTS", help="Judged on these, never trained on.", show_default=False)],
    methods: Annotated[str, typer.Option(metavar="NAME,...", help="Or monarch:blocks=8.")] = "svd,block_low_rank,monarch",
    ratios: Annotated[str, typer.Option(metavar="SHARE,...", help="Parameters kept.")] = "0.5,0.25",
    recoveries: Annotated[str, typer.Option(metavar="NAME,...", help="Trainings.")] = "none,finetune",
    learning_rates: Annotated[str, typer.Option(metavar="RATE,...", help="Of each training.")] = "1e-4",
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each training.")] = 3,
    steps: Annotated[int, typer.Option(metavar="N", help="Updates of the weights.")] = 150,
    jobs: Annotated[int, typer.Option(metavar="N", help="Models at a time.")] = 1,
    distill: Annotated[bool, typer.Option("--distill", help="Train towards MODEL's outputs.")] = False,
    task: Task = None, max_length: MaxLength = None, device: Device = "auto", overwrite: Overwrite = False,
) -> None:
    """Makes MODEL smaller by every method at every ratio, trains each (none, finetune, staged, straight_through, mixed_rank,
    theseus, lpaf), judges all on the same texts: table, picture, JSON in OUT. If killed, repeat it.

    \b
    Example:  lowfat compare all-MiniLM-L6-v2 table --seeds 1 --steps 20 \\
                  --train lowfat-demo/texts.jsonl --data lowfat-demo/test.jsonl
    """
    from .comparison import compare as job

    where, rows, judged = device_of(device), read_rows(train), read_rows(data)
    with bar("opening") as tell:
        found = job(model_folder(model), rows, judged, out=out_folder, methods=listed(methods),
                    ratios=numbers("--ratios", ratios), recoveries=listed(recoveries),
                    learning_rates=numbers("--learning-rates", learning_rates), seeds=seeds, steps=steps,
                    task=task, max_length=max_length, distill=distill, jobs=jobs, device=where, overwrite=overwrite,
                    on_progress=partial(tell, of_all=True))
    show_comparison(found, out_folder)


@app.command(short_help="Runs a paper's experiment and says whether its claims held.")
def reproduce(
    paper: Annotated[str, typer.Argument(metavar="PAPER", hidden=True)],
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="Tasks of bench/tasks.py; keeps teachers.")] = Path("lowfat-data"),
    out: Annotated[Optional[Path], typer.Option(metavar="FOLDER", help="Default: reproduce_PAPER.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few texts and steps, one seed: to see it run.")] = False,
    tasks: Annotated[Optional[str], typer.Option(metavar="NAME=RATIO,...", help="In the place of the paper's.",
                                                 show_default=False)] = None,
    encoder: Annotated[str, typer.Option(metavar="MODEL", help="What teachers are made of.")] = ENCODER,
    steps: Annotated[Optional[int], typer.Option(metavar="N", help="Of every recipe that trains.")] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Of each of them.")] = 3,
    jobs: Annotated[int, typer.Option(metavar="N", help="Runs at a time, each with its share of the threads.")] = 1,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:
    """Runs the experiment of PAPER (gupta, fwsvd, lpaf, dsformer, cospadi, sltrain, wara) on tasks that need no network
    (modules needs no file, either), or on GLUE's (--tasks glue/sst2=0.5) through the package datasets: the paper's claims,
    what was measured, what held. Killed, the same command continues.

    Example:  lowfat reproduce fwsvd --tasks modules=0.25 --quick
    """
    from .reproduce import reproduce as job

    ratios = {}
    for text in listed(tasks or ""):
        name, equals, ratio = text.partition("=")
        if tasks and not (name and equals):
            raise ArgumentError(f"--tasks needs NAME=RATIO,...; found {text!r}")
        if tasks:
            ratios[name] = numbers("--tasks", ratio)[0]
    target = out or Path(f"reproduce_{paper}")
    with bar("opening") as tell:
        found = job(paper, out=target, data=data, encoder=model_folder(encoder), tasks=ratios or None, steps=steps,
                    seeds=seeds, quick=quick, jobs=jobs, overwrite=overwrite, on_progress=partial(tell, stage="experiment"))
    print_json(found) if as_json else show_reproduced(found, target)


@app.command(short_help="Singular values of each layer, before or after.")
def inspect(
    model: Model,
    plot: Annotated[Optional[Path], typer.Option(metavar="PNG", help="Draw the spectra into this file.")] = None,
    base: Annotated[Optional[str], typer.Option(metavar="DENSE", help="Model it was made from: adds the errors.")] = None,
    layers: Layers = None, as_json: Json = False,
) -> None:
    """The singular values of each layer of MODEL, a folder or hub name: what could be cut off, or what was.

    \b
    Example:  lowfat inspect lowfat-demo/model --base all-MiniLM-L6-v2 \\
                  --plot spectra.png
    """
    from .job import open_model
    from .layers import skipped
    from .spectra import draw, spectra

    if plot:
        check_file(plot)
    with bar("opening") as tell:
        opened, _ = open_model(model_folder(model), reads_text=False)
        original = open_model(model_folder(base), reads_text=False)[0] if base else None
        found = spectra(opened, base=original, layers=layers or None, on_progress=partial(tell, stage="spectra"))
    if plot:
        draw(found, plot, title=Path(model).name)
    left_out = skipped(opened, layers or None)
    print_json([one.to_json() for one in found]) if as_json else show_spectra(found, left_out, opened, plot)


@app.command(short_help="Races a kernel against torch on real layers' shapes.")
def bench(
    op: Annotated[str, typer.Argument(metavar="OP", hidden=True)],
    shapes: Annotated[str, typer.Option(metavar="NAMES", help=f"{', '.join(MODELS)}; or sizes k:n:r.")] = "minilm",
    rows: Annotated[str, typer.Option(metavar="M,...", help="Rows of x.")] = "1,4,8,16",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="bfloat16, float16 or float32.")] = "bfloat16",
    ratio: Annotated[float, typer.Option(metavar="SHARE", help="Parameters kept: gives the rank.")] = 0.5,
    rank: Annotated[Optional[int], typer.Option(metavar="R", help="The rank of all layers; atoms; how many of 4.")] = None,
    blocks: Annotated[Optional[int], typer.Option(metavar="N", help="Of k and n, each; the rank is a block's.")] = None,
    seconds: Annotated[float, typer.Option(metavar="S", help="For each candidate of a row, on the CPU.")] = 0.5,
    threads: Annotated[Optional[int], typer.Option(metavar="N", help="Of the CPU; default: torch's.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Race torch.compile too, on a GPU.")] = False,
    out: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Writes FILE.json and FILE.png.")] = None,
    device: Device = "auto", as_json: Json = False,
) -> None:
    """Races OP (low_rank, low_rank_group, low_rank_swiglu, low_rank_backward, monarch, monarch_backward, sparse24,
    dictionary, low_rank_sparse) against torch's own products (pair: the best way to compose them) and the dense layer, and
    checks the results it timed.

    Example:  lowfat bench low_rank --shapes minilm --rows 1,8
    """
    from .bench.race import draw, failures, race
    from .storage import write_json

    where = device_of(device)
    if threads is not None and threads < 1:
        raise ArgumentError(f"--threads is {threads}; needs at least 1")
    if out:
        check_file(out)
    torch.set_num_threads(threads or torch.get_num_threads())
    with bar("opening") as tell:
        found = race(op, shapes=shapes, rows=rows, dtype=dtype, device=where, ratio=ratio, rank=rank, blocks=blocks,
                     seconds=seconds, compiled=compiled, on_progress=tell)
    if out:
        write_json(out.with_suffix(".json"), found)
        draw(found, out.with_suffix(".png"))
    print_json(found) if as_json else show_bench(found)
    if failures(found):
        raise typer.Exit(1)


@app.command(short_help="Versions, kernels, GPU, and what to do about problems.")
def doctor(as_json: Json = False) -> None:
    """Versions, compiled kernels, processor, GPU and driver, and what to do about each problem.

    Example:  lowfat doctor
    """
    from . import doctor as job

    known = job.facts()
    found = {"summary": job.summary(known), "advice": job.advice(known)}
    print_json(known | found) if as_json else show_doctor(known, **found)
