"""Decompositions against exact answers and derived bounds, on matrices that break solvers, and the ladder when one does."""
import pytest
import torch

import matrices
from lowfat import linalg
from lowfat.errors import NumericsError, ShapeError
from lowfat.linalg import (balance, closest_each, gram_of, gram_root, leading, quadratic, smaller_gram, spectrum, tails,
                           times, truncated_svd)

EPS = torch.finfo(torch.float64).eps
WEIGHTS = matrices.weights()


def noise(weight):
    """What rounding may change of a squared norm: each of the min(n, k) eigenvalues of the Gram matrix is off by at most its
    backward error, (n + k) eps times the largest (Weyl); twice, as the vectors that are kept may each miss as much."""
    return 2 * min(weight.shape) * sum(weight.shape) * EPS * weight.double().norm() ** 2


@pytest.mark.parametrize("name", WEIGHTS)
def test_truncated_svd_loses_the_tail_and_no_more(name):
    weight = WEIGHTS[name]
    exact = torch.linalg.svdvals(weight.double()).square()
    for rank in range(1, min(weight.shape) + 1):
        u, s, vt, solved = truncated_svd(weight, rank)
        assert solved.events == []
        assert u.dtype == s.dtype == vt.dtype == torch.float64
        assert u.shape == (weight.shape[0], rank) and s.shape == (rank,) and vt.shape == (rank, weight.shape[1])
        lost = (weight.double() - u * s @ vt).square().sum()
        assert abs(lost - exact[rank:].sum()) <= noise(weight)
        assert (s[:-1] >= s[1:]).all() and (s >= 0).all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_closest_of_a_stack_lose_their_tails(name):
    """Each matrix of the stack by itself: scaled ones beside it change nothing but their own."""
    weight = WEIGHTS[name].double()
    exact = torch.linalg.svdvals(weight).square()
    for rank in range(1, min(weight.shape) + 1):
        u, v, events = closest_each(torch.stack([weight, 2 * weight, torch.zeros_like(weight)]), rank)
        assert events == [] and u.shape == (3, weight.shape[0], rank) and v.shape == (3, rank, weight.shape[1])
        for scale, product in zip((1, 2, 0), u @ v):
            lost = (scale * weight - product).square().sum()
            assert abs(lost - scale ** 2 * exact[rank:].sum()) <= noise(scale * weight)


def test_a_stack_that_fails_is_solved_one_by_one(monkeypatch):
    eigh = torch.linalg.eigh

    def failing(matrix, out=None):
        if matrix.dim() == 3:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix, out=out)

    stack = torch.randn(3, 7, 5, dtype=torch.float64)
    u, v, _ = closest_each(stack, 2)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    other_u, other_v, events = closest_each(stack, 2)
    assert events == ["eigh of a stack: did not converge"]
    assert (u @ v - other_u @ other_v).norm() <= sum(noise(matrix) for matrix in stack).sqrt()


@pytest.mark.parametrize("name", ["fp64", "bf16", "wide", "transposed view", "orthogonal", "kahan"])
def test_singular_vectors_are_orthonormal_and_signed(name):
    weight = WEIGHTS[name]
    u, s, vt, _ = truncated_svd(weight, min(weight.shape))
    eye = torch.eye(len(s), dtype=torch.float64)
    # the side that was multiplied out is orthonormal up to the eigenvalues' error over the smallest of them
    bound = sum(weight.shape) ** 2 * EPS * float(s[0] / s[-1]) ** 2
    assert (vt @ vt.mT - eye).norm() <= bound and (u.mT @ u - eye).norm() <= bound
    assert (vt.gather(1, vt.abs().argmax(1, keepdim=True)) > 0).all()


def test_negating_the_weight_negates_u_alone():  # kills: signs fixed on u as well, or not at all
    weight = torch.randn(7, 5)
    (u, s, vt, _), (u2, s2, vt2, _) = truncated_svd(weight, 3), truncated_svd(-weight, 3)
    assert torch.equal(u2, -u) and torch.equal(s2, s) and torch.equal(vt2, vt)


def test_powers_of_two_scale_exactly():
    weight = torch.randn(7, 5)
    (u, s, vt, _), (u2, s2, vt2, _) = truncated_svd(weight, 3), truncated_svd(weight * 2.0**40, 3)
    assert torch.equal(u2, u) and torch.equal(s2, s * 2.0**40) and torch.equal(vt2, vt)


