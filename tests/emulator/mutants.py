"""Bugs planted in primitives and kernels, each of which must make a test executable fail: (name, file, old, new, test).

A kernel's author adds to the list. Run as a program, this prints the score; with arguments, of those mutants whose name or
test contains one of them."""
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import building  # noqa: E402  (beside this file)


class Mutant(NamedTuple):
    name: str
    file: str  # from the root of the repository
    old: str  # occurs exactly once
    new: str
    test: str  # the executable that must fail


GEMM, DEVICE, EMULATOR, LOW_RANK = "tests/emulator/gemm.cu", "csrc/device/", "tests/emulator/", "csrc/low_rank/"

MUTANTS = [
    # What a kernel's author gets wrong: the emulator must notice.
    Mutant("slot released before the product", GEMM, """      wgmma_wait<0>();
      if (threadIdx.x % kWarpgroupThreads == 0) mbarrier_arrive(&smem.empty[ring.slot]);
""", """      if (threadIdx.x % kWarpgroupThreads == 0) mbarrier_arrive(&smem.empty[ring.slot]);
      wgmma_wait<0>();
""", "gemm_test"),
    Mutant("producer does not wait for empty slots", GEMM, "      mbarrier_wait(&smem.empty[ring.slot], ring.parity ^ 1);\n",
           "", "gemm_test"),
    Mutant("producer waits for the other parity", GEMM, "ring.parity ^ 1);", "ring.parity);", "gemm_test"),
    Mutant("consumer waits for the other parity", GEMM, "&smem.full[ring.slot], ring.parity);",
           "&smem.full[ring.slot], ring.parity ^ 1);", "gemm_test"),
    Mutant("bytes of one operand announced", GEMM, "Config::kBytesA + Config::kBytesB);\n      tma_load",
           "Config::kBytesA);\n      tma_load", "gemm_test"),
    Mutant("one arrival too many expected", GEMM, "Config::kConsumers);\n    }", "Config::kConsumers + 1);\n    }",
           "gemm_test"),
    Mutant("ring never changes parity", GEMM, "      parity ^= 1;\n", "", "gemm_test"),
    Mutant("barriers used before they are there", GEMM, "    fence_mbarrier_init();\n  }\n  __syncthreads();",
           "    fence_mbarrier_init();\n  }", "gemm_test"),
    Mutant("descriptor advances by a row", GEMM, "a + step * kNextK,", "a + step * 8,", "gemm_test"),
    Mutant("old sums are added", GEMM, "depth + step > 0);", "true);", "gemm_test"),
    Mutant("second half of the rows forgotten", GEMM, "smem.a[ring.slot] + consumer * 64 * 128)", "smem.a[ring.slot])",
           "gemm_test"),
    Mutant("tile sent before all have written", GEMM, """  fence_async_shared();
  barrier_sync(barrier, kWarpgroupThreads);
""", "  fence_async_shared();\n", "gemm_test"),
    Mutant("tile overwritten before it has left", GEMM,
           "  if (thread == 0) wait_stores_read<0>();  // the tile before has left\n", "", "gemm_test"),
    Mutant("both warpgroups use one named barrier", GEMM, "const int barrier = 1 + consumer;", "const int barrier = 1;",
           "gemm_test"),
    Mutant("block ends before its tile has left", GEMM,
           "  if (threadIdx.x % kWarpgroupThreads == 0) wait_stores_read<0>();\n}", "}", "gemm_test"),
    Mutant("swizzle forgotten in the result", GEMM, "swizzled_piece(thread / 32 * 16 + mine.row, in_box)",
           "(thread / 32 * 16 + mine.row) * 128 + in_box * 16", "gemm_test"),
    Mutant("registers of the result exchanged", GEMM, "pack2<Bf16>(d[8 * j + 2], d[8 * j + 3])",
           "pack2<Bf16>(d[8 * j + 3], d[8 * j + 2])", "gemm_test"),
    # What the primitives' author gets wrong: their test must notice.
    Mutant("pack2 exchanges its halves", DEVICE + "convert.h", "return narrow<T>(lo) | uint32_t{narrow<T>(hi)} << 16;",
           "return narrow<T>(hi) | uint32_t{narrow<T>(lo)} << 16;", "primitives_test"),
    Mutant("bf16 rounds ties up", DEVICE + "convert.h", "(wide + 0x7fff + (wide >> 16 & 1)) >> 16", "(wide + 0x8000) >> 16",
           "primitives_test"),
    Mutant("fp16 overflows at its largest element", DEVICE + "convert.h", "size >= 65520.f", "size > 65504.f",
           "primitives_test"),
    Mutant("warp_sum leaves out half", DEVICE + "reduce.h",
           "LOWFAT_DEVICE float warp_sum(float v) { return lanes_sum<32>(v); }",
           "LOWFAT_DEVICE float warp_sum(float v) { return lanes_sum<16>(v); }", "primitives_test"),
    Mutant("maxima in other order", DEVICE + "reduce.h", "v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, with))",
           "v = fmaxf(v, v)", "primitives_test"),
    Mutant("grid barrier counts one dimension", DEVICE + "grid.h", "/ blocks + 1) * blocks;", "/ blocks) * blocks;",
           "primitives_test"),
    Mutant("grid barrier without the block's", DEVICE + "grid.h",
           "  if (threadIdx.x == 0) wait_until_reached(counter, target);\n  __syncthreads();",
           "  if (threadIdx.x == 0) wait_until_reached(counter, target);", "primitives_test"),
    Mutant("wait_until_reached one early", DEVICE + "grid.h", "while (load_acquire(gmem) < value)",
           "while (load_acquire(gmem) + 1 < value)", "primitives_test"),
    Mutant("MN-major advances by one atom", DEVICE + "wgmma.h", "kNextKOfMn = 2 * kAtomBytes >> 4",
           "kNextKOfMn = kAtomBytes >> 4", "primitives_test"),
    Mutant("MN-major distance forgotten", DEVICE + "wgmma.h", "uint64_t{block_bytes >> 4} << 16", "uint64_t{1} << 16",
           "primitives_test"),
    Mutant("K-major stride of half an atom", DEVICE + "wgmma.h",
           "return kSwizzle128 | kAtomBytes >> 4 << 32 | uint64_t{1} << 16",
           "return kSwizzle128 | kAtomBytes >> 5 << 32 | uint64_t{1} << 16", "primitives_test"),
    Mutant("tensor maps that overlap", DEVICE + "tma.h", 'if (t.row_stride < t.columns) return "rows overlap";', "",
           "primitives_test"),
    Mutant("boxes by column and row", DEVICE + "tma.h", "emulator::tma_load(smem, *map, row, column, barrier);",
           "emulator::tma_load(smem, *map, column, row, barrier);", "primitives_test"),
    Mutant("no zero fill", EMULATOR + "async.h", "is_valid ? size_t{16} : 0", "size_t{16}", "primitives_test"),
    Mutant("mma: a's registers 1 and 2 exchanged", EMULATOR + "tensor_core.h",
           "a[lane / 4 + i % 2 * 8][lane % 4 * 2 + half + i / 2 * 8]",
           "a[lane / 4 + i / 2 * 8][lane % 4 * 2 + half + i % 2 * 8]", "primitives_test"),
    Mutant("sparse: selector ignored", EMULATOR + "tensor_core.h", "row % 8 * 4 + selector * 2 + four / 4",
           "row % 8 * 4 + four / 4", "primitives_test"),
    Mutant("wgmma: upper and lower rows exchanged", EMULATOR + "warpgroup_products.h", "upper = row % 16 / 8 * 2;",
           "upper = (1 - row % 16 / 8) * 2;", "primitives_test"),
    Mutant("wgmma: no swizzle", EMULATOR + "warpgroup_products.h", "plain ^ (plain >> 7 & 7) << 4", "plain",
           "primitives_test"),
    Mutant("clusters: previous rank", DEVICE + "cluster.h", "return emulator::peer_address(smem, rank);",
           "return emulator::peer_address(smem, 0);", "primitives_test"),
    # The index functions.
    Mutant("swizzle by another row bit", DEVICE + "layout.h", "offset ^ (offset >> 7 & 7) << 4",
           "offset ^ (offset >> 8 & 7) << 4", "layout_test"),
    Mutant("a of tf32 transposed in blocks", DEVICE + "layout.h", "return {lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4};",
           "return {lane / 4 + i / 2 * 8, lane % 4 + i % 2 * 4};", "layout_test"),
    Mutant("shares lose the remainder", DEVICE + "layout.h", "begin + each + (index < more ? 1 : 0)", "begin + each",
           "layout_test"),
    Mutant("ldmatrix rows of matrices 1 and 2 exchanged", DEVICE + "layout.h", "return {lane % 16, lane / 16 * 8};",
           "return {lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8};", "layout_test"),
    # The decode kernel of low_rank.
    Mutant("decode: no grid barrier", LOW_RANK + "decode.cu",
           "  device::grid_wait(p.counter, target);\n", "", "low_rank_decode_test"),
    Mutant("decode: barrier released by any later launch", LOW_RANK + "decode.cu",
           "device::grid_wait(p.counter, target)",
           "device::grid_wait(p.counter, uint64_t{gridDim.x})", "low_rank_decode_test"),
    Mutant("decode: counter reset at the end", LOW_RANK + "decode.cu",
           "  device::grid_wait(p.counter, target);\n  second.finish();\n",
           "  device::grid_wait(p.counter, target);\n"
           "  second.finish();\n"
           "  if (blockIdx.x == 0 && threadIdx.x == 0) device::store(p.counter, uint64_t{0});\n", "low_rank_decode_test"),
    Mutant("decode: launch not cooperative", LOW_RANK + "decode.cu",
           "    shape.is_cooperative = true;\n", "", "low_rank_decode_test"),
    Mutant("decode: no wait for the first grid", LOW_RANK + "decode.cu",
           "  device::wait_for_dependency();\n", "", "low_rank_decode_test"),
    Mutant("decode: wait for the first grid at the end", LOW_RANK + "decode.cu",
           "  device::wait_for_dependency();\n"
           "  second.load_rest();  // not earlier: ptxas moves loads to registers behind the wait, copies to shared memory it does not\n"
           "  second.finish();\n",
           "  second.load_rest();\n  second.finish();\n  device::wait_for_dependency();\n", "low_rank_decode_test"),
    Mutant("decode: warps' sums added before all are there", LOW_RANK + "decode.cu",
           "      __syncthreads();\n      store_partial", "      store_partial", "low_rank_decode_test"),
    Mutant("decode: next unit's sums over this one's", LOW_RANK + "decode.cu",
           "      if (next < units) __syncthreads();  // the next unit's sums go where these were\n",
           "", "low_rank_decode_test"),
    Mutant("decode: h used before all of it is there", LOW_RANK + "decode.cu",
           "    device::wait_copies<0>();\n    __syncthreads();\n",
           "    device::wait_copies<0>();\n", "low_rank_decode_test"),
    Mutant("decode: y added up before all sums are there", LOW_RANK + "decode.cu",
           "smem_h, smem_sums);\n    __syncthreads();\n", "smem_h, smem_sums);\n", "low_rank_decode_test"),
    Mutant("decode: u used before its copies have come", LOW_RANK + "decode.cu",
           "    device::wait_copies<0>();\n", "", "low_rank_decode_test"),
    Mutant("decode: registers of two rows exchanged", LOW_RANK + "decode.cu",
           "upper.x, lower.x, upper.y, lower.y", "upper.x, upper.y, lower.x, lower.y", "low_rank_decode_test"),
    Mutant("decode: tail of k dropped", LOW_RANK + "decode.cu",
           "const bool is_inside = column + ahead < unit.last_column;",
           "const bool is_inside = column + ahead + 24 < unit.last_column;", "low_rank_decode_test"),
    Mutant("decode: a split reads into the next", LOW_RANK + "decode_layout.h",
           "smaller(steps.last * kStep, k)", "k", "low_rank_decode_test"),
    Mutant("decode: rows of x past the last are read", LOW_RANK + "decode.cu",
           "const bool is_inside = at < unit.last_column && token < p.m;",
           "const bool is_inside = at < unit.last_column;", "low_rank_decode_test"),
    Mutant("decode: lower rows of u past the last are read", LOW_RANK + "decode.cu",
           "has_lower = row + 8 < p.n && column < p.r;", "has_lower = row < p.n && column < p.r;", "low_rank_decode_test"),
    Mutant("decode: tail of r read from the next row of u", LOW_RANK + "decode.cu",
           "has_upper = row < p.n && column < p.r;", "has_upper = row < p.n;", "low_rank_decode_test"),
    Mutant("decode: last split dropped", LOW_RANK + "decode.cu",
           "split + s < p.splits ?", "split + s < p.splits - (p.splits > 1) ?", "low_rank_decode_test"),
    Mutant("decode: rows of h one piece short", LOW_RANK + "decode.cu",
           "*reinterpret_cast<uint2*>(smem_h + token[j] * h_stride(p.r) + column[j])",
           "*reinterpret_cast<uint2*>(smem_h + token[j] * (h_stride(p.r) - 8) + column[j])", "low_rank_decode_test"),
    Mutant("decode: h of the padded step not zeroed", LOW_RANK + "decode.cu",
           "      if (!is_inside) rounded = make_uint2(0, 0);\n", "", "low_rank_decode_test"),
    Mutant("decode: h slice of each block one short", LOW_RANK + "decode.cu",
           "i >= to_keep.first && i < to_keep.last;",
           "i >= to_keep.first && i < to_keep.last - 1;", "low_rank_decode_test"),
    Mutant("decode: sums not cleared between tiles", LOW_RANK + "decode.cu",
           "sums);\n      clear<Config>(sums);\n    }\n    at.advance",
           "sums);\n    }\n    at.advance", "low_rank_decode_test"),
    Mutant("decode: sums stored at the end of a tile alone", LOW_RANK + "decode.cu",
           "if (at.step == mine.steps - 1 || item == items.last - 1) {",
           "if (at.step == mine.steps - 1) {", "low_rank_decode_test"),
    Mutant("decode: second batch of the rest is the first again", LOW_RANK + "decode.cu",
           "    add_batch(item + Config::kBatch, odd);\n",
           "    add_batch(item + Config::kBatch, even);\n", "low_rank_decode_test"),
    Mutant("decode: rest of u starts where the prefetch did", LOW_RANK + "decode.cu",
           ".first + prefetched, first_batch);", ".first, first_batch);", "low_rank_decode_test"),
    Mutant("decode: third batch of v is the first again", LOW_RANK + "decode.cu",
           "        load_v<Config>(p, unit, step + 2 * kBatch, even);\n", "", "low_rank_decode_test"),
    Mutant("decode: next unit starts with this one's weights", LOW_RANK + "decode.cu",
           "      if (next < units) begin(next);\n", "", "low_rank_decode_test"),
    Mutant("decode: bias of the column beside", LOW_RANK + "decode.cu",
           "smem_bias[column - first] =", "smem_bias[(column - first) ^ 1] =", "low_rank_decode_test"),
    Mutant("decode: sums of the first warp of a tile dropped", LOW_RANK + "decode.cu",
           "    float sum = 0;\n    for (int warp = warps.first",
           "    float sum = 0;\n    for (int warp = warps.first + 1", "low_rank_decode_test"),
    Mutant("decode: y of the column beside", LOW_RANK + "decode.cu",
           "device::store(p.y + int64_t{token} * p.n + column,",
           "device::store(p.y + int64_t{token} * p.n + (column ^ 1),", "low_rank_decode_test"),
    Mutant("layout: slots shared by two warps", LOW_RANK + "decode_layout.h",
           "{ return tile + warp; }", "{ return tile + warp / 2; }", "low_rank_layout_test"),
    Mutant("layout: no slot for the last warp", LOW_RANK + "decode_layout.h",
           "larger(1, tiles) + kDecodeWarps - 1", "larger(1, tiles) + kDecodeWarps - 2", "low_rank_layout_test"),
    Mutant("layout: rows of h in the same banks", LOW_RANK + "decode_layout.h",
           "parts_of(r, 64) * 64 + 32;", "parts_of(r, 64) * 64 + 8;", "low_rank_layout_test"),
    Mutant("layout: pieces of two halves overlap", LOW_RANK + "decode_layout.h",
           "half * 512 + lane * 16", "half * 256 + lane * 16", "low_rank_layout_test"),
    Mutant("layout: shares overlap", LOW_RANK + "decode_layout.h",
           "items * (index + 1) / parts}", "(items * (index + 1) + parts - 1) / parts}", "low_rank_layout_test"),
    Mutant("layout: tail of k outside of all splits", LOW_RANK + "decode_layout.h",
           "share(parts_of(k, kStep), splits, split)", "share(k / kStep, splits, split)", "low_rank_layout_test"),
    Mutant("layout: a block keeps no memory for itself", LOW_RANK + "decode_layout.h",
           "smem_limit -= plan.first_smem_bytes + 1024;", "smem_limit -= plan.first_smem_bytes;", "low_rank_layout_test"),
    Mutant("layout: sums without padding", LOW_RANK + "decode_layout.h",
           "kSumStride = 20;", "kSumStride = 16;", "low_rank_layout_test"),
    # The backward kernels of low_rank.
    Mutant("backward: a of the weights not transposed", LOW_RANK + "backward.cu",
           "device::ldmatrix_transposed<4>(a[i],", "device::ldmatrix<4>(a[i],", "low_rank_backward_test"),
    Mutant("backward: b not transposed", LOW_RANK + "backward.cu", "device::ldmatrix_transposed<4>(b[j],",
           "device::ldmatrix<4>(b[j],", "low_rank_backward_test"),
    Mutant("backward: matrices 1 and 2 of a exchanged", LOW_RANK + "backward_layout.h",
           "return {lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8}", "return {lane % 16, lane / 16 * 8}",
           "low_rank_backward_test"),
    Mutant("backward: column fragments exchanged", LOW_RANK + "backward.cu",
           "{b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]}", "{b[j / 2][j % 2], b[j / 2][j % 2 + 2]}",
           "low_rank_backward_test"),
    Mutant("backward: a stage used before its copies have come", LOW_RANK + "backward.cu",
           "device::wait_copies<Config::kStages - 2>();", "device::wait_copies<Config::kStages - 1>();",
           "low_rank_backward_test"),
    Mutant("backward: no barrier between copies and products", LOW_RANK + "backward.cu",
           "device::wait_copies<Config::kStages - 2>();\n      __syncthreads();\n",
           "device::wait_copies<Config::kStages - 2>();\n", "low_rank_backward_test"),
    Mutant("backward: next copies before the barrier", LOW_RANK + "backward.cu",
           "      __syncthreads();\n      copy(step + Config::kStages - 1);\n",
           "      copy(step + Config::kStages - 1);\n      __syncthreads();\n", "low_rank_backward_test"),
    Mutant("backward: empty groups not counted", LOW_RANK + "backward.cu",
           "        b.copy_next(smem_stages[step % Config::kStages].b);\n      }\n      device::commit_copies();",
           "        b.copy_next(smem_stages[step % Config::kStages].b);\n        device::commit_copies();\n      }",
           "low_rank_backward_test"),
    Mutant("backward: c over the stages while they are read", LOW_RANK + "backward.cu",
           "  LOWFAT_DEVICE void store_c(uint16_t* smem_c) const {\n    __syncthreads();\n",
           "  LOWFAT_DEVICE void store_c(uint16_t* smem_c) const {\n", "low_rank_backward_test"),
    Mutant("backward: c leaves before all of it is there", LOW_RANK + "backward.cu",
           "    __syncthreads();\n    constexpr int kPieces = Config::kTile / 8;",
           "    constexpr int kPieces = Config::kTile / 8;", "low_rank_backward_test"),
    Mutant("backward: rows past the last are read", LOW_RANK + "backward.cu", "row + down < rows && column < columns);",
           "column < columns);", "low_rank_backward_test"),
    Mutant("backward: columns past the last are the next row's", LOW_RANK + "backward.cu",
           "row + down < rows && column < columns);", "row + down < rows);", "low_rank_backward_test"),
    Mutant("backward: tail of the contraction dropped", LOW_RANK + "backward_layout.h",
           "share(parts_of(depth, tile_depth(tile)), splits, split)",
           "share(larger(1, depth / tile_depth(tile)), splits, split)", "low_rank_backward_test"),
    Mutant("backward: every split starts at the first step", LOW_RANK + "backward.cu",
           "const int from = steps.first * Config::kDepth;", "const int from = 0;", "low_rank_backward_test"),
    Mutant("backward: splits on top of each other", LOW_RANK + "backward.cu",
           "p.partials + int64_t{place.split} * p.rows * p.columns", "p.partials", "low_rank_backward_test"),
    Mutant("backward: last split dropped", LOW_RANK + "backward.cu", "if (split + s < one.splits)",
           "if (split + s < one.splits - (one.splits > 1))", "low_rank_backward_test"),
    Mutant("backward: fifth split dropped", LOW_RANK + "backward.cu", "split < one.splits; split += Config::kSplitsAtOnce",
           "split < 1; split += Config::kSplitsAtOnce", "low_rank_backward_test"),
    Mutant("backward: gradients in float overwritten", LOW_RANK + "backward.cu",
           "make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w)", "sum",
           "low_rank_backward_test"),
    Mutant("backward: db from the rows 8 below", LOW_RANK + "backward.cu", "a_sums[e % 2] +=", "a_sums[1 - e % 2] +=",
           "low_rank_backward_test"),
    Mutant("backward: db of one half of each pair", LOW_RANK + "backward.cu", "+= pair.x + pair.y;", "+= pair.x;",
           "low_rank_backward_test"),
    Mutant("backward: db of each split, not of their sum", LOW_RANK + "backward.cu",
           "p.a_partials + (int64_t{place.split} * p.rows + row)", "p.a_partials + row", "low_rank_backward_test"),
    Mutant("backward: dv starts where du does", LOW_RANK + "backward.cu", "is_second ? index - p.blocks_of_first : index",
           "index", "low_rank_backward_test"),
    Mutant("backward: partials of du and dv in one place", LOW_RANK + "backward.cu",
           "      partials += plan.weight_splits * count;\n", "", "low_rank_backward_test"),
    Mutant("backward: h where dh belongs", LOW_RANK + "backward.cu", "product_of(p.dh, p.x, p.r, p.k,",
           "product_of(p.h, p.x, p.r, p.k,", "low_rank_backward_test"),
    Mutant("backward: dh written without its splits", LOW_RANK + "backward.cu",
           "return add_up({{{p.partials, p.dh, int64_t{p.m} * p.r, plan.dh_splits, false}}, 1});",
           "return add_up({{{p.partials, p.dh, int64_t{p.m} * p.r, 1, false}}, 1});", "low_rank_backward_test"),
    Mutant("backward: c of the row tile above", LOW_RANK + "backward.cu",
           "int first_row() const { return place.row_tile * Config::kTile; }",
           "int first_row() const { return (place.row_tile & ~1) * Config::kTile; }", "low_rank_backward_test"),
    Mutant("backward layout: rows of 64 bytes without a swizzle", LOW_RANK + "backward_layout.h",
           "row_pieces == 4 ? piece ^ row / 2 % 4 :", "row_pieces == 4 ? piece :", "low_rank_backward_layout_test"),
    Mutant("backward layout: swizzle by every other row", LOW_RANK + "backward_layout.h", ": piece ^ row % 8)",
           ": piece ^ row / 2 % 8)", "low_rank_backward_layout_test"),
    Mutant("backward layout: c without padding", LOW_RANK + "backward_layout.h", "{ return tile + 8; }", "{ return tile; }",
           "low_rank_backward_layout_test"),
    Mutant("backward layout: matrices 1 and 2 of a exchanged", LOW_RANK + "backward_layout.h",
           "return {lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8}", "return {lane % 16, lane / 16 * 8}",
           "low_rank_backward_layout_test"),
    Mutant("backward layout: tiles of a wide c skipped", LOW_RANK + "backward_layout.h",
           "return {tile % row_tiles, tile / row_tiles, split};", "return {tile % row_tiles, tile / column_tiles, split};",
           "low_rank_backward_layout_test"),
    Mutant("backward layout: no room for db", LOW_RANK + "backward_layout.h", "(needs & kNeedsDb ? n : 0);", "0;",
           "low_rank_backward_test"),
    # The emulator's own eyes: without them its test must fail.
    Mutant("alignment unchecked", EMULATOR + "memory.h", "if (reinterpret_cast<uintptr_t>(p) % bytes) fail",
           "if (false) fail", "emulator_test"),
    Mutant("divergence unchecked", EMULATOR + "warp.h", "if (r.arrived && (strcmp(r.what, what) || r.detail != detail))",
           "if (false)", "emulator_test"),
    Mutant("unfinished copies unchecked", EMULATOR + "ending.h", "if (!self.copies.empty()) fail", "if (false) fail",
           "emulator_test"),
    Mutant("copies at once", EMULATOR + "async.h", "if (machine.random.one_in(4)) land", "land", "emulator_test"),
    Mutant("products see no later writes", EMULATOR + "warpgroup_products.h",
           "    ++products.queue.back().accumulator->in_flight;\n",
           "    ++products.queue.back().accumulator->in_flight;\n    execute(products.queue.back());\n"
           "    products.queue.back().n = 0;\n",
           "emulator_test"),
    Mutant("always one order", EMULATOR + "machine.h", "m.random = Random(options.seed);", "m.random = Random(1);",
           "emulator_test"),
]


def outcome(mutant: Mutant) -> str:
    """What became of one mutant: 'killed', 'survived', or why it is no mutant at all."""
    source = building.ROOT / mutant.file
    text = source.read_text()
    if text.count(mutant.old) != 1:
        return f"the text occurs {text.count(mutant.old)} times"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("csrc", "tests/emulator"):
            shutil.copytree(building.ROOT / part, root / part)
        (root / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        built = building.build(mutant.test, root / "test", building.FAST, root)
        if built.returncode:
            return "does not compile: " + built.stderr[-800:]
        done = building.run(root / "test")
    if done.returncode == 0:
        return "survived"
    if done.returncode == 1 and "FAIL" in done.stdout:
        return "killed"
    return f"died with {done.returncode}: {done.stderr[-400:]}"


def main(words: list[str]) -> None:
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name or word in mutant.test for word in words)]
    outcomes = []
    for mutant in chosen:
        outcomes.append(outcome(mutant))
        print(f"{outcomes[-1]:10} {mutant.test:20} {mutant.name}", flush=True)
    print(f"{outcomes.count('killed')} of {len(chosen)} killed")


if __name__ == "__main__":
    main(sys.argv[1:])
