"""Every GPU kernel on one small shape, its results judged by the gates: what a sanitizer runs."""
import sys
from itertools import product

import torch
from torch.nn.functional import gelu, linear, silu

from lowfat import _native
from lowfat.bench.dictionary import Dictionary, known, products
from lowfat.bench import low_rank_sparse as sparse_rows
from lowfat.bench.gates import Chain, chain, failed_gates, finished, product_of
from lowfat.bench.monarch_backward import known_gradients
from lowfat.bench.sparse24 import random_mask
from lowfat.ops.bitmap import expand, unpack
from lowfat.ops.dictionary import coefficients
from lowfat.ops.dwt import analyze
from lowfat.ops.monarch import join_outputs, reference, reference_backward, reference_training
from lowfat.ops.wavelet import layout
from lowfat.ops.wavelet import reference_backward as wavelet_reference_backward
from lowfat.ops.wavelet import reference_training as wavelet_reference_training

OPS = torch.ops.lowfat
K, N, R = 776, 520, 72  # ragged against tiles of 16 and 64 rows and steps of 32 and 64


def operands(m: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """x, dy, v, u, bias."""
    x, dy = (torch.randn(m, size, device=device).to(dtype) for size in (K, N))
    v, u = (torch.randn(shape, device=device).mul_(0.05).to(dtype) for shape in ((R, K), (N, R)))
    return x, dy, v, u, torch.randn(N, device=device).to(dtype)


def low_rank(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    """Forward, and forward with h for training."""
    x, _, v, u, bias = operands(m, dtype, device)
    y, h = OPS.low_rank_training(x, v, u, bias)
    failed = failed_gates(y, linear(linear(x, v), u, bias), chain(x, v.T, u.T, bias=bias))
    failed += failed_gates(h, linear(x, v), chain(x, v.T))
    if not torch.equal(OPS.low_rank(x, v, u, bias), y):
        failed.append("other bits without h")
    return failed


def low_rank_epilogue(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    x, residual, v, u, bias = operands(m, dtype, device)
    y = OPS.low_rank_epilogue(x, v, u, bias, "gelu", residual)
    plain = gelu(linear(linear(x, v), u, bias)) + residual
    return failed_gates(y, plain, finished(chain(x, v.T, u.T, bias=bias), "gelu", residual))


def low_rank_group(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    """Members of other ranks, the last with fewer outputs."""
    x, _, v, u, bias = operands(m, dtype, device)
    members = [(v, u, bias), (v[:40], u[:, :40].contiguous(), None), (v, u[:264], bias[:264])]
    found = OPS.low_rank_group(x, *(list(parts) for parts in zip(*members)))
    return sorted({gate for y, (v, u, bias) in zip(found, members, strict=True)
                   for gate in failed_gates(y, linear(linear(x, v), u, bias), chain(x, v.T, u.T, bias=bias))})


def low_rank_swiglu(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    x, _, v, u, bias = operands(m, dtype, device)
    gate_v, gate_u = v[:40].flip(1).contiguous(), u[:, :40].contiguous()  # of another rank than up
    y = OPS.low_rank_swiglu(x, [gate_v, v], [gate_u, u], [None, bias])
    known = product_of(chain(x, gate_v.T, gate_u.T), chain(x, v.T, u.T, bias=bias))
    return failed_gates(y, silu(linear(linear(x, gate_v), gate_u)) * linear(linear(x, v), u, bias), known)


def low_rank_pivoted(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    x, _, v, u, bias = operands(m, dtype, device)
    pivots = torch.randperm(N, device=device)[:R].sort().values
    others = torch.ones(N, dtype=torch.bool, device=device).index_fill_(0, pivots, False)
    c = u[R:].contiguous()
    y, h = OPS.low_rank_pivoted(x, v, c, pivots, bias), linear(x, v)
    at_pivots = chain(x, v.T, torch.eye(R, device=device), bias=bias[pivots])  # h is rounded there too
    return [*failed_gates(y[:, pivots], h + bias[pivots], at_pivots),
            *failed_gates(y[:, others], linear(h, c, bias[others]), chain(x, v.T, c.T, bias=bias[others]))]


def low_rank_backward(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    x, dy, v, u, _ = operands(m, dtype, device)
    h = linear(x, v)
    dx, dv, du, db = OPS.low_rank_backward(dy, x, h, v, u, 15)
    ones = torch.ones(1, m, device=device, dtype=dtype)
    return [*failed_gates(dx, linear(linear(dy, u.T), v.T), chain(dy, u, v)),
            *failed_gates(dv, linear(linear(u.T, dy), x.T), chain(u.T, dy.T, x)),
            *failed_gates(du, linear(dy.T, h.T), chain(dy.T, h)),
            *failed_gates(db[None], linear(ones, dy.T), chain(ones, dy))]


def low_rank_backward_into(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    """Onto ones: what was there stays."""
    x, dy, v, u, _ = operands(m, dtype, device)
    h, ones = linear(x, v), torch.ones(1, m, device=device, dtype=dtype)
    dv, du, db = (torch.ones(shape, device=device) for shape in (v.shape, u.shape, u.shape[:1]))
    dx = OPS.low_rank_backward_into(dy, x, h, v, u, dv, du, db, True)
    return [*failed_gates(dx, linear(linear(dy, u.T), v.T), chain(dy, u, v)),
            *failed_gates(dv - 1, linear(linear(u.T, dy), x.T).float(), chain(u.T, dy.T, x), dtype),
            *failed_gates(du - 1, linear(dy.T, h.T).float(), chain(dy.T, h), dtype),
            *failed_gates((db - 1)[None], linear(ones, dy.T).float(), chain(ones, dy), dtype)]


def monarch(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    """Both forms, with few blocks and with many."""
    return [*monarch_gates(m, 4, 4, 24, 520, dtype, device), *monarch_gates(m, 48, 40, 2, 515, dtype, device)]


def monarch_clusters(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    """Both forms, with as many blocks as a cluster divides."""
    return monarch_gates(m, 16, 32, 2, 768, dtype, device)


def monarch_gates(m: int, b_in: int, b_out: int, r: int, n: int, dtype: torch.dtype, device: str) -> list[str]:
    """Forward, and forward with h for training."""
    failed, k = [], 768
    for interleave in (True, False):
        v = torch.randn(b_in, b_out * r, k // b_in, device=device).mul_(0.2).to(dtype)
        u = torch.randn(b_out, -(-n // b_out), b_in * r, device=device).mul_(0.2).to(dtype)
        x, bias = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (n,)))
        args = x, v, u, bias, n, interleave
        y64, h64 = reference_training(*(t.double() for t in args[:4]), n, interleave)
        size = reference(*(t.double().abs() for t in args[:4]), n, interleave)
        spread = torch.bmm(h64.square(), u.double().square().mT).sqrt()
        known = Chain(y64, [join_outputs(spread, n, interleave)], size, v.shape[2] + u.shape[2], h64.numel())
        y = OPS.monarch(*args)
        failed += failed_gates(y, reference(*args), known)
        if not torch.equal(OPS.monarch_training(*args)[0], y):
            failed.append("other bits with h")
    return failed


def monarch_backward(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    """Both forms, with 2, 4 and 8 blocks that are read together, and with none; the middle kept, and made."""
    failed, k = [], 768
    for b_in, b_out, r, n in ((4, 4, 24, 544), (48, 40, 1, 640), (4, 2, 12, 528), (2, 1, 24, 504)):
        v = torch.randn(b_in, b_out * r, k // b_in, device=device).mul_(0.2).to(dtype)
        u = torch.randn(b_out, -(-n // b_out), b_in * r, device=device).mul_(0.2).to(dtype)
        x, dy = (torch.randn(m, size, device=device).to(dtype) for size in (k, n))
        for interleave in (True, False):
            h = reference_training(x, v, u, None, n, interleave)[1]
            for kept in (h, None):
                args = dy, x, kept, v, u, 15, n, interleave
                chains = known_gradients(dy, x, kept, v, u, n, interleave)
                for found, plain, known in zip(OPS.monarch_backward(*args), reference_backward(*args), chains, strict=True):
                    failed += failed_gates(found.view_as(known.y64), plain.view_as(known.y64), known)
    return failed


def masked(m: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """x, dy, values, mask, their dense weight, bias: 2:4."""
    k = SIZES[sparse24]["k"]
    x, dy, bias = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (m, N), (N,)))
    values, mask = torch.randn(N, k // 2, device=device).mul_(0.05).to(dtype), random_mask(N, k, 2, 4, torch.device(device))
    return x, dy, values, mask, expand(values, unpack(mask, k)), bias


def sparse24(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    x, _, values, mask, weight, bias = masked(m, dtype, device)
    return failed_gates(OPS.sparse24(x, values, mask, bias, 2, 4), linear(x, weight, bias), chain(x, weight.T, bias=bias))


def sparse24_backward(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    x, dy, values, mask, weight, _ = masked(m, dtype, device)
    dx, dvalues, db = OPS.sparse24_backward(dy, x, values, mask, 11, 2, 4)
    ones = torch.ones(1, m, device=device, dtype=dtype)
    return [*failed_gates(dx, linear(dy, weight.T), chain(dy, weight)),
            *kept_gates(dvalues, linear(dy.T, x.T), chain(dy.T, x), unpack(mask, x.shape[1])),
            *failed_gates(db[None], linear(ones, dy.T), chain(ones, dy))]


def kept_gates(found: torch.Tensor, plain: torch.Tensor, known: Chain, kept: torch.Tensor) -> list[str]:
    """Of the kept entries of a dense gradient."""
    def of(whole: torch.Tensor) -> torch.Tensor:
        return whole[kept].view(found.shape)

    return failed_gates(found, of(plain), Chain(of(known.y64), [of(mid) for mid in known.mids], of(known.magnitude),
                                                known.length, known.roundings))


def coded(m: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """x, dy, d, values, support, bias: one block, half of the atoms in a row."""
    x, dy, v, _, bias = operands(m, dtype, device)
    support = Dictionary().random_support(N, R, torch.device(device))
    return x, dy, v[None, None], torch.randn(N, R // 2, device=device).mul_(0.05).to(dtype), support, bias


def dictionary(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    """Forward, and forward with h for training."""
    x, _, d, values, support, bias = coded(m, dtype, device)
    y, h = OPS.dictionary_training(x, d, values, support, bias)
    failed = failed_gates(y, products(x, d, values, support) + bias, known(x, d, values, support, bias))
    failed += failed_gates(h[0], linear(x, d[0, 0]), chain(x, d[0, 0].T))
    if not torch.equal(OPS.dictionary(x, d, values, support, bias), y):
        failed.append("other bits without h")
    return failed


def dictionary_backward(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    x, dy, d, values, support, _ = coded(m, dtype, device)
    h, codes, atoms = linear(x, d[0, 0]), coefficients(values, support, 1, R), d[0, 0]
    dx, dd, dvalues, db = OPS.dictionary_backward(dy, x, h[None], d, values, support, 0b10111)
    ones = torch.ones(1, m, device=device, dtype=dtype)
    return [*failed_gates(dx, linear(linear(dy, codes.T), atoms.T), chain(dy, codes, atoms)),
            *failed_gates(dd[0, 0], linear(linear(codes.T, dy), x.T), chain(codes.T, dy.T, x)),
            *kept_gates(dvalues, linear(dy.T, h.T), chain(dy.T, h), unpack(support, R)),
            *failed_gates(db[None], linear(ones, dy.T), chain(ones, dy))]


def sparse_parts(m: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """x, dy, v, u, values, starts, columns, bias: as many entries in every row."""
    x, dy, v, u, bias = operands(m, dtype, device)
    columns = sparse_rows.LowRankSparse().random_columns(N, K, torch.device(device))
    starts = torch.arange(N + 1, dtype=torch.int32, device=device) * columns.shape[1]
    values = torch.randn(columns.numel(), device=device).mul_(0.2).to(dtype)
    return x, dy, v, u, values, starts, columns.flatten(), bias


def low_rank_sparse(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    """Forward, and forward with h for training."""
    x, _, v, u, *support, bias = sparse_parts(m, dtype, device)
    args, scale = (x, v, u, *support, bias), 0.7
    y, h = OPS.low_rank_sparse_training(*args, scale)
    failed = failed_gates(y, sparse_rows.products(*args, scale), sparse_rows.known(*args, scale))
    failed += failed_gates(h, linear(x, v) * scale, sparse_rows.scaled(chain(x, v.T), scale))
    if not torch.equal(OPS.low_rank_sparse(*args, scale), y):
        failed.append("other bits without h")
    return failed


def low_rank_sparse_backward(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    x, dy, v, u, values, starts, columns, _ = sparse_parts(m, dtype, device)
    scale, ones = 0.7, torch.ones(1, m, device=device, dtype=dtype)
    s, h = sparse_rows.sparse(values, starts, columns, N, K), linear(x, v) * scale
    dx, dv, du, dvalues, db = OPS.low_rank_sparse_backward(dy, x, h, v, u, values, starts, columns, 0b1001111, scale)
    dh = linear(dy, u.T) * scale
    return [*failed_gates(dx, linear(dh, v.T) + linear(dy, s.T),
                          sparse_rows.both(sparse_rows.scaled(chain(dy, u, v), scale), chain(dy, s))),
            *failed_gates(dv, linear(dh.T, x.T), sparse_rows.scaled(chain(u.T, dy.T, x), scale)),
            *failed_gates(du, linear(dy.T, h.T), chain(dy.T, h)),
            *kept_gates(dvalues, linear(dy.T, x.T), chain(dy.T, x),
                        sparse_rows.sparse(torch.ones_like(values), starts, columns, N, K).bool()),
            *failed_gates(db[None], linear(ones, dy.T), chain(ones, dy))]


SUBBANDS = ("LL", "diag", "all")


def transformed(m: int, subbands: str, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """x, dy, v, u"""
    k, n, r = (SIZES[wavelet][size] for size in ("k", "n", "r"))
    last = layout(subbands, 1, k, n)[-1]
    x, dy = (torch.randn(m, size, device=device).to(dtype) for size in (k, n))
    shapes = (r, last.columns.stop), (last.rows.stop, r)
    v, u = (torch.randn(shape, device=device).mul_(0.05).to(dtype) for shape in shapes)
    return x, dy, v, u


def on_features(x: torch.Tensor, v: torch.Tensor, dy: torch.Tensor, u: torch.Tensor, subbands: str):
    """Of each pair: its halves of x and dy, and its factors as matrices of features [k, r], [r, n], in fp64."""
    for pair in layout(subbands, 1, x.shape[1], dy.shape[1]):
        into, out = (analyze(torch.eye(t.shape[1], device=t.device, dtype=torch.float64), "haar", 1)[0][end[1]]
                     for t, end in ((x, pair.source), (dy, pair.target)))
        yield into, out, into @ v[:, pair.columns].double().T, (out @ u[pair.rows].double()).T


def wavelet(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    """Every kind of pairs; forward, and forward with h for training."""
    failed = []
    for subbands in SUBBANDS:
        x, dy, v, u = transformed(m, subbands, dtype, device)
        args = x, v, None, u, "haar", 1, subbands, dy.shape[1], 0.75
        (y, h), (plain, middle) = OPS.wavelet_training(*args), wavelet_reference_training(*args)
        _, _, firsts, seconds = zip(*on_features(x, v, dy, u, subbands))
        failed += failed_gates(y, plain, chain(x, torch.cat(firsts, 1), 0.75 * torch.cat(seconds)))
        for mine, theirs, first in zip(h, middle, firsts):
            failed += failed_gates(mine, theirs, chain(x, first))
        if not torch.equal(OPS.wavelet(*args), y):
            failed.append("other bits without h")
    return failed


def wavelet_backward(m: int, dtype: torch.dtype, device: str = "cuda") -> list[str]:
    """Every kind of pairs, the middle kept."""
    failed = []
    for subbands in SUBBANDS:
        x, dy, v, u = transformed(m, subbands, dtype, device)
        options = "haar", 1, subbands, dy.shape[1], 0.75
        h = wavelet_reference_training(x, v, None, u, *options)[1]
        args = dy, x, h, v, None, u, 11, *options
        (dx, dv, _, du), (plain_dx, plain_dv, _, plain_du) = OPS.wavelet_backward(*args), wavelet_reference_backward(*args)
        parts = list(on_features(x, v, dy, u, subbands))
        _, _, firsts, seconds = zip(*parts)
        failed += failed_gates(dx, plain_dx, chain(dy, 0.75 * torch.cat(seconds).T, torch.cat(firsts, 1).T))
        for i, (pair, (into, out, _, second)) in enumerate(zip(layout(subbands, 1, x.shape[1], dy.shape[1]), parts)):
            failed += failed_gates(dv[:, pair.columns], plain_dv[:, pair.columns], chain(0.75 * second, dy.T, x, into))
            failed += failed_gates(du[pair.rows], plain_du[pair.rows], chain(0.75 * out.T, dy.T, h[i]))
    return failed


# function -> the op whose choice of a path and whose counters it shares, and the values of m
CALLS = {low_rank: ("low_rank", (1, 16, 100, 300)), low_rank_epilogue: ("low_rank", (1, 16, 100, 300)),
         low_rank_group: ("low_rank_group", (5,)), low_rank_swiglu: ("low_rank_swiglu", (5,)),
         low_rank_pivoted: ("low_rank_pivoted", (5,)), low_rank_backward: ("low_rank_backward", (100,)),
         low_rank_backward_into: ("low_rank_backward_into", (100,)), monarch: ("monarch", (1, 16, 100)),
         monarch_backward: ("monarch_backward", (100,)), monarch_clusters: ("monarch", (1, 100)),
         sparse24: ("sparse24", (1, 16, 60, 100)), sparse24_backward: ("sparse24_backward", (100,)),
         dictionary: ("dictionary", (1, 16)), dictionary_backward: ("dictionary_backward", (100,)),
         low_rank_sparse: ("low_rank_sparse", (1, 16, 100)), low_rank_sparse_backward: ("low_rank_sparse_backward", (100,)),
         wavelet: ("wavelet", (1, 100)), wavelet_backward: ("wavelet_backward", (100,))}
ENTRIES = {"entries": N * sparse_rows.LowRankSparse().entries(K)}
BLOCKS = {"k": 768, "n": 544, "r": 24, "b_in": 4, "b_out": 4}  # 776 inputs in 4 blocks are no whole pieces
SIZES = {monarch: BLOCKS, monarch_backward: BLOCKS,
         monarch_clusters: {"n": 768, "k": 768, "r": 2, "b_in": 16, "b_out": 32},
         sparse24: {"k": 768}, sparse24_backward: {"k": 768}, dictionary: {"kept": R // 2},
         dictionary_backward: {"kept": R // 2}, low_rank_sparse: ENTRIES, low_rank_sparse_backward: ENTRIES, wavelet: BLOCKS,
         wavelet_backward: BLOCKS}
NO_KERNEL = ("library", "members", "reference")


def path_here(op: str, m: int, dtype: torch.dtype, sizes: dict[str, int]) -> str:
    """The path that this problem has on this GPU."""
    about = torch.cuda.get_device_properties()
    return _native.native.choose_config(op, m=m, **{"n": N, "k": K, "r": R, **sizes}, device="cuda",
                                        dtype=str(dtype).removeprefix("torch."), arch=about.major * 10 + about.minor,
                                        sm_count=about.multi_processor_count,
                                        members=3 if op == "low_rank_group" else 1)["path"]


def main() -> int:
    torch.manual_seed(0)
    status = 0
    for call, (op, rows) in CALLS.items():
        paths = set()
        for m, dtype in product(rows, (torch.bfloat16, torch.float16)):
            path = path_here(op, m, dtype, SIZES.get(call, {}))
            paths.add(path)
            before = _native.calls(op, "cuda", path)
            failed = call(m, dtype)
            if _native.calls(op, "cuda", path) == before:
                failed.append("another path ran")
            print("FAIL" if failed else "pass", call.__name__, dtype, f"m = {m}, {path}", *failed)
            status |= bool(failed)
        if paths.issubset(NO_KERNEL):
            print("FAIL", call.__name__, "has no kernel here")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
