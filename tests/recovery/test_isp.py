"""Iterative structured pruning: what a unit is worth, how many go when, and that the result is smaller and opens again."""
import copy
import json

import pytest
import torch

import lowfat
from lowfat.errors import ArgumentError, NumericsError, UnsupportedError
from lowfat.job import open_model
from lowfat.progress import tensors_digest
from lowfat.recovery import finetune, isp
from lowfat.recovery.choosing import best, even
from lowfat.recovery.structured import Importance, UnitScales
from lowfat.shrink import dense_size, recorded, removable, shrink
from tiny_text import classifier, rows, tokenizer


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def digest(model):
    return tensors_digest(model.state_dict().items())


def run(model, data=None, **changes):
    options = {"tokenizer": tokenizer(), "batch_size": 4, "max_length": 12, "autocast": False, "steps": 10, "rounds": 2}
    return isp(model, rows(10) if data is None else data, **options | changes)


def loss_of(model):
    torch.manual_seed(4)
    ids = torch.randint(5, 31, (3, 9))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids if hasattr(model, "lm_head") else
                 torch.tensor([0, 1, 1])).loss


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
def test_importance_is_the_slope_of_the_loss(name, request):
    """As the layer that reads the units has it, the sum of W dL/dW over a unit's columns, but for fp32 roundings; passes add
    up, and what else learns does not feel it."""
    model = request.getfixturevalue(name)
    units = removable(model)
    loss_of(model).backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    importance = Importance(model, units)
    loss_of(model).backward()
    assert all(torch.equal(parameter.grad, plain[name]) for name, parameter in model.named_parameters())
    importance.collect()
    found = importance.values()
    loss_of(model).backward()
    importance.collect()
    assert importance.values() == {name: [2 * value for value in values] for name, values in found.items()}
    for name, one in units.items():
        weight, grad = model.get_parameter(f"{one.writer}.weight"), plain[f"{one.writer}.weight"]
        product = weight.detach() * grad
        if type(model.get_submodule(one.writer)) is not torch.nn.Linear:  # Conv1D stores [k, n]
            product = product.T
        slopes = product.sum(0)[one.columns].sum(1).abs()
        torch.testing.assert_close(torch.tensor(found[name]), slopes, atol=2**-20 * product.abs().sum().item(), rtol=2**-12)
    importance.remove()
    assert not any(model.get_submodule(one.writer)._forward_pre_hooks for one in units.values())


def test_a_factor_of_zero_is_a_unit_that_is_gone(tiny_gpt2):
    units = removable(tiny_gpt2)
    kept = {name: list(range(one.count))[1:] for name, one in units.items()}
    factors = {name: (torch.arange(one.count) > 0).float() for name, one in units.items()}
    scales = UnitScales(tiny_gpt2, units, factors.__getitem__)
    expected = loss_of(tiny_gpt2)
    scales.remove()
    shrink(tiny_gpt2, kept)
    torch.testing.assert_close(loss_of(tiny_gpt2), expected)


def test_the_best_parts_fill_a_budget():
    values = {"a": [5.0, 1.0, 3.0], "b": [2.0, 4.0]}
    assert best(values, {"a": 1, "b": 10}, 13) == {"a": [0, 1, 2], "b": [1]}
    assert best(values, {"a": 1, "b": 1}, 3) == {"a": [0, 2], "b": [1]}
    assert best(values, {"a": 1, "b": 1}, 0) == {"a": [0], "b": [1]}
    assert best(values, {"a": 1, "b": 1}, 9, {"a": 2, "b": 1}) == {"a": [0, 2], "b": [1]}
    assert best({"a": [1.0] * 3, "b": [1.0] * 3}, {"a": 1, "b": 1}, 4) == {"a": [0, 1], "b": [0, 1]}
    assert even(values, {"a": 2, "b": 0}) == {"a": [0, 2], "b": [1]}


@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_the_budget_is_met_as_stored(tmp_path, ratio):
    model = classifier()
    units = removable(model)
    dense, unit = dense_size(units), max(one.cost for one in units.values())
    report = run(model, ratio=ratio, out=tmp_path / "out")
    again = lowfat.load(tmp_path / "out")
    assert digest(again) == digest(model) and recorded(again) == recorded(model)
    stored = sum(layer.weight.numel() for layer in lowfat.layers.factorizable(again).values())
    assert stored == report.ratio * dense and ratio * dense - unit < stored <= ratio * dense
    assert {name: now for name, (_, now) in report.units.items()} == {
        name: one.count for name, one in removable(again).items()}
    assert [entry["step"] for entry in report.shares] == [3, 6]  # (10 - 3) // 2 steps a round, and four at the end
    assert report.shares[0]["share"] > report.shares[1]["share"] == report.ratio and json.dumps(report.to_json())
    assert [entry["step"] for entry in report.losses] == list(range(1, 11))
    lowfat.evaluate(again, rows(4), tokenizer())


