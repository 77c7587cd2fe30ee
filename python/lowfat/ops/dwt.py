"""Discrete wavelet transforms of the last dimension: orthonormal filters, periodic boundary, a zero behind an odd size.

A level makes two halves of ceil(s / 2) numbers of s: low[i] = sum over t of h[t] x[2i + t], and high[i] the same of g[t] =
(-1)^t h[-1 - t], places modulo the even size; the next level does that to low. Each step's inverse is its transpose."""
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ArgumentError, ShapeError

# the low-pass filters h. Daubechies (1992), tables 6.1 and 6.3: the roots of her polynomial to 60 digits, rounded once
FILTERS = {
    "haar": (0.7071067811865476, 0.7071067811865476),
    "db2": (0.48296291314453416, 0.8365163037378079, 0.2241438680420134, -0.12940952255126037),
    "db4": (0.2303778133088965, 0.7148465705529157, 0.6308807679298589, -0.027983769416859854, -0.18703481171909309,
            0.030841381835560764, 0.0328830116668852, -0.010597401785069032),
    "sym4": (0.032223100604051466, -0.012603967262031304, -0.09921954357663353, 0.29785779560530606, 0.8037387518051321,
             0.497618667632775, -0.029635527646002493, -0.07576571478950221),
}
Band = Tensor | None  # None: of zeros


def dwt(x: Tensor, filter: str = "haar", levels: int = 1) -> Tensor:
    """The coefficients of x [..., s], coarse to fine: the last low half, then the high halves of all levels from the last.

    Returns [..., sum(band_sizes) + the last of them], s where 2^levels divides it. Raises ArgumentError for an unknown
    filter, ShapeError for levels that the size does not have."""
    check_transform(filter, levels, x.shape[-1], op="dwt")
    bands = analyze(x, filter, levels)
    return torch.cat([bands[-1][0], *(high for _, high in reversed(bands))], dim=-1)


def idwt(coefficients: Tensor, size: int, filter: str = "haar", levels: int = 1) -> Tensor:
    """The x [..., size] that dwt made these of: its transpose, and its inverse."""
    check_transform(filter, levels, size, op="idwt")
    widths = band_sizes(size, levels)
    due = sum(widths) + widths[-1]
    if coefficients.shape[-1] != due:
        raise ShapeError(f"idwt: coefficients {list(coefficients.shape)} must have {due} of {size} features")
    low, *highs = coefficients.split((widths[-1], *reversed(widths)), dim=-1)
    bands: list[tuple[Band, Band]] = [(None, high) for high in reversed(highs)]
    bands[-1] = low, bands[-1][1]
    return synthesize(bands, size, filter)


def analyze(x: Tensor, filter: str, levels: int) -> list[tuple[Tensor, Tensor]]:
    """(low, high) of every level, from the first."""
    bands = []
    for _ in range(levels):
        x = pad(x, (0, x.shape[-1] % 2))
        low, high = (_filtered([(x[..., first::2], taps[first::2]) for first in (0, 1)], -1) for taps in _both(filter))
        bands.append((low, high))
        x = low
    return bands


def synthesize(bands: Sequence[tuple[Band, Band]], size: int, filter: str) -> Tensor:
    """The transpose of analyze, which takes each band of each level as an output of its own: their shares of x [..., size]
    are added. At least one band is not None."""
    sizes, below = (size, *band_sizes(size, len(bands))), None
    low_taps, high_taps = _both(filter)
    for level in reversed(range(len(bands))):
        low, high = bands[level]
        low = below if low is None else low if below is None else low + below
        halves = [(half, taps) for half, taps in ((low, low_taps), (high, high_taps)) if half is not None]
        if halves:
            even, odd = (_filtered([(half, taps[first::2]) for half, taps in halves], 1) for first in (0, 1))
            below = torch.stack([even, odd], dim=-1).flatten(-2)[..., :sizes[level]]
    return below


def band_sizes(size: int, levels: int) -> tuple[int, ...]:
    """Of the two halves of every level, from the first."""
    return tuple(-(-size // 2**level) for level in range(1, levels + 1))


def max_levels(size: int) -> int:
    """As many as it takes to come to one number."""
    levels = 1
    while 2**levels < size:
        levels += 1
    return levels


def check_transform(filter: str, levels: int, *sizes: int, op: str) -> None:
    """ArgumentError or ShapeError, with what there is, for a transform that the sizes do not have."""
    if filter not in list(FILTERS):  # a list: what cannot be hashed is no filter either
        raise ArgumentError(f"{op}: filter is {filter!r}, must be one of {', '.join(FILTERS)}")
    if type(levels) is not int:
        raise ArgumentError(f"{op}: levels must be a whole number, found {levels!r}")
    most = min(map(max_levels, sizes))
    if not 1 <= levels <= most:
        valid = ", ".join(map(str, range(1, most + 1)))
        raise ShapeError(f"{op}: levels is {levels}, must be one of {valid} for {' and '.join(map(str, sizes))} features")


def _both(filter: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    h = FILTERS[filter]
    return h, tuple((-1) ** t * tap for t, tap in enumerate(reversed(h)))


def _filtered(parts: Sequence[tuple[Tensor, Sequence[float]]], step: int) -> Tensor:
    """The sum over all parts and taps of tap * part, the t-th tap's moved by step t around its end."""
    terms = [tap * part.roll(step * t, -1) for part, taps in parts for t, tap in enumerate(taps)]
    return sum(terms[1:], terms[0])
