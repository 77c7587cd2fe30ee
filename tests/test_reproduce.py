"""lowfat reproduce: what it runs is what the library does, a verdict follows from the runs, a kill costs no finished run."""
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

import lowfat
from lowfat.errors import ArgumentError
from lowfat.evaluate import evaluate
from lowfat.job import open_model
from lowfat.reproduce import PAPERS, reproduce
from lowfat.reproduce.job import LONGER, Cell, cells_of, longer_cells
from lowfat.reproduce.page import markdown, sentences, texts
from lowfat.reproduce.papers import Claim, Paper
from lowfat.reproduce.recipes import RECIPES
from lowfat.reproduce.tasks import GLUE, QUICK_ROWS, TASKS, Kind, open_task
from lowfat.reproduce.verdict import compared, judged, summary
from test_resume import dying
from tiny_text import classifier, rows, tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny encoder, and a task `sections` of its words."""
    folder = tmp_path_factory.mktemp("reproduce")
    torch.manual_seed(0)
    classifier().bert.save_pretrained(folder / "encoder")
    tokenizer().save_pretrained(folder / "encoder")
    (folder / "data" / "sections").mkdir(parents=True)
    for split, part in (("train", rows(60)), ("test", rows(100)[60:])):
        lines = (json.dumps(row) for row in part)
        (folder / "data" / "sections" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "data" / "sections" / "labels.json").write_text('["thing", "animal"]')
    return folder


def run(work, **changes):
    options = {"paper": "fwsvd", "out": work / "out", "data": work / "data", "encoder": work / "encoder", "quick": True,
               "autocast": False, "steps": 20} | changes
    return reproduce(options.pop("paper"), **options)


@pytest.fixture(scope="module")
def found(work):
    return run(work)


# ------------------------------------------------------------------------------------------------ an experiment
def test_every_recipe_is_run_and_judged(work, found):
    cells = {cell["recipe"]: cell for cell in found["cells"]}
    assert list(cells) == ["teacher", "fwsvd_only", "svd_only", "fwsvd", "svd"]  # of its claims
    assert all(0 <= cell["score"] <= 1 for cell in cells.values())
    assert all(cell["kept"] <= (1 if name == "teacher" else 0.25) for name, cell in cells.items())
    assert [claim["verdict"] in ("held", "a tie", "the opposite") for claim in found["claims"]] == [True, True]
    assert json.loads((work / "out" / "reproduce.json").read_text()) == json.loads(json.dumps(found))
    assert (work / "out" / "reproduce.png").stat().st_size > 1000 and not (work / ".out.progress").exists()


def test_a_cell_is_what_the_library_gives(work, found):
    """The teacher's folder factorized and trained by hand: the same score."""
    folder = next((work / "data" / "teachers").glob("sections-*"))
    model, words = open_model(folder, task="classification")
    lowfat.factorize(model, lowfat.plan(model, method="svd", ratio=0.25, policy="per_matrix"))
    lowfat.finetune(model, rows(60), tokenizer=words, task="classification", steps=20, learning_rate=2e-4, max_length=32,
                    autocast=False)
    expected = evaluate(model, rows(100)[60:], words, task="classification", max_length=32)["accuracy"]
    assert next(cell["score"] for cell in found["cells"] if cell["recipe"] == "svd") == expected


def test_a_quick_run_says_so_on_every_line(found):
    assert all(line.startswith("quick run: ") for line in sentences(found))
    assert all("(quick run)" in row["steps"] for row in texts(found["cells"], True))
    assert markdown(found).startswith("# Quick run: ")
    plain = {**found, "about": found["about"] | {"quick": False}}
    assert "quick" not in markdown(plain).lower().replace("--quick", "")


def test_a_killed_run_goes_on(work, found, monkeypatch):
    """Killed after the third run: those before it are read, and the numbers are those of a run that was not."""
    done = []
    original = {name: RECIPES[name] for name in PAPERS["fwsvd"].recipes()}
    for name, recipe in original.items():
        def make(setting, name=name, recipe=recipe):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(name)
            return recipe.make(setting)
        monkeypatch.setitem(RECIPES, name, recipe._replace(make=make))
    with pytest.raises(KeyboardInterrupt):
        run(work, out=work / "killed")
    assert done == ["fwsvd_only", "svd_only", "fwsvd"] and (work / ".killed.progress").is_dir()
    with pytest.raises(ArgumentError, match="options.steps was 20, is now 21"):
        run(work, out=work / "killed", steps=21)
    done.clear()
    for name, recipe in original.items():
        monkeypatch.setitem(RECIPES, name, recipe._replace(make=lambda s, n=name, r=recipe: (done.append(n), r.make(s))[1]))
    again = run(work, out=work / "killed")
    assert done == ["svd"]
    assert [cell["score"] for cell in again["cells"]] == [cell["score"] for cell in found["cells"]]


