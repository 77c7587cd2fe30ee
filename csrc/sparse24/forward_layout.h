// Who does what in the forward kernel of sparse24, and where it lies: pure functions of the sizes, for the kernel, the host
// and tests.
//
// A step is 64 inputs of a row: 16 bytes of values for each lane of a quad, two sparse products. A batch is four steps: then
// each lane of a quad has the mask of one of them, 8 bytes. A unit is a block of rows times a split of the batches.
#pragma once

#include <cstdint>

#include "device/layout.h"

namespace sparse24 {

using device::parts_of, device::smaller;

constexpr int kTileRows = 16;    // of the weight: the tall operand of the tensor core's product
constexpr int kTokenTile = 8;    // rows of x: its narrow operand
constexpr int kStep = 64;        // inputs
constexpr int kBatchSteps = 4;
constexpr int kBatch = kBatchSteps * kStep;
constexpr int kSumStride = 20;   // floats from token to token: lanes that store 4 tokens x 8 rows then meet no bank twice
constexpr int kPadding = 8;      // elements after a token of x: pieces of eight neighbours then lie in different banks

constexpr int64_t kForwardTokens = 64;        // m: above, the tensor core is what takes the time
constexpr int64_t kForwardMaxSize = 1 << 20;  // n, k: counts of units stay far inside 32 bits

struct Range {
  int first, last;  // last is not in it
};

// --- where inputs are kept ---

// Of eight groups of four bits at once, the metadata of the tensor core: the position of the first bit that is set in the
// lower two bits, of the last in the upper two. They ascend whatever the bits are, so that a mask that is no 2:4 gives wrong
// numbers, and nothing undefined.
LOWFAT_CONSTEXPR uint32_t kept_positions(uint32_t mask) {
  constexpr uint32_t kEach = 0x11111111;
  const uint32_t b0 = mask, b1 = mask >> 1, b2 = mask >> 2, b3 = mask >> 3;
  const uint32_t is_late = ~b0 & ~b1;  // 2, 3
  const uint32_t first_low = ~b0 & b1, second_low = b3 | is_late | (b0 & ~b2), second_high = b2 | b3 | ~b0;
  return (first_low & kEach) | (is_late & kEach) << 1 | (second_low & kEach) << 2 | (second_high & kEach) << 3;
}

// Four bits from each 16 of a step's two mask words: those of one 4-byte register of the four lanes' values.
LOWFAT_CONSTEXPR uint32_t bits_of_register(uint32_t low, uint32_t high, int number) {
  constexpr uint32_t kOfEachHalf = 0x000f000f;
  const uint32_t bits = (low >> 4 * number & kOfEachHalf) | (high >> 4 * number & kOfEachHalf) << 8;
  return (bits | bits >> 12) & 0xffff;
}

// The word that lane `number` of a quad has for both products of a step: with selector 0 those of the registers 0 and 1 are
// read, with 1 those of 2 and 3. upper, lower: masks of the quad's row and of the one 8 below.
LOWFAT_CONSTEXPR uint32_t metadata_of(uint32_t upper_low, uint32_t upper_high, uint32_t lower_low, uint32_t lower_high,
                                      int number) {
  return kept_positions(bits_of_register(upper_low, upper_high, number) |
                        bits_of_register(lower_low, lower_high, number) << 16);
}

// --- x in shared memory ---

// Register r of the values of lane f is group 4 f + r of a step's groups of four inputs, a row of the other operand's b0 or
// b1 (r even) or of b2 or b3 (r odd). So 16-byte piece 2 r + f / 2 of a step has group 4 f + r, and the one of the next lane
// behind it: the first four pieces are the matrices of the first product, the others those of the second.
LOWFAT_CONSTEXPR int place_of_group(int group) {  // in groups, of 8 bytes, from the step's first
  const int lane = group / 4, number = group % 4;
  return (number * 2 + lane / 2) * 2 + lane % 2;
}

LOWFAT_CONSTEXPR int x_stride(int inputs) { return inputs + kPadding; }  // elements from token to token

// --- the shape of a block ---

struct Shape {
  int token_tiles;
  int row_tiles;                // of a warp
  int row_warps, depth_warps;   // the latter have the batches of the same rows in turn

