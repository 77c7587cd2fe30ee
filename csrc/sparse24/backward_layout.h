// Who does what in the backward kernels of a sparse factor, and where it lies: pure functions of the sizes, for kernels, the
// host and tests. Tiles, splits and stages are those of low_rank's backward kernels.
#pragma once

#include <cstdint>

#include "low_rank/backward_layout.h"

namespace sparse24 {

using device::kWordBits, device::larger, device::parts_of, device::smaller;
using low_rank::kLargeTile, low_rank::kSmallTile;

// A factor [n, q columns] of which a bitmap says what is stored: of each row, in each of its q blocks, `stored` values. Its
// rows are p blocks, too, of ceil(n / p) rows each, the last ones of what is left. sparse24 is one block, of k columns; a
// dictionary's coefficients have a block for each of its own, of as many columns as that has atoms.
struct SparseSizes {
  int m;  // rows of what it is multiplied by
  int n, columns, p, q;
  int stored;
  int kept, group;  // kept of every `group` neighbours, where that is the pattern; else 0, 0

  LOWFAT_CONSTEXPR int words() const { return parts_of(columns, kWordBits); }
  LOWFAT_CONSTEXPR int rows() const { return parts_of(n, p); }
  LOWFAT_CONSTEXPR int rows_of(int block) const { return larger(0, smaller(rows(), n - block * rows())); }
  LOWFAT_CONSTEXPR int64_t values() const { return int64_t{n} * q * stored; }
  LOWFAT_CONSTEXPR int64_t outputs() const { return int64_t{p} * m * q * columns; }  // of dx
};

// --- runs: of a row, the values that are in one tile of its columns are neighbours ---

struct Run {
  int first, count;  // of the values of the row's block
};

// A tile begins with whole groups: where its run is needs no look at the bitmap.
LOWFAT_CONSTEXPR bool has_even_runs(const SparseSizes& s) { return s.group > 0 && kSmallTile % s.group == 0; }

LOWFAT_CONSTEXPR Run even_run(const SparseSizes& s, int tile, int number) {
  const int columns = larger(0, smaller(tile, s.columns - number * tile));
  return {number * tile / s.group * s.kept, columns / s.group * s.kept};
}

// By what the bitmap says: `first` of this tile and of the next one; the last tile of a row has all that is left. Inside of
// the row's values also if the bitmap is wrong.
LOWFAT_CONSTEXPR Run counted_run(int stored, int first, int next) {
  const int begin = smaller(first, stored);
  return {begin, larger(0, smaller(next, stored) - begin)};
}

// --- the stages of the expanding product: a thread has 16 columns of one row ---

constexpr int kThreadColumns = 16;
constexpr int kExpandStages = 3;  // of a and of values: one in use, two on their way
constexpr int kDenseStages = 2;   // of the factor's tile with its zeros: one in use, one being written

LOWFAT_CONSTEXPR int row_threads(int tile) { return tile / kThreadColumns; }

// 16-byte pieces of values that a row's run may touch: it begins anywhere in the first of them.
LOWFAT_CONSTEXPR int run_pieces(int tile) { return tile / 8 + 1; }

// --- the epilogue of the selecting product ---

// Floats from row to row of the tile's runs on their way out: the lanes of a warp, which have 8 rows x 4 neighbours, meet no
// bank twice.
LOWFAT_CONSTEXPR int run_stride(int tile) { return tile + 4; }

// Of shared memory, at most: two blocks share a multiprocessor of an sm_80.
constexpr int kBackwardSmemBytes = 80 << 10;

// --- the plan of a call ---

enum BackwardNeeds { kNeedsDx = 1, kNeedsDvalues = 2, kNeedsDb = 8 };

struct BackwardPlan {
  int tile = 0;           // 0: the kernels do not cover this problem
  int dx_splits = 1;      // of the rows of a block
  int values_splits = 1;  // of m, for dvalues and db
  int64_t starts = 0;     // ints of workspace: where each tile's run begins, should it have to be counted
  int64_t partials = 0;   // floats of workspace: what splits have summed, first of dx, then of dvalues and db
};

// Tiles of the products, all blocks together.
LOWFAT_CONSTEXPR int64_t dx_tiles(const SparseSizes& s, int tile) {
  return int64_t{s.p} * s.q * low_rank::tiles_of(s.m, s.columns, tile);
}
LOWFAT_CONSTEXPR int64_t values_tiles(const SparseSizes& s, int needs, int tile) {
  if (!(needs & kNeedsDvalues)) return needs & kNeedsDb ? s.p * device::ceil_div(s.rows(), tile) : 0;  // and no columns
  return int64_t{s.p} * s.q * low_rank::tiles_of(s.rows(), s.columns, tile);
}

// The workspace that a plan needs, also one whose splits a test has changed.
LOWFAT_CONSTEXPR int64_t partials_of(const BackwardPlan& plan, const SparseSizes& s, int needs) {
  const int64_t of_dx = plan.dx_splits > 1 && needs & kNeedsDx ? plan.dx_splits * s.outputs() : 0;
  const int64_t of_values = (needs & kNeedsDvalues ? s.values() : 0) + (needs & kNeedsDb ? s.n : 0);
  const int64_t of_all_values = plan.values_splits > 1 ? plan.values_splits * of_values : 0;
  return of_dx > of_all_values ? of_dx : of_all_values;
}

LOWFAT_CONSTEXPR int64_t starts_of(const SparseSizes& s, int tile) {
  return has_even_runs(s) ? 0 : int64_t{s.n} * s.q * parts_of(s.columns, tile);
}

// What the kernels can do; whether they should is another question (choose_backward). The sizes are those of a checked call.
LOWFAT_CONSTEXPR BackwardPlan plan_backward(int64_t m, int64_t n, int64_t columns, int64_t p, int64_t q, int64_t stored,
                                            int64_t kept, int64_t group, int needs, int sm_count) {
  BackwardPlan plan;
  const int64_t most = 1 << 24, most_blocks = 1 << 12;
  if (m < 1 || n < 8 || columns < 8 || stored < 1 || m > most || n > most || columns > most || sm_count < 1) return plan;
  if (p < 1 || q < 1 || p > most_blocks || q > most_blocks || stored > columns) return plan;
  if (n % 8 || columns % 8 || (p > 1 && device::ceil_div(n, p) % 8)) return plan;  // rows of 16-byte pieces, of each block
  const SparseSizes s{static_cast<int>(m), static_cast<int>(n), static_cast<int>(columns), static_cast<int>(p),
                      static_cast<int>(q), static_cast<int>(stored), static_cast<int>(kept), static_cast<int>(group)};
  const int least = smaller(s.m, smaller(s.rows(), s.columns));
  const int tile = least <= kSmallTile ? kSmallTile : kLargeTile;  // half of a large one would be empty
  const int64_t of_dx = dx_tiles(s, tile), of_values = values_tiles(s, needs, tile);
  if (of_dx > low_rank::kBackwardMaxBlocks || of_values > low_rank::kBackwardMaxBlocks) return plan;
  plan.tile = tile;
  const int depth = low_rank::tile_depth(tile);
  if (needs & kNeedsDx) plan.dx_splits = low_rank::splits_for(of_dx, parts_of(s.rows(), depth), sm_count);
  if (of_values > 0) plan.values_splits = low_rank::splits_for(of_values, parts_of(s.m, depth), sm_count);
  plan.starts = starts_of(s, tile);
  plan.partials = partials_of(plan, s, needs);
  return plan;
}

}  // namespace sparse24
