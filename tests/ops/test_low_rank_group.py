"""low_rank_group: every member against fp64 by the gates, and through everything torch does with an op."""
import pytest
import torch
import torch._dynamo.testing
from torch.nn.functional import linear

import gates
from lowfat import _native
from lowfat.errors import DeviceError, DtypeError, ShapeError
from lowfat.ops import low_rank, low_rank_group
from lowfat.ops.low_rank_group import reference

OPS = torch.ops.lowfat
PATHS = {"cpu": ("members",), "cuda": ("decode", "members")}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
SIZES = {"one": [(9, 33)], "gate and up": [(9, 33), (16, 33)], "q, k, v": [(16, 64), (5, 8), (3, 17)],
         "five": [(4, 5), (1, 1), (3, 17), (2, 9), (7, 8)]}  # (r, n) of each member: more than a kernel takes, the last


def members(sizes, k, make=torch.randn, dtype=torch.float32, device="cpu"):
    """v, u, bias of each member; every second one has no bias."""
    v, u = [make(r, k) / k**0.5 for r, _ in sizes], [make(n, r) / r**0.5 for r, n in sizes]
    bias = [make(n) if i % 2 else None for i, (_, n) in enumerate(sizes)]
    return tuple([None if t is None else t.to(device, dtype) for t in one] for one in (v, u, bias))


def flat(op):
    """The op with its lists taken apart: (x, v..., u..., bias...), as check_call and gradcheck want them."""
    def call(x, *rest):
        third = len(rest) // 3
        return tuple(op(x, list(rest[:third]), list(rest[third:2 * third]), list(rest[2 * third:])))
    return call


def framework(x, v, u, bias):
    return [linear(linear(x, a), b, c) for a, b, c in zip(v, u, bias)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 65])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_member_within_the_gates(sizes, rows, dtype, device):
    x, lists = torch.randn(rows, 257).to(device, dtype), members(sizes, 257, dtype=dtype, device=device)
    for call in (low_rank_group, OPS.low_rank_group):
        found = gates.check_call(flat(call), (x, *(t for one in lists for t in one)))
        assert len(found) == len(sizes)
        for y, expected, v, u, bias in zip(found, framework(x, *lists), *lists):
            assert gates.failed_gates(y, expected, gates.chain(x, v.T, u.T, bias=bias)) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7, 40])
def test_whole_numbers_are_exact(rows, dtype, device):
    """G4 of each member: kills a member that reads another's factor, rank or bias."""
    given = [gates.whole_inputs(rows, 72, r, n, dtype, seed=i) for i, (r, n) in enumerate(SIZES["q, k, v"])]
    x = given[0][0].reshape(-1, 1, 72)
    v, u, bias = ([member[i].to(device) for member in given] for i in (1, 2, 3))
    for y, *known in zip(low_rank_group(x.to(device), v, u, bias), v, u, bias, strict=True):
        exact = gates.chain(x[:, 0], known[0].cpu().T, known[1].cpu().T, bias=known[2].cpu()).y64
        if exact.numel() and exact.abs().max() > 1 / gates.ROUNDOFF[dtype]:
            continue  # x was made for the first member
        assert y.shape == (rows, 1, exact.shape[1]) and gates.exact_gate(y[:, 0].cpu(), exact)


@pytest.mark.parametrize("call", [low_rank_group, OPS.low_rank_group, reference], ids=["function", "op", "reference"])
def test_gradcheck(call):
    x, lists = torch.randn(2, 3, 5, dtype=torch.float64), members(SIZES["q, k, v"][1:], 5, dtype=torch.float64)
    args = [gates.laid_out(x, "strided"), *(t for one in lists for t in one)]
    args = tuple(t if t is None else gates.laid_out(t, "transposed").requires_grad_() for t in args)
    assert torch.autograd.gradcheck(flat(call), args, nondet_tol=0, check_undefined_grad=True)


