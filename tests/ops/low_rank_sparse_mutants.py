"""T-mutants of low_rank_sparse, its structure and what oats makes of it. Run as mutants.py is."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mutants import load, run  # noqa: E402  (beside this file)
from sparse_mutants import combinations  # noqa: E402

LIBRARY, OP = "ops/_library.py", "ops/low_rank_sparse.py"
LAYER, OATS = "structures/low_rank_sparse.py", "methods/oats.py"

MUTANTS = [  # (file, text, its replacement)
    (LIBRARY, "if reads_middle is None else reads_middle", ""),  # of values: u would find no middle, or keep one for nothing
    # the sparse matrix
    (OP, "torch.searchsorted(ends, ordinals, right=True)", "torch.searchsorted(ends, ordinals)"),  # the row before
    (OP, "ends = starts[1:]", "ends = starts[:-1]"),
    (OP, "torch.where(is_inside, rows * k + columns, 0), is_inside", "rows * k + columns, is_inside"),  # out of bounds
    (OP, "is_inside = (rows < n) & (columns >= 0) & (columns < k)", "is_inside = (columns >= 0) & (columns < k)"),
    (OP, "(rows < n) & (columns >= 0) & (columns < k)", "(rows < n) & (columns < k)"),
    (OP, "(rows < n) & (columns >= 0) & (columns < k)", "(rows < n) & (columns >= 0)"),
    (OP, "torch.where(is_inside, values, 0), accumulate=True", "values, accumulate=True"),
    (OP, "index_put((place,), torch.where", "index_put((n * k - 1 - place,), torch.where"),
    (OP, "    low_rank = (_wide(u) @ _wide(v)) * scale\n", "    low_rank = _wide(u) @ _wide(v)\n"),
    # products
    (OP, "linear(_wide(x), _wide(v)) * scale)", "linear(_wide(x), _wide(v)).to(x.dtype) * scale)"),  # rounded twice
    (OP, "(linear(_wide(x), _wide(v)) * scale)", "(linear(_wide(x), _wide(v)))"),
    (OP, "(low_rank + linear(_wide(x), _wide(s))).to(x.dtype)", "low_rank.to(x.dtype) + linear(x, s)"),
    (OP, "None if bias is None else _wide(bias))", "None)"),
    (OP, "return t.to(torch.promote_types(t.dtype, torch.float32)).contiguous()", "return t.contiguous()"),
    # gradients
    (OP, "dh = middle(dy, u.mT, scale)", "dh = middle(dy, u.mT, 1.0)"),
    (OP, "joined(dh, v.mT, dy, entries(values, starts, columns, n, k).mT, None)", "middle(dh, v.mT, 1.0)"),  # no S in dx
    (OP, "entries(values, starts, columns, n, k).mT, None)", "entries(values.abs(), starts, columns, n, k).mT, None)"),
    (OP, "dv = dh.mT @ rows", "dv = dh[:-1].mT @ rows[:-1]"),
    (OP, "(middle(rows, v, scale) if h is None else h)", "middle(rows, v, scale)"),
    (OP, "(middle(rows, v, scale) if h is None else h)", "(middle(rows, v, 1.0) if h is None else h)"),
    (OP, "dvalues = torch.where(is_inside, found, 0)", "dvalues = found"),
    (OP, ".flatten().index_select(0, place)", ".mT.flatten().index_select(0, place)"),
    (OP, "if needs & 0b0001000:", "if needs & 0b0010000:"),
    (OP, "if needs & 0b1000000:", "if needs & 0b0100000:"),
    (OP, "db = dy.sum(0)", "db = dy.mean(0)"),
    (OP, "reference_backward, casts=False", "reference_backward"),
    (OP, "indices=(4, 5), reads_middle=2", "indices=(), reads_middle=2"),
    (OP, "indices=(4, 5), reads_middle=2", "indices=(4, 5), reads_middle=1"),
    (OP, "_recorded(*autocast(x, v, u, values, starts, columns, bias), scale)",
     "_recorded(x, v, u, values, starts, columns, bias, scale)"),
    (OP, "        if in_transform():\n", "        if False:\n"),
    # checks
    (OP, "isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))", "False"),
    (OP, "values.dim() != 1 or columns.shape != values.shape", "values.dim() != 1"),
    (OP, "if values.shape[0] > most:", "if False:"),
    (OP, "if starts.shape != (n + 1,):", "if starts.dim() != 1:"),
    (OP, "if columns.dtype != index_dtype(k):", "if False:"),
    (OP, "k <= INT16_INPUTS", "k < INT16_INPUTS"),
    (OP, "if h is not None and list(h.shape) != h_shape:", "if False:"),
    (OP, "if starts[0] != 0:", "if starts[0] < 0:"),
    (OP, "(starts.diff() < 0)", "(starts.diff() < -100)"),
    (OP, "if starts[-1] != columns.shape[0]:", "if starts[-1] > columns.shape[0]:"),
    (OP, "bad = (columns < 0) | (columns >= k)", "bad = (columns >= k)"),
    (OP, "(columns < 0) | (columns >= k)", "(columns < 0) | (columns > k)"),
    (OP, "(~is_first & (columns <= before))", "(~is_first & (columns < before))"),  # twice
    (OP, "(~is_first & (columns <= before))", "(columns <= before)"),
    # the layer
    (LAYER, "        check_support(starts, columns, layer.in_features)\n", ""),
    (LAYER, "self.bias, scale=self.scale)", "self.bias)"),
    (LAYER, "nn.init.zeros_(self.u)", "nn.init.zeros_(self.v)"),
    (LAYER, "bound = 1 / sqrt(self.in_features)", "bound = 1 / sqrt(self.rank or 1)"),
    (LAYER, "        if self.seed is not None and not self.columns.is_meta:\n            self._place(self._drawn())\n",
     "        if self.seed is not None and not self.columns.is_meta:\n            self._place(self._drawn() * 0)\n"),
    (LAYER, "if self.seed is None or self.columns.is_meta:\n            return", "if True:\n            return"),
    (LAYER, "while len(outside := (found >= size).nonzero().flatten()):", "while len(outside := found[:0]):"),
    (LAYER, "left = left ^ table[right]", "left = left ^ table[0]"),  # a permutation still, that mixes less
    (LAYER, "low, high = bits // 2, bits - bits // 2", "low, high = bits - bits // 2, bits // 2"),  # another, as good
    (LAYER, "lowfat {seed} {i}", "lowfat {i}"),
    (LAYER, "found.sort().values", "found"),
    (LAYER, "density * (1 + 2**-50) * size", "density * size"),
    (LAYER, "torch.searchsorted(flat, ends)", "torch.searchsorted(flat, ends, right=True)"),
    (LAYER, "largest(rest.abs().flatten(), count)", "largest(rest.flatten(), count)"),
    (LAYER, "weight.double() - scale * (u.double() @ v.double())", "weight.double() - u.double() @ v.double()"),
    (LAYER, "root = (s / scale).sqrt()", "root = s.sqrt()"),
    (LAYER, "alpha is None or rank == 0 else alpha / rank", "alpha is None or rank == 0 else alpha"),
    (LAYER, "0 < alpha <= sys.float_info.max", "0 < alpha"),
    (LAYER, "not isinstance(alpha, bool)", "True"),
    (LAYER, "copy=True, ", ""),
    # oats
    (OATS, "return kept, k", "return kept, k // 2"),
    (OATS, "if density is not None and others:", "if False:"),
    (OATS, "if not 1 <= (kept := share_of(density, k)) < k:", "if not (kept := share_of(density, k)) < k:"),
    (OATS, "index_bytes = 4 * (n + 1) + parameters * index_dtype(k).itemsize", "index_bytes = 4 * n + parameters * 2"),
    (OATS, "LowRankSparse.of(v, u, sparse[keep], *stored_support(keep), bias)",
     "LowRankSparse.of(v, u, sparse[keep], *stored_support(keep))"),
]


def checks():
    """Name and call of the checks, those that catch most first. Imports the package: only in a child."""
    ops, layers, oats = (load(f"{path}.py") for path in (
        "ops/test_low_rank_sparse", "structures/test_low_rank_sparse", "methods/test_oats"))
    inputs = load("ops/inputs.py")
    import torch
    shapes, single = ops.SHAPES, torch.float32
    yield from (
        ("whole numbers", lambda: [ops.test_whole_numbers_are_exact(shapes[name], single, "cpu")
                                   for name in ("ragged", "sparse alone", "empty rows")]),
        ("backward", lambda: [ops.test_backward_gives_what_is_needed_and_nothing_else(keep, needs)
                              for keep in (False, True) for needs in range(128) if not needs & 48]),
        ("given middle", ops.test_backward_reads_the_middle_it_is_given),
        ("asks", ops.test_asks_backward_only_for_what_is_wanted),
        ("gates", lambda: [ops.test_forward_within_the_gates(shapes["ragged"], dtype, "cpu")
                           for dtype in (torch.bfloat16, single)]),
        ("rounded once", ops.test_the_references_round_once),
        ("plans", lambda: ops.test_both_plans_and_the_dense_product_agree(shapes["ragged"], torch.bfloat16)),
        ("gradients", lambda: ops.test_gradients_within_the_gates(shapes["ragged"], single, "cpu")),
        ("int16", ops.test_int16_reaches_32768_inputs),
        ("good supports", ops.test_good_supports_pass),
        ("layouts", ops.test_leading_dimensions_and_layouts_give_the_same_bits),
        ("autocast", ops.test_autocast_leaves_the_support_alone),
    )
    for name in ("test_bad_supports_are_found", "test_wrong_arguments_are_named", "test_backward_refuses_wrong_sizes",
                 "test_what_is_no_support_is_refused_by_name"):
        test = getattr(ops, name)
        yield name, lambda test=test: [test(**some) for some in combinations(test)]
    yield "guard pages", lambda: [ops.test_bad_supports_touch_nothing_else(*bad, 5, single) for bad in ops.BAD]
    slow = ("compiles", "training", "uniform", "model", "checkpoint")
    tests = [test for name, test in vars(layers).items() if name.startswith("test_") and not any(s in name for s in slow)]
    tests += [oats.test_a_planted_density_is_found_again, oats.test_all_counts_of_a_density_are_the_formulas,
              oats.test_wrong_calls_are_named, oats.test_the_layer_has_the_dtype_and_the_bias_and_the_same_bits_each_time]
    for test in tests:
        yield test.__name__, lambda test=test: [test(**some) for some in combinations(test)]
    for number in (2, 14, 15, 26, 29, 38, 39):
        for name in ("low_rank_sparse", "torch.ops.lowfat.low_rank_sparse"):
            yield f"class {number} of {name}", lambda n=number, name=name: inputs.CASES[n](inputs.CALLERS[name])
    yield "what torch asks", lambda: ops.test_what_torch_asks_of_an_op((5, 12, 20, 4, 0.2, 0.7))


if __name__ == "__main__":
    run(MUTANTS, checks)
