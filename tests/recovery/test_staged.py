"""Staged factorization: without steps, or with one stage, it is the one-shot route bit for bit; moments; the guard."""
import copy
import json
import math

import pytest
import torch

import lowfat
from lowfat.data import batches
from lowfat.errors import ArgumentError, NumericsError
from lowfat.progress import tensors_digest
from lowfat.recovery import finetune, staged, staged_run, training_state
from lowfat.recovery.objective import Objective
from lowfat.recovery.training import Phase, in_order, prepared, ready, train_phase
from lowfat.structures import LowRank, Structure
from tiny_text import classifier, rows, tokenizer

LAYER = "bert.encoder.layer"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def digest(model):
    return tensors_digest(model.state_dict().items())


def options(**changes):
    return {"tokenizer": tokenizer(), "batch_size": 4, "max_length": 12, "autocast": False} | changes


def run(model, data=None, **changes):
    return staged(model, rows(10) if data is None else data, **options(steps=12) | changes)


def one_shot(model, data=None, method="svd", layers=None, ratio=0.5, **arguments):
    """What factorize() alone makes of the model."""
    stats = None
    if method == "whitened":
        found = batches(data or rows(10), tokenizer(), "classification", batch_size=4, max_length=12)
        stats = lowfat.calibrate(model, found, layers=layers, fisher=False)
    plan = lowfat.plan(model, method=method, ratio=ratio, stats=stats, layers=layers, arguments=arguments)
    return lowfat.factorize(model, plan, stats)


def loss_of(model, data):
    batch, = batches(data, tokenizer(), "classification", batch_size=len(data), max_length=12)
    with torch.no_grad():
        objective = Objective(model.eval(), "classification", teacher=None, temperature=1, alpha=0, autocast=False)
        return objective(**batch)["loss"].item()


def kept_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, Structure)]


# --- the same as one shot ---

@pytest.mark.parametrize("change", [
    {}, {"order": "forward"}, {"by": "matrix"}, {"order": "sensitivity"}, {"method": "monarch", "arguments": {"blocks": 2}},
    {"layers": ["*.query", "*.0.output.*"]}])
def test_without_steps_it_is_factorize(change):
    model = classifier()
    other = copy.deepcopy(model)
    report = run(model, steps=0, **change)
    expected = one_shot(other, method=change.get("method", "svd"), layers=change.get("layers"),
                        **change.get("arguments", {}))
    assert digest(model) == digest(other) and not model.training
    ours, theirs = report.factorized.to_json(), expected.to_json()
    for entry in ours["layers"] + theirs["layers"]:
        entry.pop("seconds")
    assert ours == theirs and report.losses == [] and not any(stage.steps or stage.failed for stage in report.stages)


def test_without_steps_half_precision_is_factorized_as_it_is():
    model = classifier().bfloat16()
    other = copy.deepcopy(model)
    run(model, steps=0)
    one_shot(other)
    assert digest(model) == digest(other)


@pytest.mark.parametrize("change", [{}, {"method": "whitened", "layers": [f"{LAYER}.1.*"]}])
def test_with_all_steps_at_the_end_it_is_factorize_and_finetune(change):
    """Weight-only methods read nothing that earlier stages have changed; the others only with a single stage."""
    model = classifier()
    other = copy.deepcopy(model)
    run(model, steps=7, final_share=1.0, seed=3, **change)
    one_shot(other, **change)
    finetune(other, rows(10), **options(steps=7, seed=3))
    assert digest(model) == digest(other)


def test_a_single_stage_is_factorize_and_training():
    """Nothing is left for the end, so all of it is one phase at a constant rate."""
    model = classifier()
    other = copy.deepcopy(model)
    layers = [f"{LAYER}.0.*"]
    run(model, steps=12, final_share=0.0, layers=layers, seed=2)
    one_shot(other, layers=layers)
    train_in_phases(other, [12], seed=2)
    assert digest(model) == digest(other)


def train_in_phases(model, lengths, seed):
    objective, data = prepared(model, rows(10), task=None, teacher=None, teacher_tokenizer=None, validation=None,
                               temperature=2.0, alpha=0.5, **{k: v for k, v in options().items() if k != "batch_size"})
    moments, start, total = {}, 0, sum(lengths)
    with ready(objective, tokenizer()):
        for steps in lengths:
            phase = Phase(steps, 1e-4, total, start, "constant_with_warmup")
            _, moments = train_phase(objective, in_order(data, 4 * total, seed), tokenizer(), phase, batch_size=4, seed=seed,
                                     states=None, save_every=100, on_progress=None, moments=moments)
            start += steps


# --- phases and moments ---

