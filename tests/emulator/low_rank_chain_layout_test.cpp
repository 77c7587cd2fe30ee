// Who does what in the chained kernel of low_rank, for every size in range: each element once, nothing before what it needs.
#include "low_rank/chain_layout.h"

#include <set>
#include <vector>

#include "check.h"

namespace {

using namespace low_rank;

constexpr int kH200 = 232448;  // bytes of shared memory in a block

ChainPlan plan_of(int64_t m, int64_t n, int64_t k, int64_t r, int sm_count = 132) {
  const ChainPlan plan = plan_chain(m, n, k, r, sm_count, kH200);
  check::that(plan.row_blocks > 0, "covered");
  return plan;
}

// Of each product every tile [row block][column] has each of its slabs once, in units that follow each other.
void units_cover(const ChainPlan& plan, int m, int n, int k, int r) {
  std::vector<int> first(first_tiles(plan)), second(plan.row_blocks * plan.second_columns);
  for (int number = 0; number < chain_units(plan); ++number) {
    const ChainUnit unit = chain_unit(plan, number);
    check::equal(unit.is_second, number >= first_units(plan), "the second product comes second; unit", number);
    const int columns = unit.is_second ? plan.second_columns : plan.first_columns, column = unit.column / kChainTile;
    check::that(unit.row % kChainTile == 0 && unit.column % kChainTile == 0, "whole tiles; unit", number);
    check::that(unit.row < m && unit.column < (unit.is_second ? n : r), "no unit is empty; unit", number);
    check::that(unit.row == unit.row_block * kChainTile && column < columns, "its row block; unit", number);
    const int tile = unit.row_block * columns + column;
    if (!unit.is_second) check::equal(unit.tile, tile, "its tile; unit", number);
    int& slab = (unit.is_second ? second : first)[tile];
    check::that(unit.slabs.first == slab && unit.slabs.last > slab, "slabs follow each other; unit", number);
    slab = unit.slabs.last;
  }
  for (size_t i = 0; i < first.size(); ++i) check::equal(first[i], parts_of(k, kChainSlab), "slabs of a tile of h", i);
  for (size_t i = 0; i < second.size(); ++i) check::equal(second[i], parts_of(r, kChainSlab), "slabs of a tile of y", i);
}

void each_element_of_an_output_has_a_unit(uint64_t) {
  const int sizes[][3] = {{8, 8, 8}, {4096, 4096, 512}, {136, 72, 264}, {14336, 1024, 1000}, {64, 8200, 128}};
  for (int m = 1; m <= 4096; m += m < 300 ? 1 : 61) {
    for (const auto& [n, k, r] : sizes) {
      for (int sm_count : {1, 132}) units_cover(plan_of(m, n, k, r, sm_count), m, n, k, r);
    }
  }
}

// Tickets are drawn in the order of the numbers: all that a unit waits for must have smaller ones, and be as many as it
// waits for. Splits of a tile wait for nothing.
void nothing_waits_for_a_later_ticket(uint64_t) {
  for (int m = 1; m <= 4096; m += 37) {
    for (int r : {8, 128, 136, 512, 1000, 4096}) {
      const ChainPlan plan = plan_of(m, 520, 4096, r);
      std::vector<int> done(counters_of(plan)), splits(first_tiles(plan));
      int block = 0;
      for (int number = 0; number < chain_units(plan); ++number) {
        const ChainUnit unit = chain_unit(plan, number);
        if (number == first_units(plan)) block = 0;
        check::that(unit.row_block >= block, "row blocks in order; unit", number);
        block = unit.row_block;
        if (unit.is_second) {
          check::equal(done[tiles_done(unit.row_block)], plan.first_columns, "tiles of h before a tile of y; unit", number);
        } else if (++splits[unit.tile] == plan.splits) {
          ++done[tiles_done(unit.row_block)];
        }
      }
    }
  }
}

// No two uses of one, none outside; the ticket and the blocks that have ended are two more.
void each_counter_has_one_use(uint64_t) {
  for (int m : {1, 129, 1024, 4096}) {
    for (int r : {8, 512, 1024}) {
      const ChainPlan plan = plan_of(m, 4096, 4096, r);
      std::set<int> used = {kNextTicket, kEndedBlocks};
      for (int block = 0; block < plan.row_blocks; ++block) check::that(used.insert(tiles_done(block)).second, "h", block);
      for (int tile = 0; tile < first_tiles(plan) && plan.splits > 1; ++tile) {
        check::that(used.insert(splits_done(plan, tile)).second, "splits", tile);
      }
      check::that(*used.begin() == 0 && *used.rbegin() == counters_of(plan) - 1, "all, and no more");
      check::equal(used.size(), counters_of(plan), "counters");
    }
  }
}

void plans_keep_their_limits(uint64_t) {
  for (int sm_count : {1, 2, 78, 114, 132, 1000}) {
    for (int m = 1; m <= 4096; m += m < 300 ? 31 : 97) {
      for (int r : {8, 72, 128, 512, 1000, 4096, 1 << 20}) {
        for (int k : {8, 512, 1016, 1024, 4096, 1 << 20}) {
          const ChainPlan plan = plan_of(m, k, k, r, sm_count);
          check::that(plan.smem_bytes == sizeof(ChainShared) && plan.smem_bytes <= kH200, "shared memory");
          check::that(plan.grid >= 1 && plan.grid <= sm_count && plan.grid <= chain_units(plan), "blocks; m", m);
          check::that(counters_of(plan) <= kChainCounters, "counters; m", m);
          check::equal(chain_partials(plan), plan.splits > 1 ? double(first_units(plan)) * kChainSums : 0, "partials; m", m);
          const bool is_idle = first_units(plan) <= sm_count;
          check::that(plan.splits == 1 || is_idle, "splits only fill what is idle; m", m);
          check::that(plan.splits == 1 || plan.first_slabs / plan.splits >= kChainLeastSlabs, "splits are long; k", k);
          check::that(plan.splits >= 1 && plan.splits <= kChainMostSplits, "splits; m", m);
        }
      }
    }
  }
}

void the_plan_of_a_model(uint64_t) {
  const ChainPlan plan = plan_of(1024, 4096, 4096, 512);
  check::that(first_tiles(plan) == 32 && plan.splits == 4, "4 x 32 units of the first product for 132 multiprocessors");
  check::equal(chain_units(plan) - first_units(plan), 256, "tiles of y");
  check::equal(chain_partials(plan) * 4, 8 << 20, "bytes of workspace");
  check::equal(plan_of(4000, 4096, 4096, 512).splits, 1, "no splits where there are tiles enough");
  check::equal(plan_of(1024, 4096, 768, 192).splits, 1, "none of a short first product");
  check::equal(plan_of(512, 4096, 14336, 1024).splits, 4, "and of a deep one");
}

void what_is_covered(uint64_t) {
  const auto is_covered = [](int64_t m, int64_t n, int64_t k, int64_t r) {
    return plan_chain(m, n, k, r, 132, kH200).row_blocks > 0;
  };
  const int64_t most = kChainMaxSize;
  check::that(is_covered(1, 8, 8, 8) && is_covered(4096, most, most, most), "the ends of the range");
  for (int64_t m : {int64_t{0}, int64_t{4097}, int64_t{1} << 40}) check::that(!is_covered(m, 8, 8, 8), "m", m);
  for (int64_t size : {int64_t{0}, int64_t{4}, int64_t{12}, most + 8, int64_t{1} << 40}) {
    check::that(!is_covered(300, size, 8, 8) && !is_covered(300, 8, size, 8) && !is_covered(300, 8, 8, size), "size", size);
  }
  check::equal(plan_chain(300, 8, 8, 8, 132, 166912).row_blocks, 0, "not in 163 KB");
}

// What the copy engine and the products need of an address; and nothing on top of anything else.
void memory_is_right(uint64_t) {
  check::that(alignof(ChainShared) == 1024, "the first tile is aligned to the swizzle's atoms");
  check::that(offsetof(ChainShared, result) % 1024 == 0 && sizeof(ChainShared::Slot) % 1024 == 0, "so are the others");
  check::that(kChainBoxBytes % 1024 == 0 && kChainBoxBytes / 2 == 64 * 128, "so is a tile's second half");
  check::that(offsetof(ChainShared, bias) % 16 == 0 && offsetof(ChainShared, full) % 8 == 0, "biases and barriers");
}

// The sums of a unit fill its part of the workspace; a warp's 16-byte pieces are neighbours.
void each_sum_has_one_place(uint64_t) {
  std::set<int64_t> places;
  for (int unit : {0, 1, 131}) {
    for (int piece = 0; piece < 32; ++piece) {
      for (int thread = 0; thread < 128; ++thread) {
        const int64_t at = partial_at(unit, piece, thread);
        check::that(at >= int64_t{unit} * kChainSums && at + 4 <= int64_t{unit + 1} * kChainSums, "in its part", at);
        check::that(at % 4 == 0 && places.insert(at).second, "a place of its own", at);
        check::equal(at, partial_at(unit, piece, 0) + 4 * thread, "neighbours", thread);
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"each element of an output has a unit", each_element_of_an_output_has_a_unit},
                     {"nothing waits for a later ticket", nothing_waits_for_a_later_ticket},
                     {"each counter has one use", each_counter_has_one_use},
                     {"plans keep their limits", plans_keep_their_limits},
                     {"the plan of a model", the_plan_of_a_model},
                     {"what is covered", what_is_covered},
                     {"memory is right", memory_is_right},
                     {"each sum has one place", each_sum_has_one_place}},
                    1);
}
