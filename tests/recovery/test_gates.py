"""Hard-concrete gates: how they are drawn, how many are expected to be open, and what a Lagrangian makes of that."""
import math

import pytest
import torch
from torch.nn.functional import linear

from lowfat.recovery.gates import HIGH, LOW, Constrained, HardConcrete, Lagrangian, RankGates
from lowfat.recovery.phases import cut_moments, saving_rank
from lowfat.structures import LowRank


def gates_at(*values):
    gate = HardConcrete(len(values), start=0.0)
    gate.log_alpha.data = torch.tensor(values)
    return gate


class Two(torch.nn.Module):
    """Two low-rank layers of different sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = LowRank.from_dense(torch.randn(6, 8), torch.randn(6), rank=6)
        self.second = LowRank.from_dense(torch.randn(20, 6), rank=6)

    def forward(self, x):
        return self.second(self.first(x).relu())


def gated(start=0.0, **values):
    model = Two()
    gates = RankGates({"first": model.first, "second": model.second}, dense=6 * 8 + 20 * 6, start=start)
    for gate, name in zip(gates.gates, gates.layers):
        if name in values:
            gate.log_alpha.data = torch.tensor(values[name])
    return model, gates


def test_draws_are_those_of_the_distribution():
    """Of 100 000 draws, the share of open ones, of ones that are 1, and the gradient's expectation are the closed forms."""
    count = 100_000
    for value in (-2.0, 0.0, 1.5):
        gate = HardConcrete(count, start=value)
        drawn = gate()
        due = torch.sigmoid(torch.tensor(value) - math.log(-LOW / HIGH)).item()
        bound = 5 * math.sqrt(0.25 / count)  # five standard deviations of a share
        assert drawn.min() >= 0 and drawn.max() <= 1 and gate.open()[0].item() == pytest.approx(due)
        assert abs((drawn > 0).float().mean() - due) < bound
        ones = 1 - torch.sigmoid(torch.tensor(math.log((1 - LOW) / (HIGH - 1)) - value)).item()
        assert abs((drawn == 1).float().mean() - ones) < bound
        again = gate()
        assert not torch.equal(drawn, again)
        again.sum().backward()
        inside = (again > 0) & (again < 1)
        assert torch.equal(gate.log_alpha.grad != 0, inside)  # what was cut to 0 or 1 teaches nothing


def test_evaluated_gates_are_fixed():
    gate = gates_at(-4.0, 0.0, 4.0, 200.0).eval()
    torch.testing.assert_close(gate(), torch.tensor([-3.2, 0.0, 3.2, 160.0]).sigmoid())
    assert gate()[-1] == 1 and torch.equal(gate(), gate())


def test_a_gate_far_open_or_shut_is_certain():
    gate = gates_at(*[1e4] * 500, *[-1e4] * 500)
    assert torch.equal(gate(), torch.tensor([1.0] * 500 + [0.0] * 500)) and gate.open().sum() == 500


def test_the_lagrangian_is_what_it_says():
    constraint = Lagrangian()
    constraint.multipliers.data = torch.tensor([2.0, 3.0])
    share = torch.tensor(0.7, requires_grad=True)
    value = constraint(share, 0.5)
    value.backward()
    assert value.item() == pytest.approx(2 * 0.2 + 3 * 0.04) and share.grad.item() == pytest.approx(2 + 2 * 3 * 0.2)
    torch.testing.assert_close(constraint.multipliers.grad, torch.tensor([0.2, 0.04]))


@pytest.mark.parametrize("training", [True, False])
def test_open_gates_change_no_bit(training):
    model, gates = gated(start=1e4)
    gates.train(training)
    x = torch.randn(5, 8)
    y = model(x)
    y.square().sum().backward()
    plain = Two()
    expected = plain(x)
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters()):
        assert torch.equal(parameter.grad, other.grad), name
    assert all(not gate.log_alpha.grad.any() for gate in gates.gates)


def test_gates_scale_the_components():
    model, gates = gated(first=[-1.0, 0.5, 2.0, -3.0, 0.0, 1.0])
    gates.eval()
    layer, z = model.first, gates.gates[0].evaluated()
    x = torch.randn(4, 8)
    torch.testing.assert_close(layer(x), linear(x, layer.u @ torch.diag(z) @ layer.v, layer.bias))
    gates.remove()
    torch.testing.assert_close(layer(x), linear(x, layer.u @ layer.v, layer.bias))


