"""Movement pruning: the scores' gradient, how many stay, the schedule, and what is left of it in a layer."""
import copy

import pytest
import torch
from torch.nn.functional import linear

from lowfat.errors import ArgumentError
from lowfat.recovery.movement import CRITERIA, NAME, Movement, cubic

PATTERNS = {"element": (1, 1), "block:2": (2, 2), "block:4": (4, 4), "row": (1, 7), "column": (10, 1)}  # blocks of [10, 7]


def a_layer(n=10, k=7):
    return torch.nn.Linear(k, n).double()


def conv1d(n=10, k=7):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(n, k).double()


def of_blocks(elements, block):
    """Sums over blocks, one by one."""
    down, across = block
    return torch.stack([torch.stack([elements[i:i + down, j:j + across].sum() for j in range(0, elements.shape[1], across)])
                        for i in range(0, elements.shape[0], down)])


@pytest.mark.parametrize("make", [a_layer, conv1d])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_gradient_of_a_score_is_that_of_the_masked_weights_times_the_weights(pattern, make):
    layer = make()
    weight = (layer.weight.mT if make is conv1d else layer.weight).detach().clone()
    movement = Movement({"layer": layer}, pattern=pattern)
    with torch.no_grad():
        layer.score.copy_(torch.randn(layer.score.shape))
    movement.keep = 0.5
    mask, x, dy = movement.masks()["layer"], torch.randn(3, 4, 7).double().requires_grad_(), torch.randn(3, 4, 10).double()
    y = layer(x)
    y.backward(dy)
    torch.testing.assert_close(y, linear(x, weight * mask, layer.bias))  # fp64: torch's own bounds
    torch.testing.assert_close(x.grad, dy @ (weight * mask))
    g = dy.reshape(-1, 10).T @ x.detach().reshape(-1, 7)
    found = layer.weight.grad.T if make is conv1d else layer.weight.grad
    torch.testing.assert_close(found, g * mask)
    torch.testing.assert_close(layer.score.grad, of_blocks(g * weight, PATTERNS[pattern]))  # of masked weights too


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("keep", [0.01, 0.1, 0.35, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_largest_stay_and_exactly_as_many_as_asked_for(pattern, keep, criterion):
    layers = {"a": a_layer(), "b": a_layer()}
    movement = Movement(layers, pattern=pattern, criterion=criterion)
    for layer in layers.values():
        if criterion != "magnitude":
            with torch.no_grad():
                layer.score.copy_(torch.randn(layer.score.shape))
    movement.keep = keep
    for name, layer in layers.items():
        score, mask = movement.scores()[name], movement.masks()[name]
        kept = torch.stack([row[::PATTERNS[pattern][1]] for row in mask[::PATTERNS[pattern][0]]])
        assert kept.shape == score.shape and int(kept.sum()) == max(1, round(keep * score.numel()))
        assert kept.all() or score[kept].min() >= score[~kept].max()
        assert mask.shape == layer.weight.shape
        assert torch.equal(of_blocks(mask, PATTERNS[pattern]) == 0, ~kept)  # a block goes as a whole


def test_scores_that_are_equal_do_not_change_how_many_stay():
    movement = Movement({"layer": a_layer()})
    movement.keep = 0.3
    assert int(movement.masks()["layer"].sum()) == 21


def test_all_matrices_together_may_keep_different_shares():
    layers = {"a": a_layer(), "b": a_layer(4, 5)}
    movement = Movement(layers, scope="global")
    with torch.no_grad():
        layers["a"].score.fill_(1)
    movement.keep = 70 / 90
    assert [int(mask.sum()) for mask in movement.masks().values()] == [70, 0]
    movement.keep = 0.5
    assert sum(int(mask.sum()) for mask in movement.masks().values()) == 45


def test_magnitude_keeps_the_largest_weights_as_they_are_by_then():
    layer = a_layer()
    movement = Movement({"layer": layer}, criterion="magnitude")
    assert not hasattr(layer, NAME)
    with torch.no_grad():
        layer.weight[3] = 100
    movement.keep = 0.1
    assert movement.masks()["layer"][3].all() and int(movement.masks()["layer"].sum()) == 7


@pytest.mark.parametrize("make", [a_layer, conv1d])
def test_what_is_left_afterwards(make):
    layer = make()
    before, untouched = copy.deepcopy(layer), list(vars(layer))
    movement = Movement({"layer": layer})
    x = torch.randn(5, 7).double()
    torch.testing.assert_close(layer(x), before(x))  # all are kept at the start
    with torch.no_grad():
        layer.score.copy_(torch.randn(10, 7))
    movement.keep = 0.4
    y = layer(x)
    movement.apply()
    movement.remove()
    assert list(vars(layer)) == untouched and list(layer.state_dict()) == list(before.state_dict())
    torch.testing.assert_close(layer(x), y)
    assert int(layer.weight.count_nonzero()) == 28
    assert torch.equal(layer.weight[layer.weight != 0], before.weight[layer.weight != 0])


def test_scores_are_part_of_the_training_state():
    model = torch.nn.Sequential(a_layer(), torch.nn.ReLU())
    movement = Movement({"0": model[0]})
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "0.score"]
    assert movement.scores()["0"].data_ptr() == model[0].score.data_ptr()


def test_the_schedule_is_cubic():
    assert [cubic(step, 2, 6, 0.2) for step in (0, 2, 6, 9)] == [1.0, 1.0, 0.2, 0.2]
    assert cubic(4, 2, 6, 0.2) == pytest.approx(0.2 + 0.8 / 8)
    falling = [cubic(step, 2, 6, 0.2) for step in range(2, 7)]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) == 5
    assert cubic(3, 3, 3, 0.2) == 0.2  # at once


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sensitivity_is_the_average_of_what_the_loss_would_change_by(pattern):
    """Of masked weights too; the first steps' mean, then nine parts of ten of what was."""
    layer = a_layer()
    movement, expected = Movement({"layer": layer}, pattern=pattern, criterion="sensitivity"), None
    movement.keep = 0.5
    assert NAME not in dict(layer.named_parameters()) and NAME in layer.state_dict()
    for step in range(15):
        x, dy = (torch.randn(7, size, dtype=layer.weight.dtype) for size in (layer.in_features, layer.out_features))
        layer(x).backward(dy)
        found = of_blocks((dy.T @ x * layer.weight.detach()).abs(), PATTERNS[pattern])
        share = max(0.1, 1 / (step + 1))
        expected = found if expected is None else (1 - share) * expected + share * found
        movement.collect(step)
        torch.testing.assert_close(movement.scores()["layer"], expected)
    movement.remove()
    assert NAME not in layer.state_dict()


