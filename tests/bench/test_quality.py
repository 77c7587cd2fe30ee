"""The table of bench/models/quality.py: what it says when an ordering holds, and when it does not."""
import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "models" / "quality.py"


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module
    spec.loader.exec_module(module)
    return module


def row(method, accuracy, seed, ratio=0.5, policy="per_matrix"):
    kept = 1.0 if method == "dense" else 0.498
    return {"task": "pairs", "seed": seed, "method": method, "ratio": 1.0 if method == "dense" else ratio,
            "policy": "" if method == "dense" else policy, "kept": kept, "accuracy": accuracy, "standard_error": 0.011}


@pytest.fixture
def rows():
    found = {"dense": (0.9, 0.92), "svd": (0.5, 0.54), "fwsvd": (0.6, 0.52), "whitened": (0.8, 0.53)}
    return [row(method, accuracy, seed) for method, both in found.items() for seed, accuracy in enumerate(both)]


def test_an_ordering_that_fails_for_one_seed_is_said(quality, rows):
    lines = quality.orderings(rows, "pairs")
    assert lines == ["- whitened above fwsvd at 50%, per_matrix: holds (+20.0, +1.0 points for seeds [0, 1])",
                     "- whitened above svd at 50%, per_matrix: **does not hold** (+30.0, -1.0 points for seeds [0, 1])"]


def test_the_table_shows_every_seed_the_mean_and_the_loss(quality, rows):
    about = {"machine": {"cpu": "a processor", "cores": 2, "threads": 1},
             "versions": {"python": "3", "torch": "2", "transformers": "5"},
             "teacher": {"learning_rate": 1e-4, "batch_size": 32, "dtype": "fp32", "steps": {"pairs": 4},
                         "rows": {"pairs": 64}},
             "calibration": {"rows": 8, "batch_size": 4}, "evaluation_dtype": "fp32",
             "tasks": {"pairs": {"sha256": {"train": "ab" * 32}, "test_rows": 100, "chance": 0.521,
                                 "reference_teacher": 0.902}}}
    text = quality.table(rows, about)
    assert "| 49.8% | whitened | per_matrix | 80.0 | 53.0 | 66.5 | 24.5 |" in text
    assert "| 100.0% | dense |  | 90.0 | 92.0 | 91.0 |  |" in text
    assert "chance 52.1" in text and "`abababababababab`" in text and "4 steps on 64 rows" in text


def test_cells_cover_every_method_ratio_and_policy_once(quality):
    cells = quality.cells(quality.TASKS["sections"])
    assert len(cells) == 1 + 3 * 2 * 2 and len({tuple(cell.values()) for cell in cells}) == len(cells)
    assert len(quality.cells(quality.TASKS["pairs"])) == 1 + 3 * 2
