"""DSFormer (2312.13211): each of P x Q blocks of the weight is a small dictionary times sparse codes, fitted to the weights.

One-shot: from the leading singular vectors of a block and the s largest coefficients of each row, alternately OMP of the
rows and least squares of the atoms, at last of the coefficients where they are. Nothing that loses more is taken. This is
where training starts from; refactorized() follows a weight that moves, from the factors that are there.
"""
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from ..linalg import require_finite
from ..structures.dictionary import Dictionary, check_blocks
from ..structures.monarch import to_blocks
from . import cospadi, dictionary

if TYPE_CHECKING:
    from ..stats import Stats

_STEPS = 10


def check_pair(blocks: tuple[int, int]) -> None:
    is_pair = isinstance(blocks, (tuple, list)) and len(blocks) == 2
    if not is_pair or not all(type(part) is int and part > 0 for part in blocks):
        raise ArgumentError(f"blocks must be two whole numbers above 0, of outputs and of inputs; found {blocks!r}")


ARGUMENTS = {"blocks": check_pair, "density": dictionary.check_density}


def size(k: int, n: int, *, blocks: tuple[int, int] = (1, 4), density: float = 0.25) -> tuple[float, int]:
    """Padding of the inputs counts: it is stored."""
    p, q = check_blocks(k, n, blocks)
    return q * (p * ceil(k / q) + density * n), ceil(n / p)


def count(k: int, n: int, *, rank: int, blocks: tuple[int, int] = (1, 4), density: float = 0.25) -> tuple[int, int]:
    (p, q), support = check_blocks(k, n, blocks), dictionary.support_of(rank, density)
    return q * (p * rank * ceil(k / q) + n * support.nonzeros), q * support.index_bytes(n)


@torch.no_grad()
def factorize(weight: Tensor, bias: Tensor | None, stats: "Stats | None" = None, *, rank: int,
              blocks: tuple[int, int] = (1, 4), density: float = 0.25) -> tuple[Dictionary, list[str]]:
    """The layer in the weight's dtype.   weight [n, k]   bias [n]

    rank: atoms of a block. blocks: (P, Q), of outputs and of inputs. density: non-zeros of a row and block over atoms.
    Raises NumericsError for NaN or infinity, ShapeError for blocks that do not fit, or more atoms than a block has rows."""
    support, most = dictionary.support_of(rank, density), size(*weight.shape[::-1], blocks=blocks, density=density)[1]
    if not 1 <= rank <= most:
        raise ShapeError(f"rank, the number of atoms of a block, must be between 1 and {most}, found {rank}")
    require_finite(weight, "weight")
    found, events = [], []
    for part in _parts(weight, blocks):
        target = dictionary.plain_target(part)
        scale = float(target.z.abs().amax()) or 1.0
        z = (target.z / scale).to(target.dtype)
        codes, atoms, keep = alternated(z, *cospadi.start(z, support.atoms, support.nonzeros), _STEPS)
        codes, atoms, keep = dictionary.polished(target.z, codes.double() * scale, atoms, keep)
        found.append((*dictionary.balanced(codes, target.atoms(atoms)), keep))
        events += target.events
    return _joined(found, weight, bias, blocks), events


@torch.no_grad()
def losses(weight: Tensor, stats: "Stats | None" = None, *, blocks: tuple[int, int] = (1, 4),
           density: float = 0.25) -> Tensor:
    """||W - What||_F^2 of where the steps start, for every number of atoms of a block.   [rows of a block + 1], fp64"""
    most = size(*weight.shape[::-1], blocks=blocks, density=density)[1]
    require_finite(weight, "weight")
    return sum(dictionary.curve(dictionary.plain_target(part).z, most, density=density) for part in _parts(weight, blocks))


@torch.no_grad()
def refactorized(layer: Dictionary, weight: Tensor, steps: int = 1) -> Dictionary:
    """The layer closer to weight [n, k], by so many steps from its own factors, with as many non-zeros in each row; a layer
    that is the weight stays as it is but for rounding. Raises ShapeError for a weight of another shape, NumericsError."""
    if weight.shape != (layer.out_features, layer.in_features):
        raise ShapeError(f"weight is {list(weight.shape)}, must be {[layer.out_features, layer.in_features]}")
    if layer.pattern is not None or layer.dense_atoms:
        raise ArgumentError("refactorized: coding by OMP keeps neither a pattern nor dense atoms; this layer has them")
    require_finite(weight, "weight")
    p, q = layer.blocks
    codes, keep = (_split(whole, p, q) for whole in (layer.codes(), layer.kept()))
    dtype, found = torch.promote_types(weight.dtype, torch.float32), []
    for part, old, where, atoms in zip(_parts(weight, layer.blocks), codes, keep, layer.d.flatten(0, 1)):
        scale = float(part.abs().amax()) or 1.0
        z, lengths = part.to(dtype) / scale, torch.linalg.vector_norm(atoms.to(dtype), dim=1)
        atoms = atoms.to(dtype) / torch.where(lengths > 0, lengths, torch.inf)[:, None]
        new, atoms, where = alternated(z, old.to(dtype) * lengths / scale, atoms, where, steps)
        new, atoms, where = dictionary.polished(part, new.double() * scale, atoms, where)
        found.append((*dictionary.balanced(new, atoms), where))
    return _joined(found, weight, layer.bias, layer.blocks)


def alternated(z: Tensor, codes: Tensor, atoms: Tensor, keep: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, atoms, keep) after so many times OMP and least squares of the atoms, from atoms of length 1 to such ones."""
    for _ in range(steps):
        codes, keep = cospadi.improved(z, codes, atoms, keep)
        fitted = dictionary.fitted_atoms(z, codes).to(z.dtype)
        lengths = torch.linalg.vector_norm(fitted, dim=1)
        if not dictionary.lost(z, codes, fitted) < dictionary.lost(z, codes, atoms):
            break
        atoms, codes = fitted / torch.where(lengths > 0, lengths, torch.inf)[:, None], codes * lengths
    return codes, atoms, keep


def _parts(weight: Tensor, blocks: tuple[int, int]) -> list[Tensor]:
    """Blocks [rows, p], by output and then by input block."""
    p, q = blocks
    return [part for row in to_blocks(weight, (q, p), interleave=False) for part in row]


def _split(whole: Tensor, p: int, q: int) -> Tensor:
    """[n, q a] -> [p q, rows, a], the last rows padded: with the first row, whose support is as good as any."""
    rows = ceil(len(whole) / p)
    index = torch.arange(p * rows, device=whole.device)
    whole = whole[torch.where(index < len(whole), index, 0)]
    return whole.view(p, rows, q, -1).transpose(1, 2).flatten(0, 1)


def _joined(found: list[tuple[Tensor, Tensor, Tensor]], weight: Tensor, bias: Tensor | None,
            blocks: tuple[int, int]) -> Dictionary:
    (n, k), (p, q) = weight.shape, blocks
    codes, atoms, keep = (torch.stack(parts).unflatten(0, (p, q)) for parts in zip(*found))
    codes, keep = (parts.transpose(1, 2).flatten(0, 1)[:n].flatten(1) for parts in (codes, keep))
    return Dictionary.from_codes(atoms.to(weight.dtype), codes.to(weight.dtype), keep, bias, in_features=k)
