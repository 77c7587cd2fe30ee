"""Learning the ranks: what training with gates leaves behind, and that it is what the budget allows."""
import copy
import json
import math
import sys
from functools import partial

import pytest
import torch

import lowfat
from lowfat.errors import ArgumentError
from lowfat.progress import tensors_digest
from lowfat.recovery import finetune, learned_ranks
from lowfat.recovery.learned_ranks import gated_steps
from lowfat.recovery.phases import saving_rank
from lowfat.recovery.training import Phase
from lowfat.structures import LowRank, structures
from tiny_text import classifier, rows, tokenizer

NOTHING = 1e-60  # a learning rate that changes no weight


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def digest(model):
    return tensors_digest(model.state_dict().items())


def calm():
    """A classifier without dropout, so that what gates draw moves no other random number."""
    model = classifier()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    return model


def run(model, data=None, **changes):
    options = {"tokenizer": tokenizer(), "batch_size": 4, "max_length": 12, "autocast": False, "steps": 10}
    return learned_ranks(model, rows(10) if data is None else data, **options | changes)


def stored(model):
    return sum(layer.u.numel() + layer.v.numel() for _, layer in structures(model))


def dense_size(model):
    return sum(module.weight.numel() for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and ".layer." in name)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_the_budget_is_met_as_stored(tmp_path, ratio):
    model = classifier()
    dense = dense_size(model)
    report = run(model, ratio=ratio, out=tmp_path / "out")
    again = lowfat.load(tmp_path / "out")
    assert digest(again) == digest(model) and not any("log_alpha" in name for name, _ in again.named_parameters())
    assert dense == report.factorized.dense_parameters and stored(again) == report.factorized.parameters
    assert stored(again) <= ratio * dense < stored(again) + min(layer.macs() // layer.rank for _, layer in structures(again))
    assert {layer.name: layer.rank for layer in report.factorized.layers} == {
        name: layer.rank for name, layer in structures(again)}
    for _, layer in structures(again):
        assert 1 <= layer.rank <= saving_rank(layer.in_features, layer.out_features)
    shares = report.shares
    assert shares[0]["target"] > shares[-1]["target"] == pytest.approx(ratio) and json.dumps(report.to_json())
    assert sum(entry["step"] <= 7 for entry in report.losses) == 7 and report.losses[-1]["step"] == 10


def test_ranks_differ_where_the_layers_do():
    """A layer of rank 2 keeps fewer components than its like in the next block, which the budget goes to."""
    model = classifier()
    layer = model.bert.encoder.layer[0].output.dense
    with torch.no_grad():
        layer.weight.copy_(torch.randn(32, 2) @ torch.randn(2, 48))
    report = run(model, steps=100, gate_rate=0.2, learning_rate=1e-3, ratio=0.4, final_share=0.1)
    ranks = {layer.name: layer.rank for layer in report.factorized.layers}
    assert ranks["bert.encoder.layer.0.output.dense"] < ranks["bert.encoder.layer.1.output.dense"]
    assert abs(report.shares[-1]["share"] - report.shares[-1]["target"]) < 0.15


def test_without_steps_of_gates_that_matter_it_is_truncation():
    """Gates all open that learn nothing keep the first components: what is left is the method's own truncation."""
    model = classifier()
    dense = copy.deepcopy(model)
    run(model, start=1e4, gate_rate=NOTHING, learning_rate=NOTHING, final_share=0.0, steps=2, ratio=0.5)
    for name, layer in structures(model):
        expected = LowRank.from_dense(dense.get_submodule(name).weight.detach(), rank=layer.rank).dense()
        torch.testing.assert_close(layer.dense(), expected, atol=1e-6, rtol=1e-4)  # fp32 factors of singular values near 1


def test_open_gates_are_plain_training(monkeypatch):
    """Where nothing is cut afterwards, the run is finetune() of the factorized model, bit for bit."""
    from lowfat.recovery import gates as module

    monkeypatch.setattr(module.RankGates, "cut", lambda self, model, kept: {})
    model, plain = calm(), calm()
    plain.load_state_dict(model.state_dict())
    same = {"steps": 4, "learning_rate": 1e-3}
    run(model, start=1e4, gate_rate=NOTHING, final_share=0.0, **same)
    chosen = {name: lowfat.Choice("svd", {"rank": min(layer.weight.shape)}, layer.in_features, layer.out_features)
              for name, layer in plain.named_modules() if isinstance(layer, torch.nn.Linear) and ".layer." in name}
    lowfat.factorize(plain, lowfat.Plan(chosen, ratio=0.5, policy="per_matrix"))
    # of finetune() the module: in its package the function has the name
    monkeypatch.setattr(sys.modules["lowfat.recovery.finetune"], "Phase", partial(Phase, schedule="constant_with_warmup"))
    finetune(plain, rows(10), tokenizer=tokenizer(), batch_size=4, max_length=12, autocast=False, **same)
    assert digest(model) == digest(plain)


def test_gates_train_at_their_own_rate_and_are_not_decayed():
    """In groups of parameters that are theirs alone."""
    model, seen = classifier(), []
    from lowfat.recovery import gates as module

    original = module.Constrained.on_step_end

    def on_step_end(self, args, state, control, *, optimizer, **kwargs):
        own = {id(parameter) for parameter in self.gates.parameters()}
        for group in optimizer.param_groups:
            mine = {id(parameter) in own for parameter in group["params"]}
            seen.append((mine, group["weight_decay"], group["lr"]))
        return original(self, args, state, control, optimizer=optimizer, **kwargs)

    module.Constrained.on_step_end = on_step_end
    try:
        run(model, steps=3, final_share=0.0, gate_rate=0.2)
    finally:
        module.Constrained.on_step_end = original
    assert {len(mine) for mine, _, _ in seen} == {1}
    assert {(decay, rate) for mine, decay, rate in seen if mine == {True}} == {(0.0, 0.2)}
    assert {decay for mine, decay, _ in seen if mine == {False}} == {0.01, 0.0}


def test_half_precision_and_conv1d(tiny_gpt2):
    data = [{"text": "the red cat sees a bird"}] * 8
    model = tiny_gpt2.bfloat16()
    report = run(model, data, steps=4, ratio=0.4, max_length=7)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert report.factorized.ratio <= 0.4 and len(list(structures(model))) == 8


def test_a_method_that_reads_the_rows(tmp_path):
    report = run(classifier(), method="fwsvd", calibration_rows=8, ratio=0.5, steps=4)
    assert {layer.method for layer in report.factorized.layers} == {"fwsvd"} and report.factorized.ratio <= 0.5


@pytest.mark.parametrize("change, message", [
    ({"final_share": 1.0}, "final_share is 1.0"), ({"final_share": -0.1}, "final_share"), ({"warmup": 1.1}, "warmup is 1.1"),
    ({"gate_rate": 0.0}, "gate_rate"), ({"start": math.inf}, "start is inf"), ({"steps": 0}, "steps is 0"),
    ({"steps": 1, "final_share": 0.9}, "leaves none"),
    ({"method": "monarch"}, "those of svd, fwsvd, whitened, kfac, sparsity_aware have"),
    ({"method": "poetry"}, "method must be one of"), ({"ratio": 1.5}, "ratio"), ({"ratio": 1e-3}, "ratio|budget|least"),
    ({"layers": ["none"]}, "matches no linear layer"), ({"task": "poetry"}, "task is 'poetry'"),
    ({"alpha": 2.0}, "alpha is 2.0"), ({"arguments": {"side": "in"}}, "has no argument"),
    ({"arguments": {"form": "pivoted"}}, "form is pivoted; ranks are learned of factors"),
])
def test_bad_arguments_are_named_before_any_work(change, message):
    model = classifier()
    before = digest(model)
    with pytest.raises(ArgumentError, match=message):
        run(model, **change)
    assert digest(model) == before


def test_a_teacher_that_does_not_fit_is_named():
    teacher = classifier()
    teacher.config.num_labels = 3
    with pytest.raises(ArgumentError, match="labels"):
        run(classifier(), teacher=teacher)


def test_steps_of_gates():
    assert gated_steps(300, 0.3, 0.5) == 210 and gated_steps(1, 0.0, 0.0) == 1