def test_phases_continue_order_and_moments():
    """Without dropout and warm-up, cutting a run in phases changes no bit: order, moments and step counts go on."""
    found = []
    for lengths in ([9], [4, 5], [1, 1, 7]):
        torch.manual_seed(1)
        model = classifier()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = 0.0
        for layer in model.bert.encoder.layer:
            layer.attention.self.dropout.p = 0.0
        train_in_phases(model, lengths, seed=5)
        found.append(digest(model))
    assert found[0] == found[1] == found[2]


def recorded(monkeypatch):
    """What the phases began with (as the optimizer had it) and left, copied at those moments."""
    begun, left = [], []
    original, restore = staged_run.train_phase, training_state.restore_optimizer

    def restored(model, optimizer, *arguments):
        restore(model, optimizer, *arguments)
        begun[-1] |= {name: tensor.clone() for name, tensor in training_state.moments_of(model, optimizer).items()}

    def phase(objective, examples, tok, of, **named):
        begun.append({})
        state, moments = original(objective, examples, tok, of, **named)
        left.append({name: tensor.clone() for name, tensor in moments.items()})
        return state, moments

    monkeypatch.setattr(staged_run, "train_phase", phase)
    monkeypatch.setattr(training_state, "restore_optimizer", restored)
    return begun, left


def test_moments_of_untouched_parameters_are_carried_bit_for_bit(monkeypatch):
    model = classifier()
    dense = {name for name, _ in model.named_parameters()}
    begun, left = recorded(monkeypatch)
    run(model, steps=12)
    assert len(begun) == 3 and not begun[0]
    for before, after, gone in ((left[0], begun[1], f"{LAYER}.0."), (left[1], begun[2], None)):
        missing = {name for name in before if name not in after}
        assert missing == {name for name in before
                           if gone and gone in name and ".weight." in name and "LayerNorm" not in name}
        assert len(missing) == (18 if gone else 0)  # step and two moments of six weights
        assert all(torch.equal(after[name], before[name]) for name in after) and len(after) > 100
        assert all(before[name].any() for name in after if name.endswith("exp_avg_sq") and "word" not in name)
    factors = {name for name, _ in model.named_parameters()} - dense
    assert len(factors) == 24
    # a factor counts its own steps, everything else all of them
    steps = {name.removeprefix("optimizer.student.").removesuffix(".step"): int(value)
             for name, value in left[2].items() if name.endswith(".step")}
    assert {steps[name] for name in factors if f"{LAYER}.1." in name} == {12}
    assert {steps[name] for name in factors if f"{LAYER}.0." in name} == {9}
    assert {steps[name] for name in dense & steps.keys()} == {12}


def test_a_stage_factorizes_the_weights_as_they_are_by_then(monkeypatch):
    model, seen = classifier(), []
    dense = {name: module.weight.detach().clone() for name, module in model.named_modules()
             if isinstance(module, torch.nn.Linear)}
    original = staged_run.factorize

    def factorize(student, plan, stats):
        weights = {name: student.get_submodule(name).weight.detach().clone() for name in plan}
        report = original(student, plan, stats)
        for name, choice in plan.items():
            expected, layer = LowRank.from_dense(weights[name], rank=choice.arguments["rank"]), student.get_submodule(name)
            assert torch.equal(layer.u, expected.u) and torch.equal(layer.v, expected.v)
        seen.append({name: not torch.equal(weights[name], dense[name]) for name in plan})
        return report

    monkeypatch.setattr(staged_run, "factorize", factorize)
    run(model)
    assert [set(moved.values()) for moved in seen] == [{False}, {True}]


@pytest.mark.parametrize("method", ["whitened", "fwsvd"])
def test_statistics_are_of_the_model_at_that_stage(method, monkeypatch):
    asked, model = [], classifier()
    original = lowfat.method_inputs.calibrate

    def calibrate(student, data, **named):
        asked.append((named["layers"], digest(student), len(data)))
        return original(student, data, **named)

    monkeypatch.setattr(lowfat.method_inputs, "calibrate", calibrate)
    report = run(model, method=method, calibration_rows=5)
    assert [names for names, _, _ in asked] == [None, report.stages[0].layers, report.stages[1].layers]
    assert asked[0][1] == asked[1][1] != asked[2][1] and {count for _, _, count in asked} == {2}
    assert all(layer.kept and layer.output_error is not None for layer in report.factorized.layers)


