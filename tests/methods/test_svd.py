"""Plain truncated SVD: against the answer that linear algebra knows."""
import torch

from lowfat.methods import METHODS
from lowfat.structures import LowRank


def test_the_error_is_the_tail_of_the_singular_values():
    weight = torch.randn(20, 13, dtype=torch.float64)
    s = torch.linalg.svdvals(weight)
    curve = METHODS["svd"].losses(weight, None)
    for rank in range(1, 14):
        layer, _ = METHODS["svd"].factorize(weight, None, None, rank=rank)
        bound = 20 * 13 * torch.finfo(torch.float64).eps * s[0] ** 2
        assert abs((weight - layer.dense()).square().sum() - s[rank:].square().sum()) <= bound
        assert abs(curve[rank] - s[rank:].square().sum()) <= bound


def test_a_matrix_of_the_rank_is_found_again():
    planted = torch.randint(-3, 4, (20, 4)).double() @ torch.randint(-3, 4, (4, 13)).double()
    layer, _ = METHODS["svd"].factorize(planted, None, None, rank=4)
    assert (layer.dense() - planted).norm() <= 20 * 13 * torch.finfo(torch.float64).eps * planted.norm()


def test_the_structure_alone_does_the_same():
    weight, bias = torch.randn(20, 13), torch.randn(20)
    ours, _ = METHODS["svd"].factorize(weight, bias, None, rank=5)
    plain = LowRank.from_dense(weight, bias, rank=5)
    assert torch.equal(ours.u, plain.u) and torch.equal(ours.v, plain.v) and torch.equal(ours.bias, plain.bias)
