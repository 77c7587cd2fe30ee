"""Which parameters decay; and per-layer updates, which must be the optimizer's own, bit for bit."""
import copy

import pytest
import torch
from torch import nn

import lowfat
from lowfat.errors import ArgumentError, UnsupportedError
from lowfat.optimizers import PerLayer, parameter_groups
from lowfat.structures import Structure

LOW_RANK = {"structure": "LowRank", "rank": 4}


@pytest.fixture
def model(tiny_llama):
    torch.manual_seed(0)
    lowfat.replace(tiny_llama, LOW_RANK)
    return tiny_llama


def test_factors_and_weights_decay_and_the_rest_does_not(tiny_bert):
    lowfat.replace(tiny_bert, {"*query": {"structure": "Sparse24"}, "*dense": LOW_RANK})
    groups = {group["name"]: group for group in parameter_groups(tiny_bert, weight_decay=0.3, factor_rate=0.5)}
    names = {id(parameter): name for name, parameter in tiny_bert.named_parameters()}
    kinds = {names[id(parameter)]: kind for kind, group in groups.items() for parameter in group["params"]}
    assert kinds.keys() == dict(tiny_bert.named_parameters()).keys()
    for name, kind in kinds.items():
        owner = tiny_bert.get_submodule(name.rpartition(".")[0])
        if name.endswith("bias") or "LayerNorm" in name:
            assert kind == "others"
        else:
            assert kind == ("factors" if isinstance(owner, Structure) else "weights"), name
    assert {kind: group["weight_decay"] for kind, group in groups.items()} == {"factors": 0.3, "weights": 0.3, "others": 0}
    assert groups["factors"]["lr"] == 0.5 and "lr" not in groups["weights"]


def test_frozen_and_shared_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    weights, others = parameter_groups(model)
    assert weights["params"] == [model[0].weight] and others["params"] == [model[1].bias]
    with pytest.raises(ArgumentError, match="every parameter is frozen"):
        parameter_groups(model.requires_grad_(False))
    with pytest.raises(ArgumentError, match="weight_decay is -1"):
        parameter_groups(model, weight_decay=-1)


def steps(model, optimizer, count, schedule=None):
    for step in range(count):
        tokens = torch.randint(0, model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(step))
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_the_same_bits_as_a_step_after_the_pass(model, make):
    other = copy.deepcopy(model)
    for one, kind in ((model, PerLayer), (other, lambda groups, make, **options: make(groups, **options))):
        optimizer = kind(parameter_groups(one), make=make, lr=1e-2)
        steps(one, optimizer, 4, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1))
    for (name, left), right in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_gradients_are_gone_and_few_at_a_time(model):
    optimizer = PerLayer(parameter_groups(model), lr=1e-2)
    alive = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.grad is not None for other in model.parameters())))
    steps(model, optimizer, 1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert max(alive) <= 4 < len(list(model.parameters()))


def test_goes_on_from_a_saved_state(model):
    other = copy.deepcopy(model)
    first = PerLayer(parameter_groups(model), lr=1e-2)
    steps(model, first, 2)
    state, kept = copy.deepcopy(first.state_dict()), copy.deepcopy(model.state_dict())
    steps(model, first, 3)
    other.load_state_dict(kept)
    second = PerLayer(parameter_groups(other), lr=5e-2)
    second.load_state_dict(state)
    steps(other, second, 3)
    for (name, left), right in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), name


class Coarse(torch.optim.Optimizer):
    """Keeps a number and bytes as its state, as optimizers of 8 bits do; torch would make the bytes floats on loading."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in (one for one in group["params"] if one.grad is not None):
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                state["bytes"] = state.get("bytes", torch.zeros(parameter.shape, dtype=torch.uint8)) + 1
                assert state["bytes"].dtype == torch.uint8
                parameter -= group["lr"] * 1e-3 * state["bytes"] * state["step"]

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for parameter, state in zip(self.param_groups[0]["params"], state_dict["state"].values()):
            self.state[parameter]["bytes"] = state["bytes"].clone()


def test_a_state_of_numbers_and_bytes_goes_through_files(model, tmp_path):
    from lowfat.recovery.training_state import restore_optimizer, training_state
    from lowfat.storage import write_json, write_tensors
    from lowfat.strict_json import read_json
    from lowfat.tensor_file import read_tensors

    other = copy.deepcopy(model)
    first = PerLayer(parameter_groups(model), Coarse, lr=1e-2)
    schedule = torch.optim.lr_scheduler.ConstantLR(first)
    steps(model, first, 2)
    tensors, state = training_state(model, first, schedule)
    write_tensors(tmp_path / "state.safetensors", tensors)
    write_json(tmp_path / "state.json", {"numbers": state["numbers"], "optimizer": state["optimizer"]})
    other.load_state_dict(model.state_dict())
    steps(model, first, 2)
    second, state = PerLayer(parameter_groups(other), Coarse, lr=1.0), read_json(tmp_path / "state.json")
    restore_optimizer(other, second, read_tensors(tmp_path / "state.safetensors") | state["numbers"], state["optimizer"])
    steps(other, second, 2)
    for (name, left), right in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_what_per_layer_updates_cannot_do(model):
    model.lm_head.requires_grad_(False)
    optimizer = PerLayer(model.parameters(), lr=1e-2)
    model.lm_head.requires_grad_(True)
    with pytest.raises(UnsupportedError, match="add_param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    tokens = torch.ones(1, 4, dtype=torch.int64)
    model(tokens, labels=tokens).loss.backward()
    with pytest.raises(ArgumentError, match="cannot accumulate"):
        model(tokens, labels=tokens).loss.backward()
    with pytest.raises(ArgumentError, match="closure"):
        optimizer.step(lambda: None)
    optimizer.remove()
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
