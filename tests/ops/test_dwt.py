"""Wavelet transforms: the filters are what they are called, and every transform is orthonormal, by its definition."""
from math import sqrt

import pytest
import torch

from lowfat.errors import ArgumentError, ShapeError
from lowfat.ops import dwt, idwt
from lowfat.ops.dwt import FILTERS, analyze, band_sizes, max_levels, synthesize

VANISHING = {"haar": 1, "db2": 2, "db4": 4, "sym4": 4}  # moments of g
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 17, 33, 64, 127)
EACH = [(filter, size, levels) for filter in VANISHING for size in SIZES for levels in range(1, max_levels(size) + 1)]
# Daubechies (1992), tables 6.1 and 6.3, to the twelve digits that are printed there, divided by sqrt(2) in the second
PRINTED = {"db2": (0.482962913145, 0.836516303738, 0.224143868042, -0.129409522551),
           "db4": (0.230377813309, 0.714846570553, 0.630880767930, -0.027983769417, -0.187034811719, 0.030841381836,
                   0.032883011667, -0.010597401785),
           "sym4": (0.032223100604, -0.012603967262, -0.099219543577, 0.297857795606, 0.803738751805, 0.497618667633,
                    -0.029635527646, -0.075765714789)}


def identity(size):
    return torch.eye(size, dtype=torch.float64)


