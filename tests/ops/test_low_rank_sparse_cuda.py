"""The forward kernels of low_rank_sparse on a GPU, decode and the one that makes the weight: for which problems they are
planned, that they run there, and pass the gates."""
import pytest
import torch

import gates
from lowfat import _native
from lowfat.bench.low_rank_sparse import known, products, scaled
from lowfat.ops.low_rank_sparse import check_support, index_dtype, reference, reference_training

OPS = torch.ops.lowfat
needs_library = pytest.mark.skipif(_native.native is None, reason=f"no compiled library: {_native.why_not}")
# m, k, r, n, entries: ragged tiles, no entries and all of them, rows of x in several passes, layers of models
DECODE = {"smallest": (1, 8, 8, 1, 1), "ragged": (3, 264, 40, 57, 1301), "no entries": (5, 136, 24, 40, 0),
          "all entries": (9, 72, 16, 50, 3600), "two tiles": (13, 520, 136, 328, 9001), "bert": (8, 768, 192, 3072, 70779),
          "llama": (1, 4096, 512, 4096, 503316), "passes": (16, 14336, 1024, 4096, 1761607)}
MATERIALIZE = {"smallest": (17, 8, 8, 1, 1), "sparse alone": (100, 136, 0, 70, 777), "low rank alone": (100, 136, 24, 70, 0),
               "all entries": (33, 72, 16, 50, 3600), "ragged": (65, 264, 40, 131, 1301), "wide": (20, 33000, 8, 40, 5000),
               "bert": (512, 768, 192, 3072, 70779), "llama": (1024, 4096, 512, 4096, 503316)}


def paths() -> dict[str, int]:
    return {path: _native.calls("low_rank_sparse", "cuda", path) for path in ("decode", "materialize", "library")}


def config(**changes) -> dict:
    problem = dict(m=1, n=4096, k=4096, r=512, entries=503316, device="cuda")
    return _native.native.choose_config("low_rank_sparse", **{**problem, **changes})


@needs_library
@pytest.mark.parametrize(("path", "changes"), [
    ("empty", {"m": 0}), ("decode", {}), ("decode", {"m": 16}), ("materialize", {"m": 17}), ("decode", {"dtype": "float16"}),
    ("library", {"dtype": "float32"}), ("library", {"dtype": "float64"}), ("library", {"is_aligned": False}),
    ("decode", {"n": 4093}), ("library", {"k": 4092}), ("library", {"r": 508}), ("materialize", {"r": 0}),
    ("materialize", {"r": 2056}), ("materialize", {"k": 32776}), ("decode", {"entries": 0}),
    ("decode", {"entries": 4096 * 4096}),
    ("library", {"entries": 2**30 + 1}), ("materialize", {"m": 1 << 20}), ("library", {"arch": 100}),
    ("decode", {"arch": 80, "sm_count": 108}), ("decode", {"arch": 86, "sm_count": 84}),
    ("materialize", {"arch": 86, "sm_count": 84, "m": 100})])
def test_the_path_follows_what_the_kernels_cover(path, changes):
    assert config(**changes)["path"] == path


@needs_library
def test_all_of_u_and_s_is_asked_for_early():
    assert config() == {"path": "decode", "token_tiles": 1, "splits": 4, "grid": 128, "tokens": 1, "room": 4432,
                        "prefetch": 4, "smem_bytes": 74384}
    assert [config(m=m)["tokens"] for m in (2, 3, 8, 16)] == [2, 4, 8, 16]
    assert config(m=16, k=14336, entries=1761607)["tokens"] == 4
    assert config(m=100) == {"path": "materialize", "tile": 128, "grid": 1024}
    assert config(m=100, n=768, k=768, r=192, entries=17694) == {"path": "materialize", "tile": 64, "grid": 144}
    assert _native.kernels()["low_rank_sparse"]["cuda"] == _native.kernels()["low_rank"]["cuda"]


def support_of(n, k, entries):
    """starts and columns of that many places of [n, k]."""
    places = torch.randperm(n * k)[:entries].sort().values
    starts = torch.bincount(places // k, minlength=n).cumsum(0)
    return torch.cat([starts.new_zeros(1), starts]).int(), (places % k).to(index_dtype(k))


def operands(m, k, r, n, entries, dtype, *, is_whole=False, device="cuda"):
    """x, v, u, values, starts, columns, bias, scale"""
    make = (lambda *sizes: torch.randint(-1, 2, sizes).float()) if is_whole else torch.randn
    x, v, u, values, bias = make(m, k), make(r, k), make(n, r), make(entries), make(n)
    usual = max(1, entries / max(1, n))  # of a row
    if is_whole:
        v, u = (t * (torch.rand(t.shape) < 10 / max(1, t.shape[1])) for t in (v, u))
        values = values * (torch.rand(entries) < 20 / usual)
    else:
        v, u, values = v / k**0.5, u / max(1, r)**0.5, values / usual**0.5
    starts, columns = (t.to(device) for t in support_of(n, k, entries))
    check_support(starts, columns, k)
    x, v, u, values, bias = (t.to(device, dtype) for t in (x, v, u, values, bias))
    return x, v, u, values, starts, columns, bias, 2.0 if is_whole else 0.7


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("path, shape", [*(("decode", shape) for shape in DECODE.values()),
                                         *(("materialize", shape) for shape in MATERIALIZE.values())])
def test_the_kernels_run_and_pass_the_gates(path, shape, dtype):
    args, before = operands(*shape, dtype), paths()
    y, h = gates.check_call(OPS.low_rank_sparse_training, args)
    assert torch.equal(OPS.low_rank_sparse(*args), y)
    assert paths() == before | {path: before[path] + 3}  # check_call calls twice
    assert gates.failed_gates(y, products(*args), known(*args)) == []
    x, v, scale = args[0], args[1], args[7]
    plain = torch.nn.functional.linear(x, v) * scale
    assert gates.failed_gates(h, plain, scaled(gates.chain(x, v.T), scale)) == []
    assert torch.equal(OPS.low_rank_sparse(*args[:6], None, scale), OPS.low_rank_sparse(*args[:6], 0 * args[6], scale))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 5, 9, 16, 17, 100])
