"""T-mutants: runs mutants.py and its siblings once; every planted bug must be caught by a check, and the right source by
none."""
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import low_rank_sparse_mutants  # noqa: E402  (beside this file, and run as a program by it)
import mutants  # noqa: E402
import sparse_mutants  # noqa: E402
import wavelet_mutants  # noqa: E402

PROGRAMS = {"low_rank": mutants, "sparse": sparse_mutants, "low_rank_sparse": low_rank_sparse_mutants,
            "wavelet": wavelet_mutants}
ONE_RUN = {name: pytest.mark.xdist_group(f"mutants of {name}") for name in PROGRAMS}  # for all who ask
ROWS = [pytest.param(name, number, marks=ONE_RUN[name])
        for name, program in PROGRAMS.items() for number in range(len(program.MUTANTS))]


@cache
def caught(name):
    program = PROGRAMS[name]
    done = subprocess.run([sys.executable, program.__file__], capture_output=True, text=True, timeout=300)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert len(found) == len(program.MUTANTS) + 1 and found[-1] != "died", done.stderr[-4000:]
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [pytest.param(name, marks=ONE_RUN[name]) for name in PROGRAMS])
def test_the_right_source_passes_every_check(name):
    assert caught(name)[-1] is None


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name, number", ROWS)
def test_caught(name, number):
    found = caught(name)[number]
    mutant = PROGRAMS[name].MUTANTS[number]
    assert found not in (None, "died") and not found.startswith("import:"), (found, mutant)
