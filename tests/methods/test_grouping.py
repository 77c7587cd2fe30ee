"""Which rows share an output block: planted groups are found, and no layer is worse than with its rows in place."""
from copy import deepcopy

import pytest
import torch

import lowfat
import matrices
from lowfat.errors import ArgumentError
from lowfat.methods import METHODS, check_arguments, grouping
from lowfat.stats import Stats
from lowfat.structures import Monarch

NAMES = ("monarch", "block_low_rank")
SIZES = [(22, 30, (3, 4), 2), (24, 24, (4, 4), 3), (24, 24, (1, 4), 3), (24, 24, (4, 1), 2), (7, 9, (2, 5), 1),
         (7, 9, (9, 7), 1), (9, 8, (1, 8), 1)]  # n, k, blocks, rank; the last leaves whole blocks of padding
EPS = torch.finfo(torch.float64).eps


def stats_of(n, k):
    x = torch.randn(3 * k, k // 2) @ torch.randn(k // 2, k) + 0.1 * torch.randn(3 * k, k)
    return Stats(gram=x.T @ x, rows=len(x), fisher_in=torch.rand(k) + 0.1, fisher_out=torch.rand(n) ** 4 + 0.01, samples=1)


def lost(weight, layer, stats, fit):
    """By definition, with the damping that the method adds."""
    error = weight.double() - layer.double().dense()
    if fit == "outputs":
        gram = stats.gram.double()
        gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram))
        return float(torch.einsum("nk,kl,nl->", error, gram, error))
    if fit == "fisher":
        rows, columns = (sums.double() / sums.double().mean() + 1e-5 for sums in (stats.fisher_out, stats.fisher_in))
        return float((rows[:, None] * columns * error.square()).sum())
    return float(error.square().sum())


