"""update(): against least squares over all tokens at once, layer after layer, and never to a worse layer."""
import copy
import json
import sys

import pytest
import torch
from torch import nn

import lowfat
from lowfat.calibrate import calibrate
from lowfat.errors import ArgumentError, NumericsError, ShapeError, UnsupportedError
from lowfat.layers import dense_weight, factorizable, replace
from lowfat.structures import LowRank, LowRankPivoted, Sparse24, structures

EPS = torch.finfo(torch.float64).eps


class Chain(nn.Module):
    """Two layers with a tanh in between, in blocks: blocks.0.0 and blocks.1.0."""

    def __init__(self, k=10, middle=12, n=9):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(k, middle)), nn.Sequential(nn.Linear(middle, n))])
        self.double()

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x).tanh())


FIRST, SECOND = "blocks.0.0", "blocks.1.0"


def chain(rank=3, kind=LowRank):
    """(a chain of low-rank layers, the dense chain, batches, their rows in one)"""
    dense = Chain().eval()
    model = copy.deepcopy(dense)
    for name, module in factorizable(model).items():
        replace(model, name, kind.from_dense(dense_weight(module), module.bias, rank=rank))
    spread = torch.randn(10, 10, dtype=torch.float64) * torch.logspace(0, -1, 10, dtype=torch.float64)
    x = torch.randn(120, 10, dtype=torch.float64) @ spread
    return model, dense, [{"x": part} for part in x.split(25)], x


def weight_of(model, name):
    return model.get_submodule(name).dense().detach()


def fitted(x, target, v):
    """u of the least squares ||target - x v^T u^T||."""
    return torch.linalg.lstsq(x @ v.mT, target).solution.mT


# --- what is solved ---

@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_u_is_the_least_squares_fit_on_the_inputs_of_the_updated_model(share):
    """By hand over all rows at once: the second layer reads what the updated first one gives it."""
    model, dense, batches, x = chain()
    v = {name: model.get_submodule(name).v.detach().clone() for name in (FIRST, SECOND)}
    before = copy.deepcopy(model)
    report = lowfat.update(model, dense, batches, solve="u", dense_share=share, ridge=0.0)
    bias = {name: dense.get_submodule(name).bias.detach() for name in (FIRST, SECOND)}
    u = fitted(x, x @ dense.blocks[0][0].weight.detach().mT, v[FIRST])
    assert (weight_of(model, FIRST) - u @ v[FIRST]).norm() <= 1e5 * EPS * u.norm() * v[FIRST].norm()
    ours = (x @ weight_of(model, FIRST).mT + bias[FIRST]).tanh()
    theirs = (x @ dense.blocks[0][0].weight.detach().mT + bias[FIRST]).tanh()
    stale = (x @ weight_of(before, FIRST).mT + bias[FIRST]).tanh()
    w = dense.blocks[1][0].weight.detach()
    u = fitted(ours, (1 - share) * ours @ w.mT + share * theirs @ w.mT, v[SECOND])
    assert (weight_of(model, SECOND) - u @ v[SECOND]).norm() <= 1e5 * EPS * u.norm() * v[SECOND].norm()
    other = fitted(stale, (1 - share) * stale @ w.mT + share * theirs @ w.mT, v[SECOND])
    assert (u - other).norm() > 1e-3 * u.norm()  # what the inputs before the first update would have given
    assert list(report.layers) == [FIRST, SECOND] and all(layer.kept for layer in report.layers.values())
    assert {layer.tokens for layer in report.layers.values()} == {120}


def test_one_step_of_each_is_the_papers():
    """U = Y X^T V^T (V X X^T V^T)^-1, then V = U^+ (Y X^T + e W) (X X^T + e I)^-1, here with e in both: one objective."""
    model, dense, batches, x = chain()
    v = model.get_submodule(FIRST).v.detach().clone()
    w = dense.blocks[0][0].weight.detach()
    lowfat.update(model, dense, batches, layers=[FIRST], ridge=1e-3)
    c = x.mT @ x
    e = 1e-3 * c.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    y = w @ c  # on the first layer's inputs both models agree: Y X^T = W X X^T for every share
    best = (y + w @ e) @ torch.linalg.inv(c + e)
    u = best @ (c + e) @ v.mT @ torch.linalg.inv(v @ (c + e) @ v.mT)
    wanted = u @ torch.linalg.pinv(u) @ best
    assert (weight_of(model, FIRST) - wanted).norm() <= 1e5 * EPS * wanted.norm()


