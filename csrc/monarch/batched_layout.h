// Who does what in the batched products of monarch, and where it lies: pure functions of the sizes, for the kernel, the host
// and tests.
//
// Each of the two products has blocks with a weight [rows, depth] each, and tokens. A tile is some tokens times some columns
// (rows of the weight); a CTA has one tile of several neighbouring blocks (a group): a pass is the tile of one of them, and
// leaves its results in a plane of shared memory. In global memory the planes' results of a token lie between each other.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "device/layout.h"

namespace monarch {

using device::larger, device::parts_of, device::smaller;

constexpr int kSlab = 64;        // elements of the contraction in a stage: 128 bytes, a row of the swizzle
constexpr int kStages = 3;       // one in use, two on their way
constexpr int kSectorRun = 16;   // elements: neighbours that fill a sector of 32 bytes
constexpr int kWarpColumns = 4;  // of a tile, for each warp a quarter; and half of its tokens, or all 16
constexpr int64_t kMaxSize = 1 << 20;         // k, n and the weights' rows: products of two sizes of a tile stay in 32 bits
constexpr int64_t kMaxRows = 1 << 24;         // m
constexpr int64_t kMaxGrid = (1ll << 31) - 1;

LOWFAT_CONSTEXPR int warp_rows(int tokens) { return tokens == 16 ? 1 : 2; }
LOWFAT_CONSTEXPR int threads_of(int tokens) { return warp_rows(tokens) * kWarpColumns * 32; }

struct Sizes {
  int m, n, k, b_in, b_out, r;
  bool interleave;

  LOWFAT_CONSTEXPR int p() const { return parts_of(k, b_in); }   // inputs of a block
  LOWFAT_CONSTEXPR int s() const { return parts_of(n, b_out); }  // outputs of a block
};

// --- one of the two products ---

// Column c of block b, token i: weight row weight_row(c); result at offset_of(b, c) + i result_step.
struct Batch {
  int m, blocks, rows, depth;
  int token_step;      // elements from a token to the next
  int64_t block_step;  // from a block to the next of a token
  int64_t width;       // of a token over all blocks: beyond is padding, of the last blocks
  int unit;            // columns whose results are neighbours
  int row_step;        // weight rows between these
  int64_t unit_step;   // results from unit to unit
  int pass_step;       // results from block to block
  int result_step;     // results from token to token
  int64_t results;     // offsets at and beyond are padding

