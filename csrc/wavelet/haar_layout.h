// Who does what in the kernels of wavelet, which take the Haar transform of one level, and where it lies: pure functions of
// the sizes, for kernels, the host and tests.
//
// A pair goes from a half of the inputs to a half of the outputs: 0 is low, the sums of neighbours, 1 is high, the
// differences. One pair is LL, two are LL, HH, four are LL, LH, HL, HH (to, from), and each has its own factors.
#pragma once

#include <cstdint>

#include "low_rank/backward_layout.h"

namespace wavelet {

using device::larger, device::parts_of, device::round_up, device::smaller;

constexpr float kRootHalf = 0.70710678f;  // what a sum or difference is multiplied by

// --- pairs ---

// Of all pairs, the half that number `pair` comes from, and the one that it goes to.
LOWFAT_CONSTEXPR int source_of(int pairs, int pair) { return pairs == 4 ? pair % 2 : pair; }
LOWFAT_CONSTEXPR int target_of(int pairs, int pair) { return pairs == 4 ? pair / 2 : pair; }

// How many have this half at one of their ends, and which these are.
LOWFAT_CONSTEXPR int pairs_at(int pairs, int half) { return pairs == 4 ? 2 : half < pairs ? 1 : 0; }
LOWFAT_CONSTEXPR int pair_into(int pairs, int target, int i) { return pairs == 4 ? 2 * target + i : target; }
LOWFAT_CONSTEXPR int pair_from(int pairs, int source, int i) { return pairs == 4 ? source + 2 * i : source; }

// Where a row's number lies in a factor of `width` coefficients to a half: v [r, pairs width] has them along its rows, u
// [pairs width, r] has a row for each.
LOWFAT_CONSTEXPR int64_t place_in_v(int pairs, int width, int pair, int rank, int coefficient) {
  return (int64_t{rank} * pairs + pair) * width + coefficient;
}
LOWFAT_CONSTEXPR int64_t place_in_u(int r, int width, int pair, int rank, int coefficient) {
  return (int64_t{pair} * width + coefficient) * r + rank;
}

// --- the middle: tiles and stages are those of low_rank's backward kernels ---

constexpr int kTile = low_rank::kSmallTile;  // rows of x, numbers of the middle; coefficients of outputs
constexpr int kThreads = low_rank::kBackwardThreads;
constexpr int kDepth = low_rank::tile_depth(kTile);  // features of a stage
constexpr int kMaxMiddle = 256;                      // pairs r: above, a tile of x would be read too often
constexpr int kFactorStages = 2;                     // one in use, one being written

// What a thread brings of a stage's factor, 16 bytes: of v, eight coefficients of one column of the middle; of u, eight
// columns of one coefficient.
struct FactorPiece {
  int column, coefficient;
};
LOWFAT_CONSTEXPR FactorPiece piece_of_v(int thread) { return {thread / 4, thread % 4 * 8}; }
LOWFAT_CONSTEXPR FactorPiece piece_of_u(int thread) { return {thread % 8 * 8, thread / 8}; }

// --- outputs: a block has 64 rows of the middle, and goes through tiles of 64 coefficients of each half ---

// Of a pair's rank, in whole steps of the tensor core.
LOWFAT_CONSTEXPR int padded_rank(int r) { return static_cast<int>(round_up(r, 16)); }

// 16-byte pieces from row to row of what lies along the contraction: an odd number, so that eight rows' pieces of one column
// lie in different banks.
LOWFAT_CONSTEXPR int row_pieces(int contraction) { return contraction / 8 + 1; }

// Pieces of shared memory: of the middle, and of a tile's factor, of all pairs.
LOWFAT_CONSTEXPR int middle_pieces(int r, int pairs) { return kTile * row_pieces(pairs * padded_rank(r)); }
LOWFAT_CONSTEXPR int factor_pieces(int r, int pairs, bool is_along) {
  return pairs * (is_along ? kTile * row_pieces(padded_rank(r)) : padded_rank(r) * (kTile / 8));
}
LOWFAT_CONSTEXPR int output_smem_bytes(int r, int pairs, bool is_along) {
  return 16 * (middle_pieces(r, pairs) + 2 * factor_pieces(r, pairs, is_along));
}

constexpr int kOutputSmemBytes = 112 << 10;  // at most; two blocks share a multiprocessor of an sm_90

// --- plans ---

struct ForwardPlan {
  int splits = 0;        // of the features, for the middle; 0: the kernels do not cover this problem
  int parts = 0;         // of the outputs, of each tile of rows
  int64_t partials = 0;  // floats of workspace: what splits have summed
};

enum BackwardNeeds { kNeedsDx = 1, kNeedsDv = 2, kNeedsDgain = 4, kNeedsDu = 8 };

struct BackwardPlan {
  ForwardPlan dx;          // of dh and dx: the forward's with the factors exchanged
  ForwardPlan h;           // of h, should it have to be computed again
  int weight_splits = 0;   // of m, for dv and du; 0: the kernels do not cover this problem
  int64_t partials = 0;    // floats of workspace, for one after the other
};

// From `size` features to `outputs`.
LOWFAT_CONSTEXPR ForwardPlan plan_forward(int64_t m, int64_t outputs, int64_t size, int64_t r, int64_t pairs, int sm_count) {
  ForwardPlan plan;
  const int64_t most = 1 << 24;
  if (m < 1 || m > most || size < 16 || size > most || outputs < 16 || outputs > most || sm_count < 1) return plan;
  if (size % 16 || outputs % 16 || r < 8 || r % 8) return plan;  // a half's rows are whole pieces of 16 bytes
  if ((pairs != 1 && pairs != 2 && pairs != 4) || r > kMaxMiddle || pairs * r > kMaxMiddle) return plan;
  const int rows = parts_of(static_cast<int>(m), kTile), middle = static_cast<int>(pairs * r);
  const int64_t tiles = int64_t{rows} * parts_of(middle, kTile);
  plan.splits = low_rank::splits_for(tiles, parts_of(static_cast<int>(size), kDepth), sm_count);
  plan.parts = smaller(parts_of(static_cast<int>(outputs), 2 * kTile), larger(1, 2 * sm_count / rows));
  plan.partials = plan.splits * m * middle;
  return plan;
}

// Tiles of dv, or of du: the middle times the features.
LOWFAT_CONSTEXPR int64_t weight_tiles(int64_t middle, int64_t size) {
  return device::ceil_div(middle, kTile) * device::ceil_div(size, kTile);
}

LOWFAT_CONSTEXPR int64_t weight_elements(int64_t n, int64_t k, int64_t middle, int needs) {
  return (needs & kNeedsDv ? k / 2 * middle : 0) + (needs & kNeedsDu ? n / 2 * middle : 0);
}

// The floats of workspace that a plan needs, also one whose splits a test has changed.
LOWFAT_CONSTEXPR int64_t partials_of(const BackwardPlan& plan, int64_t m, int64_t n, int64_t k, int64_t middle, int needs) {
  const int64_t of_weights = plan.weight_splits > 1 ? plan.weight_splits * weight_elements(n, k, middle, needs) : 0;
  const int64_t of_middle = larger(plan.dx.splits, plan.h.splits) * m * middle;
  return of_weights > of_middle ? of_weights : of_middle;
}

LOWFAT_CONSTEXPR BackwardPlan plan_backward(int64_t m, int64_t n, int64_t k, int64_t r, int64_t pairs, int needs,
                                            int sm_count) {
  BackwardPlan plan;
  plan.dx = plan_forward(m, k, n, r, pairs, sm_count);
  plan.h = plan_forward(m, n, k, r, pairs, sm_count);
  if (plan.dx.splits == 0 || plan.h.splits == 0) return plan;
  const int64_t of_dv = needs & kNeedsDv ? weight_tiles(pairs * r, k) : 0;
  const int64_t of_du = needs & kNeedsDu ? weight_tiles(pairs * r, n) : 0, tiles = of_dv + of_du;
  plan.weight_splits = low_rank::splits_for(tiles > 0 ? tiles : 1, parts_of(static_cast<int>(m), kDepth), sm_count);
  plan.partials = partials_of(plan, m, n, k, pairs * r, needs);
  return plan;
}

}  // namespace wavelet
