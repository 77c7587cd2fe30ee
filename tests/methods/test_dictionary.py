"""Solvers of W = S D: compot, rocket and cospadi, against whitened SVD, brute force, and matrices that are of the form."""
import itertools

import matrices
import pytest
import torch
from torch.nn.functional import normalize

import lowfat
from lowfat.errors import ArgumentError, NumericsError, ShapeError
from lowfat.methods import METHODS, check_arguments, compot, cospadi, dictionary, rocket
from lowfat.plan import POLICIES
from lowfat.stats import Stats

EPS = torch.finfo(torch.float64).eps
NAMES = ("compot", "rocket", "cospadi")
SHAPES = [(24, 14), (14, 24), (16, 16)]
every_method = pytest.mark.parametrize("name", NAMES)


def stats_of(x):
    return Stats(x.mT @ x, len(x))


def inputs(k, rows=300):
    return torch.randn(rows, k, dtype=torch.float64) @ torch.diag(torch.logspace(0, -1, k, dtype=torch.float64)) \
        @ torch.randn(k, k, dtype=torch.float64)


def metric(residual, stats):
    """||E X^T||_F^2, damping included."""
    gram = stats.gram.double()
    return float(((residual @ gram) * residual).sum() + 1e-6 * gram.diagonal().mean() * residual.square().sum())


def made(name, weight, stats, rank, **arguments):
    return METHODS[name].factorize(weight, None, stats, rank=rank, **arguments)[0]


@torch.no_grad()
def lost(name, weight, stats, rank, **arguments):
    return metric(weight.double() - made(name, weight, stats, rank, **arguments).double().dense(), stats)


@every_method
@pytest.mark.parametrize("n, k", SHAPES)
def test_full_rows_are_whitened_low_rank(name, n, k):
    """s = a: all three solvers give the truncated SVD in whitened coordinates."""
    weight, stats = torch.randn(n, k, dtype=torch.float64), stats_of(inputs(k))
    for rank in (1, 5, min(n, k)):
        ours = made(name, weight, stats, rank, density=1.0).dense()
        theirs = made("whitened", weight, stats, rank).dense()
        condition = float(torch.linalg.cond(stats.gram))
        assert (ours - theirs).norm() <= (n + k)**2 * EPS * condition * weight.norm()


@every_method
@pytest.mark.parametrize("n, k", SHAPES)
def test_the_solvers_objective_is_the_error_of_the_outputs(name, n, k):
    """||Z - S A|| of what the solver returns is what the layer loses."""
    weight, stats = torch.randn(n, k, dtype=torch.float64), stats_of(inputs(k))
    target = dictionary.whitened_target(weight, stats)
    solve = {"compot": compot, "rocket": rocket, "cospadi": cospadi}[name].solve
    codes, atoms, keep = solve(target, dictionary.Support(8, 3))
    found, whole = lost(name, weight, stats, 8, density=0.4), metric(weight, stats)
    assert abs(dictionary.lost(target.z, codes, atoms) - found) <= (n + k)**2 * EPS * 1e3 * whole
    assert (keep.sum(1) == 3).all() and not codes[~keep].any()


