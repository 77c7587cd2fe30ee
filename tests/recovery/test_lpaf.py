"""LPAF: what remains of it when its steps are switched off, what each step hands to the next, and what it is for."""
import copy
import json
import math

import pytest
import torch

import lowfat
from lowfat.data import batches
from lowfat.errors import ArgumentError, NumericsError
from lowfat.layers import factorizable
from lowfat.progress import tensors_digest
from lowfat.recovery import finetune, lpaf, mixed_rank
from lowfat.recovery.lpaf import _omega
from lowfat.recovery.movement import NAME, Movement
from lowfat.stats import Calibration, Stats
from lowfat.structures import Structure, Submatrix
from tiny_text import classifier, rows, tokenizer

NOTHING = 1e-60  # a learning rate that changes no weight, nor a zero


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def digest(model):
    return tensors_digest(model.state_dict().items())


def run(model, strategy=lpaf, data=None, **changes):
    options = {"tokenizer": tokenizer(), "batch_size": 4, "max_length": 12, "autocast": False, "steps": 10}
    return strategy(model, rows(10) if data is None else data, **options | changes)


# --- its steps, switched off ---

@pytest.mark.parametrize("change", [{"keep": 1.0}, {"prune_share": 0.0}, {"keep": 1, "weighting": "none"}])
def test_without_pruning_and_dense_branches_it_is_svd_and_fine_tuning_bit_for_bit(change):
    model = classifier()
    expected = copy.deepcopy(model)
    report = run(model, p_init=0.0, learning_rate=1e-3, **change)
    lowfat.factorize(expected, lowfat.plan(expected, method="svd", ratio=0.5))
    run(expected, finetune, learning_rate=1e-3)
    assert digest(model) == digest(expected)
    assert report.pruning == [] and [entry["step"] for entry in report.losses] == list(range(1, 11))


def test_without_pruning_it_is_mixed_rank_bit_for_bit():
    model = classifier()
    expected = copy.deepcopy(model)
    run(model, keep=1.0, learning_rate=1e-3)
    run(expected, mixed_rank, method="svd", learning_rate=1e-3)
    assert digest(model) == digest(expected)


