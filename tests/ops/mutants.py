"""T-mutants: bugs planted in the source of the op and its structure, each of which must turn a check red.

`python mutants.py` forks a child for each, which imports a copy of the package with one piece of text replaced, runs checks
until one fails, and prints what caught it. The first child has no bug: every check must pass there."""
import json
import os
import shutil
import sys
import tempfile
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "python" / "lowfat"
OP, LIBRARY, LAYER = "ops/low_rank.py", "ops/_library.py", "structures/low_rank.py"

MUTANTS = [  # (file, text, its replacement)
    (OP, "return linear(h, u.contiguous(), bias), h", "return linear(h, u.contiguous()), h"),  # missing bias
    (OP, "linear(x.contiguous(), v.contiguous())", "linear(x.contiguous()[..., :-1], v[:, :-1])"),  # dropped tail
    (OP, "linear(x.contiguous(), v.contiguous())", "linear(x.contiguous(), v.contiguous()).to(torch.bfloat16).to(x.dtype)"),
    (OP, "linear(h, u.contiguous(), bias), h", "linear(h, u.contiguous(), bias), h * 0"),  # stale h
    (OP, "linear(h, u.contiguous(), bias), h", "linear(h, u.contiguous(), bias), h.mT.contiguous().mT"),  # other strides
    (OP, "dh = dy @ u", "dh = dy @ u.mT.reshape(u.shape)"),  # wrong transpose, same shape
    (OP, "dv = dh.mT @ rows", "dv = dh[:-1].mT @ rows[:-1]"),  # dropped last row
    (OP, "du = dy.mT @", "du = dy.abs().mT @"),
    (OP, "linear(rows, v) if h is None else h.reshape(m, r)", "linear(rows, v)"),  # ignores the kept h
    (OP, "linear(rows, v) if h is None", "torch.zeros(m, r, dtype=x.dtype) if h is None"),
    (OP, "db = dy.sum(0)", "db = dy.mean(0)"),
    (OP, "(dh @ v).reshape(x.shape)", "(dh @ v)"),
    (OP, "if needs & 0b0100", "if needs & 0b0010"),  # ignored needs
    (OP, "x.new_empty(0) if gradient is None else gradient", "x.new_zeros(1) if gradient is None else gradient"),
    (OP, "x.shape[-1] != v.shape[1]", "False"),
    (OP, "u.shape[1] != v.shape[0]", "False"),
    (OP, "bias.shape != (n,)", "bias.dim() != 1"),  # [1] would broadcast
    (OP, "t.shape != (*x.shape[:-1], size)", "False"),
    (OP, "if t.dtype != x.dtype", "if False"),
    (OP, "if t.device != x.device", "if False"),
    (OP, "t.layout is not torch.strided", "False"),
    (OP, "torch.float16, torch.bfloat16)\n", "torch.float16, torch.bfloat16, torch.int64)\n"),
    (OP, "if not (torch.is_grad_enabled() and", "if True or (torch.is_grad_enabled() and"),  # no gradient at all
    (OP, "        x, v, u, bias = autocast(x, v, u, bias)\n", ""),
    (OP, "if in_transform():", "if False:"),
    (LIBRARY, "        check(*inputs)\n", ""),
    (OP, "reference_backward, casts=False)", "reference_backward)"),
    (LIBRARY, "if in_transform():", "if False:"),
    (LIBRARY, "ctx.mark_non_differentiable(h)", "pass"),
    (LIBRARY, "flag << i for", "1 << i for"),  # computes what nobody wants
    (LIBRARY, "sum(flag << i for i, flag in enumerate(needs))", "sum(flag << (i ^ 1) for i, flag in enumerate(needs))"),
    (LIBRARY, "keep = h if ctx.needs_input_grad[read - 1] else None", "keep = h"),
    (LIBRARY, "keep = h if ctx.needs_input_grad[read - 1] else None", "keep = torch.zeros_like(h)"),
    (LIBRARY, "t.dtype != torch.float64", "True"),  # fp64 must stay under autocast
    (LIBRARY, "torch.library.register_autograd(backward, _refuse_second, lib=_library)", "pass"),
    (LIBRARY, '"CompositeExplicitAutograd"', '"CPU"'),  # no meta, no fake tensors
    (LIBRARY, 'torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)', "False"),
    (LIBRARY, "device in _AUTOCAST and torch", "torch"),  # meta tensors have no autocast
    (LAYER, "low_rank(x, self.v, self.u, self.bias)", "low_rank(x, self.v, self.u)"),
    (LAYER, "return self.u @ self.v", "return (self.u @ self.v).abs()"),
    (LAYER, '"bias": self.bias is not None', '"bias": self.bias is None'),
    (LAYER, "self.rank * (self.in_features + self.out_features)", "self.in_features * self.out_features"),
    (LAYER, "/ sqrt(self.in_features), 1 /", "/ sqrt(self.rank), 1 /"),
    (LAYER, "vt).to(weight.dtype), (u * root)", "vt * root[:, None]).to(weight.dtype), (u)"),  # all of sigma on one side
    (LAYER, "truncated_svd(weight, rank)", "truncated_svd(weight.abs(), rank)"),
    (LAYER, "scale * u], dim=1)", "u], dim=1)"),  # missing scale
    (LAYER, "torch.cat([self.v, v])", "torch.cat([v, self.v])"),
    (LAYER, "dim=1), self.bias)", "dim=1))"),
    (LAYER, "1 <= rank <= min(in_features, out_features)", "0 <= rank <= min(in_features, out_features)"),
    (LAYER, "1 <= rank <= min(in_features, out_features)", "1 <= rank <= max(in_features, out_features)"),
    (LAYER, " or isinstance(size, bool)", ""),
    (LAYER, "tensor.detach().clone(memory_format=torch.contiguous_format)", "tensor.detach()"),  # shares the caller's memory
    (LAYER, "self.v.split(self.ranks)", "self.v.split(self.ranks)[::-1]"),
    (LAYER, "self.ranks), u, bias))", "self.ranks), u))"),
    (LAYER, "layer.in_features != layers[0].in_features", "False"),
    (LAYER, "if tensor.dtype != other.dtype", "if False"),
]