def test_the_better_the_solver_the_smaller_the_error_and_the_best_is_the_whitened_svd():
    errors = []
    for solve in ("u", "uv", "svd"):
        model, dense, batches, x = chain()
        torch.manual_seed(1)
        model.blocks[0][0].v.data += 0.3 * torch.randn_like(model.blocks[0][0].v)
        report = lowfat.update(model, dense, batches, layers=[FIRST], solve=solve, ridge=0.0)
        errors.append(report.layers[FIRST].error)
        assert report.layers[FIRST].error < report.layers[FIRST].error_before
        gap = (x @ (weight_of(model, FIRST) - dense.blocks[0][0].weight.detach()).mT).norm()
        total = (x @ dense.blocks[0][0].weight.detach().mT).norm()
        assert report.layers[FIRST].error == pytest.approx(float(gap / total), rel=1e-9)  # measured over the rows
    assert errors[0] > errors[1] > errors[2]
    stats = lowfat.Stats(x.mT @ x, len(x))
    from lowfat.methods import METHODS
    best = METHODS["whitened"].factorize(dense.blocks[0][0].weight.detach(), None, stats, rank=3)[0].dense()
    assert (weight_of(model, FIRST) - best).norm() <= 1e-5 * best.norm()  # its damping, 1e-6


def test_of_full_rank_nothing_is_changed_but_rounding():
    model, dense, batches, x = chain(rank=9)
    for name in (FIRST, SECOND):
        layer = dense.get_submodule(name)
        replace(model, name, LowRank.from_dense(layer.weight.detach(), layer.bias, rank=min(layer.weight.shape)))
    report = lowfat.update(model, dense, batches)
    for name in (FIRST, SECOND):
        w = dense.get_submodule(name).weight
        assert (weight_of(model, name) - w).norm() <= 1e6 * EPS * w.norm()
        assert report.layers[name].error <= 1e6 * EPS


def test_a_bias_that_training_has_moved_is_made_up_for():
    model, dense, batches, x = chain()
    layer = model.get_submodule(FIRST)
    layer.bias.data += torch.randn(12, dtype=torch.float64)
    v = layer.v.detach().clone()
    lowfat.update(model, dense, batches, layers=[FIRST], solve="u", ridge=0.0)
    target = dense.blocks[0](x).detach() - layer.bias.detach()
    u = fitted(x, target, v)
    assert (weight_of(model, FIRST) - u @ v).norm() <= 1e5 * EPS * u.norm() * v.norm()


def test_padding_is_left_out(tiny_bert):
    dense = copy.deepcopy(tiny_bert.double())
    lowfat.factorize(tiny_bert, lowfat.plan(tiny_bert, method="svd", ratio=0.5))
    other = copy.deepcopy(tiny_bert)
    ids = torch.randint(1, 97, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [5], [3]])).long()
    padded = [{"input_ids": ids * mask, "attention_mask": mask}]
    single = [{"input_ids": ids[row:row + 1, :length]} for row, length in enumerate((9, 5, 3))]
    for model, batches in ((tiny_bert, padded), (other, single)):
        report = lowfat.update(model, dense, batches)
        assert {layer.tokens for layer in report.layers.values()} == {17}
    for (name, a), (_, b) in zip(structures(tiny_bert), structures(other)):
        assert (a.dense() - b.dense()).norm() <= 1e-8 * a.dense().norm(), name