@pytest.mark.parametrize("frozen", range(3))
def test_gradients_are_those_of_the_members(frozen):
    x, lists = torch.randn(6, 9), members(SIZES["q, k, v"], 9)
    def copies():
        yield x.clone().requires_grad_()
        for i, one in enumerate(lists):
            yield [None if t is None else t.clone().requires_grad_(i != frozen) for t in one]

    mine, theirs = list(copies()), list(copies())
    sum(y.sin().sum() for y in low_rank_group(*mine)).backward()
    sum(low_rank(theirs[0], *member).sin().sum() for member in zip(*theirs[1:])).backward()
    for ours, other in zip(mine[1:], theirs[1:]):
        for a, b in zip(ours, other):
            assert a is None or (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
    assert torch.equal(mine[0].grad, theirs[0].grad)


def test_only_a_bias_is_trained():
    """Kills a look at gradients that stops at a member without a bias."""
    x, (v, u, bias) = torch.randn(6, 9), members(SIZES["q, k, v"], 9)
    for call in (low_rank_group, OPS.low_rank_group):
        trained = bias[1].clone().requires_grad_()
        call(x, v, u, [None, trained, None])[1].sum().backward()
        assert torch.equal(trained.grad, torch.full_like(trained, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes,rows", [(SIZES["q, k, v"], 0), (SIZES["q, k, v"], 6), (SIZES["five"], 1)])
def test_opcheck(sizes, rows, dtype):
    x, lists = torch.randn(rows, 7).to(dtype), members(sizes, 7, dtype=dtype)
    torch.library.opcheck(OPS.low_rank_group.default, (x, *lists))
    if dtype == torch.float32:
        some = [[t if t is None else t.requires_grad_() for t in one] for one in lists]
        torch.library.opcheck(OPS.low_rank_group.default, (gates.laid_out(x, "transposed"), *some))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_to_one_graph(dynamic):
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(low_rank_group, fullgraph=True, dynamic=dynamic, backend=counted)
    lists = members(SIZES["q, k, v"], 9, dtype=torch.float64)
    lists = [[t if t is None else t.requires_grad_() for t in one] for one in lists]
    for m in (6, 9, 11):
        x = torch.randn(m, 9, dtype=torch.float64)
        found, expected = compiled(x, *lists), low_rank_group(x, *lists)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        leaves = [t for one in lists for t in one if t is not None]
        gradients = (torch.autograd.grad(sum(y.sum() for y in ys), leaves) for ys in (found, expected))
        assert all(torch.equal(a, b) for a, b in zip(*gradients))
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(compiled(x, *lists), low_rank_group(x, *lists), strict=True))
    assert counted.frame_count == (2 if dynamic else 4)  # with gradients and without


def test_no_bias_at_all():
    x, (v, u, _) = torch.randn(3, 9), members(SIZES["q, k, v"], 9)
    pairs = zip(low_rank_group(x, v, u), low_rank_group(x, tuple(v), tuple(u), (None,) * 3), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_factor_may_be_shared():
    """A shared basis: one v, several u."""
    x, v, first, _ = gates.whole_inputs(3, 9, 4, 5, torch.float32)
    u = [first, first.repeat(2, 1)]
    assert all(torch.equal(y, low_rank(x, v, each)) for y, each in zip(low_rank_group(x, [v, v], u), u, strict=True))


ONE = torch.ones(3, 7), [torch.ones(2, 7), torch.ones(4, 7)], [torch.ones(5, 2), torch.ones(6, 4)], [None, torch.ones(6)]


@pytest.mark.parametrize("place,wrong,error,text", [
    (1, [], ShapeError, "v has 0 members, u 2 and bias 2; must be one number for all"),
    (2, ONE[2][:1], ShapeError, "v has 2 members, u 1 and bias 2"),
    (3, [None], ShapeError, "v has 2 members, u 2 and bias 1"),
    (1, ONE[1][0], DtypeError, "v must be a list of tensors, one per member, found Tensor"),
    (2, None, DtypeError, "u must be a list of tensors, one per member, found NoneType"),
    (3, 3, DtypeError, "bias must be a list of tensors, one per member, found int"),
    (1, [ONE[1][0], 3], DtypeError, r"v\[1\] must be a tensor, found int"),
    (2, [None, ONE[2][1]], DtypeError, r"u\[0\] must be a tensor, found NoneType"),
    (0, torch.ones(3, 6), ShapeError, r"x has 6 features, v\[0\] has 7"),
    (1, [ONE[1][0], torch.ones(4, 8)], ShapeError, r"x has 7 features, v\[1\] has 8"),
    (2, [ONE[2][0], torch.ones(6, 3)], ShapeError, r"u\[1\] has rank 3, v\[1\] has rank 4"),
    (3, [None, torch.ones(5)], ShapeError, r"bias\[1\] \[5\] must be \[6\], the rows of u\[1\]"),
    (1, [ONE[1][0], torch.ones(4, 7).double()], DtypeError, r"v\[1\] has torch.float64, x has torch.float32"),
    (2, [ONE[2][0], torch.ones(6, 4, device="meta")], DeviceError, r"u\[1\] is on meta, x is on cpu")])
def test_mistakes_name_their_member(place, wrong, error, text):
    args = [wrong if i == place else one for i, one in enumerate(ONE)]
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode, pytest.raises(error, match=f"low_rank_group: {text}"):
            low_rank_group(*args)
    with pytest.raises((error, RuntimeError)):
        OPS.low_rank_group(*args)


@pytest.mark.parametrize("place", [1, 2, 3])
def test_one_tensor_is_no_list_of_members(place):
    """With gradients or without: torch would take its rows for the members."""
    args = [torch.ones(3, 7), torch.ones(2, 4, 7), torch.ones(2, 5, 4), torch.ones(2, 5)]
    args = [one if i in (0, place) else list(one) for i, one in enumerate(args)]
    for mode in (torch.no_grad(), torch.enable_grad()):
        for recorded in (False, True):
            args[0].requires_grad_(recorded)
            with mode, pytest.raises(DtypeError, match="low_rank_group: .* must be a list of tensors, .* found Tensor"):
                low_rank_group(*args)


def test_an_empty_group_is_refused():
    for call in (low_rank_group, OPS.low_rank_group):
        with pytest.raises((ShapeError, RuntimeError), match="low_rank_group: v has no members, must have at least one"):
            call(torch.ones(3, 7), [], [], [])


def paths(device):
    mine = {path: _native.calls("low_rank_group", device, path) for path in PATHS[device]}
    return mine | {f"member {path}": _native.calls("low_rank", device, path) for path in ("decode", "library")}


@pytest.mark.skipif(_native.library_path is None, reason="no compiled library")
@pytest.mark.parametrize("rows,path", [(1, "decode"), (16, "decode"), (129, "library")])
def test_the_path_on_a_cpu_is_recorded(rows, path):
    """T-dispatch-record, with the bits of each member alone."""
    x, lists = torch.randn(rows, 72).bfloat16(), members(SIZES["q, k, v"], 72, dtype=torch.bfloat16)
    before = paths("cpu")
    for call in (low_rank_group, OPS.low_rank_group):
        found = call(x, *lists)
        assert all(torch.equal(y, low_rank(x, *member)) for y, *member in zip(found, *lists, strict=True))
    assert paths("cpu") == before | {"members": before["members"] + 2, f"member {path}": before[f"member {path}"] + 12}


@pytest.mark.gpu
@pytest.mark.parametrize("sizes,rows,path", [
    ([(64, 136), (16, 64), (16, 64)], 1, "decode"), ([(64, 136), (16, 64), (16, 64)], 16, "decode"),
    ([(64, 136)] * 4, 7, "decode"), ([(64, 136)] * 5, 1, "members"), ([(64, 136)] * 2, 17, "members"),
    ([(64, 136), (12, 64)], 1, "members"), ([(64, 136)], 0, "members")])
def test_the_path_on_a_gpu_is_recorded(sizes, rows, path):
    """T-dispatch-record, within the gates of each member."""
    x = torch.randn(rows, 264).to("cuda", torch.bfloat16)
    lists, before = members(sizes, 264, dtype=torch.bfloat16, device="cuda"), paths("cuda")
    found = gates.check_call(flat(OPS.low_rank_group), (x, *(t for one in lists for t in one)))
    assert paths("cuda")[path] == before[path] + 2  # check_call calls twice
    for y, expected, v, u, bias in zip(found, framework(x, *lists), *lists):
        assert gates.failed_gates(y, expected, gates.chain(x, v.T, u.T, bias=bias)) == []


@pytest.mark.gpu
def test_operands_off_their_alignment_go_member_by_member():
    x = torch.randn(1, 264).to("cuda", torch.bfloat16)
    v, u, bias = members([(64, 136)] * 2, 264, dtype=torch.bfloat16, device="cuda")
    v[1] = torch.cat([v[1].new_zeros(1), v[1].flatten()])[1:].view(64, 264)
    before = paths("cuda")
    found, expected = low_rank_group(x, v, u, bias), [low_rank(x, *member) for member in zip(v, u, bias)]
    assert paths("cuda")["members"] == before["members"] + 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
