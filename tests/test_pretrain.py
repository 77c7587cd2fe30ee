"""Pre-training: the plan, the schedule and the optimizer are what was asked for, and a run repeats bit for bit."""
import math

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

import lowfat
from lowfat.cli import app
from lowfat.errors import ArgumentError, DeviceError
from lowfat.presets import PRESETS
from lowfat.pretrain import draw, made, pretrain
from lowfat.progress import tensors_digest
from tiny_text import rows, tokenizer

PLAN = {"structure": "LowRank", "rank": 4}


def config(**changes):
    return LlamaConfig(**{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "intermediate_size": 24, "max_position_embeddings": 32} | changes)


def run(**changes):
    options = {"tokenizer": tokenizer(), "plan": PLAN, "steps": 6, "batch_size": 4, "length": 8, "autocast": False} | changes
    return pretrain(options.pop("config", config()), options.pop("train", rows(20)), **options)


def digest(model):
    return tensors_digest(model.state_dict().items())


def test_learns_with_the_structure_asked_for_and_opens_again(tmp_path):
    model, report = run(steps=30, out=tmp_path / "new", validation=rows(6))
    assert set(report.replaced.layers) == {name for name, layer in model.named_modules()
                                           if isinstance(layer, lowfat.LowRank)}
    assert len(report.replaced.layers) == 14
    assert report.losses[-1]["loss"] < report.losses[0]["loss"] - 0.5
    assert report.validation["nats_per_token"] < math.log(40)
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    again = lowfat.load(tmp_path / "new")
    assert digest(again) == digest(model)
    draw(report, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_the_seed_decides_the_model_and_nobody_elses_random_numbers(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (made(config(), tokenizer(), PLAN, None, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert digest(first) == digest(second) != digest(other)


def test_without_a_plan_everything_stays_dense():
    model, report = run(plan=None, steps=1)
    assert report.replaced is None and not any(isinstance(layer, lowfat.LowRank) for layer in model.modules())


def test_per_layer_updates_give_the_same_bits():
    model, _ = run(weight_decay=0.1, per_layer=True)
    assert digest(run(weight_decay=0.1)[0]) == digest(model)
    before = digest(model)
    for _ in range(2):  # nothing of it stays on the model
        model(torch.ones(1, 4, dtype=torch.int64), labels=torch.ones(1, 4, dtype=torch.int64)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters()) and digest(model) == before


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_run_that_stopped_goes_on_with_the_same_bits(tmp_path, per_layer):
    whole, _ = run(out=tmp_path / "whole", per_layer=per_layer)

    class Stopped(Exception):
        pass

    def stop(step, steps, what):
        if step == 4:
            raise Stopped

    with pytest.raises(Stopped):
        run(out=tmp_path / "parts", per_layer=per_layer, save_every=2, on_progress=stop)
    parts, report = run(out=tmp_path / "parts", per_layer=per_layer, save_every=2)
    assert report.resumed_from == 2  # the stop came before step 4 was kept
    assert digest(parts) == digest(whole)
    assert not list(tmp_path.glob(".*"))


def test_parts_of_a_batch_add_up():
    """Pieces of equal length, so that the mean of means is the mean, but for rounding."""
    texts = [{"text": " ".join(["the cat sees a dog"] * 40)}]
    one, two = (run(train=texts, steps=1, accumulate=parts, learning_rate=1e-4)[1].losses[0]["loss"] for parts in (1, 4))
    assert one == pytest.approx(two, rel=1e-5)


def test_the_rate_rises_and_ends_at_its_share(monkeypatch):
    from lowfat.recovery import training_state

    seen = []
    original = training_state.ProgressCallback.on_step_end

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        seen.append(lr_scheduler.get_last_lr()[0])
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(training_state.ProgressCallback, "on_step_end", on_step_end)
    run(steps=10, warmup=2, lowest=0.1, learning_rate=1e-2)
    assert seen[0] == pytest.approx(5e-3) and seen[1] == pytest.approx(1e-2) and seen[-1] == pytest.approx(1e-3)
    assert seen[1:] == sorted(seen[1:], reverse=True)


@pytest.mark.parametrize("changes, error, words", [
    ({"per_layer": True, "accumulate": 2}, ArgumentError, "per_layer with accumulate 2"),
    ({"per_layer": True, "clip": 1.0}, ArgumentError, "per_layer with clip 1.0"),
    ({"batch_size": 5, "accumulate": 2}, ArgumentError, "batch_size is 5"),
    ({"steps": 0}, ArgumentError, "steps is 0"),
    ({"warmup": 7}, ArgumentError, "warmup is 7"),
    ({"lowest": 2}, ArgumentError, "lowest is 2"),
    ({"clip": -1}, ArgumentError, "clip is -1"),
    ({"optimizer": "adam"}, ArgumentError, "optimizer is 'adam'; needs one of adamw, adam8bit"),
    ({"optimizer": "adam8bit"}, DeviceError, "adam8bit needs a GPU"),
    ({"config": "nowhere"}, ArgumentError, "config nowhere does not exist"),
    ({"config": LlamaConfig(vocab_size=5)}, ArgumentError, "tokenizer has"),
    ({"plan": {"structure": "LowRanks"}}, ArgumentError, "structure must be one of"),
    ({"length": 64}, ArgumentError, "max_length is 64"),
    ({"train": []}, ArgumentError, "no rows"),
])
def test_refused_before_any_work(changes, error, words, tmp_path):
    with pytest.raises(error, match=words):
        run(out=tmp_path / "new", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, parameters", [("60m", 58.1e6), ("130m", 134.1e6), ("350m", 368.0e6), ("1b", 1339.1e6),
                                              ("7b", 6738.4e6)])
def test_presets_are_the_models_they_are_named_after(name, parameters):
    """Dense, with the 32,000 tokens and the untied head of the published runs."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(PRESETS[name].model_config(32_000))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=1e-3)


def test_the_command(tmp_path):
    tokenizer().save_pretrained(tmp_path / "words")
    config().save_pretrained(tmp_path / "config")
    (tmp_path / "texts.txt").write_text("\n".join(row["text"] for row in rows(20)))
    arguments = ["pretrain", str(tmp_path / "config"), str(tmp_path / "new"), "--data", str(tmp_path / "texts.txt"),
                 "--tokenizer", str(tmp_path / "words"), "--batch-size", "4", "--length", "8", "--device", "cpu"]
    told = CliRunner().invoke(app, [*arguments, "--steps", "3", "--structure", "LowRank", "--set", "rank=4"])
    assert told.exit_code == 0, told.output
    assert "14 layers replaced" in told.output and (tmp_path / "new.png").exists()
    assert isinstance(lowfat.load(tmp_path / "new").model.layers[0].mlp.up_proj, lowfat.LowRank)
    assert "--steps is missing" in CliRunner().invoke(app, arguments).output
    (tmp_path / "wordless").mkdir()
    wordless = [*arguments, "--steps", "3", "--tokenizer", str(tmp_path / "wordless")]
    assert "has no tokenizer" in CliRunner().invoke(app, wordless).output
    assert "needs --structure" in CliRunner().invoke(app, [*arguments, "--steps", "3", "--set", "rank=4"]).output


def test_a_preset_has_low_rank_and_sparse_layers(tmp_path):
    preset = PRESETS["nano"]
    model, replaced = made(preset.model_config(len(tokenizer())), tokenizer(), preset.plan(), None, 0)
    assert {type(model.get_submodule(name)).__name__ for name in replaced.layers} == {"LowRankSparse"}
    assert len(replaced.layers) == 7 * preset.layers and 0.42 < replaced.ratio < 0.43
    first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    assert (first.seed, second.seed) != (0, 0) and not torch.equal(first.columns, second.columns)  # a support each
    assert first.alpha == preset.alpha and first.rank == preset.rank
