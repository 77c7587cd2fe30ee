"""The device primitives, the kernels built on them and the emulator they run on: C++ executables, plain and sanitized."""
import platform
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import building  # noqa: E402  (beside this file)

needs_host = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"),
                                reason="the emulator switches stacks on Linux x86-64 only")


@needs_host
@pytest.mark.timeout(300)  # a build, on a machine that does other things
@pytest.mark.parametrize("mode", ["plain", "sanitized"])
@pytest.mark.parametrize("name", building.tests())
def test_executable(name, mode, tmp_path):
    assert shutil.which(building.compiler()), "no C++ compiler"
    built = building.build(name, tmp_path / name, building.PLAIN if mode == "plain" else building.SANITIZED)
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    done = building.run(tmp_path / name)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("pass ") > 0 and "FAIL" not in done.stdout