  // Of the tokens' elements that block b has.
  LOWFAT_CONSTEXPR int depth_of(int block) const {
    const int64_t left = width - int64_t{block} * depth;
    return left < 0 ? 0 : left < depth ? static_cast<int>(left) : depth;
  }
  LOWFAT_CONSTEXPR int weight_row(int column) const { return column % unit * row_step + column / unit; }
  LOWFAT_CONSTEXPR int64_t offset_of(int block, int column) const {
    return column / unit * unit_step + column % unit + int64_t{block} * pass_step;
  }
  // The same in the second product, where a unit is a column or all of them: without a division.
  LOWFAT_CONSTEXPR int64_t offset_of_output(int block, int column) const {
    return (unit == 1 ? unit_step : 1) * column + int64_t{block} * pass_step;
  }
};

// z = x v^T: columns are those of one output block after those of the other, so that neighbours are neighbours in the middle
// [b_out, m, b_in r]. The weight's rows, r of an output block, are b_out from each other.
LOWFAT_CONSTEXPR Batch first_batch(const Sizes& s) {
  const int t = s.b_in * s.r;
  return {s.m, s.b_in, s.r * s.b_out, s.p(), s.k, s.p(), s.k,
          s.r, s.b_out, int64_t{s.m} * t, s.r, t, int64_t{s.b_out} * s.m * t};
}

// y = h u^T: column c is output c b_out + o (interleave) or o s + c of block o.
LOWFAT_CONSTEXPR Batch second_batch(const Sizes& s) {
  const int t = s.b_in * s.r, rows = s.s();
  const int64_t of_block = int64_t{s.m} * t;
  return {s.m, s.b_out, rows, t, t, of_block, int64_t{s.b_out} * t,
          s.interleave ? 1 : rows, 1, s.interleave ? s.b_out : 0, s.interleave ? 1 : rows, s.n, s.n};
}

// --- a group's results, in the order of their addresses ---

struct Plan {
  int tokens = 0;        // of a tile: 16, 32, 64 or 128; 0: the kernel does not cover this product
  int columns = 0;       // 64 or 128
  int used_columns = 0;  // of them, so that a tile has whole units where a group has several blocks
  int group = 0;         // blocks
  int token_tiles = 0, column_tiles = 0, groups = 0;
  int grid = 0;
  int smem_bytes = 0;
  bool is_wide = false;  // results are stored in 16-byte pieces
};

struct Place {
  int token, column, block;  // the first of its tile, and of its group
  int passes;                // blocks of the group that exist
};

// Tiles of the same tokens follow each other: together they read all of these tokens, and the weights stay in L2 anyway.
LOWFAT_CONSTEXPR Place place_of(const Batch& b, const Plan& plan, int index) {
  const int column_tile = index % plan.column_tiles, rest = index / plan.column_tiles;
  const int block = rest % plan.groups * plan.group;
  return {rest / plan.groups * plan.tokens, column_tile * plan.used_columns, block, smaller(plan.group, b.blocks - block)};
}

// Number i among a token's results of a CTA: which pass, and which column of the tile. Results i, i + 1 are neighbours in
// global memory but for the ends of runs.
struct InTile {
  int pass, column;
};

// run: Batch.unit, columns that stay together between the passes' results.
LOWFAT_CONSTEXPR InTile in_tile(int run, int passes, int number) {
  if (passes == 1) return {0, number};
  return {number / run % passes, number / run / passes * run + number % run};
}

// The one after it.
LOWFAT_CONSTEXPR InTile next_in_tile(int run, int passes, InTile at) {
  if (passes == 1 || (at.column + 1) % run != 0) return {at.pass, at.column + 1};
  if (at.pass + 1 < passes) return {at.pass + 1, at.column + 1 - run};
  return {0, at.column + 1};
}

// Eight neighbours, from a multiple of 8 on, are neighbours in one plane.
LOWFAT_CONSTEXPR bool is_along(int run, int passes) { return passes == 1 || run % 8 == 0; }

// --- shared memory: stages of tokens and weights, then the planes; a single plane has the stages' place ---

// Elements from token to token of a plane: 16 bytes further than a multiple of 128, so that the lanes of a warp, which have
// 8 tokens x 4 pairs of columns, meet no bank twice.
LOWFAT_CONSTEXPR int plane_stride(int columns) { return columns + 8; }
LOWFAT_CONSTEXPR int plane_bytes(int tokens, int columns) { return tokens * plane_stride(columns) * 2; }
LOWFAT_CONSTEXPR int stage_bytes(int tokens, int columns) { return (tokens + columns) * kSlab * 2; }
LOWFAT_CONSTEXPR int planes_at(int tokens, int columns, int group) {
  return group == 1 ? 0 : kStages * stage_bytes(tokens, columns);
}
LOWFAT_CONSTEXPR int memory_of(int tokens, int columns, int group) {
  return larger(kStages * stage_bytes(tokens, columns),
                planes_at(tokens, columns, group) + group * plane_bytes(tokens, columns));
}

// --- the plan of a launch ---

struct TileSize {
  int tokens, columns;
};
constexpr TileSize kTiles[] = {{128, 128}, {64, 128}, {64, 64}, {32, 64}, {16, 64}};  // those the kernel is compiled for

// A group of several blocks has whole units in a tile.
LOWFAT_CONSTEXPR int used_columns(const Batch& b, int columns, int group) {
  return group == 1 ? columns : smaller(b.rows, columns / b.unit * b.unit);
}

// Blocks whose results make up runs of whole sectors, that begin at multiples of 16 bytes if group after group does.
LOWFAT_CONSTEXPR int wanted_group(const Batch& b, int columns) {
  if (b.unit > columns) return 1;
  int group = 1;
  while (group * b.unit < kSectorRun || group * b.unit % 8 != 0) group *= 2;
  return smaller(group, b.blocks);
}

LOWFAT_CONSTEXPR bool stores_wide(const Batch& b, int group) {
  if (b.result_step % 8 != 0) return false;
  return group == b.blocks || (group * b.pass_step % 8 == 0 && b.unit_step % 8 == 0);
}

LOWFAT_CONSTEXPR int64_t tiles_of(const Batch& b, const TileSize& tile, int group) {
  return device::ceil_div(b.m, tile.tokens) * device::ceil_div(b.rows, used_columns(b, tile.columns, group)) *
         device::ceil_div(b.blocks, group);
}

LOWFAT_CONSTEXPR Plan plan_of_tile(const Batch& b, const TileSize& tile, int group) {
  Plan plan;
  plan.tokens = tile.tokens, plan.columns = tile.columns, plan.group = group;
  plan.used_columns = used_columns(b, tile.columns, group);
  plan.token_tiles = parts_of(b.m, tile.tokens);
  plan.column_tiles = parts_of(b.rows, plan.used_columns);
  plan.groups = parts_of(b.blocks, group);
  plan.grid = plan.token_tiles * plan.column_tiles * plan.groups;
  plan.smem_bytes = memory_of(tile.tokens, tile.columns, group);
  plan.is_wide = stores_wide(b, group);
  return plan;
}

// The largest group up to the wanted one whose planes have room; 0: none.
LOWFAT_CONSTEXPR int group_with_room(const Batch& b, const TileSize& tile, int smem_limit) {
  int group = wanted_group(b, tile.columns);
  while (group > 0 && memory_of(tile.tokens, tile.columns, group) > smem_limit) group /= 2;
  return group;
}

// The largest tile that leaves no multiprocessor without work, is not mostly empty and has room for the wanted group; else
// the smallest. Then as large a group as still does: what is stored in parts of sectors costs more of L2, and an idle
// multiprocessor all that it has.
LOWFAT_CONSTEXPR Plan plan_batch(const Batch& b, int sm_count, int smem_limit) {
  TileSize tile{};
  int group = 0;
  for (const TileSize& one : kTiles) {
    const bool is_last = one.tokens == (b.m > 16 ? 32 : 16);
    if (one.tokens < 32 && !is_last) break;
    if (one.tokens > 16 && b.m <= one.tokens / 2) continue;
    if (one.columns > 64 && b.rows <= 64) continue;
    const int fits = group_with_room(b, one, smem_limit);
    if (fits == 0 || (!is_last && fits < wanted_group(b, one.columns))) continue;
    tile = one, group = fits;
    if (tiles_of(b, tile, group) >= sm_count) break;
  }
  while (group > 1 && tiles_of(b, tile, group / 2) <= sm_count) group /= 2;
  if (group == 0 || tiles_of(b, tile, group) > kMaxGrid) return Plan();
  return plan_of_tile(b, tile, group);
}

// The plans of both products; of no tokens where the kernel does not cover the problem.
struct MonarchPlan {
  Plan first, second;
};

LOWFAT_CONSTEXPR bool is_covered(int64_t m, int64_t n, int64_t k, int64_t b_in, int64_t b_out, int64_t r) {
  if (m < 1 || m > kMaxRows || b_in < 1 || b_out < 1 || r < 1) return false;
  for (const int64_t size : {n, k, b_in, b_out, r}) {
    if (size > kMaxSize) return false;
  }
  if (b_in * r > kMaxSize || b_out * r > kMaxSize || n < 1) return false;
  return k >= 8 && k % 8 == 0 && device::ceil_div(k, b_in) % 8 == 0 && b_in * r % 8 == 0;  // rows of 16-byte pieces
}

LOWFAT_CONSTEXPR MonarchPlan plan_monarch(int64_t m, int64_t n, int64_t k, int64_t b_in, int64_t b_out, int64_t r,
                                          bool interleave, int sm_count, int smem_limit) {
  if (sm_count < 1 || !is_covered(m, n, k, b_in, b_out, r)) return MonarchPlan();
  const Sizes s{static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), static_cast<int>(b_in),
                static_cast<int>(b_out), static_cast<int>(r), interleave};
  MonarchPlan plan;
  plan.first = plan_batch(first_batch(s), sm_count, smem_limit);
  plan.second = plan_batch(second_batch(s), sm_count, smem_limit);
  return plan.first.tokens > 0 && plan.second.tokens > 0 ? plan : MonarchPlan();
}

}  // namespace monarch