def pruned_by_magnitude(model, keep=0.5):
    """{name: mask} of the model, which is pruned."""
    masks = {}
    for name, layer in factorizable(model).items():
        order = layer.weight.detach().abs().flatten().argsort(descending=True, stable=True)
        mask = torch.zeros(layer.weight.numel(), dtype=torch.bool)
        mask[order[:round(keep * len(mask))]] = True
        masks[name] = mask.view_as(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(masks[name])
    return masks


@pytest.mark.parametrize("weighting", ["scores", "mask", "none"])
def test_zero_order_without_learning_is_the_factorization_of_the_pruned_weights(weighting):
    model = classifier()
    other = copy.deepcopy(model)
    report = run(model, criterion="magnitude", weighting=weighting, keep=0.3, learning_rate=NOTHING)
    masks, stats = pruned_by_magnitude(other, 0.3), {}
    for name, layer in factorizable(other).items():
        found = {"scores": layer.weight.detach().abs(), "mask": masks[name].float(), "none": torch.ones_like(layer.weight)}
        omega = found[weighting] if weighting == "none" else found[weighting] + 1e-3 * found[weighting].mean()
        stats[name] = Stats(None, 0, omega.sum(0), omega.sum(1), omega, 1)
    stats = Calibration(stats)
    expected = lowfat.factorize(other, lowfat.plan(other, method="sparsity_aware", ratio=0.5, stats=stats), stats)
    assert digest(model) == digest(other) and report.factorized.ratio == expected.ratio <= 0.5


SWITCHES = [{}, {"criterion": "magnitude"}, {"criterion": "movement"}, {"weighting": "mask"}, {"weighting": "none"},
            {"p_init": 0.0}, {"consistency": 0.0}, {"train_dense": True}, {"prune_share": 0.0}, {"keep": 0.2},
            {"scope": "global"}, {"cool_down": 0.0}, {"criterion": "movement", "score_rate": 0.1}, {"arguments": {"exact": True}}, {"prune_share": 0.3}, {"until": 0.2},
            {"policy": "allocated"}]


@pytest.mark.timeout(180)  # seventeen runs
def test_every_switch_changes_what_comes_out():
    """All of them at the same number of steps, and none like another."""
    found = []
    for change in SWITCHES:
        torch.manual_seed(9)
        model = classifier()
        report = run(model, steps=6, layers=["*.layer.0.*"], learning_rate=1e-3, **change)
        assert report.steps == 6 and report.losses[-1]["step"] == 6 and report.factorized.ratio <= 0.5
        found.append(digest(model))
    assert len(set(found)) == len(SWITCHES)


def test_other_methods_read_the_pruned_model(monkeypatch):
    model = classifier()
    other = copy.deepcopy(model)
    run(model, method="whitened", criterion="magnitude", keep=0.3, learning_rate=NOTHING, calibration_rows=10)
    pruned_by_magnitude(other, 0.3)
    data = batches(rows(10), tokenizer(), "classification", batch_size=4, max_length=12)
    stats = lowfat.calibrate(other, data, fisher=False)
    lowfat.factorize(other, lowfat.plan(other, method="whitened", ratio=0.5, stats=stats), stats)
    assert digest(model) == digest(other)


# --- pruning ---

def test_as_many_weights_stay_as_asked_for_when_they_are_factorized(monkeypatch):
    seen, apply = {}, Movement.apply

    def watched(self):
        assert all(hasattr(layer, NAME) and layer.score.any() for layer in self.layers.values())
        apply(self)
        seen.update({name: (layer.weight.count_nonzero().item(), layer.weight.numel()) for name, layer in self.layers.items()})

    monkeypatch.setattr(Movement, "apply", watched)
    report = run(classifier(), steps=20, keep=0.2, prune_share=0.5, warmup=0.2, cool_down=0.3)
    assert len(seen) == 12 and all(count == round(0.2 * size) for count, size in seen.values())
    kept = [entry["kept"] for entry in report.pruning]
    assert [entry["step"] for entry in report.pruning] == list(range(1, 11))
    assert kept[:3] == [1.0, 1.0, 1.0] and kept == sorted(kept, reverse=True) and kept[7:] == [0.2] * 3
    assert kept[4] == pytest.approx(0.2 + 0.8 * (1 - 2 / 5) ** 3)  # step 5 begins at 4, of the two to seven that it falls in


def test_the_last_masks_are_of_the_last_scores(monkeypatch):
    """A schedule that falls until the end has not arrived at its last step."""
    seen, apply = [], Movement.apply
    monkeypatch.setattr(Movement, "apply", lambda self: (seen.extend(
        int(mask.sum()) == round(0.2 * mask.numel()) for mask in self.masks().values()), apply(self)))
    run(classifier(), keep=0.2, cool_down=0.0, layers=["*.layer.0.*"])
    assert len(seen) == 6 and all(seen)


def test_the_share_that_stays_is_the_ratio_unless_told():
    assert run(classifier(), ratio=0.4).pruning[-1]["kept"] == 0.4
    assert run(classifier(), ratio=0.4, keep=0.1).pruning[-1]["kept"] == 0.1


def test_scores_learn_at_a_rate_of_their_own(monkeypatch):
    seen, apply = {}, Movement.apply
    monkeypatch.setattr(Movement, "apply", lambda self: (seen.update(
        {name: layer.score.detach().abs().max().item() for name, layer in self.layers.items()}), apply(self)))
    run(classifier(), criterion="movement", learning_rate=NOTHING, score_rate=0.25)
    # Adam's steps are about the rate each; the first of five has a rate of 0, and the last one falls towards it
    assert all(0.05 < largest < 4 * 0.25 * 1.1 for largest in seen.values())


def test_what_weighs_in_the_factorization():
    score, mask = torch.tensor([[2.0, -1.0], [0.5, 0.0]]), torch.tensor([[True, True], [False, False]])
    torch.testing.assert_close(_omega(score, mask, "scores"), torch.tensor([[2.0, 0], [0, 0]]) + 1e-3 * 2 / 4)
    assert torch.equal(_omega(score, mask, "mask"), mask + 1e-3 / 2)
    assert torch.equal(_omega(score, mask, "none"), torch.ones(2, 2))


def test_moments_of_what_stays_go_on(monkeypatch):
    """Biases and embeddings keep their moments from one phase to the next; factors start without."""
    import sys

    module, seen = sys.modules["lowfat.recovery.mixed_rank"], {}
    train_phase = module.train_phase
    monkeypatch.setattr(module, "train_phase", lambda *args, moments, **options: (
        seen.update(moments), train_phase(*args, moments=moments, **options))[1])
    run(classifier())
    assert "optimizer.student.classifier.weight.exp_avg" in seen
    assert seen["optimizer.student.classifier.weight.step"] == 5


# --- what is left ---

def test_nothing_but_factors_is_left():
    model = classifier()
    seen = []
    report = run(model, steps=10, on_progress=lambda step, steps, what: seen.append((step, steps, what.partition(",")[0])))
    assert seen == [(step, 10, "pruning" if step <= 5 else "training") for step in range(1, 11)]
    assert not any("score" in name or "full" in name for name in model.state_dict())
    for module in model.modules():
        assert "forward" not in vars(module)
    assert sum(isinstance(module, Structure) for module in model.modules()) == 12 and not model.training
    json.dumps(report.to_json())


def test_empty_columns_are_left_out_and_saved(tmp_path):
    model = classifier()
    with torch.no_grad():
        for layer in factorizable(model).values():
            layer.weight[:, ::2] = 0
    report = run(model, criterion="magnitude", keep=0.4, learning_rate=NOTHING, out=tmp_path / "out")
    assert any(layer.structure == "Submatrix" for layer in report.factorized.layers)
    again = lowfat.load(tmp_path / "out")
    assert digest(again) == digest(model) and any(isinstance(module, Submatrix) for module in again.modules())


def test_conv1d_language_model_and_half_precision(tiny_gpt2):
    text = [{"text": "the red cat sees a bird"}] * 4
    run(tiny_gpt2.bfloat16(), data=text, steps=6, max_length=8)
    assert {parameter.dtype for parameter in tiny_gpt2.parameters()} == {torch.bfloat16}


def test_embeddings_follow_a_teacher():
    report = run(classifier().bert, data=[{"text": row["text"]} for row in rows(8)], teacher=classifier().bert, steps=6)
    assert report.task == "embedding" and all(math.isfinite(entry["loss"]) for entry in report.losses)


def test_training_that_diverges_leaves_no_score():
    model = classifier()
    with pytest.raises(NumericsError):
        run(model, learning_rate=1e30)
    assert not any(hasattr(module, NAME) or "forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("change, message", [
    ({"prune_share": 1.0}, "prune_share is 1.0; needs 0 or more, and less than 1"),
    ({"prune_share": -0.1}, "prune_share is -0.1"), ({"prune_share": math.nan}, "prune_share is nan"),
    ({"steps": 1, "prune_share": 0.4}, "steps is 1; prune_share 0.4 leaves none to prune in"),
    ({"steps": 2, "prune_share": 0.9}, "steps is 2; prune_share 0.9 leaves none to train the factors in"),
    ({"prune_share": 0.0, "keep": 0.3}, "keep is 0.3 and prune_share 0; pruning needs steps"),
    ({"keep": 0.0}, "keep is 0.0; needs a number above 0, at most 1"), ({"keep": 1.5}, "keep is 1.5"),
    ({"weighting": "size"}, "weighting is 'size'; needs one of scores, mask, none"),
    ({"scope": "model"}, "scope is 'model'; needs one of matrix, global"),
    ({"score_rate": 0.0}, "score_rate is 0.0; needs a number above 0"),
    ({"warmup": 0.8, "cool_down": 0.3}, "warmup is 0.8 and cool_down 0.3; together they must not exceed 1"),
    ({"warmup": -0.1}, "warmup is -0.1; needs 0 to 1"), ({"cool_down": 1.5}, "cool_down is 1.5"),
    ({"p_init": 2.0}, "p_init is 2.0"), ({"until": 2.0}, "until is 2.0"), ({"consistency": -1.0}, "consistency is -1.0"),
    ({"steps": 0}, "steps is 0"), ({"method": "sleep"}, "method must be one of"), ({"ratio": 0.0}, "ratio must be"),
    ({"arguments": {"side": "in"}}, "sparsity_aware has no argument 'side'; it has exact, drop"),
    ({"data": [{"text": "the cat"}]}, 'no "label"'), ({"out": "missing/out"}, "does not exist")])