def test_units_that_do_nothing_go_first():
    """Half of the neurons of one block, and a head of the other, hand on nothing."""
    model = classifier()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, ::2] = 0
        model.bert.encoder.layer[1].attention.output.dense.weight[:, 16:] = 0
    before = copy.deepcopy(model)
    run(model, steps=2, rounds=1, ratio=0.75, final_share=0.5, learning_rate=1e-60)
    left = {name: one.count for name, one in removable(model).items()}
    assert left == {"bert.encoder.layer.0.attention.self": 2, "bert.encoder.layer.0.intermediate": 24,
                    "bert.encoder.layer.1.attention.self": 1, "bert.encoder.layer.1.intermediate": 48}
    assert torch.equal(model.bert.encoder.layer[0].intermediate.dense.weight,
                       before.bert.encoder.layer[0].intermediate.dense.weight[1::2])


def test_the_same_share_of_every_block_opens_without_lowfat(tiny_llama, tmp_path):
    report = run(tiny_llama, [{"text": "the red cat sees a bird"}] * 8, policy="per_block", ratio=0.5, max_length=7,
                 out=tmp_path / "out")
    assert report.ratio <= 0.5 and {tuple(pair) for pair in report.units.values()} == {(2, 1), (48, 24)}
    assert (tmp_path / "out" / "model.safetensors").exists()
    again = type(tiny_llama).from_pretrained(tmp_path / "out")
    assert digest(again) == digest(tiny_llama)


def test_rounds_without_pruning_are_plain_training(monkeypatch):
    """One round, and nothing goes at its end: finetune() of as many steps, at a constant rate, bit for bit."""
    import sys
    from functools import partial

    from lowfat.recovery.training import Phase

    model = classifier()
    plain, same = copy.deepcopy(model), {"steps": 4, "learning_rate": 1e-3}
    monkeypatch.setattr(sys.modules["lowfat.recovery.isp"], "shrink", lambda model, kept: {})
    run(model, rounds=1, final_share=0.0, **same)
    monkeypatch.setattr(sys.modules["lowfat.recovery.finetune"], "Phase", partial(Phase, schedule="constant_with_warmup"))
    finetune(plain, rows(10), tokenizer=tokenizer(), batch_size=4, max_length=12, autocast=False, **same)
    assert digest(model) == digest(plain)


def test_moments_follow_the_weights(monkeypatch):
    """After a round the optimizer goes on with what is left of its moments."""
    from lowfat.recovery import phases

    seen, original = [], phases.train_phase

    def train_phase(objective, *arguments, moments, **options):
        shapes = {f"optimizer.student.{name}.exp_avg": parameter.shape
                  for name, parameter in objective.student.named_parameters()}
        seen.append((len(moments), all(moments[name].shape == shape for name, shape in shapes.items()) if moments else None))
        return original(objective, *arguments, moments=moments, **options)

    monkeypatch.setattr(phases, "train_phase", train_phase)
    run(classifier(), ratio=0.4)
    assert [fits for _, fits in seen] == [None, True, True]


@pytest.mark.parametrize("change, message", [
    ({"final_share": 1.0}, "final_share is 1.0"), ({"rounds": 0}, "rounds is 0"), ({"steps": 2, "rounds": 3}, "need more"),
    ({"policy": "allocated"}, "one of pooled, per_block; found 'allocated'"), ({"ratio": 1.0}, "ratio must be"),
    ({"ratio": True}, "ratio must be"), ({"ratio": 0.1}, "one head or neuron of every block is 0.295"),
    ({"task": "poetry"}, "task is 'poetry'"), ({"learning_rate": 0}, "learning_rate"),
    ({"policy": "per_block", "ratio": 0.4}, "ratio is 0.4; of the 2 units of .* that leaves none"),
])
def test_bad_arguments_are_named_before_any_work(change, message):
    model = classifier()
    before = digest(model)
    with pytest.raises(ArgumentError, match=message):
        run(model, **change)
    assert digest(model) == before


def test_training_that_diverges_leaves_no_hook():
    model = classifier()
    with pytest.raises(NumericsError) as kept:  # with its traceback, which holds what the rounds had opened
        run(model, learning_rate=1e30)
    assert kept.tb and not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_what_comes_out_goes_on(tmp_path):
    """A model with blocks of different sizes is opened, trained, given learned ranks, and saved again."""
    run(classifier(), out=tmp_path / "out", ratio=0.6)
    model, tok = open_model(tmp_path / "out")
    sizes = recorded(model)
    same = {"tokenizer": tok, "steps": 2, "batch_size": 4, "max_length": 12, "autocast": False}
    finetune(model, rows(8), out=tmp_path / "again", **same)
    again = lowfat.load(tmp_path / "again")
    assert sizes and recorded(again) == sizes and digest(again) == digest(model)
    lowfat.learned_ranks(model, rows(8), ratio=0.5, out=tmp_path / "ranks", **same)
    ranks = lowfat.load(tmp_path / "ranks")
    assert recorded(ranks) == sizes and digest(ranks) == digest(model) != digest(again)


def test_a_factorized_model_is_refused():
    model = classifier()
    lowfat.factorize(model, lowfat.plan(model, method="svd", ratio=0.5))
    with pytest.raises(UnsupportedError, match="query is a LowRank; shrink the model before"):
        run(model)


def test_a_model_without_known_blocks_is_refused():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    model = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=32, dim=32, n_layers=1, n_heads=2,
                                                                 hidden_dim=48))
    with pytest.raises(ArgumentError, match="no block whose heads or neurons are known"):
        run(model)
