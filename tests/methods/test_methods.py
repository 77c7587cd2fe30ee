"""What every method must do: the identities, optimality and edge cases of svd, fwsvd, whitened and kfac."""
import pytest
import torch

import matrices
from lowfat.errors import ArgumentError, NumericsError, ShapeError
from lowfat.methods import METHODS, check_arguments
from lowfat.stats import Stats

EPS = torch.finfo(torch.float64).eps
VARIANTS = [("svd", {}), ("fwsvd", {}), ("fwsvd", {"side": "out"}), ("fwsvd", {"side": "both"}), ("fwsvd", {"exact": True}),
            ("sparsity_aware", {"drop": False}), ("sparsity_aware", {"drop": False, "exact": True}),
            ("whitened", {}), ("whitened", {"solver": "cholesky"}), ("whitened", {"solver": "eigen"}),
            ("whitened", {"solver": "output"}), ("kfac", {}), ("kfac", {"shrink_in": 0.0, "shrink_out": 0.5})]
IDS = ["-".join([name, *map(str, arguments.values())]) for name, arguments in VARIANTS]
every_method = pytest.mark.parametrize("name, arguments", VARIANTS, ids=IDS)
closed_forms = pytest.mark.parametrize("name, arguments", [v for v in VARIANTS if "exact" not in v[1]])
SHAPES = [(14, 9), (9, 14), (11, 11)]


def stats_for(weight, x=None):
    """Anisotropic inputs and gradients and an uneven Fisher matrix for a weight [n, k], in its dtype or fp32."""
    n, k = weight.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    x = torch.randn(4 * k, k, dtype=dtype) @ torch.diag(torch.logspace(0, -1, k, dtype=dtype)) if x is None else x
    fisher = torch.rand(n, k, dtype=dtype) ** 4
    g = torch.randn(4 * n, n, dtype=dtype) @ torch.diag(torch.logspace(-3, -2, n, dtype=dtype))
    return Stats(x.mT @ x, len(x), fisher.sum(0), fisher.sum(1), fisher, samples=7, gram_out=g.mT @ g)


def made(name, weight, stats, rank, **arguments):
    layer, events = METHODS[name].factorize(weight, None, stats, rank=rank, **arguments)
    assert events == []
    return layer


@every_method
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_the_weight_back(name, arguments, shape):
    weight = torch.randn(shape, dtype=torch.float64)
    stats = stats_for(weight)
    dense = made(name, weight, stats, min(shape), **arguments).dense()
    # weights and roots of the Gram matrix span less than 1e3 here, and enter twice
    assert (dense - weight).norm() <= sum(shape) ** 2 * EPS * 1e6 * weight.norm()


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_factors_are_balanced_and_in_the_dtype_of_the_weight(name, arguments, dtype):
    weight = torch.randn(14, 9).to(dtype)
    layer = made(name, weight, stats_for(weight), 4, **arguments)
    assert layer.u.dtype == layer.v.dtype == dtype and layer.bias is None
    assert layer.u.is_contiguous() and layer.v.is_contiguous()
    left, right = layer.u.double().mT @ layer.u.double(), layer.v.double() @ layer.v.double().mT
    # each factor was rounded once; for fp64 the whole chain of rounded steps counts, about n + k of them
    bound = 4 * (torch.finfo(dtype).eps + (14 + 9) ** 2 * EPS * 1e3) * left.diagonal().sum()
    assert (left - right).norm() <= bound
    assert (left - torch.diag(left.diagonal())).norm() <= bound


@closed_forms
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_curve_is_what_is_measured(name, arguments, shape):
    weight = torch.randn(shape, dtype=torch.float64)
    stats = stats_for(weight)
    curve = METHODS[name].losses(weight, stats, **arguments)
    assert curve.shape == (min(shape) + 1,) and curve.dtype == torch.float64 and curve[-1] == 0
    assert (curve[:-1] >= curve[1:]).all()
    for rank in range(1, min(shape) + 1):
        residual = weight - made(name, weight, stats, rank, **arguments).dense()
        measured = metric(name, residual, stats, **arguments)
        assert abs(measured - curve[rank]) <= sum(shape) ** 2 * EPS * 1e3 * curve[0], rank
    assert abs(metric(name, weight, stats, **arguments) - curve[0]) <= sum(shape) ** 2 * EPS * 1e3 * curve[0]


