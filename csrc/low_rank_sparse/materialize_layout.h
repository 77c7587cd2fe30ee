// The plan of low_rank_sparse's weight, made by tiles.
#pragma once

#include "low_rank_sparse/support_layout.h"

namespace low_rank_sparse {

struct MaterializePlan {
  int tile = 0;  // its side; 0: the kernel does not cover these sizes
  int grid = 0;  // blocks, one for each tile
};

// The rank may be 0. Large tiles read the factors half as often, small ones keep more multiprocessors busy.
LOWFAT_CONSTEXPR MaterializePlan plan_materialize(int64_t n, int64_t k, int64_t r, int64_t entries, int sm_count) {
  if (n < 1 || k < 8 || r < 0 || n > kMostSize || k > kMostSize || r > kMostSize || sm_count < 1) return {};
  if (k % 8 || r % 8 || entries < 0 || entries > kMostEntries) return {};
  const int tile = low_rank::tiles_of(n, k, kLargeTile) < sm_count ? kSmallTile : kLargeTile;
  const int64_t tiles = low_rank::tiles_of(n, k, tile);
  if (tiles > low_rank::kBackwardMaxBlocks) return {};
  return {tile, static_cast<int>(tiles)};
}

}  // namespace low_rank_sparse