def test_a_layer_that_is_called_twice_counts_both_calls():
    class Twice(Chain):
        def forward(self, x):
            return self.blocks[0](self.blocks[0](x).tanh())

    dense = Twice(8, 8, 8).eval()
    model = copy.deepcopy(dense)
    module = dense.blocks[0][0]
    replace(model, FIRST, LowRank.from_dense(module.weight.detach(), module.bias, rank=3))
    x = torch.randn(40, 8, dtype=torch.float64)
    rows = torch.cat([x, model.blocks[0](x).tanh()]).detach()
    v = model.blocks[0][0].v.detach().clone()
    report = lowfat.update(model, dense, [{"x": x}], layers=[FIRST], solve="u", dense_share=0.0, ridge=0.0)
    u = fitted(rows, rows @ module.weight.detach().mT, v)
    assert report.layers[FIRST].tokens == 80
    assert (weight_of(model, FIRST) - u @ v).norm() <= 1e5 * EPS * u.norm() * v.norm()


# --- what stays ---

def test_layers_that_share_v_keep_it(tiny_bert):
    batches = [{"input_ids": torch.randint(0, 97, (4, 12))} for _ in range(4)]
    dense = copy.deepcopy(tiny_bert)
    stats = calibrate(tiny_bert, batches)
    lowfat.factorize(tiny_bert, lowfat.plan(tiny_bert, method="whitened", ratio=0.5, share=2, stats=stats), stats)
    layers = dict(structures(tiny_bert))
    v = {name: layer.v.detach().clone() for name, layer in layers.items()}
    owners = {id(layer.v) for layer in layers.values()}
    report = lowfat.update(tiny_bert, dense, batches)
    assert len(owners) < len(layers) and owners == {id(layer.v) for _, layer in structures(tiny_bert)}
    assert all(torch.equal(layer.v, v[name]) for name, layer in layers.items())
    assert sum(layer.kept for layer in report.layers.values()) >= len(layers) // 2


def test_pivoted_layers_stay_pivoted_and_end_at_the_same_weights():
    model, dense, batches, _ = chain()
    pivoted = copy.deepcopy(model)
    lowfat.pivot(pivoted)
    for one in (model, pivoted):
        lowfat.update(one, dense, batches)
    for name in (FIRST, SECOND):
        assert type(pivoted.get_submodule(name)) is LowRankPivoted
        assert (weight_of(model, name) - weight_of(pivoted, name)).norm() <= 1e7 * EPS * weight_of(model, name).norm()


