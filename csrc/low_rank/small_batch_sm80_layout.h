// Who does what in the small-batch kernel of low_rank for GPUs of compute capability 8, and where it lies: pure functions of
// the sizes, for the kernel, the host and tests.
//
// Tiles, groups and slabs are those of small_batch_layout.h, but for the size of a group: 64 or 128 tokens. An item of the
// first product is one split of k as well. A block has every grid-th item of the first product, then of the second; a step
// is a slab of one of them.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "low_rank/small_batch_layout.h"

namespace low_rank {

constexpr int kSm80WarpRows = 4, kSm80WarpColumns = 2;  // a warp has a quarter of the tokens, half of the weights
constexpr int kSm80Threads = kSm80WarpRows * kSm80WarpColumns * 32;
constexpr int kSm80WarpWeights = kBatchRows / kSm80WarpColumns;  // rows of a weight that a warp has: four fragments
constexpr int kSm80TokenSlots = 4;  // one in use, three on their way
constexpr int kSm80LeastSlabs = 4;  // of a split: below, filling the slots and adding up take longer than it saves

// --- work items ---

struct SplitItem {
  BatchItem at;
  int split;
  Range slabs;
};

// Splits of an item follow each other, then its groups.
LOWFAT_CONSTEXPR SplitItem split_item(int tokens, int groups, int splits, int depth, int index) {
  const int split = index % splits;
  return {batch_item(tokens, groups, index / splits), split, share(parts_of(depth, kSlab), splits, split)};
}

// --- shared memory: slots of weights, then of tokens ---

// A lane's sums of one token are those of eight neighbouring rows of a weight, 16 bytes of y, because column c of the tensor
// core's fragment j is this one of the 32 rows that a warp has.
LOWFAT_CONSTEXPR int weight_row(int fragment, int column) { return column / 2 * 8 + fragment * 2 + column % 2; }

// Which row of those 32, and which half of 16 along the depth (0 or 8), a lane names for ldmatrix<4> of fragments 2 pair and
// 2 pair + 1: matrices 0, 1 are the halves of the one, 2, 3 those of the other.
LOWFAT_CONSTEXPR device::Position weight_matrix_row(int lane, int pair) {
  return {weight_row(2 * pair + lane / 16, lane % 8), lane / 8 % 2 * 8};
}

// Where 16-byte piece `piece` of row `row` lies in a slot of weights: moved within the row, so that one column's pieces of
// the eight rows of a matrix lie in different banks. Tokens, whose rows follow each other, have the swizzle of layout.h.
LOWFAT_CONSTEXPR int weight_piece(int row, int piece) {
  return row * 128 + (piece ^ (row / 8 % 4 * 2 + row % 2)) * 16;
}

struct Sm80Memory {
  int weights, tokens;  // offsets in bytes
  int bytes;
};

LOWFAT_CONSTEXPR Sm80Memory sm80_memory(int tokens, int weight_slots) {
  const int at_tokens = weight_slots * kWeightSlotBytes;
  return {0, at_tokens, at_tokens + kSm80TokenSlots * token_slot_bytes(tokens)};
}

// --- the plan of a launch ---

struct SmallBatchSm80Plan {
  int tokens = 0;  // of a group: 64 or 128; 0: the kernel does not cover this problem
  int groups = 0;
  int splits = 1;  // of k
  int grid = 0;    // blocks: one to a multiprocessor at most, so that all are resident, as the barrier needs
  int weight_slots = 0;
  int smem_bytes = 0;
};

// Floats of workspace: what splits have summed.
LOWFAT_CONSTEXPR int64_t partials_of(const SmallBatchSm80Plan& plan, int64_t m, int64_t r) {
  return plan.splits > 1 ? plan.splits * m * r : 0;
}

// What the multiprocessor with the most to do loads in the second product, for every slab: rows of weights and tokens.
LOWFAT_CONSTEXPR int loaded_rows(int m, int n, int tokens, int sm_count) {
  return parts_of(parts_of(n, kBatchRows) * parts_of(m, tokens), sm_count) * (kBatchRows + tokens);
}

// As many splits of k as give each multiprocessor an item at most, one block to each: 256 threads may then have all of the
// registers, and weights all of the shared memory that tokens leave, as far as there is something of u to ask for early.
LOWFAT_CONSTEXPR SmallBatchSm80Plan plan_small_batch_sm80(int64_t all_m, int64_t all_n, int64_t all_k, int64_t all_r,
                                                          int sm_count, int smem_limit) {
  SmallBatchSm80Plan plan;
  if (all_m < 17 || all_m > 256 || sm_count < 1) return plan;
  for (const int64_t size : {all_n, all_k, all_r}) {
    if (size < 8 || size > kSmallBatchMaxSize || size % 8) return plan;
  }
  const int m = static_cast<int>(all_m), n = static_cast<int>(all_n);
  const int k = static_cast<int>(all_k), r = static_cast<int>(all_r);
  const bool is_large = m > 64 && loaded_rows(m, n, 128, sm_count) <= loaded_rows(m, n, 64, sm_count);
  const int tokens = is_large ? 128 : 64;
  const int room = (smem_limit - sm80_memory(tokens, 0).bytes) / kWeightSlotBytes;
  if (room < kSm80TokenSlots) return plan;
  plan.tokens = tokens;
  plan.groups = parts_of(m, tokens);
  const int first_tiles = parts_of(r, kBatchRows) * plan.groups, second_items = parts_of(n, kBatchRows) * plan.groups;
  plan.splits = larger(1, smaller(sm_count / first_tiles, parts_of(k, kSlab) / kSm80LeastSlabs));
  plan.grid = smaller(sm_count, larger(first_tiles * plan.splits, second_items));
  const int slabs_of_u = parts_of(second_items, plan.grid) * parts_of(r, kSlab);
  plan.weight_slots = smaller(room, larger(kSm80TokenSlots, slabs_of_u));
  plan.smem_bytes = sm80_memory(tokens, plan.weight_slots).bytes;
  return plan;
}

}  // namespace low_rank
