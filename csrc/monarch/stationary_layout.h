// Who does what in the weight-stationary clusters of monarch, and where it lies: pure functions of the sizes, for the
// kernel, the host and tests.
//
// A cluster of 8 CTAs holds both factors: each CTA an eighth of the input blocks (of v) and of the output blocks (of u).
// What it makes of h[o] is a run of rows, all of its input blocks' ranks; h[o] whole is with the CTA that has output block o.
#pragma once

#include "monarch/batched_layout.h"

namespace monarch {

constexpr int kClusterCtas = 8;       // that every sm_90 can place
constexpr int kBlocksAtOnce = 2;      // input blocks that come, and are multiplied, together
constexpr int kFewestBlocks = kClusterCtas * kBlocksAtOnce;  // and the number of blocks is a multiple of it
constexpr int kWeightRows = 64;       // of a weight's tile: the tall operand of a warpgroup's product
constexpr int kWeightTileBytes = kWeightRows * kSlab * 2;
constexpr int kStationaryThreads = 3 * 128;  // a warpgroup for each product; of the third a warp for weights, one for tokens
constexpr int kMostMiddles = 2, kMostInputs = 16;     // slots of the two rings
constexpr int kStationaryBarrierBytes = (2 + 2 * kMostMiddles + 2 * kMostInputs) * 8;

// --- a CTA's part of a factor ---

// So many blocks with a weight [rows, depth] each, as tiles of 64 rows by a slab, the slabs of the same rows together.
struct Part {
  int blocks, rows, depth;