def test_a_claim_that_did_not_hold_gets_more_steps(work, monkeypatch):
    """Both sides of it, once; those that hold, and those about nothing trained, do not."""
    claims = (Claim("one", "svd", "whitened", ""), Claim("two", "fwsvd_only", "svd_only", ""))
    rows = [{"task": "sections", "ratio": 0.25, **claim._asdict(), "verdict": "a tie"} for claim in claims]
    due = [Cell("sections", 0.25, name, LONGER * 10, 0) for name in ("svd", "whitened")]
    assert longer_cells(rows, 10) == due
    assert longer_cells([rows[0] | {"verdict": "held"}, rows[1]], 10) == []
    monkeypatch.setitem(PAPERS, "fwsvd", Paper("a paper", (Claim("none", "svd", "svd_only", "nothing"),)))
    # not quick: all steps of a teacher would be trained
    monkeypatch.setitem(TASKS, "sections", Kind("classification", 32, 60, 40, 2))
    found = run(work, out=work / "longer", quick=False, seeds=2, steps=20)
    trained = [(cell["recipe"], cell["seed"]) for cell in found["cells"]]
    assert trained == [("teacher", 0), ("svd", 0), ("svd", 1), ("svd_only", 0)]
    assert found["longer"] == [] and len(found["claims"][0]["gains"]) == 1


# ------------------------------------------------------------------------------------------------ verdicts
def cell(recipe, seed, score, kind="accuracy", task="sections", steps=10):
    return {"task": task, "ratio": 0.25, "recipe": recipe, "seed": seed, "score": score, "score_is": kind, "steps": steps,
            "kept": 0.25, "seconds": 1.0}


@pytest.mark.parametrize("gain, verdict", [(0.021, "held"), (0.019, "a tie"), (-0.019, "a tie"), (-0.021, "the opposite")])
def test_under_two_points_is_a_tie(gain, verdict):
    claim = Claim("", "a", "b", "")
    def found(shift):
        rows = [cell("a", seed, 0.5 + gain + one) for seed, one in enumerate((-shift, 0, shift))]
        return compared(claim, [*rows, *(cell("b", seed, 0.5) for seed in range(3))])

    assert found(0.01)["verdict"] == verdict and found(0.01)["gain"] == pytest.approx(gain, abs=1e-12)
    assert found(0.01)["gains"] == pytest.approx([gain - 0.01, gain, gain + 0.01], abs=1e-12)
    # a seed that says the opposite
    assert found(0.1)["verdict"] == ("a tie" if verdict == "a tie" else "mixed")
    assert compared(claim._replace(of_no_loss=True), [cell("a", 0, 0.5 + gain), cell("b", 0, 0.5)])["verdict"] == (
        "the opposite" if verdict == "the opposite" else "held")


def test_of_nats_less_is_better():
    claim = Claim("", "a", "b", "")
    for a, b, verdict in ((4.0, 4.1, "held"), (4.1, 4.0, "the opposite"), (4.0, 4.005, "a tie")):
        assert compared(claim, [cell("a", 0, a, "nats_per_token"), cell("b", 0, b, "nats_per_token")])["verdict"] == verdict


def test_a_run_that_diverged_decides_nothing():
    claim = Claim("", "a", "b", "")
    assert compared(claim, [cell("a", 0, None), cell("b", 0, 0.5)]) == {"verdict": "failed", "gain": None, "gains": []}
    one = summary([cell("a", 0, None), cell("a", 1, 0.5)])[0]
    assert one["failed"] == 1 and one["mean"] == 0.5 and one["spread"] is None


def test_only_a_claim_that_did_not_hold_has_a_longer_run_though_another_shares_a_side():
    claims = [Claim("", "a", "b", ""), Claim("", "a", "c", ""), Claim("", "b", "c", "")]
    cells = [cell("a", 0, 0.6), cell("b", 0, 0.5), cell("c", 0, 0.6)]
    rows = judged(claims, cells, [cell("a", 0, 0.7, steps=40), cell("c", 0, 0.6, steps=40)])
    assert [row["verdict"] for row in rows] == ["held", "a tie", "the opposite"]
    assert ["longer" in row for row in rows] == [False, True, False]


def test_each_task_has_its_own_verdict_and_the_longer_run_stands_beside():
    claim = Claim("", "a", "b", "")
    cells = [cell("a", 0, 0.6), cell("b", 0, 0.5), cell("a", 0, 0.5, task="pairs"), cell("b", 0, 0.5, task="pairs")]
    rows = judged([claim], cells, [cell("a", 0, 0.7, task="pairs", steps=40), cell("b", 0, 0.5, task="pairs", steps=40)])
    assert [(row["task"], row["verdict"]) for row in rows] == [("sections", "held"), ("pairs", "a tie")]
    assert "longer" not in rows[0] and rows[1]["longer"]["verdict"] == "held" and rows[1]["longer"]["steps"] == 40