def test_whole_numbers_are_exact(m):
    args = operands(m, 264, 40, 57, 1301, torch.bfloat16, is_whole=True)
    exact = reference(*(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args))
    assert gates.exact_gate(OPS.low_rank_sparse(*args), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [DECODE["llama"], DECODE["passes"], MATERIALIZE["bert"]])
def test_the_same_bits_every_time_and_in_a_graph(shape):
    x, *rest = operands(*shape, torch.bfloat16)
    first = OPS.low_rank_sparse(x, *rest)
    assert all(torch.equal(OPS.low_rank_sparse(x, *rest), first) for _ in range(100))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OPS.low_rank_sparse(x, *rest)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, OPS.low_rank_sparse(x, *rest))


# Whole numbers, which every order of sums gives exactly.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype, shape", [
    (torch.bfloat16, (3, 100, 12, 50, 300)), (torch.float16, (40, 99, 7, 50, 300)), (torch.float32, (3, 264, 40, 57, 1301)),
    (torch.float64, (40, 97, 5, 31, 77)), (torch.float32, (5, 40, 0, 30, 20)), (torch.float64, (5, 40, 3, 30, 0)),
    (torch.float32, (3, 33000, 4, 20, 900)), (torch.float32, (3, 8, 4, 0, 0))])
def test_the_library_does_the_rest(dtype, shape):
    args, before = operands(*shape, dtype, is_whole=True), paths()
    for found, due in zip(OPS.low_rank_sparse_training(*args), reference_training(*args), strict=True):
        assert torch.equal(found, due)
    assert paths() == before | {"library": before["library"] + 1}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("m", [3, 40])
def test_the_library_rounds_its_weight_once(m, dtype):
    args = operands(m, 100, 12, 50, 300, dtype)
    assert gates.failed_gates(OPS.low_rank_sparse(*args), products(*args), known(*args)) == []


@pytest.mark.gpu
def test_no_tokens_are_no_work():
    args, before = operands(0, 264, 40, 57, 1301, torch.bfloat16), paths()
    y, h = OPS.low_rank_sparse_training(*args)
    assert paths() == before and y.shape == (0, 57) and h.shape == (0, 40)


def bad_supports(starts, columns, k):
    """starts and columns that are no support: of either, one place at a time, and all of it."""
    last, low, high = len(columns), torch.iinfo(columns.dtype).min, torch.iinfo(columns.dtype).max
    for value in (-1, -2**31, 2**31 - 1, last + 1, 0, 5):
        for place in (0, len(starts) // 2, len(starts) - 1, slice(None)):
            yield starts.index_fill(0, torch.arange(len(starts), device=starts.device)[place].view(-1), value), columns
    yield starts.flip(0), columns
    for value in (-1, low, high, k, 0):
        for place in (0, last // 2, last - 1, slice(None)):
            yield starts, columns.index_fill(0, torch.arange(last, device=starts.device)[place].view(-1), value)
    yield starts, columns.flip(0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, m", [(torch.bfloat16, 3), (torch.bfloat16, 40), (torch.float32, 3)])
def test_a_bad_support_does_no_harm(dtype, m):
    """Numbers of some kind, the same each time, and no access outside."""
    x, v, u, values, starts, columns, bias, scale = operands(m, 264, 40, 57, 1301, dtype)
    for bad in bad_supports(starts, columns, 264):
        gates.check_call(OPS.low_rank_sparse, (x, v, u, values, *bad, bias, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("wrong, text", [
    (dict(x=torch.ones(2, 39)), "x has 39 features"), (dict(u=torch.ones(24, 2)), "u has rank 2"),
    (dict(values=torch.ones(119)), "columns"), (dict(starts=torch.zeros(24, dtype=torch.int32)), "starts"),
    (dict(columns=torch.zeros(120, dtype=torch.int32)), "columns must be int16"), (dict(bias=torch.ones(23)), "bias"),
    (dict(values=torch.ones(120).double()), "values must have one dtype")])
def test_mistakes_are_named(wrong, text):
    sizes = dict(x=torch.ones(2, 40), v=torch.ones(3, 40), u=torch.ones(24, 3), values=torch.ones(120),
                 starts=torch.arange(25, dtype=torch.int32) * 5, columns=torch.arange(5).repeat(24).short(),
                 bias=torch.ones(24)) | wrong
    with pytest.raises(RuntimeError, match=f"low_rank_sparse: .*{text}"):
        OPS.low_rank_sparse(*(t.cuda() for t in sizes.values()), 1.0)
