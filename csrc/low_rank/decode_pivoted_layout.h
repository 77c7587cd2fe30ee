// Who does what in the decode kernel of the pivoted form, on top of decode_layout.h: where the columns of y are that c makes,
// and which columns of h a block writes.
#pragma once

#include "low_rank/decode_layout.h"

namespace low_rank {

// The column of y that row `row` of c makes: the one before which are `row` others that are no pivots. Of ascending pivots
// the first i with pivots[i] - i > row is looked for; i is within [0, r] whatever the pivots are, and so the column within
// [row, row + r]. Nor does i ever fall from a row to the next one, whose search goes the same way until it turns right where
// the other turned left: no two rows have one column.
LOWFAT_CONSTEXPR int complement_column(const int64_t* pivots, int r, int row) {
  int first = 0, last = r;
  while (first < last) {
    const int middle = (first + last) / 2;
    if (pivots[middle] <= row + middle) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return row + first;
}

// The column of y that has column `pivot` of h: of pivots that ascend in [0, n) pivots[pivot] itself, of others the one that
// the rows of c leave to it, so that every column is written once whatever the pivots are. In front of it are the rows whose
// search ends at it or before; on the way to it, each place turns off the rows on one side of a number.
LOWFAT_CONSTEXPR int pivot_column(const int64_t* pivots, int r, int n, int pivot) {
  int first = 0, last = r, least = 0, most = n - r;  // rows below `least` are in front of it, those from `most` on not
  while (true) {
    const int middle = (first + last) / 2;
    int before = least;
    if (pivots[middle] >= most + middle) {
      before = most;
    } else if (pivots[middle] > least + middle) {
      before = static_cast<int>(pivots[middle]) - middle;
    }
    if (middle == pivot) return pivot + before;
    if (middle < pivot) {
      first = middle + 1, least = before;
    } else {
      last = middle, most = before;
    }
  }
}

// The columns of h that a block writes to y, for all tokens.
LOWFAT_CONSTEXPR Range pivots_of_block(int r, int grid, int block) { return share(r, grid, block); }

// A block's list of columns of y: those of its tiles of c, then those of its pivots.
LOWFAT_CONSTEXPR int columns_for(int tiles, int r, int grid) {
  return tiles * kTileRows + parts_of(parts_of(r, grid), 8) * 8;  // what follows is 16-byte aligned
}

// The bias of each column, and where the bias ends, the column.
LOWFAT_CONSTEXPR DecodeMemory pivoted_memory(int token_tiles, int tiles, int r, int grid, int prefetch) {
  return decode_regions(token_tiles, tiles, columns_for(tiles, r, grid) * 6, h_stride(r), prefetch);
}

// n >= r.
LOWFAT_CONSTEXPR DecodePlan plan_pivoted(int64_t m, int64_t n, int64_t k, int64_t r, int sm_count, int smem_limit) {
  DecodePlan plan;
  if (!is_covered(m, k, r) || n < r || n > kDecodeMaxColumns || sm_count < 1) return plan;
  const int rank = static_cast<int>(r), row_tiles = parts_of(rank, kTileRows);
  const int column_tiles = parts_of(static_cast<int>(n) - rank, kTileRows);
  plan.splits = splits_of(row_tiles, k, sm_count);
  plan.grid = larger(blocks_for(row_tiles * plan.splits, sm_count), blocks_for(column_tiles, sm_count));
  plan.tiles = parts_of(column_tiles, plan.grid);
  const int token_tiles = m <= kTokenTile ? 1 : 2;
  const int least = pivoted_memory(token_tiles, plan.tiles, rank, plan.grid, 0).bytes;
  if (least > smem_limit) return DecodePlan();
  plan.token_tiles = token_tiles;
  plan.prefetch = prefetch_of(plan.tiles * parts_of(rank, kStep), least, smem_limit);
  plan.smem_bytes = pivoted_memory(token_tiles, plan.tiles, rank, plan.grid, plan.prefetch).bytes;
  return plan;
}

}  // namespace low_rank
