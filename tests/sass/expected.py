"""What the machine code of each kernel must look like: one line for each kernel and what sets its instances apart."""
from __future__ import annotations

import re
from dataclasses import dataclass

from sass.machine_code import Kernel

BARRIER = r"BAR\.SYNC|BAR\.ARV|BAR\.RED|SYNCS|ACQBULK|UCGABAR|ERRBAR|MEMBAR"
FENCE = r"MEMBAR"
COPY_FENCE = r"FENCE\.VIEW\.ASYNC"
TENSOR_CORE = r"HMMA|HGMMA"
WEIGHT_LOAD = r"LDG\.E\.\S*128"


@dataclass(frozen=True)
class Expected:
    """Of one kernel; `instances` is searched for in its demangled name."""
    source: str  # under csrc/
    instances: str
    registers: int  # a thread may take
    archs: tuple[str, ...] = ("sm_80", "sm_90a")
    tensor_core: str | None = None  # opcode that does the products; then none is done by FFMA in a loop
    weight_loads: int = 0  # 128-bit global loads, at least
    before_barrier: int = 0  # of them in front of the first barrier: what must be in flight while blocks wait
    copies_before_barrier: int = 0  # cp.async in front of the first barrier, at least: the same, to shared memory
    tile_loads: int = 0  # copies of tiles (TMA) to shared memory, exactly
    early_tile_loads: int = 0  # of them on a way that does not wait for the kernel before, exactly
    fences: int = 0  # MEMBAR instructions, exactly
    activation_ffma: int = 0  # FFMA that activations take, or the entries of a sparse matrix, at most: not those products
    copy_fences: int = 0  # FENCE.VIEW.ASYNC instructions, exactly: between ordinary accesses and those of the copy engine
    narrow_loads: bool = False  # loads of single elements are allowed: of operands without alignment


# low_rank/decode*.cu, kernels made of the same steps. In front of the first barrier stand 16 loads of v (a batch and the one
# ahead) and one of x for each of their steps at least; then, before h is there, the copies of u: a loop unrolled to 8, and 2
# for its tail, with one more for pivots. decode_second loads nothing to registers before it waits (ptxas would put such
# loads behind ACQBULK). The one fence is the release of the grid's barrier. Narrow loads are of bias and residual, at any address.
DECODE = dict(tensor_core=r"HMMA\.16816\.F32", narrow_loads=True)
# low_rank/backward.cu. In front of the first barrier three stages are asked for, two pieces of each operand; two blocks of the
# large tile share a multiprocessor, three of the small one. Sums over splits have four loads on their way.
BACKWARD = dict(tensor_core=r"HMMA\.16816\.F32", copies_before_barrier=12)
# low_rank/small_batch.cu: code for an sm_90a alone. Each operand has its warp that loads it, and in the second kernel only
# one of the two waits for h, and loads the residual after it. Two blocks share a multiprocessor. Fences: those of the two
# barriers of a cluster (the block's and the GPU's), and the one before the result is sent off. The narrow load is the bias,
# at any address. Each of the activations is unrolled over a tile.
SMALL_BATCH = dict(archs=("sm_90a",), registers=168, tensor_core=r"HGMMA\.64x(32|64|128|256)x16\.F32")
# low_rank/chain.cu: code for an sm_90a alone, 168 registers before they are moved to the warpgroups that multiply. Products:
# 8 of a slab, in each of the two phases. Tiles: of weights asked for early and in turn, of tokens, and the residual's two.
# Fences: on the whole GPU before three releases (a tile of h, a split, the end of a block), and five of the block's. Those
# of the copy engine: barriers are there, a tile of h or y is written, h is in memory, h is there. The wide loads are those
# of the splits' sums; the narrow one is the bias, at any address.
CHAIN = dict(archs=("sm_90a",), registers=168, tensor_core=r"HGMMA\.64x128x16\.F32", weight_loads=32, tile_loads=5,
             early_tile_loads=5, fences=8, copy_fences=5, narrow_loads=True)