def test_worse_factors_are_not_taken(monkeypatch):
    model, dense, batches, x = chain()
    module, was = sys.modules["lowfat.update"], {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with monkeypatch.context() as patch:  # a solver whose factors make the zero map
        patch.setattr(module, "_solved", lambda layer, *_: (LowRank.of(layer.v * 0, layer.u), []))
        layer = lowfat.update(model, dense, batches, layers=[FIRST], solve="u").layers[FIRST]
    assert not layer.kept and layer.error == layer.error_before and layer.reason == "the factors are as good already"
    assert all(torch.equal(tensor, was[name]) for name, tensor in model.state_dict().items())
    report = lowfat.update(model, dense, [{"x": torch.zeros(3, 10, dtype=torch.float64)}], layers=[FIRST])
    assert not report.layers[FIRST].kept and report.layers[FIRST].reason == "its inputs are zero"


def test_modes_gradients_and_hooks_are_as_before(tiny_bert):
    dense = copy.deepcopy(tiny_bert)
    lowfat.factorize(tiny_bert, lowfat.plan(tiny_bert, method="svd", ratio=0.5))
    tiny_bert.train()
    frozen = next(tiny_bert.parameters()).requires_grad_(False)
    seen = []
    batches = [{"input_ids": torch.randint(0, 97, (2, 8))}]
    lowfat.update(tiny_bert, dense, batches, on_progress=lambda *step: seen.append(step))
    assert all(module.training for module in tiny_bert.modules()) and not dense.training
    assert not frozen.requires_grad and all(p.requires_grad for p in tiny_bert.parameters() if p is not frozen)
    assert not any(module._forward_pre_hooks for module in (*tiny_bert.modules(), *dense.modules()))
    names = [name for name, _ in structures(tiny_bert)]
    assert [step[0] for step in seen] == list(range(1, len(names) + 1)) and {step[2] for step in seen} == set(names)


@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
def test_a_model_comes_closer_to_the_dense_one_and_is_saved(request, fixture, tmp_path):
    model = request.getfixturevalue(fixture)
    for module in factorizable(model).values():
        module.weight.data *= 8  # at their first scale the layers hardly change what passes by them
    dense = copy.deepcopy(model)
    batches = [{"input_ids": torch.randint(0, 97, (4, 12))} for _ in range(8)]
    stats = calibrate(model, batches)
    lowfat.factorize(model, lowfat.plan(model, method="whitened", ratio=0.4, stats=stats), stats)

    def gap():
        with torch.no_grad():
            return sum((model(**batch).logits - dense(**batch).logits).square().sum() for batch in batches)

    before = gap()
    report = lowfat.update(model, dense, batches, dense_share=1.0)
    assert gap() < before
    json.dumps(report.to_json(), allow_nan=False)
    assert set(report.layers) == {name for name, _ in structures(model)}
    lowfat.save(model, tmp_path / "out")
    loaded = lowfat.load(tmp_path / "out")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


# --- refusals ---

@pytest.mark.parametrize("changes, says", [
    ({"solve": "v"}, "solve must be one of u, uv, svd; found 'v'"),
    ({"dense_share": 1.5}, "dense_share must be a number from 0 to 1; found 1.5"),
    ({"dense_share": True}, "dense_share must be"), ({"ridge": -1}, "ridge must be a number, at least 0; found -1"),
    ({"ridge": float("nan")}, "ridge must be"), ({"layers": "blocks"}, "layers must be a list of name patterns"),
    ({"layers": ["nothing*"]}, r"layers: 'nothing\*' matches no low-rank layer; there are blocks.0.0, blocks.1.0"),
])
def test_options_that_cannot_be_are_refused(changes, says):
    model, dense, batches, _ = chain()
    with pytest.raises(ArgumentError, match=says):
        lowfat.update(model, dense, batches, **changes)


def test_dense_models_that_do_not_fit_are_refused_before_any_change():
    model, dense, batches, _ = chain()
    was = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bare = Chain()
    bare.blocks[1][0].bias = None
    broken = Chain()
    broken.blocks[1][0].weight.data[2, 3] = float("inf")
    for other, error, says in ((Chain(10, 11), ShapeError, "blocks.0.0 has 10 inputs and 11 outputs, in the model they are"),
                               (nn.Linear(2, 2), ArgumentError, "dense: has no blocks.0.0; it must be the model"),
                               (model, ArgumentError, "dense is the model itself"), (bare, ArgumentError, "1.0 has no bias"),
                               (copy.deepcopy(model), ArgumentError, "blocks.0.0 is a LowRank, must be a linear layer"),
                               (broken, NumericsError, "blocks.1.0: the weight holds NaN or infinity")):
        with pytest.raises(error, match=says):
            lowfat.update(model, other, batches)
    with pytest.raises(ArgumentError, match="has no low-rank layer; factorize"):
        lowfat.update(dense, Chain(), batches)
    with pytest.raises(ArgumentError, match="batches: empty"):
        lowfat.update(model, dense, [])
    with pytest.raises(NumericsError, match="blocks.0.0: its inputs hold NaN"):
        lowfat.update(model, dense, [{"x": torch.full((3, 10), float("nan"), dtype=torch.float64)}])
    assert all(torch.equal(tensor, was[name]) for name, tensor in model.state_dict().items())


def test_other_structures_are_left_alone():
    model, dense, batches, _ = chain()
    replace(model, SECOND, Sparse24.from_dense(dense.blocks[1][0].weight.detach(), dense.blocks[1][0].bias))
    assert list(lowfat.update(model, dense, batches).layers) == [FIRST]


def test_a_dense_model_that_reads_other_tokens_is_refused():
    class Half(Chain):
        def forward(self, x):
            return super().forward(x[::2])

    model, dense, batches, _ = chain()
    other = Half()
    other.load_state_dict(dense.state_dict())
    with pytest.raises(UnsupportedError, match=r"blocks.0.0 reads \[25, 10\] in the model and \[13, 10\] in the dense one"):
        lowfat.update(model, other, batches)
