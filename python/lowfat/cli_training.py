"""The commands that train: what they read from the command line, and the strategy of recovery/ that each of them runs."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer

from .data import read_rows
from .errors import ArgumentError
from .methods import named
from .options import BatchSize, Device, Json, MaxLength, Model, Out, Overwrite, Seed, Task, device_of, model_folder
from .plan import POLICIES
from .recovery.distillation import spelled
from .recovery.lpaf import COOL_DOWN, CRITERION, PRUNE_SHARE, SCORE_RATE, WARMUP
from .recovery.mixed_rank import CONSISTENCY, P_INIT, UNTIL
from .recovery.staged import FINAL_SHARE
from .recovery.straight_through import EVERY, FADE, FREEZE, PULL, SHADOW_RATE
from .show import bar, print_json, show_lpaf, show_pretraining, show_staged, show_straight_through, show_training

Train = Annotated[Path, typer.Option(metavar="TEXTS", help=".jsonl or .txt file.", show_default=False)]
Teacher = Annotated[Optional[str], typer.Option(metavar="DENSE", help="Model to follow; embeddings need one.")]
Distill = Annotated[Optional[str], typer.Option(metavar="TERMS", help="Of it too: hidden=1,attention=1.")]
Method = Annotated[str, typer.Option(metavar="NAME", help="One of those of lowfat factorize.")]
Ratio = Annotated[float, typer.Option(metavar="SHARE", help="Parameters to keep in these layers.")]
Policy = Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(POLICIES)}.", show_default=False)]
Set = Annotated[Optional[list[str]], typer.Option("--set", metavar="NAME=VALUE", help="Of the method: blocks=8.")]
# hidden: named in one line of the help, so that it fits on a screen
HiddenLayers = Annotated[Optional[list[str]], typer.Option("--layers", hidden=True)]
HiddenTexts = Annotated[Optional[Path], typer.Option("--validation", hidden=True)]
HiddenDistill = Annotated[Optional[str], typer.Option("--distill", hidden=True)]
HiddenTask = Annotated[Optional[str], typer.Option("--task", hidden=True)]
HiddenLength = Annotated[Optional[int], typer.Option("--max-length", hidden=True)]
HiddenSeed = Annotated[int, typer.Option("--seed", hidden=True)]
HiddenEvery = Annotated[int, typer.Option("--save-every", hidden=True)]


def finetune(
    model: Model, out_folder: Out, train: Train,
    validation: Annotated[Optional[Path], typer.Option(metavar="TEXTS", help="Judged after the last step.")] = None,
    teacher: Teacher = None, distill: Distill = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Updates of the weights.")] = 300,
    learning_rate: Annotated[float, typer.Option(metavar="RATE", help="Reached after a tenth of them.")] = 1e-4,
    task: Task = None, max_length: MaxLength = None, batch_size: BatchSize = 32, seed: Seed = 0,
    save_every: Annotated[int, typer.Option(metavar="STEPS", help="Keep the training state this often.")] = 100,
    device: Device = "auto", overwrite: Overwrite = False, as_json: Json = False,
) -> None:
    """Trains MODEL, a folder or hub name, and writes it to the folder OUT. Killed, the same command continues.

    \b
    Example:  lowfat finetune half better --teacher all-MiniLM-L6-v2 \\
                  --train lowfat-demo/texts.jsonl --steps 60
    """
    from .recovery import finetune as strategy

    report = _run(strategy, model, out_folder, train=train, validation=validation, teacher=teacher, distill=distill,
                  task=task, device=device, steps=steps, learning_rate=learning_rate, batch_size=batch_size,
                  max_length=max_length, seed=seed, save_every=save_every, overwrite=overwrite)
    print_json(report.to_json()) if as_json else show_training(report, out_folder)


def staged(
    model: Model, out_folder: Out, train: Train, teacher: Teacher = None, method: Method = "svd", ratio: Ratio = 0.5,
    policy: Policy = "per_matrix", arguments: Set = None,
    order: Annotated[str, typer.Option(metavar="NAME", help="backward, forward, sensitivity.")] = "backward",
    steps: Annotated[int, typer.Option(metavar="N", help="Of all stages and after them.")] = 300,
    learning_rate: Annotated[float, typer.Option(metavar="RATE", help="Of each stage.")] = 1e-4,
    batch_size: BatchSize = 32, device: Device = "auto", overwrite: Overwrite = False, as_json: Json = False,
    by: Annotated[str, typer.Option(hidden=True)] = "block",
    final_share: Annotated[float, typer.Option(hidden=True)] = FINAL_SHARE,
    layers: HiddenLayers = None, distill: HiddenDistill = None, validation: HiddenTexts = None, task: HiddenTask = None,
    max_length: HiddenLength = None, seed: HiddenSeed = 0, save_every: HiddenEvery = 100,
) -> None:
    """Factorizes MODEL block by block, trains in between, and writes it to OUT. Killed, the same command continues. Also:
    --layers, --by matrix, --final-share, --distill, --task, --validation, --max-length, --seed, --save-every.

    \b
    Example:  lowfat staged all-MiniLM-L6-v2 by-stages --steps 60 \\
                  --teacher all-MiniLM-L6-v2 --train lowfat-demo/texts.jsonl
    """
    from .recovery import staged as strategy

    report = _run(strategy, model, out_folder, train=train, validation=validation, teacher=teacher, distill=distill,
                  task=task, device=device, method=method, ratio=ratio, policy=policy,
                  arguments=named("--set", arguments or []),
                  layers=layers or None, by=by, order=order, steps=steps, final_share=final_share,
                  learning_rate=learning_rate, batch_size=batch_size, max_length=max_length, seed=seed,
                  save_every=save_every, overwrite=overwrite)
    print_json(report.to_json()) if as_json else show_staged(report, out_folder)


def straight_through(
    model: Model, out_folder: Out, train: Train, teacher: Teacher = None, method: Method = "svd", ratio: Ratio = 0.5,
    arguments: Set = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Of learning, and of the factors alone.")] = 300,
    every: Annotated[int, typer.Option(metavar="STEPS", help="Choose new factors this often.")] = EVERY,
    learning_rate: Annotated[float, typer.Option(metavar="RATE", help="Of the factors.")] = 1e-4,
    batch_size: BatchSize = 32, device: Device = "auto", overwrite: Overwrite = False, as_json: Json = False,
    policy: Annotated[str, typer.Option(hidden=True)] = "per_matrix",
    shadow_rate: Annotated[float, typer.Option(hidden=True)] = SHADOW_RATE,
    fade: Annotated[float, typer.Option(hidden=True)] = FADE,
    freeze: Annotated[float, typer.Option(hidden=True)] = FREEZE,
    pull: Annotated[float, typer.Option(hidden=True)] = PULL,
    layers: HiddenLayers = None, distill: HiddenDistill = None, validation: HiddenTexts = None, task: HiddenTask = None,
    max_length: HiddenLength = None, seed: HiddenSeed = 0, save_every: HiddenEvery = 100,
) -> None:
    """Trains MODEL through factors that are chosen anew on the way, and writes those to OUT. Killed, the same command
    continues. Also: --policy, --layers, --shadow-rate, --fade, --freeze, --pull, --distill, --task, --validation,
    --max-length, --seed, --save-every.

    \b
    Example:  lowfat straight-through all-MiniLM-L6-v2 learned --steps 60 \\
                  --teacher all-MiniLM-L6-v2 --train lowfat-demo/texts.jsonl
    """
    from .recovery import straight_through as strategy

    report = _run(strategy, model, out_folder, train=train, validation=validation, teacher=teacher, distill=distill,
                  task=task, device=device, method=method, ratio=ratio, policy=policy,
                  arguments=named("--set", arguments or []),
                  layers=layers or None, steps=steps, every=every, fade=fade, freeze=freeze, pull=pull,
                  learning_rate=learning_rate, shadow_rate=shadow_rate, batch_size=batch_size, max_length=max_length,
                  seed=seed, save_every=save_every, overwrite=overwrite)
    print_json(report.to_json()) if as_json else show_straight_through(report, out_folder)


def lpaf(
    model: Model, out_folder: Out, train: Train, teacher: Teacher = None, ratio: Ratio = 0.5,
    keep: Annotated[Optional[float], typer.Option(metavar="SHARE", help="Weights that pruning leaves; or --ratio.")] = None,
    prune_share: Annotated[float, typer.Option(metavar="SHARE", help="Of the steps; 0 prunes nothing.")] = PRUNE_SHARE,
    steps: Annotated[int, typer.Option(metavar="N", help="Of pruning, and of the factors.")] = 300,
    learning_rate: Annotated[float, typer.Option(metavar="RATE", help="Of both.")] = 1e-4,
    batch_size: BatchSize = 32, device: Device = "auto", overwrite: Overwrite = False, as_json: Json = False,
    weighting: Annotated[str, typer.Option(hidden=True)] = "scores",
    method: Annotated[str, typer.Option(hidden=True)] = "sparsity_aware",
    arguments: Annotated[Optional[list[str]], typer.Option("--set", hidden=True)] = None,
    policy: Annotated[str, typer.Option(hidden=True)] = "per_matrix",
    criterion: Annotated[str, typer.Option(hidden=True)] = CRITERION,
    scope: Annotated[str, typer.Option(hidden=True)] = "matrix",
    score_rate: Annotated[float, typer.Option(hidden=True)] = SCORE_RATE,
    warmup: Annotated[float, typer.Option(hidden=True)] = WARMUP,
    cool_down: Annotated[float, typer.Option(hidden=True)] = COOL_DOWN,
    p_init: Annotated[float, typer.Option(hidden=True)] = P_INIT,
    until: Annotated[float, typer.Option(hidden=True)] = UNTIL,
    consistency: Annotated[float, typer.Option(hidden=True)] = CONSISTENCY,
    train_dense: Annotated[bool, typer.Option("--train-dense", hidden=True)] = False,
    layers: HiddenLayers = None, distill: HiddenDistill = None, validation: HiddenTexts = None, task: HiddenTask = None,
    max_length: HiddenLength = None, seed: HiddenSeed = 0, save_every: HiddenEvery = 100,
) -> None:
    """Prunes MODEL while it trains, factorizes it and trains that (LPAF), into OUT. If killed, repeat it. Also: --weighting
    mask, --criterion magnitude, --p-init, --until, --consistency, --train-dense, --scope, --score-rate, --warmup, --cool-down,
    --method, --set, --policy, --layers, --distill, --task, --validation, --max-length, --seed, --save-every.

    \b
    Example:  lowfat lpaf all-MiniLM-L6-v2 pruned --steps 60 \\
                  --teacher all-MiniLM-L6-v2 --train lowfat-demo/texts.jsonl
    """
    from .recovery import lpaf as strategy

    report = _run(strategy, model, out_folder, train=train, validation=validation, teacher=teacher, distill=distill,
                  task=task, device=device, method=method, ratio=ratio, policy=policy, arguments=named("--set", arguments or []),
                  layers=layers or None, steps=steps, prune_share=prune_share, keep=keep, criterion=criterion,
                  scope=scope, score_rate=score_rate, warmup=warmup, cool_down=cool_down, weighting=weighting,
                  p_init=p_init, until=until, consistency=consistency, train_dense=train_dense,
                  learning_rate=learning_rate, batch_size=batch_size, max_length=max_length, seed=seed,
                  save_every=save_every, overwrite=overwrite)
    print_json(report.to_json()) if as_json else show_lpaf(report, out_folder)


def pretrain(
    config: Annotated[str, typer.Argument(metavar="CONFIG", hidden=True)], out_folder: Out,
    data: Annotated[Path, typer.Option(metavar="TEXTS", help=".jsonl or .txt file.", show_default=False)],
    tokenizer: Annotated[str, typer.Option(metavar="MODEL", help="Folder or hub name of one.", show_default=False)],
    structure: Annotated[Optional[str], typer.Option(metavar="NAME", help="Of the blocks' layers; or dense.")] = None,
    arguments: Annotated[Optional[list[str]],
                         typer.Option("--set", metavar="NAME=VALUE", help="Of the structure: rank=128.")] = None,
    steps: Annotated[Optional[int], typer.Option(metavar="N", help="Updates of the weights.")] = None,
    batch_size: Annotated[Optional[int], typer.Option(metavar="N", help="Pieces of text an update.")] = None,
    learning_rate: Annotated[float, typer.Option(metavar="RATE", help="Reached after the warm-up.")] = 3e-3,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Update in the backward pass.")] = False,
    device: Device = "auto", overwrite: Overwrite = False, as_json: Json = False, validation: HiddenTexts = None,
    accumulate: Annotated[int, typer.Option(hidden=True)] = 1,
    optimizer: Annotated[Optional[str], typer.Option(hidden=True)] = None,
    length: Annotated[Optional[int], typer.Option(hidden=True)] = None,
    warmup: Annotated[Optional[int], typer.Option(hidden=True)] = None,
    lowest: Annotated[float, typer.Option(hidden=True)] = 0.1,
    weight_decay: Annotated[float, typer.Option(hidden=True)] = 0.0,
    clip: Annotated[Optional[float], typer.Option(hidden=True)] = None,
    layers: HiddenLayers = None, seed: HiddenSeed = 0, save_every: HiddenEvery = 100,
) -> None:
    """Trains a new language model from CONFIG, a folder with a config.json or one of nano, 60m, 130m, 350m, 1b, 7b
    (SLTrain's sizes), and writes it to OUT and its loss curve to OUT.png. Killed, the same command continues. Also:
    --validation, --accumulate, --optimizer adam8bit, --length, --warmup, --lowest, --weight-decay, --clip, --layers, --seed,
    --save-every.

    \b
    Example:  lowfat pretrain nano new --data lowfat-demo/texts.jsonl \\
                  --tokenizer all-MiniLM-L6-v2 --steps 20
    """
    from .job import open_tokenizer
    from .presets import PRESETS
    from .pretrain import draw
    from .pretrain import pretrain as strategy

    preset, where, rows = PRESETS.get(config), device_of(device), read_rows(data)
    judged = validation and read_rows(validation)
    words = open_tokenizer(model_folder(tokenizer))
    given = {"steps": steps, "batch_size": batch_size, "length": length, "warmup": warmup, "optimizer": optimizer,
             "clip": clip}
    options = (preset.options() if preset else {}) | {name: value for name, value in given.items() if value is not None}
    if preset and steps is not None and warmup is None:
        options["warmup"] = None  # a tenth of these steps
    if "steps" not in options:
        raise ArgumentError("--steps is missing; only the presets have a number of their own")
    with bar("making the model") as tell:
        _, report = strategy(preset.model_config(len(words)) if preset else model_folder(config), rows, tokenizer=words,
                             plan=_plan(structure, named("--set", arguments or []), preset), layers=layers or None,
                             accumulate=accumulate, learning_rate=learning_rate, lowest=lowest, weight_decay=weight_decay,
                             per_layer=per_layer, validation=judged, device=where, seed=seed, out=out_folder,
                             overwrite=overwrite, save_every=save_every, on_progress=partial(tell, stage="training"),
                             **options)
    draw(report, f"{out_folder}.png")
    print_json(report.to_json()) if as_json else show_pretraining(report, out_folder)


def _plan(structure: str | None, arguments: dict, preset) -> dict | None:
    """What replace() is to do: the structure that was asked for, else the preset's with these arguments."""
    if structure == "dense" or (structure is None and preset is None):
        if arguments:
            raise ArgumentError(f"--set {', '.join(arguments)}: needs --structure; dense layers have no arguments")
        return None
    return {**preset.plan(), **arguments} if structure is None else {"structure": structure, **arguments}


def _run(strategy: Callable, model: str, out_folder: Path, *, train: Path, validation: Path | None, teacher: str | None,
         distill: str | None, task: str | None, device: str, **options):
    """The report of a strategy on the model, with a bar of its progress."""
    from .job import open_model

    where, rows, judged, terms = device_of(device), read_rows(train), validation and read_rows(validation), spelled(distill)
    with bar("opening") as tell:
        student, tokenizer = open_model(model_folder(model), task=task, device=where)
        followed, its_tokenizer = open_model(model_folder(teacher), task=task, device=where) if teacher else (None, None)
        return strategy(student, rows, tokenizer=tokenizer, task=task, teacher=followed, teacher_tokenizer=its_tokenizer,
                        distill=terms, validation=judged, out=out_folder, on_progress=partial(tell, stage="training"),
                        **options)
