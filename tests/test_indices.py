"""T-index at load: every index tensor of a checkpoint that its layer cannot use is refused, by the name of the layer."""
import pytest
import torch

from lowfat import checkpoint
from lowfat.errors import FormatError, IndexRangeError
from lowfat.layers import dense_weight, factorizable, replace
from lowfat.structures import Dictionary, LowRankSparse, Monarch, Sparse24, Submatrix

SIZES = {"atoms": 10, "nonzeros": 4, "blocks": (1, 2)}
LAYERS = {  # by the buffer that holds the indices
    "2:4 mask": lambda weight, bias: Sparse24.from_dense(weight, bias),
    "bitmap": lambda weight, bias: Dictionary.from_dense(weight, bias, **SIZES, format="bitmap"),
    "positions": lambda weight, bias: Dictionary.from_dense(weight, bias, **SIZES, format="positions"),
    "rows": lambda weight, bias: Monarch.from_dense(weight, bias, blocks=2, rank=4, rows=torch.arange(len(weight)).flip(0)),
    "starts": lambda weight, bias: LowRankSparse.from_dense(weight, bias, rank=2, density=0.3),
    "columns": lambda weight, bias: LowRankSparse.from_dense(weight, bias, rank=2, density=0.3),
    "drawn columns": lambda weight, bias: LowRankSparse(weight.shape[1], weight.shape[0], rank=2, density=0.3, seed=3),
    "inputs": lambda weight, bias: Submatrix.from_dense(weight, bias, rank=4),
    "outputs": lambda weight, bias: Submatrix.from_dense(weight, bias, rank=4),
}
BUFFERS = {"2:4 mask": "mask", "bitmap": "mask", "positions": "positions", "rows": "rows", "starts": "starts",
           "columns": "columns", "drawn columns": "columns", "inputs": "inputs", "outputs": "outputs"}


def first(number):
    def of(t):
        t = t.clone()
        t.view(-1)[0] = number
        return t

    return of


def of_all(number):
    return lambda t: torch.full_like(t, number)


def repeated(t):
    t = t.clone()
    t.view(-1)[1] = t.view(-1)[0]
    return t


def last(more):
    def of(t):
        t = t.clone()
        t[-1] += more
        return t

    return of


def of_one_row(change):
    """Of two columns that follow each other in a row."""
    def of(t):
        t, place = t.clone(), int((t.diff() > 0).nonzero()[0])
        t[place:place + 2] = change(t[place:place + 2])
        return t

    return of


def moved_on(t):
    """An entry one place to the right, where none is: as good a support as the right one."""
    t = t.clone()
    t[int((t.diff() > 1).nonzero()[0])] += 1
    return t


