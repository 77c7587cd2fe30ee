"""bench/tasks.py on a made-up archive of a few hundred packages, and its rules: splits by source, no text on both sides."""
import hashlib
import importlib
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
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        return importlib.import_module("tasks")


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


def test_a_man_page_becomes_running_text(tasks):
    page = br"""'\" t
.TH FIND 3 2020
.SH NAME
find \- look for a \fIthing\fR
.PP
The
.BR find (3)
function takes \(dqone\(dq argument,
.I or "two"
.\" nobody reads this
.TS
left out
.TE
.nf
  int  find(void);
.fi
.TP
.B \-x
Exit.
"""
    assert tasks.corpus.manpage.text_of(page) == (
        'FIND(3)\n\nNAME\nfind - look for a thing\n\nThe find(3) function takes "one" argument, or two\n\n'
        '  int  find(void);\n\n-x Exit.\n')
    assert tasks.corpus.manpage.text_of(b".so man3/find.3\n") == ""


def test_a_missing_package_of_lm_is_named(tasks, tmp_path):
    with pytest.raises(tasks.Missing, match=r"lm needs one .deb each of manpages, .*apt-get download manpages/bookworm"):
        tasks.derive(tmp_path / "out", "lm", lists=tmp_path, debs=tmp_path)
    with pytest.raises(tasks.Missing, match="lm needs --debs FOLDER"):
        tasks.derive(tmp_path / "out", "lm", lists=tmp_path)
