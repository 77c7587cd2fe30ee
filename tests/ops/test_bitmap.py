"""Bitmaps and what is gathered by them, against loops; and for any bits whatever, within bounds."""
import pytest
import torch

import gates
from lowfat.errors import ShapeError
from lowfat.ops import dictionary, sparse24
from lowfat.ops.bitmap import MAX_ON_GPU, WORD, check_entries, expand, pack, places, unpack, words

SIZES = [0, 1, 3, 31, 32, 33, 64, 70, 128, 200]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("leading", [(3,), (2, 3), (0,)])
def test_bit_j_is_in_word_j_over_32(leading, size):
    kept = torch.rand(*leading, size) < 0.5
    mask = pack(kept)
    assert mask.dtype == torch.int32 and mask.shape == (*leading, words(size)) and mask.is_contiguous()
    for place in torch.cartesian_prod(*(torch.arange(s) for s in kept.shape)).view(-1, kept.dim()).tolist():
        *row, j = place
        assert bool(int(mask[(*row, j // WORD)]) >> (j % WORD) & 1) == bool(kept[(*row, j)])
    assert torch.equal(unpack(mask, size), kept) and not unpack(mask, words(size) * WORD)[..., size:].any()


def test_the_highest_bit_of_a_word():
    assert pack(torch.ones(1, 32, dtype=torch.bool)).tolist() == [[-1]]
    assert pack(torch.arange(32)[None] == 31).tolist() == [[-2**31]]
    assert unpack(torch.tensor([[-2**31, 1]], dtype=torch.int32), 33).nonzero()[:, 1].tolist() == [31, 32]


@pytest.mark.parametrize("size,count", [(5, 2), (33, 7), (64, 64), (40, 1), (4, 0), (0, 0)])
def test_values_go_to_their_places_and_come_back(size, count):
    kept = torch.rand(3, 2, size).argsort(-1).argsort(-1) < count
    values = torch.randn(3, 2, count)
    dense, found = expand(values, kept), places(kept, count)
    assert dense.shape == kept.shape and found.shape == values.shape
    for row in range(3):
        for block in range(2):
            where = kept[row, block].nonzero().flatten()
            assert torch.equal(found[row, block], where) and torch.equal(dense[row, block, where], values[row, block])
            assert not dense[row, block][~kept[row, block]].any()


def test_stored_zeros_and_not_finite_values_stay():
    kept = torch.tensor([[False, True, True, False, True]])
    values = torch.tensor([[-0.0, float("nan"), float("inf")]])
    dense = expand(values, kept)
    assert torch.equal(dense.isnan(), torch.tensor([[0, 0, 1, 0, 0]]).bool()) and dense[0, 4] == float("inf")
    assert dense[0, 1].signbit() and not dense[0, 0].signbit()


@pytest.mark.parametrize("size,count", [(70, 5), (33, 33)])
@pytest.mark.parametrize("word", [0, -1, 1, 2**31 - 1, -2**31])
def test_any_bits_stay_within_bounds(word, size, count):
    """Too many bits, none, and bits behind the last entry."""
    mask = torch.full((4, words(size)), word, dtype=torch.int32)
    for end in (True, False):
        given, values = gates.at_guard_page(mask, end=end), gates.at_guard_page(torch.randn(4, count), end=end)
        kept = unpack(given, size)
        assert expand(values, kept).shape == (4, size)
        found = places(kept, count)
        assert ((found >= 0) & (found < size)).all()


def test_more_entries_than_a_gpu_counts_are_named():
    for device, entries in (("cuda", MAX_ON_GPU), ("cpu", MAX_ON_GPU + 4)):
        check_entries("sparse24", torch.device(device), entries)
    with pytest.raises(ShapeError, match="sparse24: the sparse factor has 1073741828 columns, a GPU takes 1073741824"):
        check_entries("sparse24", torch.device("cuda"), MAX_ON_GPU + 4)


@pytest.mark.gpu
def test_more_entries_than_a_gpu_counts_are_refused():
    """Of no rows, so that only x is long: 2 GB."""
    entries, half = MAX_ON_GPU + 4, dict(dtype=torch.float16, device="cuda")
    x, mask = torch.empty(1, entries, **half), torch.empty(0, words(entries), dtype=torch.int32, device="cuda")
    values = torch.empty(0, entries // 2, **half)
    for call in (sparse24, lambda *args: dictionary(x[:, :0], torch.empty(1, 1, entries, 0, **half), *args[1:])):
        with pytest.raises(ShapeError, match="the sparse factor has 1073741828 columns"):
            call(x, values, mask)
    calls = (lambda: torch.ops.lowfat.sparse24(x, values, mask, None, 2, 4),
             lambda: torch.ops.lowfat.sparse24_backward(x[:, :0], x, values, mask, 0b1011, 2, 4))
    for call in calls:
        with pytest.raises(RuntimeError, match="the sparse factor has 1073741828 columns"):
            call()
