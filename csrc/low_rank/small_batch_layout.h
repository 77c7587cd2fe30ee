// Who does what in the small-batch kernels of low_rank, and where it lies: pure functions of the sizes, for kernels, the
// host and tests.
//
// Each of the two products has weights [rows, depth] and tokens [m, depth]. A work item is a tile of 64 rows times a group
// of tokens; a slab is 64 of the depth. In the first product a cluster of blocks has one item, each block some of the slabs.
#pragma once

#include <cstdint>

#include "low_rank/decode_layout.h"

namespace low_rank {

constexpr int kBatchRows = 64;  // of a weight's tile: the tall operand of a warpgroup's product
constexpr int kSlab = 64;       // elements along the contraction: 128 bytes, a row of the swizzle
constexpr int kMostSplits = 8;  // blocks of a cluster that every sm_90 can place
constexpr int kConsumerWarps = 4;
constexpr int kSmallBatchThreads = (kConsumerWarps + 2) * 32;  // two more warps load, one for each operand
constexpr int kWeightSlotBytes = kBatchRows * 128;
constexpr int kBarrierBytes = 512;               // behind the slots: full and empty of each
constexpr int kMostSlots = kBarrierBytes / 16;   // of both rings together
constexpr int64_t kSmallBatchMaxSize = 1 << 20;  // n, k, r: counts of tiles and items stay far inside 32 bits

LOWFAT_CONSTEXPR int token_slot_bytes(int tokens) { return tokens * 128; }

// --- work items ---

struct BatchItem {
  int row, token;  // the first of its tile, and of its group
};

// Groups of one tile follow each other: the second finds the weights in L2.
LOWFAT_CONSTEXPR BatchItem batch_item(int tokens, int groups, int index) {
  return {index / groups * kBatchRows, index % groups * tokens};
}

// --- shared memory: the rings of weights and tokens, and when all is multiplied, the result in their place ---

// The first product's sums, [tokens][64 rows] floats. 4 more from token to token: lanes that store 4 pairs of tokens x 8
// rows meet no bank twice, and 16-byte loads along the rows stay aligned.
constexpr int kPartialStride = kBatchRows + 4;
LOWFAT_CONSTEXPR int partial_at(int token, int row) { return token * kPartialStride + row; }

// Which 16-byte row of the second product's result, [tokens][64 columns of y] swizzled elements, a lane of a warp names for
// stmatrix_transposed<4> of the 16 tokens from `token` on: matrices 0, 1 are columns 0-7 and 8-15 of the warp's, 2, 3 the
// same of the next 8 tokens.
LOWFAT_CONSTEXPR uint32_t result_piece(int warp, int lane, int token) {
  return device::swizzled_piece(token + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
}

// --- the plan of a launch ---

// Of one product.
struct BatchPhase {
  int tokens = 0;  // of a group: 32, 64, 128 or 256; 0: the kernels do not cover this problem
  int groups = 0;
  int items = 0;   // tiles times groups
  int splits = 1;  // blocks of a cluster; of the depth
  int slabs = 0;   // of the depth
  int weight_slots = 0, token_slots = 0;
  int smem_bytes = 0;
};

struct SmallBatchPlan {
  BatchPhase first, second;
};

struct BatchMemory {
  int weights, tokens;  // offsets in bytes: the rings
  int barriers;
  int bytes;
};

LOWFAT_CONSTEXPR BatchMemory batch_memory(int tokens, int weight_slots, int token_slots, int result_bytes) {
  const int at_tokens = weight_slots * kWeightSlotBytes;
  const int barriers = larger(at_tokens + token_slots * token_slot_bytes(tokens), result_bytes);
  return {0, at_tokens, barriers, barriers + kBarrierBytes};
}

LOWFAT_CONSTEXPR BatchMemory first_memory(int tokens, int weight_slots, int token_slots) {
  return batch_memory(tokens, weight_slots, token_slots, tokens * kPartialStride * 4);
}

LOWFAT_CONSTEXPR BatchMemory second_memory(int tokens, int weight_slots, int token_slots) {
  return batch_memory(tokens, weight_slots, token_slots, tokens * 128);
}

// Tokens of a group, and groups: one, so that weights are read once; two halves of 128 where that many more blocks find idle
// multiprocessors (the second half then reads weights from L2).
LOWFAT_CONSTEXPR BatchPhase batch_groups(int m, int blocks, int sm_count) {
  BatchPhase phase;
  phase.tokens = m <= 32 ? 32 : m <= 64 ? 64 : m <= 128 ? 128 : 256;
  if (phase.tokens == 256 && 2 * blocks <= sm_count) phase.tokens = 128;
  phase.groups = parts_of(m, phase.tokens);
  return phase;
}

// As many splits of k as give each multiprocessor a block at most. Of what a block holds, both operands have the same share,
// and weights the rest.
LOWFAT_CONSTEXPR BatchPhase first_phase(int m, int k, int r, int sm_count, int smem_bytes) {
  const int tiles = parts_of(r, kBatchRows), slabs = parts_of(k, kSlab);
  int splits = kMostSplits;
  while (splits > 1 && (splits > slabs || tiles * splits > sm_count)) splits /= 2;
  BatchPhase phase = batch_groups(m, tiles * splits, sm_count);
  phase.items = tiles * phase.groups;
  phase.splits = splits;
  phase.slabs = slabs;
  const int room = smem_bytes - kBarrierBytes, token_bytes = token_slot_bytes(phase.tokens), most = parts_of(slabs, splits);
  phase.token_slots = smaller(most, room / (kWeightSlotBytes + token_bytes));
  phase.weight_slots = smaller(most, (room - phase.token_slots * token_bytes) / kWeightSlotBytes);
  phase.smem_bytes = first_memory(phase.tokens, phase.weight_slots, phase.token_slots).bytes;
  return phase;
}

// As much of u as fits beside two slots of h: all that is asked for before h is there.
LOWFAT_CONSTEXPR BatchPhase second_phase(int m, int n, int r, int sm_count, int smem_bytes) {
  const int tiles = parts_of(n, kBatchRows), slabs = parts_of(r, kSlab);
  BatchPhase phase = batch_groups(m, tiles, sm_count);
  phase.items = tiles * phase.groups;
  phase.slabs = slabs;
  const int room = smem_bytes - kBarrierBytes, token_bytes = token_slot_bytes(phase.tokens);
  phase.weight_slots = smaller(slabs, (room - smaller(2, slabs) * token_bytes) / kWeightSlotBytes);
  phase.token_slots = smaller(slabs, (room - phase.weight_slots * kWeightSlotBytes) / token_bytes);
  phase.smem_bytes = second_memory(phase.tokens, phase.weight_slots, phase.token_slots).bytes;
  return phase;
}

// A block of each product shares a multiprocessor, so that the second's can load u while the first's still run: each has
// half of the memory, less 1 KB that CUDA keeps for each block. smem_limit: bytes that one block alone may have.
LOWFAT_CONSTEXPR SmallBatchPlan plan_small_batch(int64_t m, int64_t n, int64_t k, int64_t r, int sm_count, int smem_limit) {
  SmallBatchPlan plan;
  const int smem_bytes = (smem_limit + 1024) / 2 - 1024;
  const int least = 2 * (kWeightSlotBytes + token_slot_bytes(256)) + kBarrierBytes;
  if (m < 17 || m > 256 || sm_count < 1 || smem_bytes < least) return plan;
  if (n < 8 || n > kSmallBatchMaxSize || n % 8 || k < 8 || k > kSmallBatchMaxSize || k % 8) return plan;
  if (r < 8 || r > kSmallBatchMaxSize || r % 8) return plan;
  plan.first = first_phase(static_cast<int>(m), static_cast<int>(k), static_cast<int>(r), sm_count, smem_bytes);
  plan.second = second_phase(static_cast<int>(m), static_cast<int>(n), static_cast<int>(r), sm_count, smem_bytes);
  return plan;
}

}  // namespace low_rank
