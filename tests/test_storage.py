"""The one writer: what it refuses before it starts, what it leaves behind, what a reader notices."""
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lowfat import manifest, storage
from lowfat.errors import ArgumentError, CompatibilityError, FormatError, IntegrityError, StorageError
from lowfat.manifest import read_manifest
from lowfat.strict_json import MAX_DEPTH, dumps, parse, read_json
from lowfat.tensor_file import read_tensors


def filler(number: int):
    """Writes two files, one in a subfolder, that say which save they come from."""
    def fill(folder: Path):
        storage.write_json(folder / "a.json", {"number": number})
        storage.write_tensors(folder / "w.safetensors", {"x": torch.full((3, 2), float(number)), "empty": torch.zeros(0, 3)})
        (folder / "sub").mkdir()
        (folder / "sub" / "note.txt").write_text(str(number))
    return fill


def number_of(folder: Path) -> int:
    """Which save a folder holds; fails unless every file is of that save."""
    storage.verify(folder)
    number = read_json(folder / "a.json")["number"]
    assert read_tensors(folder / "w.safetensors")["x"].eq(number).all()
    assert (folder / "sub" / "note.txt").read_text() == str(number)
    return number


def test_folder_is_written_with_its_manifest(tmp_path):
    storage.write_folder(tmp_path / "out", filler(1), facts={"base": "x"})
    content = storage.verify(tmp_path / "out")
    assert set(content["files"]) == {"a.json", "w.safetensors", "sub/note.txt"}
    assert content["tensors"]["w.safetensors"]["x"]["shape"] == [3, 2]
    assert content["facts"] == {"base": "x"}
    assert os.listdir(tmp_path) == ["out"]


