"""The command line: help that fits a screen, a mistake is one line and exit code 2, and the whole route."""
import io
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_text import classifier, rows, tokenizer
from typer.testing import CliRunner

from lowfat import show
from lowfat.cli import app, main
from lowfat.errors import ArgumentError

COMMANDS = ("demo", "factorize", "finetune", "staged", "straight-through", "lpaf", "compare", "reproduce", "pretrain",
            "evaluate", "inspect", "bench", "doctor")
STAGE = re.compile(r"(\w+): \d+ s")  # a line of progress where stderr is no terminal
MAIN = [sys.executable, "-c", f"from {main.__module__} import main; main()"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A classifier's folder."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    torch.manual_seed(0)
    classifier().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows(24))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to work in."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def lowfat(*arguments, code=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def refused(*arguments):
    """The one line that a command ends with."""
    before = sorted(Path().rglob("*"))
    done = lowfat(*arguments, code=2)
    assert done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if not STAGE.fullmatch(line))
    assert line.startswith("lowfat: ")
    assert sorted(Path().rglob("*")) == before  # nothing written, no temporary left
    return line


# ------------------------------------------------------------------------------------------------ help
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_shows_an_example(work, command):
    lines = lowfat(command, "--help").stdout.splitlines()
    assert len(lines) <= (28 if command == "compare" else 24) and max(map(len, lines)) <= 80
    assert example(command)[:2] == ["lowfat", command]


def example(command):
    """The words of the command's example."""
    text = re.search(r"Example:  (lowfat (?:.*\\\n)*.*)\n", lowfat(command, "--help").stdout)[1]
    return shlex.split(text.replace("\\\n", " "))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_uses_options_that_exist(work, command):
    # the nightly test below runs them; this one sees a renamed option
    options = set(re.findall(r"--[\w-]+", lowfat(command, "--help").stdout.split("Options:")[1]))
    assert {word for word in example(command) if word.startswith("--")} <= options


def test_the_list_of_commands(work):
    assert all(re.search(rf"^  {command} ", lowfat("--help").stdout, re.M) for command in COMMANDS)


