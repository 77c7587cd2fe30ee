"""Mixed ranks: which branch computes, how often, what the loss is made of, and what is left afterwards."""
import copy
import json
import math
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

import lowfat
from lowfat.data import batches
from lowfat.errors import ArgumentError, DeviceError, NumericsError
from lowfat.layers import factorizable
from lowfat.progress import tensors_digest
from lowfat.recovery import finetune, mixed_rank, theseus
from lowfat.recovery.branches import NAME, Branches, probability
from lowfat.recovery.mixed_rank import MixedObjective
from lowfat.recovery.staged import stages_of
from lowfat.structures import LowRank, Structure
from tiny_text import classifier, rows, tokenizer

NOTHING = 1e-60  # a learning rate that changes no weight, nor a zero


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def digest(model):
    return tensors_digest(model.state_dict().items())


def run(strategy, model, data=None, **changes):
    options = {"tokenizer": tokenizer(), "batch_size": 4, "max_length": 12, "autocast": False, "steps": 10}
    return strategy(model, rows(10) if data is None else data, **options | changes)


def svd_ft(model, **changes):
    lowfat.factorize(model, lowfat.plan(model, method="svd", ratio=0.5))
    run(finetune, model, **changes)
    return model


def a_batch(data=None):
    return batches(data or rows(6), tokenizer(), "classification", batch_size=len(data or rows(6)), max_length=12)[0]


def branched(p, learn=False, by="matrix"):
    """(model with branches, as it was before, the branches)"""
    dense = classifier().eval()
    model = copy.deepcopy(dense)
    names = list(factorizable(model))
    weights = {name: model.get_submodule(name).weight.detach() for name in names}
    groups = stages_of(model, None, by).values()
    lowfat.factorize(model, lowfat.plan(model, method="svd", ratio=0.5))
    branches = Branches({name: model.get_submodule(name) for name in names}, weights, groups, learn=learn)
    branches.p = p
    return model.eval(), dense, branches


# --- branches ---

def test_the_dense_branch_everywhere_is_the_dense_model_bit_for_bit():
    model, dense, branches = branched(1.0)
    factors = copy.deepcopy(model)
    branches.draw()
    with torch.no_grad():
        assert torch.equal(model(**a_batch()).logits, dense(**a_batch()).logits)
        branches.remove()
        assert not torch.equal(model(**a_batch()).logits, dense(**a_batch()).logits)
    assert digest(model) == digest(factors)  # a frozen weight is not even part of the state


def test_one_branch_computes_and_learns():
    torch.manual_seed(0)
    weight, other = torch.randn(6, 5).double(), torch.randn(6, 5).double()
    layers = {name: LowRank.from_dense(other, torch.randn(6).double(), rank=2) for name in "ab"}
    branches = Branches(layers, {"a": weight, "b": weight}, [["a"], ["b"]], learn=True)
    branches.p, x = 0.5, torch.randn(4, 5).double()
    branches._is_dense = {"a": True, "b": False}
    a, b = layers["a"], layers["b"]
    assert torch.equal(a(x), linear(x, weight, a.bias)) and torch.equal(b(x), LowRank.forward(b, x))
    (a(x).sum() + b(x).sum()).backward()
    assert a.full.grad is not None and a.u.grad is None and b.full.grad is None and b.u.grad is not None
    torch.testing.assert_close(a.full.grad, x.sum(0).expand(6, 5))
    branches.remove()
    assert list(a.state_dict()) == ["v", "u", "bias"] and "forward" not in vars(a)


