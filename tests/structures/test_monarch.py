"""Monarch and block-wise low rank: the layer against its dense matrix, and what the papers say that the two are."""
import json

import pytest
import torch
from torch.nn.functional import linear

import gates
from lowfat.errors import ArgumentError, DtypeError, IndexRangeError, NumericsError, ShapeError
from lowfat.structures import STRUCTURES, LowRank, Monarch

# k, n, blocks, rank: square, rectangular, other blocks on either side, prime sizes, more blocks than divide, one block
SIZES = [(16, 16, (4, 4), 2), (12, 20, (3, 4), 2), (20, 12, (2, 3), 4), (13, 19, (3, 4), 3), (5, 7, (4, 5), 1), (7, 5, (1, 1), 3)]
FORMS = [pytest.param(True, id="monarch"), pytest.param(False, id="blockwise")]
EPS = torch.finfo(torch.float64).eps


def random_layer(k, n, blocks, rank, interleave=True, dtype=torch.float64, **options):
    return Monarch(k, n, blocks, rank, interleave, dtype=dtype, **options)


def block(matrix, layer, i, o):
    """The rows and columns that input block i and output block o share, by the definition."""
    (b_in, b_out), (n, k) = layer.blocks, matrix.shape
    p, s = -(-k // b_in), -(-n // b_out)
    rows = matrix[o::b_out] if layer.interleave else matrix[o * s:(o + 1) * s]
    return rows[:, i * p:(i + 1) * p]


def is_same(found, expected):
    """But for the rounding of about as many steps as the matrix has rows and columns, each as many numbers long."""
    return found.shape == expected.shape and (found - expected).norm() <= sum(expected.shape) ** 2 * EPS * expected.norm()


# --- the layer ---

@pytest.mark.parametrize("interleave", FORMS)
@pytest.mark.parametrize("k,n,blocks,rank", SIZES)
@torch.no_grad()
def test_dense_is_made_of_blocks_and_forward_multiplies_by_it(k, n, blocks, rank, interleave):
    """By definition, not by the layer's own way to put blocks together."""
    layer = random_layer(k, n, blocks, rank, interleave)
    dense = layer.dense()
    assert dense.shape == (n, k)
    for i in range(blocks[0]):
        for o in range(blocks[1]):
            u, v = layer.u[o][:, i * rank:(i + 1) * rank], layer.v[i][o::blocks[1]]
            expected = block(dense, layer, i, o)
            assert is_same((u @ v)[:expected.shape[0], :expected.shape[1]], expected)
    assert is_same(layer(torch.eye(k, dtype=torch.float64)), dense.T + layer.bias)
    for shape in ((k,), (0, k), (2, 1, 3, k)):
        x = torch.randn(shape, dtype=torch.float64)
        assert is_same(layer(x).view(-1, n), linear(x, dense, layer.bias).view(-1, n))


@pytest.mark.parametrize("k,n,blocks,rank", SIZES)
def test_shape_is_json_and_rebuilds_the_layer(k, n, blocks, rank):
    layer = random_layer(k, n, blocks, rank, bias=False)
    shape = json.loads(json.dumps(layer.shape()))
    rebuilt = STRUCTURES["Monarch"](**shape, dtype=torch.float64)
    rebuilt.load_state_dict(layer.state_dict())
    assert rebuilt.shape() == layer.shape() and torch.equal(rebuilt.dense(), layer.dense())
    assert layer.macs() == layer.v.numel() + layer.u.numel()
    with torch.device("meta"):
        assert Monarch(**shape)(torch.empty(3, k)).shape == (3, n)


def test_default_rank_is_that_of_published_layers():
    """Four blocks on 1024 features have rank 64 each, a quarter of the weight's rank 256 (public code)."""
    layer = Monarch(1024, 1024, 4, device="meta")
    assert layer.rank == 64 and layer.v.shape == (4, 256, 256) and layer.u.shape == (4, 256, 256)
    assert layer.macs() == 2 * 1024 * 256


def test_casts_and_autocast():
    layer = Monarch(12, 20, (3, 4), 2)
    assert layer.to(torch.bfloat16)(torch.randn(2, 12).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(DtypeError, match="v has torch.bfloat16, x has torch.float32"):
        layer(torch.randn(2, 12))
    with torch.autocast("cpu", torch.bfloat16):
        y = Monarch(12, 20, 2, 2)(torch.randn(2, 12))
        y.sum().backward()
        assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("arguments, error, text", [
    ({"blocks": 0}, ShapeError, "blocks must be between 1 and 12 for 12 inputs; found 0"),
    ({"blocks": (4, -1)}, ShapeError, "between 1 and 20 for 20 outputs; found -1"),
    ({"blocks": 13}, ShapeError, "between 1 and 12 for 12 inputs; found 13"),
    ({"blocks": 2.0}, ArgumentError, "blocks must be a whole number or two, for inputs and outputs; found 2.0"),
    ({"blocks": (1, 2, 3)}, ArgumentError, "blocks must be a whole number or two"),
    ({"blocks": True}, ArgumentError, "blocks must be a whole number or two"),
    ({"rank": 0}, ShapeError, "rank must be between 1 and 3, the smaller side of a block of 5 x 3; found 0"),
    ({"rank": 4}, ShapeError, "found 4"),
    ({"rank": "2"}, ArgumentError, "rank must be a whole number, found '2'"),
    ({"in_features": 0}, ShapeError, "in_features must be at least 1, found 0"),
    ({"out_features": 2.5}, ArgumentError, "out_features must be a whole number, found 2.5"),
])
def test_impossible_sizes(arguments, error, text):
    with pytest.raises(error, match=text):
        Monarch(**{"in_features": 12, "out_features": 20, "blocks": 4, "rank": 2} | arguments)


# --- rows in any order ---

def regrouped(k, n, blocks, rank, interleave=True, dtype=torch.float64, **options):
    """(a layer whose rows are permuted, the same one without the permutation, rows)"""
    plain = random_layer(k, n, blocks, rank, interleave, dtype, **options)
    rows = torch.randperm(n)
    bias = None if plain.bias is None else torch.empty_like(plain.bias).index_copy(0, rows, plain.bias)
    return Monarch.of(plain.v, plain.u, bias, in_features=k, out_features=n, interleave=interleave, rows=rows), plain, rows


@pytest.mark.parametrize("interleave", FORMS)
@pytest.mark.parametrize("k,n,blocks,rank", SIZES)
def test_computed_row_i_is_output_rows_i(k, n, blocks, rank, interleave):
    """To the bit, and so are the gradients: nothing is computed but what the plain layer computes."""
    layer, plain, rows = regrouped(k, n, blocks, rank, interleave)
    assert layer.rows.dtype == torch.int32 and torch.equal(layer.dense()[rows], plain.dense())
    x, dy = torch.randn(2, 5, k, dtype=torch.float64), torch.randn(2, 5, n, dtype=torch.float64)
    y, expected = layer(x), plain(x)
    assert torch.equal(y[..., rows], expected)
    y.backward(dy)
    expected.backward(dy[..., rows])
    assert torch.equal(layer.v.grad, plain.v.grad) and torch.equal(layer.u.grad, plain.u.grad)
    assert torch.equal(layer.bias.grad[rows], plain.bias.grad)
    assert layer(x[:0]).shape == (0, 5, n) and layer(x[0, 0]).shape == (n,)


@pytest.mark.parametrize("k,n,blocks,rank", SIZES)
def test_a_permuted_layer_is_rebuilt_from_shape_and_state(k, n, blocks, rank):
    layer, _, _ = regrouped(k, n, blocks, rank, bias=False)
    shape = json.loads(json.dumps(layer.shape()))
    assert shape["grouped"] is True and not random_layer(k, n, blocks, rank).shape()["grouped"]
    rebuilt = Monarch(**shape, dtype=torch.float64)
    assert torch.equal(rebuilt.rows, torch.arange(n))  # a new layer leaves rows where they are
    rebuilt.load_state_dict(layer.state_dict())
    assert torch.equal(rebuilt.dense(), layer.dense()) and rebuilt.macs() == layer.macs()
    assert rebuilt.to(torch.bfloat16).rows.dtype == torch.int32
    assert "rows" not in random_layer(k, n, blocks, rank).state_dict()
    with torch.device("meta"):
        assert Monarch(**shape)(torch.empty(3, k)).shape == (3, n)


def test_a_permuted_layer_compiles_and_maps():
    layer, _, _ = regrouped(12, 20, (3, 4), 2)
    x = torch.randn(6, 12, dtype=torch.float64)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    mapped = torch.func.vmap(lambda row: torch.func.functional_call(layer, dict(layer.named_parameters()), (row,)))(x)
    assert is_same(mapped, layer(x))


WRONG_ROWS = [
    (lambda rows: rows.index_fill(0, torch.tensor([3]), 7), IndexRangeError, "permutation of 0 .. 19; found 7 twice"),
    (lambda rows: rows + 1, IndexRangeError, "found 20 outside of it"),
    (lambda rows: rows - 1, IndexRangeError, "found -1 outside of it"),
    (lambda rows: rows[:19], ShapeError, r"rows \[19\] must be \[20\]"),
    (lambda rows: rows.double(), DtypeError, "torch.float64"),
    (lambda rows: rows.tolist(), DtypeError, "rows must be an int32 or int64 tensor, found list"),
    (lambda rows: rows.view(4, 5), ShapeError, r"rows \[4, 5\] must be \[20\]")]


@pytest.mark.parametrize("change, error, text", WRONG_ROWS)
def test_rows_that_are_no_permutation(change, error, text):
    rows = change(torch.arange(20))
    with pytest.raises(error, match=text):
        Monarch.from_dense(torch.randn(20, 12), blocks=4, rank=2, rows=rows)
    layer = Monarch(12, 20, 4, 2)
    with pytest.raises(error, match=text):
        Monarch.of(layer.v, layer.u, in_features=12, out_features=20, rows=rows)


# --- from a dense weight ---

@pytest.mark.parametrize("interleave", FORMS)
@pytest.mark.parametrize("k,n,blocks,rank", SIZES)
@torch.no_grad()
def test_projecting_such_a_matrix_gives_it_back(k, n, blocks, rank, interleave):
    dense = random_layer(k, n, blocks, rank, interleave).dense()
    found = Monarch.from_dense(dense, blocks=blocks, rank=rank, interleave=interleave)
    assert is_same(found.dense(), dense)
    layer, _, rows = regrouped(k, n, blocks, rank, interleave)
    found = Monarch.from_dense(layer.dense(), layer.bias, blocks=blocks, rank=rank, interleave=interleave, rows=rows)
    assert is_same(found.dense(), layer.dense()) and torch.equal(found.bias, layer.bias)


@pytest.mark.parametrize("interleave", FORMS)
@pytest.mark.parametrize("k,n,blocks,rank", SIZES)
@torch.no_grad()
def test_the_error_is_what_the_blocks_cut_off(k, n, blocks, rank, interleave):
    weight = torch.randn(n, k, dtype=torch.float64)
    layer = Monarch.from_dense(weight, blocks=blocks, rank=rank, interleave=interleave)
    lost = sum(torch.linalg.svdvals(block(weight, layer, i, o))[rank:].square().sum()
               for i in range(blocks[0]) for o in range(blocks[1]) if block(weight, layer, i, o).numel())
    found = (weight - layer.dense()).square().sum()
    assert abs(found - lost) <= sum(weight.shape) ** 2 * EPS * weight.square().sum()


@pytest.mark.parametrize("interleave", FORMS)
@torch.no_grad()
def test_full_rank_is_exact_and_one_block_is_the_svd(interleave):
    weight, bias = torch.randn(18, 24, dtype=torch.float64), torch.randn(18, dtype=torch.float64)
    exact = Monarch.from_dense(weight, bias, blocks=(4, 3), rank=6, interleave=interleave)
    assert is_same(exact.dense(), weight) and torch.equal(exact.bias, bias)
    one, plain = Monarch.from_dense(weight, blocks=1, rank=5, interleave=interleave), LowRank.from_dense(weight, rank=5)
    assert torch.equal(one.v[0], plain.v) and torch.equal(one.u[0], plain.u)


@pytest.mark.parametrize("blocks", [2, 4])
@torch.no_grad()
def test_monarch_is_blockwise_low_rank_of_sorted_rows(blocks):
    """Monarch(W) = P^T blockwise(P W), P collecting rows by residue class: the identity of the two papers, to the bit."""
    weight = torch.randn(16, 12, dtype=torch.float64)
    order = torch.arange(16).view(-1, blocks).T.reshape(-1)
    monarch = Monarch.from_dense(weight, blocks=blocks, rank=2)
    blockwise = Monarch.from_dense(weight[order], blocks=blocks, rank=2, interleave=False)
    assert torch.equal(monarch.v, blockwise.v) and torch.equal(monarch.u, blockwise.u)
    assert torch.equal(monarch.dense()[order], blockwise.dense())
    assert monarch.macs() == LowRank(12, 16, blocks * 2).macs()  # as many parameters as a global rank of blocks x rank
    grouped = Monarch.from_dense(weight, weight[:, 0], blocks=blocks, rank=2, interleave=False, rows=order)
    assert torch.equal(grouped.dense(), monarch.dense()) and torch.equal(grouped.bias, weight[:, 0])


def test_no_descent_from_a_random_start_gets_below_the_projection():
    torch.manual_seed(3)
    weight = torch.randn(8, 8, dtype=torch.float64)
    with torch.no_grad():
        best = (weight - Monarch.from_dense(weight, blocks=2, rank=1).dense()).square().sum()
    for seed in range(20):
        torch.manual_seed(seed)
        layer = random_layer(8, 8, (2, 2), 1, bias=False)
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            error = (weight - layer.dense()).square().sum()
            error.backward()
            return error

        optimizer.step(loss)
        assert loss() >= best * (1 - 1e-9)


def test_the_fourier_transform_is_monarch():
    """DFT of 16 = 4 x 4 points (Cooley and Tukey): with inputs in digit-reversed order every block has rank 1."""
    size, j = 16, torch.arange(16, dtype=torch.float64)
    angle = -2 * torch.pi * (j[:, None] * j % size) / size
    dft = torch.complex(angle.cos(), angle.sin())
    reversed_digits = j.long().view(4, 4).T.reshape(-1)
    shuffled = dft[:, reversed_digits]
    # a complex matrix has no layer here; its blocks must have the rank all the same
    layer = Monarch(size, size, 4, 1, dtype=torch.float64, device="meta")
    for i in range(4):
        for o in range(4):
            values = torch.linalg.svdvals(block(shuffled, layer, i, o))
            assert values[1:].max() < 1e-10 * values[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(value):
    weight = torch.randn(6, 8)
    weight[2, 3] = value
    with pytest.raises(NumericsError):
        Monarch.from_dense(weight, blocks=2, rank=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_in_the_dtype_of_the_weight(dtype):
    weight = torch.randn(33, 48).to(dtype)
    layer = Monarch.from_dense(weight, weight[:, 0], blocks=(4, 3), rank=4)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(torch.randn(9, 48).to(dtype)).dtype == dtype
    closest = Monarch.from_dense(weight.double(), blocks=(4, 3), rank=4).dense()
    error = (layer.double().dense() - closest).norm() / closest.norm()
    assert error < 2 * gates.ROUNDOFF[dtype]  # each factor rounded once


def test_rows_that_change_are_sorted_anew():
    layer = Monarch.from_dense(torch.randn(9, 8), blocks=2, rank=2, rows=torch.randperm(9))
    x = torch.randn(3, 8)
    for change in (lambda: None, lambda: layer.rows.copy_(torch.arange(9)), lambda: layer.register_buffer(
            "rows", torch.arange(9).flip(0).int())):
        change()
        for _ in range(2):
            torch.testing.assert_close(layer(x), x @ layer.dense().T)
    with torch.inference_mode():
        layer.rows = torch.arange(9, dtype=torch.int32)
        torch.testing.assert_close(layer(x), x @ layer.dense().T)
