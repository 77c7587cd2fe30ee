"""T-mutants of wavelet: its transforms, its op, and its structure. Run as mutants.py is."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mutants import load, run  # noqa: E402  (beside this file)
from sparse_mutants import combinations  # noqa: E402

DWT, OP, LAYER = "ops/dwt.py", "ops/wavelet.py", "structures/wavelet.py"

MUTANTS = [  # (file, text, its replacement)
    # transforms
    (DWT, "0.8365163037378079", "0.8365163037378078"[:12]),  # a filter of twelve digits
    (DWT, "0.6308807679298589", "0.6308807679304"),
    (DWT, "0.032223100604051466, -0.012603967262031304", "-0.012603967262031304, 0.032223100604051466"),
    (DWT, "(-1) ** t * tap", "(-1) ** (t + 1) * tap"),  # the other sign of every high half
    (DWT, "enumerate(reversed(h))", "enumerate(h)"),  # orthogonal to itself only for haar
    (DWT, "taps[first::2]) for first in (0, 1)], -1)", "taps[first::2]) for first in (0, 1)], 1)"),  # the wrong way round
    (DWT, "(half, taps[first::2]) for half, taps in halves], 1)", "(half, taps[first::2]) for half, taps in halves], -1)"),
    (DWT, "        x = pad(x, (0, x.shape[-1] % 2))\n", "        x = pad(x, (x.shape[-1] % 2, 0))\n"),  # a zero in front
    (DWT, "        x = low\n", "        x = high\n"),
    (DWT, "low if below is None else low + below", "low"),  # what comes from finer levels is lost
    (DWT, "[..., :sizes[level]]", ""),  # keeps the number that was not there
    (DWT, "*(high for _, high in reversed(bands))", "*(high for _, high in bands)"),
    (DWT, "    if not 1 <= levels <= most:\n", "    if not 1 <= levels:\n"),
    (DWT, "most = min(map(max_levels, sizes))", "most = max(map(max_levels, sizes))"),
    (DWT, "if filter not in list(FILTERS)", "if filter not in FILTERS"),  # unhashable
    # which factors are whose
    (OP, '"all": ("LL", "LH", "HL", "HH")', '"all": ("LL", "HL", "LH", "HH")'),
    (OP, '"diag": ("LL", "HH")', '"diag": ("LH", "HL")'),
    (OP, '"LL": ("LL",)', '"LL": ("HH",)'),
    (OP, "for level in reversed(range(levels)):\n        names", "for level in range(levels):\n        names"),  # fine first
    (OP, 'if name != "LL" or level == levels - 1', "if True"),  # low to low at every level
    (OP, 'if i == 0 or subbands != "shared+gain":', "if True:"),  # nothing shared
    (OP, "target, source = (", "source, target = ("),
    (OP, "factors, column, row = factors + 1,", "factors, column, row = factors,"),
    # the op
    (OP, "weighed = h if gain is None else h * gain[:, None]\n    u = ", "weighed = h\n    u = "),
    (OP, "return joined(made, x, n, filter, levels, scale), h", "return joined(made, x, n, filter, levels), h"),
    (OP, "return joined(made, x, n, filter, levels, scale), h", "return joined(made, x, n, filter, levels, scale), h * 0"),
    (OP, "wide = x.to(torch.promote_types(x.dtype, torch.float32))", "wide = x"),  # sums in bf16
    (OP, "[linear(b[pair.source[0]][pair.source[1]], ", "[linear(b[pair.source[0]][0], "),
    (OP, "dc = halves(dy.reshape(m, n), filter, levels, scale)", "dc = halves(dy.reshape(m, n), filter, levels)"),
    (OP, "dh = weighed if gain is None else weighed * gain[:, None]", "dh = weighed"),
    (OP, "dgain = (weighed.to(wide) * h.to(wide)).sum(1)", "dgain = (dh.to(wide) * h.to(wide)).sum(1)"),
    (OP, "        weighed = h if gain is None else h * gain[:, None]\n        du", "        weighed = h\n        du"),
    (OP, "    if needs & 0b1100 and h is None:", "    if needs & 0b1100:"),  # ignores the kept middle
    (OP, "if needs & 0b0100 and gain is not None", "if needs & 0b1000 and gain is not None"),
    (OP, "if needs & 0b0010:", "if needs & 0b0001:"),
    (OP, "lambda pair: pair.source).items()}\n        dx", "lambda pair: pair.target).items()}\n        dx"),
    (OP, "for source, members in gathered(pairs, lambda pair: pair.source)",
     "for source, members in gathered(pairs, lambda pair: pair.target)"),
    (OP, "read=4, constants=5", "read=3, constants=5"),
    (OP, "reference_backward, casts=False", "reference_backward"),
    (OP, "_recorded(*autocast(x, v, gain, u), *options)", "_recorded(x, v, gain, u, *options)"),
    (OP, "        if in_transform():\n            return reference(", "        if False:\n            return reference("),
    (OP, "torch._C._any_requires_grad(x, v, gain, u)", "torch._C._any_requires_grad(x, v, u)"),  # tiny would not learn
    (OP, "v.shape[1] != columns", "False"),
    (OP, "if u.shape != (rows, r)", "if u.shape[0] != rows"),
    (OP, 'if gain is None and subbands == "shared+gain"', "if False"),
    (OP, "gain.shape != (len(pairs), r)", "gain.shape[-1] != r"),
    (OP, "if t is not None and t.shape != shape", "if False"),
    (OP, "_check_options(levels, out_features, scale) or ", ""),
    # the structure
    (LAYER, "return self.alpha / self.rank", "return self.alpha"),
    (LAYER, "        self.u.zero_()\n", "        self.u.uniform_()\n"),
    (LAYER, "1 / sqrt(_width(pair.columns)))", "1 / sqrt(self.in_features))"),
    (LAYER, 'row.fill_(pair.name in ("LL", "HH"))', "row.fill_(1)"),
    (LAYER, "        base_layer.requires_grad_(False)  # not before what may fail\n", ""),
    (LAYER, "        if self.merged:\n            return y\n", ""),  # added twice
    (LAYER, "self.kept = weight.clone() if keep_base else None", "self.kept = weight if keep_base else None"),
    (LAYER, "rows.copy_(rows.double() + sign * self.scale * (some @ v))",
     "rows.add_((sign * self.scale * (some @ v)).to(rows.dtype))"),  # rounds twice
    (LAYER, "self._add_to(weight, -1)", "self._add_to(weight)"),
    (LAYER, "if self.kept is None:", "if True:"),
    (LAYER, "zip(weight.split(count), u.split(count))", "zip(weight.split(count), u.flip(0).split(count))"),
    (LAYER, "v, u = v.to(self.gain.dtype), u.to(self.gain.dtype)", "pass"),
    (LAYER, "self.merged, self.kept = False, None", "self.merged = False"),
    (LAYER, "(self.scale * u).to(dtype)", "u.to(dtype)"),
    (LAYER, "- self.rank * len(self._pairs())", "- self.rank"),
    (LAYER, "firsts = [row[:, None] * first for row, first in zip(gain.double(), firsts)]", "pass"),
    (LAYER, "        self.check_mergeable()\n", ""),
    (LAYER, "base.rank + more > most", "base.rank > most"),
    (LAYER, "    def _save_to_state_dict(self, destination, prefix, keep_vars):\n        self._refuse_merged(prefix)\n",
     "    def _save_to_state_dict(self, destination, prefix, keep_vars):\n"),
    (LAYER, "prefix, *args):\n        self._refuse_merged(prefix)\n", "prefix, *args):\n"),
    (LAYER, "block = subband(weight.double(), pair, self.filter)", 'block = subband(weight.double(), pair, "haar")'),
    (LAYER, "vt.to(self.v.dtype), u.to(self.u.dtype)", "vt.abs().to(self.v.dtype), u.to(self.u.dtype)"),
    (LAYER, "self.register_buffer(name, factor) if tiny else", "self.register_buffer(name, factor) if False else"),
    (LAYER, "most = min(ranks) if tiny else max(ranks)", "most = max(ranks)"),
    (LAYER, "    if rank > most:", "    if False:"),
    (LAYER, "if hasattr(tensor, \"full_tensor\")", "if False"),
    (LAYER, "if tensor.dtype not in DTYPES", "if False"),
]


def checks():
    """Name and call of the checks, those that catch most first. Imports the package: only in a child."""
    dwt, op, layer, inputs = load("ops/test_dwt.py"), load("ops/test_wavelet.py"), load("structures/test_wavelet.py"), load(
        "ops/inputs.py")
    import torch
    single, double = torch.float32, torch.float64
    for filter in dwt.VANISHING:
        yield f"filter {filter}", lambda filter=filter: dwt.test_filters_are_orthonormal_and_have_their_moments(filter)
        yield f"transform {filter}", lambda filter=filter: [
            dwt.test_the_transform_is_its_definition_and_orthonormal(filter, size, levels)
            for size, levels in ((8, 1), (8, 3), (7, 2), (1, 1))]
        yield f"odd {filter}", lambda filter=filter: dwt.test_an_odd_size_is_a_zero_behind_it(filter, 7)
    yield from (
        ("levels", lambda: dwt.test_levels_are_the_transform_of_the_low_half("db2")),
        ("transpose", dwt.test_the_transpose_takes_halves_of_any_level),
        ("layout", lambda: [op.test_layout_has_the_sizes_of_the_variants(3, subbands) for subbands in op.SUBBANDS]),
        ("definition", lambda: [op.test_is_its_definition(shape, "db2", subbands) for shape in op.SMALL
                                for subbands in op.SUBBANDS]),
        ("needs", lambda: [op.test_backward_gives_what_is_needed_and_nothing_else(subbands, keep, needs)
                           for subbands in op.SUBBANDS for keep in (False, True) for needs in (1, 2, 4, 8, 15)]),
        ("rounded once", lambda: op.test_halves_are_rounded_once_however_deep(torch.bfloat16)),
        ("given middle", op.test_backward_reads_the_middle_it_is_given),
        ("asked", op.test_gain_alone_is_trained),
        ("saved", lambda: op.test_asks_backward_only_for_what_is_wanted()),
        ("gates", lambda: [op.test_forward_within_the_gates(op.SHAPES["ragged"], "db4", subbands, dtype, "cpu")
                           for dtype in (single, torch.bfloat16) for subbands in ("diag", "shared+gain")]),
        ("layouts", op.test_leading_dimensions_and_layouts_give_the_same_bits),
        ("backward sizes", lambda: [op.test_backward_refuses_wrong_sizes(wrong) for wrong in (
            dict(dy=torch.ones(2, 5)), dict(h=torch.ones(1, 2, 3)))]),
        ("gradients", lambda: op.test_gradients_are_as_good_as_those_of_the_composition("deep", "shared+gain", double,
                                                                                        "cpu")),
    )
    for test in (op.test_wrong_arguments_are_named, dwt.test_what_there_is_not, layer.test_what_there_is_not):
        for given in combinations(test):
            yield f"{test.__module__}: {given.get('text')}", lambda test=test, given=given: test(**given)
    for name, test in list(vars(layer).items()):
        if name.startswith("test_") and "copies" not in name and test is not layer.test_what_there_is_not:  # copies compile
            yield f"layer: {name}", lambda test=test: [test(**given) for given in combinations(test)]
    for number in (14, 25, 26, 29):
        yield f"class {number}", lambda number=number: inputs.CASES[number](inputs.CALLERS["wavelet"])


if __name__ == "__main__":
    run(MUTANTS, checks)