def test_how_often_the_dense_branch_is_drawn():
    """The mean over z of (1 - z) A B x + z W x is that of the two at p; draws of the matrices are independent."""
    model, _, branches = branched(0.3)
    names, draws = list(branches.layers), []
    for _ in range(2000):
        branches.draw()
        draws.append([branches._is_dense[name] for name in names])
    draws = torch.tensor(draws).double()
    bound = 5 * math.sqrt(0.3 * 0.7 / 2000)  # standard errors
    assert (draws.mean(0) - 0.3).abs().max() < bound
    together = (draws.T @ draws / 2000 - 0.09)[~torch.eye(len(names), dtype=torch.bool)]
    assert together.abs().max() < 5 * math.sqrt(0.09 * 0.91 / 2000)
    layer, x = branches.layers[names[0]], torch.randn(3, 32)
    dense, factors = linear(x, layer.full, layer.bias), LowRank.forward(layer, x)
    found = sum(layer(x) for _ in map(lambda _: branches.draw(), range(2000))) / 2000
    assert (found - (0.3 * dense + 0.7 * factors)).abs().max() <= bound * (dense - factors).abs().max() + 1e-4


def test_layers_of_a_block_are_drawn_together():
    model, _, branches = branched(0.5, by="block")
    assert len(branches.groups) == 2 and sorted(sum(branches.groups, [])) == sorted(branches.layers)
    seen = set()
    for _ in range(40):
        branches.draw()
        each = [{branches._is_dense[name] for name in group} for group in branches.groups]
        assert all(len(found) == 1 for found in each)
        seen.add(tuple(found.pop() for found in each))
    assert len(seen) == 4


def test_schedules():
    assert [probability(step, 0.5, 4, "linear") for step in range(6)] == [0.5, 0.375, 0.25, 0.125, 0, 0]
    assert [probability(step, 0.5, 4, "constant") for step in range(6)] == [0.5] * 4 + [0, 0]
    assert probability(0, 0.5, 0, "linear") == 0


# --- the loss ---

@pytest.mark.parametrize("consistency", [0.0, 0.7])
def test_the_loss_is_of_two_passes_and_how_far_they_are_apart(consistency):
    model, _, branches = branched(0.5)
    model.double()
    objective = MixedObjective(model, "classification", teacher=None, temperature=1, alpha=0, autocast=False,
                               consistency=consistency)
    objective.branches = branches
    batch = a_batch()
    torch.manual_seed(3)
    found = objective(**batch)["loss"]
    torch.manual_seed(3)
    inputs, answers = {name: value for name, value in batch.items() if name != "labels"}, []
    for _ in range(2 if consistency else 1):
        branches.draw()
        answers.append(model(**inputs).logits.float())
    expected = sum(cross_entropy(one, batch["labels"]) for one in answers) / len(answers)
    if consistency:
        a, b = (one.double().softmax(-1) for one in answers)
        assert not torch.equal(a, b)
        expected = expected + consistency * ((a * (a / b).log()).sum(-1) + (b * (b / a).log()).sum(-1)).mean() / 2
    assert abs(found - expected) < 2**-20 * (1 + expected)  # a few fp32 roundings
    branches.p = 0
    assert torch.equal(objective(**batch)["loss"], cross_entropy(model(**inputs).logits.float(), batch["labels"]))


@pytest.mark.parametrize("task", ["lm", "embedding"])
def test_consistency_of_other_tasks(task, tiny_llama):
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    objective = MixedObjective(tiny_llama, task, teacher=None, temperature=1, alpha=0, autocast=False, consistency=1.0,
                               pooling="mean")
    one, other = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    if task == "embedding":
        one, other = one[:, 0], other[:, 0]
        expected = (1 - torch.cosine_similarity(one, other)).mean()
    else:
        a, b = one.softmax(-1), other.softmax(-1)
        expected = (((a - b) * (a / b).log()).sum(-1) / 2)[mask.bool()].mean()  # what is padded does not count
    objective._answers = [one, other]
    torch.testing.assert_close(objective._disagreement(mask), expected)
    objective._answers = [one, one]
    assert objective._disagreement(mask).abs() < 1e-6


# --- a model ---

@pytest.mark.parametrize("strategy, change", [
    (mixed_rank, {"p_init": 0.0}), (mixed_rank, {"until": 0.0}), (mixed_rank, {"p_init": 0.0, "train_dense": True}),
    (theseus, {"replaced": 1.0}), (theseus, {"until": 0.0})])