def load(path: str):
    spec = spec_from_file_location(path.replace("/", "_"), TESTS / path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def checks():
    """Name and call of the checks, those that catch most first. Imports the package: only in a child."""
    inputs, ops, layers = load("ops/inputs.py"), load("ops/test_low_rank.py"), load("structures/test_low_rank.py")
    import torch
    single, double = torch.float32, torch.float64
    yield from (
        ("forward", lambda: [ops.test_forward_within_the_gates("normal", t, "cpu") for t in (single, torch.bfloat16)]),
        ("kept middle", lambda: ops.test_the_kept_middle_is_that_of_the_forward("normal", single)),
        ("gradients", lambda: ops.test_gradients_within_the_gates("normal", single, "cpu", ops.low_rank)),
        ("needs", lambda: [ops.test_backward_gives_what_is_needed_and_nothing_else(i // 2, i % 2) for i in range(32)]),
        ("given middle", ops.test_backward_reads_the_middle_it_is_given),
        ("backward sizes", lambda: ops.test_backward_refuses_wrong_sizes(dict(dy=torch.ones(6, 7)), "dy")),
        ("fake tensors", ops.test_fake_tensors_have_the_true_strides),
        ("saved middle", ops.test_saves_no_middle_when_the_last_factor_is_frozen),
        ("asked", ops.test_asks_backward_only_for_what_is_wanted),
        ("middle's gradient", ops.test_the_kept_middle_carries_no_gradient),
        ("layer", lambda: layers.test_forward_is_x_times_dense(7, 5, 3, True, single)),
        ("shape", lambda: layers.test_shape_is_json_and_rebuilds_the_layer(True)),
        ("start", layers.test_starts_like_two_linear_layers_in_a_row),
        ("from_dense", lambda: layers.test_from_dense_is_the_closest_matrix_of_its_rank(48, 33, 16, double)),
        ("copies", layers.test_from_dense_does_not_touch_or_share_the_weight),
        ("merged", lambda: layers.test_merged_is_the_concatenation_and_the_sum(0.5, single)),
        ("merged refuses", layers.test_merged_refuses_by_name),
        ("group", lambda: layers.test_group_gives_the_bits_of_its_layers(single, 4)),
        ("group back", layers.test_group_gives_its_layers_back_bit_for_bit),
    )
    for parameters in _parameters(layers.test_wrong_sizes_are_refused_by_name):
        yield f"sizes {parameters[0]}", lambda p=parameters: layers.test_wrong_sizes_are_refused_by_name(*p)
    for parameters in _parameters(layers.test_group_refuses_by_name):
        yield f"group refuses: {parameters[2]}", lambda p=parameters: layers.test_group_refuses_by_name(*p)
    for number, case in inputs.CASES.items():
        for name, op in list(inputs.CALLERS.items())[:2]:
            if number not in (5, 21):  # the slow ones catch nothing here that the gates above do not
                yield f"class {number} of {name}", lambda case=case, op=op: case(op)


def _parameters(test):
    return test.pytestmark[0].args[1]


def plant(folder: Path, mutant) -> None:
    """A copy of what the checks import, with the bug in it."""
    for name in ("bench", "ops", "structures"):
        shutil.copytree(PACKAGE / name, folder / "lowfat" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("errors.py", "linalg.py"):
        shutil.copy(PACKAGE / name, folder / "lowfat")
    (folder / "lowfat" / "__init__.py").touch()
    if mutant is not None:
        name, text, replacement = mutant
        source = (PACKAGE / name).read_text()
        assert source.count(text) >= 1, f"{name} has no {text!r}"
        (folder / "lowfat" / name).write_text(source.replace(text, replacement))


def judge(mutant) -> str | None:
    """The name of the first check that fails; None where all pass."""
    with tempfile.TemporaryDirectory() as folder:
        plant(Path(folder), mutant)
        sys.path[:0] = [folder, str(TESTS)]
        sys.meta_path.insert(0, PathFinder)  # before the finder of an editable install, which would find the right source
        sys.dont_write_bytecode = True
        import lowfat
        import torch
        assert lowfat.__file__.startswith(folder), lowfat.__file__
        found = "import"
        try:
            for found, check in checks():
                torch.manual_seed(0)
                check()
        except BaseException as error:  # pytest's own failures are no Exceptions
            if mutant is None:
                raise
            return f"{found}: {type(error).__name__}"
    return None


def run() -> None:
    import pytest  # noqa: F401  (what every child imports is imported once, before the forks)
    import torch._dynamo.testing
    import torch._subclasses  # noqa: F401
    import torch.utils.checkpoint
    torch.set_num_threads(1)
    for i, mutant in enumerate([None, *MUTANTS]):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.write(write, json.dumps(judge(mutant)).encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        sys.stdout.write(json.dumps([i - 1, json.loads(said) if said else "died"]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    run()