def mixed(gram, share):
    """kfac's C + (share of the mean diagonal), in its scale: over 1 - share; without a share whitening's damping."""
    return gram + max(share / (1 - share), 1e-6) * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def metric(name, residual, stats, side="in", exact=False, drop=False, solver=None, shrink_in=0.1, shrink_out=0.3):
    """The squared loss of each method written as its definition, damping and guard as documented."""
    if name == "svd":
        return residual.square().sum()
    if name == "whitened":
        damping = 1e-6 * stats.gram.diagonal().mean()
        return ((residual @ stats.gram) * residual).sum() + damping * residual.square().sum()
    if name == "kfac":
        return ((residual @ mixed(stats.gram, shrink_in)) * (mixed(stats.gram_out, shrink_out) @ residual)).sum()
    n, k = residual.shape
    o, c = stats.fisher_out / stats.fisher_out.mean() + 1e-5, stats.fisher_in / stats.fisher_in.mean() + 1e-5
    o, c = torch.ones(n) if side == "in" else o, torch.ones(k) if side == "out" else c
    return stats.fisher.mean() * (o[:, None] * c * residual.square()).sum()


@every_method
def test_losing_rank_never_helps(name, arguments):
    weight = torch.randn(9, 14, dtype=torch.float64)
    stats = stats_for(weight)
    if arguments.get("exact"):
        losses = [(stats.fisher * (weight - made(name, weight, stats, rank, **arguments).dense()).square()).sum()
                  for rank in range(1, 10)]
    else:
        losses = [metric(name, weight - made(name, weight, stats, rank, **arguments).dense(), stats, **arguments)
                  for rank in range(1, 10)]
    assert all(b <= a for a, b in zip(losses, losses[1:]))


@closed_forms
def test_no_other_matrix_of_the_rank_is_better(name, arguments):
    """100 perturbed candidates and 20 random starts polished by alternating least squares."""
    weight = torch.randn(9, 14, dtype=torch.float64)
    stats, rank = stats_for(weight), 3
    layer = made(name, weight, stats, rank, **arguments)
    best = metric(name, weight - layer.dense(), stats, **arguments)
    for scale in torch.logspace(-3, 0, 100).tolist():
        u, v = layer.u + scale * torch.randn_like(layer.u), layer.v + scale * torch.randn_like(layer.v)
        assert metric(name, weight - u @ v, stats, **arguments) >= best
    for _ in range(20):
        other = weight - polished(name, weight, stats, rank, arguments)
        assert metric(name, other, stats, **arguments) >= best * (1 - 1e3 * EPS)


