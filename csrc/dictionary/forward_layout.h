// Who does what in the decode kernel of dictionary, and where it lies: pure functions of the sizes, for the kernel, the host
// and tests. On top of low_rank/decode_layout.h: the first factor is the dictionary; of the second one, the coefficients, a
// block takes its tiles in chunks, as much at a time as its shared memory holds.
#pragma once

#include "low_rank/decode_layout.h"

namespace dictionary {

using low_rank::kDecodeWarps, low_rank::kStep, low_rank::kTileRows, low_rank::kTokenTile, low_rank::Range;
using low_rank::larger, low_rank::parts_of, low_rank::SecondShare, low_rank::share, low_rank::smaller;

using device::kWordBits;
static_assert(kStep == kWordBits, "a step is a word of each row's bitmap");

// A row of the coefficients: so many of `atoms` are stored.
struct Row {
  int atoms, stored;

  LOWFAT_CONSTEXPR int words() const { return parts_of(atoms, kWordBits); }
  LOWFAT_CONSTEXPR int tile_bytes() const { return kTileRows * (stored * 2 + words() * 4); }   // values, then bitmaps
  LOWFAT_CONSTEXPR int counts_bytes() const { return parts_of(kTileRows * words() * 2, 16) * 16; }  // of a tile
};

// --- chunks: neighbouring tiles of a block ---

LOWFAT_CONSTEXPR int chunks_of(const Range& tiles, int at_once) { return parts_of(tiles.last - tiles.first, at_once); }

LOWFAT_CONSTEXPR Range chunk_of(const Range& tiles, int at_once, int number) {
  const int first = tiles.first + number * at_once;
  return {first, smaller(first + at_once, tiles.last)};
}

// The (tile, step) items of a chunk, cut into a piece for each warp.
LOWFAT_CONSTEXPR SecondShare items_of_chunk(const Range& chunk, const Row& row) {
  const int tiles = chunk.last - chunk.first;
  return {{0, tiles}, row.words(), parts_of(tiles * row.words(), kDecodeWarps)};
}

// --- values in front of a word ---

constexpr int kCountParts = low_rank::kDecodeThreads / kTileRows;  // threads that share a row of a tile

// The words of a row that its thread number `part` counts.
LOWFAT_CONSTEXPR Range words_of_part(const Row& row, int part) { return share(row.words(), kCountParts, part); }

// --- shared memory ---

// Offsets in bytes.
struct ForwardMemory {
  int h;       // [tokens, h_stride] elements; in front of it sums, as of low_rank
  int parts;   // [kTileRows, kCountParts] counts of a tile, while it is counted
  int counts;  // [tiles, kTileRows, words] of the values in front of each word
  int chunks;  // [buffers][tiles]: values [rows, stored] and, behind those of all rows of the chunk, bitmaps [rows, words]
  int bytes;
};

LOWFAT_CONSTEXPR ForwardMemory forward_memory(int token_tiles, const Row& row, int at_once, int buffers) {
  const int h = low_rank::slots_for(at_once) * low_rank::slot_floats(token_tiles) * 4;
  const int parts = h + token_tiles * kTokenTile * low_rank::h_stride(row.atoms) * 2;
  const int counts = parts + kTileRows * kCountParts * 2;
  const int chunks = counts + at_once * row.counts_bytes();
  return {h, parts, counts, chunks, chunks + buffers * at_once * row.tile_bytes()};
}

// --- the plan of a launch ---

struct ForwardPlan {
  int token_tiles = 0;  // 0: the kernel does not cover this problem
  int splits = 0;       // of k
  int grid = 0;         // blocks
  int at_once = 0;      // tiles of a chunk
  int buffers = 0;      // 1: a block has one chunk; 2: it asks for the next one while it has this one
  int smem_bytes = 0;
};

// The sizes of one block: P = Q = 1. Rows come by eights, so that every run of them is whole pieces of 16 bytes.
LOWFAT_CONSTEXPR ForwardPlan plan_forward(int64_t m, int64_t n, int64_t k, int64_t a, int64_t s, int sm_count,
                                          int smem_limit) {
  ForwardPlan plan;
  if (!low_rank::is_covered(m, k, a) || n < 8 || n % 8 || n > low_rank::kDecodeMaxColumns || sm_count < 1) return plan;
  if (s < 1 || s > a) return plan;
  const Row row{static_cast<int>(a), static_cast<int>(s)};
  const int row_tiles = parts_of(row.atoms, kTileRows), column_tiles = parts_of(static_cast<int>(n), kTileRows);
  plan.splits = low_rank::splits_of(row_tiles, k, sm_count);
  plan.grid = larger(low_rank::blocks_for(row_tiles * plan.splits, sm_count), low_rank::blocks_for(column_tiles, sm_count));
  plan.at_once = parts_of(column_tiles, plan.grid);
  plan.buffers = 1;
  const int most = larger(1, smem_limit / row.tile_bytes());  // no more fit alone; bytes of all a block has may pass 2^31
  if (plan.at_once > most) plan.at_once = most, plan.buffers = 2;
  const int token_tiles = m <= kTokenTile ? 1 : 2;
  while (forward_memory(token_tiles, row, plan.at_once, plan.buffers).bytes > smem_limit) {
    if (plan.at_once == 1) return ForwardPlan();
    --plan.at_once;
    plan.buffers = 2;
  }
  plan.token_tiles = token_tiles;
  plan.smem_bytes = forward_memory(token_tiles, row, plan.at_once, plan.buffers).bytes;
  return plan;
}

}  // namespace dictionary