  LOWFAT_CONSTEXPR int warps() const { return row_warps * depth_warps; }
  LOWFAT_CONSTEXPR int threads() const { return warps() * 32; }
  LOWFAT_CONSTEXPR int rows() const { return row_warps * row_tiles * kTileRows; }
  LOWFAT_CONSTEXPR int slot_floats() const { return token_tiles * kTokenTile * kSumStride; }
  LOWFAT_CONSTEXPR int sums_bytes() const { return warps() * row_tiles * slot_floats() * 4; }
};

// Few tokens: a block has few rows, and as many weights on their way as registers hold. Many: it has more rows, because all
// of x passes through each, and a warp two tiles of them, because it loads x from shared memory for each of its own.
LOWFAT_CONSTEXPR Shape shape_of(int token_tiles) {
  if (token_tiles == 1) return {1, 1, 1, 16};
  return token_tiles < 8 ? Shape{token_tiles, 2, 1, 8} : Shape{8, 2, 4, 2};
}

LOWFAT_CONSTEXPR int token_tiles_of(int64_t m) { return m <= 8 ? 1 : m <= 16 ? 2 : m <= 32 ? 4 : 8; }

// Where the sums of a warp's row tile meet those of the warps that have the same rows.
LOWFAT_CONSTEXPR int slot_of(int depth_warps, int row_tile, int depth_warp) { return row_tile * depth_warps + depth_warp; }
LOWFAT_CONSTEXPR int sum_at(int token, int row) { return token * kSumStride + row; }

// --- units ---

LOWFAT_CONSTEXPR Range batches_of(int k, int splits, int split) {
  const int batches = parts_of(k, kBatch);
  return {batches * split / splits, batches * (split + 1) / splits};
}

// --- shared memory: sums, then x ---

LOWFAT_CONSTEXPR int most_batches(int k, int splits) { return parts_of(parts_of(k, kBatch), splits); }

LOWFAT_CONSTEXPR int forward_bytes(const Shape& s, int m, int batches) {
  return s.sums_bytes() + m * x_stride(batches * kBatch) * 2;
}

// --- the plan of a launch ---

struct ForwardPlan {
  int token_tiles = 0;  // 0: the kernel does not cover this problem
  int splits = 1;       // of k; more than one need a barrier of the grid
  int grid = 0;         // blocks, a multiple of the splits
  int smem_bytes = 0;
};

// Floats of workspace: what splits have summed, [splits, m, rows of all blocks].
LOWFAT_CONSTEXPR int partial_stride(int rows, int n) { return parts_of(n, rows) * rows; }

constexpr int64_t kBarrierBytes = 36 << 10;  // what a multiprocessor could have loaded in the time (estimated)

// What the multiprocessor with the most to do brings from memory, about. A warp without a batch counts as if it had one:
// loads that are not on their way save no time. What comes from L2, x and the sums of splits, counts half.
LOWFAT_CONSTEXPR int64_t busiest_bytes(const Shape& s, int64_t m, int n, int k, int splits, int sm_count) {
  const int units = parts_of(n, s.rows()) * splits, grid = smaller(units, sm_count / splits * splits);
  const int64_t batches = most_batches(k, splits), of_x = m * batches * kBatch;
  const int64_t of_warps = device::round_up(batches, s.depth_warps);
  const int64_t of_weights = parts_of(units, grid) * of_warps * s.rows() * (kBatch + kBatch / 8);
  return of_x + of_weights + (splits > 1 ? kBarrierBytes + splits * m * n * 4 / sm_count : 0);
}

// One block to a multiprocessor, which keeps the x of its split. The smallest of the splits that are done soonest.
LOWFAT_CONSTEXPR ForwardPlan plan_forward(int64_t all_m, int64_t all_n, int64_t all_k, int sm_count, int smem_limit) {
  ForwardPlan plan;
  if (all_m < 1 || all_m > kForwardTokens || all_n < 1 || all_n > kForwardMaxSize || sm_count < 1) return plan;
  if (all_k < kStep || all_k > kForwardMaxSize || all_k % kStep) return plan;
  const int m = static_cast<int>(all_m), n = static_cast<int>(all_n), k = static_cast<int>(all_k);
  const Shape shape = shape_of(token_tiles_of(m));
  int64_t least = 0;
  for (int splits = 1; splits <= smaller(sm_count, parts_of(k, kBatch)); ++splits) {
    const int bytes = forward_bytes(shape, m, most_batches(k, splits));
    if (bytes > smem_limit) continue;
    const int64_t cost = busiest_bytes(shape, m, n, k, splits, sm_count);
    if (plan.token_tiles > 0 && cost >= least) continue;
    least = cost;
    plan.token_tiles = shape.token_tiles;
    plan.splits = splits;
    plan.grid = smaller(parts_of(n, shape.rows()) * splits, sm_count / splits * splits);
    plan.smem_bytes = bytes;
  }
  return plan;
}

}  // namespace sparse24
