// Who does what in the backward kernels of low_rank, and where it lies: pure functions of the sizes, for kernels, the host
// and tests.
//
// Every gradient but the bias's is a product c [rows, columns] of two matrices over a contraction `depth`; it is cut into
// square tiles, and the contraction of a tile into splits. A block has one tile and one split.
#pragma once

#include <cstdint>

#include "low_rank/decode_layout.h"

namespace low_rank {

constexpr int kBackwardWarpRows = 2, kBackwardWarpColumns = 4;  // of a tile: each warp has a half of it times a quarter
constexpr int kBackwardThreads = kBackwardWarpRows * kBackwardWarpColumns * 32;
constexpr int kBackwardStages = 4;  // of the contraction: one in use, three on their way
constexpr int kSmallTile = 64, kLargeTile = 128;

// Of a stage, along the contraction: 8 KB of each operand for either tile.
LOWFAT_CONSTEXPR int tile_depth(int tile) { return 4096 / tile; }

// --- shared memory ---

// Where 16-byte piece `piece` of row `row` lies in a tile with `row_pieces` (4, 8 or 16) pieces to a row, counted in pieces:
// moved within the row, so that one column's pieces of eight neighbouring rows lie in different banks.
LOWFAT_CONSTEXPR int tile_piece(int row_pieces, int row, int piece) {
  return row * row_pieces + (row_pieces == 4 ? piece ^ row / 2 % 4 : piece ^ row % 8);
}

// Which row of an operand that lies [depth, 16] a lane names for ldmatrix_transposed, to get mma_a of its transpose.
LOWFAT_CONSTEXPR device::Position transposed_a_row(int lane) { return {lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8}; }

// Elements from row to row of a tile of c on its way out: a row 16 bytes further than a multiple of 128, so that the lanes
// of a warp, which have 8 rows x 4 pairs, meet no bank twice.
LOWFAT_CONSTEXPR int c_stride(int tile) { return tile + 8; }

// --- tiles and splits ---

struct Place {
  int row_tile, column_tile, split;
};

// Blocks that follow each other share what is the larger to read: the shorter side of c changes first, the split last.
LOWFAT_CONSTEXPR Place place_of(int row_tiles, int column_tiles, int index) {
  const int tiles = row_tiles * column_tiles, tile = index % tiles, split = index / tiles;
  if (row_tiles < column_tiles) return {tile % row_tiles, tile / row_tiles, split};
  return {tile / column_tiles, tile % column_tiles, split};
}

// Steps of one stage each that a split has.
LOWFAT_CONSTEXPR Range steps_of_split(int tile, int depth, int splits, int split) {
  return share(parts_of(depth, tile_depth(tile)), splits, split);
}

// --- the plan of a call ---

enum BackwardNeeds { kNeedsDx = 1, kNeedsDv = 2, kNeedsDu = 4, kNeedsDb = 8 };

struct BackwardPlan {
  int tile = 0;           // 0: the kernels do not cover this problem
  int dh_splits = 1;      // of n
  int weight_splits = 1;  // of m, for du, dv and db
  bool is_added = false;  // du, dv and db are floats, and added to what is there
  int64_t partials = 0;   // floats of workspace: what splits have summed, first of dh, then of the weights
};

constexpr int kBackwardBlocks = 2;       // to a multiprocessor
constexpr int kBackwardLeastSteps = 4;   // of a split: below, filling the stages takes longer than using them
constexpr int64_t kBackwardMaxBlocks = 1 << 30;

// As many splits as there are multiprocessors for, as long as each has something to do.
LOWFAT_CONSTEXPR int splits_for(int64_t tiles, int steps, int sm_count) {
  const int64_t room = kBackwardBlocks * sm_count / tiles;
  return larger(1, smaller(steps / kBackwardLeastSteps, static_cast<int>(room)));
}

// Blocks of each product's tiles, by the sizes of c.
LOWFAT_CONSTEXPR int64_t tiles_of(int64_t rows, int64_t columns, int tile) {
  return device::ceil_div(rows, tile) * device::ceil_div(columns, tile);
}

LOWFAT_CONSTEXPR int64_t weight_tiles(int64_t n, int64_t k, int64_t r, int needs, int tile) {
  return (needs & kNeedsDu   ? tiles_of(n, r, tile)
          : needs & kNeedsDb ? device::ceil_div(n, tile)  // db alone: rows of c, and no columns
                             : 0) +
         (needs & kNeedsDv ? tiles_of(r, k, tile) : 0);
}

LOWFAT_CONSTEXPR int64_t weight_elements(int64_t n, int64_t k, int64_t r, int needs) {
  return (needs & kNeedsDu ? n * r : 0) + (needs & kNeedsDv ? r * k : 0) + (needs & kNeedsDb ? n : 0);
}

// The floats of workspace that a plan needs, also one whose splits a test has changed.
LOWFAT_CONSTEXPR int64_t partials_of(const BackwardPlan& plan, int64_t m, int64_t n, int64_t k, int64_t r, int needs) {
  const int64_t of_dh = plan.dh_splits > 1 && needs & (kNeedsDx | kNeedsDv) ? plan.dh_splits * m * r : 0;
  const int64_t of_weights =
      plan.weight_splits > 1 || plan.is_added ? plan.weight_splits * weight_elements(n, k, r, needs) : 0;
  return of_dh > of_weights ? of_dh : of_weights;
}

// What the kernels can do; whether they should is another question (choose_backward).
LOWFAT_CONSTEXPR BackwardPlan plan_backward(int64_t m, int64_t n, int64_t k, int64_t r, int needs, bool is_added,
                                            int sm_count) {
  BackwardPlan plan;
  const int64_t most = 1 << 24;
  if (m < 1 || n < 8 || k < 8 || r < 8 || m > most || n > most || k > most || r > most || sm_count < 1) return plan;
  if (n % 8 || k % 8 || r % 8) return plan;
  const int tile = m <= kSmallTile || r <= kSmallTile ? kSmallTile : kLargeTile;  // half of a large one would be empty
  const int64_t of_dh = tiles_of(m, r, tile), of_dx = tiles_of(m, k, tile), of_weights = weight_tiles(n, k, r, needs, tile);
  if (of_dh > kBackwardMaxBlocks || of_dx > kBackwardMaxBlocks || of_weights > kBackwardMaxBlocks) return plan;
  plan.tile = tile;
  plan.is_added = is_added;
  const int depth = tile_depth(tile);
  if (needs & (kNeedsDx | kNeedsDv)) plan.dh_splits = splits_for(of_dh, parts_of(static_cast<int>(n), depth), sm_count);
  if (of_weights > 0) plan.weight_splits = splits_for(of_weights, parts_of(static_cast<int>(m), depth), sm_count);
  plan.partials = partials_of(plan, m, n, k, r, needs);
  return plan;
}

}  // namespace low_rank