def test_scaled_rows_and_columns_are_those_of_the_scaled_matrix():
    rows, columns = torch.rand(9, dtype=torch.float64) + 0.1, torch.rand(6, dtype=torch.float64) + 0.1
    for weight in (torch.randn(9, 6), torch.randn(9, 6).double(), torch.randn(6, 9).mT):
        scaled = rows[:, None] * weight.double() * columns
        u, s, vt, _ = truncated_svd(weight, 4, rows=rows, columns=columns)
        assert abs((scaled - u * s @ vt).square().sum() - torch.linalg.svdvals(scaled)[4:].square().sum()) <= noise(scaled)
    wide = torch.randn(6, 9)
    expected = (columns[:, None] * wide.double() * rows).square().sum()  # the trace of the Gram matrix
    assert abs(smaller_gram(wide, columns, rows).trace() - expected) <= noise(wide)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_counted(bad):
    weight = torch.ones(4, 3)
    weight[1, 2] = weight[3, 0] = bad
    with pytest.raises(NumericsError, match=r"weight \[4, 3\] .* 2 of 12"):
        truncated_svd(weight, 1)


@pytest.mark.parametrize("rank", [0, 4, -1])
def test_impossible_ranks_are_named(rank):
    with pytest.raises(ShapeError, match=f"between 1 and 3 .* found {rank}"):
        truncated_svd(torch.ones(4, 3), rank)


def raises(*_, **__):
    raise torch.linalg.LinAlgError("did not converge\nmore text")


def not_finite(*_, **kwargs):
    return torch.tensor([float("nan")]), torch.full((1, 1), float("nan"))


@pytest.mark.parametrize("broken, reason", [(raises, "did not converge"), (not_finite, "not finite")])
def test_the_next_solver_takes_over_and_says_so(monkeypatch, broken, reason):
    weight = torch.randn(8, 5)
    exact = torch.linalg.svdvals(weight.double())[2:].square().sum()
    monkeypatch.setattr(linalg, "_eigh_in_place", broken)
    u, s, vt, solved = truncated_svd(weight, 2)
    assert len(solved.events) == 1 and reason in solved.events[0]
    assert abs((weight.double() - u * s @ vt).square().sum() - exact) <= noise(weight)
    _, vectors, solved = leading(lambda: gram_of(weight), 2)
    assert solved.solver == "svd" and len(solved.events) == 1 and reason in solved.events[0]
    assert abs((weight.double() @ vectors).square().sum() - (weight.double().square().sum() - exact)) <= noise(weight)


def test_truncated_svd_climbs_from_svd_to_gram_for_fp64(monkeypatch):
    weight = torch.randn(8, 5, dtype=torch.float64)
    exact = torch.linalg.svdvals(weight)[2:].square().sum()
    monkeypatch.setattr(torch.linalg, "svd", raises)
    u, s, vt, solved = truncated_svd(weight, 2)
    assert solved.events == ["svd in fp64: did not converge"] and "Gram" in solved.solver
    assert abs((weight - u * s @ vt).square().sum() - exact) <= noise(weight)