def test_same_content_gives_the_same_bytes(tmp_path):
    for name in "ab":
        storage.write_folder(tmp_path / name, filler(1))
    for file in ("a.json", "w.safetensors", manifest.NAME):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_stages_come_in_order(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(storage, "stage", seen.append)
    storage.write_folder(tmp_path / "out", lambda folder: (folder / "a").write_text("1"))
    assert seen == ["S1", "S2", "S3", "S4", "S5", "S6", "S7", "S9"]
    seen.clear()
    storage.write_folder(tmp_path / "out", lambda folder: (folder / "a").write_text("2"), overwrite=True)
    assert seen == ["S1", "S2", "S3", "S4", "S5", "aside", "S6", "S7", "S9"]


def test_every_file_is_synced_before_the_rename(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(storage, "_sync", lambda path: synced.append(path.name))
    monkeypatch.setattr(storage, "stage", lambda name: synced.append(name))
    storage.write_folder(tmp_path / "out", lambda folder: (folder / "a").write_text("1"))
    assert synced.index("a") < synced.index(manifest.NAME) < synced.index("S5") < synced.index("S6")
    assert synced[synced.index("S6") + 1] == tmp_path.name


def test_existing_folder_needs_overwrite(tmp_path):
    storage.write_folder(tmp_path / "out", filler(1))
    with pytest.raises(ArgumentError, match="out: exists already"):
        storage.write_folder(tmp_path / "out", filler(2))
    assert number_of(tmp_path / "out") == 1
    storage.write_folder(tmp_path / "out", filler(2), overwrite=True)
    assert number_of(tmp_path / "out") == 2
    assert os.listdir(tmp_path) == ["out"]


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir(mode=0o750)
    storage.write_folder(tmp_path / "out", filler(1))
    assert number_of(tmp_path / "out") == 1
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_overwrite_never_removes_what_others_wrote(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(ArgumentError, match="home: exists, not written by lowfat"):
        storage.write_folder(tmp_path / "home", filler(1), overwrite=True)
    assert os.listdir(tmp_path / "home") == ["thesis.txt"]


def test_kept_files_move_over_and_stay_out_of_the_manifest(tmp_path):
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    for name in ("tokenizer.json", "a.json", "old.safetensors", "checkpoint-1/state"):
        (tmp_path / "out" / name).write_text("before")
    storage.write_folder(tmp_path / "out", filler(1), keep=lambda path: path.suffix != ".safetensors")
    assert number_of(tmp_path / "out") == 1
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "before"
    assert (tmp_path / "out" / "checkpoint-1" / "state").read_text() == "before"
    assert not (tmp_path / "out" / "old.safetensors").exists()
    assert set(read_manifest(tmp_path / "out")["files"]) == {"a.json", "w.safetensors", "sub/note.txt"}


def test_link_to_a_folder_is_followed(tmp_path):
    storage.write_folder(tmp_path / "real", filler(1))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    storage.write_folder(tmp_path / "link", filler(2), overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert number_of(tmp_path / "real") == 2


def test_target_is_checked_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name, words in (("no/such/out", "does not exist"), ("file", "file is in the way"), ("x" * 250, "name is too long")):
        with pytest.raises(ArgumentError, match=words):
            storage.write_folder(tmp_path / name, lambda folder: pytest.fail("was filled"))
    with pytest.raises(ArgumentError, match="no space left: 1[0-9]* bytes needed"):
        storage.check_target(tmp_path / "out", size=10 ** 18)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ArgumentError, match="current directory"):
        storage.check_target(".")
    with pytest.raises(ArgumentError, match="mount point|read-only|not written by lowfat"):
        storage.check_target("/proc", overwrite=True)


def test_read_only_folder_is_refused_before_any_work(tmp_path):
    """The immutable flag, where the file system has it: permissions alone do not stop root."""
    folder = tmp_path / "frozen"
    folder.mkdir()
    folder.chmod(0o500)
    flag = shutil.which("chattr") and subprocess.run(["chattr", "+i", folder], capture_output=True).returncode == 0
    if not flag and os.access(folder, os.W_OK):
        pytest.skip("runs as root, and the file system has no immutable flag")
    try:
        with pytest.raises(ArgumentError, match="frozen is read-only"):
            storage.write_folder(folder / "out", lambda path: pytest.fail("was filled"))
    finally:
        if flag:
            subprocess.run(["chattr", "-i", folder], check=True)
    assert os.listdir(folder) == []


def test_column_major_tensors_are_stored_row_major(tmp_path):
    factor = torch.linalg.svd(torch.randn(5, 4), full_matrices=False)[0]  # strided, as factors come
    assert not factor.is_contiguous()
    storage.write_tensors(tmp_path / "w.safetensors", {"u": factor})
    assert torch.equal(read_tensors(tmp_path / "w.safetensors")["u"], factor)


def test_single_files_change_as_a_whole(tmp_path):
    storage.write_json(tmp_path / "a.json", {"number": 1})
    with pytest.raises(TypeError):
        storage.write_json(tmp_path / "a.json", {"number": object()})
    with pytest.raises(ValueError):
        storage.write_json(tmp_path / "a.json", {"number": float("nan")})
    assert read_json(tmp_path / "a.json") == {"number": 1}
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(ArgumentError, match="does not exist"):
        storage.write_json(tmp_path / "no" / "a.json", {})


def test_exception_while_filling_leaves_nothing(tmp_path):
    storage.write_folder(tmp_path / "out", filler(1))

    def fails(folder):
        filler(2)(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_folder(tmp_path / "out", fails, overwrite=True)
    assert number_of(tmp_path / "out") == 1
    assert os.listdir(tmp_path) == ["out"]


def test_copy_moved_aside_is_put_back(tmp_path):
    """A process died between the two renames: the next reader and the next writer both find the old folder."""
    for act in (storage.verify, lambda path: storage.write_folder(path, filler(2), overwrite=True)):
        storage.write_folder(tmp_path / "out", filler(1), overwrite=True)
        (tmp_path / "out").rename(tmp_path / ".out.old-999999-0123abcd")
        with pytest.raises(ArgumentError, match="exists already"):
            storage.write_folder(tmp_path / "out", filler(3))
        (tmp_path / "out").rename(tmp_path / ".out.old-999999-0123abcd")
        act(tmp_path / "out")
        assert os.listdir(tmp_path) == ["out"]
    assert number_of(tmp_path / "out") == 2


def test_only_leftovers_are_cleaned(tmp_path):
    """A folder that somebody holds is work in progress, whatever process id its name carries; a free one is a leftover."""
    dead, live = tmp_path / ".out.tmp-999999-0123abcd", tmp_path / ".out.tmp-999999-4567abcd"
    other = tmp_path / ".outer.tmp-1-0123abcd"
    for folder in (dead, live, other):
        folder.mkdir()
        (folder / "part").write_text("")
    handle = os.open(live, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    storage.write_folder(tmp_path / "out", filler(1))
    os.close(handle)
    assert sorted(os.listdir(tmp_path)) == sorted([live.name, other.name, "out"])
    storage.write_folder(tmp_path / "out", filler(2), overwrite=True)
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, "out"])


def test_without_locks_the_process_id_decides(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    dead, live = tmp_path / ".out.tmp-999999999-0123abcd", tmp_path / f".out.tmp-{os.getppid()}-0123abcd"
    dead.mkdir()
    live.mkdir()
    storage.write_folder(tmp_path / "out", filler(1))
    storage.write_folder(tmp_path / "out", filler(2), overwrite=True)
    assert number_of(tmp_path / "out") == 2
    assert sorted(os.listdir(tmp_path)) == sorted([live.name, "out"])


def test_reader_waits_for_a_living_writer(tmp_path, monkeypatch):
    """Between the renames of a live process the folder has no name for a moment: a reader waits, and takes nothing away."""
    storage.write_folder(tmp_path / "out", filler(1))
    aside = tmp_path / ".out.old-999999-0123abcd"
    (tmp_path / "out").rename(aside)
    handle = os.open(aside, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    monkeypatch.setattr(storage, "PATIENCE", 0.05)
    with pytest.raises(StorageError, match="another process has been replacing it"):
        storage.verify(tmp_path / "out")
    monkeypatch.setattr(storage.time, "sleep", lambda _: aside.rename(tmp_path / "out") if aside.exists() else None)
    storage.verify(tmp_path / "out")
    os.close(handle)


def test_second_writer_of_a_new_folder_gets_an_error(tmp_path, monkeypatch):
    def another_writer(name):
        if name == "S5":
            monkeypatch.undo()
            storage.write_folder(tmp_path / "out", filler(2))

    monkeypatch.setattr(storage, "stage", another_writer)
    with pytest.raises(ArgumentError, match="another process wrote it in the meantime"):
        storage.write_folder(tmp_path / "out", filler(1))
    assert number_of(tmp_path / "out") == 2
    assert os.listdir(tmp_path) == ["out"]


def test_second_writer_while_the_first_replaces_gets_an_error(tmp_path, monkeypatch):
    """Between the renames of another process: its folder arrives, ours does not, and nothing is left of ours."""
    storage.write_folder(tmp_path / "out", filler(1))

    def another_writer(name):
        if name == "aside":
            monkeypatch.undo()
            monkeypatch.setattr(storage, "PATIENCE", 0.05)
            with pytest.raises(StorageError, match="another process has been replacing it"):
                storage.write_folder(tmp_path / "out", filler(3), overwrite=True)

    monkeypatch.setattr(storage, "stage", another_writer)
    storage.write_folder(tmp_path / "out", filler(2), overwrite=True)
    assert number_of(tmp_path / "out") == 2
    assert os.listdir(tmp_path) == ["out"]


def test_folder_that_another_process_replaces_is_left_to_it(tmp_path):
    storage.write_folder(tmp_path / "out", filler(1))
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ArgumentError, match="out: another process is replacing it"):
        storage.write_folder(tmp_path / "out", filler(2), overwrite=True)
    os.close(handle)
    assert number_of(tmp_path / "out") == 1
    assert os.listdir(tmp_path) == ["out"]


def test_lock_on_a_folder_that_lost_its_name_does_not_count(tmp_path, monkeypatch):
    """Another process finished its renames between our opening the folder and our locking it."""
    (tmp_path / "out").mkdir()
    lock = fcntl.flock

    def too_late(handle, how):
        (tmp_path / "out").rename(tmp_path / "aside")
        (tmp_path / "out").mkdir()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with storage._claim(tmp_path / "out") as ours:
        assert not ours


def test_manifest_notices_every_change(tmp_path):
    storage.write_folder(tmp_path / "out", filler(1))
    path = tmp_path / "out" / manifest.NAME
    good = read_json(path)
    for change, error, words in (
            (lambda m: m["files"]["a.json"].update(bytes=1), IntegrityError, "its own digest"),
            (lambda m: m["tensors"]["w.safetensors"]["x"].update(shape=[2, 3]), IntegrityError, "its own digest"),
            (lambda m: m["facts"].update(base="y"), IntegrityError, "its own digest"),
            (lambda m: m.pop("digest"), IntegrityError, "its own digest"),
            (lambda m: m.update(format=5), IntegrityError, "its own digest"),  # the 1 with one bit flipped
            (lambda m: m.update(format=2, digest=manifest._own_digest({**m, "format": 2})), CompatibilityError,
             "format 2, this lowfat reads up to 1"),
            (lambda m: m.pop("format"), FormatError, "no format number")):
        content = parse(dumps(good).encode(), "copy")
        change(content)
        path.write_text(dumps(content))
        with pytest.raises(error, match=words):
            storage.verify(tmp_path / "out")
    path.unlink()
    with pytest.raises(IntegrityError, match="manifest.json: missing"):
        storage.verify(tmp_path / "out")
    with pytest.raises(ArgumentError, match="no such folder"):
        storage.verify(tmp_path / "nothing")


def test_damage_names_the_tensor(tmp_path):
    storage.write_folder(tmp_path / "out", filler(1))
    path = tmp_path / "out" / "w.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"w\.safetensors: SHA-256 differs from manifest\.json \(tensor x\)"):
        storage.verify(tmp_path / "out")


@pytest.mark.parametrize("text, words", [
    ('{"a": 1, "a": 2}', "key 'a' appears twice"), ('{"a": NaN}', "not a finite number"), ("1e999", "not a finite number"),
    ("[" * 100_000, "not JSON"), ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"deeper than {MAX_DEPTH}"),
    ("9" * 10_000, "not JSON"), ("{", "not JSON"), ("", "not JSON"), ("[-0]", "-0 is no whole number")])
def test_json_of_strangers_is_read_strictly(text, words):
    with pytest.raises(FormatError, match=f"config.json: .*{words}"):
        parse(text.encode(), "config.json")


def test_json_files_are_bounded(tmp_path):
    assert parse(("[" * MAX_DEPTH + "]" * MAX_DEPTH).encode(), "x")
    (tmp_path / "big.json").write_text('"' + "x" * (1 << 20) + '"')
    with pytest.raises(FormatError, match="big.json: larger than 1048576 bytes"):
        read_json(tmp_path / "big.json")
    with pytest.raises(FormatError, match="not UTF-8|not JSON"):
        parse(b'"\xff"', "x")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(FormatError, match="pipe.json: not a regular file"):  # and does not wait for a writer
        read_json(tmp_path / "pipe.json")


def test_files_are_as_readable_as_any_other(tmp_path):
    # safetensors makes its files for their owner alone, and a model for everyone could be read by nobody else
    (tmp_path / "plain").touch()

    def fill(folder):
        storage.write_tensors(folder / "a.safetensors", {"w": torch.ones(2)})
        (folder / "b.json").write_text("{}")
        (folder / "b.json").chmod(0o600)

    storage.write_folder(tmp_path / "out", fill)
    storage.write_tensors(tmp_path / "alone.safetensors", {"w": torch.ones(2)})
    written = [tmp_path / "alone.safetensors", *(tmp_path / "out").iterdir()]
    assert {path.stat().st_mode for path in written} == {(tmp_path / "plain").stat().st_mode}
