// Who does what in the chained kernel of low_rank, and where it lies: pure functions of the sizes, for the kernel, the host
// and tests.
//
// Both products are cut into tiles of 128 tokens times 128 rows of a weight; a slab is 64 of the depth. A unit of work is a
// tile or, where the first product is split, a tile's share of its slabs. Units are numbered in an order in which they can
// be done one after the other: those of the first product, then those of the second, each from the first tokens to the last.
#pragma once

#include <cstdint>

#include "low_rank/decode_layout.h"

namespace low_rank {

constexpr int kChainTile = 128;                       // tokens, and rows of a weight
constexpr int kChainSlab = 64;                        // elements along the contraction: a row of the swizzle, 128 bytes
constexpr int kChainSlots = 5;                        // of the ring of slabs
constexpr int kChainTickets = 4;                      // units that loads may be ahead of products
constexpr int kChainConsumers = 2;                    // warpgroups that multiply, each a tile of its own
constexpr int kChainThreads = (1 + kChainConsumers) * 128;
constexpr int kChainBoxBytes = kChainTile * 128;      // 128 rows of 64 elements
constexpr int kChainBoxes = kChainTile / kChainSlab;  // of a tile of h or y
constexpr int kChainSums = kChainTile * kChainTile;

constexpr int64_t kChainMaxRows = 4096;     // m: there are counters for so many
constexpr int64_t kChainMaxSize = 1 << 20;  // n, k, r: counts of units stay far inside 32 bits
constexpr int kChainMostSplits = 8;
constexpr int kChainLeastSlabs = 8;  // of a split: fewer are done sooner than its sums have gone through memory (estimated)

// --- shared memory ---

struct ChainShared {
  struct Slot {
    uint8_t tokens[kChainBoxBytes], weights[kChainBoxBytes];
  };
  alignas(1024) Slot slots[kChainSlots];
  uint8_t result[kChainConsumers][kChainBoxes][kChainBoxBytes];  // on its way from the residual to y; of h
  float bias[kChainConsumers][kChainTile];
  uint64_t full[kChainSlots], empty[kChainSlots];
  uint64_t ticket_full[kChainTickets], ticket_empty[kChainTickets];
  uint64_t residual_full[kChainConsumers];
  uint64_t turn[kChainConsumers];
  int ticket[kChainTickets];
  int is_last[kChainConsumers];
};

// --- the plan of a launch ---

struct ChainPlan {
  int row_blocks = 0;                          // of 128 tokens; 0: the kernel does not cover this problem
  int first_columns = 0, second_columns = 0;   // tiles of v's rows, of u's
  int first_slabs = 0, second_slabs = 0;       // of k, of r
  int splits = 1;                              // of k
  int grid = 0;
  int smem_bytes = 0;
};

LOWFAT_CONSTEXPR int first_tiles(const ChainPlan& plan) { return plan.row_blocks * plan.first_columns; }
LOWFAT_CONSTEXPR int first_units(const ChainPlan& plan) { return first_tiles(plan) * plan.splits; }
LOWFAT_CONSTEXPR int chain_units(const ChainPlan& plan) { return first_units(plan) + plan.row_blocks * plan.second_columns; }

// Floats of workspace: the sums of every unit of a first product that is split.
LOWFAT_CONSTEXPR int64_t chain_partials(const ChainPlan& plan) {
  return plan.splits > 1 ? int64_t{first_units(plan)} * kChainSums : 0;
}

// --- units ---

struct ChainUnit {
  bool is_second;
  int row_block;    // of h that it writes, or waits for
  int row, column;  // its first token, and first row of the weight
  Range slabs;
  int tile;         // of the first product
};

LOWFAT_CONSTEXPR ChainUnit chain_unit(const ChainPlan& plan, int number) {
  const int second = number - first_units(plan);
  if (second >= 0) {
    const int block = second / plan.second_columns, column = second % plan.second_columns;
    return {true, block, block * kChainTile, column * kChainTile, {0, plan.second_slabs}, 0};
  }
  const int tile = number / plan.splits, block = tile / plan.first_columns, column = tile % plan.first_columns;
  const Range slabs = share(plan.first_slabs, plan.splits, number % plan.splits);
  return {false, block, block * kChainTile, column * kChainTile, slabs, tile};
}

// Where a unit's sums lie: piece `piece` (four floats) of a thread of its warpgroup, neighbours for neighbouring threads.
LOWFAT_CONSTEXPR int64_t partial_at(int unit, int piece, int thread) {
  return int64_t{unit} * kChainSums + (piece * 128 + thread) * 4;
}

// --- counters: zero when a launch begins, and when it has ended ---

constexpr int kChainCounters = 256;  // of a launch
constexpr int kNextTicket = 0;       // the number of the next unit that nobody has
constexpr int kEndedBlocks = 1;      // blocks that need no counter any more

// Tiles of h that are done, of these tokens: all when it is first_columns.
LOWFAT_CONSTEXPR int tiles_done(int row_block) { return 2 + row_block; }

// Splits of a tile whose sums are in the workspace.
LOWFAT_CONSTEXPR int splits_done(const ChainPlan& plan, int tile) { return 2 + plan.row_blocks + tile; }

LOWFAT_CONSTEXPR int counters_of(const ChainPlan& plan) {
  return 2 + plan.row_blocks + (plan.splits > 1 ? first_tiles(plan) : 0);
}

// As many splits of k as find idle multiprocessors.
LOWFAT_CONSTEXPR int chain_splits(ChainPlan plan, int sm_count) {
  for (plan.splits = kChainMostSplits; plan.splits > 1; --plan.splits) {
    const bool is_long = plan.first_slabs >= plan.splits * kChainLeastSlabs;
    if (is_long && first_units(plan) <= sm_count && counters_of(plan) <= kChainCounters) break;
  }
  return plan.splits;
}

// smem_limit: bytes that a block may have.
LOWFAT_CONSTEXPR ChainPlan plan_chain(int64_t m, int64_t n, int64_t k, int64_t r, int sm_count, int smem_limit) {
  ChainPlan plan;
  const int smem_bytes = sizeof(ChainShared);
  if (m < 1 || m > kChainMaxRows || sm_count < 1 || smem_limit < smem_bytes) return plan;
  if (n < 8 || n > kChainMaxSize || n % 8 || k < 8 || k > kChainMaxSize || k % 8) return plan;
  if (r < 8 || r > kChainMaxSize || r % 8) return plan;
  plan.row_blocks = parts_of(static_cast<int>(m), kChainTile);
  plan.first_columns = parts_of(static_cast<int>(r), kChainTile);
  plan.second_columns = parts_of(static_cast<int>(n), kChainTile);
  plan.first_slabs = parts_of(static_cast<int>(k), kChainSlab);
  plan.second_slabs = parts_of(static_cast<int>(r), kChainSlab);
  plan.splits = chain_splits(plan, sm_count);
  plan.grid = smaller(sm_count, chain_units(plan));
  plan.smem_bytes = smem_bytes;
  return plan;
}

}  // namespace low_rank
