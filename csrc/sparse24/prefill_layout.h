// Who does what in the prefill kernel of sparse24, and where it lies: pure functions of the sizes, for the kernel, the host
// and tests.
//
// A slab is 64 inputs: two sparse products. A tile is some rows of the weight times some rows of x (tokens), and a block has
// every grid-th of them, with all of k.
#pragma once

#include "sparse24/forward_layout.h"

namespace sparse24 {

constexpr int kSlab = 64;                                              // inputs
constexpr int kValuePieces = kSlab / 2 / 8, kTokenPieces = kSlab / 8;  // of a row of a slab, 16 bytes each
constexpr int kMaskWords = kSlab / 32;                                 // of a row of a slab
constexpr int kPatchRows = 8;                                          // tiles of rows that blocks go through together

constexpr int kPrefillWhole = 16;  // k is a multiple: rows of values are whole pieces
constexpr int64_t kPrefillMaxTokens = 1 << 24;
constexpr int64_t kPrefillMaxTiles = 1 << 30;

// --- the shape of a block ---

struct PrefillShape {
  int row_warps, token_warps;
  int row_tiles, token_tiles;  // of a warp: 16 rows of the weight, 8 tokens
  int stages;                  // one in use, the others on their way
  int blocks;                  // that share a multiprocessor at most: their threads share its registers

  LOWFAT_CONSTEXPR int threads() const { return row_warps * token_warps * 32; }
  LOWFAT_CONSTEXPR int warp_rows() const { return row_tiles * kTileRows; }
  LOWFAT_CONSTEXPR int warp_tokens() const { return token_tiles * kTokenTile; }
  LOWFAT_CONSTEXPR int rows() const { return row_warps * warp_rows(); }
  LOWFAT_CONSTEXPR int tokens() const { return token_warps * warp_tokens(); }
  LOWFAT_CONSTEXPR int stage_bytes() const {
    return rows() * (kValuePieces * 16 + kMaskWords * 4) + tokens() * kTokenPieces * 16;
  }
  LOWFAT_CONSTEXPR int smem_bytes() const { return stages * stage_bytes(); }
};

// By the rows of a tile. Of 32 inputs, a warp with 64 rows x 64 tokens reads 6 KB of shared memory, 48 clocks of it, and
// multiplies for 64; with 64 x 32 both take 32. And 256 rows x 128 tokens want the fewest bytes from L2 of all tiles of their
// size, because a row is 9/16 of a token. Where these would be fewer than multiprocessors, they are cut smaller.
LOWFAT_CONSTEXPR PrefillShape prefill_shape(int rows) {
  if (rows == 256) return {4, 2, 4, 8, 4, 1};
  return rows == 128 ? PrefillShape{2, 4, 4, 4, 3, 2} : PrefillShape{2, 2, 2, 4, 4, 4};
}

constexpr int kPrefillRows[] = {256, 128, 64};

// --- shared memory ---

// Which of a warp's rows is in slot `slot` of its part of a stage. Rows of fragments follow each other there, so that
// ldmatrix meets no bank twice; and those that a lane has sums of, lane / 4 and 8 below of each fragment, follow each other
// in the weight: of a token they are neighbours in y.
LOWFAT_CONSTEXPR int row_in_slot(int row_tiles, int slot) { return slot % 8 * (2 * row_tiles) + slot / 8; }

// The row of the tile in a slot of the stage.
LOWFAT_CONSTEXPR int tile_row_in_slot(int row_tiles, int slot) {
  const int warp_rows = row_tiles * kTileRows;
  return slot / warp_rows * warp_rows + row_in_slot(row_tiles, slot % warp_rows);
}

// In pieces of 16 bytes.
LOWFAT_CONSTEXPR int value_place(int slot, int piece) {
  return static_cast<int>(device::swizzled_narrow_piece<kValuePieces * 16>(slot, piece)) / 16;
}
LOWFAT_CONSTEXPR int token_place(int token, int piece) {
  return static_cast<int>(device::swizzled_piece(token, piece)) / 16;
}

// Where lane t of a quad finds the mask of the 16 inputs that it tells the tensor core about, in units of 16 bits: lanes 0
// and 1 those of the first product, 2 and 3 those of the second.
LOWFAT_CONSTEXPR int mask_place(int slot, int t) { return slot * (2 * kMaskWords) + t; }

// --- tiles ---

struct PrefillTile {
  int row, token;  // the first ones
};

// Of `rows` x `tokens` each, row_tiles x token_tiles of them. Blocks that run together have neighbouring tiles: a patch is
// eight tiles of rows, with all tokens, its rows first.
LOWFAT_CONSTEXPR PrefillTile prefill_tile(int rows, int tokens, int row_tiles, int token_tiles, int index) {
  const int patch = index / (kPatchRows * token_tiles), in_patch = index % (kPatchRows * token_tiles);
  const int down = smaller(kPatchRows, row_tiles - patch * kPatchRows);
  return {(patch * kPatchRows + in_patch % down) * rows, in_patch / down * tokens};
}

LOWFAT_CONSTEXPR int64_t prefill_tiles(const PrefillShape& s, int64_t m, int64_t n) {
  return device::ceil_div(n, s.rows()) * device::ceil_div(m, s.tokens());
}

// --- the plan of a launch ---

struct PrefillPlan {
  int rows = 0;  // of a tile: 256, 128, 64; 0: the kernel does not cover this problem
  int tokens = 0;
  int grid = 0;  // blocks
  int smem_bytes = 0;
};

// Clocks of a multiprocessor for a slab of a tile, about: 2048 multiply-adds of the dense product in each, or 32 bytes from
// L2 (estimated).
LOWFAT_CONSTEXPR int64_t slab_clocks(const PrefillShape& s) {
  return device::larger(s.rows() * s.tokens() * kSlab / 2048, s.stage_bytes() / 32);
}

// The tiles that are done soonest; the larger of equals.
LOWFAT_CONSTEXPR PrefillPlan plan_prefill(int64_t m, int64_t n, int64_t k, int sm_count, int smem_limit) {
  PrefillPlan plan;
  if (m < 1 || m > kPrefillMaxTokens || n < 1 || n > kForwardMaxSize || sm_count < 1) return plan;
  if (k < kPrefillWhole || k > kForwardMaxSize || k % kPrefillWhole) return plan;
  int64_t least = 0;
  for (const int rows : kPrefillRows) {
    const PrefillShape s = prefill_shape(rows);
    const int64_t tiles = prefill_tiles(s, m, n), cost = device::ceil_div(tiles, sm_count) * slab_clocks(s);
    if (s.smem_bytes() > smem_limit || tiles > kPrefillMaxTiles || (plan.rows > 0 && cost >= least)) continue;
    least = cost;
    const int resident = smaller(s.blocks, (smem_limit + 1024) / (s.smem_bytes() + 1024));  // each block takes 1 KB more
    plan.rows = rows;
    plan.tokens = s.tokens();
    plan.grid = static_cast<int>(tiles < resident * sm_count ? tiles : resident * sm_count);
    plan.smem_bytes = s.smem_bytes();
  }
  return plan;
}

}  // namespace sparse24