VALUES = {  # numbers that are wrong in every format
    "-1": first(-1), "smallest": lambda t: first(torch.iinfo(t.dtype).min)(t),
    "largest": lambda t: first(torch.iinfo(t.dtype).max)(t),
    "all -1": of_all(-1), "all smallest": lambda t: of_all(torch.iinfo(t.dtype).min)(t),
    "all largest": lambda t: of_all(torch.iinfo(t.dtype).max)(t), "all zero": of_all(0), "all one": of_all(1),
    "doubled": lambda t: t * 2 + 1, "n": lambda t: of_all(max(t.shape))(t),
    "n + 1": lambda t: of_all(max(t.shape) + 1)(t),
    "shifted": lambda t: t + 1 if t.dim() == 1 or t.dtype == torch.int16 else t << 1 | t,
}
KINDS = {  # tensors that are no such index
    "int64": lambda t: t.long(), "2^40": lambda t: t.long() + 2**40, "float": lambda t: t.float(), "bool": lambda t: t > 0,
    "int8": lambda t: t.to(torch.int8),
    "other width": lambda t: t.to(torch.int16 if t.dtype == torch.int32 else torch.int32),
    "shorter": lambda t: t[:-1], "longer": lambda t: torch.cat([t, t[:1]]), "empty": lambda t: t[:0],
    "another dimension": lambda t: t[None], "transposed or folded": lambda t: t.T if t.dim() == 2 else t[:, None],
}
ONLY = {  # what a format may not say, though others may
    "positions": {"negative": lambda t: -1 - t, "twice": repeated, "unsorted": lambda t: t.flip(1),
                  "of one block": lambda t: t.sort(1).values,
                  "a": first(10), "a + 1": first(11)},
    "rows": {"negative": lambda t: -1 - t, "twice": repeated,
             "past the end": lambda t: t.clone().index_fill_(0, torch.tensor([0]), 2**20)},
    "bitmap": {"padding": lambda t: t | 1 << 10, "sign": lambda t: t | torch.tensor(-2**31, dtype=torch.int32),
               "a bit more": lambda t: first(1023)(t), "a bit less": lambda t: t & (t - 1), "swapped": lambda t: ~t},
    "2:4 mask": {"a bit less": lambda t: t & (t - 1), "all": of_all(-1), "inverted": lambda t: t ^ 1,
                 "another group": lambda t: t ^ 17},
    "starts": {"negative": lambda t: -1 - t, "falling": lambda t: t.flip(0), "a row behind": lambda t: t.roll(1),
               "past the end": last(1), "before the end": last(-1), "counts": lambda t: t.diff(prepend=t[:1])},
    "columns": {"negative": lambda t: -1 - t, "twice": of_one_row(lambda t: t[:1].expand(2)),
                "unsorted": of_one_row(lambda t: t.flip(0)), "falling": lambda t: t.flip(0), "k": first(48),
                "k + 1": first(49)},
    "drawn columns": {"negative": lambda t: -1 - t, "one place on": moved_on,
                      "of another seed": lambda t: LowRankSparse(32, 32, rank=2, density=0.3, seed=4).columns},
    "inputs": {"negative": lambda t: -1 - t, "twice": repeated, "falling": lambda t: t.flip(0), "past the end": last(1)},
    "outputs": {"negative": lambda t: -1 - t, "twice": repeated, "falling": lambda t: t.flip(0), "past the end": last(1)},
}
CASES = [(format, name, change, error) for format in LAYERS
         for table, error in ((VALUES, IndexRangeError), (KINDS, FormatError), (ONLY[format], IndexRangeError))
         for name, change in table.items()]


@pytest.mark.parametrize("format, change, error", [pytest.param(f, c, e, id=f"{f}-{n}") for f, n, c, e in CASES])
def test_bad_indices_are_refused_at_load(format, change, error, tiny_bert, tmp_path):
    name, module = list(factorizable(tiny_bert).items())[3]
    layer = LAYERS[format](dense_weight(module), module.bias)
    replace(tiny_bert, name, layer)
    setattr(layer, BUFFERS[format], change(getattr(layer, BUFFERS[format])).contiguous())
    checkpoint.save(tiny_bert, tmp_path / "bad")
    for load in (checkpoint.load, type(tiny_bert).from_pretrained):
        with pytest.raises(error, match=name.replace(".", r"\.")):
            load(tmp_path / "bad")


@pytest.mark.parametrize("format, change", [pytest.param(f, c, id=f"{f}-{n}") for f, n, c, e in CASES
                                            if e is IndexRangeError])
def test_bad_indices_are_refused_by_load_state_dict(format, change):
    weight, bias = torch.randn(32, 32), torch.randn(32)
    good, bad = (LAYERS[format](weight, bias) for _ in range(2))
    setattr(bad, BUFFERS[format], change(getattr(bad, BUFFERS[format])).contiguous())
    model = torch.nn.Sequential(good)
    with pytest.raises(RuntimeError, match="0: "):
        model.load_state_dict(torch.nn.Sequential(bad).state_dict())


@pytest.mark.parametrize("format", LAYERS)
def test_twenty_of_each(format):
    assert sum(case[0] == format for case in CASES) >= 20
