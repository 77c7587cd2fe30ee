"""More rows than a CPU kernel takes at once go through it slice by slice, with the bits of each slice alone."""
from math import ceil

import pytest
import torch

import gates
import lowfat
from lowfat import _native
from lowfat.ops import dictionary, low_rank, monarch, sparse24
from paths import cpu_path

pytestmark = pytest.mark.skipif(_native.library_path is None or _native.cpu_level() != "avx512_bf16",
                                reason="slices are for AVX-512")


def slices(x):
    """Each of about as many rows."""
    count = ceil(len(x) / 16)
    return x.split(ceil(len(x) / count))


def monarch_operands(dtype):
    layer = lowfat.Monarch(70, 90, blocks=(3, 4), rank=2, dtype=dtype)
    return layer.v, layer.u, layer.bias


def sparse24_operands(dtype):
    layer = lowfat.Sparse24.from_dense(torch.randn(90, 72).to(dtype), torch.randn(90).to(dtype))
    return layer.values, layer.mask, layer.bias


def dictionary_operands(dtype):
    layer = lowfat.Dictionary.from_dense(torch.randn(90, 70).to(dtype), torch.randn(90).to(dtype), atoms=25, nonzeros=9,
                                         blocks=(3, 2))
    return layer.d, layer.values, layer.support, layer.bias


OPS = {"low_rank": (low_rank, 72, lambda dtype: tuple(torch.randn(*size).to(dtype) for size in ((20, 72), (90, 20), (90,)))),
       "monarch": (lambda *a: monarch(*a, out_features=90), 70, monarch_operands),
       "sparse24": (sparse24, 72, sparse24_operands), "dictionary": (dictionary, 70, dictionary_operands)}
TRAINING = {"low_rank": torch.ops.lowfat.low_rank_training, "dictionary": torch.ops.lowfat.dictionary_training,
            "monarch": lambda *a: torch.ops.lowfat.monarch_training(*a, 90, False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [17, 31, 32, 100, 128])
@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_each_slice_alone_gives_the_same_bits(name, m, dtype):
    """At the edge of a page: kills a slice that begins or ends elsewhere, and one that reads or writes past the rows."""
    op, k, operands = OPS[name]
    x, others = torch.randn(m, k).to(dtype), [t.detach() for t in operands(dtype)]
    is_sliced = cpu_path(name, m, dtype, n=90, k=k) == "decode"
    expected = torch.cat([op(rows, *others) for rows in slices(x)])
    before = _native.calls(name, "cpu", "library")
    for end in (True, False):
        found = op(*(gates.at_guard_page(t, end=end) for t in (x, *others)))
        assert not is_sliced or torch.equal(found, expected)
    assert (_native.calls(name, "cpu", "library") == before) == is_sliced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRAINING)
@torch.no_grad()
def test_what_training_keeps_is_that_of_the_slices(name, dtype):
    op, (_, k, operands) = TRAINING[name], OPS[name]
    x, others = torch.randn(31, k).to(dtype), [t.detach() for t in operands(dtype)]
    if cpu_path(name, 31, dtype, n=90, k=k) == "decode":
        parts = zip(*(op(rows, *others) for rows in slices(x)), strict=True)
        for found, expected in zip(op(x, *others), parts, strict=True):
            assert torch.equal(found, torch.cat(expected, -2))  # the middle may have blocks before its rows
