"""How fast the singular values of each layer fall, and what a factorized layer kept: what `lowfat inspect` shows."""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import ArgumentError, NumericsError
from .layers import dense_weight, factorizable, sizes
from .linalg import gram_of, require_finite, spectrum
from .structures import Structure, structures

SHARES = (0.5, 0.9, 0.99)  # of the energy, for which the table names the rank


@dataclass
class Spectrum:
    """One layer.   k features in, n out"""
    name: str
    in_features: int
    out_features: int
    squares: Tensor  # [min(n, k)] fp64, squared singular values of the weight, largest first: its energy
    rank: int | None = None  # None: the layer is dense
    parameters: int = 0  # without the bias, nor a factor that an earlier layer shares
    error: float | None = None  # ||W - What||_F / ||W||_F, W the weight of the base model

    @property
    def dense_parameters(self) -> int:
        return self.in_features * self.out_features

    @property
    def break_even(self) -> int:
        """The largest rank whose factors are smaller than the matrix."""
        return (self.dense_parameters - 1) // (self.in_features + self.out_features)

    def energy(self) -> Tensor:
        """Share of ||W||_F^2 that the first r singular values hold, for r = 1, 2, ...   [min(n, k)]"""
        total = self.squares.sum()
        return self.squares.cumsum(0) / total if total > 0 else torch.ones_like(self.squares)

    def rank_for(self, share: float) -> int:
        """The smallest rank that holds this share of the energy."""
        return min(int((self.energy() < share).sum()) + 1, len(self.squares))

    def energy_ranks(self) -> list[int]:
        """rank_for() each of SHARES."""
        return [self.rank_for(share) for share in SHARES]

    def to_json(self) -> dict:
        return {"layer": self.name, "in_features": self.in_features, "out_features": self.out_features, "rank": self.rank,
                "parameters": self.parameters, "dense_parameters": self.dense_parameters, "break_even_rank": self.break_even,
                "energy_ranks": dict(zip(map(str, SHARES), self.energy_ranks())), "error": self.error,
                "singular_values": self.squares.sqrt().tolist()}


@torch.no_grad()
def spectra(model: nn.Module, *, base: nn.Module | None = None, layers: Sequence[str] | None = None,
            on_progress: Callable[[int, int, str], None] | None = None) -> list[Spectrum]:
    """The factorized layers of a model, and those that could be factorized, in the model's order.

    base: the dense model that this one was made from, for the errors. layers: name patterns.
    ArgumentError: nothing matches, or base lacks a layer. NumericsError: a weight with NaN or infinity.
    """
    chosen = _chosen(model, layers)
    originals = dict(base.named_modules()) if base is not None else {}
    if base is not None:
        for name, module in chosen.items():
            if name not in originals or sizes(originals[name]) != sizes(module):
                k, n = sizes(module)
                raise ArgumentError(f"base: it has no layer {name} of {k} inputs and {n} outputs")
    found, counted = [], set()
    for number, (name, module) in enumerate(chosen.items(), 1):
        found.append(_one(name, module, originals.get(name), counted))
        if on_progress:
            on_progress(number, len(chosen), name)
    return found


def _chosen(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    factorized = {name for name, _ in structures(model)
                  if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)}
    try:
        dense = factorizable(model, patterns)
    except ArgumentError:  # nothing dense is left to factorize
        if not factorized:
            raise
        dense = {}
    return {name: module for name, module in model.named_modules() if name in factorized or name in dense}


def _one(name: str, module: nn.Module, original: nn.Module | None, counted: set[nn.Parameter]) -> Spectrum:
    weight = _weight(module)
    try:
        require_finite(weight, "the weight")
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from error
    k, n = sizes(module)
    found = Spectrum(name, k, n, spectrum(lambda: gram_of(weight if n >= k else weight.mT)), parameters=k * n)
    if isinstance(module, Structure):
        found.rank = _rank_of(module.shape())
        own = {parameter for key, parameter in module.named_parameters() if key.rpartition(".")[2] != "bias"} - counted
        found.parameters = sum(parameter.numel() for parameter in own)
        counted |= own
    if original is not None:
        dense = _weight(original).to(weight)
        found.error = float(torch.linalg.matrix_norm(dense - weight) / torch.linalg.matrix_norm(dense))
    return found


def _rank_of(shape: dict) -> int | None:
    """What a plan calls so: of a dictionary its atoms, of N:M pruning N, of a sum that of its first part. None for an
    adapter, whose own rank is not that of the sum with its base layer."""
    if "base_layer" in shape:
        return None
    if "parts" in shape:
        return _rank_of(shape["parts"][0])
    return next(shape[name] for name in ("rank", "atoms", "n") if name in shape)


def _weight(module: nn.Module) -> Tensor:
    """[n, k], factors multiplied out in fp32 at least."""
    weight = module.dense() if isinstance(module, Structure) else dense_weight(module)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def draw(found: Sequence[Spectrum], path: str | Path, *, title: str = "") -> None:
    """A PNG: for each kind of layer its singular values above, the energy they hold below; deep layers have dark lines."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds: dict[str, list[Spectrum]] = {}
    for one in found:
        kinds.setdefault(kind(one.name), []).append(one)
    across = min(len(kinds), 6)
    down = ceil(len(kinds) / across)
    figure = Figure(figsize=(0.8 + 2.7 * across, 0.6 + 4 * down), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.subplots(2 * down, across, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for number, (name, members) in enumerate(kinds.items()):
        values, energy = (grid[2 * (number // across) + row][number % across] for row in (0, 1))
        for depth, one in enumerate(members):
            color = colormaps["viridis_r"](0.1 + 0.9 * depth / max(len(members) - 1, 1))
            ranks = range(1, len(one.squares) + 1)
            last = one.rank or len(one.squares)  # beyond its rank a factorized layer has only rounding
            values.plot(ranks[:last], one.squares[:last].sqrt(), color=color, linewidth=1)
            energy.plot(ranks, 100 * one.energy(), color=color, linewidth=1)
        for axes in (values, energy):
            axes.set_visible(True)
            axes.axvline(members[0].break_even, color="black", linewidth=0.8, linestyle=":")
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=7)
        values.set_yscale("log")
        values.set_title(f"{name}\n{members[0].in_features} to {members[0].out_features}", fontsize=8)
        energy.set_ylim(0, 102)
        energy.set_xlabel("rank (dotted: break-even)", fontsize=8)
        if number % across == 0:
            values.set_ylabel("singular value", fontsize=8)
            energy.set_ylabel("energy held, %", fontsize=8)
    figure.savefig(path)


def kind(name: str) -> str:
    """The last parts of a layer's name, after its block's number: "attention.self.query"."""
    return re.split(r"\.\d+\.", name)[-1]