# low_rank/small_batch_sm80.cu. In front of the first barrier stands a loop over three slabs, of each two pieces of weights
# and two or four of tokens. Eight splits are on their way when they are added up. Fences: the releases of the two barriers of
# the grid. The narrow loads are the bias, at any address.
SMALL_BATCH_SM80 = dict(tensor_core=r"HMMA\.16816\.F32", weight_loads=8, fences=2, activation_ffma=900, narrow_loads=True)
# monarch/batched.cu. In front of the first barrier two slabs are asked for, of each a piece or more of tokens and of weights;
# two CTAs share a multiprocessor. The narrow loads are the bias, at any address.
MONARCH = dict(tensor_core=r"HMMA\.16816\.F32", narrow_loads=True)
# monarch/backward.cu. In front of the first barrier two stages are asked for: of a group of 1, 2, 4, 8 blocks five, three, four,
# six pieces. Two CTAs share a multiprocessor. Sums over splits have four loads on their way.
MONARCH_BACKWARD = dict(tensor_core=r"HMMA\.16816\.F32", registers=128)
# sparse24/backward.cu. In front of the first barrier the selecting product asks for three stages, two pieces of each operand;
# the expanding one for two of a and three of values. Loads to registers are of the mask and of where runs begin: words, one at a
# time. Two blocks of the large tile share a multiprocessor.
SPARSE_BACKWARD = dict(tensor_core=r"HMMA\.16816\.F32")
# monarch/stationary.cu: code for an sm_90a alone, 168 registers before they are moved to the warpgroup of the second product.
# Tiles: of v, of u, of x. Fences: those of the cluster's two barriers (the block's and the GPU's), and the one before the
# runs are sent off: no other, for it would wait for stores of y. Those of the copy engine: barriers are there, of each loop
# that makes them, and runs are written. The narrow load is the bias, at any address.
STATIONARY = dict(archs=("sm_90a",), registers=168, tile_loads=3, early_tile_loads=3, fences=5, copy_fences=8, narrow_loads=True)
# low_rank_sparse/materialize.cu, backward.cu. In front of the first barrier three stages are asked for, two pieces of each
# operand. Loads to registers are of starts, of columns, 2 bytes each or 4, which are looked for one by one, and of values.
# Two blocks of the large tile share a multiprocessor.
ENTRIES = dict(tensor_core=r"HMMA\.16816\.F32", copies_before_barrier=12, narrow_loads=True)
# sparse24/forward.cu. In front of the first barrier stand the loads of a batch of values, 8 for each tile of 16 rows of a
# warp, and of its mask, 2 of 8 bytes (which match the pattern by LTC128B, the lines they fetch), and 4 of x. The one fence is
# the release of the grid's barrier. The narrow loads are the bias, at any address.
SPARSE24 = dict(tensor_core=r"HMMA\.SP\.16832\.F32", fences=1, narrow_loads=True)
# sparse24/prefill.cu. In front of the first barrier three stages are asked for, of the middle tile two: of each, pieces of
# values and of tokens, and words of masks. Two blocks of the middle tile share a multiprocessor, four of the small one; the
# large one has one, and its sums 128 registers. Two products of each slab. The narrow loads are the bias, at any address.
PREFILL24 = dict(tensor_core=r"HMMA\.SP\.16832\.F32", narrow_loads=True)
# wavelet/*.cu. In front of the first barrier the middle asks for three stages of x, two pieces each, and for two of the
# factor, which lie in registers until they are written; sums over splits, in outputs, have four loads of each half of a
# piece on their way; weights ask for three stages of both operands. Two blocks share a multiprocessor.
WAVELET = dict(tensor_core=r"HMMA\.16816\.F32")
KERNELS = [
    Expected("low_rank/decode.cu", r"low_rank::decode<", registers=255, weight_loads=80, before_barrier=48,
             copies_before_barrier=10, fences=1, activation_ffma=36, **DECODE),
    Expected("low_rank/decode.cu", r"low_rank::decode_first<", registers=128, weight_loads=40, before_barrier=40, **DECODE),
    Expected("low_rank/decode.cu", r"low_rank::decode_second<", registers=128, weight_loads=32, copies_before_barrier=10,
             activation_ffma=36, **DECODE),
    Expected("low_rank/decode_group.cu", r"low_rank::decode_group<", registers=255, weight_loads=80, before_barrier=48,
             copies_before_barrier=10, fences=1, **DECODE),
    Expected("low_rank/decode_pivoted.cu", r"low_rank::decode_pivoted<", registers=255, weight_loads=80, before_barrier=48,
             copies_before_barrier=11, fences=1, **DECODE),
    Expected("low_rank/small_batch.cu", r"low_rank::small_batch_first<", tile_loads=2, early_tile_loads=2, fences=4, copy_fences=3,
             **SMALL_BATCH),
    Expected("low_rank/small_batch.cu", r"low_rank::small_batch_second<", tile_loads=3, early_tile_loads=1, fences=1,
             copy_fences=4, activation_ffma=3400, narrow_loads=True, **SMALL_BATCH),
    Expected("low_rank/small_batch.cu", r"low_rank::small_batch_", registers=8, archs=("sm_80",)),
    Expected("low_rank/chain.cu", r"low_rank::chain<.*\(low_rank::Activation\)[01]>", **CHAIN),  # none, relu
    Expected("low_rank/chain.cu", r"low_rank::chain<.*\(low_rank::Activation\)[234]>", activation_ffma=1300, **CHAIN),
    Expected("low_rank/chain.cu", r"low_rank::chain<", registers=8, archs=("sm_80",)),
    Expected("low_rank/small_batch_sm80.cu", r"low_rank::small_batch_sm80<.*128>", registers=160, copies_before_barrier=6,
             **SMALL_BATCH_SM80),
    Expected("low_rank/small_batch_sm80.cu", r"low_rank::small_batch_sm80<.*64>", registers=128, copies_before_barrier=4,
             **SMALL_BATCH_SM80),
    Expected("low_rank/backward.cu", r"low_rank::backward_products<.*128>", registers=128, **BACKWARD),
    Expected("low_rank/backward.cu", r"low_rank::backward_products<.*64>", registers=80, **BACKWARD),
    Expected("low_rank/backward.cu", r"low_rank::backward_sums<", registers=64, weight_loads=4),
    Expected("monarch/batched.cu", r"batched_product<.*128, 128>", registers=128, copies_before_barrier=8, **MONARCH),
    Expected("monarch/batched.cu", r"batched_product<.*64, 128>", registers=96, copies_before_barrier=6, **MONARCH),
    Expected("monarch/batched.cu", r"batched_product<.*64, 64>", registers=80, copies_before_barrier=4, **MONARCH),
    Expected("monarch/batched.cu", r"batched_product<.*(16|32), 64>", registers=80, copies_before_barrier=3, **MONARCH),
    Expected("monarch/backward.cu", r"backward_product<.*false, 1>", copies_before_barrier=10, **MONARCH_BACKWARD),
    Expected("monarch/backward.cu", r"backward_product<.*true, 2>", copies_before_barrier=6, **MONARCH_BACKWARD),
    Expected("monarch/backward.cu", r"backward_product<.*(true|false), 4>", copies_before_barrier=8, **MONARCH_BACKWARD),
    Expected("monarch/backward.cu", r"backward_product<.*true, 8>", copies_before_barrier=12, **MONARCH_BACKWARD),
    Expected("monarch/backward.cu", r"monarch::backward_sums<", registers=64, weight_loads=4),
    Expected("sparse24/backward.cu", r"backward_select<.*128>", registers=128, copies_before_barrier=12, **SPARSE_BACKWARD),
    Expected("sparse24/backward.cu", r"backward_select<.*64>", registers=80, copies_before_barrier=12, **SPARSE_BACKWARD),
    Expected("sparse24/backward.cu", r"backward_expand<.*128>", registers=128, copies_before_barrier=13, **SPARSE_BACKWARD),
    Expected("sparse24/backward.cu", r"backward_expand<.*64>", registers=96, copies_before_barrier=13, **SPARSE_BACKWARD),
    Expected("sparse24/backward.cu", r"backward_count<", registers=40),
    # single elements, because a row of odd length is at any address
    Expected("sparse24/dense.cu", r"move_dense<", registers=64, narrow_loads=True),
    # positions are 2 bytes each, and looked for one by one
    Expected("dictionary/bitmap.cu", r"mark_bitmap<", registers=40, narrow_loads=True),
    Expected("monarch/stationary.cu", r"stationary_product<.*16, [248]>", tensor_core=r"HGMMA\.64x16x16\.F32", **STATIONARY),
    Expected("monarch/stationary.cu", r"stationary_product<.*32, [248]>", tensor_core=r"HGMMA\.64x32x16\.F32", **STATIONARY),
    Expected("monarch/stationary.cu", r"stationary_product<", registers=8, archs=("sm_80",)),
    Expected("dictionary/forward.cu", r"dictionary::forward<", registers=168, weight_loads=56, before_barrier=48,
             copies_before_barrier=20, fences=1, **DECODE),
    # as low_rank/decode.cu; three copies more, of starts and of entries' columns and values; FFMA: of seven entries, four and
    # the loop's tail, for each number of rows of x up to 8 or 16
    Expected("low_rank_sparse/decode.cu", r"low_rank_sparse::decode<.*1>", registers=176, weight_loads=80, before_barrier=48,
             copies_before_barrier=13, fences=1, activation_ffma=105, **DECODE),
    Expected("low_rank_sparse/decode.cu", r"low_rank_sparse::decode<.*2>", registers=208, weight_loads=96, before_barrier=64,
             copies_before_barrier=13, fences=1, activation_ffma=217, **DECODE),
    Expected("low_rank_sparse/materialize.cu", r"materialize<.*128>", registers=128, **ENTRIES),
    Expected("low_rank_sparse/materialize.cu", r"materialize<.*64>", registers=80, **ENTRIES),
    Expected("low_rank_sparse/backward.cu", r"backward_select<.*128>", registers=128, **ENTRIES),
    Expected("low_rank_sparse/backward.cu", r"backward_select<.*64>", registers=80, **ENTRIES),
    # single elements, too: of what the library multiplies
    Expected("low_rank_sparse/dense.cu", r"(add|select)_entries<", registers=40, narrow_loads=True),
    Expected("sparse24/forward.cu", r"sparse24::forward<.*1>", registers=96, weight_loads=28, before_barrier=14,
             **SPARSE24),
    Expected("sparse24/forward.cu", r"sparse24::forward<.*2>", registers=160, weight_loads=48, before_barrier=24,
             **SPARSE24),
    Expected("sparse24/forward.cu", r"sparse24::forward<.*4>", registers=184, weight_loads=48, before_barrier=24,
             **SPARSE24),
    Expected("sparse24/forward.cu", r"sparse24::forward<.*8>", registers=216, weight_loads=48, before_barrier=24,
             **SPARSE24),
    Expected("sparse24/prefill.cu", r"sparse24::prefill<.*256>", registers=255, copies_before_barrier=30, **PREFILL24),
    Expected("sparse24/prefill.cu", r"sparse24::prefill<.*128>", registers=128, copies_before_barrier=14, **PREFILL24),
    Expected("sparse24/prefill.cu", r"sparse24::prefill<.*64>", registers=128, copies_before_barrier=21, **PREFILL24),
    Expected("wavelet/forward.cu", r"wavelet::middle<", registers=80, copies_before_barrier=6, weight_loads=3,
             before_barrier=2, **WAVELET),
    Expected("wavelet/forward.cu", r"wavelet::outputs<", registers=96, copies_before_barrier=1, weight_loads=8,
             before_barrier=8, **WAVELET),
    Expected("wavelet/backward.cu", r"wavelet::weights<", registers=72, copies_before_barrier=12, **WAVELET),
]


