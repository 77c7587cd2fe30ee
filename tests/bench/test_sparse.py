"""bench/models/sparse.py: equal bits, masks counted, and a page that says what the numbers do."""
import sys
from pathlib import Path

import pytest
import torch

import lowfat

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH / "models"))
import sparse  # noqa: E402  (no package)


@pytest.mark.parametrize("method", sparse.ORDER)
@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_masks_are_paid_for(method, ratio, tiny_bert):
    stats = lowfat.calibrate(tiny_bert, [{"input_ids": torch.randint(0, 97, (4, 12))}])
    plan, bits = sparse.plan_of(tiny_bert, {"method": method, "ratio": ratio, "policy": "per_matrix"}, stats)
    totals = plan.totals()
    assert bits == (16 * totals["parameters"] + 8 * totals["index_bytes"]) / (16 * totals["dense_parameters"]) <= ratio
    assert bits > ratio - 0.15  # these matrices are small: a step of the ladder is a tenth
    assert (totals["index_bytes"] > 0) is (method != "whitened")


@pytest.mark.parametrize("gains, words", [([0.02, 0.03, 0.02], "holds"), ([0.05, -0.01, 0.02], "holds in the mean"),
                                          ([-0.02, -0.03, 0.0], "**does not hold**"), ([0.02, -0.01, 0.0], "a tie")])
def test_verdict(gains, words):
    assert sparse.verdict(gains) == words


def test_the_grid_is_that_of_the_question_and_the_page_has_all_of_it():
    cells = sparse.cells()
    assert len(cells) == 1 + 3 * 3 * 7 and {cell["ratio"] for cell in cells[1:]} == {0.8, 0.7, 0.5}
    values = {"dense": 0.8} | {method: 0.7 - 0.1 * place for place, method in enumerate(sparse.ORDER)}
    rows = [{"task": "sections", **cell, "value": values[cell["method"]], "rows": 2000, "bits": cell["ratio"],
             "output_errors": {"384 to 384": 0.25}, "solver_cpu_seconds": 3.0} for cell in cells]
    about = {"machine": {"cpu": "x", "cores": 2, "threads": 1}, "versions": {"python": "3", "torch": "2"}}
    text = sparse.page(rows, about)
    assert text.count("| whitened |") == 6 and text.count("| cospadi |") == 3
    assert "| 50.0% | compot | knapsack | 50.0 | 50.0 | 50.0 | 50.0 | 30.0 | 3 |" in text
    assert "compot above rocket at 50%, knapsack: **does not hold** (-10.0, -10.0, -10.0 points); relative error of the " \
        "outputs, rocket: 384 to 384 0.250; compot: 384 to 384 0.250" in text
