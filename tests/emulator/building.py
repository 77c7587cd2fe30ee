"""Builds the test executables of this folder with the host compiler, from the sources of this tree or of a changed copy."""
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", "-rdynamic"]
PLAIN = ["-O2"]  # the compiler may move accesses about, as nvcc would
FAST = ["-O0"]  # for mutants: half the time to build
SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def tests() -> list[str]:
    """Names of the executables: one per *_test.cpp."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*_test.cpp"))


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def build(name: str, to: Path, mode: list[str], root: Path = ROOT) -> subprocess.CompletedProcess:
    """Compiles tests/emulator/<name>.cpp of the tree at root into the file `to`; kernels are found as from csrc/."""
    folder = root / "tests" / "emulator"
    command = [compiler(), *FLAGS, *mode, f"-I{root / 'csrc'}", f"-I{folder}", str(folder / f"{name}.cpp"), "-o", str(to)]
    return subprocess.run([*command, "-ldl"], capture_output=True, text=True)


def run(executable: Path, *arguments: str, seconds: float = 300) -> subprocess.CompletedProcess:
    """Runs a test; a sanitizer's own exit code is 99, so that it cannot pass for a failed case."""
    environment = {**os.environ, "ASAN_OPTIONS": "exitcode=99:detect_leaks=0"}  # stopped threads never free what they had
    return subprocess.run([str(executable), *arguments], capture_output=True, text=True, timeout=seconds, env=environment)