def test_it_learns_the_task_repeats_and_reports(tmp_path):
    data, found, seen = rows(32), [], []
    for seed in (0, 0, 1):
        torch.manual_seed(9)
        model = classifier()
        before = loss_of(model, data)
        torch.manual_seed(100 + len(found))  # what the caller's generators hold does not matter
        expected = torch.get_rng_state()
        report = run(model, data, steps=50, batch_size=16, learning_rate=1e-2, seed=seed, validation=data,
                     on_progress=lambda *step: seen.append(step[:2]))
        assert torch.equal(torch.get_rng_state(), expected)
        found.append(digest(model))
    assert found[0] == found[1] != found[2]
    assert loss_of(model, data) < before / 4 and report.validation["accuracy"] > 0.9
    assert [stage.name for stage in report.stages] == [f"{LAYER}.1", f"{LAYER}.0"]
    assert [stage.steps for stage in report.stages] == [12, 12] and report.steps == 50
    assert abs(report.stages[0].loss_before - before) < 2**-20 * before  # the same rows in other batches
    assert report.stages[0].loss_after == report.stages[1].loss_before
    assert [entry["step"] for entry in report.losses] == list(range(1, 51))
    assert seen[-52:] == sorted(seen[-52:]) and seen[-1] == (50, 50)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["factorized"]["ratio"] == report.factorized.ratio
    assert 0.4 < report.factorized.ratio <= 0.5 and len(kept_layers(model)) == 12 and not list(tmp_path.iterdir())
    assert sorted(report.factorized.blocks.grouped) == sorted(lowfat.group_blocks(model).grouped) and not model.training


def test_order_by_sensitivity_is_that_of_each_stage_alone():
    torch.manual_seed(4)
    model, data = classifier(), rows(12)
    with torch.no_grad():
        for module in model.bert.encoder.layer[1].modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(20)  # so that this block matters
    costs = {}
    for block in (0, 1):
        alone = copy.deepcopy(model)
        lowfat.factorize(alone, {name: choice for name, choice in lowfat.plan(alone, method="svd", ratio=0.2).items()
                                 if name.startswith(f"{LAYER}.{block}.")})
        costs[f"{LAYER}.{block}"] = loss_of(alone, data)
    report = run(model, data, order="sensitivity", ratio=0.2)
    assert [stage.name for stage in report.stages] == sorted(costs, key=costs.get)
    forward = run(classifier(), by="matrix", order="forward", steps=0)
    assert [stage.name for stage in forward.stages] == [layer.name for layer in forward.factorized.layers]


# --- the guard ---

def watched(monkeypatch, fail=()):
    """(what, steps, rate, start, digest of model and moments) of each phase; those numbered in fail end as NaN would."""
    phases, original = [], staged_run.train_phase

    def phase(objective, examples, tok, of, **named):
        phases.append((of.what.split(",")[0], of.steps, of.learning_rate, of.start,
                       digest(objective.student), tensors_digest(named["moments"].items())))
        found = original(objective, examples, tok, of, **named)
        if len(phases) in fail:
            raise NumericsError("training loss nan")
        return found

    monkeypatch.setattr(staged_run, "train_phase", phase)
    return phases


def test_the_guard_goes_back_and_tries_once_more(monkeypatch):
    phases = watched(monkeypatch)
    report = run(classifier(), steps=20, final_share=0.8, guard=1e-6)  # 2 + 2 + 16, of which 4 + 4 go to second attempts
    what, steps, rates, starts, models, moments = zip(*phases)
    assert what == ("stage 1 of 2",) * 2 + ("stage 2 of 2",) * 2 + ("training",)
    assert steps == (2, 4, 2, 4, 8) and starts == (0, 2, 6, 8, 12) and rates == (1e-4, 5e-5, 1e-4, 5e-5, 1e-4)
    assert models[0] == models[1] and models[2] == models[3] and moments[2] == moments[3] != moments[1] == moments[0]
    assert [(stage.retried, stage.failed, stage.steps) for stage in report.stages] == [(True, True, 6)] * 2
    assert "above" in report.stages[0].reason and all(layer.kept for layer in report.factorized.layers)
    assert [entry["step"] for entry in report.losses] == [3, 4, 5, 6, *range(9, 21)]


def test_a_second_attempt_takes_no_more_than_is_left(monkeypatch):
    phases = watched(monkeypatch)
    report = run(classifier(), steps=9, final_share=0.5, guard=1e-6)  # 2 + 2 + 5
    assert [phase[1] for phase in phases] == [2, 4, 2, 1]
    assert [stage.retried for stage in report.stages] == [True, True]
    phases.clear()
    report = run(classifier(), steps=4, final_share=0.0, guard=1e-6)
    assert [phase[1] for phase in phases] == [2, 2]
    assert [(stage.retried, stage.failed) for stage in report.stages] == [(False, True)] * 2


def test_a_second_attempt_that_goes_well_is_no_failure(monkeypatch):
    watched(monkeypatch, fail=[1])
    report = run(classifier())
    assert [(stage.retried, stage.failed, stage.steps) for stage in report.stages] == [(True, False, 9), (False, False, 3)]


