"""`import lowfat` binds the public names and imports nothing that the command line alone needs."""
import subprocess
import sys

import pytest

import lowfat


@pytest.mark.parametrize("name", lowfat.__all__)
def test_public_names_are_bound_at_import(name):
    assert getattr(lowfat, name).__doc__ is not None


def test_import_brings_in_torch_only():
    code = ("import sys, lowfat; "
            "print(*sorted({'transformers', 'accelerate', 'safetensors', 'typer', 'rich', 'matplotlib'} & set(sys.modules)))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