# ------------------------------------------------------------------------------------------------ papers, tasks, input
def test_papers_name_recipes_and_tasks_that_there_are():
    for paper in PAPERS.values():
        assert set(paper.recipes()) <= RECIPES.keys() and set(paper.tasks) <= TASKS.keys()
        kinds = {TASKS[task].task for task in paper.tasks}
        assert kinds == {"lm" if recipe.endswith("_lm") else "classification" for recipe in paper.recipes()}
        trained = [RECIPES[recipe].trains for recipe in paper.recipes()]
        assert any(trained) == bool(paper.steps)
    assert {"gupta", "fwsvd", "dsformer", "cospadi", "sltrain", "wara"} <= PAPERS.keys()


def test_seeds_are_for_what_is_trained():
    cells = cells_of(PAPERS["fwsvd"], {"sections": 0.25}, 300, 3, {"sections": Path("t")})
    seeds = {}
    for one in cells:
        seeds.setdefault(one.recipe, []).append((one.steps, one.seed))
    assert seeds["teacher"] == seeds["fwsvd_only"] == [(0, 0)] and seeds["svd"] == [(300, 0), (300, 1), (300, 2)]
    assert len({one.name for one in cells}) == len(cells)


@pytest.mark.parametrize("changes, said", [
    ({"paper": "bert"}, "paper must be one of gupta, fwsvd, .*; found 'bert'"),
    ({"tasks": {"imdb": 0.5}}, "task must be one of modules, sections, .*; found 'imdb'"),
    ({"tasks": {"pairs": 0.5}}, "pairs: there is no task pairs; derive it with `python bench/tasks.py`"),
    ({"tasks": {"sections": 0.0}}, "ratio of sections is 0.0; needs above 0"), ({"tasks": {}}, "tasks is empty"),
    ({"seeds": 0, "quick": False}, "seeds is 0; needs a whole number, at least 1"),
    ({"steps": 5}, "steps is 5; fwsvd trains, .* needs at least 20"), ({"tasks": {"sections": 1.0}}, "ratio of sections is 1"),
    ({"jobs": 0}, "jobs is 0; needs a whole number, at least 1"),
    ({"paper": "sltrain", "tasks": {"sections": 0.5}}, "sections is a task of classification; sltrain needs lm"),
    ({"encoder": Path("/nowhere")}, "/nowhere: no such folder")])
def test_bad_input_is_named_before_any_work(work, found, changes, said):
    with pytest.raises(ArgumentError, match=said):
        run(work, out=work / "bad", **changes)
    assert not (work / "bad").exists() and not (work / ".bad.progress").exists()


def test_a_result_is_not_overwritten(work, found):
    with pytest.raises(ArgumentError, match="out"):
        run(work)


def test_a_task_needs_no_file(tmp_path):
    data = open_task("modules", tmp_path)
    train, test = ({row["text"] for row in part} for part in (data.train, data.test))
    assert not train & test and len(train) > 3 * len(test) - 4 and {"torch.nn", "os"} <= set(data.labels)
    assert {row["label"] for row in data.train} == set(range(len(data.labels)))
    assert next(row["label"] for row in data.train if "ReLU" in row["text"]) in (
        data.labels.index("torch.nn"), data.labels.index("torch.nn.functional"))


def test_tasks_of_the_hub_become_the_same_rows(monkeypatch, tmp_path):
    """The hub itself is not at hand: a stand-in with what datasets.load_dataset(streaming=True) gives."""
    asked = []

    class Stream(list):
        features = {"label": types.SimpleNamespace(names=["no", "yes"])}

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return Stream({"sentence1": f"a{n}", "sentence2": f"b{n}", "label": n % 2, "idx": n} for n in range(10_000))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = open_task("glue/mrpc", tmp_path, quick=True)
    assert asked == [("nyu-mll/glue", "mrpc", "train", True), ("nyu-mll/glue", "mrpc", "validation", True)]
    assert data.train[1] == {"text_a": "a1", "text_b": "b1", "label": 1} and data.labels == ["no", "yes"]
    assert len(data.train) == QUICK_ROWS["train_rows"] and len(data.test) == QUICK_ROWS["test_rows"]
    assert {len(kind.texts) for kind in GLUE.values()} == {1, 2}


def test_without_datasets_the_hub_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ArgumentError, match="needs the package datasets"):
        open_task("glue/sst2", tmp_path)


def test_the_best_recipe_is_set_against_the_teacher():
    teacher = cell("teacher", 0, 0.8, steps=0) | {"ratio": 1.0}
    found = {"about": {"quick": False}, "claims": [], "cells": [
        teacher, cell("svd", 0, 0.6), cell("svd", 1, 0.7), cell("fwsvd", 0, 0.64), cell("lpaf", 0, None)]}
    assert sentences(found) == ["the best recipe on sections is svd, -15.0 of the teacher."]


def test_a_perplexity_is_shown_as_one():
    found = {"about": {"quick": False}, "cells": [cell("a", 0, 4.0, "nats_per_token")], "claims": [
        {"task": "sections", "ratio": 1.0, "text": "a claim", "verdict": "held", "gain": 0.1, "gains": [0.1],
         "published": "figures"}]}
    assert sentences(found) == [f"a claim (sections, 100%): held, {100 * (1 - math.exp(-0.1)):+.1f} %, one seed. Published: "
                                "figures."]
