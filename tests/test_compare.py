"""lowfat compare: what it compares is what the library does, means are means, and a kill costs nothing that was finished."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import lowfat
from lowfat import storage
from lowfat.comparison.grid import DENSE, Cell, grid, parsed
from lowfat.comparison.summary import chance, findings, is_collapsed, markdown, summary
from lowfat.errors import ArgumentError, LowfatError
from lowfat.job import open_model
from lowfat.recovery import finetune
from test_resume import dense_model, dying, stages_of, where
from tiny_text import rows, tokenizer

TRAIN, TEST = rows(16), rows(40)[16:]


def run(work, **changes):
    options = {"out": work / "out", "methods": ("svd", "monarch:blocks=2"), "ratios": (0.5,), "learning_rates": (1e-3,),
               "recoveries": ("none", "finetune"), "seeds": 2, "steps": 4, "batch_size": 4, "max_length": 12,
               "autocast": False} | changes
    return lowfat.compare(work / "dense", TRAIN, TEST, **options)


def plain(found):
    """Without what a clock says."""
    return [{name: value for name, value in cell.items() if name != "seconds"} for cell in found["cells"]]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    dense_model(folder / "dense")
    return folder


@pytest.fixture(scope="module")
def found(work):
    return run(work)


# ------------------------------------------------------------------------------------------------ the grid
def test_the_grid_has_every_cell_once():
    cells = grid(["svd", "monarch:blocks=8"], [0.5, 0.25], ["none", "finetune"], [1e-4, 1e-3], 3)
    assert cells[0] == DENSE and len(cells) == len(set(cells)) == 1 + 2 * 2 * (1 + 2 * 3)
    assert len({cell.name for cell in cells}) == len(cells)
    assert cells[-1] == Cell("monarch", '{"blocks": 8}', 0.25, "finetune", 1e-3, 2)
    assert cells[-1].name == "monarch-blocks=8-0.25-finetune-0.001-seed2" and cells[-1].label == "monarch:blocks=8"
    assert parsed("compot:pattern=2:4:dense_share=0.5") == ("compot", '{"dense_share": 0.5, "pattern": "2:4"}')


MISTAKES = {
    "methods must be a list of at least one": {"methods": []},
    "methods has a value twice": {"methods": ["svd", "svd"]},
    "method must be one of": {"methods": ["magic"]},
    "svd has no argument 'blocks'": {"methods": ["svd:blocks=2"]},
    "needs NAME=VALUE": {"methods": ["monarch:blocks"]},
    "monarch: blocks must be a whole number or two": {"methods": ["monarch:blocks=2.5"]},
    "blocks must be between 1 and 32": {"methods": ["monarch:blocks=33"]},
    "methods has a value twice: fwsvd": {"methods": ["fwsvd:side=in:exact=true", "fwsvd:exact=true:side=in"]},
    "ratios must be a list": {"ratios": 0.5},
    "ratios must lie above 0 and below 1": {"ratios": [0.5, 1.0]},
    "parameters are too few; rank 1 everywhere": {"methods": ["svd", "monarch:blocks=8"], "ratios": [0.2]},
    "learning_rates must lie above 0; found nan": {"learning_rates": [math.nan]},
    "recoveries must be of none, finetune, staged, straight_through, mixed_rank, theseus, lpaf": {"recoveries": ["sleep"]},
    "seeds is 0": {"seeds": 0},
    "steps is 0": {"steps": 0},
    "2 stages, and 0.5 of the steps after them, need 4": {"steps": 2, "recoveries": ["staged"]},
    "steps is 1; prune_share 0.5 leaves none": {"steps": 1, "recoveries": ["lpaf"]},
    "jobs is 1.5": {"jobs": 1.5},
    "policy must be one of": {"policy": "fair"},
    "task is 'poetry'": {"task": "poetry"},
    "matches no linear layer": {"layers": ["nothing.*"]},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named_before_any_work(work, tmp_path, message):
    with pytest.raises(LowfatError, match=re.escape(message)):
        run(work, out=tmp_path / "out", **MISTAKES[message])
    assert not list(tmp_path.iterdir())


def test_texts_without_labels_are_refused(work, tmp_path):
    with pytest.raises(ArgumentError, match='no "label"'):
        lowfat.compare(work / "dense", TRAIN, [{"text": "the cat"}], out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(work, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ArgumentError, match="exists already"):
        run(work, out=tmp_path / "out")


# ------------------------------------------------------------------------------------------------ the cells
def test_cells_are_what_the_library_makes(work, found):
    made = {(cell["method"], cell["recovery"], cell["seed"]): cell for cell in found["cells"]}
    assert len(made) == len(found["cells"]) == 1 + 2 * (1 + 2)
    judge = partial(lowfat.evaluate, rows=TEST, tokenizer=tokenizer(), max_length=12)
    dense = open_model(work / "dense")[0]
    assert made["dense", "none", None]["numbers"] == judge(dense)
    for label, name, arguments in (("svd", "svd", {}), ("monarch:blocks=2", "monarch", {"blocks": 2})):
        model = open_model(work / "dense")[0]
        report = lowfat.factorize(model, lowfat.plan(model, method=name, ratio=0.5, arguments=arguments))
        untrained = made[label, "none", None]
        assert untrained["numbers"] == judge(model) and untrained["steps"] == 0
        assert untrained["kept"] == report.ratio <= 0.5
        finetune(model, TRAIN, tokenizer=tokenizer(), steps=4, learning_rate=1e-3, batch_size=4, max_length=12, seed=1,
                 autocast=False)
        assert made[label, "finetune", 1]["numbers"] == judge(model) and made[label, "finetune", 1]["steps"] == 4


@pytest.mark.parametrize("recovery", ["staged", "straight_through", "mixed_rank", "theseus", "lpaf"])
def test_what_factorizes_itself_spends_as_many_steps(work, tmp_path, recovery):
    made = run(work, out=tmp_path / "out", methods=("svd", "monarch:blocks=2"), recoveries=(recovery,), seeds=1)["cells"]
    assert [cell["steps"] for cell in made] == [0, 4, 4] and made[1]["kept"] <= 0.5 and not made[1]["failed"]
    model = open_model(work / "dense")[0]
    report = getattr(lowfat, recovery)(model, TRAIN, tokenizer=tokenizer(), method="monarch", arguments={"blocks": 2},
                                       ratio=0.5, steps=4, learning_rate=1e-3, batch_size=4, max_length=12, autocast=False)
    assert made[2]["numbers"] == lowfat.evaluate(model, TEST, tokenizer(), max_length=12)
    assert made[2]["kept"] == report.factorized.ratio


def test_what_is_written(work, found):
    assert sorted(path.name for path in work.iterdir()) == ["dense", "out"]
    assert json.loads((work / "out" / "compare.json").read_text()) == json.loads(json.dumps(found))
    assert (work / "out" / "compare.md").read_text() == markdown(found)
    assert (work / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    speed = {row["method"]: row for row in found["speed"]}
    assert speed["svd"]["bytes"] < speed["dense"]["bytes"]
    for row in found["speed"][1:]:
        assert (row["one_texts"], row["many_texts"], row["threads"]) == (1, len(TEST), 1)
        for low, middle, high in (row["one_faster"], row["many_faster"]):
            assert 0 < low <= middle <= high


def test_statistics_are_gathered_once_and_used(work, tmp_path):
    found = run(work, out=tmp_path / "out", recoveries=("none",),
                methods=("whitened", "fwsvd", "monarch:blocks=2:fit=outputs"))
    assert [cell["failed"] for cell in found["cells"]] == [""] * 4 and not list(tmp_path.glob(".*"))


def test_several_processes_find_the_same(work, found, tmp_path):
    seen = []
    again = run(work, out=tmp_path / "out", jobs=2, on_progress=lambda done, total, what: seen.append((done, total)))
    assert plain(again) == plain(found)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] and len({total for _, total in seen}) == 1


def test_killed_with_several_processes(work, tmp_path):
    (tmp_path / "dense").symlink_to(work / "dense")
    options = {"methods": ("whitened", "svd"), "recoveries": ("none", "finetune"), "seeds": 1, "jobs": 2, "steps": 400}
    storage.write_json(tmp_path / "text.json", options)
    code = ("import json, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_compare; "
            "test_compare.run(Path(sys.argv[2]), **json.loads(Path(sys.argv[2], 'text.json').read_text()))")
    child = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], start_new_session=True)
    states = tmp_path / ".out.progress"
    while not (any(states.glob("*-finetune-*.training/step-*")) or child.poll() is not None):
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)  # the job alone: its processes have to notice
    child.wait()
    assert not (tmp_path / "out").exists() and list(states.glob("*.json"))
    deadline = time.monotonic() + 60
    while True:
        try:
            found = run(tmp_path, **options)
            break
        except ArgumentError as error:  # until they are gone
            assert "another process is at work" in str(error) and time.monotonic() < deadline
            time.sleep(0.5)
    assert [cell["failed"] for cell in found["cells"]] == [""] * 5 and len(list(tmp_path.iterdir())) == 3


def test_a_training_that_diverges_is_a_collapsed_run(work, tmp_path):
    found = run(work, out=tmp_path / "out", methods=("svd",), recoveries=("finetune",), learning_rates=(1e30,), seeds=1)
    cell = found["cells"][1]
    assert cell["score"] is None and "needs a smaller learning_rate" in cell["failed"] and 0 < cell["kept"] <= 0.5
    assert found["summary"][1]["collapsed"] == 1 and "diverged" in markdown(found)


def test_killed_at_a_stage(work, tmp_path):
    (tmp_path / "dense").symlink_to(work / "dense")
    call = partial(run, tmp_path, methods=("svd",), recoveries=("finetune",))
    stages = stages_of(call, tmp_path / "log")
    expected = plain(json.loads((tmp_path / "out" / "compare.json").read_text()))
    for point in ("step 3", "S5", "compared", "timed", "last S3", "last S6", "progress removal"):
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out").rmdir()
        assert dying(where(stages, point), call) == -9, point
        assert plain(call()) == expected, point
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "log", "out"], point


def test_an_unfinished_job_may_ask_for_more_but_not_for_other_steps(work, tmp_path):
    (tmp_path / "dense").symlink_to(work / "dense")
    call = partial(run, tmp_path, methods=("svd",), recoveries=("finetune",))
    stages = stages_of(call, tmp_path / "log")
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    (tmp_path / "out").rmdir()
    dying(where(stages, "timed"), call)
    with pytest.raises(ArgumentError, match="options.steps was 4, is now 5"):
        call(steps=5)
    found = call(seeds=3, methods=("svd", "monarch"))
    assert len(found["cells"]) == 1 + 2 * 3 and len(found["speed"]) == 1 + 2


# ------------------------------------------------------------------------------------------------ what they say together
def made_up(scores: dict, base=0.5, test_rows=100):
    cells = [{"method": method, "ratio": ratio, "kept": ratio, "recovery": "finetune", "learning_rate": 1e-4, "seed": seed,
              "steps": 3, "stages_failed": 0, "score": score, "failed": "", "numbers": {},
              "seconds": None if seed else 2.0}
             for (method, ratio), values in scores.items() for seed, score in enumerate(values)]
    found = {"about": {"score": "accuracy", "chance": base, "test_rows": test_rows}, "cells": cells,
             "speed": [{"method": method, "ratio": ratio, "bytes": 10} for method, ratio in scores]}
    return found | {"summary": summary(found)}


def test_summary_is_mean_spread_and_share_of_collapsed():
    rows = made_up({("svd", 0.5): [0.9, 0.5, 0.7], ("monarch", 0.5): [0.6, None, 0.6]})["summary"]
    assert [row["method"] for row in rows] == ["svd", "monarch"]
    assert rows[0]["mean"] == pytest.approx(0.7) and rows[0]["spread"] == pytest.approx(0.2)  # 0.2 sqrt(2 / 2)
    assert (rows[0]["lowest"], rows[0]["highest"], rows[0]["collapsed"]) == (0.5, 0.9, 1 / 3)
    assert rows[1]["mean"] == pytest.approx(0.6) and rows[1]["collapsed"] == 1  # 0.6 = chance + 2 standard errors


def test_collapse_is_measured_against_chance():
    about = {"score": "accuracy", "chance": 0.5, "test_rows": 100}
    assert is_collapsed(0.6, about) and not is_collapsed(0.61, about) and is_collapsed(None, about)
    assert is_collapsed(3.5, {"score": "nats_per_token", "chance": 3.4, "test_rows": 9})


def test_findings_call_small_differences_ties():
    found = made_up({("svd", 0.5): [0.8, 0.8], ("block_low_rank", 0.5): [0.79, 0.79], ("monarch", 0.5): [0.7, 0.7]})
    assert findings(found) == ["- 50%, finetune, rate 0.0001: svd first; block_low_rank 1.0 points lower (a tie), "
                               "monarch 10.0 points lower"]


def test_findings_do_not_rank_what_is_at_chance():
    found = made_up({("svd", 0.5): [0.55, 0.5], ("monarch", 0.5): [0.5, 0.5]})
    assert findings(found) == ["- 50%, finetune, rate 0.0001: every run ended at chance, which tells nothing"]


def test_chance():
    one, two = ({"text": "x", "label": label} for label in (0, 1))
    assert chance("classification", [one, one, two], label2id={"a": 0, "b": 1}, vocabulary=9) == 2 / 3
    assert chance("lm", [], label2id={}, vocabulary=9) == math.log(9)
    assert chance("embedding", [one] * 2, label2id={}, vocabulary=9) == 0.75  # (1 + 1/2) / 2
