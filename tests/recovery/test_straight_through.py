"""Learning which factors to use: what the dense weight's gradient is, what changes when, and what is left afterwards."""
import copy
import json
import math
import sys

import pytest
import torch
from torch.nn.functional import linear

import lowfat
from lowfat.errors import ArgumentError, NumericsError
from lowfat.progress import tensors_digest
from lowfat.recovery import straight_through
from lowfat.recovery.shadow import NAME, Shadows
from lowfat.structures import Dictionary, LowRank, Sparse24, Structure
from tiny_text import classifier, rows, tokenizer

NOTHING = 1e-60  # a learning rate that changes no weight, nor a zero


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def digest(model):
    return tensors_digest(model.state_dict().items())


def run(model, data=None, **changes):
    options = {"tokenizer": tokenizer(), "batch_size": 4, "max_length": 12, "autocast": False, "steps": 10, "every": 3}
    return straight_through(model, rows(10) if data is None else data, **options | changes)


def shadowed(n=6, k=5, rank=2, factorize=None, dtype=torch.float64):
    """(layer, its dense weight, the shadows)"""
    torch.manual_seed(0)
    weight = torch.randn(n, k, dtype=dtype)
    layer = LowRank.from_dense(weight, torch.randn(n, dtype=dtype), rank=rank)
    again = factorize or (lambda name, layer, weight: LowRank.from_dense(weight, rank=rank))
    return layer, weight, Shadows({"layer": layer}, {"layer": torch.nn.Parameter(weight.clone())}, again)


# --- one layer ---

