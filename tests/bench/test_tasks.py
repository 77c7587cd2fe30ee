"""bench/tasks.py on a made-up archive of a few hundred packages, and its rules: splits by source, no text on both sides."""
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "tasks.py"
PUBLISHED = {
    "sections/train": "466ceba4401c70e8", "sections/validation": "ff4e71c2e210ee37", "sections/test": "c1b01919fd8a6cff",
    "pairs/train": "b6f37dad56c944d8", "pairs/validation": "aebd7e70d96906e6", "pairs/test": "40ff2bdc60160e7a",
}


@pytest.fixture(scope="module")
def tasks():
    spec = importlib.util.spec_from_file_location("tasks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tasks"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """240 packages of 120 sources in three sections that count and one (debug) that does not."""
    folder = tmp_path_factory.mktemp("lists")
    index, translation = [], []
    things = "parser viewer solver shell codec daemon editor compiler".split()
    for i in range(240):
        section = ("python", "non-free/games", "libs", "debug")[i % 4]
        synopsis = f"{things[i % 8]} for kind {i // 2} of thing, written for a test"
        digest = hashlib.md5(synopsis.encode()).hexdigest()
        index.append(f"Package: p{i}\nSource: s{i // 2} (1.0)\nSection: {section}\nDescription: {synopsis}\n"
                     f"Description-md5: {digest}\n")
        words = " ".join(f"{things[(i + j) % 8]}{(i * j) % 17}" for j in range(20))
        translation.append(f"Package: p{i}\nDescription-md5: {digest}\nDescription-en: {synopsis}\n {words}\n .\n"
                           f" Another {i}.\n")
    prefix = "deb.debian.org_debian_dists_bookworm_main_"
    architecture = _architecture()
    (folder / f"{prefix}binary-{architecture}_Packages").write_text("\n".join(index))
    (folder / f"{prefix}i18n_Translation-en").write_text("\n".join(translation))
    (folder / f"{prefix}i18n_Translation-en.diff_Index").write_text("a name that only begins like the right one")
    return folder


def _architecture():
    try:
        return subprocess.run(["dpkg", "--print-architecture"], stdout=subprocess.PIPE, text=True).stdout.strip()
    except OSError:
        return "amd64"


def rows(out, task, split):
    return [json.loads(line) for line in (out / task / f"{split}.jsonl").read_text().splitlines()]


def test_the_same_lists_give_the_bytes_of_the_published_method(tasks, lists, tmp_path):
    # The digests are those of the script that the published data were first made with, run on this archive.
    tasks.derive(tmp_path, "sections", lists=lists)
    tasks.derive(tmp_path, "pairs", lists=lists)
    found = {f"{task}/{split}": tasks.sha256(tmp_path / task / f"{split}.jsonl")[:16]
             for task in ("sections", "pairs") for split in tasks.SPLITS}
    assert found == PUBLISHED


def test_no_source_and_no_text_crosses_a_split(tasks, lists, tmp_path):
    tasks.derive(tmp_path, "sections", lists=lists)
    sources = {split: {int(row["id"][1:]) // 2 for row in rows(tmp_path, "sections", split)} for split in tasks.SPLITS}
    assert all(sources.values())
    assert not sources["train"] & sources["test"] and not sources["train"] & sources["validation"]
    labels = {row["label"] for split in tasks.SPLITS for row in rows(tmp_path, "sections", split)}
    assert labels == {tasks.LABELS.index(name) for name in ("python", "games", "libs")}  # debug is not a subject


def test_pairs_use_every_text_once(tasks, lists, tmp_path):
    # else a model could tell the label from one side alone
    tasks.derive(tmp_path, "pairs", lists=lists)
    every = [row for split in tasks.SPLITS for row in rows(tmp_path, "pairs", split)]
    assert {row["label"] for row in every} == {0, 1}
    for side in ("text_a", "text_b"):
        assert len({row[side] for row in every}) == len(every)


def test_differences_are_told_and_a_missing_list_ends_with_one_line(lists, tmp_path):
    run = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--tasks", "sections", "--apt-lists"]
    different = subprocess.run([*run, str(lists)], capture_output=True, text=True)
    assert different.returncode == 1
    assert "DIFFERS" in different.stdout and "sections/train.jsonl" in different.stderr
    missing = subprocess.run([*run, str(tmp_path)], capture_output=True, text=True)
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1 and "apt-get -o Acquire::Languages=en update" in missing.stderr
