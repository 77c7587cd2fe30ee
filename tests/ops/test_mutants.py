"""T-mutants: runs mutants.py once; every planted bug must be caught by a check, and the right source by none."""
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import mutants  # noqa: E402  (beside this file, and run as a program by it)


pytestmark = pytest.mark.xdist_group("op mutants")  # one run for all who ask


@cache
def caught():
    done = subprocess.run([sys.executable, mutants.__file__], capture_output=True, text=True, timeout=300)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert len(found) == len(mutants.MUTANTS) + 1 and found[-1] != "died", done.stderr[-4000:]
    return found


@pytest.mark.timeout(300)
def test_the_right_source_passes_every_check():
    assert caught()[-1] is None


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", range(len(mutants.MUTANTS)))
def test_caught(number):
    found = caught()[number]
    assert found not in (None, "died") and not found.startswith("import:"), (found, mutants.MUTANTS[number])