@pytest.mark.parametrize("shape", [(4, 5), (5,), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_the_shadow_weight_learns_as_a_dense_one_would(shape, blend):
    """Its gradient is dy^T x whatever the blend; those of x and of the factors are of what was computed."""
    layer, weight, shadows = shadowed()
    shadows.blend = blend
    x, dy = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(*shape[:-1], 6, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)
    mixed = (1 - blend) * layer.dense() + blend * weight
    torch.testing.assert_close(y, linear(x, mixed, layer.bias))  # fp64: torch's own bounds
    torch.testing.assert_close(x.grad, dy @ mixed)
    torch.testing.assert_close(layer.shadow.grad, dy.reshape(-1, 6).T @ x.detach().reshape(-1, 5))
    for factor in (layer.u, layer.v):
        expected, = torch.autograd.grad((x.detach() @ layer.dense().T * dy).sum() * (1 - blend), factor)
        torch.testing.assert_close(factor.grad, expected)


def test_a_frozen_shadow_weight_gets_no_gradient():
    layer, _, _ = shadowed()
    layer.shadow.requires_grad_(False)
    layer(torch.randn(3, 5, dtype=torch.float64)).sum().backward()
    assert layer.shadow.grad is None and layer.u.grad is not None


def test_autocast_computes_and_learns_in_its_dtype():
    layer, _, shadows = shadowed(dtype=torch.float32)
    shadows.blend = 0.5
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(3, 5))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.shadow.grad.dtype == torch.float32


def test_new_factors_are_those_of_the_shadow_weight_as_it_is():
    layer, weight, shadows = shadowed()
    with torch.no_grad():
        layer.shadow.add_(torch.randn(6, 5))
    moments = {layer.u: {"exp_avg": torch.ones_like(layer.u), "step": torch.tensor(7.0)},
               layer.bias: {"exp_avg": torch.ones_like(layer.bias)}}
    bias = layer.bias.detach().clone()
    error = shadows.refactorize(moments)
    expected = LowRank.from_dense(layer.shadow.detach(), rank=2)
    assert torch.equal(layer.u, expected.u) and torch.equal(layer.v, expected.v)
    assert torch.equal(layer.bias, bias) and moments[layer.bias]["exp_avg"].all()
    assert not moments[layer.u]["exp_avg"].any() and moments[layer.u]["step"] == 0
    assert error == pytest.approx(((expected.dense() - layer.shadow).norm() / layer.shadow.norm()).item())


def test_pull_is_the_gradient_of_the_squared_distance():
    layer, _, shadows = shadowed()
    layer.shadow.grad = torch.zeros_like(layer.shadow)
    shadows.pull(0.25)
    expected, = torch.autograd.grad(0.25 * (layer.shadow - layer.dense().detach()).square().sum(), layer.shadow)
    torch.testing.assert_close(layer.shadow.grad, expected)


def test_removed_shadows_leave_the_layer_as_it_was():
    layer, _, shadows = shadowed()
    shadows.remove()
    assert not hasattr(layer, NAME) and not layer._forward_hooks and list(layer.state_dict()) == ["v", "u", "bias"]


# --- a model ---

@pytest.mark.parametrize("change", [{}, {"method": "monarch", "arguments": {"blocks": 2}}, {"method": "whitened"},
                                    {"freeze": 0.0}, {"layers": ["*.query"]}, {"every": 1}, {"method": "magnitude"}])
def test_rates_of_nothing_change_nothing(change):
    """Factors of an unchanged weight are the same factors: the method is a projection."""
    model = classifier()
    other = copy.deepcopy(model)
    report = run(model, learning_rate=NOTHING, shadow_rate=NOTHING, **change)
    method, arguments, layers = change.get("method", "svd"), change.get("arguments", {}), change.get("layers")
    stats = None
    if method == "whitened":
        from lowfat.data import batches

        found = batches(rows(10), tokenizer(), "classification", batch_size=4, max_length=12)
        stats = lowfat.calibrate(other, found, layers=layers, fisher=False)
    plan = lowfat.plan(other, method=method, ratio=0.5, stats=stats, layers=layers, arguments=arguments)
    expected = lowfat.factorize(other, plan, stats)
    assert digest(model) == digest(other)
    assert report.factorized.ratio == expected.ratio and not model.training


def test_what_is_learned_when():
    model = classifier()
    seen = []
    report = run(model, steps=10, every=3, freeze=0.2,
                 on_progress=lambda step, steps, what: seen.append((step, steps, what.partition(",")[0])))
    assert [entry["step"] for entry in report.refactorized] == [3, 6, 8]  # the last that is learned in is step 8
    assert all(0 < entry["error"] < 1 for entry in report.refactorized)
    assert seen == [(step, 10, "learning the factors" if step <= 8 else "training") for step in range(1, 11)]
    assert report.steps == 10 and [entry["step"] for entry in report.losses] == list(range(1, 11))
    layers = [module for module in model.modules() if isinstance(module, Structure)]
    assert layers and not any(hasattr(layer, NAME) or layer._forward_hooks for layer in layers)
    json.dumps(report.to_json())


def test_the_outputs_of_the_dense_model_fade_out(monkeypatch):
    """With the first step, before any update, the model is still the dense one; from the end of the fade on it is not."""
    blends = []
    hook = Shadows._hook

    def watched(self, layer, inputs, y):
        blends.append(self.blend)
        return hook(self, layer, inputs, y)

    monkeypatch.setattr(Shadows, "_hook", watched)
    run(classifier(), steps=10, fade=0.4, freeze=0.2, layers=["bert.encoder.layer.0.attention.self.query"])
    assert blends == [max(0.0, 1 - step / 4) ** 3 for step in range(8)]


def test_dense_and_factor_rates_are_their_own():
    """A dense weight that does not move leaves nothing of what the factors learned at the end of the learning."""
    model = classifier()
    before, other = copy.deepcopy(model), copy.deepcopy(model)
    key = other.bert.encoder.layer[0].attention.self.key.weight.clone()
    run(model, shadow_rate=NOTHING, freeze=0.0, learning_rate=1e-2, layers=["*.query"])
    plan = lowfat.plan(before, method="svd", ratio=0.5, layers=["*.query"])
    lowfat.factorize(before, plan)
    ours, theirs = model.bert.encoder.layer[0].attention.self, before.bert.encoder.layer[0].attention.self
    assert torch.equal(ours.query.v, theirs.query.v) and not torch.equal(ours.query.bias, theirs.query.bias)
    assert not torch.equal(ours.key.weight, theirs.key.weight)
    run(other, learning_rate=NOTHING, freeze=0.0, shadow_rate=1e-2, layers=["*.query"])
    assert not torch.equal(other.bert.encoder.layer[0].attention.self.query.v, theirs.query.v)
    assert torch.equal(other.bert.encoder.layer[0].attention.self.key.weight, key)


def test_frozen_layers_stay():
    model = classifier()
    model.bert.encoder.layer[0].attention.self.query.requires_grad_(False)
    other = copy.deepcopy(model)
    run(model)
    lowfat.factorize(other, lowfat.plan(other, method="svd", ratio=0.5))
    ours, theirs = model.bert.encoder.layer[0].attention.self.query, other.bert.encoder.layer[0].attention.self.query
    assert torch.equal(ours.v, theirs.v) and torch.equal(ours.u, theirs.u) and not ours.u.requires_grad


def test_half_precision_stays_half_precision():
    model = classifier().bfloat16()
    run(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_blocks_run_as_one_call_again():
    model = classifier()
    report = run(model)
    assert report.factorized.blocks.grouped
    hidden = torch.randn(1, 3, model.config.hidden_size)
    name = next(name for name, what in report.factorized.blocks.grouped.items() if "query" in what)
    block = model.get_submodule(name)
    from lowfat import blocks

    assert blocks._can_run(block) and block(hidden)[0].shape == hidden.shape


def test_weights_that_are_not_finite_stop_the_training_and_leave_no_shadow():
    model = classifier()
    with pytest.raises(NumericsError):
        run(model, learning_rate=1e30, shadow_rate=1e30)
    assert not any(hasattr(module, NAME) or module._forward_hooks for module in model.modules())


def test_factors_of_another_form_are_refused():
    layer, _, shadows = shadowed(factorize=lambda name, layer, weight: LowRank.from_dense(weight, rank=3))
    before = layer.u.detach().clone()
    with pytest.raises(ArgumentError, match="layer: the method made .*'rank': 3.* needs one form"):
        shadows.refactorize({})
    assert torch.equal(layer.u, before)


def test_a_model_none_of_whose_layers_was_factorized_is_refused(monkeypatch):
    monkeypatch.setattr(sys.modules["lowfat.factorize"], "residuals", lambda *_: (2.0, None))
    with pytest.raises(ArgumentError, match="no layer was factorized; .*query: no better than a weight of zeros"):
        run(classifier(), layers=["*.layer.0.attention.self.query"])


@pytest.mark.parametrize("change, message", [
    ({"fade": 1.5}, "fade is 1.5; needs 0 to 1"),
    ({"freeze": 1.0}, "freeze is 1.0; needs 0 or more, and less than 1"),
    ({"fade": 0.9}, "fade is 0.9 and freeze 0.2; together they must not exceed 1"),
    ({"pull": -1.0}, "pull is -1.0; needs a number, at least 0"),
    ({"pull": math.nan}, "pull is nan"),
    ({"steps": 1, "freeze": 0.6, "fade": 0.1}, "steps is 1; freeze 0.6 leaves none"),
    ({"every": 0}, "every is 0"), ({"shadow_rate": 0.0}, "shadow_rate is 0.0"), ({"steps": 0}, "steps is 0"),
    ({"method": "monarch", "arguments": {"grouped": True}}, "grouped: rows that share a block may be others"),
    ({"method": "sleep"}, "method must be one of"), ({"ratio": 2.0}, "ratio")])
def test_bad_arguments_are_named_before_any_work(change, message):
    model = classifier()
    before = digest(model)
    with pytest.raises(ArgumentError, match=message.replace("(", r"\(")):
        run(model, **change)
    assert digest(model) == before


def test_dsformers_dictionaries_are_followed_from_where_they_are():
    model = classifier()
    report = run(model, method="dsformer", arguments={"blocks": [1, 2], "density": 0.5}, freeze=0.0, fade=0.0)
    layers = [module for module in model.modules() if isinstance(module, Dictionary)]
    assert layers and [entry["step"] for entry in report.refactorized] == [3, 6, 9, 10]
    for layer in layers:
        layer.check_indices()
        assert int(layer.kept().sum()) == layer.values.numel()
    model.eval()
    lowfat.save(model, "out", tokenizer=tokenizer())
    assert digest(lowfat.load("out")) == digest(model)


# --- what it is for ---

def trained(layer, shadows, x, y, steps=400, every=10):
    """The loss of a layer after training towards y, its factors made anew every so many steps where there are shadows."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for step in range(steps):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if shadows is not None and step < steps // 2 and step % every == every - 1:
            shadows.refactorize(optimizer.state)
    return loss.item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [
    lambda weight: Sparse24.from_dense(weight), lambda weight: Dictionary.from_dense(weight, atoms=8, nonzeros=2)])
def test_it_learns_a_planted_support_that_a_fixed_one_cannot_fit(make, seed):
    """The target is of the form, another one than what the weight at the start is closest to."""
    torch.manual_seed(seed)
    target, start = make(torch.randn(24, 16)), torch.randn(24, 16)
    x = torch.randn(256, 16)
    y = target(x).detach()
    fixed, learned = make(start), make(start)
    shadows = Shadows({"layer": learned}, {"layer": torch.nn.Parameter(start.clone())},
                      lambda name, layer, weight: make(weight))
    assert trained(learned, shadows, x, y) < trained(fixed, None, x, y)