def test_bad_arguments_are_named_before_any_work(change, message):
    model = classifier()
    before = digest(model)
    with pytest.raises(ArgumentError, match=message):
        run(model, **change)
    assert digest(model) == before


# --- what it is for ---

def ranks_after_pruning(seed, keep=0.05):
    """Numerical ranks of a layer pruned by each criterion, as many steps, as many weights left.

    Of its inputs a third varies in the task, and of its outputs a third matters: the others learn nothing."""
    found = []
    for criterion in ("movement", "sensitivity", "magnitude"):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(24, 24, bias=False)
        torch.nn.init.normal_(layer.weight)
        target = layer.weight.detach()[:8, :8] + torch.randn(8, 8)
        movement = Movement({"layer": layer}, criterion=criterion)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        for step in range(40):
            x = torch.zeros(64, 24)
            x[:, :8] = torch.randn(64, 8)
            optimizer.zero_grad()
            (layer(x)[:, :8] - x[:, :8] @ target.T).square().mean().backward()
            optimizer.step()
            movement.collect(step)
        movement.keep = keep
        movement.apply()
        found.append(int(torch.linalg.matrix_rank(layer.weight.detach())))
    return found


def test_first_order_leaves_lower_ranks_than_magnitude():
    ranks = [ranks_after_pruning(seed) for seed in range(10)]
    assert all(max(movement, sensitivity) < magnitude for movement, sensitivity, magnitude in ranks)
