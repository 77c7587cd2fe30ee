"""`lowfat bench`: each row says what ran and how it was judged; wrong results and wrong options do not pass."""
import json
import math
import time

import pytest
import torch
from typer.testing import CliRunner

import lowfat.bench.low_rank as bench
from lowfat.bench import graphs, race, timing
from lowfat.bench.dictionary import Dictionary
from lowfat.bench.measure import calls, floor, measure, which_ran
from lowfat.bench.shapes import MODELS, Layer, layers
from lowfat.bench.sparse24 import Sparse24, going_around, has_semi_structured
from lowfat.cli import app
from lowfat.errors import ArgumentError
from lowfat.measured import header
from lowfat.ops.dictionary import check_support
from lowfat.show import show_bench

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    """Enough for these shapes: filling twice the last-level cache takes seconds."""
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda: 1 << 20)


def command(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments, "--device", "cpu", "--seconds", "0.01", "--threads", "1"])


def test_a_row_is_complete_and_true_to_itself():
    found = race.race("low_rank", shapes="64:96:16,256:128:32", rows="1,20", device=CPU, seconds=0.01)
    assert [(row["k"], row["n"], row["r"], row["m"]) for row in found["rows"]] == [
        (64, 96, 16, 1), (64, 96, 16, 20), (256, 128, 32, 1), (256, 128, 32, 20)]
    assert found["ceilings"] is None and found["chains"] == [] and not race.failures(found)
    for row in found["rows"]:
        assert 0 < row["least_us"] <= row["us"] and row["faster_low"] <= row["faster"] <= row["faster_high"]
        assert row["against_best"] == pytest.approx(min(row["pair_us"], row["dense_us"]) / row["us"])
        assert row["of_floor"] == pytest.approx(row["floor_us"] / row["us"])
        assert row["gb_per_s"] == pytest.approx(2 * row["r"] * (row["k"] + row["n"]) / row["us"] / 1e3)
    json.dumps(found)


def test_a_row_names_the_path_that_ran():
    """By its counter, not by what choose_config promises: kills a name that does not ask whether anything ran."""
    from lowfat import _native

    found = race.race("low_rank", shapes="64:96:16", rows="1,200", device=CPU, seconds=0.01)["rows"]
    if _native.kernels():
        assert [row["ran"] for row in found] == [f"kernel ({_native.cpu_level()})", "library"]
    else:
        assert [row["ran"] for row in found] == ["reference", "reference"]
    x = torch.randn(1, 64)
    assert which_ran("low_rank", x, 96, 16, before=calls("low_rank", x, 96, 16)) == "reference"


@pytest.mark.parametrize("op", ["low_rank_group", "low_rank_swiglu"])
def test_a_row_of_a_group_names_what_ran_for_its_members(op):
    """Kills a name by the group's own counter, which says that the members ran one by one and not how."""
    from lowfat import _native

    def ran(dtype):
        found = race.race(op, shapes="64:96:16", rows="1,200", dtype=dtype, device=CPU, seconds=0.01)
        return [row["ran"] for row in found["rows"]]

    kernel = f"kernel ({_native.cpu_level()})"
    expected = {"bfloat16": [kernel, "library"], "float32": [kernel, "library"], "float16": ["library", "library"]}
    for dtype, names in expected.items():
        assert ran(dtype) == (names if _native.kernels() else ["reference", "reference"])
    x = torch.randn(1, 64)
    assert which_ran(op, x, 96, 16, before=calls(op, x, 96, 16, members=2), members=2) == "reference"