def one_level(filter, size):
    """(low, high) [ceil(size / 2), size], number by number as dwt.py's head defines them."""
    taps, even = FILTERS[filter], size + size % 2
    low, high = torch.zeros(even // 2, even, dtype=torch.float64), torch.zeros(even // 2, even, dtype=torch.float64)
    for i in range(even // 2):
        for t in range(len(taps)):
            low[i, (2 * i + t) % even] += taps[t]
            high[i, (2 * i + t) % even] += (-1) ** t * taps[len(taps) - 1 - t]
    return low[:, :size], high[:, :size]  # the zero behind an odd size adds nothing


def half_matrices(filter, size, levels):
    """[(low, high) of each level], each [half, size]: what takes x to that half."""
    found, before = [], identity(size)
    for _ in range(levels):
        low, high = (half @ before for half in one_level(filter, len(before)))
        found.append((low, high))
        before = low
    return found


@pytest.mark.parametrize("filter", VANISHING)
def test_filters_are_orthonormal_and_have_their_moments(filter):
    h = torch.tensor(FILTERS[filter], dtype=torch.float64)
    size, moments = len(h), VANISHING[filter]
    assert size == 2 * moments and abs(h.sum() - sqrt(2)) < 1e-15
    for shift in range(0, size, 2):
        assert abs((h[shift:] * h[:size - shift]).sum() - int(shift == 0)) < 1e-15
    signed, t = h * (-1.0) ** torch.arange(size), torch.arange(size, dtype=torch.float64)
    for power in range(moments):
        assert abs((signed * t**power).sum()) < 1e-12  # up to 7^3 times the rounding of a tap
    assert abs((signed * t**moments).sum()) > 0.1  # and no more
    assert all(abs(tap - due) < 1e-12 for tap, due in zip(FILTERS[filter], PRINTED.get(filter, FILTERS[filter])))


@pytest.mark.parametrize("filter, size, levels", EACH)
def test_the_transform_is_its_definition_and_orthonormal(filter, size, levels):
    matrix = dwt(identity(size), filter, levels).T  # [coefficients, size]
    halves = half_matrices(filter, size, levels)
    assert (matrix - torch.cat([halves[-1][0], *(high for _, high in reversed(halves))])).abs().max() < 1e-14
    assert (matrix.T @ matrix - identity(size)).abs().max() < 1e-12
    inverse = idwt(identity(len(matrix)), size, filter, levels).T
    assert (inverse - matrix.T).abs().max() < 1e-14
    both = matrix @ inverse  # the coefficients of numbers that were not there, behind odd sizes, are given up
    if size % 2**levels == 0:
        assert (both - identity(size)).abs().max() < 1e-12
    assert (both @ both - both).abs().max() < 1e-12 and abs(both.trace() - size) < 1e-12


@pytest.mark.parametrize("filter", VANISHING)
@pytest.mark.parametrize("size", (3, 7, 17))
def test_an_odd_size_is_a_zero_behind_it(filter, size):
    """With the zero kept the transform is square, and inverts itself from both sides."""
    x = torch.randn(4, size, dtype=torch.float64)
    wide = torch.cat([x, x.new_zeros(4, 1)], dim=1)
    assert torch.equal(dwt(x, filter), dwt(wide, filter))
    assert torch.equal(idwt(dwt(x, filter), size, filter), idwt(dwt(wide, filter), size + 1, filter)[:, :-1])
    c = torch.randn(4, size + 1, dtype=torch.float64)
    assert (dwt(idwt(c, size + 1, filter), filter) - c).abs().max() < 1e-12


@pytest.mark.parametrize("filter", VANISHING)
def test_levels_are_the_transform_of_the_low_half(filter):
    x = torch.randn(2, 3, 21, dtype=torch.float64)
    once, thrice = dwt(x, filter), dwt(x, filter, levels=3)
    assert band_sizes(21, 3) == (11, 6, 3)
    assert torch.equal(thrice, torch.cat([dwt(once[..., :11], filter, levels=2), once[..., 11:]], dim=-1))


def test_haar_is_the_sum_and_the_difference_of_neighbours():
    x = torch.randint(-9, 10, (5, 8)).double()
    root, even, odd = FILTERS["haar"][0], x[:, ::2], x[:, 1::2]
    assert torch.equal(dwt(x), torch.cat([root * even + root * odd, root * even - root * odd], dim=1))
    assert root == sqrt(0.5)


def test_the_transpose_takes_halves_of_any_level():
    """Those of a level that is not the last too: what goes into or out of a low half before it is split again."""
    halves = half_matrices("db2", 13, 3)
    given = [tuple(torch.randn(2, len(half), dtype=torch.float64) for half in level) for level in halves]
    expected = sum(c @ half for level, matrices in zip(given, halves) for c, half in zip(level, matrices))
    assert (synthesize(given, 13, "db2") - expected).abs().max() < 1e-13
    alone = [(None, None), (given[1][0], None), (None, None)]
    assert (synthesize(alone, 13, "db2") - given[1][0] @ halves[1][0]).abs().max() < 1e-13
    for level, matrices in zip(analyze(identity(13), "db2", 3), halves):
        assert all((found.T - half).abs().max() < 1e-14 for found, half in zip(level, matrices))


@pytest.mark.parametrize("filter", VANISHING)
def test_gradients(filter):
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    c = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)  # 2 low, 2 and 3 high
    assert torch.autograd.gradcheck(lambda x: dwt(x, filter, levels=2), (x,))
    assert torch.autograd.gradgradcheck(lambda c: idwt(c, 5, filter, levels=2).square(), (c,))
    assert torch.equal(torch.func.vmap(lambda row: dwt(row, filter, 2))(x), dwt(x, filter, 2))
    assert dwt(torch.empty(3, 6, device="meta"), filter).shape == (3, 6) and dwt(torch.empty(0, 6), filter).shape == (0, 6)


@pytest.mark.parametrize("call, error, text", [
    (lambda x: dwt(x, "db3"), ArgumentError, "dwt: filter is 'db3', must be one of haar, db2, db4, sym4"),
    (lambda x: dwt(x, ["haar"]), ArgumentError, "must be one of haar"),
    (lambda x: dwt(x, levels=4), ShapeError, "dwt: levels is 4, must be one of 1, 2, 3 for 6 features"),
    (lambda x: dwt(x, levels=0), ShapeError, "levels is 0, must be one of 1, 2, 3"),
    (lambda x: dwt(x, levels=1.0), ArgumentError, "levels must be a whole number, found 1.0"),
    (lambda x: idwt(x, 7), ShapeError, r"idwt: coefficients \[2, 6\] must have 8 of 7 features"),
    (lambda x: idwt(x, 1, levels=2), ShapeError, "idwt: levels is 2, must be one of 1 for 1 features"),
])
def test_what_there_is_not(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.ones(2, 6))