def test_when_all_solvers_fail_the_error_lists_them(monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", raises)
    monkeypatch.setattr(linalg, "_eigh_in_place", raises)
    with pytest.raises(NumericsError, match="every solver failed.*svd.*eigenvectors"):
        truncated_svd(torch.randn(4, 3, dtype=torch.float64), 1)


def test_small_blocks_give_the_same_products(monkeypatch):  # kills: rows of the wrong block, a forgotten last block
    weight, right = torch.randint(-4, 5, (37, 23)).float(), torch.randint(-4, 5, (23, 5)).double()
    gram = torch.randint(-4, 5, (23, 23)).float()
    gram = gram + gram.T
    scale = 2.0 ** torch.randint(-2, 3, (37,)).double()
    monkeypatch.setattr(linalg, "_BLOCK", 1)
    monkeypatch.setattr(linalg, "_ROWS", 2)
    w, c = weight.double(), gram.double()  # whole numbers: exact in any order
    assert torch.equal(gram_of(weight), w.mT @ w)
    assert torch.equal(gram_of(weight, rows=scale), (scale[:, None] * w).mT @ (scale[:, None] * w))
    assert torch.equal(times(weight, right), w @ right)
    assert torch.equal(quadratic(weight, gram, 3.0), w @ (c + 3 * torch.eye(23, dtype=torch.float64)) @ w.mT)
    assert gram.diagonal().equal(c.diagonal().float())  # the shift went to a copy


@pytest.mark.parametrize("name", matrices.inputs(6))
@pytest.mark.parametrize("solver", ["cholesky", "eigen"])
def test_a_root_multiplies_back_to_its_gram_matrix(name, solver):
    x = matrices.inputs(6)[name]
    gram = x.mT @ x
    shift = 1e-6 * float(gram.diagonal().mean()) or 1.0
    root = gram_root(gram, solver, shift)
    eye = torch.eye(6, dtype=torch.float64)
    factor = root.times(eye)
    exact = gram.double() + shift * eye
    assert torch.equal(root.applied(eye), factor)
    # the backward error of either decomposition; and what fp32 made indefinite is put right by no more than its rounding
    allowed = 6 * 6 * EPS * exact.norm() + 6 * torch.finfo(torch.float32).eps * gram.norm()
    assert (factor @ factor.mT - exact).norm() <= allowed
    inverse = root.solved(eye)
    assert inverse.isfinite().all()
    condition = float(factor.norm() * inverse.norm())
    assert (inverse @ factor - eye).norm() <= 6 * 6 * EPS * condition
    assert (root.whitened(eye) @ factor.mT - eye).norm() <= 6 * 6 * EPS * condition


def test_cholesky_adds_to_the_diagonal_and_then_gives_way():
    x = torch.randn(3, 6, dtype=torch.float64)
    singular = x.mT @ x
    root = gram_root(singular, "cholesky")
    assert root.events in ([], ["cholesky: 1e-08 of the mean diagonal added"]) and root.scale is None
    indefinite = singular - 0.5 * torch.eye(6, dtype=torch.float64) * singular.diagonal().mean()
    root = gram_root(indefinite, "cholesky")
    assert root.events == ["cholesky: not positive definite, eigenvalues clipped"]
    assert root.scale.isfinite().all() and (root.scale > 0).all()


def test_jitter_is_recorded():
    gram = torch.diag(torch.tensor([1.0, 1.0, -1e-5], dtype=torch.float64))
    assert gram_root(gram, "cholesky").events == ["cholesky: 0.0001 of the mean diagonal added"]


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("n, k, r", [(7, 9, 4), (9, 7, 7), (1, 1, 1), (700, 5, 5), (5, 700, 3)])
def test_balance_keeps_the_product_and_evens_the_factors(n, k, r, scale):
    u, v = torch.randn(n, r, dtype=torch.float64) * scale, torch.randn(r, k, dtype=torch.float64) / scale
    new_u, new_v = balance(u, v)
    exact = u @ v
    s = torch.linalg.svdvals(exact)[:r]
    # a backward stable chain of three products and two decompositions of size r, relative to the factors' norms
    bound = 8 * r * (r + 2) * EPS * u.norm() * v.norm() / s[-1] * s[0]
    assert (new_u @ new_v - exact).norm() <= bound
    assert (new_u.mT @ new_u - torch.diag(s)).norm() <= bound and (new_v @ new_v.mT - torch.diag(s)).norm() <= bound
    assert new_v.is_contiguous() and new_u.is_contiguous()


def test_balance_takes_a_product_for_u():
    weight, right, v = torch.randn(30, 8), torch.randn(8, 3, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    u = weight.double() @ right
    (u1, v1), (u2, v2) = balance(u, v), balance(weight, v, right=right)
    bound = 8 * 8 * 8 * EPS * u.norm() * v.norm()
    assert (u1 @ v1 - u2 @ v2).norm() <= bound and u2.dtype == v2.dtype == torch.float64


def test_balance_of_a_deficient_product_leaves_zeros():
    u, v = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    u[:, 1] = u[:, 0]
    new_u, new_v = balance(u, v, torch.float32)
    assert new_u.dtype == new_v.dtype == torch.float32
    assert (new_u[:, 2] == 0).all() and (new_v[2] == 0).all()
    zero_u, zero_v = balance(torch.zeros(6, 2), torch.zeros(2, 5))
    assert not zero_u.any() and not zero_v.any()


def test_tails_are_what_is_cut_off():
    assert tails(torch.tensor([4.0, 2.0, 1.0])).tolist() == [7.0, 3.0, 1.0, 0.0]
    assert spectrum(lambda: torch.diag(torch.tensor([1.0, 4.0, -1e-18], dtype=torch.float64))).tolist() == [4.0, 1.0, 0.0]


def test_the_same_call_gives_the_same_bits():
    weight = torch.randn(40, 30)
    first, second = truncated_svd(weight, 10), truncated_svd(weight.clone(), 10)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3]))