def planted(n, k, blocks, rank):
    """(a weight whose blocks have that rank once its rows are sorted, the group of each row)"""
    b_in, b_out = blocks
    bands = [torch.cat([torch.randn(n // b_out, rank) @ torch.randn(rank, k // b_in) for _ in range(b_in)], dim=1)
             for _ in range(b_out)]
    order = torch.randperm(n)
    return torch.cat(bands)[order], order // (n // b_out)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fit", ["weights", "outputs", "fisher"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_planted_groups_are_found(name, fit, seed):
    torch.manual_seed(seed)
    weight, group = planted(64, 64, (4, 4), 4)
    stats = stats_of(64, 64)
    stats.gram = stats.gram + 100 * torch.eye(64)  # as far from singular as a test of ranks needs
    plain, _ = METHODS[name].factorize(weight, None, stats, rank=4, fit=fit)
    layer, events = METHODS[name].factorize(weight, None, stats, rank=4, fit=fit, grouped=True)
    assert events == [] and layer.shape() == plain.shape() | {"grouped": True}
    assert (weight - plain.dense()).norm() > 0.2 * weight.norm()
    # both factors are stored in fp32
    assert (weight - layer.dense()).norm() <= 4 * torch.finfo(torch.float32).eps * sum(weight.shape) ** 0.5 * weight.norm()
    found = group[layer.rows.long()]
    found = found.view(16, 4).T if name == "monarch" else found.view(4, 16)
    assert all(len(block.unique()) == 1 for block in found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fit", ["weights", "outputs", "fisher"])
@pytest.mark.parametrize("n, k, blocks, rank", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_never_worse_than_rows_in_place(name, fit, n, k, blocks, rank, dtype):
    weight, bias, stats = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype), stats_of(n, k)
    arguments = {"rank": rank, "blocks": blocks, "fit": fit}
    plain, _ = METHODS[name].factorize(weight, bias, stats, **arguments)
    layer, _ = METHODS[name].factorize(weight, bias, stats, **arguments, grouped=True)
    assert layer.v.dtype == dtype and torch.equal(layer.bias, bias)
    if blocks[1] == 1 or blocks[1] == n:  # there is nothing to group
        assert not layer.shape()["grouped"]
    found = lost(weight, layer, stats, fit)
    assert found <= lost(weight, plain, stats, fit) * (1 + (n + k) ** 2 * EPS)
    if dtype == torch.float64 and fit != "outputs":
        curve = METHODS[name].losses(weight, stats, blocks=blocks, fit=fit, grouped=True)
        assert found <= curve[rank] + (n + k) ** 2 * EPS * curve[0]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_layer_is_that_of_its_permuted_rows(name):
    """The statistics of outputs move with their rows, and the bias stays where it is."""
    weight, bias, stats = torch.randn(24, 16, dtype=torch.float64), torch.randn(24, dtype=torch.float64), stats_of(24, 16)
    for fit in ("weights", "outputs", "fisher"):
        layer, _ = METHODS[name].factorize(weight, bias, stats, rank=2, fit=fit, grouped=True)
        rows = layer.rows.long()
        moved = Stats(stats.gram, stats.rows, stats.fisher_in, stats.fisher_out[rows], samples=1)
        same, _ = METHODS[name].factorize(weight[rows], bias[rows], moved, rank=2, fit=fit)
        assert torch.equal(same.v, layer.v) and torch.equal(same.u, layer.u)
        assert torch.equal(layer.dense()[rows], same.dense()) and torch.equal(layer.bias, bias)
        again, _ = METHODS[name].factorize(weight, bias, stats, rank=2, fit=fit, grouped=True)
        assert all(torch.equal(one, other) for one, other in zip(layer.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("blocks", [(3, 4), (1, 5), (2, 2)])
def test_the_cost_of_a_row_is_what_it_changes(blocks):
    """Against mu tr(G (G + mu I)^-1) of the blocks with and without each row."""
    b_in, b_out = blocks
    n, p, rank = 23, 5, 2
    parts = torch.randn(b_in, n, p, dtype=torch.float64)
    owner, sizes = torch.arange(n) % b_out, torch.bincount(torch.arange(n) % b_out)
    groups = grouping._measured(parts, owner, sizes, rank)
    costs = grouping._costs(parts, groups)

    def objective(members, o):
        total = 0
        for i in range(b_in):
            gram, mu = parts[i, members].T @ parts[i, members], groups.mu[i, o]
            total += mu * torch.linalg.solve(gram + mu * torch.eye(p, dtype=torch.float64), gram).trace()
        return total

    exact = sum(torch.linalg.svdvals(parts[i, owner == o])[rank:].square().sum() for i in range(b_in) for o in range(b_out))
    assert abs(groups.lost - exact) <= (n + p) ** 2 * EPS * parts.square().sum()
    for o in range(b_out):
        for row in range(n):
            without, whole = owner == o, owner == o
            without[row], whole[row] = False, True
            change = objective(whole, o) - objective(without, o)
            condition = float(max((groups.gram[:, o].diagonal(dim1=1, dim2=2).sum(1) / groups.mu[:, o]).max(), 1))
            assert abs(costs[row, o] - change) <= (n + p) ** 2 * EPS * condition * parts.square().sum()


def test_exchanges_keep_sizes_and_move_what_gains():
    owner = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    costs = torch.ones(9, 2, dtype=torch.float64)
    costs[0], costs[3] = torch.tensor([5.0, 1.0]), torch.tensor([9.0, 1.0])  # better off in block 1
    costs[6], costs[8] = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 1.0])
    # row 3 (gains 8) with row 6 (1), then row 0 (4) with row 4, which neither gains nor loses
    assert grouping._exchanged(owner, costs, 0.5).tolist() == [1, 0, 0, 1, 0, 1, 0, 1, 1]
    assert grouping._exchanged(owner, costs, 0.25).tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 1]
    assert torch.equal(grouping._exchanged(owner, torch.zeros(9, 2, dtype=torch.float64), 1.0), owner)


@pytest.mark.parametrize("weight", matrices.weights())
@pytest.mark.parametrize("fit", ["weights", "outputs"])
@torch.no_grad()
def test_degenerate_weights(weight, fit):
    weight = matrices.weights()[weight]
    n, k = weight.shape
    x = torch.randn(30, k)
    layer, _ = METHODS["monarch"].factorize(weight, None, Stats(x.T @ x, 30), rank=1, blocks=(min(2, k), min(3, n)), fit=fit,
                                            grouped=True)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    if layer.rows is not None:
        assert torch.equal(layer.rows.sort().values, torch.arange(n, dtype=torch.int32))


def test_a_solver_that_fails_leaves_rows_in_place(monkeypatch):
    def fails(*_):
        raise torch.linalg.LinAlgError("did not converge")

    weight = torch.randn(12, 8)
    plain, _ = METHODS["monarch"].factorize(weight, None, None, rank=1)
    monkeypatch.setattr(torch.linalg, "cholesky", fails)
    layer, events = METHODS["monarch"].factorize(weight, None, None, rank=1, grouped=True)
    assert events == ["rows not grouped: did not converge"] and torch.equal(layer.dense(), plain.dense())


# --- plans and models ---

def test_grouped_is_an_argument_with_two_values():
    assert check_arguments("monarch", {"grouped": True, "fit": "outputs"}).needs == {"gram"}
    for value in (1, "yes", None):
        with pytest.raises(ArgumentError, match="grouped must be one of False, True"):
            check_arguments("block_low_rank", {"grouped": value})


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_grouped_saved_and_loaded(name, tiny_llama, tmp_path):
    plan = lowfat.plan(tiny_llama, method=name, ratio=0.5, arguments={"blocks": 2, "grouped": True})
    plan.save(tmp_path / "plan.json")
    assert lowfat.Plan.load(tmp_path / "plan.json") == plan
    other = deepcopy(tiny_llama)
    report = lowfat.factorize(tiny_llama, plan, resume=tmp_path / "layers")
    lowfat.factorize(other, plan, resume=tmp_path / "layers")  # reads what the first call kept
    layers = {layer: module for layer, module in tiny_llama.named_modules() if isinstance(module, Monarch)}
    assert report.parameters == plan.totals()["parameters"] and any(module.rows is not None for module in layers.values())
    for entry in report.layers:
        rows = layers[entry.name].rows if entry.name in layers else None
        assert entry.index_bytes == (0 if rows is None else 4 * len(rows))
    ids = torch.arange(12).view(2, 6)
    expected = tiny_llama(ids).logits
    assert torch.equal(other(ids).logits, expected)
    lowfat.save(tiny_llama, tmp_path / "half")
    for loaded in (lowfat.load(tmp_path / "half"), type(tiny_llama).from_pretrained(tmp_path / "half")):
        assert torch.equal(loaded(ids).logits, expected)
