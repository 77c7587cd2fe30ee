// The plan of low_rank_sparse's selecting product, of S alone: gradients of its values, and of the bias. Tiles, splits and
// stages are those of low_rank's backward kernels.
#pragma once

#include <cstdint>

#include "low_rank/backward_layout.h"
#include "low_rank_sparse/support_layout.h"

namespace low_rank_sparse {

enum SelectNeeds { kSelectsValues = 1, kSelectsDb = 2 };

// A number for each entry, and some more up to whole loads of what adds the splits up.
LOWFAT_CONSTEXPR int64_t padded_entries(int64_t entries) { return device::round_up(entries, 8); }

struct BackwardPlan {
  int tile = 0;          // 0: the kernel does not cover this problem
  int splits = 1;        // of m
  int64_t partials = 0;  // floats of workspace: what splits have summed, first of dvalues, then of db
};

// db alone: rows of tiles, and no columns.
LOWFAT_CONSTEXPR int64_t select_tiles(int64_t n, int64_t k, int needs, int tile) {
  return device::ceil_div(n, tile) * (needs & kSelectsValues ? device::ceil_div(k, tile) : 1);
}

// The workspace that a plan needs, also one whose splits a test has changed.
LOWFAT_CONSTEXPR int64_t partials_of(const BackwardPlan& plan, int64_t n, int64_t entries, int needs) {
  const int64_t each = (needs & kSelectsValues ? padded_entries(entries) : 0) + (needs & kSelectsDb ? n : 0);
  return plan.splits > 1 ? plan.splits * each : 0;
}

// What the kernel can do; whether it should is another question (choose_backward). The sizes are those of a checked call.
LOWFAT_CONSTEXPR BackwardPlan plan_backward(int64_t m, int64_t n, int64_t k, int64_t entries, int needs, int sm_count) {
  BackwardPlan plan;
  if (m < 1 || n < 8 || k < 8 || m > kMostSize || n > kMostSize || k > kMostSize || sm_count < 1) return plan;
  if (n % 8 || k % 8 || entries < 1 || entries > kMostEntries) return plan;
  const bool is_small = m <= kSmallTile || n <= kSmallTile || k <= kSmallTile;  // half of a large tile would be empty
  const int tile = is_small ? kSmallTile : kLargeTile;
  const int64_t tiles = select_tiles(n, k, needs, tile);
  if (tiles > low_rank::kBackwardMaxBlocks) return plan;
  plan.tile = tile;
  if (needs & (kSelectsValues | kSelectsDb)) {
    plan.splits = low_rank::splits_for(tiles, parts_of(static_cast<int>(m), low_rank::tile_depth(tile)), sm_count);
  }
  plan.partials = partials_of(plan, n, entries, needs);
  return plan;
}


}  // namespace low_rank_sparse
