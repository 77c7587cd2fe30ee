"""The race on the CPU: a kernel that computes nothing must be caught, and nobody may read weights twice in a row."""
import pytest
import torch
from torch.nn.functional import linear

from lowfat.bench import timing
from lowfat.bench.gates import chain, failed_gates

K, N, R = 256, 192, 32


def factors(slab):
    return slab[:R * K].view(R, K), slab[R * K:].view(N, R)


def gates_of(planted, dtype):
    """The gates that a candidate fails, timed against two F.linear that give the allocator right results to hand out."""
    torch.manual_seed(0)
    x = torch.randn(3, K).to(dtype)
    pool = timing.Pool(dtype, scale=0.05, size_bytes=40 * R * (K + N) * dtype.itemsize)
    count = R * (K + N)
    candidates = {"pair": timing.Candidate(count, factors, lambda v, u: linear(linear(x, v), u)),
                  "planted": timing.Candidate(count, factors, lambda v, u: planted(x, v, u))}
    timed = timing.paired(candidates, pool, repeats=31)
    assert all(len(one.us) == 31 and len(one.results) == 2 for one in timed.values())
    return {gate for (v, u), y in timed["planted"].results
            for gate in failed_gates(y, linear(linear(x, v), u), chain(x, v.T, u.T))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_candidate_passes(dtype):
    assert gates_of(lambda x, v, u: linear(linear(x, v), u), dtype) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_does_nothing_is_caught(dtype):
    assert "G3" in gates_of(lambda x, v, u: torch.empty(3, N, dtype=dtype), dtype)


def test_a_kernel_that_works_once_is_caught():
    first = []

    def stale(x, v, u):
        first.append(linear(linear(x, v), u)) if not first else None
        return first[0].clone()

    assert "G3" in gates_of(stale, torch.float32)


def test_a_kernel_that_leaves_a_row_out_is_caught():
    def partial(x, v, u):
        y = torch.empty(3, N)
        torch.mm(linear(x, v)[:2], u.T, out=y[:2])
        return y

    assert "G3" in gates_of(partial, torch.float32)


def test_weights_come_back_only_after_the_whole_pool():
    """Kills a cursor that does not move, and one that starts again too early."""
    pool = timing.Pool(torch.float32, scale=1.0, size_bytes=4 * 64 * 10)
    starts = [pool.next(100).storage_offset() for _ in range(6)]
    assert starts == [0, 128, 256, 384, 512, 0]
    with pytest.raises(ValueError, match="the pool has 640 numbers, 641 are needed"):
        pool.next(641)


def test_pool_is_larger_than_the_caches():
    cache = timing.last_level_cache_bytes()
    assert cache >= 1 << 20
    pool = timing.Pool(torch.bfloat16, scale=0.02, size_bytes=1 << 20)
    assert pool.values.numel() == 1 << 19 and 0.015 < pool.values.float().std() < 0.025 and pool.values.isfinite().all()


def test_order_alternates_and_ratio_is_paired():
    order, pool = [], timing.Pool(torch.float32, scale=1.0, size_bytes=4096)

    def named(name):
        return timing.Candidate(16, lambda slab: (slab,), lambda slab: order.append(name) or slab.clone())

    candidates = {name: named(name) for name in "ab"}
    timing.paired(candidates, pool, repeats=2, warmup=0)
    assert order[2:] == ["b", "a", "a", "b"]  # after one call each that only makes buffers
    ours, theirs = timing.Timed([1.0, 2.0, 4.0], []), timing.Timed([3.0, 6.0, 12.0], [])
    assert timing.times_faster(ours, theirs) == (3.0, 3.0, 3.0)


def test_repeats_fit_the_time():
    assert timing.repeats_for(1e-3, 0.1) == 101 and timing.repeats_for(1e-6, 1) == 301 and timing.repeats_for(1, 1) == 15


def test_buffers_of_several_outputs_are_poisoned():
    """Kills a chain whose layers compute nothing: what it is given must be NaN too."""
    pool = timing.Pool(torch.float32, scale=1.0, size_bytes=64 << 10)
    twice = timing.Candidate(64, lambda slab: (slab,), lambda slab: [slab.clone(), 2 * slab])
    lazy = timing.Candidate(64, lambda slab: (slab,), lambda slab: [torch.empty(64), torch.empty(64)])
    timed = timing.paired({"twice": twice, "lazy": lazy}, pool, repeats=15)
    assert all(torch.equal(a, slab) and torch.equal(b, 2 * slab) for (slab,), (a, b) in timed["twice"].results)
    assert not any(torch.equal(a, slab) or torch.equal(b, 2 * slab) for (slab,), (a, b) in timed["lazy"].results)
