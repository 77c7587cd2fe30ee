"""Faults while writing: a process killed, a disk that is full or fails, a file that is damaged. What was there survives.

After each fault (a) the folder is the old or the new one as a whole, (b) the next save succeeds, (c) nothing else is left.
"""
import errno
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
import transformers.models.bert.modeling_bert  # noqa: F401  while tests are collected, where no clock runs: it takes seconds

from lowfat import checkpoint, manifest, storage
from lowfat.errors import FormatError, IntegrityError, LowfatError, StorageError
from lowfat.layers import dense_weight, factorizable, replace
from lowfat.strict_json import read_json
from lowfat.structures import LowRank
from lowfat.tensor_file import read_header, read_tensors

NIGHTLY = (pytest.mark.nightly, pytest.mark.timeout(1200))
STAGES = ("S1", "S2", "S3", "S4", "S5", "aside", "S6", "S7", "S9")
OS_CALLS = ("mkdir", "open", "close", "fsync", "rename", "replace", "link", "rmdir", "stat", "fstat")


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where there is such a place: what a fault leaves is a matter of order, and syncing takes minutes."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def fill(number: int):
    def write(folder: Path):
        storage.write_json(folder / "a.json", {"number": number})
        (folder / "b.data").write_bytes(bytes([number]) * 100_000)
        storage.write_tensors(folder / "w.safetensors", {"x": torch.full((100, 100), float(number))})
    return write


def number_of(folder: Path) -> int:
    """Which save a folder holds; fails unless it is one save as a whole."""
    storage.verify(folder)
    number = read_json(folder / "a.json")["number"]
    assert (folder / "b.data").read_bytes() == bytes([number]) * 100_000
    assert read_tensors(folder / "w.safetensors")["x"].eq(number).all()
    return number


def assert_next_save_works(folder: Path, number: int = 9) -> None:
    storage.write_folder(folder, fill(number), overwrite=True)
    assert number_of(folder) == number
    assert os.listdir(folder.parent) == [folder.name]


def start(act) -> int:
    """The process id of a fork that runs act(); it ends with 0, with 3 when lowfat refused, with 1 for another exception."""
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
        code = 1
        try:
            act()
            code = 0
        except LowfatError:
            code = 3
        finally:
            os._exit(code)
    return child