# ------------------------------------------------------------------------------------------------ mistakes
MISTAKES = {
    "missing folder": ("nowhere/model out --calibrate {texts}", "nowhere/model: no such folder"),
    "not on the hub": ("no-such-model out --calibrate {texts}", "no-such-model: no such folder, and not to be fetched"),
    "not a model": ("{empty} out --calibrate {texts}", "no config.json, so not a model"),
    "unreadable config": ("{broken} out --calibrate {texts}", "cannot be opened"),
    "no matching layer": ("{dense} out --layers nothing.* --calibrate {texts}", "'nothing.*' matches no linear layer"),
    "ratio 0": ("{dense} out --ratio 0 --calibrate {texts}", "ratio must be between 0 and 1"),
    "ratio 1": ("{dense} out --ratio 1 --calibrate {texts}", "ratio must be between 0 and 1"),
    "ratio below": ("{dense} out --ratio=-0.5 --calibrate {texts}", "ratio must be between 0 and 1"),
    "ratio nan": ("{dense} out --ratio nan --calibrate {texts}", "ratio must be between 0 and 1"),
    "ratio no number": ("{dense} out --ratio half --calibrate {texts}", "Invalid value for '--ratio'"),
    "ratio too small": ("{dense} out --ratio 0.001 --calibrate {texts}", "too few; rank 1 everywhere"),
    "unknown method": ("{dense} out --method magic", "found 'magic'"),
    "unknown policy": ("{dense} out --method svd --policy fair", "policy must be one of"),
    "nothing shares": ("{dense} out --method svd --share 0", "share must be how many layers share a factor, at least 1"),
    "no factor to share": ("{dense} out --method magnitude --share 2", "share: layers cannot share a factor by magnitude"),
    "unknown device": ("{dense} out --method svd --device tpu", "--device is 'tpu'; needs auto, cpu or cuda"),
    "unknown task": ("{dense} out --task poetry --calibrate {texts}", "poetry"),
    "a task without a head": ("{dense} out --task lm --calibrate {texts}", "has no weights for"),
    "nothing to calibrate on": ("{dense} out", "whitened needs texts to calibrate on (--calibrate)"),
    "no such texts": ("{dense} out --calibrate none.jsonl", "none.jsonl: no such file"),
    "empty calibration": ("{dense} out --calibrate {no_rows}", "no rows"),
    "a broken row": ("{dense} out --calibrate {bad_row}", "bad.jsonl:2: not JSON"),
    "no samples": ("{dense} out --calibrate {texts} --samples 0", "--samples is 0; needs at least 1"),
    "no batch": ("{dense} out --calibrate {texts} --batch-size 0", "batch_size is 0"),
    "fwsvd without labels": ("{dense} out --method fwsvd --calibrate {unlabelled}", 'has no "label"'),
    "NaN weights": ("{with_nan} out --method svd", "holds NaN or infinity"),
    "no parent": ("{dense} none/out --method svd", "none does not exist"),
    "a file in the way": ("{dense} file --method svd", "a file is in the way"),
    "target exists": ("{dense} full --method svd", "exists already"),
    "target is not ours": ("{dense} full --method svd --overwrite", "not written by lowfat"),
    "unknown option": ("{dense} out --rank 3", "No such option"),
    "no target": ("{dense}", "Missing argument 'OUT'"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, dense, texts):
    """What the mistakes refer to."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"model_type": ')
    model = classifier()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 5] = torch.nan
    model.save_pretrained(folder / "nan")
    tokenizer().save_pretrained(folder / "nan")
    (folder / "none.jsonl").write_text("\n\n")
    (folder / "bad.jsonl").write_text('{"text": "the cat"}\n{"text": \n')
    unlabelled = write(folder / "unlabelled.jsonl", [{"text": row["text"]} for row in rows(8)])
    return {"dense": dense, "texts": texts, "empty": folder / "empty", "broken": folder / "broken",
            "with_nan": folder / "nan", "no_rows": folder / "none.jsonl", "bad_row": folder / "bad.jsonl",
            "unlabelled": unlabelled}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(work, places, mistake):
    (work / "file").write_text("mine")
    (work / "full").mkdir()
    (work / "full" / "thesis.txt").write_text("mine")
    arguments, message = MISTAKES[mistake]
    assert message in refused("factorize", *arguments.format(**places).split())
    assert (work / "full" / "thesis.txt").read_text() == (work / "file").read_text() == "mine"


@pytest.mark.parametrize("arguments, message", [
    ("evaluate {dense} --data none.jsonl", "none.jsonl: no such file"),
    ("evaluate {dense} --data {unlabelled}", 'has no "label"'),
    ("evaluate {dense} --data {texts} --dtype int8", "--dtype is 'int8'; needs float32, bfloat16 or float16"),
    ("evaluate {empty} --data {texts}", "not a model"),
    ("evaluate {dense}", "Missing option '--data'"),
    ("finetune {dense} out --train {unlabelled} --steps 2", 'has no "label"'),
    ("finetune {dense} out --train {texts} --steps 0", "steps"),
    ("finetune {dense} full --train {texts} --steps 2", "exists already"),
    ("finetune {dense} out --train {texts} --steps 2 --teacher {empty}", "not a model"),
    ("finetune {dense} out --train {texts} --steps 2 --learning-rate=-1", "learning_rate"),
    ("staged {dense} out --train {texts} --steps 3", "2 stages, and 0.5 of the steps after them, need 4"),
    ("staged {dense} out --train {texts} --by head", "by is 'head'; needs one of block, matrix"),
    ("staged {dense} out --train {texts} --method fwsvd --set side=up", "side must be one of"),
    ("staged {dense} full --train {texts}", "exists already"),
    ("straight-through {dense} out --train {texts} --steps 1 --freeze 0.6", "steps is 1; freeze 0.6 leaves none"),
    ("straight-through {dense} out --train {texts} --fade 2", "fade is 2.0; needs 0 to 1"),
    ("lpaf {dense} out --train {texts} --steps 1", "steps is 1; prune_share 0.5 leaves none"),
    ("lpaf {dense} out --train {texts} --weighting size", "weighting is 'size'; needs one of scores, mask, none"),
    ("lpaf {dense} full --train {texts}", "exists already"),
    ("inspect {empty}", "not a model"),
    ("inspect {dense} --layers nothing", "'nothing' matches no linear layer"),
    ("inspect {dense} --plot none/spectra.png", "the folder none does not exist"),
    ("inspect {with_nan}", "holds NaN or infinity"),
    ("demo --out full", "exists already"),
    ("demo --out none/demo", "none does not exist"),
    ("dance", "No such command 'dance'"),
])
def test_a_mistake_in_the_other_commands_is_one_line(work, places, arguments, message):
    (work / "full").mkdir()
    (work / "full" / "thesis.txt").write_text("mine")
    assert message in refused(*arguments.format(**places).split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(work, dense):
    assert "sees no CUDA device" in refused("factorize", dense, "out", "--method", "svd", "--device", "cuda")


def test_a_read_only_target(work, dense):
    # /proc takes no folders from anybody, root included
    assert "/proc" in refused("factorize", dense, "/proc/out", "--method", "svd")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(work, dense):
    (work / "shut").mkdir(mode=0o555)
    assert "read-only" in refused("factorize", dense, "shut/out", "--method", "svd")


@pytest.mark.timeout(300)
def test_a_full_disk_in_a_child_process(work, dense):
    # a limit on the size of files: the kernel refuses the write as it does on a full disk
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run([*MAIN, "factorize", str(dense), "out", "--method", "svd"], preexec_fn=limit, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if not STAGE.fullmatch(line))
    assert "out: could not be written" in line
    assert not (work / "out").exists() and not list(work.glob(".out.tmp*"))


@pytest.mark.timeout(300)
def test_exit_codes_and_streams_of_a_child_process(work, dense, texts):
    # kills noise of transformers, which a test in this process would not see: its bars and reports go by the real stderr
    mistake = subprocess.run([*MAIN, "factorize", str(dense), "out", "--ratio", "2"], capture_output=True, text=True)
    assert (mistake.returncode, mistake.stdout, mistake.stderr.count("\n")) == (2, "", 1), mistake.stderr
    good = subprocess.run([*MAIN, "factorize", str(dense), "out", "--calibrate", str(texts)], capture_output=True, text=True)
    assert good.returncode == 0 and [STAGE.fullmatch(line)[1] for line in good.stderr.splitlines()] == [
        "opening", "calibrate", "factorize"]
    assert sorted(path.name for path in work.iterdir()) == ["out"]


def test_a_bug_keeps_its_traceback(work, dense, monkeypatch):
    monkeypatch.setattr("lowfat.job.factorize_folder", lambda *_, **__: 1 / 0)
    done = CliRunner().invoke(app, ["factorize", str(dense), "out", "--method", "svd"])
    assert isinstance(done.exception, ZeroDivisionError) and done.exit_code == 1


# ------------------------------------------------------------------------------------------------ the route
def test_the_whole_route(work, dense, texts):
    shown = lowfat("factorize", dense, "half", "--calibrate", texts, "--ratio", "0.5").stdout
    assert "parameters kept in these layers" in shown and "written to half" in shown
    report = json.loads(lowfat("factorize", dense, "again", "--calibrate", texts, "--ratio", "0.5", "--json").stdout)
    assert report["ratio"] <= 0.5 and len(report["layers"]) == 12
    lowfat("factorize", dense, "again", "--method", "fwsvd", "--calibrate", texts, "--overwrite", "--samples", "8")
    trained = lowfat("finetune", "half", "better", "--train", texts, "--validation", texts, "--teacher", dense,
                     "--steps", "4", "--batch-size", "4")
    assert "4 steps on cpu" in trained.stdout and "accuracy" in trained.stdout
    by_stages = lowfat("staged", dense, "by-stages", "--train", texts, "--validation", texts, "--method", "whitened",
                       "--steps", "8", "--batch-size", "4", "--final-share", "0.25", "--order", "sensitivity").stdout
    assert re.search(r"bert.encoder.layer +\nstage +steps +loss before +after *\n[01] +3 +0\.\d{3} +0\.\d{3}", by_stages)
    assert "8 steps on cpu" in by_stages and "accuracy" in by_stages and "parameters kept in these layers (4" in by_stages
    learned = lowfat("straight-through", dense, "learned", "--train", texts, "--validation", texts, "--steps", "5",
                     "--every", "2", "--batch-size", "4").stdout
    assert re.search(r"factors made anew 2 times; relative error to the dense weights: \d+\.\d % at step 2, \d+\.\d % at step 4",
                     learned)
    assert "5 steps on cpu" in learned and "accuracy" in learned and "parameters kept in these layers (4" in learned
    pruned = lowfat("lpaf", dense, "pruned", "--train", texts, "--validation", texts, "--steps", "6", "--keep", "0.25",
                    "--weighting", "mask", "--criterion", "magnitude", "--batch-size", "4").stdout
    assert "pruned to 25.0 % of the weights by step 3" in pruned
    assert "6 steps on cpu" in pruned and "accuracy" in pruned and "parameters kept in these layers (4" in pruned
    assert json.loads(lowfat("evaluate", "by-stages", "--data", texts, "--json").stdout)["rows"] == 24
    assert json.loads(lowfat("evaluate", "better", "--data", texts, "--json").stdout)["rows"] == 24
    assert re.search(r"accuracy +[01]\.\d{4}", lowfat("evaluate", "better", "--data", texts, "--dtype", "bfloat16").stdout)


# ------------------------------------------------------------------------------------------------ without a terminal
@pytest.mark.parametrize("command, stages", [
    ("factorize {dense} out --calibrate {texts}", ["opening", "calibrate", "factorize"]),
    ("finetune {dense} out --train {texts} --steps 3", ["opening", "training"]),
    ("staged {dense} out --train {texts} --steps 4", ["opening", "training"]),
    ("straight-through {dense} out --train {texts} --steps 4", ["opening", "training"]),
    ("lpaf {dense} out --train {texts} --steps 4", ["opening", "training"]),
    ("evaluate {dense} --data {texts} --batch-size 2", ["opening", "accuracy"]),
    ("inspect {dense}", ["opening", "spectra"])])
def test_one_line_for_each_stage(work, dense, texts, command, stages):
    # kills a line for each batch, step or layer: there are several of each here
    lines = lowfat(*command.format(dense=dense, texts=texts).split()).stderr.splitlines()
    assert [STAGE.fullmatch(line)[1] for line in lines] == stages


def test_a_stage_is_told_when_it_ends_not_when_the_command_does(monkeypatch):
    pipe = io.BytesIO()
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(pipe))  # holds back what is not flushed, as stderr into a file may
    with show.bar("opening") as tell:
        tell(0, 2, "first")
        assert pipe.getvalue() == b"opening: 0 s\n"
        tell(1, 2, "first")
        tell(1, 2, "second")
        assert pipe.getvalue() == b"opening: 0 s\nfirst: 0 s\n"
    assert pipe.getvalue().endswith(b"second: 0 s\n")


def test_a_long_stage_speaks_every_minute(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(show.time, "monotonic", lambda: now)
    with show.bar("opening") as tell:
        for step in range(1, 11):
            tell(step, 10, f"training, loss {step}", stage="training")
            now += 25
    assert capsys.readouterr().err.splitlines() == [
        "opening: 0 s", "training, loss 4: 75 s so far (40 %)", "training, loss 7: 150 s so far (70 %)",
        "training, loss 10: 225 s so far (100 %)", "training: 250 s"]


def test_beside_the_seconds_of_a_stage_stands_no_share_of_the_whole(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(show.time, "monotonic", lambda: now)

    def run(*_, on_progress, **__):  # a demo in its second stage
        nonlocal now
        for share in (0.7, 0.8, 0.9):
            on_progress(share, "distillation")
            now += 60
        raise ArgumentError("enough")

    monkeypatch.setattr("lowfat.demo.run", run)
    lines = lowfat("demo", code=2).stderr.splitlines()
    assert lines[1:3] == ["distillation: 60 s so far", "distillation: 120 s so far"]


def test_inspect_before_and_after(work, dense, texts):
    lowfat("factorize", dense, "half", "--calibrate", texts, "--ratio", "0.5")
    before = lowfat("inspect", dense, "--plot", "spectra.png").stdout
    assert Path("spectra.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert max(map(len, before.splitlines()[:14])) <= 80  # the table; a path in the notes may be longer
    assert "left alone: classifier: outside the blocks" in before
    after = json.loads(lowfat("inspect", "half", "--base", dense, "--json").stdout)
    assert all(0 < layer["error"] < 1 for layer in after if layer["rank"])
    assert sum(layer["parameters"] for layer in after) <= 0.5 * sum(layer["dense_parameters"] for layer in after)


def test_doctor(work):
    assert f"torch {torch.__version__}" in lowfat("doctor").stdout.replace("\n", "").replace("   ", "")
    assert {"versions", "kernels", "advice"} <= json.loads(lowfat("doctor", "--json").stdout).keys()


# --- arguments of a method ---

@pytest.mark.parametrize("method", ["monarch", "block_low_rank"])
def test_factorize_with_arguments_of_the_method(method, dense, texts, work):
    lowfat("factorize", dense, "half", "--method", method, "--set", "blocks=2", "--set", "fit=outputs", "--set", "grouped=true",
           "--calibrate", texts)
    config = json.loads(Path("half/config.json").read_text())["quantization_config"]["modules"]
    assert {(entry["structure"], tuple(entry["blocks"]), entry["interleave"]) for entry in config.values()} == {
        ("Monarch", (2, 2), method == "monarch")}
    assert any(entry["grouped"] for entry in config.values())
    assert "accuracy" in lowfat("evaluate", "half", "--data", texts).stdout


def test_factorize_with_dictionaries_that_blocks_share(dense, texts, work):
    shown = lowfat("factorize", dense, "half", "--method", "compot", "--share", "2", "--calibrate", texts).stdout
    assert "6 layers with the first factor of another, which is counted there" in shown
    ties = json.loads(Path("half/config.json").read_text())["quantization_config"]["ties"]
    assert len(ties) == 6 and all(tie == other.replace("layer.0", "layer.1") for tie, other in ties.items())
    kept = re.search(r"([\d.]+) M of [\d.]+ M parameters in these layers", lowfat("inspect", "half").stdout)[1]
    assert f"{kept} M of" in shown.splitlines()[-1]
    assert "accuracy" in lowfat("evaluate", "half", "--data", texts).stdout


@pytest.mark.parametrize("arguments, words", [
    (["--set", "blocks"], "--set needs NAME=VALUE like blocks=8; found 'blocks'"),
    (["--set", "blocks=0"], "blocks must be between 1 and"), (["--set", "blocks=4096"], "found 4096"),
    (["--set", "blocks=many"], "monarch: blocks must be a whole number or two, for inputs and outputs; found 'many'"),
    (["--set", "fit=best"], "monarch: fit must be one of 'weights', 'outputs', 'fisher'; found 'best'"),
    (["--set", "sides=2"], "monarch has no argument 'sides'; it has blocks, fit"),
    (["--set", "grouped=yes"], "monarch: grouped must be one of False, True; found 'yes'"),
    (["--set", "fit=outputs"], "monarch needs texts to calibrate on")])
def test_wrong_arguments_of_a_method(arguments, words, dense, work):
    done = CliRunner().invoke(app, ["factorize", str(dense), "half", "--method", "monarch", *arguments])
    assert done.exit_code == 2 and words in done.stderr and not Path("half").exists(), done.stderr
