"""Bugs planted in what the gradients of a dictionary add to those of a sparse factor (sparse24_backward.py)."""
from .mutant import Mutant

KERNEL = "csrc/dictionary/bitmap.cu"
DENSE = "csrc/sparse24/dense.cu"
TEST = "dictionary_backward_test"
DENSE_TEST = "sparse24_dense_test"

MUTANTS = [
    Mutant("mark: looks behind the first position of a word", KERNEL, "device::load(positions + middle) < first",
           "device::load(positions + middle) <= first", TEST),
    Mutant("mark: the first row's positions for all", KERNEL, "p.positions + i / p.words * p.stored", "p.positions", TEST),
    Mutant("mark: bits of the next word", KERNEL, "bit >= device::kWordBits) break;", "bit > device::kWordBits) break;",
           TEST),
    Mutant("mark: the last position forgotten", KERNEL, "for (; at < p.stored; ++at)", "for (; at < p.stored - 1; ++at)",
           TEST),
    Mutant("mark: past a row's positions", KERNEL, "for (; at < p.stored; ++at)", "for (; at <= p.stored; ++at)", TEST),
    Mutant("mark: search past a row's positions", KERNEL, "for (int end = p.stored; at < end;)",
           "for (int end = p.stored + 1; at < end;)", TEST),
    Mutant("mark: dd without dh", "csrc/dictionary/backward.h", "(needs & (kNeedsDx | kNeedsDd) ?", "(needs & kNeedsDx ?",
           TEST),
    Mutant("dense: an entry counts itself", DENSE, "lower = (1u << lane) - 1", "lower = (2u << lane) - 1", DENSE_TEST),
    Mutant("dense: words in front forgotten", DENSE, "before += count;", "before = count;", DENSE_TEST),
    Mutant("dense: each word's place counted for itself", DENSE, "const int in_front = before + device::lanes_before",
           "const int in_front = before + 0 * device::lanes_before", DENSE_TEST),
    Mutant("dense: words past the row's last", DENSE, "bits = lane < here ?", "bits = true ?", DENSE_TEST),
    Mutant("dense: bits behind the last column", DENSE, "if (left < kWordBits && lane < here)", "if (false)", DENSE_TEST),
    Mutant("dense: values past a row's", DENSE, "(word >> lane & 1) && value < p.stored", "word >> lane & 1", DENSE_TEST),
    Mutant("dense: columns past the last", DENSE, "(column < p.columns ? column : kNone)", "column", DENSE_TEST),
    Mutant("dense: what is not kept is not zero", DENSE,
           "is_kept ? device::load(from + (Config::kExpands ? value : column)) : Element{0}",
           "device::load(from + (Config::kExpands ? value : column))", DENSE_TEST),
    Mutant("dense: values that no bit names are left as they are", DENSE, "i < p.stored; i += device::kWarpThreads",
           "false; i += device::kWarpThreads",
           DENSE_TEST),
    Mutant("dense: the first row's values for all", DENSE, "+ row * (Config::kExpands ? p.stored : p.columns)", "+ 0",
           DENSE_TEST),
]
