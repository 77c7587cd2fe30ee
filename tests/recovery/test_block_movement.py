"""Block movement pruning: which units stay, that the budget is met as stored, and what the masks leave."""
import json
import sys
from functools import partial

import pytest
import torch

import lowfat
from lowfat.errors import ArgumentError
from lowfat.progress import tensors_digest
from lowfat.recovery import block_movement, finetune
from lowfat.recovery.block_movement import _staying
from lowfat.recovery.training import Phase, Updates, train_phase
from lowfat.shrink import dense_size, recorded, removable
from tiny_text import classifier, rows, tokenizer

NOTHING = 1e-60  # a learning rate that changes no weight


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def digest(model):
    return tensors_digest(model.state_dict().items())


def run(model, data=None, **changes):
    options = {"tokenizer": tokenizer(), "batch_size": 4, "max_length": 12, "autocast": False, "steps": 10, "block": 8}
    return block_movement(model, rows(10) if data is None else data, **options | changes)


@pytest.mark.parametrize("ratio", [0.3, 0.45, 0.7])
@pytest.mark.parametrize("scope", ["global", "matrix"])
def test_the_budget_is_met_as_stored(tmp_path, ratio, scope):
    model = classifier()
    units = removable(model)
    dense, head = dense_size(units), max(one.cost for one in units.values())
    report = run(model, ratio=ratio, scope=scope, out=tmp_path / "out")
    again = lowfat.load(tmp_path / "out")
    assert digest(again) == digest(model) and recorded(again) == recorded(model)
    assert not any(name.endswith("score") for name, _ in again.named_parameters())
    stored = sum(layer.weight.numel() for layer in lowfat.layers.factorizable(again).values())
    assert stored == report.ratio * dense and ratio * dense - head < stored <= ratio * dense
    assert report.shares[0]["share"] == 1 and report.shares[-1] == {"step": 7, "share": ratio}
    assert [entry["step"] for entry in report.losses] == list(range(1, 11)) and json.dumps(report.to_json())
    lowfat.evaluate(again, rows(4), tokenizer())


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_decoders(name, request):
    model = request.getfixturevalue(name).bfloat16()
    report = run(model, [{"text": "the red cat sees a bird"}] * 8, ratio=0.5, max_length=7)
    assert report.ratio <= 0.5 and all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_what_the_masks_keep_stays():
    """Neurons by their masks and scores, heads by how much of them is left, one of each block whatever is left."""
    model = classifier()
    units = removable(model)
    masks = {name: torch.zeros(32, 32, dtype=torch.bool) for one in units.values() if one.kind == "heads"
             for name in (*one.rows, one.writer)}
    masks["bert.encoder.layer.0.attention.self.query"][16:, :9] = True  # 144 of the second head
    masks["bert.encoder.layer.0.attention.output.dense"][:9, :16] = True  # 144 of the first head
    masks["bert.encoder.layer.0.attention.self.value"][16, 31] = True  # and one of the second
    masks["bert.encoder.layer.1.attention.self.key"][:16, 0] = True  # 16 of the first
    scores = {}
    for number, chosen in enumerate(([3, 5], [])):
        name = f"bert.encoder.layer.{number}.output.dense"
        scores[name] = torch.arange(48.0).neg().view(1, 48)
        scores[name][0, chosen] = 1.0
        masks[name] = (scores[name] > 0).expand(32, 48)
    kept = _staying(units, masks, scores, 0.5)
    assert kept["bert.encoder.layer.0.intermediate"] == [3, 5] and kept["bert.encoder.layer.1.intermediate"] == [0]
    room = int(0.5 * dense_size(units)) - 3 * 64
    assert room // 2048 == 3
    assert kept["bert.encoder.layer.0.attention.self"] == [0, 1] and kept["bert.encoder.layer.1.attention.self"] == [0]
    kept = _staying(units, masks, scores, (3 * 64 + 2 * 2048) / dense_size(units))
    assert kept["bert.encoder.layer.0.attention.self"] == [1]


def test_without_rates_the_rest_of_the_model_is_untouched():
    """No step moves a weight: those that stay are the dense ones, or 0 where a block was masked."""
    model = classifier()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model, learning_rate=NOTHING, ratio=0.6)
    for name, tensor in model.state_dict().items():
        if ".layer." not in name:
            assert torch.equal(tensor, dense[name]), name
        else:
            assert set(tensor.flatten().tolist()) <= set(dense[name].flatten().tolist()) | {0.0}, name
    assert recorded(model) and any((tensor == 0).any() for name, tensor in model.state_dict().items()
                                   if ".attention." in name and name.endswith("weight"))


def test_nothing_masked_is_plain_training(monkeypatch):
    """Scores that learn beside the weights, all of which stay, change no bit of those: finetune() at a constant rate."""
    model, same = classifier(), {"steps": 4, "learning_rate": 1e-3}
    plain = classifier()
    plain.load_state_dict(model.state_dict())
    module = sys.modules["lowfat.recovery.block_movement"]
    monkeypatch.setattr("lowfat.recovery.movement.cubic", lambda step, start, end, final: 1.0)
    monkeypatch.setattr("lowfat.recovery.movement.Movement.apply", lambda self: None)
    monkeypatch.setattr(module, "shrink", lambda model, kept: {})
    # scores have gradients too, which take part in the norm that all are clipped to
    monkeypatch.setitem(train_phase.__kwdefaults__, "updates", Updates(clip=0.0))
    run(model, final_share=0.0, score_rate=NOTHING, **same)
    monkeypatch.setattr(sys.modules["lowfat.recovery.finetune"], "Phase", partial(Phase, schedule="constant_with_warmup"))
    finetune(plain, rows(10), tokenizer=tokenizer(), batch_size=4, max_length=12, autocast=False, **same)
    assert digest(model) == digest(plain)


@pytest.mark.parametrize("change, message", [
    ({"final_share": 1.0}, "final_share is 1.0"), ({"warmup": 2.0}, "warmup is 2.0"),
    ({"scope": "layer"}, "scope is 'layer'"),
    ({"block": 0}, "block is 0"), ({"score_rate": 0.0}, "score_rate"), ({"ratio": 0.0}, "ratio must be"),
    ({"ratio": 0.2}, "one head or neuron of every block is 0.295"), ({"task": "poetry"}, "task is 'poetry'"),
    ({"teacher": classifier(), "distill": {"attention": 1.0}}, "heads are taken out"),
])
def test_bad_arguments_are_named_before_any_work(change, message):
    model = classifier()
    before = digest(model)
    with pytest.raises(ArgumentError, match=message):
        run(model, **change)
    assert digest(model) == before


def test_a_teacher_is_followed_in_its_hidden_states():
    report = run(classifier(), teacher=classifier(), distill={"hidden": 1.0}, ratio=0.5)
    assert report.ratio <= 0.5