def test_no_dense_branch_is_plain_fine_tuning_bit_for_bit(strategy, change):
    model = classifier()
    expected = svd_ft(copy.deepcopy(model))
    report = run(strategy, model, **change)
    assert digest(model) == digest(expected) and report.factorized.ratio <= 0.5


@pytest.mark.parametrize("strategy", [mixed_rank, theseus])
def test_dense_branches_change_what_is_learned_and_leave_nothing(strategy):
    model = classifier()
    expected = svd_ft(copy.deepcopy(model), learning_rate=1e-3)
    seen = []
    report = run(strategy, model, learning_rate=1e-3, on_progress=lambda step, steps, what: seen.append((step, steps)))
    assert digest(model) != digest(expected) and model.state_dict().keys() == expected.state_dict().keys()
    assert seen == [(step, 10) for step in range(1, 11)] and [entry["step"] for entry in report.losses] == list(range(1, 11))
    layers = [module for module in model.modules() if isinstance(module, Structure)]
    assert len(layers) == 12 and not any(hasattr(layer, NAME) or "forward" in vars(layer) for layer in layers)
    assert not model.training and report.factorized.blocks.grouped
    json.dumps(report.to_json())


def test_two_passes_until_the_dense_weights_are_gone(monkeypatch):
    seen = []
    compared = MixedObjective._compared

    def watched(self, batch):
        seen.append(self.branches.p)
        return compared(self, batch)

    monkeypatch.setattr(MixedObjective, "_compared", watched)
    run(mixed_rank, classifier(), p_init=0.4, until=0.5, steps=8)
    assert seen == [p for p in (0.4, 0.30000000000000004, 0.2, 0.1) for _ in range(2)] + [0.0] * 4
    seen.clear()
    run(theseus, classifier(), replaced=0.5, until=0.5, steps=8, schedule="constant")
    assert seen == [0.5] * 4 + [0.0] * 4  # one pass each


def test_frozen_dense_weights_stay_and_trained_ones_move(monkeypatch):
    seen = {}
    remove = Branches.remove

    def watched(self):
        seen.update({name: layer.full.detach().clone() for name, layer in self.layers.items()})
        remove(self)

    monkeypatch.setattr(Branches, "remove", watched)
    for train_dense in (False, True):
        model = classifier()
        before = {name: layer.weight.detach().clone() for name, layer in factorizable(model).items()}
        run(mixed_rank, model, train_dense=train_dense, learning_rate=1e-3, p_init=1.0)
        assert {torch.equal(before[name], seen[name]) for name in before} == {not train_dense}


def test_a_pass_without_anything_that_learns_changes_nothing(tiny_llama):
    """Without biases, and with all else frozen, dense branches learn nothing."""
    model, name = tiny_llama.requires_grad_(False), "model.layers.0.self_attn.q_proj"
    model.get_submodule(name).weight.requires_grad_(True)
    expected = copy.deepcopy(model)
    lowfat.factorize(expected, lowfat.plan(expected, method="svd", ratio=0.5, layers=[name]))
    text = [{"text": "the red cat sees a bird"}] * 4
    run(mixed_rank, model, text, layers=[name], p_init=1.0, until=1.0, schedule="constant", learning_rate=1e-2, steps=3)
    assert digest(model) == digest(expected)


def test_frozen_layers_have_frozen_branches(monkeypatch):
    seen, remove = {}, Branches.remove
    monkeypatch.setattr(Branches, "remove", lambda self: (seen.update(
        {name: layer.full.requires_grad for name, layer in self.layers.items()}), remove(self)))
    model = classifier()
    name = "bert.encoder.layer.0.attention.self.query"
    model.get_submodule(name).weight.requires_grad_(False)
    run(mixed_rank, model, train_dense=True)
    assert [one for one, learns in seen.items() if not learns] == [name]