def test_the_share_counts_what_a_component_costs():
    model, gates = gated(first=[1e4] * 2 + [-1e4] * 4, second=[1e4] * 1 + [-1e4] * 5)
    assert gates.share().item() == pytest.approx((2 * 14 + 1 * 26) / 168)
    gates.fixed = 10
    assert gates.share().item() == pytest.approx((2 * 14 + 1 * 26 + 10) / 168)


def test_what_is_chosen_fills_the_budget_and_never_exceeds_it():
    torch.manual_seed(5)
    for _ in range(20):
        model, gates = gated(first=torch.randn(6).tolist(), second=torch.randn(6).tolist())
        for budget in range(40, 169, 7):
            kept = gates.chosen(budget)
            cost = 14 * len(kept["first"]) + 26 * len(kept["second"])
            assert cost <= budget and kept["first"] and kept["second"]
            assert len(kept["first"]) <= saving_rank(8, 6) == 3 and len(kept["second"]) <= saving_rank(6, 20) == 4
            wanting = [one for name, one, most in (("first", 14, 3), ("second", 26, 4)) if len(kept[name]) < most]
            assert budget - cost < min(wanting, default=math.inf)  # not one more would fit
            for gate, (name, indices) in zip(gates.gates, kept.items()):
                values = gate.log_alpha.tolist()
                assert min(values[i] for i in indices) >= max(values[i] for i in range(6) if i not in indices)


def test_equal_gates_keep_the_first_components_of_all_layers():
    _, gates = gated(start=2.0)
    assert gates.chosen(2 * 14 + 2 * 26) == {"first": [0, 1], "second": [0, 1]}


def test_cut_layers_compute_what_the_gated_ones_did():
    """With the gates that go shut, and those that stay as they are in evaluation; moments and flags follow."""
    values = {"first": [1.0, -1e4, 3.0, -1e4, -1e4, 0.2], "second": [-1e4, 2.0, -1e4, -1e4, 0.1, -1e4]}
    model, gates = gated(**values)
    gates.eval()
    model.first.bias.requires_grad_(False)
    x = torch.randn(5, 8)
    expected = model(x)
    kept = gates.chosen(3 * 14 + 2 * 26)
    assert kept == {"first": [0, 2, 5], "second": [1, 4]}
    moments = {"optimizer.student.first.u.exp_avg": torch.arange(36.0).view(6, 6),
               "optimizer.student.first.u.step": torch.tensor(4.0), "optimizer.student.first.bias.exp_avg": torch.ones(6)}
    gates.remove()
    cut_moments(moments, gates.cut(model, kept))
    torch.testing.assert_close(model(x), expected)
    assert model.first.shape()["rank"] == 3 and model.second.shape()["rank"] == 2
    assert not model.first.bias.requires_grad and model.first.u.requires_grad
    assert torch.equal(moments["optimizer.student.first.u.exp_avg"], torch.arange(36.0).view(6, 6)[:, [0, 2, 5]])
    assert moments["optimizer.student.first.u.step"] == 4 and len(moments["optimizer.student.first.bias.exp_avg"]) == 6


def test_gates_reach_their_target_and_multipliers_ascend():
    """Without any loss but the Lagrangian, Adam on gates and multipliers settles at the target share."""
    _, gates = gated(start=3.0)
    constraint = Constrained(gates, target=0.4, warmup=50)
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.1)

    class State:
        global_step = 0

    before = gates.lagrangian.multipliers.detach().clone()
    for State.global_step in range(400):
        optimizer.zero_grad()
        constraint.on_pre_optimizer_step(None, State, None)
        optimizer.step()
        if State.global_step == 5:  # above the target: the multiplier of the squared gap has risen
            assert gates.lagrangian.multipliers[1] > before[1]
    assert abs(gates.share().item() - 0.4) < 0.05


def test_the_target_falls_from_the_share_that_there_is():
    _, gates = gated(start=1e4)
    first = (6 * 14 + 6 * 26) / 168
    constraint = Constrained(gates, target=0.5, warmup=4)
    found = [constraint.target(step) for step in range(6)]
    assert found == pytest.approx([first + (0.5 - first) * part for part in (0.25, 0.5, 0.75, 1, 1, 1)])
    assert Constrained(gates, target=0.5, warmup=0).target(0) == 0.5