def test_first_order_learns_the_weights_that_the_task_needs():
    """Two inputs matter, by small weights that grow; the others by large weights that training takes back."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 6, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(6, 8))
        layer.weight[:, :2] *= 0.1
    wanted = torch.zeros(6, 8)
    wanted[:, :2] = 2 * layer.weight.detach()[:, :2].sign()
    zero_order = copy.deepcopy(layer)
    movement = Movement({"layer": layer})
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(20):
        x = torch.randn(64, 8)
        optimizer.zero_grad()
        (layer(x) - x @ wanted.T).square().mean().backward()
        optimizer.step()
    movement.keep = 0.25
    assert movement.masks()["layer"][:, :2].all()
    other = Movement({"layer": zero_order}, criterion="magnitude")
    other.keep = 0.25
    assert not other.masks()["layer"][:, :2].any()


@pytest.mark.parametrize("change, message", [
    ({"pattern": "square"}, "pattern is 'square'; needs one of element, block:SIZE, row, column"),
    ({"pattern": "block:0"}, "pattern is 'block:0'"), ({"pattern": "block"}, "pattern is 'block'"),
    ({"scope": "layer"}, "scope is 'layer'; needs one of matrix, global"), ({"layers": {}}, "nothing to prune")])
def test_unknown_names_are_refused(change, message):
    layer = a_layer()
    with pytest.raises(ArgumentError, match=message):
        Movement(**{"layers": {"layer": layer}} | change)
    assert "forward" not in vars(layer) and not hasattr(layer, NAME)


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, True, "all", float("nan")])
def test_a_share_that_is_none_is_refused(keep):
    movement = Movement({"layer": a_layer()})
    with pytest.raises(ArgumentError, match="keep is .*; needs a number above 0, at most 1"):
        movement.keep = keep
