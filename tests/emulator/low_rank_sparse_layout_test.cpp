// Who does what in the kernels of low_rank_sparse, for every size in range: entries have one row and one tile whatever the
// support is, shared memory has room, plans keep their limits.
#include "low_rank_sparse/low_rank_sparse_cuda.h"

#include <random>
#include <set>
#include <vector>

#include "check.h"
#include "host/gpu.h"
#include "low_rank_sparse_truth.h"

namespace {

using namespace low_rank_sparse;
using low_rank_sparse_truth::bad_rows, low_rank_sparse_truth::Rows, low_rank_sparse_truth::rows_of;

Range own(const Rows& s, int row) {
  RowSearch search(s.n, s.entries(), row);
  while (!search.is_done()) {
    check::that(search.place() >= 1 && search.place() <= s.n, "a place of starts", search.place());
    search.turn(s.starts[search.place()]);
  }
  return search.entries;
}

int row_of(const Rows& s, int entry) {
  EntrySearch search(s.n, entry);
  while (!search.is_done()) {
    check::that(search.place() >= 1 && search.place() <= s.n, "a place of starts", search.place());
    search.turn(s.starts[search.place()]);
  }
  return search.first;
}

int64_t first_from(const Rows& s, Range entries, uint32_t column) {
  ColumnSearch search{column, entries.first, entries.last};
  while (!search.is_done()) {
    check::that(search.place() >= entries.first && search.place() < entries.last, "an entry of the row", search.place());
    search.turn(static_cast<uint32_t>(s.columns[search.place()]));
  }
  return search.first;
}

// Rows 0..n share the entries, and the tiles of a row those of the row.
void each_entry_has_one_owner(const Rows& s) {
  int next = 0;
  for (int row = 0; row <= s.n; ++row) {
    const Range entries = own(s, row);
    check::equal(entries.first, next, "rows follow each other; row", row);
    check::that(entries.last >= entries.first, "not fewer than none; row", row);
    for (int e = entries.first; e < entries.last; ++e) check::equal(row_of(s, e), row, "the same, of an entry", e);
    int64_t from = entries.first;
    for (int column = 0; column <= s.k + 64; column += 64) {
      const int64_t here = first_from(s, entries, column);
      check::that(here >= from && here <= entries.last, "tiles follow each other; row", row);
      from = here;
    }
    next = entries.last;
  }
  check::equal(next, s.entries(), "all of them");
}

void each_entry_has_one_owner_whatever_the_support_is(uint64_t) {
  for (int n : {1, 2, 7, 40}) {
    for (int k : {8, 200}) {
      for (int entries : {1, n * k / 3, n * k}) {
        const Rows good = rows_of(n, k, entries);
        each_entry_has_one_owner(good);
        for (int row = 0; row < n; ++row) {
          const Range all = own(good, row), plain = entries_between(good.starts[row], good.starts[row + 1], entries);
          check::that(all.first == good.starts[row] && all.last == good.starts[row + 1], "as starts says; row", row);
          check::that(plain.first == all.first && plain.last == all.last, "either way; row", row);
          const int64_t half = first_from(good, all, k / 2);
          for (int e = all.first; e < all.last; ++e) check::that((e < half) == (good.columns[e] < k / 2), "columns", e);
        }
        for (const Rows& bad : bad_rows(good)) each_entry_has_one_owner(bad);
      }
    }
  }
}

void entries_stay_within_what_there_is(uint64_t) {
  const int least = -2147483647 - 1, most = 2147483647;
  for (int start : {least, -1, 0, 3, 7, 8, most}) {
    for (int next : {least, -1, 0, 3, 7, 8, most}) {
      const Range found = entries_between(start, next, 7);
      check::that(found.first >= 0 && found.first <= found.last && found.last <= 7, "inside", start);
      if (start >= 0 && start <= next && next <= 7) check::that(found.first == start && found.last == next, "as said", next);
    }
  }
}

void held_entries_are_whole_pieces_of_the_blocks(uint64_t) {
  for (int room : {8, 16, 64}) {
    for (int first = 0; first < 40; ++first) {
      for (int last = first; last < 120; ++last) {
        const Held held = held_of({first, last}, room);
        check::that(held.first % kPiece == 0 && held.first <= first, "from a piece on", first);
        check::that(first - held.first < kPiece, "the first's own", first);
        check::that(held.last >= first && held.last <= last, "of the block's", last);
        check::that(parts_of(held.last - held.first, kPiece) * kPiece <= room, "there is room; last", last);
        check::that(held.last == last || held.last - held.first >= room, "and no more of it; last", last);
      }
    }
  }
}

void half_a_warp_meets_no_bank_twice(uint64_t) {
  for (int tile : {kSmallTile, kLargeTile}) {
    for (int half : {0, 16}) {
      std::set<int> banks;
      for (int lane = half; lane < half + 16; ++lane) {
        const device::Position at = device::mma_d(lane, 0);
        for (int i : {0, 1}) banks.insert((at.row * tile_stride(tile) + at.column + i) % 32);
      }
      check::equal(banks.size(), 32, "banks of a write of sums; tile", tile);
    }
    check::that(tile_stride(tile) % 4 == 0 && tile_stride(tile) >= tile, "rows are 16-byte aligned; tile", tile);
  }
}

void regions_of_shared_memory_do_not_overlap(uint64_t) {
  for (int token_tiles : {1, 2}) {
    for (int tiles : {1, 3, 61}) {
      for (int k : {8, 72, 4096}) {
        for (int r : {8, 512}) {
          for (int tokens = 1; tokens <= 8 * token_tiles; tokens *= 2) {
            for (int room : {0, 8, 4432}) {
              for (int prefetch : {0, 3}) {
                const SparseMemory at = sparse_memory({token_tiles, tiles, k, r, tokens, room, prefetch});
                const int rows = tiles * kTileRows;
                for (int one : {at.sums, at.x, at.starts, at.columns, at.values}) check::equal(one % 16, 0, "aligned", one);
                check::equal(at.sums, at.low_rank.bytes, "behind low_rank's; k", k);
                check::that(at.x - at.sums >= rows * token_tiles * kTokenTile * 4, "sums; k", k);
                check::that(at.starts - at.x >= k * tokens * 2, "x; k", k);
                check::that(at.columns - at.starts >= (rows + 1) * 4, "starts; k", k);
                check::that(at.values - at.columns >= room * 2 && at.bytes - at.values >= room * 2, "entries; k", k);
              }
            }
          }
        }
      }
    }
  }
}

void plans_of_decode_keep_their_limits(uint64_t) {
  for (int sm_count : {1, 20, 108, 132}) {
    for (int limit : {101376, 166912, 232448}) {
      for (int m : {1, 3, 8, 9, 16}) {
        for (int r : {8, 512, 2048}) {
          for (int k : {8, 4096, 14336, 32768}) {
            for (int n : {1, 768, 4096, 14336, 128256}) {
              for (int64_t entries : {int64_t{0}, int64_t{n} * k / 33, int64_t{n} * k / 2}) {
                if (entries > kMostEntries) continue;
                const DecodePlan plan = plan_decode(m, n, k, r, entries, sm_count, limit);
                const low_rank::DecodePlan alone = low_rank::plan_decode(m, n, k, r, sm_count, limit, false);
                if (plan.token_tiles == 0) {
                  if (alone.token_tiles == 0) continue;
                  const SparseShape least{m <= 8 ? 1 : 2, alone.tiles, k, r, 1, 0, 0};
                  check::that(sparse_memory(least).bytes > limit, "covered, or too large; k", k);
                  continue;
                }
                check::that(plan.grid == alone.grid && plan.splits == alone.splits, "as low_rank; k", k);
                check::equal(plan.tiles, alone.tiles, "tiles, as low_rank; k", k);
                const SparseShape s{plan.token_tiles, plan.tiles, k, r, plan.tokens, plan.room, plan.prefetch};
                check::equal(plan.smem_bytes, sparse_memory(s).bytes, "bytes; k", k);
                check::that(plan.smem_bytes <= limit, "what a block may have; k", k);
                check::that(plan.tokens <= 8 * plan.token_tiles && plan.tokens < 2 * m, "no more rows than there are; m", m);
                const int64_t wanted = room_wanted(entries, n, int64_t{plan.tiles} * kTileRows);
                check::that(plan.room % kPiece == 0 && plan.room <= wanted, "no room for what is not there; n", n);
                const bool has_all = plan.room == wanted && plan.prefetch == parts_of(s.tiles * parts_of(r, 32), 8);
                const int left = limit - plan.smem_bytes + plan.room * 4 + plan.prefetch * 8192;
                check::that(has_all || plan.tokens == 1 || left >= limit / 4 - 8, "x leaves room for u and S; k", k);
              }
            }
          }
        }
      }
    }
  }
  const auto is_covered = [](int64_t m, int64_t n, int64_t k, int64_t r, int64_t entries) {
    return plan_decode(m, n, k, r, entries, 132, 232448).token_tiles > 0;
  };
  check::that(is_covered(1, 1, 8, 8, 0) && is_covered(16, 128256, 4096, 512, kMostEntries), "the ends of the range");
  for (int64_t m : {0, 17}) check::that(!is_covered(m, 8, 8, 8, 1), "m", m);
  for (int64_t k : {0, 12, 32776}) check::that(!is_covered(1, 8, k, 8, 1), "k", k);
  for (int64_t r : {0, 12, 2056}) check::that(!is_covered(1, 8, 8, r, 1), "r", r);
  for (int64_t entries : {int64_t{-1}, kMostEntries + 1}) check::that(!is_covered(1, 8, 8, 8, entries), "entries", entries);
}

void plans_of_tiles_keep_their_limits(uint64_t) {
  const auto tile = [](int64_t n, int64_t k, int64_t r, int64_t entries) {
    return plan_materialize(n, k, r, entries, 132).tile;
  };
  check::equal(tile(4096, 4096, 512, 500000), kLargeTile, "a layer of a model");
  check::equal(tile(768, 768, 0, 0), kSmallTile, "one that leaves multiprocessors idle, of nothing");
  check::equal(plan_materialize(4097, 4096, 8, 1, 132).grid, 33 * 32, "blocks");
  check::that(tile(1, 8, 8, kMostEntries) && tile(1 << 24, 8, 8, 1), "the ends of the range");
  for (int64_t n : {int64_t{0}, (int64_t{1} << 24) + 8}) check::equal(tile(n, 8, 8, 1), 0, "n", n);
  for (int64_t k : {int64_t{0}, int64_t{12}, (int64_t{1} << 24) + 8}) check::equal(tile(8, k, 8, 1), 0, "k", k);
  for (int64_t r : {-8, 12}) check::equal(tile(8, 8, r, 1), 0, "r", r);
  for (int64_t entries : {int64_t{-1}, kMostEntries + 1}) check::equal(tile(8, 8, 8, entries), 0, "entries", entries);
  check::equal(tile(1 << 24, 1 << 24, 8, 1), 0, "blocks of a grid");

  for (int64_t m : {1, 64, 65, 2048, 65536, 1 << 24}) {
    for (int64_t n : {8, 768, 4096, 128256}) {
      for (int64_t k : {8, 200, 4096, 28672}) {
        for (int64_t entries : {int64_t{1}, int64_t{13}, n * k / 33 + 1}) {
          for (int needs : {0, 1, 2, 3}) {
            for (int sm_count : {1, 20, 132}) {
              const BackwardPlan plan = plan_backward(m, n, k, entries, needs, sm_count);
              check::equal(plan.tile, m <= 64 || n <= 64 || k <= 64 ? 64 : 128, "tile; m", m);
              const int64_t tiles = select_tiles(n, k, needs, plan.tile);
              const int64_t steps = device::ceil_div(m, low_rank::tile_depth(plan.tile));
              check::that(plan.splits >= 1 && plan.splits <= steps, "each split has a step; m", m);
              check::that(plan.splits == 1 || plan.splits * tiles <= 2 * sm_count, "two blocks to a multiprocessor; m", m);
              const int64_t each = (needs & 1 ? padded_entries(entries) : 0) + (needs & 2 ? n : 0);
              check::equal(plan.partials, plan.splits > 1 ? plan.splits * each : 0, "workspace; m", m);
              check::that(padded_entries(entries) % 8 == 0 && padded_entries(entries) - entries < 8, "whole loads", entries);
            }
          }
        }
      }
    }
  }
  const auto is_covered = [](int64_t m, int64_t n, int64_t k, int64_t entries) {
    return plan_backward(m, n, k, entries, 3, 132).tile > 0;
  };
  check::that(is_covered(1, 8, 8, 1) && is_covered(1 << 24, 8, 8, kMostEntries), "the ends of the range");
  for (int64_t m : {int64_t{0}, int64_t{1} << 40}) check::that(!is_covered(m, 8, 8, 1), "m", m);
  for (int64_t n : {0, 4, 12}) check::that(!is_covered(64, n, 8, 1), "n", n);
  for (int64_t k : {0, 4, 12}) check::that(!is_covered(64, 8, k, 1), "k", k);
  for (int64_t entries : {int64_t{0}, kMostEntries + 1}) check::that(!is_covered(64, 8, 8, entries), "entries", entries);
  for (int arch : {80, 86, 89, 90}) check::that(shared_memory_of(arch) >= kTileSmemBytes, "shared memory", arch);
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"each entry has one owner", each_entry_has_one_owner_whatever_the_support_is},
                     {"entries stay within what there is", entries_stay_within_what_there_is},
                     {"held entries are whole pieces", held_entries_are_whole_pieces_of_the_blocks},
                     {"half a warp meets no bank twice", half_a_warp_meets_no_bank_twice},
                     {"regions of shared memory do not overlap", regions_of_shared_memory_do_not_overlap},
                     {"plans of decode keep their limits", plans_of_decode_keep_their_limits},
                     {"plans of tiles keep their limits", plans_of_tiles_keep_their_limits}},
                    1);
}
