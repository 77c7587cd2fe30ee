"""T-mutants of what is stored as values and a bitmap: sparse24, dictionary, and their structures. Run as mutants.py is."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mutants import load, run  # noqa: E402  (beside this file)

BITMAP, KINDS, LIBRARY = "ops/bitmap.py", "ops/_kinds.py", "ops/_library.py"
SPARSE, DICTIONARY = "ops/sparse24.py", "ops/dictionary.py"
SPARSE_LAYER, DICTIONARY_LAYER = "structures/sparse24.py", "structures/dictionary.py"

MUTANTS = [  # (file, text, its replacement)
    # bitmaps
    (BITMAP, "bits << torch.arange(WORD", "bits << torch.arange(WORD - 1, -1, -1"),  # the other bit order
    (BITMAP, ".sum(-1, dtype=torch.int32)", ".sum(-1, dtype=torch.int32).abs()"),  # the highest bit
    (BITMAP, "return -(-entries // WORD)", "return entries // WORD + 1"),
    (BITMAP, "[..., :entries].bool()", ".bool()[..., -entries:]"),
    (BITMAP, "(kept.cumsum(-1) - 1).clamp(0, values.shape[-1] - 1)", "kept.cumsum(-1) - 1"),  # out of bounds
    (BITMAP, "(kept.cumsum(-1) - 1)", "(kept.cumsum(-1))"),
    (BITMAP, "torch.where(kept, values.gather(-1, order), 0)", "values.gather(-1, order) * kept"),  # 0 * NaN
    (BITMAP, ".clamp(max=max(kept.shape[-1] - 1, 0))", ""),  # out of bounds
    (BITMAP, "torch.arange(1, stored + 1", "torch.arange(0, stored"),
    (BITMAP, "    if values.shape[-1] == 0:\n        return values.new_zeros(kept.shape)\n", ""),
    # sparse24
    (SPARSE, "linear(x.contiguous(), weight, bias)", "linear(x.contiguous(), weight)"),
    (SPARSE, "dy @ expand(values, bits)", "dy @ expand(values.abs(), bits)"),
    (SPARSE, "(dy.mT @ rows).gather(1, places(bits, stored))", "(dy.mT @ rows)[:, :stored].contiguous()"),
    (SPARSE, "(dy.mT @ rows)", "(dy.abs().mT @ rows)"),
    (SPARSE, "db = dy.sum(0)", "db = dy.mean(0)"),
    (SPARSE, "if needs & 0b1000", "if needs & 0b0100"),
    (SPARSE, "reference_backward, casts=False", "reference_backward"),
    (SPARSE, "constants=2, indices=(2,)", "constants=2"),  # the bias would get no gradient
    (SPARSE, "if k % group:", "if False:"),
    (SPARSE, "values.shape[1] != k // group * kept", "False"),
    (SPARSE, "if mask.shape != (n, words(k)):", "if mask.dim() != 2:"),
    (SPARSE, "not 1 <= kept <= group", "kept > group"),
    (SPARSE, "(counts != kept)", "(counts > kept)"),
    (SPARSE, "(counts != kept)", "(counts < kept)"),
    (SPARSE, "bits[:, k:].any(1)", "bits[:, k + 1:].any(1)"),
    (SPARSE, "        if in_transform():\n            return reference(", "        if False:\n            return reference("),
    (SPARSE, "_recorded(*autocast(x, values, mask, bias), kept, group)", "_recorded(x, values, mask, bias, kept, group)"),
    # kinds of tensor
    (KINDS, "if t.device != x.device", "if False"),
    (KINDS, "if name in floating and t.dtype != x.dtype", "if False"),
    (KINDS, "if name in indices and t.dtype not in index_dtypes", "if False"),
    (KINDS, "if t.layout is not torch.strided", "if False"),
    (KINDS, "if not isinstance(t, Tensor)", "if False"),
    (KINDS, "if x.dtype not in DTYPES", "if False"),
    # gradients past index tensors
    (LIBRARY, "max(set(range(read)) - set(indices)) if", "read - 1 if"),  # of the mask, which has no gradient: keeps no middle
    (LIBRARY, "None if i in indices else next(found, None)", "next(found, None)"),
    (LIBRARY, "gradient_of(forward, lambda y: y)", "gradient_of(forward, lambda y: y[0])"),
    # dictionary
    (DICTIONARY, "return torch.matmul(x, d.mT).transpose(1, 2)", "return torch.matmul(x, d.mT)"),  # atoms before rows
    (DICTIONARY, "y = torch.baddbmm(split_outputs(bias[None], p_out, size, False), h, s.mT)", "y = torch.bmm(h, s.mT)"),
    (DICTIONARY, "return split_outputs(s.mT, blocks, ceil(len(s) / blocks), False).mT",
     "return split_outputs(s.mT, blocks, ceil(len(s) / blocks), True).mT"),  # rows interleaved
    (DICTIONARY, "found.gather(-1, nearest) == columns", "found.gather(-1, nearest) >= columns"),
    (DICTIONARY, ".clamp(max=found.shape[-1] - 1)", ""),  # out of bounds
    (DICTIONARY, "dz = dh.permute(2, 1, 0, 3)", "dz = dh.abs().permute(2, 1, 0, 3)"),
    (DICTIONARY, "d.transpose(0, 1).reshape(q, p_out * a, p)", "d.reshape(q, p_out * a, p)"),
    (DICTIONARY, "torch.matmul(dh.permute(0, 2, 3, 1), blocks_x).contiguous()",
     "torch.matmul(dh.permute(0, 2, 3, 1), blocks_x.abs()).contiguous()"),
    (DICTIONARY, "h = middle(blocks_x, d) if h is None else h", "h = middle(blocks_x, d)"),
    (DICTIONARY, ".reshape(-1, q, a)[:n]", ".reshape(-1, q, a)[-n:]"),
    (DICTIONARY, "if needs & 0b10000", "if needs & 0b01000"),
    (DICTIONARY, "read=4, indices=(3,)", "read=4, indices=()"),
    (DICTIONARY, "ceil(x.shape[-1] / q) != p", "False"),
    (DICTIONARY, "values.shape[1] % q or ", ""),
    (DICTIONARY, " or values.shape[1] > q * a", ""),
    (DICTIONARY, "    if support.shape != due:", "    if False:"),
    (DICTIONARY, "support.dtype == torch.int16 and a > MAX_POSITIONS", "False"),
    (DICTIONARY, "(counts != nonzeros)", "(counts > nonzeros)"),
    (DICTIONARY, "bits[..., atoms:].any(-1)", "bits[..., :0].any(-1)"),
    (DICTIONARY, "(found <= before)", "(found < before)"),  # twice
    (DICTIONARY, "(found >= atoms)", "(found > atoms)"),
    (DICTIONARY, "if t is not None and t.shape != shape", "if False"),
    # structures
    (SPARSE_LAYER, "kept=self.n, group=self.m", "kept=self.m - self.n, group=self.m"),
    (SPARSE_LAYER, "largest_of_groups(weight.abs(), n, m)", "largest_of_groups(weight, n, m)"),
    (SPARSE_LAYER, "descending=True, stable=True", "descending=False, stable=True"),
    (SPARSE_LAYER, "pack(keep), bias, in_features", "pack(weight != 0), bias, in_features"),  # the mask from the values
    (SPARSE_LAYER, "        check_mask(mask, in_features, n, m)\n", ""),
    (SPARSE_LAYER, "    if in_features % m:", "    if False:"),
    (SPARSE_LAYER, "[:, None] * count", "[:, None] * 0"),  # inputs that a new layer never reads
    (SPARSE_LAYER, "sqrt(self.values.shape[1])", "sqrt(self.in_features)"),
    (SPARSE_LAYER, "copy=True, ", ""),
    (DICTIONARY_LAYER, "        layer.check_indices()\n", ""),
    (DICTIONARY_LAYER, "copy=True, ", ""),
    (DICTIONARY_LAYER, "choose(codes.abs(), ", "choose(codes, "),
    (DICTIONARY_LAYER, "codes = codes.transpose(1, 2).reshape", "codes = codes.reshape"),
    (DICTIONARY_LAYER, "largest(others, nonzeros - dense_atoms)", "largest(others, nonzeros)"),
    (DICTIONARY_LAYER, "(~kept[..., :self.dense_atoms])", "(~kept[..., :0])"),
    (DICTIONARY_LAYER, "            counts = kept[..., self.dense_atoms:]", "            counts = kept[..., :-self.dense_atoms]"),
    (DICTIONARY_LAYER, "4 * words(atoms) <= 2 * nonzeros", "words(atoms) <= 2 * nonzeros"),
    (DICTIONARY_LAYER, ".transpose(1, 2)  # [P, Q, rows, a]", ".transpose(1, 2).flip(1)  # [P, Q, rows, a]"),
    (DICTIONARY_LAYER, "atoms > most", "False"),
]


def checks():
    """Name and call of the checks, those that catch most first. Imports the package: only in a child."""
    bitmap, sparse, dictionary = (load(f"ops/test_{name}.py") for name in ("bitmap", "sparse24", "dictionary"))
    sparse_layer, dictionary_layer = (load(f"structures/test_{name}.py") for name in ("sparse24", "dictionary"))
    inputs = load("ops/inputs.py")
    import torch
    single = torch.float32
    ragged, blocks = (65, 300, 131, 2, 4), (65, 301, 130, 3, 4, 40, 7)
    yield from (
        ("bits", lambda: [bitmap.test_bit_j_is_in_word_j_over_32((3,), size) for size in bitmap.SIZES]),
        ("highest bit", bitmap.test_the_highest_bit_of_a_word),
        ("places", lambda: bitmap.test_values_go_to_their_places_and_come_back(33, 7)),
        ("none stored", lambda: bitmap.test_values_go_to_their_places_and_come_back(4, 0)),
        ("stored zeros", bitmap.test_stored_zeros_and_not_finite_values_stay),
        ("any bits", lambda: [bitmap.test_any_bits_stay_within_bounds(word, 70, 5) for word in (0, -1)]),
        ("sparse24", lambda: sparse.test_whole_numbers_are_exact(ragged, single, "cpu")),
        ("sparse24 backward", lambda: [sparse.test_backward_gives_what_is_needed_and_nothing_else((6, 12, 11, 2, 4), needs)
                                       for needs in range(16) if not needs & 4]),
        ("sparse24 asks", sparse.test_asks_backward_only_for_what_is_wanted),
        ("sparse24 gradients", lambda: sparse.test_gradients_within_the_gates(ragged, single, "cpu")),
        ("sparse24 layouts", sparse.test_leading_dimensions_and_layouts_give_the_same_bits),
        ("sparse24 autocast", sparse.test_autocast_leaves_the_mask_alone),
        ("sparse24 backward sizes", lambda: sparse.test_backward_refuses_wrong_sizes(torch.ones(2, 23), "dy")),
    )
    for form in dictionary.FORMS:
        yield f"dictionary {form}", lambda form=form: dictionary.test_whole_numbers_are_exact(blocks, form, single, "cpu")
    yield from (
        ("dictionary backward", lambda: [dictionary.test_backward_gives_what_is_needed_and_nothing_else(keep, needs)
                                         for keep in (False, True) for needs in range(32) if not needs & 8]),
        ("given middle", dictionary.test_backward_reads_the_middle_it_is_given),
        ("dictionary asks", dictionary.test_asks_backward_only_for_what_is_wanted),
        ("empty block", lambda: dictionary.test_gradients_within_the_gates(dictionary.SHAPES["empty block"], "positions",
                                                                           single, "cpu")),
        ("dictionary forms", lambda: dictionary.test_both_forms_give_the_same_bits(blocks, single)),
        ("far positions", dictionary.test_positions_reach_no_further_than_int16),
    )
    for test in (sparse.test_wrong_arguments_are_named, dictionary.test_wrong_arguments_are_named):
        for parameters in test.pytestmark[1].args[1]:
            yield f"{test.__module__}: {parameters[-1]}", lambda test=test, p=parameters: test(*p, False)
    for bad in sparse.BAD_BITS:
        yield f"mask: {bad}", lambda bad=bad: [sparse.test_bad_bits_are_found(bad),
                                               sparse.test_bad_bits_touch_nothing_else(bad, 5, single)]
    for form, bad in dictionary.BAD:
        yield f"{form}: {bad}", lambda form=form, bad=bad: [
            dictionary.test_bad_supports_are_found(form, bad),
            dictionary.test_bad_supports_touch_nothing_else(form, bad, 5, single)]
    for bad in sparse.BAD_KINDS:
        yield f"no mask: {bad}", lambda bad=bad: sparse.test_what_is_no_mask_is_refused_by_name(bad)
    for parameters in dictionary.test_what_is_no_support_is_refused_by_name.pytestmark[1].args[1]:
        yield f"no support: {parameters[-1]}", lambda p=parameters: [
            dictionary.test_what_is_no_support_is_refused_by_name(form, *p) for form in dictionary.FORMS]
    yield "wrong sizes of a gradient", lambda: [dictionary.test_backward_refuses_wrong_sizes(wrong, text) for wrong, text in
                                                dictionary.test_backward_refuses_wrong_sizes.pytestmark[0].args[1]]
    for layers in (sparse_layer, dictionary_layer):
        for name, test in list(vars(layers).items()):
            if name.startswith("test_") and "copies_and_casts" not in name:  # what compiles takes seconds
                yield f"{layers.__name__}: {name}", lambda test=test: [test(**given) for given in combinations(test)]
    for number in (2, 14, 15, 26, 29, 38, 39):
        for name in ("sparse24", "dictionary"):
            yield f"class {number} of {name}", lambda n=number, name=name: inputs.CASES[n](inputs.CALLERS[name])
    yield "what torch asks", lambda: sparse.test_what_torch_asks_of_an_op((5, 12, 20, 2, 4))


def combinations(test) -> list[dict]:
    """The arguments of every call that pytest would make."""
    found = [{}]
    for mark in getattr(test, "pytestmark", []):
        names = [name.strip() for name in mark.args[0].split(",")]
        rows = [row if len(names) > 1 else (row,) for row in mark.args[1]]
        found = [given | dict(zip(names, row)) for given in found for row in rows]
    return found


if __name__ == "__main__":
    run(MUTANTS, checks)