def test_conv1d_language_model_and_half_precision(tiny_gpt2):
    text = [{"text": "the red cat sees a bird"}] * 4
    run(mixed_rank, tiny_gpt2.bfloat16(), text, steps=4, max_length=8)
    assert {parameter.dtype for parameter in tiny_gpt2.parameters()} == {torch.bfloat16}
    assert any(isinstance(module, LowRank) for module in tiny_gpt2.modules())


def test_embeddings_follow_a_teacher():
    model, teacher = classifier().bert, classifier().bert
    report = run(mixed_rank, model, [{"text": row["text"]} for row in rows(8)], teacher=teacher, steps=4)
    assert report.task == "embedding" and all(math.isfinite(entry["loss"]) for entry in report.losses)


def test_other_structures_too():
    model = classifier()
    run(theseus, model, method="monarch", arguments={"blocks": 2}, steps=4)
    run(mixed_rank, classifier(), method="fwsvd", steps=4, calibration_rows=8)


def test_training_that_diverges_leaves_no_branch():
    model = classifier()
    with pytest.raises(NumericsError):
        run(mixed_rank, model, learning_rate=1e30)
    assert not any(hasattr(module, NAME) or "forward" in vars(module) for module in model.modules())


BAD = [(mixed_rank, {"p_init": 1.5}, "p_init is 1.5; needs 0 to 1"), (mixed_rank, {"until": -0.1}, "until is -0.1; needs 0 to 1"),
       (mixed_rank, {"until": 1.1}, "until is 1.1"), (mixed_rank, {"p_init": math.nan}, "p_init is nan"),
       (mixed_rank, {"consistency": -1.0}, "consistency is -1.0; needs a number, at least 0"),
       (mixed_rank, {"consistency": math.inf}, "consistency is inf"),
       (mixed_rank, {"schedule": "cosine"}, "schedule is 'cosine'; needs one of linear, constant"),
       (theseus, {"replaced": 2.0}, "replaced is 2.0; needs 0 to 1"), (theseus, {"schedule": "log"}, "schedule is 'log'"),
       (mixed_rank, {"steps": 0}, "steps is 0"), (mixed_rank, {"method": "sleep"}, "method must be one of"),
       (mixed_rank, {"ratio": 2.0}, "ratio must be between 0 and 1"), (mixed_rank, {"data": []}, "no rows"),
       (mixed_rank, {"data": [{"text": "the cat"}]}, 'no "label"'), (theseus, {"layers": ["none"]}, "'none' matches no")]


@pytest.mark.parametrize("strategy, change, message", BAD)
def test_bad_arguments_are_named_before_any_work(strategy, change, message):
    model = classifier()
    before = digest(model)
    with pytest.raises(ArgumentError, match=message):
        run(strategy, model, **change)
    assert digest(model) == before


@pytest.mark.parametrize("strategy", [mixed_rank, lowfat.lpaf])
def test_a_pass_that_cannot_be_repeated_is_refused(strategy):
    """Checkpointing computes a pass again in its backward, when the branches are those of the second pass."""
    model = classifier()
    model.gradient_checkpointing_enable()
    with pytest.raises(ArgumentError, match="gradient checkpointing cannot repeat a pass with its branches"):
        run(strategy, model)
    other = classifier()
    other.load_state_dict(model.state_dict())
    for one in (model, other):  # one pass at a time has the branches that it had
        run(strategy, one, consistency=0.0, steps=6, learning_rate=1e-3)
    assert digest(model) == digest(other)


def test_a_teacher_that_does_not_fit_is_named():
    model, other = classifier(), tokenizer()
    other.add_tokens(["elephant"])
    check = partial(run, mixed_rank, model)
    with pytest.raises(ArgumentError, match="teacher is the model"):
        check(teacher=model)
    with pytest.raises(ArgumentError, match="teacher_tokenizer has another vocabulary"):
        check(teacher=classifier(), teacher_tokenizer=other)
    with pytest.raises(DeviceError, match="teacher is on meta"):
        check(teacher=classifier().to("meta"))
    teacher = classifier()
    teacher.config.num_labels = 3
    with pytest.raises(ArgumentError, match="teacher has the labels"):
        check(teacher=teacher)
