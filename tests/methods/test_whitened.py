"""Whitened SVD: three solvers of one problem, against each other, against plain SVD, and against planted inputs."""
import os
import subprocess
import sys

import pytest
import torch

from lowfat.errors import ArgumentError
from lowfat.methods import METHODS
from lowfat.stats import Stats

EPS = torch.finfo(torch.float64).eps
SOLVERS = ["auto", "cholesky", "eigen", "output"]
factorize = METHODS["whitened"].factorize


def stats_of(x):
    return Stats(x.mT @ x, len(x))


def output_error(weight, layer, x):
    return ((weight - layer.dense()) @ x.mT).norm()


@pytest.mark.parametrize("n, k", [(30, 20), (20, 30), (24, 24), (1, 7), (7, 1)])
def test_all_solvers_agree(n, k):
    weight = torch.randn(n, k, dtype=torch.float64)
    x = torch.randn(200, k, dtype=torch.float64) @ torch.randn(k, k, dtype=torch.float64)
    for rank in {1, min(n, k) // 2 or 1, min(n, k)}:
        dense = [factorize(weight, None, stats_of(x), rank=rank, solver=solver)[0].dense() for solver in SOLVERS]
        for other in dense[1:]:
            assert (other - dense[0]).norm() <= 1e-10 * weight.norm()  # fp64, squared once by the Gram matrix


def test_white_inputs_give_plain_svd():
    weight = torch.randn(14, 9, dtype=torch.float64)
    plain = METHODS["svd"].factorize(weight, None, None, rank=4)[0].dense()
    for solver in SOLVERS:
        layer, _ = factorize(weight, None, Stats(torch.eye(9, dtype=torch.float64), 9), rank=4, solver=solver)
        assert (layer.dense() - plain).norm() <= (14 + 9) ** 2 * EPS * 1e3 * weight.norm()


def test_how_many_tokens_were_seen_does_not_matter():  # kills: a damping that is not relative to the Gram matrix
    weight, x = torch.randn(14, 9), torch.randn(50, 9)
    one, many = Stats(x.mT @ x, 50), Stats(2.0**20 * (x.mT @ x), 50 * 2**20)
    for solver in SOLVERS:
        a, b = (factorize(weight, None, stats, rank=4, solver=solver)[0].dense() for stats in (one, many))
        assert (a - b).norm() <= 14 * 9 * torch.finfo(torch.float32).eps * weight.norm()


def test_better_on_its_inputs_than_scaled_columns_and_those_better_than_plain_svd():
    """The better the metric, the smaller the output error where inputs are anisotropic."""
    weight = torch.randn(40, 32, dtype=torch.float64)
    x = torch.randn(400, 32, dtype=torch.float64) @ (torch.randn(32, 32, dtype=torch.float64)
                                                     * torch.logspace(0, -2, 32, dtype=torch.float64))
    diagonal = Stats(torch.diag((x.mT @ x).diagonal()), len(x))
    errors = [output_error(weight, layer, x) for layer in (
        factorize(weight, None, stats_of(x), rank=8)[0], factorize(weight, None, diagonal, rank=8)[0],
        METHODS["svd"].factorize(weight, None, None, rank=8)[0])]
    assert errors == sorted(errors)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_loud_input_feature_is_reconstructed_better(solver):
    """The orientation test: kills Gram matrices or weights taken the wrong way round, on a square weight."""
    weight, x = torch.randn(12, 12, dtype=torch.float64), torch.randn(100, 12, dtype=torch.float64)
    loud = x.clone()
    loud[:, 3] *= 100
    errors = [(weight - factorize(weight, None, stats_of(seen), rank=4, solver=solver)[0].dense())[:, 3].norm()
              for seen in (x, loud)]
    assert errors[1] < errors[0] / 10


def test_a_massive_channel_does_not_drown_the_others():
    """100 times as loud as the rest: those must still be weighed against each other, not by the damping."""
    weight, x = torch.randn(12, 9), torch.randn(200, 9) * torch.tensor([100, 1, 1, 1, 1, .01, .01, .01, .01])
    rest = torch.zeros(9)
    rest[1:5] = 1
    errors = [((weight - layer.dense()) * rest).norm() for layer in (
        factorize(weight, None, stats_of(x), rank=5)[0], METHODS["svd"].factorize(weight, None, None, rank=5)[0])]
    assert errors[0] < errors[1] / 2


def test_what_no_input_shows_is_kept_as_by_svd():
    """Dead channels: once the seen part is exact, the rank that is left goes to the unseen part, not to noise."""
    weight, x = torch.randn(12, 8, dtype=torch.float64), torch.randn(100, 8, dtype=torch.float64)
    x[:, 4:] = 0
    for solver in SOLVERS:
        layer, _ = factorize(weight, None, stats_of(x), rank=8, solver=solver)
        bound = (12 + 8) ** 2 * EPS / 1e-6  # the unseen part is weighed by the damping, in a matrix that squares the weight
        assert (weight - layer.dense()).norm() <= bound * weight.norm()


def test_missing_or_foreign_statistics_are_refused():
    with pytest.raises(ArgumentError, match="whitened needs calibration statistics"):
        factorize(torch.randn(5, 7), None, None, rank=2)
    with pytest.raises(ArgumentError, match=r"Gram matrix is \[5, 5\], the weight \[n, k\] \[5, 7\]"):
        factorize(torch.randn(5, 7), None, Stats(torch.eye(5), 5), rank=2)


MEMORY = """
import sys, torch
torch.set_num_threads(1)
from lowfat.methods import METHODS
from lowfat.stats import Stats

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

method, n, k = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rank = n * k // (2 * (n + k)) // 8 * 8
warm = torch.randn(512, 512, dtype=torch.float64) @ torch.randn(512, 512, dtype=torch.float64)  # the libraries' own buffers
weight = torch.empty(n, k, dtype=torch.bfloat16)
for rows in weight.split(256):
    rows.copy_(torch.randn(rows.shape))
before = status("VmRSS")
gram = torch.eye(k) + torch.outer(torch.randn(k), torch.ones(k)).triu_().mul_(1e-6)
gram += gram.mT.clone()
open("/proc/self/clear_refs", "w").write("5")
stats = Stats(gram, 100, torch.rand(k), torch.rand(n), None, 3)
METHODS[method].factorize(weight, None, stats, rank=rank)
print((status("VmHWM") - before) / (4 * n * k + 4 * k * k + 4 * rank * (n + k)))
"""


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads /proc")
@pytest.mark.parametrize("n, k", [(2048, 8192), (8192, 2048)])
@pytest.mark.parametrize("method", ["whitened", "svd", "fwsvd"])
def test_a_large_layer_takes_at_most_half_more_than_its_own_size(method, n, k):
    """Its size: the weight in fp32, the Gram matrix and the factors. Upcasting the Gram matrix alone would double it."""
    out = subprocess.run([sys.executable, "-c", MEMORY, method, str(n), str(k)], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert float(out.stdout) <= 1.5
