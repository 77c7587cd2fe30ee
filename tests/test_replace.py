"""replace() puts new structures into a model that is to be trained from scratch."""
import copy

import pytest
import torch
from torch import nn

import lowfat
from lowfat.errors import ArgumentError, ShapeError
from lowfat.structures import LowRank, Monarch, Sparse24

LOW_RANK = {"structure": "LowRank", "rank": 4}


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_the_linears_of_the_blocks_by_default(tiny_llama):
    before = linears(tiny_llama)
    report = lowfat.replace(tiny_llama, LOW_RANK)
    assert set(report.layers) == {name for name in before if name.startswith("model.layers.")}
    for name, old in before.items():
        layer = tiny_llama.get_submodule(name)
        if name in report.layers:
            assert isinstance(layer, LowRank)
            assert (layer.in_features, layer.out_features) == (old.in_features, old.out_features)
            assert (layer.bias is None) == (old.bias is None) and layer.v.dtype == old.weight.dtype
        else:
            assert layer is old
    assert set(report.skipped) >= {"lm_head"} or "lm_head" not in before
    assert report.parameters == sum(module.u.numel() + module.v.numel() for module in tiny_llama.modules()
                                    if isinstance(module, LowRank))
    assert report.dense_parameters == sum(before[name].weight.numel() for name in report.layers)
    assert report.ratio == report.parameters / report.dense_parameters
    assert report.to_json()["ratio"] == report.ratio


def test_the_first_pattern_that_matches_counts(tiny_llama):
    monarch = {"structure": "Monarch", "blocks": 2, "rank": 1}
    report = lowfat.replace(tiny_llama, {"*q_proj": {"structure": "Sparse24"}, "*self_attn*": monarch,
                                         "*down_proj": LOW_RANK})
    kinds = {name.rpartition(".")[2]: type(tiny_llama.get_submodule(name)) for name in report.layers}
    assert kinds == {"q_proj": Sparse24, "k_proj": Monarch, "v_proj": Monarch, "o_proj": Monarch, "down_proj": LowRank}
    assert "not in the plan" in {report.skipped[name] for name in report.skipped if name.endswith("up_proj")}


def test_trains_saves_and_opens(tiny_llama, tmp_path):
    torch.manual_seed(0)
    lowfat.replace(tiny_llama, LOW_RANK)
    tokens = torch.randint(0, tiny_llama.config.vocab_size, (2, 8))
    optimizer = torch.optim.AdamW(tiny_llama.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = tiny_llama(tokens, labels=tokens).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in tiny_llama.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tiny_llama.save_pretrained(tmp_path / "out")
    again = lowfat.load(tmp_path / "out")
    for (name, left), right in zip(tiny_llama.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def test_new_layers_follow_the_seed_of_torch(tiny_llama):
    models = [tiny_llama, copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)]
    for model, seed in zip(models, (0, 0, 1)):
        torch.manual_seed(seed)
        lowfat.replace(model, LOW_RANK)
    states = [model.model.layers[1].mlp.up_proj.u for model in models]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("in_sum", [False, True])
def test_every_layer_draws_its_own_support(tiny_llama, in_sum):
    sparse = {"structure": "LowRankSparse", "rank": 2, "density": 0.1, "seed": 7}
    lowfat.replace(tiny_llama, {"structure": "Sum", "parts": [{"structure": "Sparse24"}, sparse]} if in_sum else sparse)
    layers = [block.mlp.up_proj.parts[1] if in_sum else block.mlp.up_proj for block in tiny_llama.model.layers]
    assert layers[0].seed >= 7 and not torch.equal(layers[0].columns, layers[1].columns)


def test_plain_torch_modules_and_dtypes():
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4, bias=False)).double()
    lowfat.replace(model, {"*": LOW_RANK})
    assert [type(model[i]) for i in (0, 2)] == [LowRank, LowRank]
    assert model[0].u.dtype == torch.float64 and model[2].bias is None
    assert model(torch.randn(3, 8, dtype=torch.float64)).shape == (3, 4)


@pytest.mark.parametrize("plan, error, words", [
    ({}, ArgumentError, "plan must be"),
    ("LowRank", ArgumentError, "plan must be"),
    ({"structure": "LowRanks", "rank": 4}, ArgumentError, "structure must be one of LowRank"),
    ({"structure": "Wavelet", "rank": 4}, ArgumentError, "structure must be one of LowRank"),
    ({"structure": ["LowRank"]}, ArgumentError, "structure must be one of LowRank"),
    ({"*": 4}, ArgumentError, "structure must be one of"),
    ({"*nothing": LOW_RANK}, ArgumentError, "matches no linear layer"),
    ({"structure": "LowRank"}, ArgumentError, "rank"),
    ({"structure": "LowRank", "rank": 4, "blocks": 2}, ArgumentError, "blocks"),
    ({"structure": "LowRank", "rank": 4, "bias": True}, ArgumentError, "bias of LowRank must not be given"),
    ({"structure": "LowRank", "rank": 0}, ShapeError, "model.layers.0.self_attn.q_proj: "),
    ({"*up_proj": LOW_RANK, "*down_proj": {"structure": "LowRank", "rank": 10**6}}, ShapeError, "down_proj: "),
])
def test_a_plan_that_cannot_be_is_refused_before_anything_changes(tiny_llama, plan, error, words):
    before = dict(tiny_llama.named_modules())
    with pytest.raises(error, match=words.replace("[", r"\[")):
        lowfat.replace(tiny_llama, plan)
    assert dict(tiny_llama.named_modules()) == before


def test_layers_go_with_one_structure_for_all(tiny_llama):
    assert all(name.endswith("up_proj") for name in lowfat.replace(tiny_llama, LOW_RANK, layers=["*up_proj"]).layers)
    with pytest.raises(ArgumentError, match="by patterns says itself"):
        lowfat.replace(tiny_llama, {"*down_proj": LOW_RANK}, layers=["*down_proj"])


@pytest.mark.parametrize("spec", [LOW_RANK, {"structure": "Monarch", "blocks": 2, "rank": 2}, {"structure": "Sparse24"},
                                  {"structure": "Dictionary", "atoms": 16, "nonzeros": 4},
                                  {"structure": "LowRankSparse", "rank": 4, "density": 0.1}],
                         ids=lambda spec: spec["structure"])
def test_gradients_under_checkpointing_and_autocast(tiny_llama, spec):
    """Recomputed activations give the same bits; under autocast the layers compute in bf16 and their gradients are fp32."""
    lowfat.replace(tiny_llama, spec)
    tiny_llama.train()
    tokens = torch.randint(0, 97, (2, 8))

    def gradients(**context):
        tiny_llama.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, **context):
            loss = tiny_llama(tokens, labels=tokens).loss
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in tiny_llama.named_parameters()}

    plain, half = gradients(enabled=False), gradients()
    tiny_llama.gradient_checkpointing_enable({"use_reentrant": False})
    for context, expected in (({"enabled": False}, plain), ({}, half)):
        for name, gradient in gradients(**context).items():
            assert gradient.dtype == torch.float32 and torch.equal(gradient, expected[name]), name
    assert any(not torch.equal(plain[name], half[name]) for name in plain)