def finish(child: int) -> int:
    """How a fork ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class FailingOS:
    """The `os` module with the k-th call of those that touch the disk failing; counts them on the way."""

    def __init__(self, fails_at: int, code: int):
        self.fails_at, self.code, self.count = fails_at, code, 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in OS_CALLS:
            return real

        def call(*arguments, **options):
            self.count += 1
            if self.count == self.fails_at:
                if name == "close":  # the descriptor is gone whatever close returns
                    real(*arguments)
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("overwrite", [False, True])
def test_every_failing_call_leaves_the_old_folder(overwrite, tmp_path, monkeypatch):
    """Fail the k-th call for all k, until a run gets through. An error means that nothing changed."""
    folder, handles = tmp_path / "out", len(os.listdir("/proc/self/fd"))
    for k in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        if overwrite:
            storage.write_folder(folder, fill(1))
        failing = FailingOS(k, errno.EIO)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "os", failing)
            try:
                storage.write_folder(folder, fill(2), overwrite=overwrite)
                raised = False
            except StorageError as error:
                raised = True
                assert "out: could not be written" in str(error) and os.strerror(errno.EIO) in str(error)
        assert len(os.listdir("/proc/self/fd")) == handles
        if raised and not overwrite:
            assert os.listdir(tmp_path) == []
        else:
            assert number_of(folder) == (1 if raised else 2)
            assert os.listdir(tmp_path) == ["out"]
        assert_next_save_works(folder)
        if failing.count < k:
            break
    assert k > 20


def test_every_failing_call_leaves_a_file_whole(tmp_path, monkeypatch):
    storage.write_json(tmp_path / "a.json", {"number": 1})
    for k in range(1, 100):
        failing = FailingOS(k, errno.EIO)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "os", failing)
            try:
                storage.write_json(tmp_path / "a.json", {"number": k + 1})
            except OSError:
                pass
        assert read_json(tmp_path / "a.json")["number"] in (1, *range(2, k + 2))
        assert os.listdir(tmp_path) == ["a.json"]
        if failing.count < k:
            break
    assert k > 5 and read_json(tmp_path / "a.json") == {"number": k + 1}


def stop_at(name: str, act) -> None:
    """Makes the next writer in this process call act() at a stage."""
    storage.stage = lambda reached: act() if reached == name else None


def raises() -> None:
    raise RuntimeError("in the middle")


STOPS = {"SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
         "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT), "exception": raises}


@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_at_every_stage(stage, how, tmp_path):
    """A killed process leaves the old folder until the second rename, then the new one; an exception undoes the renames."""
    folder = tmp_path / "out"
    storage.write_folder(folder, fill(1))

    def write():
        stop_at(stage, STOPS[how])
        storage.write_folder(folder, fill(2), overwrite=True)

    ended = finish(start(write))
    killed = how in ("SIGKILL", "SIGTERM")
    assert ended == (-getattr(signal, how) if killed else 1)
    assert number_of(folder) == (2 if stage == "S9" or (killed and stage in ("S6", "S7")) else 1)
    if not killed:
        assert os.listdir(tmp_path) == ["out"]
    assert_next_save_works(folder)


@pytest.mark.parametrize("stage", STAGES)
def test_first_save_killed_at_every_stage(stage, tmp_path):
    def write():
        stop_at(stage, STOPS["SIGKILL"])
        storage.write_folder(tmp_path / "out", fill(1))

    assert finish(start(write)) == (0 if stage == "aside" else -signal.SIGKILL)  # with nothing to move aside it gets through
    assert (tmp_path / "out").exists() == (stage in ("aside", "S6", "S7", "S9"))
    assert_next_save_works(tmp_path / "out")


def kill_at_random(folder: Path, write, number_of, times: int) -> None:
    """Starts write(number) again and again, kills it at a random instant, checks that the old or the new one is there."""
    random.seed(times)
    before, done, began = number_of(folder), 0, time.monotonic()
    write(before)
    wait = time.monotonic() - began  # drifts to where half of the kills come too late, however busy the machine is
    for turn in range(times):
        number = before % 8 + 1
        child = start(lambda: write(number))
        time.sleep(random.uniform(0, 2 * wait))
        os.kill(child, signal.SIGKILL)
        finish(child)
        found = number_of(folder)
        assert found in (before, number), f"turn {turn} of {times}"
        done += found == number
        wait *= 0.8 if found == number else 1.25
        before = found
    assert times < 100 or 0 < done < times  # else the kills showed nothing; a few may all come early


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=NIGHTLY)])
def test_killed_at_random_instants(times, tmp_path):
    folder = tmp_path / "out"
    storage.write_folder(folder, fill(1))
    kill_at_random(folder, lambda number: storage.write_folder(folder, fill(number), overwrite=True), number_of, times)
    assert_next_save_works(folder)


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=NIGHTLY)])
def test_file_writer_killed_at_random_instants(times, tmp_path):
    path = tmp_path / "a.json"
    storage.write_json(path, [1] * 5000)

    def number_in(path):
        value = read_json(path)
        assert value == [value[0]] * 5000
        return value[0]

    kill_at_random(path, lambda number: storage.write_json(path, [number] * 5000), number_in, times)
    storage.write_json(path, [9])
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.fixture
def small(tiny_bert):
    for name, module in factorizable(tiny_bert).items():
        replace(tiny_bert, name, LowRank.from_dense(dense_weight(module), module.bias, rank=4))
    return tiny_bert


@pytest.mark.parametrize("times", [15, pytest.param(300, marks=NIGHTLY)])
def test_saving_a_model_killed_at_random_instants(small, times, tmp_path):
    """The whole road, save and save_pretrained in turn; the classifier's bias says which save a folder holds."""
    out = tmp_path / "out"

    def write(number):
        with torch.no_grad():
            small.classifier.bias.fill_(number)
        checkpoint.save(small, out, overwrite=True) if number % 2 else small.save_pretrained(out)

    def number_in(folder):
        return int(checkpoint.load(folder).classifier.bias[0])

    write(1)
    kill_at_random(out, write, number_in, times)
    write(7)
    assert number_in(out) == 7 and os.listdir(tmp_path) == ["out"]


def limited(act, limit: int) -> int:
    """Runs act() in a fork that can write no file beyond `limit` bytes, as if the disk were full there."""
    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        act()

    return finish(start(run))


@pytest.mark.parametrize("limit", [0, 10, 1000, 50_000])
def test_full_disk_leaves_the_old_folder(limit, tmp_path):
    storage.write_folder(tmp_path / "out", fill(1))
    assert limited(lambda: storage.write_folder(tmp_path / "out", fill(2), overwrite=True), limit) == 3
    assert number_of(tmp_path / "out") == 1
    assert os.listdir(tmp_path) == ["out"]
    assert_next_save_works(tmp_path / "out")