def expected_of(source: str, kernel: Kernel, arch: str) -> Expected | None:
    """The one line that speaks of this kernel; None when there is none or more than one."""
    found = [one for one in KERNELS if one.source == source and arch in one.archs and re.search(one.instances, kernel.name)]
    return found[0] if len(found) == 1 else None


def faults(kernel: Kernel, expected: Expected) -> list[str]:
    """Each way in which the machine code differs from what was expected, in words."""
    found = []
    if kernel.stack_bytes or kernel.spill_bytes:
        found.append(f"{kernel.stack_bytes} bytes of stack, {kernel.spill_bytes} bytes spilled")
    if local := kernel.find(r"LDL|STL"):
        found.append(f"{len(local)} accesses to local memory")
    if kernel.registers > expected.registers:
        found.append(f"{kernel.registers} registers, allowed {expected.registers}")
    if expected.tensor_core and not kernel.find(expected.tensor_core):
        found.append(f"no {expected.tensor_core}")
    if not expected.tensor_core and kernel.find(TENSOR_CORE):
        found.append(f"unexpected {kernel.instructions[kernel.find(TENSOR_CORE)[0]].opcode}")
    products, ffma = kernel.find(expected.tensor_core or "$"), len(kernel.find(r"FFMA")) - expected.activation_ffma
    if expected.tensor_core and ffma > len(products):
        found.append(f"{ffma} FFMA beside {len(products)} tensor-core products")
    loads = kernel.find(WEIGHT_LOAD)
    if len(loads) < expected.weight_loads:
        found.append(f"{len(loads)} loads of 128 bits, expected {expected.weight_loads}")
    barriers = kernel.find(BARRIER)
    early = [i for i in loads if not barriers or i < barriers[0]]
    if len(early) < expected.before_barrier:
        found.append(f"{len(early)} loads before the first barrier, expected {expected.before_barrier}")
    copies = [i for i in kernel.find("LDGSTS") if not barriers or i < barriers[0]]
    if len(copies) < expected.copies_before_barrier:
        found.append(f"{len(copies)} copies before the first barrier, expected {expected.copies_before_barrier}")
    if not expected.narrow_loads and (narrow := kernel.find(r"LDG\.E\.(U8|S8|U16|S16)")):
        found.append(f"{len(narrow)} loads of single elements")
    tiles = kernel.find("UTMALDG")
    if len(tiles) != expected.tile_loads:
        found.append(f"{len(tiles)} loads of tiles, expected {expected.tile_loads}")
    early = kernel.reached_without("ACQBULK").intersection(tiles)
    if len(early) != expected.early_tile_loads:
        found.append(f"{len(early)} loads of tiles before the kernel before has ended, expected {expected.early_tile_loads}")
    if len(kernel.find(FENCE)) != expected.fences:
        found.append(f"{len(kernel.find(FENCE))} memory fences, expected {expected.fences}")
    if len(kernel.find(COPY_FENCE)) != expected.copy_fences:
        found.append(f"{len(kernel.find(COPY_FENCE))} fences of the copy engine, expected {expected.copy_fences}")
    return found
