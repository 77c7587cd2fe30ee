"""Spectra: the numbers of matrices whose singular values are known, factorized layers, and what is refused."""
import copy
import math

import pytest
import torch
from torch import nn

from lowfat.errors import ArgumentError, NumericsError
from lowfat.factorize import factorize
from lowfat.layers import replace
from lowfat.plan import plan
from lowfat.show import show_spectra
from lowfat.spectra import draw, kind, spectra
from lowfat.structures import LowRank, LowRankSparse


def known(n, k, values):
    """A layer whose weight has these singular values.   weight [n, k]"""
    u, v = torch.linalg.qr(torch.randn(n, len(values)))[0], torch.linalg.qr(torch.randn(k, len(values)))[0]
    layer = nn.Linear(k, n)
    layer.weight.data = (u * torch.tensor(values)) @ v.T
    return layer


def blocks(*layers):
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(layer) for layer in layers)
    return model


@pytest.mark.parametrize("n, k", [(5, 9), (9, 5), (4, 4)])
def test_singular_values_energy_and_ranks(n, k):
    # 64, 16, 9, 1 of 90: 71.1 %, 88.9 %, 98.9 %, 100 %
    one, = spectra(blocks(known(n, k, [8.0, 4.0, 3.0, 1.0])))
    due = torch.zeros(min(n, k), dtype=torch.float64)
    due[:4] = torch.tensor([64.0, 16.0, 9.0, 1.0])
    # the weight is rounded to fp32: a singular value moves by at most ||W|| 2^-24 sqrt(n k), its square by 2 sigma_1 of it
    bound = 2 * 8 * math.sqrt(90) * 2**-24 * math.sqrt(n * k) * 8
    assert (one.squares - due).abs().max() <= bound
    assert (one.in_features, one.out_features, one.rank, one.parameters) == (k, n, None, n * k)
    assert [one.rank_for(share) for share in (0.7, 0.72, 0.88, 0.9, 0.999)] == [1, 2, 2, 3, 4]
    rank = one.break_even  # the last that saves something
    assert rank * (n + k) < n * k <= (rank + 1) * (n + k)


def test_a_weight_of_zeros():
    layer = nn.Linear(6, 4)
    nn.init.zeros_(layer.weight)
    one, = spectra(blocks(layer))
    assert one.energy_ranks() == [1, 1, 1] and one.squares.sum() == 0


def test_before_and_after(tiny_gpt2):
    # Conv1D stores weights transposed: kills an error taken between a weight and its transpose
    dense = copy.deepcopy(tiny_gpt2)
    report = factorize(tiny_gpt2, plan(tiny_gpt2, method="svd", ratio=0.5))
    found = {one.name: one for one in spectra(tiny_gpt2, base=dense)}
    assert list(found) == [layer.name for layer in report.layers]
    for layer in report.layers:
        assert found[layer.name].rank == layer.rank and found[layer.name].parameters == layer.parameters
        # the same differences; here fp32 norms, off by at most half a rounding for each square summed, above and below
        terms = layer.dense_parameters + 4  # and the root, twice, the division, the last rounding
        assert abs(found[layer.name].error - layer.error) <= terms * 2**-24 * layer.error
        assert found[layer.name].rank_for(1 - 1e-9) <= layer.rank


def test_dense_and_factorized_layers_in_the_order_of_the_model(tiny_bert):
    name = "bert.encoder.layer.1.attention.self.key"
    weight = tiny_bert.get_submodule(name).weight.data
    replace(tiny_bert, name, LowRank.from_dense(weight, rank=3))
    found = spectra(tiny_bert)
    names = [layer for layer, _ in tiny_bert.named_modules()]
    assert [one.name for one in found] == sorted((one.name for one in found), key=names.index) and len(found) == 12
    assert [one.rank for one in found if one.name == name] == [3]
    assert [one.name for one in spectra(tiny_bert, layers=["*.key"])] == [name.replace("1", "0"), name]


def test_refusals(tiny_bert, tiny_llama):
    with pytest.raises(ArgumentError, match="base: it has no layer .*query of 32 inputs and 32 outputs"):
        spectra(tiny_bert, base=tiny_llama)
    with pytest.raises(ArgumentError, match="matches no linear layer"):
        spectra(tiny_bert, layers=["nothing"])
    with pytest.raises(ArgumentError, match="nothing to factorize"):
        spectra(nn.Sequential(nn.ReLU()))
    tiny_bert.bert.encoder.layer[0].output.dense.weight.data[0, 0] = torch.inf
    with pytest.raises(NumericsError, match=r"layer.0.output.dense: .* in 1 of"):
        spectra(tiny_bert)


@pytest.mark.parametrize("count", [1, 7, 13])
def test_the_picture_has_a_panel_for_each_kind(tmp_path, count):
    found = [one for one in spectra(blocks(*(nn.Linear(8, 6) for _ in range(count))))]
    for number, one in enumerate(found):
        one.name = f"blocks.0.kind{number}"
    draw(found, tmp_path / "spectra.png", title="random")
    assert (tmp_path / "spectra.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_kinds():
    assert kind("bert.encoder.layer.11.attention.self.query") == "attention.self.query"
    assert kind("model.layers.0.mlp.experts.3.up") == "up" and kind("lm_head") == "lm_head"


def test_rank_zero_is_a_rank(capsys):
    """Of a layer whose weight is its sparse part alone."""
    model = blocks(LowRankSparse(9, 5, rank=0, density=0.5), nn.Linear(9, 5))
    found = spectra(model)
    assert [one.rank for one in found] == [0, None] and found[0].parameters == 22
    show_spectra(found, {}, model, None)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "9" in line]
    assert [row[row.index("9") + 1] for row in rows if "9" in row] == ["0", "dense"]
