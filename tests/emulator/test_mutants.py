"""Planted bugs must be found for the right reason: by a failed check or a report of the emulator, no broken build or crash.

A build each, so a change waits for one in thirty of them only; nightly all run."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import kernel_mutants  # noqa: E402  (beside this file)
from test_emulator import needs_host  # noqa: E402

CASES = [pytest.param(mutant, id=mutant.name.replace(" ", "_"), marks=[pytest.mark.nightly] if number % 30 else [])
         for number, mutant in enumerate(kernel_mutants.MUTANTS)]


def test_every_text_is_there_once():
    lost = [mutant.name for mutant in kernel_mutants.MUTANTS
            if (kernel_mutants.building.ROOT / mutant.file).read_text().count(mutant.old) != 1]
    assert not lost and len({mutant.name for mutant in kernel_mutants.MUTANTS}) == len(kernel_mutants.MUTANTS)


@needs_host
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", CASES)
def test_killed(mutant):
    assert kernel_mutants.outcome(mutant) == "killed"