@every_method
@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("density", [0.5, 0.3, 1.0])
def test_each_row_keeps_as_many_and_all_counts_are_the_formulas(name, n, k, density):
    weight, stats = torch.randn(n, k), stats_of(inputs(k).float())
    for rank in (1, 2, 7, min(n, k)):
        layer = made(name, weight, stats, rank, density=density)
        nonzeros = max(1, int(density * rank))
        assert layer.atoms == rank and layer.nonzeros == nonzeros
        assert (layer.kept().sum(1) == nonzeros).all()
        parameters, index_bytes = METHODS[name].stored(k, n, rank=rank, density=density)
        assert parameters == rank * k + n * nonzeros == sum(p.numel() for p in layer.parameters())
        assert index_bytes == n * min(4 * -(-rank // 32), 2 * nonzeros) == sum(buffer.nbytes for buffer in layer.buffers())


@every_method
@pytest.mark.parametrize("n, k", SHAPES)
def test_the_curve_is_where_the_solver_starts(name, n, k):
    """Never below what is lost, and equal to it where every atom is kept."""
    weight, stats = torch.randn(n, k, dtype=torch.float64), stats_of(inputs(k))
    most = METHODS[name].size(k, n)[1]
    for density in (0.5, 1.0):
        curve = METHODS[name].losses(weight, stats, density=density)
        assert curve.shape == (most + 1,) and curve.dtype == torch.float64 and (curve[:-1] >= curve[1:]).all()
        slack = (n + k)**2 * EPS * 1e3 * curve[0]
        assert abs(curve[0] - metric(weight, stats)) <= slack
        for rank in (1, 2, 3, 6, 9, min(n, k)):
            found = lost(name, weight, stats, rank, density=density)
            assert found <= curve[rank] + slack if density < 1 else abs(found - curve[rank]) <= slack, (rank, density)


def test_long_curves_are_straight_between_the_sizes_that_plans_use():
    z = torch.randn(90, 200, dtype=torch.float64).sort(dim=1, descending=True).values
    curve = dictionary.curve(z, 200)
    for a in (8, 64, 200):
        kept = z[:, :a].square().topk(max(1, a // 2)).values.sum()
        assert abs(curve[a] - (z.square().sum() - kept)) <= z.numel() * EPS * z.square().sum()
    assert torch.allclose(curve[8:17].diff(), (curve[16] - curve[8]) / 8, rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["gaussian", "decaying", "subspaces"])
def test_the_order_of_the_papers(kind, seed):
    """At equal bits (16 for a value, 1 for a place in the mask): whitened SVD loses most, then rocket, then compot; on
    matrices of falling spectrum rocket and SVD come close."""
    torch.manual_seed(seed)
    n = k = 96
    weight = torch.randn(n, k)
    if kind == "decaying":
        weight @= torch.diag(0.97**torch.arange(k))
    if kind == "subspaces":
        weight = torch.cat([torch.randn(12, 8) @ torch.randn(8, k) for _ in range(8)]) + 0.3 * weight
    stats = stats_of(torch.randn(500, k) @ torch.diag(torch.logspace(0, -0.5, k)))
    rank, atoms = int(0.5 * n * k / (n + k)), int(0.5 * n * k / (k + n / 2 + n / 16))
    low_rank = lost("whitened", weight, stats, rank)
    fast, slow = (lost(name, weight, stats, atoms) for name in ("rocket", "compot"))
    assert low_rank > fast > slow


@every_method
def test_more_atoms_lose_less(name):
    weight, stats = torch.randn(30, 24, dtype=torch.float64), stats_of(inputs(24))
    losses = [lost(name, weight, stats, rank) for rank in range(2, 25, 4)]
    assert all(b < a for a, b in itertools.pairwise(losses))


@every_method
def test_louder_inputs_are_kept_better(name):
    """Kills a transposed Gram matrix or weight: the reconstruction of an input 100 times as large must improve."""
    weight, x = torch.randn(30, 24, dtype=torch.float64), torch.randn(300, 24, dtype=torch.float64)
    louder = x.clone()
    louder[:, 5] *= 100
    errors = [(weight - made(name, weight, stats_of(seen), 8).dense())[:, 5].norm() for seen in (x, louder)]
    assert errors[1] < errors[0] / 10


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_layer_has_the_dtype_and_the_bias(name, dtype):
    weight, bias, stats = torch.randn(24, 14).to(dtype), torch.randn(24).to(dtype), stats_of(inputs(14).float())
    layer, events = METHODS[name].factorize(weight, bias, stats, rank=6)
    assert layer.d.dtype == layer.values.dtype == dtype and torch.equal(layer.bias, bias) and events == []
    assert layer.d.is_contiguous() and layer.values.is_contiguous()
    atoms, codes = layer.d[0, 0].double().norm(dim=1), layer.codes().double().norm(dim=0)
    assert (atoms - codes).abs().max() <= 24 * torch.finfo(dtype).eps * atoms.max() + 1e-12


@every_method
def test_repeated_calls_give_the_same_bits_and_leave_their_inputs(name):
    weight, stats = torch.randn(24, 14), stats_of(inputs(14).float())
    before = weight.clone(), stats.gram.clone()
    a, b = made(name, weight, stats, 6), made(name, weight, stats, 6)
    assert all(torch.equal(one, other) for one, other in zip(a.state_dict().values(), b.state_dict().values()))
    assert torch.equal(weight, before[0]) and torch.equal(stats.gram, before[1])


@every_method
def test_scaling_by_a_power_of_two_scales_the_result_exactly(name):
    weight, stats = torch.randn(24, 14), stats_of(inputs(14).float())
    a, b = made(name, weight, stats, 6), made(name, weight * 2.0**20, stats, 6)
    assert torch.equal(a.d * 2.0**10, b.d) and torch.equal(a.values * 2.0**10, b.values)


@every_method
@pytest.mark.parametrize("weight", matrices.weights())
def test_degenerate_weights_never_give_nan(name, weight):
    weight = matrices.weights()[weight]
    k = weight.shape[1]
    stats = stats_of(torch.randn(4 * k, k))
    for rank in {1, min(weight.shape)}:
        layer, _ = METHODS[name].factorize(weight, None, stats, rank=rank)
        assert layer.d.isfinite().all() and layer.values.isfinite().all()
        residual = weight.double() - layer.double().dense()
        # nothing may be worse than the zero matrix, but for what storing rounds
        assert metric(residual, stats) <= metric(weight.double(), stats) * (1 + 8 * torch.finfo(weight.dtype).eps)
    assert METHODS[name].losses(weight, stats).isfinite().all()


@every_method
@pytest.mark.parametrize("x", matrices.inputs(9))
def test_degenerate_inputs_never_give_nan(name, x):
    weight, stats = torch.randn(12, 9), stats_of(matrices.inputs(9)[x])
    layer, _ = METHODS[name].factorize(weight, None, stats, rank=5)
    assert layer.d.isfinite().all() and layer.values.isfinite().all()
    assert METHODS[name].losses(weight, stats).isfinite().all()


@every_method
def test_wrong_calls_are_named(name):
    weight, stats = torch.randn(14, 24), stats_of(inputs(24).float())
    with pytest.raises(ArgumentError, match="a dictionary needs calibration statistics, found none"):
        METHODS[name].factorize(weight, None, None, rank=3)
    for rank in (0, 15):
        with pytest.raises(ShapeError, match="number of atoms, must be between 1 and 14"):
            made(name, weight, stats, rank)
    for density in (0, 1.5, "half", True):
        with pytest.raises(ArgumentError, match=f"{name}: density must be above 0 and at most 1"):
            check_arguments(name, {"density": density})
        with pytest.raises(ArgumentError, match="density must be above 0"):
            made(name, weight, stats, 3, density=density)
    weight[2, 3] = torch.nan
    with pytest.raises(NumericsError, match="weight .* 1 of"):
        made(name, weight, stats, 3)


# --- compot and rocket ---

def test_each_procrustes_step_and_each_coding_loses_less():
    target = dictionary.plain_target(torch.randn(60, 40, dtype=torch.float64))
    support, losses = dictionary.Support(20, 7), []
    for steps in range(12):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compot, "_STEPS", steps)
            patch.setattr(dictionary, "polished", lambda z, codes, atoms, keep: (codes, atoms, keep))
            codes, atoms, _ = compot.solve(target, support)
        assert (atoms @ atoms.mT - torch.eye(20)).norm() <= 40 * 20 * EPS * 10
        losses.append(dictionary.lost(target.z, codes, atoms))
    assert all(b < a for a, b in itertools.pairwise(losses))


def test_an_orthonormal_dictionary_of_other_energies_is_found():
    """Rows of two atoms each, of energies 1, 2, 4, ...: kills a Procrustes step of the transpose."""
    atoms = torch.linalg.qr(torch.randn(30, 8, dtype=torch.float64)).Q.mT
    codes = torch.randn(200, 8, dtype=torch.float64) * 2.0**torch.arange(8) * (torch.rand(200, 8).argsort(1) < 2)
    target = dictionary.plain_target(codes @ atoms)
    found, learned, _ = compot.solve(target, dictionary.Support(8, 2))
    assert dictionary.lost(target.z, found, learned) <= 1e-8 * target.z.square().sum()


def test_the_atoms_of_rocket_are_the_best_for_its_codes():
    target = dictionary.plain_target(torch.randn(60, 40, dtype=torch.float64))
    codes, atoms, keep = rocket.solve(target, dictionary.Support(20, 7))
    best = torch.linalg.lstsq(codes, target.z).solution
    assert (atoms - best).norm() <= 60 * 40 * EPS * torch.linalg.cond(codes)**2 * best.norm()
    assert torch.equal(codes, target.z[:, :20] * keep)


def test_rocket_weighs_by_the_length_that_an_atom_has_in_the_weight():
    """On a diagonal Gram matrix an atom is a unit vector over the root of its energy: what is loud needs more to stay."""
    z = torch.tensor([[3.0, 2.0]], dtype=torch.float64)
    lengths = torch.tensor([1.0, 4.0])  # L^-1: roots 1 and 2
    target = dictionary.Target(z, lambda atoms: atoms * lengths, [], torch.float64)
    assert rocket.solve(target, dictionary.Support(2, 1))[2].tolist() == [[False, True]]  # 3 * 1 < 2 * 2


# --- 2:4 ---

@pytest.mark.parametrize("name", ["compot", "rocket"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_two_of_every_four_atoms(name, share):
    weight, stats = torch.randn(40, 32), stats_of(inputs(32).float())
    for rank in (3, 8, 22):
        layer = made(name, weight, stats, rank, pattern="2:4", dense_share=share)
        sparse = (rank - int(share * rank)) // 4 * 4
        assert layer.dense_atoms == rank - sparse and layer.nonzeros == rank - sparse // 2
        assert layer.pattern == ((2, 4) if sparse else None)
        layer.check_indices()
        assert METHODS[name].stored(32, 40, rank=rank, pattern="2:4", dense_share=share)[0] == sum(
            p.numel() for p in layer.parameters())
    curve = METHODS[name].losses(weight, stats, pattern="2:4", dense_share=share)
    assert (curve[:-1] >= curve[1:]).all()


def test_where_spectra_fall_fast_dense_atoms_help_two_of_four():
    weight = torch.randn(64, 64) @ torch.diag(0.8**torch.arange(64))
    stats = stats_of(torch.eye(64))
    losses = [lost("compot", weight, stats, 24, pattern="2:4", dense_share=share) for share in (0.0, 0.34)]
    assert losses[1] < losses[0] / 2


# --- K-SVD ---

@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("s", [1, 2, 3])
def test_a_planted_dictionary_is_found_again(s, seed):
    weight, _ = matrices.planted(200, 20, 12, s, seed)
    target = dictionary.plain_target(weight)
    codes, atoms, keep = cospadi.solve(target, dictionary.Support(12, s))
    assert (target.z - codes @ atoms).norm() < 1e-8 * weight.norm()
    assert (keep.sum(1) == s).all()


def rows_and_atoms(n, a, q):
    return torch.randn(n, q, dtype=torch.float64), normalize(torch.randn(a, q, dtype=torch.float64))


def test_pursuit_of_one_atom_is_the_best_atom():
    z, atoms = rows_and_atoms(50, 9, 12)
    codes, keep = cospadi.coded(z, atoms, 1)
    best = torch.stack([(z - (z @ atom)[:, None] * atom).square().sum(1) for atom in atoms], dim=1).min(1)
    assert torch.equal(keep.nonzero()[:, 1], best.indices)
    assert torch.allclose((z - codes @ atoms).square().sum(1), best.values, rtol=1e-9)


def test_pursuit_of_two_atoms_is_near_the_best_pair():
    """Within 1.5 of exhaustive search over all pairs of 12 atoms, in what is left of every row, and equal for most rows."""
    z, atoms = rows_and_atoms(100, 12, 16)
    codes, _ = cospadi.coded(z, atoms, 2)
    ours = (z - codes @ atoms).square().sum(1)
    best = torch.full_like(ours, torch.inf)
    for pair in itertools.combinations(range(12), 2):
        fit = torch.linalg.lstsq(atoms[list(pair)].mT, z.mT).solution
        best = best.minimum((z - fit.mT @ atoms[list(pair)]).square().sum(1))
    assert (ours <= 1.5 * best).all() and (ours <= best * (1 + 1e-9)).double().mean() > 0.7


@pytest.mark.parametrize("nonzeros", [3, 11, 40])
def test_pursuit_fits_its_atoms_by_least_squares(nonzeros):
    """40: of more than 32 non-zeros several are picked at a time."""
    z, atoms = rows_and_atoms(30, 50, 60)
    codes, keep = cospadi.coded(z, atoms, nonzeros)
    assert (keep.sum(1) == nonzeros).all() and not codes[~keep].any()
    best = dictionary.fitted_codes(z, atoms, keep)
    for row in range(3):
        direct = torch.linalg.lstsq(atoms[keep[row]].mT, z[row]).solution
        assert torch.allclose(best[row, keep[row]], direct, rtol=1e-6)
    assert dictionary.lost(z, codes, atoms) <= dictionary.lost(z, best, atoms) * (1 + 1e-9)


def test_no_step_of_ksvd_loses_more():
    z = dictionary.plain_target(torch.randn(80, 30, dtype=torch.float64)).z
    codes, atoms, keep = cospadi.start(z, 20, 6)
    losses = [dictionary.lost(z, codes, atoms)]
    for _ in range(8):
        codes, keep = cospadi.improved(z, codes, atoms, keep)
        losses.append(dictionary.lost(z, codes, atoms))
        codes, atoms = cospadi.renewed(z, codes, atoms, keep)
        losses.append(dictionary.lost(z, codes, atoms))
        assert (keep.sum(1) == 6).all() and not codes[~keep].any()
        assert torch.allclose(atoms.norm(dim=1), torch.ones(20, dtype=torch.float64))
    assert all(b <= a for a, b in itertools.pairwise(losses)) and losses[-1] < 0.9 * losses[0]


def test_an_atom_that_no_row_uses_becomes_the_row_that_is_fitted_worst():
    z = torch.zeros(6, 4, dtype=torch.float64)
    z[:5, 0], z[5, 2] = torch.arange(1.0, 6), -3.0
    codes = torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0], [5, 0], [0, 0]], dtype=torch.float64)
    keep = torch.tensor([[True, False]] * 6)
    atoms = torch.eye(2, 4, dtype=torch.float64)
    _, renewed = cospadi.renewed(z, codes, atoms, keep)
    assert renewed[1].tolist() == [0, 0, -1, 0]


def test_more_atoms_than_inputs():
    weight, stats = torch.randn(60, 10, dtype=torch.float64), stats_of(inputs(10))
    fewer, more = lost("cospadi", weight, stats, 10, density=0.3), lost("cospadi", weight, stats, 25, density=0.12)
    assert more < fewer  # 3 non-zeros each


# --- plans ---

@pytest.mark.parametrize("name, policy", [("compot", policy) for policy in POLICIES] + [("rocket", "knapsack"),
                                                                                       ("cospadi", "per_matrix")])
def test_a_model_keeps_the_ratio_and_runs(name, policy, tiny_llama, tmp_path):
    stats = lowfat.calibrate(tiny_llama, [{"input_ids": torch.randint(0, 97, (4, 12))}])
    plan = lowfat.plan(tiny_llama, method=name, ratio=0.5, policy=policy, stats=stats)
    assert 0.4 < plan.totals()["ratio"] <= 0.5
    plan.save(tmp_path / "plan.json")
    assert lowfat.Plan.load(tmp_path / "plan.json") == plan
    report = lowfat.factorize(tiny_llama, plan, stats)
    assert report.parameters == plan.totals()["parameters"]
    assert sum(layer.index_bytes for layer in report.layers) == plan.totals()["index_bytes"] > 0
    ids = torch.arange(12).view(2, 6)
    expected = tiny_llama(ids).logits
    lowfat.save(tiny_llama, tmp_path / "half")
    assert torch.equal(lowfat.load(tmp_path / "half")(ids).logits, expected)


@pytest.mark.parametrize("method", ["rocket", "compot"])
def test_a_density_beside_a_pattern_is_refused(method):
    """The pattern decides how many non-zeros there are: a density would not be read."""
    with pytest.raises(ArgumentError, match="density 0.1 and pattern 2:4: needs one of them"):
        METHODS[method].size(64, 64, density=0.1, pattern="2:4")
