"""form="pivoted": the same weight of a larger rank for the same budget, whatever method found it."""
import copy

import pytest
import torch
from torch import nn

import lowfat
from lowfat.calibrate import calibrate
from lowfat.errors import ArgumentError
from lowfat.layers import factorizable
from lowfat.methods import METHODS
from lowfat.structures import LowRank, LowRankPivoted, structures
from lowfat.structures.low_rank_pivoted import rank_for

from .test_methods import stats_for

METHODS_OF_LOW_RANK = ["svd", "fwsvd", "whitened", "kfac"]
every_method = pytest.mark.parametrize("method", METHODS_OF_LOW_RANK)


@every_method
@pytest.mark.parametrize("shape", [(14, 9), (9, 14)])
def test_it_is_the_weight_of_the_factors(method, shape):
    weight, bias = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    stats = stats_for(weight)
    plain, events = METHODS[method].factorize(weight, bias, stats, rank=4)
    layer, more = METHODS[method].factorize(weight, bias, stats, rank=4, form="pivoted")
    assert type(layer) is LowRankPivoted and type(plain) is LowRank and events == more == []
    assert (layer.dense() - plain.dense()).norm() <= 1e-12 * weight.norm() and torch.equal(layer.bias, bias)
    stored = METHODS[method].stored(shape[1], shape[0], rank=4, form="pivoted")
    assert stored == (layer.v.numel() + layer.c.numel(), layer.pivots.nbytes) == (4 * (14 + 9 - 4), 32)
    assert METHODS[method].stored(shape[1], shape[0], rank=4) == (4 * (14 + 9), 0)
    curves = [METHODS[method].losses(weight, stats, **arguments) for arguments in ({}, {"form": "pivoted"})]
    assert torch.equal(*curves)


def test_a_weight_of_a_lower_rank_keeps_its_factors_and_says_so():
    layer, events = METHODS["svd"].factorize(torch.zeros(6, 5), None, None, rank=2, form="pivoted")
    assert type(layer) is LowRank
    assert events == ["not pivoted: the factors are of a lower rank than their 2 directions; pivots do not exist"]


@every_method
@pytest.mark.parametrize("policy", ["per_matrix", "uniform_rank", "allocated", "knapsack"])
def test_the_budget_is_met_as_stored_with_more_rank(tiny_bert, method, policy):
    batches = [{"input_ids": torch.randint(0, 97, (4, 12)), "labels": torch.randint(0, 3, (4,))} for _ in range(4)]
    stats = calibrate(tiny_bert, batches, fisher="kronecker")
    plans = [lowfat.plan(tiny_bert, method=method, ratio=0.6, policy=policy, stats=stats, arguments=arguments)
             for arguments in ({}, {"form": "pivoted"})]
    if policy in ("per_matrix", "uniform_rank"):  # the others may put it all into a few layers, or leave some dense
        ranks = [sum(choice.arguments.get("rank", 32) for choice in made.values()) for made in plans]
        assert ranks[1] > ranks[0]
    report = lowfat.factorize(tiny_bert, plans[1], stats)
    totals = plans[1].totals()
    assert report.parameters == totals["parameters"] <= 0.6 * report.dense_parameters
    assert sum(layer.index_bytes for layer in report.layers) == totals["index_bytes"] > 0
    assert all(type(layer) is LowRankPivoted for _, layer in structures(tiny_bert))


def test_a_plan_keeps_the_rank_that_the_rule_gives():
    """The largest rank that fits, in the plan's steps; the paper's rule counts indices as numbers too."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(256, 192))])
    choice, = lowfat.plan(model, method="svd", ratio=0.5, arguments={"form": "pivoted"}).values()
    exact = max(rank for rank in range(1, 192) if rank * (256 + 192 - rank) <= 0.5 * 256 * 192)
    assert 0 <= exact - choice.arguments["rank"] < 8 and exact - 1 <= rank_for(256, 192, 0.5, step=1) <= exact
    assert choice.arguments["rank"] > 0.5 * 256 * 192 / (256 + 192) * 1.1


def test_the_papers_pipeline_loses_less_at_the_same_size(tiny_llama, tmp_path):
    """Pivoted ranks, then the update on the model's own inputs: plan, factorize, update, save."""
    for module in factorizable(tiny_llama).values():
        module.weight.data *= 8
    dense, batches = copy.deepcopy(tiny_llama), [{"input_ids": torch.randint(0, 97, (4, 12))} for _ in range(8)]
    stats, gaps = calibrate(tiny_llama, batches), []
    for form in ("factors", "pivoted"):
        model = copy.deepcopy(dense)
        made = lowfat.plan(model, method="whitened", ratio=0.6, stats=stats, arguments={"form": form})
        lowfat.factorize(model, made, stats)
        for _ in range(2):
            with torch.no_grad():
                gaps.append(float(sum((model(**one).logits - dense(**one).logits).square().sum() for one in batches)))
            lowfat.update(model, dense, batches, dense_share=1.0)
    assert gaps[2] < gaps[0] and gaps[3] < gaps[1] and gaps[3] < gaps[2]
    lowfat.save(model, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(lowfat.load(tmp_path / "out")(**batches[0]).logits, model(**batches[0]).logits)


def test_layers_cannot_share_what_is_pivoted(tiny_bert):
    with pytest.raises(ArgumentError, match="layers whose low rank is pivoted have rows of their own"):
        lowfat.plan(tiny_bert, method="svd", ratio=0.5, share=2, arguments={"form": "pivoted"})
