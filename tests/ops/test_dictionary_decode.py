"""The decode kernel of dictionary on a GPU: for which problems it is planned, that it runs there, and passes the gates."""
import pytest
import torch

import gates
from lowfat import _native
from lowfat.ops.dictionary import coefficients, kept_atoms, reference_training

OPS = torch.ops.lowfat
needs_library = pytest.mark.skipif(_native.native is None, reason=f"no compiled library: {_native.why_not}")
# m, k, atoms, n, kept of a row: ragged tiles; one chunk of coefficients and many; layers of models
SHAPES = {"smallest": (1, 8, 8, 8, 1), "ragged": (3, 264, 40, 56, 13), "two tiles": (13, 520, 136, 328, 136),
          "bert": (8, 768, 384, 3072, 192), "llama": (1, 4096, 2048, 4096, 1024), "chunks": (16, 4096, 2048, 14336, 1024)}


def config(**changes) -> dict:
    problem = dict(m=1, n=4096, k=4096, r=2048, kept=1024, device="cuda")
    return _native.native.choose_config("dictionary", **{**problem, **changes})


@needs_library
@pytest.mark.parametrize(("path", "changes"), [
    ("empty", {"m": 0}), ("decode", {}), ("decode", {"m": 16}), ("library", {"m": 17}), ("decode", {"dtype": "float16"}),
    ("library", {"dtype": "float32"}), ("library", {"is_aligned": False}), ("library", {"b_in": 2}),
    ("library", {"b_out": 2}), ("library", {"n": 4092}), ("library", {"k": 4092}), ("library", {"r": 2056}),
    ("library", {"kept": 0}), ("library", {"arch": 100}), ("decode", {"arch": 80, "sm_count": 108}),
    ("decode", {"arch": 86, "sm_count": 84, "r": 1024, "kept": 512}), ("library", {"arch": 86, "sm_count": 84})])
def test_the_path_follows_what_the_kernel_covers(path, changes):
    assert config(**changes)["path"] == path


@needs_library
def test_coefficients_come_in_one_chunk_where_they_fit():
    assert (config()["at_once"], config()["buffers"]) == (2, 1)
    assert config(n=14336)["buffers"] == 2


def operands(m, k, a, n, s, dtype, *, is_whole=False):
    make = (lambda *sizes: torch.randint(-1, 2, sizes)) if is_whole else torch.randn
    keep = torch.rand(n, a).argsort(-1) < s
    bits = torch.nn.functional.pad(keep, (0, -a % 32)).unflatten(1, (-1, 32)).long() << torch.arange(32)
    support = bits.sum(-1).to(torch.uint32).view(torch.int32)
    x, d, values = make(m, k), make(1, 1, a, k), make(n, s)
    if is_whole:
        d = d * (torch.rand(d.shape) < 30 / k)
    else:
        d, values = d / k**0.5, values / s**0.5
    x, d, values, bias = (t.to("cuda", dtype) for t in (x, d, values, make(n)))
    return x, d, values, support.cuda(), bias


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernel_runs_and_passes_the_gates(shape, dtype):
    args, before = operands(*shape, dtype), _native.calls("dictionary", "cuda", "decode")
    y, h = gates.check_call(OPS.dictionary_training, args)
    assert torch.equal(OPS.dictionary(*args), y)
    assert _native.calls("dictionary", "cuda", "decode") == before + 3  # check_call calls twice
    x, d, values, support, bias = args
    codes = coefficients(values, support, 1, d.shape[2])
    due, middle = reference_training(*args)
    assert gates.failed_gates(y, due, gates.chain(x, d[0, 0].T, codes.T, bias=bias)) == []
    assert gates.failed_gates(h[0], middle[0], gates.chain(x, d[0, 0].T)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 9])
def test_whole_numbers_are_exact(m):
    args = operands(m, 264, 40, 56, 13, torch.bfloat16, is_whole=True)
    exact = reference_training(*(t.double() if t.is_floating_point() else t for t in args))[0]
    assert gates.exact_gate(OPS.dictionary(*args), exact)


@pytest.mark.gpu
def test_positions_and_a_bitmap_give_the_same_bits():
    x, d, values, support, bias = operands(*SHAPES["ragged"], torch.bfloat16)
    atoms, before = d.shape[2], _native.calls("dictionary", "cuda", "decode")
    positions = kept_atoms(support, 1, atoms)[:, 0].nonzero()[:, 1].reshape(values.shape).to(torch.int16)
    assert torch.equal(OPS.dictionary(x, d, values, positions, bias), OPS.dictionary(x, d, values, support, bias))
    assert _native.calls("dictionary", "cuda", "decode") == before + 2


@pytest.mark.gpu
def test_the_same_bits_every_time_and_in_a_graph():
    x, *rest = operands(*SHAPES["llama"], torch.bfloat16)
    first = OPS.dictionary(x, *rest)
    assert all(torch.equal(OPS.dictionary(x, *rest), first) for _ in range(100))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OPS.dictionary(x, *rest)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, OPS.dictionary(x, *rest))


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [(1, 1), (1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_library_does_the_rest(blocks, has_bias):
    p_out, q = blocks
    m, k, a, n, s = 20, 30, 24, 40, 12
    d = torch.randn(p_out, q, a, -(-k // q), device="cuda")
    positions = torch.rand(n * q, a, device="cuda").argsort(-1)[:, :s].sort(-1).values.reshape(n, q * s).to(torch.int16)
    args = (torch.randn(m, k, device="cuda"), d, torch.randn(n, q * s, device="cuda"), positions,
            torch.randn(n, device="cuda") if has_bias else None)
    before = _native.calls("dictionary", "cuda", "library")
    for found, due in zip(OPS.dictionary_training(*args), reference_training(*args), strict=True):
        torch.testing.assert_close(found, due)
    assert _native.calls("dictionary", "cuda", "library") == before + 1
