// Where columns of the pivoted form go: every complement of few columns, many of more, each once whatever the pivots are.
#include "low_rank/decode_pivoted_layout.h"

#include <set>
#include <vector>

#include "check.h"

namespace {

using namespace low_rank;

void expect_complement(const std::vector<int64_t>& pivots, int n) {
  const std::set<int64_t> is_pivot(pivots.begin(), pivots.end());
  int row = 0;
  for (int column = 0; column < n; ++column) {
    if (is_pivot.count(column)) continue;
    check::equal(complement_column(pivots.data(), static_cast<int>(pivots.size()), row), column, "column of a row", row);
    ++row;
  }
  const int r = static_cast<int>(pivots.size());
  for (int i = 0; i < r; ++i) check::equal(pivot_column(pivots.data(), r, n, i), pivots[i], "column of a pivot", i);
}

void expect_each_column_once(const std::vector<int64_t>& pivots, int n) {
  const int r = static_cast<int>(pivots.size());
  std::vector<int> times(n);
  const auto takes = [&](int column) {
    check::that(column >= 0 && column < n, "a column of y", column);
    check::equal(++times[column], 1, "times of column", column);
  };
  for (int row = 0; row < n - r; ++row) takes(complement_column(pivots.data(), r, row));
  for (int i = 0; i < r; ++i) takes(pivot_column(pivots.data(), r, n, i));
}

void each_set_of_few_columns(uint64_t) {
  for (int n = 1; n <= 12; ++n) {
    for (int set = 0; set < 1 << n; ++set) {
      std::vector<int64_t> pivots;
      for (int column = 0; column < n; ++column) {
        if (set >> column & 1) pivots.push_back(column);
      }
      expect_complement(pivots, n);
    }
  }
}

void some_sets_of_more(uint64_t seed) {
  emulator::Random random(seed);
  for (int round = 0; round < 200; ++round) {
    const int n = 1 + static_cast<int>(random.below(5000)), one_in = 1 + static_cast<int>(random.below(9));
    std::vector<int64_t> pivots;
    for (int column = 0; column < n && pivots.size() < kDecodeMaxRank; ++column) {
      if (random.below(one_in) == 0) pivots.push_back(column);
    }
    expect_complement(pivots, n);
  }
}

void each_column_once_whatever_the_pivots_are(uint64_t seed) {
  for (int n = 1; n <= 5; ++n) {
    for (int r = 0; r <= n; ++r) {  // every list of up to 5 numbers that are columns, or one too low or high
      std::vector<int64_t> pivots(r, -1);
      for (bool is_left = true; is_left;) {
        expect_each_column_once(pivots, n);
        is_left = false;
        for (int i = 0; i < r && !is_left; ++i) {
          is_left = pivots[i] < n;
          pivots[i] = is_left ? pivots[i] + 1 : -1;
        }
      }
    }
  }
  emulator::Random random(seed);
  const int64_t wild[] = {INT64_MIN, -1, 0, 1, 7, 100, 1ll << 31, 1ll << 32, (1ll << 32) + 5, INT64_MAX};
  for (int round = 0; round < 2000; ++round) {
    const int r = 8 * (1 + static_cast<int>(random.below(10))), n = r + static_cast<int>(random.below(100));
    std::vector<int64_t> pivots(r);
    for (auto& one : pivots) one = random.below(2) ? wild[random.below(10)] : static_cast<int64_t>(random.below(2 * n));
    expect_each_column_once(pivots, n);
  }
}

void plans_keep_their_limits(uint64_t) {
  for (int sm_count : {1, 46, 132}) {
    for (int limit : {101376, 232448}) {
      for (int m : {1, 8, 9, 16}) {
        for (int r = 8; r <= kDecodeMaxRank; r += r < 200 ? 8 : 200) {
          for (int more : {0, 1, 15, 16, 1000, 8000}) {
            const DecodePlan plan = plan_pivoted(m, r + more, 4096, r, sm_count, limit);
            if (plan.token_tiles == 0) {
              check::that(sm_count == 1 || r > 1000, "covered, or too large; r", r);
              continue;
            }
            const int units = first_units(r, plan.splits), tiles = parts_of(more, kTileRows);
            check::that(plan.grid >= 1 && plan.grid <= sm_count, "one block to a multiprocessor; r", r);
            check::equal(parts_of(units, plan.grid), parts_of(units, sm_count), "no block has more units for it; r", r);
            check::equal(parts_of(tiles, plan.grid), parts_of(tiles, sm_count), "nor more tiles; r", r);
            const DecodeMemory at = pivoted_memory(plan.token_tiles, plan.tiles, r, plan.grid, plan.prefetch);
            check::that(at.bytes == plan.smem_bytes && at.bytes <= limit, "bytes; r", r);
            check::that(at.bias % 16 == 0 && at.h % 16 == 0 && at.weights % 16 == 0, "16-byte aligned; r", r);
            check::that(at.weights - at.h >= 8 * r, "room for the pivots where h will be; r", r);
            const int columns = columns_for(plan.tiles, r, plan.grid);
            check::that(columns % 8 == 0 && at.bias + 6 * columns <= at.h, "room for biases and columns; r", r);
            int pivots = 0;
            for (int block = 0; block < plan.grid; ++block) {
              const Range mine = pivots_of_block(r, plan.grid, block);
              check::equal(mine.first, pivots, "blocks follow each other; r", r);
              check::that(plan.tiles * kTileRows + mine.last - mine.first <= columns, "room for a block's columns; r", r);
              pivots = mine.last;
            }
            check::equal(pivots, r, "all pivots are dealt; r", r);
          }
        }
      }
    }
  }
  const auto is_planned = [](int64_t m, int64_t n, int64_t k, int64_t r) {
    return plan_pivoted(m, n, k, r, 132, 232448).token_tiles > 0;
  };
  check::that(is_planned(1, 8, 8, 8) && is_planned(16, 4096, 4096, 1024), "these are covered");
  check::that(!is_planned(1, 15, 64, 16) && !is_planned(1, kDecodeMaxColumns + 1, 64, 16), "n");
  check::that(!is_planned(0, 64, 64, 16) && !is_planned(17, 64, 64, 16) && !is_planned(1, 64, 60, 16), "m, k");
  check::that(!is_planned(1, 64, 64, 12) && !is_planned(1, 4096, 64, 2056), "r");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"each set of few columns", each_set_of_few_columns},
                     {"some sets of more", some_sets_of_more},
                     {"each column once whatever the pivots are", each_column_once_whatever_the_pivots_are},
                     {"plans keep their limits", plans_keep_their_limits}},
                    1);
}
