// S in rows as kernels read it: indices are not trusted, and none leads out of bounds.
#pragma once

#include "device/load.h"
#include "low_rank_sparse/support_layout.h"

namespace low_rank_sparse {

constexpr uint32_t kNoColumn = ~0u;

LOWFAT_DEVICE uint32_t column_of(const void* columns, bool is_wide, int64_t entry) {
  return is_wide ? device::load(static_cast<const uint32_t*>(columns) + entry)
                 : device::load(static_cast<const uint16_t*>(columns) + entry);
}
LOWFAT_DEVICE uint32_t column_of(const Support& s, int64_t entry) { return column_of(s.columns, s.is_wide, entry); }

LOWFAT_DEVICE Range entries_of_row(const Support& s, int row) {
  return entries_between(device::load(s.starts + row), device::load(s.starts + row + 1), s.entries);
}

// RowSearch to its end.
LOWFAT_DEVICE Range own_entries(const Support& s, int row) {
  RowSearch search(s.n, s.entries, row);
  while (!search.is_done()) search.turn(device::load(s.starts + search.place()));
  return search.entries;
}

// ColumnSearch to its end.
LOWFAT_DEVICE int64_t first_from(const void* columns, bool is_wide, int64_t first, int64_t last, uint32_t column) {
  ColumnSearch search{column, first, last};
  while (!search.is_done()) search.turn(column_of(columns, is_wide, search.place()));
  return search.first;
}

// visit(column, value) of the entries from `entry` on, up to the first that is past the columns: a thread by itself, four at
// a time on their way. What is out of order may be left out, but is visited by nobody else.
template <class Element, class Visit>
LOWFAT_DEVICE void visit_entries(const void* columns, bool is_wide, const Element* values, int64_t entry, int64_t last,
                                 uint32_t first_column, uint32_t last_column, const Visit& visit) {
  constexpr int kTogether = 4;
  for (; entry < last; entry += kTogether) {
    uint32_t column[kTogether];
    Element value[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const bool is_there = entry + i < last;
      column[i] = is_there ? column_of(columns, is_wide, entry + i) : kNoColumn;
      value[i] = is_there ? device::load(values + entry + i) : Element{0};
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (column[i] >= first_column && column[i] < last_column) visit(column[i], value[i]);
    }
    if (column[kTogether - 1] >= last_column) break;
  }
}

}  // namespace low_rank_sparse