def test_layers_stay_dense_where_the_loss_is_not_finite_twice(monkeypatch, tmp_path):
    phases = watched(monkeypatch, fail=[1, 2])
    model = classifier()
    report = run(model, steps=20, final_share=0.8, out=tmp_path / "out")
    assert phases[0][4:] == phases[1][4:] and phases[2][5] == phases[0][5]  # the moments of before
    first, second = report.stages
    assert first.failed and first.loss_after == first.loss_before and "dense" in first.reason and not second.failed
    assert all(name.startswith(f"{LAYER}.0.") for name in kept_layers(model)) and len(kept_layers(model)) == 6
    left = [layer for layer in report.factorized.layers if layer.name.startswith(f"{LAYER}.1.")]
    assert all(not layer.kept and layer.parameters == layer.dense_parameters and "failed" in layer.reason for layer in left)
    assert digest(lowfat.load(tmp_path / "out")) == digest(model)


def test_a_model_that_ends_dense_is_saved_as_it_is(monkeypatch, tmp_path):
    from lowfat.job import open_model
    watched(monkeypatch, fail=[1, 2, 3, 4])
    model = classifier()
    run(model, steps=20, final_share=0.8, out=tmp_path / "out")
    assert not kept_layers(model) and digest(open_model(tmp_path / "out")[0]) == digest(model)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_loss_next_to_nothing_may_grow():
    """A student that starts as its own teacher: any loss is more than 1.5 times nothing."""
    model = classifier().bert
    teacher = copy.deepcopy(model)
    report = run(model, teacher=teacher)
    assert report.stages[0].loss_before < 1e-6 < report.stages[0].loss_after
    assert not any(stage.retried for stage in report.stages)


def test_a_model_without_a_finite_loss_is_refused():
    model = classifier()
    with torch.no_grad():
        model.classifier.bias.fill_(math.nan)
    with pytest.raises(NumericsError, match="loss on the training rows is nan before any layer"):
        run(model)
    assert not kept_layers(model)


# --- the rest ---

def test_half_precision_trains_in_fp32_and_comes_back(tiny_llama):
    model = tiny_llama.bfloat16()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run(model, rows(8), steps=20, learning_rate=1e-3, max_length=7)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters()) and len(kept_layers(model)) == 14
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name in before)


def test_a_model_without_other_linear_layers(tiny_gpt2, tmp_path):
    """GPT-2: transposed weights, and nothing is left that could be factorized, as the head is tied to the embedding."""
    report = run(tiny_gpt2, rows(8), max_length=7, out=tmp_path / "out", steps=5)
    assert len(kept_layers(tiny_gpt2)) == 8 and len(report.stages) == 2 and "tied to" in report.factorized.skipped["lm_head"]
    assert digest(lowfat.load(tmp_path / "out")) == digest(tiny_gpt2)


@pytest.mark.parametrize("change, message", [
    ({"steps": -1}, "steps is -1"), ({"steps": 2.5}, "steps is 2.5"),
    ({"steps": 3}, "2 stages, and 0.5 of the steps after them, need 4"),
    ({"steps": 23, "by": "matrix"}, "12 stages, .* need 24"), ({"by": "layer"}, "by is 'layer'"),
    ({"order": "up"}, "order is 'up'"), ({"final_share": 1.1}, "final_share is 1.1"),
    ({"final_share": math.nan}, "final_share"), ({"guard": 0}, "guard is 0"), ({"guard": math.nan}, "guard is nan"),
    ({"method": "qr"}, "method must be"), ({"policy": "fair"}, "policy must be"), ({"ratio": 1.5}, "ratio must be"),
    ({"arguments": {"rank": 3}}, "svd has no argument 'rank'"), ({"layers": ["x.*"]}, "matches no"),
    ({"calibration_rows": 0}, "calibration_rows is 0"), ({"batch_size": 0}, "batch_size"),
    ({"learning_rate": 0}, "learning_rate"), ({"alpha": 2}, "alpha is 2"), ({"data": []}, "no rows"),
    ({"data": [{"text": "a"}]}, 'row 1 has no "label"'), ({"task": "embedding"}, "teacher is missing"),
    ({"validation": []}, "no rows"), ({"out": "missing/out"}, "does not exist"),
    ({"steps": 9, "final_share": 1 - 2**-53}, "2 stages"),
])
def test_bad_arguments_are_named_before_any_work(tmp_path, change, message):
    model = classifier()
    before = digest(model)
    with pytest.raises(ArgumentError, match=message):
        run(model, **change)
    assert digest(model) == before and not kept_layers(model) and not list(tmp_path.iterdir())


def test_fisher_needs_a_task_with_a_loss():
    model = classifier().bert
    with pytest.raises(ArgumentError, match="needs a task with a loss"):
        run(model, method="fwsvd", teacher=copy.deepcopy(model))


@pytest.mark.gpu
def test_gpu_repeats_bit_for_bit():
    found = []
    for _ in range(2):
        torch.manual_seed(9)
        model = classifier().cuda()
        run(model, autocast="auto", guard=1e-6, method="whitened")
        found.append(digest(model))
    assert found[0] == found[1]
