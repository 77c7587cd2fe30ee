"""T-inputs: runs the table of inputs.py, one child process per op, continued after a crash."""
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "ops"))
import inputs  # noqa: E402  (beside this file, and run as a program by it)


@cache
def outcomes(op):
    found, path = {}, os.pathsep.join(p for p in (str(TESTS), os.environ.get("PYTHONPATH")) if p)
    due = inputs.cases_of(op)
    while due:
        child = subprocess.run([sys.executable, str(TESTS / "ops" / "inputs.py"), op, str(due[0] - 1)], text=True,
                               capture_output=True, timeout=60, env=os.environ | {"PYTHONPATH": path})
        for line in child.stdout.splitlines():
            number, failure = json.loads(line)
            found[number] = failure
        due = [number for number in due if number not in found]
        if due:
            found[due[0]] = f"the process died with {child.returncode}\n{child.stderr[-2000:]}"
            due = due[1:]
    return found


ROWS = [(op, number) for op in inputs.CALLERS for number in inputs.cases_of(op)]
ON_GPU = [f"{op} on cuda" for op in inputs.CALLERS if op.startswith("torch.ops")]
GPU_ROWS = [pytest.param(op, number, marks=pytest.mark.gpu) for op in ON_GPU for number in inputs.cases_of(op)]


@pytest.mark.parametrize("op,number", ROWS + GPU_ROWS)
def test_survives_or_rejects(op, number):
    failure = outcomes(op)[number]
    assert failure is None, f"{inputs.CASES[number].__doc__}\n{failure}"


def test_every_class_has_a_row():
    assert sorted(inputs.CASES | inputs.NOT_HERE) == list(range(1, 41))


def test_every_op_has_a_row():
    registered = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("lowfat::")}
    called = {name for name in registered if not name.endswith("_reference")}  # those are what kernels of an op fall back to
    assert {f"torch.ops.{name.replace('::', '.')}" for name in called} <= inputs.CALLERS.keys()