def test_full_disk_leaves_the_old_model(small, tmp_path):
    checkpoint.save(small, tmp_path / "out")
    old = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for act in (lambda: checkpoint.save(small, tmp_path / "out", overwrite=True),
                lambda: checkpoint.export_dense(small, tmp_path / "out", overwrite=True),
                lambda: checkpoint.save(small, tmp_path / "new"), lambda: small.save_pretrained(tmp_path / "out")):
        for limit in (500, 5000):  # in config.json, in the weights
            assert limited(act, limit) == 3
            assert old == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
            assert os.listdir(tmp_path) == ["out"]


def test_full_file_system(tmp_path):
    """A real one of 400 kB, where mounting is allowed: one folder fits, its successor beside it does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        storage.write_folder(disk / "out", fill(1))
        (disk / "ballast").write_bytes(bytes(150_000))
        with pytest.raises(StorageError, match="out: could not be written: .*No space left"):
            storage.write_folder(disk / "out", fill(2), overwrite=True)
        assert number_of(disk / "out") == 1
        assert sorted(os.listdir(disk)) == ["ballast", "out"]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_writers_of_one_name(overwrite, tmp_path):
    """Started together: at least one wins, a loser is told so, the result is the save of a winner."""
    folder = tmp_path / "out"
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if overwrite:
            storage.write_folder(folder, fill(3))
        at = time.monotonic() + 0.05

        def write(number):
            while time.monotonic() < at:
                pass
            storage.write_folder(folder, fill(number), overwrite=overwrite)

        children = {number: start(lambda: write(number)) for number in (1, 2)}
        ended = {number: finish(child) for number, child in children.items()}
        assert set(ended.values()) <= {0, 3}
        assert ended[number_of(folder)] == 0
        if not overwrite:
            assert sorted(ended.values()) == [0, 3]
        assert_next_save_works(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two complete folders with the same names in them."""
    folder = tmp_path_factory.mktemp("damage")
    for number in (1, 2):
        storage.write_folder(folder / str(number), fill(number))
    return folder


def assert_damaged(folder: Path) -> None:
    with pytest.raises((IntegrityError, FormatError)):
        storage.verify(folder)


def test_every_truncation_is_found(two, tmp_path):
    folder = shutil.copytree(two / "1", tmp_path / "out")
    path = folder / "w.safetensors"
    good, start = path.read_bytes(), min(span["start"] for span in read_header(path).values())
    for length in [*range(0, start, 7), *range(start, len(good), len(good) // 200)]:
        path.write_bytes(good[:length])
        assert_damaged(folder)
        with pytest.raises(FormatError):  # the file alone, where no manifest says how long it was
            read_tensors(path)


@pytest.mark.parametrize("times", [1000, pytest.param(10_000, marks=NIGHTLY)])
def test_every_flipped_bit_is_found(two, times, tmp_path):
    folder = shutil.copytree(two / "1", tmp_path / "out")
    random.seed(times)
    for name in ("a.json", "w.safetensors", manifest.NAME):
        good = (folder / name).read_bytes()
        for _ in range(times // 3):
            place, bit = random.randrange(len(good)), 1 << random.randrange(8)
            (folder / name).write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1:])
            assert_damaged(folder)
        (folder / name).write_bytes(good)
    assert number_of(folder) == 1


def test_swapped_files_are_found(two, tmp_path):
    for name in ("a.json", "b.data", "w.safetensors", manifest.NAME):
        folder = shutil.copytree(two / "1", tmp_path / name)
        shutil.copy(two / "2" / name, folder / name)
        assert_damaged(folder)


@pytest.mark.parametrize("times", [3000, pytest.param(100_000, marks=NIGHTLY)])
def test_mutated_headers_are_refused_or_mean_what_they_say(two, times, tmp_path):
    """T-fuzz-load on the header: either FormatError, or every span lies in the file and has the size of its shape."""
    path, mutated = two / "1" / "w.safetensors", tmp_path / "w.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    random.seed(times)
    accepted = 0
    for _ in range(times):
        text = bytearray(data[8:8 + length])
        for _ in range(random.randint(1, 3)):
            place = random.randrange(len(text))
            text[place:place + random.randint(0, 2)] = random.choice([b"0", b"9", b"-", b"[", b"}", b'"', b",", b"\xff"])
        mutated.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length:])
        try:
            spans = read_header(mutated)
        except FormatError as error:
            assert "w.safetensors" in str(error)
            continue
        try:
            tensors = read_tensors(mutated)
        except FormatError:
            continue
        accepted += 1
        assert set(tensors) == set(spans)
        for name, span in spans.items():
            assert list(tensors[name].shape) == span["shape"]
            assert 8 <= span["start"] <= span["stop"] <= mutated.stat().st_size
            assert tensors[name].numel() * tensors[name].element_size() == span["stop"] - span["start"]
    assert 0 < accepted < times