def test_members_on_a_gpu_have_the_names_of_their_paths(monkeypatch):
    """Of a GPU without one: the counters of groups that no kernel covers are low_rank's, those of others their own."""
    from lowfat import _native

    if _native.native is None:
        pytest.skip(f"no compiled library: {_native.why_not}")
    about = type("About", (), {"major": 9, "minor": 0, "multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(_native, "kernels", lambda: dict.fromkeys(race.OPS, {"cuda": ["sm_90a"]}))
    monkeypatch.setattr(_native, "calls", lambda op, device, path: asked.append((op, path)) or len(asked))
    asked = []
    kernel = _native.native.choose_config("low_rank", m=64, n=96, k=64, r=16, device="cuda")["path"]  # by what was built
    for m, op, path in ((1, "low_rank_group", "decode"), (64, "low_rank", kernel), (5000, "low_rank", "library")):
        ran = which_ran("low_rank_group", OnGpu(m, 64), 96, 16, before=0, members=3)
        assert asked.pop() == (op, path) and ran == (path if path == "library" else f"kernel ({path})")


class OnGpu:
    """As much of a tensor as config() looks at."""
    is_cuda, device, dtype = True, torch.device("cuda"), torch.bfloat16

    def __init__(self, m, k):
        self.shape = (m, k)

    def __len__(self):
        return self.shape[0]


@pytest.mark.parametrize("planted", [
    lambda x, v, u: torch.empty(len(x), len(u), dtype=x.dtype),  # nothing
    lambda x, v, u: torch.zeros(len(x), len(u), dtype=x.dtype),
    lambda x, v, u: bench.linear(bench.linear(x, v), u) * 1.05,
])
def test_a_wrong_kernel_fails_the_command(planted, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "low_rank", planted)
    done = command("low_rank", "--shapes", "384:384:96", "--rows", "2", "--out", str(tmp_path / "found"))
    assert done.exit_code == 1 and "FAIL" in done.stdout
    assert "G3" in json.loads((tmp_path / "found.json").read_text())["rows"][0]["failed_gates"]


def test_the_command_shows_and_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = ["--shapes", "64:96:16", "--rows", "1,2", "--dtype", "float32", "--out", str(tmp_path / "found")]
    done = command("low_rank", *options)
    assert done.exit_code == 0, done.output
    assert "64 -> 96, 16" in done.stdout and max(map(len, done.stdout.splitlines()[1:])) <= 80
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
    assert [row["m"] for row in json.loads((tmp_path / "found.json").read_text())["rows"]] == [1, 2]


@pytest.mark.parametrize("arguments, words", [
    (["high_rank"], "op must be one of low_rank, low_rank_group, low_rank_swiglu, low_rank_backward, monarch, "
     "monarch_backward, sparse24, dictionary, low_rank_sparse; found 'high_rank'"),
    (["sparse24", "--shapes", "64:96:5"], "rank must be between 1 and 4 for 64 -> 96; found 5"),
    (["sparse24", "--shapes", "66:96:2"], "k must be a multiple of 4 for sparse24; found 66"),
    (["low_rank", "--shapes", "llama-8c"], "neither one of llama-8b, bert-base, minilm nor sizes k:n:r"),
    (["low_rank", "--shapes", "64:96"], "'64:96' is neither"),
    (["low_rank", "--shapes", "64:96:65"], "rank must be between 1 and 64 for 64 -> 96; found 65"),
    (["low_rank", "--rank", "0"], "rank must be between 1 and 384"),
    (["low_rank", "--blocks", "4"], "blocks: low_rank has none"),
    (["monarch", "--blocks", "0"], "blocks must be at least 1; found 0"),
    (["monarch", "--shapes", "64:96:17"], "rank must be between 1 and 16 for 64 -> 96; found 17"),
    (["low_rank", "--ratio", "1"], "ratio must be between 0 and 1"),
    (["low_rank", "--rows", "1,two"], "rows must be whole numbers"),
    (["low_rank", "--rows", "0"], "rows must be between 1 and 65536"),
    (["low_rank", "--dtype", "float64"], "dtype must be one of bfloat16, float16, float32; found 'float64'"),
    (["low_rank", "--out", "nowhere/found"], "the folder nowhere does not exist"),
])
def test_wrong_options(arguments, words):
    done = command(*arguments)
    assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_no_seconds_and_no_threads():
    with pytest.raises(ArgumentError, match="seconds must be between 0 and 3600"):
        race.race("low_rank", shapes="minilm", rows="1", device=CPU, seconds=0)
    done = CliRunner().invoke(app, ["bench", "low_rank", "--threads", "0"])
    assert done.exit_code == 2 and "--threads is 0; needs at least 1" in done.stderr


# ------------------------------------------------------------------------------------------------ every op
RANKS = dict.fromkeys(race.OPS, 16) | {"sparse24": 2}


@pytest.mark.parametrize("op", race.OPS)
def test_every_op_is_raced_and_judged(op):
    found = race.race(op, shapes=f"64:96:{RANKS[op]}", rows="1,40", device=CPU, seconds=0.01)
    assert not race.failures(found) and all(row["us"] > 0 and "pair_us" in row for row in found["rows"])


@pytest.mark.parametrize("op", race.OPS)
def test_a_wrong_output_of_any_op_is_caught(op):
    """Every output counts: kills a judge that looks at the first member or gradient alone."""
    raced, x = race.OPS[op], torch.randn(40, 64).bfloat16()
    ours = raced.candidates(x, 96, RANKS[op])[op]
    operands = ours.operands(timing.Pool(torch.bfloat16, raced.SCALE).next(ours.count))
    y = ours.call(*operands)
    assert raced.judged(x, [(operands, y)]) == []
    for wrong in range(len(timing.outputs_of(y))):
        planted = [one.clone() for one in timing.outputs_of(y)]
        planted[wrong].view(-1)[7] += 0.2 * planted[wrong].abs().max() + 1e-3
        assert "G3" in raced.judged(x, [(operands, planted[0] if isinstance(y, torch.Tensor) else planted)]), wrong


@pytest.mark.parametrize("op", race.OPS)
def test_work_counts_every_number_once(op):
    """Against the sizes of the operands and outputs themselves."""
    raced, layer = race.OPS[op], Layer("", "", 64, 96, RANKS[op])
    x = torch.randn(40, 64).bfloat16()
    ours = raced.candidates(x, 96, RANKS[op])[op]
    y = timing.outputs_of(ours.call(*ours.operands(timing.Pool(torch.bfloat16, raced.SCALE).next(ours.count))))
    inputs = {"low_rank_backward": 40 * (96 + 16), "monarch_backward": 40 * (96 + 16 * 4 * 4)}.get(op, 0)  # dy and h
    assert raced.work(layer, 40)[0] == x.numel() + inputs + ours.count + sum(one.numel() for one in y)


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_blocks_are_part_of_the_question(blocks):
    """Sizes that they do not divide among them; the rank that a ratio gives is shared."""
    from lowfat import _native

    found = race.race("monarch", shapes="64:90:5", rows="2,200", blocks=blocks, device=CPU, seconds=0.01)
    assert found["header"]["blocks"] == blocks and not race.failures(found)
    if _native.kernels():
        assert [row["ran"] for row in found["rows"]] == [f"kernel ({_native.cpu_level()})", "library"]
    weights = -(-64 // blocks) * 5 * blocks**2 + -(-90 // blocks) * 5 * blocks**2
    assert all(row["gb_per_s"] == pytest.approx(2 * weights / row["us"] / 1e3) for row in found["rows"])
    assert [layer.r for layer in layers("bert-base", blocks=blocks)] == [r // blocks for r in (192, 304, 304)]


@pytest.mark.parametrize("share, blocks, is_bitmap",
                         [(2, 1, True), (2, 4, True), (8, 3, True), (32, 1, False), (40, 2, False)])
def test_codes_of_a_dictionary_take_the_smaller_form(share, blocks, is_bitmap):
    raced = Dictionary(blocks=blocks, share=share)
    layer, x = Layer("", "", 128, 96, 80), torch.randn(3, 128).bfloat16()
    ours = raced.candidates(x, 96, 80)["dictionary"]
    operands = ours.operands(timing.Pool(torch.bfloat16, raced.SCALE).next(ours.count))
    assert (operands[2].dtype == torch.int32) == is_bitmap and raced.judged(x, [(operands, ours.call(*operands))]) == []
    assert raced.work(layer, 3)[0] == ours.count + 3 * (128 + 96)
    check_support(operands[2], blocks, 80, 80 // share)


def test_indices_go_around_as_weights_do():
    """Kills a mask that stays in the caches: each comes back after twice the last level was read, and all are in order."""
    mask = torch.arange(40)[:, None]
    around = going_around(mask, bytes_between=1 << 18)
    taken = [next(around) for _ in range(20)]
    assert len({t.data_ptr() for t in taken}) == 10 and all(torch.equal(t.sort(0).values, mask) for t in taken)


@pytest.mark.parametrize("change, has_one", [({}, True), ({"kept": 1}, False), ({"group": 8}, False), ({"n": 48}, False),
                                             ({"k": 96}, False), ({"bytes": 4}, False), ({"is_cuda": False}, False)])
def test_torchs_own_2_of_4_takes_part_where_it_can(change, has_one):
    class X:  # what is asked of it
        def __init__(self, k, **about):
            self.shape, self.is_cuda, self.element_size = (5, k), about["is_cuda"], lambda: about["bytes"]

    about = {"k": 128, "n": 64, "kept": 2, "group": 4, "bytes": 2, "is_cuda": True} | change
    assert has_semi_structured(X(**about), about["n"], about["kept"], about["group"]) == has_one


# ------------------------------------------------------------------------------------------------ shapes
def test_ranks_of_other_ops_are_theirs():
    """Of every four, and atoms of as many bytes as the ratio says, but for the last word of a row's bitmap."""
    assert Sparse24().rank_for(384, 384, 0.5) == 2 and Sparse24().rank_for(384, 384, 0.1) == 1
    for ratio in (0.25, 0.5, 0.9):
        for k, n in ((384, 1536), (4096, 4096)):
            kept = sum(Dictionary().numbers(k, n, Dictionary().rank_for(k, n, ratio))) / (k * n)
            assert ratio - 0.1 < kept <= ratio + 2 / k


def test_ranks_keep_the_ratio_in_multiples_of_eight():
    for ratio in (0.25, 0.5, 0.9):
        for layer in layers(",".join(MODELS), ratio=ratio):
            kept = layer.r * (layer.k + layer.n) / (layer.k * layer.n)
            assert layer.r % 8 == 0 and ratio - 8 * (layer.k + layer.n) / (layer.k * layer.n) < kept <= ratio
    assert {layer.r for layer in layers("llama-8b", rank=128)} == {128}
    assert layers("4096:14336:1024") == [Layer("4096:14336:1024", "", 4096, 14336, 1024)]
    assert [layer.r for layer in layers("bert-base")] == [192, 304, 304]


# ------------------------------------------------------------------------------------------------ a GPU's chain, without one
def chain_gates(planted, monkeypatch):
    """The gates that 32 such layers fail, called as a GPU's graph would call them."""
    monkeypatch.setattr(bench, "low_rank", planted)
    x = torch.randn(2, 96).bfloat16()
    pool = timing.Pool(torch.bfloat16, scale=(32 * (96 * 160) ** 0.5) ** -0.25, size_bytes=4 << 20)
    timed = timing.paired(bench.chain_candidates(x, 160, 32), pool, repeats=5)
    [*_, (weights, outputs)] = timed["low_rank"].results
    assert len(weights) == 64 and [tuple(y.shape) for y in outputs] == [(2, 160), (2, 96)] * 16
    assert 0.01 < outputs[-1].float().abs().median() < 100 or planted is not right  # neither grows nor shrinks
    return bench.judged_chain(x, timed["low_rank"].results)


def right(x, v, u):
    return bench.linear(bench.linear(x, v), u)


def test_a_chain_is_judged_layer_by_layer(monkeypatch):
    assert chain_gates(right, monkeypatch) == []


def test_one_wrong_layer_of_a_chain_is_caught(monkeypatch):
    """Kills a judge that looks at the first or the last layer only, or that bounds the whole chain."""
    count = iter(range(10**6))
    assert "G3" in chain_gates(lambda x, v, u: right(x, v, u) * (1.05 if next(count) % 32 == 17 else 1), monkeypatch)


def test_floor_of_a_gpu():
    """The figures of one layer at 4.3 TB/s and 790 TFLOP/s: 8.4 MB at m = 1, by arithmetic from m = 1024 on."""
    limits, layer = {"bytes_per_s": 4.3e12, "flops_per_s": 790e12}, Layer("", "", 4096, 4096, 512)
    assert floor(bench.work(layer, 1), 2, limits) == pytest.approx(1.95, abs=0.01)
    assert floor(bench.work(layer, 256), 2, limits) == pytest.approx(2.9, abs=0.05)
    assert floor(bench.work(layer, 1024), 2, limits) == pytest.approx(10.9, abs=0.05)


class FakeEvent:
    def __init__(self, enable_timing):
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class FakeGraph:
    """Calls again at each replay, and writes into the buffers of the first time, as a graph does."""
    last_replay = None  # the last one that does so

    def __init__(self, candidate, every):
        self.calls = [(operands, candidate.call(*operands)) for operands in every]
        self.candidate, self.replays = candidate, 0

    def replay(self):
        self.replays += 1
        if self.last_replay is not None and self.replays > self.last_replay:
            return
        for operands, y in self.calls:
            for buffer, value in zip(timing.outputs_of(y), timing.outputs_of(self.candidate.call(*operands)), strict=True):
                buffer.copy_(value)


@pytest.fixture
def made(monkeypatch):
    """Lets the GPU's harness run on the CPU; gives the graphs that it makes."""
    every = []

    def record(candidate, pool, calls, memory):
        every.append(FakeGraph(candidate, [candidate.operands(pool.next(candidate.count)) for _ in range(calls)]))
        return graphs.Recorded(every[-1], every[-1].calls)

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "l2_bytes", lambda device: 1 << 18)
    for name, stand_in in (("Event", FakeEvent), ("_sleep", lambda cycles: None), ("graph_pool_handle", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return every


def test_weights_go_around_past_the_cache(made):
    peers = bench.candidates(torch.randn(2, 64), 96, 16)
    timed = graphs.paired(peers, timing.Pool(torch.float32, 0.1, 4 << 20), repeats=9)
    ours = [graph for graph in made if graph.candidate is peers["low_rank"]]
    assert len(ours) == math.ceil(2 * 2**18 / (32 * 16 * (64 + 96) * 4)) == 2
    assert [graph.replays for graph in ours] == [6, 6]
    starts = [v.data_ptr() for graph in ours for (v, _), _ in graph.calls]
    assert len(set(starts)) == 64
    assert all(len(one.us) == 9 and len(one.results) == 4 for one in timed.values())


@pytest.mark.parametrize("is_dead", [False, True])
def test_a_graph_that_stops_writing_is_caught(is_dead, made, monkeypatch):
    """Kills outputs that are not poisoned before every replay: the buffers were right once."""
    x = torch.randn(2, 64)
    peers = bench.candidates(x, 96, 16)
    monkeypatch.setattr(FakeGraph, "last_replay", 3 if is_dead else None)
    timed = graphs.paired(peers, timing.Pool(torch.float32, 0.1, 4 << 20), repeats=9)
    assert ("G3" in bench.judged(x, timed["low_rank"].results)) == is_dead


def test_a_chain_on_a_gpus_harness(made):
    pool, layer = timing.Pool(torch.bfloat16, 0.1, 8 << 20), Layer("", "", 96, 160, 32)
    row = bench.measure_chain(pool, layer, 2, {"bytes_per_s": 4.3e12, "flops_per_s": 790e12})
    assert row["failed_gates"] == [] and row["layers"] == 32 and 0 < row["of_floor"] < 1


def test_a_row_and_its_table_on_a_gpus_harness(made, capsys):
    limits, pool = {"bytes_per_s": 4.3e12, "flops_per_s": 790e12}, timing.Pool(torch.bfloat16, 0.1, 8 << 20)
    layer = Layer("tiny", "", 96, 160, 32)
    rows, chains = [measure(bench, pool, layer, 2, 0, limits=limits)], [bench.measure_chain(pool, layer, 2, limits)]
    assert rows[0]["failed_gates"] == [] and rows[0]["repeats"] == 101
    assert rows[0]["floor_us"] == pytest.approx(2 * (32 + 2) * (96 + 160) / 4.3e6)
    about = {"op": "low_rank", **header(1), "gpu": "a GPU"}
    show_bench({"header": about, "ceilings": limits, "rows": rows, "chains": chains})
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("a GPU", "4.30 TB/s", "chain of 32", "96 -> 160, 32")), shown


# ------------------------------------------------------------------------------------------------ GPU
@pytest.mark.gpu
@pytest.mark.parametrize("does_nothing", [False, True])
def test_a_kernel_that_does_nothing_is_caught_in_a_graph(does_nothing, monkeypatch):
    if does_nothing:
        monkeypatch.setattr(bench, "low_rank", lambda x, v, u: torch.empty(len(x), len(u), dtype=x.dtype, device=x.device))
    x = torch.randn(4, 256, device="cuda").bfloat16()
    pool = graphs.pool_for(torch.bfloat16, 0.05, x.device, 1 << 20)
    timed = graphs.paired(bench.candidates(x, 192, 32), pool, repeats=5)
    assert all(len(one.us) == 5 and len(one.results) == 4 for one in timed.values())
    assert ("G3" in bench.judged(x, timed["low_rank"].results)) == does_nothing
    assert not bench.judged(x, timed["pair"].results)


@pytest.mark.gpu
def test_a_race_of_2_of_4_on_a_gpu():
    found = race.race("sparse24", shapes="1024:1024:2", rows="1,128", device=torch.device("cuda"))
    assert not race.failures(found) and all(row["semi_structured_us"] > 0 for row in found["rows"])
    assert [row["ran"] for row in found["rows"]] == ["kernel (decode)", "kernel (prefill)"]


@pytest.mark.gpu
def test_a_race_on_a_gpu():
    found = race.race("low_rank", shapes="1024:1024:128", rows="1,64", device=torch.device("cuda"))
    assert not race.failures(found) and len(found["chains"]) == 2
    assert all(0 < row["of_floor"] < 1.05 for row in found["rows"]), found  # faster than the floor: not what was to be done
