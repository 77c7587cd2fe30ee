// Who does what in the decode kernel of low_rank_sparse, and where it lies, on top of low_rank/decode_layout.h: a block's
// rows of S are those of its tiles of u.
#pragma once

#include "low_rank_sparse/support_layout.h"

namespace low_rank_sparse {

using low_rank::DecodeMemory, low_rank::kDecodeWarps, low_rank::kTileRows, low_rank::kTokenTile;

constexpr int kDecodeTokens = 2 * kTokenTile;  // m, at most
constexpr int kPiece = 8;                      // columns or values in 16 bytes
static_assert(low_rank::kDecodeMaxDepth <= 1 << 15, "columns are int16");

// --- x in shared memory: of each input, `tokens` rows of x beside each other; more rows take more passes ---

LOWFAT_CONSTEXPR int passes_of(int m, int tokens) { return parts_of(m, tokens); }

// As many as m has, up to a power of two.
LOWFAT_CONSTEXPR int tokens_for(int m) {
  int tokens = 1;
  while (tokens < m) tokens *= 2;
  return tokens;
}

// --- entries in shared memory: whole pieces, from the one that a block's first entry is in ---

struct Held {
  int first;  // entry in shared memory's first place: a multiple of kPiece
  int last;   // the first that is not held
};

// Of a block's entries, with `room` for so many.
LOWFAT_CONSTEXPR Held held_of(const Range& entries, int room) {
  const int first = entries.first / kPiece * kPiece;
  return {first, larger(entries.first, smaller(entries.last, first + room))};
}

// --- shared memory ---

// Offsets in bytes, behind low_rank's.
struct SparseMemory {
  DecodeMemory low_rank;
  int sums;     // [tiles, kTileRows, token tiles x 8] floats: what S adds to y
  int x;        // [k, tokens] elements
  int starts;   // [tiles x kTileRows + 1] of the block's rows
  int columns;  // [room] int16
  int values;   // [room] elements
  int bytes;
};

struct SparseShape {
  int token_tiles, tiles, k, r;
  int tokens;    // of x that are in shared memory at a time
  int room;      // for entries, a multiple of kPiece
  int prefetch;  // items of u that each warp asks for
};

LOWFAT_CONSTEXPR SparseMemory sparse_memory(const SparseShape& s) {
  const DecodeMemory first = low_rank::decode_memory(s.token_tiles, s.tiles, s.r, s.prefetch);
  const int sums = first.bytes, x = sums + s.tiles * kTileRows * s.token_tiles * kTokenTile * 4;
  const int starts = x + s.k * s.tokens * 2, columns = starts + (s.tiles * kTileRows + 4) * 4;  // a multiple of 16 bytes
  const int values = columns + s.room * 2;
  return {first, sums, x, starts, columns, values, values + s.room * 2};
}

// --- the plan of a launch ---

struct DecodePlan {
  int token_tiles = 0;  // 0: the kernel does not cover this problem
  int splits = 0;       // of k
  int grid = 0;         // blocks
  int tiles = 0;        // of u in a block, at most
  int tokens = 0, room = 0, prefetch = 0;  // see SparseShape
  int smem_bytes = 0;
};

// Entries that a block asks for before h is known: what its rows have on average, and an eighth more; the others are read as
// they are needed.
LOWFAT_CONSTEXPR int64_t room_wanted(int64_t entries, int64_t n, int64_t rows) {
  const int64_t usual = device::ceil_div(entries * rows, n);
  return device::round_up(usual + usual / 8 + kPiece, kPiece);
}

// x may have what is left when u and S have all that they want, or a quarter of the memory; but for one row it need not
// leave that much. k is at most kDecodeMaxDepth, so that columns are int16.
LOWFAT_CONSTEXPR DecodePlan plan_decode(int64_t m, int64_t n, int64_t k, int64_t r, int64_t entries, int sm_count,
                                        int smem_limit) {
  const low_rank::DecodePlan first = low_rank::plan_decode(m, n, k, r, sm_count, smem_limit, false);
  if (first.token_tiles == 0 || entries < 0 || entries > kMostEntries) return DecodePlan();
  SparseShape s{first.token_tiles, first.tiles, static_cast<int>(k), static_cast<int>(r), tokens_for(static_cast<int>(m)),
                0, 0};
  const int items = s.tiles * parts_of(s.r, low_rank::kStep);
  const int64_t room = room_wanted(entries, n, int64_t{s.tiles} * kTileRows);
  const int64_t of_u = int64_t{parts_of(items, kDecodeWarps)} * kDecodeWarps * low_rank::kItemBytes, of_s = 4 * room;
  const int least = smem_limit / 4 < of_u + of_s ? smem_limit / 4 : static_cast<int>(of_u + of_s);
  while (s.tokens > 1 && smem_limit - sparse_memory(s).bytes < least) s.tokens /= 2;
  const int left = smem_limit - sparse_memory(s).bytes;
  if (left < 0) return DecodePlan();
  // u and S have what they want, or half of it each, or what the other leaves
  const int64_t for_s = of_u < left / 2 ? left - of_u : left / 2;
  s.room = static_cast<int>(of_s < for_s ? room : for_s / 4 / kPiece * kPiece);
  if (s.room < kPiece) return DecodePlan();  // the piece that a block's first entry is in is always held
  s.prefetch = low_rank::prefetch_of(items, sparse_memory(s).bytes, smem_limit);
  return {s.token_tiles, first.splits, first.grid, s.tiles, s.tokens, s.room, s.prefetch, sparse_memory(s).bytes};
}

}  // namespace low_rank_sparse
