"""A linear layer whose weight is S D in P x Q blocks: dense dictionaries D and coefficients S with s non-zeros per row.

d [P, Q, a, p], p = ceil(in / Q)   values [out, Q s], of each block in ascending order of the atoms; and which atoms those
are: mask [out, Q ceil(a / 32)] int32, a bitmap for each block, or positions [out, Q s] int16 (see ops/dictionary.py). One block
is the form of CoSpaDi (2509.22075), more that of DSFormer (2312.13211). Layers may share one dictionary: `other.d = layer.d`."""
from collections.abc import Sequence
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, DtypeError, IndexRangeError, ShapeError
from ..linalg import truncated_svd
from ..ops.bitmap import pack, places, words
from ..ops.dictionary import MAX_POSITIONS, check_support, coefficients, dictionary, kept_atoms, split_rows
from .monarch import from_blocks, to_blocks
from .sparse24 import largest, largest_of_groups, turning
from .structure import Structure, check_counts, check_dense, share

FORMATS = {"bitmap": torch.int32, "positions": torch.int16}


class Dictionary(Structure):
    """y = S (D x) + bias, `nonzeros` of the `atoms` of each block in a row of S.   x [..., in_features], y [..., out_features]

    blocks: (P, Q), of outputs and of inputs; sizes that they do not divide are padded with zeros.
    dense_atoms: how many atoms every row keeps, the first ones. pattern: [n, m] where the others are kept n of every m.
    Both are promises about the mask, checked where it is built or loaded, and change nothing of what is stored.
    format: of the mask, "bitmap" or "positions"; by default the smaller one.
    A new layer's rows keep atoms in turn, so that every atom is used. Raises ArgumentError or ShapeError for sizes that do
    not go together."""

    first = "d"

    def __init__(self, in_features: int, out_features: int, atoms: int, nonzeros: int, blocks: tuple[int, int] = (1, 1),
                 dense_atoms: int = 0, pattern: tuple[int, int] | None = None, format: str | None = None, bias: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        check_counts(in_features=in_features, out_features=out_features, atoms=atoms, nonzeros=nonzeros)
        self.blocks = check_blocks(in_features, out_features, blocks)
        self.pattern = check_pattern(atoms, nonzeros, dense_atoms, pattern)
        self.format = check_format(atoms, nonzeros, format)
        self.in_features, self.out_features, self.atoms, self.nonzeros = in_features, out_features, atoms, nonzeros
        self.dense_atoms = dense_atoms
        p, q = self.blocks
        self.d = nn.Parameter(torch.empty(p, q, atoms, ceil(in_features / q), device=device, dtype=dtype))
        self.values = nn.Parameter(torch.empty(out_features, q * nonzeros, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        support = stored_support(self._first().repeat(1, q), q, nonzeros, self.format)
        self.register_buffer("mask", support if self.format == "bitmap" else None)
        self.register_buffer("positions", support if self.format == "positions" else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As two `nn.Linear` in a row start: each factor uniform within 1 / sqrt(its own inputs). The mask stays."""
        nn.init.uniform_(self.d, -1 / sqrt(self.d.shape[3]), 1 / sqrt(self.d.shape[3]))
        for last in (self.values, self.bias):
            if last is not None:
                nn.init.uniform_(last, -1 / sqrt(self.values.shape[1]), 1 / sqrt(self.values.shape[1]))

    @classmethod
    def of(cls, d: Tensor, values: Tensor, support: Tensor, bias: Tensor | None = None, *, in_features: int,
           dense_atoms: int = 0, pattern: tuple[int, int] | None = None) -> "Dictionary":
        """The layer that holds these, contiguous copies of them.   d [P, Q, a, p]   values [out, Q s]

        support: [out, Q ceil(a / 32)] int32, a bitmap, or [out, Q s] int16, positions. Raises IndexRangeError for one that
        does not keep s atoms of each block, or breaks dense_atoms or pattern."""
        if d.dim() != 4 or values.dim() != 2 or d.shape[1] < 1 or values.shape[1] % d.shape[1]:
            raise ShapeError(f"d is {list(d.shape)} and values {list(values.shape)}, must be [P, Q, a, p] and [out, Q s]")
        forms = [form for form, dtype in FORMATS.items() if support.dtype == dtype]
        if not forms:
            raise DtypeError(f"support has {support.dtype}, must be int32 (a bitmap) or int16 (positions)")
        layer = cls(in_features, values.shape[0], d.shape[2], values.shape[1] // d.shape[1], tuple(d.shape[:2]), dense_atoms,
                    pattern, forms[0], bias is not None, device="meta", dtype=d.dtype)
        for name, tensor, due in (("d", d, layer.d), ("values", values, layer.values), ("support", support, layer.support),
                                  ("bias", bias, layer.bias)):
            if tensor is not None and tensor.shape != due.shape:
                raise ShapeError(f"{name} is {list(tensor.shape)}, must be {list(due.shape)}")
        setattr(layer, "mask" if forms[0] == "bitmap" else "positions",
                support.detach().to(d.device, copy=True, memory_format=torch.contiguous_format))
        layer.check_indices()
        for name, tensor in (("d", d), ("values", values), ("bias", bias)):
            if tensor is not None:
                layer.register_parameter(name, nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)))
        return layer

    @classmethod
    @torch.no_grad()
    def from_codes(cls, d: Tensor, codes: Tensor, kept: Tensor, bias: Tensor | None = None, *, in_features: int,
                   dense_atoms: int = 0, pattern: tuple[int, int] | None = None, format: str | None = None) -> "Dictionary":
        """The layer of d [P, Q, a, p] with the codes [out, Q a] where kept [out, Q a] is true, zeros included.

        Raises ShapeError unless every row keeps as many atoms of every block as every other."""
        if d.dim() != 4 or codes.dim() != 2 or codes.shape[1] != d.shape[1] * d.shape[2]:
            raise ShapeError(f"d is {list(d.shape)} and codes {list(codes.shape)}, must be [P, Q, a, p] and [out, Q a]")
        if kept.dtype != torch.bool or kept.shape != codes.shape:
            raise ShapeError(f"kept must be bool {list(codes.shape)}, found {kept.dtype} {list(kept.shape)}")
        (_, q, a, _), (n, _) = d.shape, codes.shape
        counts = kept.view(n, q, a).sum(2)
        nonzeros = int(counts[0, 0]) if n else 1
        for row, block in (counts != nonzeros).nonzero()[:1].tolist():
            raise ShapeError(f"kept has {int(counts[row, block])} atoms in block {block} of row {row} and {nonzeros} in the "
                             f"first of row 0; every row must keep as many")
        support = stored_support(kept, q, nonzeros, check_format(a, nonzeros, format))
        return cls.of(d, codes[kept].view(n, q * nonzeros), support, bias, in_features=in_features, dense_atoms=dense_atoms,
                      pattern=pattern)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, atoms: int, nonzeros: int,
                   blocks: tuple[int, int] = (1, 1), dense_atoms: int = 0, pattern: tuple[int, int] | None = None,
                   format: str | None = None) -> "Dictionary":
        """Of each block of weight [out, in] the first right singular vectors as atoms, and of each row's coefficients the
        largest: where a solver starts, and with nonzeros = atoms the closest matrix of that rank. Atoms are orthonormal.

        Raises ShapeError for more atoms than a block has rows or columns, NumericsError for NaN or infinity,
        UnsupportedError for a sharded weight."""
        check_dense(weight)
        n, k = weight.shape
        check_counts(in_features=k, out_features=n, atoms=atoms, nonzeros=nonzeros)
        (p_out, q), pattern = check_blocks(k, n, blocks), check_pattern(atoms, nonzeros, dense_atoms, pattern)
        most = min(ceil(n / p_out), ceil(k / q))
        if atoms > most:
            raise ShapeError(f"atoms must be between 1 and {most}, the smaller side of a block of {ceil(n / p_out)} x "
                             f"{ceil(k / q)}; found {atoms}")
        made = to_blocks(weight, (q, p_out), interleave=False)  # [P, Q, rows, p]
        solved = [truncated_svd(block, atoms) for row in made for block in row]
        d = torch.stack([vt for _, _, vt, _ in solved]).unflatten(0, (p_out, q))
        codes = torch.stack([u * s for u, s, _, _ in solved]).unflatten(0, (p_out, q))  # [P, Q, rows, a]
        codes = codes.transpose(1, 2).reshape(-1, q, atoms)[:n]
        kept = choose(codes.abs(), nonzeros, dense_atoms, pattern)
        return cls.from_codes(d.to(weight.dtype), codes.flatten(1).to(weight.dtype), kept.flatten(1), bias, in_features=k,
                              dense_atoms=dense_atoms, pattern=pattern, format=format)

    @property
    def support(self) -> Tensor:
        """The mask or the positions."""
        return self.mask if self.format == "bitmap" else self.positions

    def forward(self, x: Tensor) -> Tensor:
        return dictionary(x, self.d, self.values, self.support, self.bias)

    def kept(self) -> Tensor:
        """Which atoms each row keeps.   bool [out, Q a]"""
        return kept_atoms(self.support, self.blocks[1], self.atoms).flatten(1)

    def codes(self) -> Tensor:
        """S, dense.   [out, Q a]"""
        return coefficients(self.values, self.support, self.blocks[1], self.atoms)

    def dense(self) -> Tensor:
        (p, q), a = self.blocks, self.atoms
        s = split_rows(self.codes(), p).unflatten(2, (q, a)).transpose(1, 2)  # [P, Q, rows, a]
        return from_blocks(torch.matmul(s, self.d), self.out_features, self.in_features, interleave=False)

    def shape(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "atoms": self.atoms,
                "nonzeros": self.nonzeros, "blocks": list(self.blocks), "dense_atoms": self.dense_atoms,
                "pattern": None if self.pattern is None else list(self.pattern), "format": self.format,
                "bias": self.bias is not None}

    def split(self, rows: Sequence[int], biases: Sequence[Tensor | None]) -> list["Dictionary"]:
        """Layers of so many of this one's outputs each, in their order, that hold its d as one parameter. ShapeError for
        several blocks of outputs, whose dictionaries differ."""
        if self.blocks[0] > 1:
            raise ShapeError(f"layers can share the dictionaries of one block of outputs, found {self.blocks[0]}")
        parts = zip(self.values.split(list(rows)), self.support.split(list(rows)), biases)
        return share([Dictionary.of(self.d, values, support, bias, in_features=self.in_features,
                                    dense_atoms=self.dense_atoms, pattern=self.pattern) for values, support, bias in parts])

    def check_indices(self) -> None:
        check_support(self.support, self.blocks[1], self.atoms, self.nonzeros)
        if self.support.is_meta or not self.dense_atoms and self.pattern is None:
            return
        kept = self.kept().view(self.out_features, self.blocks[1], self.atoms)
        for row, block, atom in (~kept[..., :self.dense_atoms]).nonzero()[:1].tolist():
            raise IndexRangeError(f"row {row} does not keep atom {atom} of block {block}, one of the first {self.dense_atoms} "
                                  f"that every row keeps")
        if self.pattern is not None:
            n, m = self.pattern
            counts = kept[..., self.dense_atoms:].unflatten(-1, (-1, m)).sum(-1)
            for row, block, group in (counts != n).nonzero()[:1].tolist():
                first = self.dense_atoms + group * m
                raise IndexRangeError(f"row {row} keeps {int(counts[row, block, group])} of atoms {first}..{first + m - 1} of "
                                      f"block {block}, must keep {n} of every {m}")

    def macs(self) -> int:
        return self.d.numel() + self.values.numel()

    def _first(self) -> Tensor:
        """What the rows of a new layer keep, in one block.   bool [out, a]"""
        rows, dense, device = self.out_features, self.dense_atoms, self.d.device
        rest = self.atoms - dense
        if self.pattern is not None:
            n, m = self.pattern
            others = turning(rows, m, n, device).repeat(1, rest // m)
        else:
            others = turning(rows, rest, self.nonzeros - dense, device)
        return torch.cat([torch.ones(rows, dense, dtype=torch.bool, device=device), others], dim=1)


def stored_support(kept: Tensor, blocks: int, nonzeros: int, format: str) -> Tensor:
    """kept bool [out, Q a], `nonzeros` in each block, as the bitmap or the positions that the op reads."""
    by_block = kept.unflatten(1, (blocks, kept.shape[1] // blocks))
    if format == "bitmap":
        return pack(by_block).flatten(1)
    return places(by_block, nonzeros).to(torch.int16).flatten(1)


def choose(scores: Tensor, nonzeros: int, dense_atoms: int = 0, pattern: tuple[int, int] | None = None) -> Tensor:
    """The atoms that a row keeps: the first dense_atoms, and the largest of the others, by the pattern of every m of them.

    scores [..., a], none negative -> bool [..., a]"""
    others = scores[..., dense_atoms:]
    found = largest(others, nonzeros - dense_atoms) if pattern is None else largest_of_groups(others, *pattern)
    return torch.cat([torch.ones_like(scores[..., :dense_atoms], dtype=torch.bool), found], dim=-1)


def check_blocks(in_features: int, out_features: int, blocks: tuple[int, int]) -> tuple[int, int]:
    """(P, Q); ArgumentError or ShapeError where there is no such division."""
    if not isinstance(blocks, (tuple, list)) or len(blocks) != 2 or not all(type(count) is int for count in blocks):
        raise ArgumentError(f"blocks must be two whole numbers, of outputs and of inputs; found {blocks!r}")
    for what, count, size in zip(("outputs", "inputs"), blocks, (out_features, in_features)):
        if not 1 <= count <= size:
            raise ShapeError(f"blocks must be between 1 and {size} for {size} {what}; found {count}")
    return tuple(blocks)


def check_pattern(atoms: int, nonzeros: int, dense_atoms: int,
                  pattern: tuple[int, int] | None) -> tuple[int, int] | None:
    """The pattern as a tuple; ArgumentError or ShapeError where `nonzeros` of the atoms cannot be kept so."""
    if nonzeros > atoms:
        raise ShapeError(f"nonzeros must be between 1 and {atoms}, the atoms; found {nonzeros}")
    check_counts(0, dense_atoms=dense_atoms)
    if dense_atoms > nonzeros:
        raise ShapeError(f"dense_atoms must be between 0 and {nonzeros}, the nonzeros; found {dense_atoms}")
    if pattern is None:
        return None
    if not isinstance(pattern, (tuple, list)) or len(pattern) != 2 or not all(type(count) is int for count in pattern):
        raise ArgumentError(f"pattern must be two whole numbers, n of every m; found {pattern!r}")
    n, m = pattern
    rest = atoms - dense_atoms
    if not 1 <= n <= m or rest % m or rest // m * n != nonzeros - dense_atoms:
        raise ShapeError(f"pattern {n}:{m} of the {rest} atoms behind the first {dense_atoms} must keep "
                         f"{nonzeros - dense_atoms} of them, nonzeros less dense_atoms")
    return n, m


def check_format(atoms: int, nonzeros: int, format: str | None) -> str:
    """The form of the mask: the smaller one, if none is asked for."""
    if format is None:
        return "bitmap" if 4 * words(atoms) <= 2 * nonzeros or atoms > MAX_POSITIONS else "positions"
    if format not in list(FORMATS):
        raise ArgumentError(f"format must be one of {', '.join(FORMATS)}, or None; found {format!r}")
    if format == "positions" and atoms > MAX_POSITIONS:
        raise ShapeError(f"positions reach {MAX_POSITIONS} atoms, found {atoms}; use the bitmap")
    return format
