"""The conformance program: the emulator's side runs, the GPU's side compiles, and a wrong bit is told."""
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "bench" / "conformance" / "conformance.cu"
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulator'}"]
needs_host = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"),
                                reason="the emulator switches stacks on Linux x86-64 only")


def load(name):
    spec = importlib.util.spec_from_file_location(name, SOURCE.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The file that the emulator writes."""
    folder = tmp_path_factory.mktemp("conformance")
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O0", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi",
               "-rdynamic", "-x", "c++", *INCLUDES, str(SOURCE), "-o", str(folder / "conformance"), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0 and "warning" not in built.stderr, built.stderr
    subprocess.run([str(folder / "conformance"), str(folder / "words")], check=True, capture_output=True)
    return folder / "words"


@needs_host
def test_every_case_says_something(emulated):
    """Grids report how many answers were wrong: none. All others have written their output and more than one value."""
    cases = load("compare").read(emulated)
    assert len(cases) > 60
    for name, words in cases.items():
        if name in ("grid barrier", "tickets"):
            assert not words.any(), name
        else:
            assert len(set(words.tolist())) > 8, name
    assert cases["dependent launch"][-1] == 0


@needs_host
def test_every_kernel_and_instruction_has_a_case(emulated):
    """Kills a primitive that was added without one: primitives.cu has a kernel for each, and each is launched here."""
    source = (ROOT / "tests" / "emulator" / "primitives.cu").read_text()
    kernels = re.findall(r"__global__ void __launch_bounds__\(\d+\) (\w+)\(", source)
    launched = set(re.findall(r"\b(?:start\((\w+)<)", SOURCE.read_text()))
    assert len(kernels) > 10 and set(kernels) <= launched, set(kernels) - launched


@needs_host
def test_a_wrong_bit_and_a_missing_word_are_told(emulated):
    compare = load("compare")
    expected = compare.read(emulated)
    assert all(row["passed"] for row in compare.compare(expected, expected))
    found = {name: words.copy() for name, words in expected.items()}
    found["mma bf16"][77] ^= 1 << 31
    found["tickets"] = found["tickets"][:0]
    del found["stmatrix x4"]
    found["unheard of"] = found["mma fp16"]
    rows = {row["case"]: row for row in compare.compare(found, expected)}
    assert rows["mma bf16"]["passed"] is False and "word 77" in rows["mma bf16"]["why"]
    assert rows["tickets"]["passed"] is False and rows["unheard of"]["passed"] is False
    assert rows["stmatrix x4"]["passed"] is None
    assert all(row["passed"] for name, row in rows.items() if name not in ("mma bf16", "tickets", "stmatrix x4", "unheard of"))


@needs_host
def test_the_command_fails_where_a_bit_differs(emulated, tmp_path):
    def command(found):
        return subprocess.run([sys.executable, str(SOURCE.with_name("compare.py")), str(found), str(emulated), "--out",
                               str(tmp_path / "rows.json")], capture_output=True, text=True)

    assert command(emulated).returncode == 0
    data = bytearray(emulated.read_bytes())
    data[-1] ^= 1
    (tmp_path / "wrong").write_bytes(data)
    done = command(tmp_path / "wrong")
    assert done.returncode == 1 and done.stdout.count("FAIL") == 1
    (tmp_path / "short").write_bytes(data[:-2])
    assert "cut off" in command(tmp_path / "short").stderr
    (tmp_path / "none").write_bytes(b"")
    assert command(tmp_path / "none").returncode == 1  # nothing ran: not a pass


@needs_host
def test_after_a_crash_the_next_case_goes_on(emulated, tmp_path):
    """As gpu.sh starts it again: the case that crashed is there without words, so that it fails, and the others are whole."""
    compare, found = load("compare"), tmp_path / "words"
    names = list(compare.read(emulated))
    subprocess.run([str(emulated.parent / "conformance"), str(found), "0"], check=True, capture_output=True)
    whole = found.read_bytes()
    at = whole.index(names[7].encode()) - 4
    found.write_bytes(whole[:at])  # case 7 crashed
    subprocess.run([str(emulated.parent / "conformance"), str(found), "8"], check=True, capture_output=True)
    rows = {row["case"]: row["passed"] for row in compare.compare(compare.read(found), compare.read(emulated))}
    assert rows == {name: name != names[7] for name in names}


@pytest.mark.timeout(300)
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nvcc_compiles_it(arch, tmp_path):
    built = subprocess.run(["nvcc", "-std=c++17", "-O1", *INCLUDES, f"-gencode=arch=compute_{arch},code=sm_{arch}",
                            str(SOURCE), "-o", str(tmp_path / "conformance")], capture_output=True, text=True)
    assert built.returncode == 0 and "warning" not in built.stderr, built.stderr
