"""The page of bench/models/structures.py: a claim is supported, contradicted or a tie by the numbers alone."""
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH / "models"))
import structures  # noqa: E402  (no package)


@pytest.mark.parametrize("gains, words", [
    ([0.03, 0.02], "supported"), ([-0.02, -0.1], "contradicted"), ([0.01, -0.019], "not supported, ties"),
    ([0.05, 0.0], "supported in part"), ([0.05, -0.05], "not supported, mixed"), ([0.0, -0.05], "not supported, mixed")])
def test_verdict(gains, words):
    assert structures.verdict(gains) == words


def rows(recovery, means, collapsed):
    return [{"method": "svd", "ratio": 0.5, "recovery": recovery, "learning_rate": rate, "mean": mean, "collapsed": share,
             "steps": 400} for rate, mean, share in zip((5e-5, 1e-4), means, collapsed)]


@pytest.mark.parametrize("shares, words", [
    ((0.0, 1 / 3), "supported"), ((1 / 3, 2 / 3), "not supported"), ((2 / 3, 2 / 3), "contradicted"), ((0.0, 1.0), "mixed")])
def test_staging(shares, words):
    summary = rows("finetune", (0.6, 0.7), (1 / 3, 2 / 3)) + rows("staged", (0.65, 0.7), shares)
    collapse, mean = structures.staging(summary)
    assert f"**{words}**" in collapse and "33% against" in collapse and "67% against" in collapse
    assert "**supported in part** (rate 5e-05 +5.0, rate 0.0001 +0.0 points, 400 steps in all)" in mean


def test_structures_compares_like_with_like():
    means = {"svd": 0.7, "block_low_rank:blocks=4": 0.6, "monarch:blocks=4": 0.59, "whitened": 0.8,
             "block_low_rank:blocks=4:fit=outputs": 0.8, "monarch:blocks=4:fit=outputs": 0.9}
    summary = [{"method": method, "ratio": 0.5, "recovery": recovery, "learning_rate": rate, "mean": mean + more}
               for method, mean in means.items() for recovery, rate, more in (("none", None, -0.3), ("finetune", 1e-4, 0))]
    lines = structures.structures(summary)
    assert len(lines) == 6 and "**supported** (points, trained: +11.0 at 50%; not trained: +11.0 at 50%)" in lines[0]
    assert "block-wise low rank is ahead of Monarch: **not supported, ties** (points, trained: +1.0 at 50%" in lines[2]
    assert "nearest outputs: low rank is ahead of Monarch: **contradicted** (points, trained: -10.0 at 50%" in lines[3]


def test_a_method_that_always_diverged_decides_nothing():
    summary = rows("finetune", (0.6, None), (0.0, 1.0)) + rows("staged", (0.65, 0.7), (0.0, 0.0))
    assert "**not decided, every run of a method diverged**" in structures.staging(summary)[1]
