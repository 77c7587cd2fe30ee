// Where the entries of S are, which is stored in rows (CSR): pure functions, for kernels and tests. Of starts and columns
// that are none, too, the answers stay within bounds, and no entry has two owners.
//
//   starts [n + 1], 0 to nnz: where each row's entries begin     columns [nnz], ascending in each row
#pragma once

#include <cstdint>

#include "low_rank/backward_layout.h"

namespace low_rank_sparse {

using device::larger, device::parts_of, device::smaller;
using low_rank::kLargeTile, low_rank::kSmallTile, low_rank::Range;

constexpr int64_t kMostSize = 1 << 24;     // of m, n, k and r
constexpr int64_t kMostEntries = 1 << 30;  // that a kernel takes: numbers a little above stay in 32 bits

// As kernels are given it. Its values come beside it, where they are read.
struct Support {
  const int32_t* starts;  // [n + 1]
  const void* columns;    // [entries], int16 or int32, read without a sign: what is negative is out of range, too
  int n, k, entries;
  bool is_wide;  // columns are int32
};

// What starts has for a row and for the next one, cut to what there is.
LOWFAT_CONSTEXPR Range entries_between(int start, int next, int entries) {
  const int first = smaller(larger(start, 0), entries);
  return {first, smaller(larger(next, first), entries)};
}

// A search for the entries that a row alone has, the row after the last one being that of what no row has: those for which
// the first row that ends behind them is this one. Each of them is in one row, whatever starts holds: at each place of the
// search a row on the one side has those in front of a number, and a row on the other side those behind it.
struct RowSearch {
  int row, first, last;  // the rows among which the search still is: the last one is in it
  Range entries;

  LOWFAT_CONSTEXPR RowSearch(int rows, int count, int which) : row(which), first(0), last(rows), entries{0, count} {}
  LOWFAT_CONSTEXPR bool is_done() const { return first == last; }
  LOWFAT_CONSTEXPR int place() const { return first + (last - first) / 2 + 1; }  // of starts, to look at

  LOWFAT_CONSTEXPR void turn(int start) {
    const int cut = smaller(larger(start, entries.first), entries.last);
    if (row < place()) {
      last = place() - 1, entries.last = cut;
    } else {
      first = place(), entries.first = cut;
    }
  }
};

// The other way: which row an entry is in by that.
struct EntrySearch {
  int64_t entry;
  int first, last;

  LOWFAT_CONSTEXPR EntrySearch(int rows, int64_t which) : entry(which), first(0), last(rows) {}
  LOWFAT_CONSTEXPR bool is_done() const { return first == last; }
  LOWFAT_CONSTEXPR int place() const { return first + (last - first) / 2 + 1; }

  LOWFAT_CONSTEXPR void turn(int start) {
    if (entry < start) {
      last = place() - 1;
    } else {
      first = place();
    }
  }
};

// A search among a row's entries for the first one whose column is not below this one. Never in front of what is found for a
// lower column, whatever the columns are.
struct ColumnSearch {
  uint32_t column;
  int64_t first, last;

  LOWFAT_CONSTEXPR bool is_done() const { return first == last; }
  LOWFAT_CONSTEXPR int64_t place() const { return first + (last - first) / 2; }

  LOWFAT_CONSTEXPR void turn(uint32_t found) {
    if (found < column) {
      first = place() + 1;
    } else {
      last = place();
    }
  }
};

constexpr int kTileSmemBytes = 80 << 10;  // what two blocks of a multiprocessor may each have

// --- a tile of a dense [n, k] whose entries are dealt with where shared memory holds it ---

// Floats from row to row: half a warp, which has 4 rows x 4 pairs of sums, meets no bank twice.
LOWFAT_CONSTEXPR int tile_stride(int tile) { return tile + 8; }

}  // namespace low_rank_sparse
