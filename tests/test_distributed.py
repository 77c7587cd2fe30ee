"""Two processes that share the texts train every structure to the parameters that one process with all texts reaches."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "trained_in_processes.py"


def trained(kind: str, count: int, folder: Path) -> dict[str, torch.Tensor]:
    out = folder / f"{kind}.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), str(SCRIPT),
               kind, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained("one", 1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one(kind, alone, tmp_path):
    """In fp64; what differs is the order in which gradients are added, and Adam divides by their size: 3 steps of 1e-2."""
    found = trained(kind, 2, tmp_path)
    assert alone["adapted.model.layers.0.self_attn.q_proj.u"].any()  # zeros before they learn
    assert found.keys() == alone.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-2 * 1e-9)
