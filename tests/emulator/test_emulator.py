"""The device primitives, the kernels built on them and the emulator they run on: C++ executables, plain and sanitized."""
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
from sass.machine_code import ARCHS, nvcc, symbols

sys.path.insert(0, str(Path(__file__).parent))
import building  # noqa: E402  (beside this file)

needs_host = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"),
                                reason="the emulator switches stacks on Linux x86-64 only")
one_process = pytest.mark.xdist_group("plain")  # a run is asked for twice

@cache
def ran(name: str, mode: str) -> subprocess.CompletedProcess:
    """A test executable's run, once for all who ask."""
    assert shutil.which(building.compiler()), "no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        built = building.build(name, Path(folder) / name, building.PLAIN if mode == "plain" else building.SANITIZED)
        assert built.returncode == 0, built.stderr
        assert "warning" not in built.stderr, built.stderr
        return building.run(Path(folder) / name, "--kernels")


@needs_host
@pytest.mark.timeout(600)  # a build, on a machine that does other things
@pytest.mark.parametrize("mode", [pytest.param("plain", marks=one_process), "sanitized"])
@pytest.mark.parametrize("name", building.tests())
def test_executable(name, mode):
    done = ran(name, mode)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("pass ") > 0 and "FAIL" not in done.stdout


@needs_host
@pytest.mark.skipif(not nvcc(), reason="no nvcc on the path")
@pytest.mark.timeout(600)
@one_process
def test_the_kernels_that_nvcc_compiles_are_those_that_were_emulated(tmp_path):
    sources = sorted((building.ROOT / "csrc").glob("*/*.cu"))
    compiled = {symbol for source in sources for arch in ARCHS for symbol in symbols(source, arch, tmp_path / "cubin")}
    lines = "\n".join(ran(name, "plain").stdout for name in building.tests())
    ops = "|".join(f"{len(folder.name)}{folder.name}" for folder in {source.parent for source in sources})
    emulated = set(re.findall(rf"^kernel (_ZN(?:{ops})\S+)$", lines, re.MULTILINE))
    assert compiled and emulated == compiled
