// Who does what in the decode kernels of low_rank, and where it lies: pure functions of the sizes, for kernels, the host and
// tests. 32-bit throughout: a 64-bit division costs a GPU a third of a microsecond.
//
//   first product    a unit is a tile of 16 rows of v times one split of k; its 32-wide steps go to the 8 warps in turn
//   second product   a block has neighbouring tiles of 16 rows of u; their (tile, step of r) items are one list, cut into 8
//                    pieces, one for each warp
#pragma once

#include <cstdint>

#include "device/layout.h"

namespace low_rank {

constexpr int kDecodeWarps = 8;
constexpr int kDecodeThreads = kDecodeWarps * 32;
constexpr int kTileRows = 16;     // of a weight: the tall operand of the tensor core's product
constexpr int kTokenTile = 8;     // rows of x: its narrow operand
constexpr int kStep = 32;         // elements along the contraction: 16 bytes for each lane of a quad
constexpr int kSumStride = 20;    // floats from token to token: lanes that store 4 tokens x 8 rows then meet no bank twice
constexpr int kItemBytes = 1024;  // of u for one item: two 16-byte pieces for each lane

constexpr int64_t kDecodeMaxDepth = 32768;     // k
constexpr int64_t kDecodeMaxRank = 2048;       // r: h of a block fits its shared memory
constexpr int64_t kDecodeMaxColumns = 1 << 20;  // n: products of tiles and blocks stay far inside 32 bits

struct Range {
  int first, last;  // last is not in it
};

using device::larger, device::parts_of, device::smaller;

// Neighbouring items for one of `parts`, the shares differing by one at most.
LOWFAT_CONSTEXPR Range share(int items, int parts, int index) {
  return {items * index / parts, items * (index + 1) / parts};
}

// Which elements a lane has: of a tile's rows, this and the one 8 below; of a step, 8 from this column on. The contraction is
// permuted by that, for weights and tokens alike: the pairs of the 16 bytes are columns 2t, 2t + 8 of one product [16, 16],
// then of the next.
LOWFAT_CONSTEXPR int lane_row(int lane) { return lane / 4; }
LOWFAT_CONSTEXPR int lane_column(int lane) { return lane % 4 * 8; }

// --- first product ---

struct FirstUnit {
  int tile, split;
  int first_column, last_column;  // of k
};

LOWFAT_CONSTEXPR int first_units(int r, int splits) { return parts_of(r, kTileRows) * splits; }

LOWFAT_CONSTEXPR FirstUnit first_unit(int k, int splits, int unit) {
  const int split = unit % splits;
  const Range steps = share(parts_of(k, kStep), splits, split);
  return {unit / splits, split, steps.first * kStep, smaller(steps.last * kStep, k)};
}

// Where a warp's step number `index` begins.
LOWFAT_CONSTEXPR int first_column(const FirstUnit& unit, int warp, int index) {
  return unit.first_column + (warp + index * kDecodeWarps) * kStep;
}

// --- second product ---

struct SecondShare {
  Range tiles;  // of the block
  int steps;    // of r: the items of a tile
  int each;     // items of a warp; the last warps may have fewer
};

LOWFAT_CONSTEXPR SecondShare second_share(int n, int r, int grid, int block) {
  const Range tiles = share(parts_of(n, kTileRows), grid, block);
  const int steps = parts_of(r, kStep);
  return {tiles, steps, parts_of((tiles.last - tiles.first) * steps, kDecodeWarps)};
}

LOWFAT_CONSTEXPR int items_of(const SecondShare& s) { return (s.tiles.last - s.tiles.first) * s.steps; }

template <class Share>
LOWFAT_CONSTEXPR Range warp_items(const Share& s, int warp) {
  return {smaller(warp * s.each, items_of(s)), smaller((warp + 1) * s.each, items_of(s))};
}

// The warps that have these items; none of those in between is without.
LOWFAT_CONSTEXPR Range warps_of_items(int each, int first, int last) { return {first / each, (last - 1) / each + 1}; }

// The same of a tile, counted from the block's first.
LOWFAT_CONSTEXPR Range warps_of_tile(const SecondShare& s, int tile) {
  return warps_of_items(s.each, tile * s.steps, (tile + 1) * s.steps);
}

// Where the sums of a tile and a warp meet those of other warps. Warps and tiles only go up along the list, so no two pairs
// have one slot.
LOWFAT_CONSTEXPR int slot_of(int tile, int warp) { return tile + warp; }
LOWFAT_CONSTEXPR int slots_for(int tiles) { return larger(1, tiles) + kDecodeWarps - 1; }

// --- shared memory ---

LOWFAT_CONSTEXPR int sum_at(int token, int row) { return token * kSumStride + row; }
LOWFAT_CONSTEXPR int slot_floats(int token_tiles) { return token_tiles * kTokenTile * kSumStride; }

// Elements from token to token of h: at least r up to a whole step, and 64 bytes more than a multiple of 128, so that the two
// tokens x 64 bytes that eight lanes read at a time lie in different banks.
LOWFAT_CONSTEXPR int h_stride(int r) { return parts_of(r, 64) * 64 + 32; }

// Offsets in bytes.
struct DecodeMemory {
  int sums;     // [slots, tokens, kSumStride] floats: the slots of the first product are the first 8
  int bias;     // [tiles, kTileRows] elements
  int h;        // [tokens, h_stride] elements
  int weights;  // [warps, items, 2, lanes] x 16 bytes of u
  int bytes;
};

// row_of_h: elements from token to token. bias_bytes: a multiple of 16.
LOWFAT_CONSTEXPR DecodeMemory decode_regions(int token_tiles, int tiles, int bias_bytes, int row_of_h, int prefetch) {
  const int bias = slots_for(tiles) * slot_floats(token_tiles) * 4;
  const int h = bias + bias_bytes;
  const int weights = h + token_tiles * kTokenTile * row_of_h * 2;
  return {0, bias, h, weights, weights + kDecodeWarps * prefetch * kItemBytes};
}

LOWFAT_CONSTEXPR DecodeMemory decode_memory(int token_tiles, int tiles, int r, int prefetch) {
  return decode_regions(token_tiles, tiles, tiles * kTileRows * 2, h_stride(r), prefetch);
}

// A 16-byte piece of u among those of its block: half 0 is the lane's upper row.
LOWFAT_CONSTEXPR int piece_at(int prefetch, int warp, int item, int half, int lane) {
  return (warp * prefetch + item) * kItemBytes + half * 512 + lane * 16;
}

// --- the plan of a launch ---

struct DecodePlan {
  int token_tiles = 0;       // 0: the kernels do not cover this problem
  int splits = 0;            // of k
  int grid = 0;              // blocks
  int tiles = 0;             // of u in a block, at most
  int prefetch = 0;          // items of u that each warp asks for before h is known
  int smem_bytes = 0;        // of the only kernel, or of the second one
  int first_smem_bytes = 0;  // of the first one; 0: one launch
};

// Whether the kernels have registers and 32-bit numbers for these sizes, apart from n.
LOWFAT_CONSTEXPR bool is_covered(int64_t m, int64_t k, int64_t r) {
  return m >= 1 && m <= 2 * kTokenTile && k >= 8 && k <= kDecodeMaxDepth && k % 8 == 0 && r >= 8 && r <= kDecodeMaxRank &&
         r % 8 == 0;
}

LOWFAT_CONSTEXPR int splits_of(int row_tiles, int64_t k, int sm_count) {
  return larger(1, smaller(sm_count / row_tiles, static_cast<int>(k) / (kDecodeWarps * kStep)));
}

// As few blocks as take no longer over `items` than all multiprocessors would.
LOWFAT_CONSTEXPR int blocks_for(int items, int sm_count) {
  return items == 0 ? 1 : parts_of(items, parts_of(items, sm_count));
}

// As much of u on its way as shared memory holds.
LOWFAT_CONSTEXPR int prefetch_of(int items, int least_bytes, int smem_limit) {
  return smaller(parts_of(items, kDecodeWarps), (smem_limit - least_bytes) / (kDecodeWarps * kItemBytes));
}

// In two launches a block of each shares a multiprocessor: 1 KB of its memory is kept for each block.
LOWFAT_CONSTEXPR DecodePlan plan_decode(int64_t m, int64_t n, int64_t k, int64_t r, int sm_count, int smem_limit,
                                        bool is_two_launches) {
  DecodePlan plan;
  if (!is_covered(m, k, r) || n < 1 || n > kDecodeMaxColumns || sm_count < 1) return plan;
  const int row_tiles = parts_of(static_cast<int>(r), kTileRows), column_tiles = parts_of(static_cast<int>(n), kTileRows);
  plan.splits = splits_of(row_tiles, k, sm_count);
  plan.grid = larger(blocks_for(row_tiles * plan.splits, sm_count), blocks_for(column_tiles, sm_count));
  plan.tiles = parts_of(column_tiles, plan.grid);
  const int token_tiles = m <= kTokenTile ? 1 : 2, rank = static_cast<int>(r);
  if (is_two_launches) {
    plan.first_smem_bytes = kDecodeWarps * slot_floats(token_tiles) * 4;
    smem_limit -= plan.first_smem_bytes + 1024;
  }
  const int least = decode_memory(token_tiles, plan.tiles, rank, 0).bytes;
  if (least > smem_limit) return DecodePlan();
  plan.token_tiles = token_tiles;
  plan.prefetch = prefetch_of(plan.tiles * parts_of(rank, kStep), least, smem_limit);
  plan.smem_bytes = decode_memory(token_tiles, plan.tiles, rank, plan.prefetch).bytes;
  return plan;
}

}  // namespace low_rank