def polished(name, weight, stats, rank, arguments):
    """Alternating least squares in the method's metric tr(O E C E^T): both half steps are closed forms."""
    n, k = weight.shape
    gram, o = torch.eye(k, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    if name == "whitened":
        gram = stats.gram + 1e-6 * stats.gram.diagonal().mean() * gram
    if name in ("fwsvd", "sparsity_aware") and arguments.get("side") != "out":
        gram = torch.diag(stats.fisher_in / stats.fisher_in.mean() + 1e-5)
    if name == "fwsvd" and arguments.get("side", "in") != "in":
        o = torch.diag(stats.fisher_out / stats.fisher_out.mean() + 1e-5)
    if name == "kfac":
        gram = mixed(stats.gram, arguments.get("shrink_in", 0.1))
        o = mixed(stats.gram_out, arguments.get("shrink_out", 0.3))
    v = torch.randn(rank, k, dtype=torch.float64)
    for _ in range(30):
        u = torch.linalg.solve(v @ gram @ v.mT, v @ gram @ weight.mT).mT
        v = torch.linalg.solve(u.mT @ o @ u, u.mT @ o @ weight)
    return u @ v


@every_method
def test_projecting_twice_changes_nothing(name, arguments):
    weight = torch.randn(14, 9, dtype=torch.float64)
    stats = stats_for(weight)
    once = made(name, weight, stats, 4, **arguments).dense()
    twice = made(name, once.clone(), stats, 4, **arguments).dense()
    assert (once - twice).norm() <= (14 + 9) ** 2 * EPS * 1e6 * weight.norm()


@every_method
def test_scaling_by_a_power_of_two_scales_the_result_exactly(name, arguments):
    weight = torch.randn(14, 9)
    stats = stats_for(weight)
    a, b = (made(name, w, stats, 4, **arguments) for w in (weight, weight * 2.0**20))
    assert torch.equal(a.u * 2.0**10, b.u) and torch.equal(a.v * 2.0**10, b.v)


@every_method
def test_permuting_outputs_permutes_the_result(name, arguments):
    weight, order = torch.randn(14, 9, dtype=torch.float64), torch.randperm(14)
    stats = stats_for(weight)
    moved = Stats(stats.gram, stats.rows, stats.fisher_in, stats.fisher_out[order], stats.fisher[order], 7,
                  stats.gram_out[order][:, order])
    a, b = made(name, weight, stats, 4, **arguments), made(name, weight[order], moved, 4, **arguments)
    assert (a.dense()[order] - b.dense()).norm() <= (14 + 9) ** 2 * EPS * 1e6 * weight.norm()


@every_method
def test_the_bias_is_kept_as_it_is(name, arguments):
    weight, bias = torch.randn(5, 7), torch.randn(5)
    layer, _ = METHODS[name].factorize(weight, bias, stats_for(weight), rank=2, **arguments)
    assert torch.equal(layer.bias, bias) and layer.bias.data_ptr() != bias.data_ptr()


@every_method
def test_repeated_calls_give_the_same_bits_and_leave_their_inputs(name, arguments):
    weight = torch.randn(14, 9)
    stats = stats_for(weight)
    before = weight.clone(), {field: tensor.clone() for field, tensor in stats.tensors().items()}
    a, b = made(name, weight, stats, 4, **arguments), made(name, weight, stats, 4, **arguments)
    assert torch.equal(a.u, b.u) and torch.equal(a.v, b.v)
    assert torch.equal(weight, before[0])
    assert all(torch.equal(stats.tensors()[field], was) for field, was in before[1].items())


@every_method
@pytest.mark.parametrize("weight", matrices.weights())
def test_degenerate_weights_never_give_nan(name, arguments, weight):
    weight = matrices.weights()[weight]
    stats = stats_for(weight)
    for rank in {1, min(weight.shape)}:
        layer, _ = METHODS[name].factorize(weight, None, stats, rank=rank, **arguments)
        assert layer.u.isfinite().all() and layer.v.isfinite().all()
        residual = (weight.double() - layer.u.double() @ layer.v.double()).norm()
        if name == "svd":  # nothing may be worse than the zero matrix, but for what storing rounds
            assert residual <= weight.double().norm() * (1 + torch.finfo(weight.dtype).eps)
    assert METHODS[name].losses(weight, stats, **arguments).isfinite().all()


@pytest.mark.parametrize("x", matrices.inputs(9))
@pytest.mark.parametrize("solver", ["auto", "cholesky", "eigen", "output"])
@pytest.mark.parametrize("n", [12, 5])
def test_degenerate_inputs_never_give_nan(x, solver, n):
    x, weight = matrices.inputs(9)[x], torch.randn(n, 9)
    stats = stats_for(weight, x)
    layer, events = METHODS["whitened"].factorize(weight, None, stats, rank=3, solver=solver)
    assert layer.u.isfinite().all() and layer.v.isfinite().all()
    assert METHODS["whitened"].losses(weight, stats, solver=solver).isfinite().all()
    # summed in fp32, the Gram matrix of constant tokens is indefinite by more than the damping; that is said
    assert events == [] or events == ["cholesky: 1e-06 of the mean diagonal added"] or not x.any()
    if not x.any():
        assert events == ["no input energy in the calibration: plain SVD"]
        plain = made("svd", weight, None, 3).dense()
        assert (layer.dense() - plain).norm() <= 4 * torch.finfo(torch.float32).eps * weight.norm()
    residual, energy = ((weight - layer.dense()) @ x.mT).double().norm(), (weight @ x.mT).double().norm()
    assert residual <= energy * (1 + 1e-6)  # the damping, in the square: no better than that is asked for


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(name, arguments, bad):
    weight = torch.randn(5, 7)
    stats = stats_for(weight)
    weight[2, 3] = bad
    with pytest.raises(NumericsError, match=r"weight \[5, 7\] holds NaN or infinity in 1 of 35"):
        METHODS[name].factorize(weight, None, stats, rank=2, **arguments)
    with pytest.raises(NumericsError, match="weight"):
        METHODS[name].losses(weight, stats, **arguments)


@every_method
@pytest.mark.parametrize("rank", [0, 6])
def test_impossible_ranks_are_refused(name, arguments, rank):
    weight = torch.randn(5, 7)
    with pytest.raises(ShapeError, match="between 1 and 5"):
        METHODS[name].factorize(weight, None, stats_for(weight), rank=rank, **arguments)


@pytest.mark.parametrize("method, arguments, says", [
    ("magic", {}, "method must be one of svd, fwsvd, whitened, kfac, monarch, .*; found 'magic'"),
    (None, {}, "found None"),
    ("svd", {"side": "in"}, "svd has no argument 'side'; it has form"),
    ("svd", {"form": "dense"}, "svd: form must be one of 'factors', 'pivoted'; found 'dense'"),
    ("fwsvd", {"side": "up"}, "side must be one of 'in', 'out', 'both'; found 'up'"),
    ("fwsvd", {"exact": 1}, "exact must be one of False, True; found 1"),
    ("whitened", {"rank": 3}, "no argument 'rank'")])
def test_unknown_names_and_values_are_refused(method, arguments, says):
    with pytest.raises(ArgumentError, match=says):
        check_arguments(method, arguments)