  LOWFAT_CONSTEXPR int row_tiles() const { return parts_of(rows, kWeightRows); }
  LOWFAT_CONSTEXPR int slabs() const { return parts_of(depth, kSlab); }
  LOWFAT_CONSTEXPR int tile(int block, int row_tile) const { return (block * row_tiles() + row_tile) * slabs(); }
  LOWFAT_CONSTEXPR int bytes() const { return tile(blocks, 0) * kWeightTileBytes; }
};

LOWFAT_CONSTEXPR Part first_part(const Sizes& s) { return {s.b_in / kClusterCtas, s.r * s.b_out, s.p()}; }
LOWFAT_CONSTEXPR Part second_part(const Sizes& s) { return {s.b_out / kClusterCtas, s.s(), s.b_in * s.r}; }

// --- the middle: h[o] of a tile of tokens is [b_in r][tokens], rows of row_bytes, swizzled ---

LOWFAT_CONSTEXPR int row_bytes(int tokens) { return tokens * 2; }

// What a CTA sends of each h[o]: rows run_rows(s) * rank on.
LOWFAT_CONSTEXPR int run_rows(const Sizes& s) { return s.b_in / kClusterCtas * s.r; }

// Row q of v[i], i the CTA's i-th block: of output block q % b_out, this row of the run.
LOWFAT_CONSTEXPR int row_in_run(const Sizes& s, int block, int q) { return block * s.r + q / s.b_out; }

// From run to run where they wait to be sent. 16 more, so that lanes with one row of neighbouring runs meet no bank twice.
LOWFAT_CONSTEXPR int run_stride(const Sizes& s, int tokens) { return run_rows(s) * row_bytes(tokens) + 16; }

LOWFAT_CONSTEXPR int staging_bytes(const Sizes& s, int tokens) { return s.b_out * run_stride(s, tokens); }
LOWFAT_CONSTEXPR int block_bytes(const Sizes& s, int tokens) { return s.b_in * s.r * row_bytes(tokens); }  // of an h[o]
LOWFAT_CONSTEXPR int middle_bytes(const Sizes& s, int tokens) { return s.b_out / kClusterCtas * block_bytes(s, tokens); }

// Tokens of an input block: slabs of [tokens][64]. A slot has those of kBlocksAtOnce.
LOWFAT_CONSTEXPR int slab_bytes(int tokens) { return tokens * kSlab * 2; }
LOWFAT_CONSTEXPR int input_bytes(const Part& first, int tokens) { return first.slabs() * slab_bytes(tokens); }
LOWFAT_CONSTEXPR int input_slot_bytes(const Part& first, int tokens) { return kBlocksAtOnce * input_bytes(first, tokens); }

// Outputs that are neighbours in y go through a patch [tokens][16 columns] of each warp of the second product; 16 bytes from
// row to row are free, so that the eight rows of a matrix meet no bank twice.
constexpr int kPatchStride = 48;
LOWFAT_CONSTEXPR int patch_bytes(int tokens) { return tokens * kPatchStride; }

// --- the plan of a launch ---

struct StationaryPlan {
  int tokens = 0;    // of a tile: 16 or 32; 0: the kernel does not cover this problem
  int together = 0;  // output blocks of a CTA that are multiplied together, neighbours in an interleaved y: 2, 4 or 8
  int middles = 0;   // tiles between the two products
  int inputs = 0;    // pairs of input blocks whose tokens there is room for
  int tiles = 0, clusters = 0;
  int smem_bytes = 0;
};

struct StationaryMemory {
  int v, u, middles, inputs, staging, patches, bias, barriers;  // offsets in bytes; the first four at multiples of 1024
  int bytes;
};

LOWFAT_CONSTEXPR StationaryMemory stationary_memory(const Sizes& s, int tokens, int middles, int inputs) {
  StationaryMemory at{};
  at.u = first_part(s).bytes();
  at.middles = at.u + second_part(s).bytes();
  at.inputs = at.middles + middles * middle_bytes(s, tokens);
  at.staging = at.inputs + inputs * input_slot_bytes(first_part(s), tokens);
  at.patches = at.staging + middles * staging_bytes(s, tokens);
  at.bias = at.patches + (s.interleave ? 0 : 4 * patch_bytes(tokens));
  at.barriers = at.bias + static_cast<int>(device::round_up(second_part(s).blocks * s.s() * 2, 16));
  at.bytes = at.barriers + kStationaryBarrierBytes;
  return at;
}

// Pairs of input blocks whose tokens fit beside all else, up to two tiles of them; 0: not even one does.
LOWFAT_CONSTEXPR int inputs_with_room(const Sizes& s, int tokens, int middles, int smem_limit) {
  const int left = smem_limit - stationary_memory(s, tokens, middles, 0).bytes;
  if (left < 0) return 0;
  const int most = smaller(2 * first_part(s).blocks / kBlocksAtOnce, kMostInputs);
  return smaller(most, left / input_slot_bytes(first_part(s), tokens));
}

// Output blocks of an interleaved y that lie side by side and in one CTA.
LOWFAT_CONSTEXPR int blocks_together(const Sizes& s) {
  const int blocks = s.b_out / kClusterCtas;
  return blocks % 8 == 0 ? 8 : blocks % 4 == 0 ? 4 : 2;
}

// Blocks of whole products: of 16 along each contraction, of pieces of 16 bytes in y; and factors that fit at all.
LOWFAT_CONSTEXPR bool is_stationary(int64_t m, int64_t n, int64_t k, int64_t b_in, int64_t b_out, int64_t r,
                                    bool interleave) {
  if (!is_covered(m, n, k, b_in, b_out, r)) return false;
  if (b_in % kFewestBlocks != 0 || b_out % kFewestBlocks != 0) return false;
  const int64_t p = device::ceil_div(k, b_in), s = device::ceil_div(n, b_out), most = 1 << 20;
  return p % 16 == 0 && n % 8 == 0 && (interleave || s % 8 == 0) && b_in * r * b_out * p <= most &&
         b_out * s * b_in * r <= most;
}

// Larger tiles where there are enough of them for all clusters, and room for two between the products: each tile takes its
// time to get through the cluster, whatever its size. Else 16 tokens, with as much room as there is.
LOWFAT_CONSTEXPR StationaryPlan plan_stationary(int64_t m, int64_t n, int64_t k, int64_t b_in, int64_t b_out, int64_t r,
                                                bool interleave, int sm_count, int smem_limit) {
  StationaryPlan plan;
  const int most_clusters = sm_count / kClusterCtas;
  if (most_clusters < 1 || !is_stationary(m, n, k, b_in, b_out, r, interleave)) return plan;
  const Sizes s{static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), static_cast<int>(b_in),
                static_cast<int>(b_out), static_cast<int>(r), interleave};
  struct Choice {
    int tokens, middles, fewest_inputs;
  };
  const int tile = first_part(s).blocks / kBlocksAtOnce;
  for (const Choice& one : {Choice{32, 2, tile}, Choice{16, 2, tile}, Choice{16, 1, 1}}) {
    if (one.tokens == 32 && s.m <= 16 * most_clusters) continue;
    const int inputs = inputs_with_room(s, one.tokens, one.middles, smem_limit);
    if (inputs < one.fewest_inputs) continue;
    plan.tokens = one.tokens, plan.middles = one.middles, plan.inputs = inputs;
    plan.together = blocks_together(s);
    plan.tiles = parts_of(s.m, one.tokens);
    plan.clusters = smaller(most_clusters, plan.tiles);
    plan.smem_bytes = stationary_memory(s, one.tokens, one.middles, inputs).bytes;
    break;
  }
  return plan;
}

}  // namespace monarch
