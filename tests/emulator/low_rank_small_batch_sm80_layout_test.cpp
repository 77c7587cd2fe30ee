// Who does what in the small-batch kernel of low_rank for compute capability 8, for every size in range: each element once,
// nothing outside, no bank twice.
#include "low_rank/small_batch_sm80_layout.h"

#include <set>
#include <vector>

#include "check.h"

namespace {

using namespace low_rank;

constexpr int kLimits[] = {163 << 10, 99 << 10, 227 << 10};  // bytes of shared memory in a block: sm_80, sm_86 and 89, sm_90
const int kRegisters = 65536;                                // of a multiprocessor

// Sizes: all small ones, then ever fewer.
std::vector<int> multiples_of_8(int last) {
  std::vector<int> all;
  for (int value = 8; value <= last; value += value < 700 ? 8 : value / 6 / 8 * 8 + 8) all.push_back(value);
  all.push_back(last);
  return all;
}

// Every tile, group and slab is in one item; splits of one follow each other, and none is empty.
void items_cover(int tokens, int groups, int splits, int m, int rows, int depth) {
  const int items = parts_of(rows, kBatchRows) * groups * splits;
  int row = 0, token = 0, slab = 0;
  for (int index = 0; index < items; ++index) {
    const SplitItem item = split_item(tokens, groups, splits, depth, index);
    check::that(item.at.row == row && item.at.token == token, "items follow each other; item", index);
    check::that(item.split == index % splits && item.slabs.first == slab, "splits follow each other; item", index);
    check::that(item.at.row < rows && item.at.token < m && item.slabs.last > slab, "no item is empty; item", index);
    slab = item.slabs.last;
    if (item.split < splits - 1) continue;
    check::that(slab == parts_of(depth, kSlab), "all slabs; item", index);
    slab = 0, token += tokens;
    if (token >= m) token = 0, row += kBatchRows;
  }
  check::that(token == 0 && row >= rows, "all rows are dealt", rows);
}

void each_element_has_an_item(uint64_t) {
  for (int m = 17; m <= 256; m += m % 64 < 2 ? 1 : 9) {
    for (int rows : {8, 64, 72, 512, 4096}) {
      for (int depth : {8, 264, 4096, 11008}) {
        for (int sm_count : {1, 20, 108}) {
          const SmallBatchSm80Plan plan = plan_small_batch_sm80(m, rows, depth, rows, sm_count, kLimits[0]);
          items_cover(plan.tokens, plan.groups, plan.splits, m, rows, depth);
          items_cover(plan.tokens, plan.groups, 1, m, rows, rows);
        }
      }
    }
  }
}

void plans_keep_their_limits(uint64_t) {
  for (int limit : kLimits) {
    for (int sm_count : {1, 20, 46, 84, 108, 132}) {
      for (int m : {17, 32, 64, 65, 128, 129, 192, 193, 256}) {
        for (int r : multiples_of_8(kSmallBatchMaxSize)) {
          for (int k : {8, 64, 72, 768, 4096, 32768}) {
            const int n = k;
            const SmallBatchSm80Plan plan = plan_small_batch_sm80(m, n, k, r, sm_count, limit);
            check::that(plan.tokens == 64 || plan.tokens == 128, "covered; r", r);
            check::that(plan.groups == parts_of(m, plan.tokens), "groups; m", m);
            check::that(plan.grid >= 1 && plan.grid <= sm_count, "one block to a multiprocessor; r", r);
            check::that(plan.smem_bytes <= limit, "which has memory for it; r", r);
            check::equal(plan.smem_bytes, sm80_memory(plan.tokens, plan.weight_slots).bytes, "bytes");
            check::that(plan.weight_slots >= kSm80TokenSlots, "weights are asked for as early as tokens; r", r);
            const int first_tiles = parts_of(r, kBatchRows) * plan.groups, slabs = parts_of(k, kSlab);
            check::that(plan.splits == 1 || first_tiles * plan.splits <= plan.grid, "splits only fill what is idle; r", r);
            check::that(plan.splits == 1 || slabs >= plan.splits * kSm80LeastSlabs, "splits have something to do; k", k);
            const int items = larger(first_tiles * plan.splits, parts_of(n, kBatchRows) * plan.groups);
            check::that(plan.grid == items || plan.grid == sm_count, "all are used as far as there are items; r", r);
            check::equal(partials_of(plan, m, r), plan.splits > 1 ? double(plan.splits) * m * r : 0, "workspace; r", r);
          }
        }
      }
    }
  }
  static_assert(kSm80Threads * 255 <= kRegisters, "one block always has its registers");
}

void the_plan_of_a_model(uint64_t) {
  const SmallBatchSm80Plan one = plan_small_batch_sm80(64, 4096, 4096, 512, 108, kLimits[0]);
  check::that(one.tokens == 64 && one.splits == 13 && one.grid == 104, "8 tiles of v in 13 splits");
  check::equal(one.weight_slots, 8, "slots: all of u is asked for early");
  check::equal(plan_small_batch_sm80(128, 4096, 4096, 512, 108, kLimits[0]).tokens, 128, "weights are read once");
  check::equal(plan_small_batch_sm80(128, 768, 768, 192, 108, kLimits[0]).tokens, 64, "tokens where 128 leave many idle");
}

void what_is_covered(uint64_t) {
  const auto is_covered = [](int64_t m, int64_t n, int64_t k, int64_t r) {
    return plan_small_batch_sm80(m, n, k, r, 108, kLimits[1]).tokens > 0;
  };
  const int64_t most = kSmallBatchMaxSize;
  check::that(is_covered(17, 8, 8, 8) && is_covered(256, most, most, most), "the ends of the range");
  for (int64_t m : {int64_t{0}, int64_t{16}, int64_t{257}, int64_t{1} << 40}) check::that(!is_covered(m, 8, 8, 8), "m", m);
  for (int64_t size : {int64_t{0}, int64_t{4}, int64_t{12}, most + 8, int64_t{1} << 40}) {
    check::that(!is_covered(32, size, 8, 8) && !is_covered(32, 8, size, 8) && !is_covered(32, 8, 8, size), "size", size);
  }
  check::that(plan_small_batch_sm80(256, 4096, 8, 8, 1, 64 << 10).tokens == 0, "large groups not in 64 KB");
  check::that(plan_small_batch_sm80(32, 8, 8, 8, 0, kLimits[0]).tokens == 0, "nor on no multiprocessor");
}

// A slot: each piece has its place.
void each_piece_has_its_place(uint64_t) {
  std::set<int> weights, tokens;
  for (int row = 0; row < 128; ++row) {
    for (int piece = 0; piece < 8; ++piece) {
      if (row < kBatchRows) weights.insert(weight_piece(row, piece));
      tokens.insert(device::swizzled_piece(row, piece));
    }
  }
  check::equal(weights.size(), kBatchRows * 8, "pieces of weights");
  check::that(*weights.rbegin() == kWeightSlotBytes - 16, "in their slot");
  check::equal(tokens.size(), 128 * 8, "pieces of tokens");
  check::that(*tokens.rbegin() == token_slot_bytes(128) - 16, "in their slot");
  for (int slots = 4; slots < 20; ++slots) {
    const Sm80Memory at = sm80_memory(128, slots);
    check::that(at.tokens >= slots * kWeightSlotBytes && at.tokens % 128 == 0, "tokens after weights");
    check::equal(at.bytes, at.tokens + 4 * token_slot_bytes(128), "bytes");
  }
}

// The eight lanes that the memory serves at a time have eight groups of four banks.
void lanes_meet_no_bank_twice(uint64_t) {
  for (int first = 0; first < 32; first += 8) {  // of a lane
    for (int depth = 0; depth < kSlab; depth += 16) {
      for (int row = 0; row < 128; row += 16) {
        std::set<int> of_weights, of_tokens;
        for (int lane = first; lane < first + 8; ++lane) {
          const device::Position weight = weight_matrix_row(lane, row / 16 % 2), token = device::ldmatrix_row(lane);
          of_weights.insert(weight_piece(row / 64 * 32 + weight.row, (depth + weight.column) / 8) / 16 % 8);
          of_tokens.insert(device::swizzled_piece(row + token.row, (depth + token.column) / 8) / 16 % 8);
        }
        check::that(of_weights.size() == 8 && of_tokens.size() == 8, "groups of banks, a read; row", row);
      }
    }
  }
  for (int row = 0; row < 128; ++row) {  // copies: eight threads have a row
    std::set<int> of_weights, of_tokens;
    for (int piece = 0; piece < 8; ++piece) {
      of_weights.insert(weight_piece(row % 64, piece) / 16 % 8);
      of_tokens.insert(device::swizzled_piece(row, piece) / 16 % 8);
    }
    check::that(of_weights.size() == 8 && of_tokens.size() == 8, "groups of banks, a copy; row", row);
  }
}

// The rows that lanes name for ldmatrix become the columns of b of four fragments; a lane sums eight that are neighbours.
void fragments_are_the_rows_of_a_weight(uint64_t) {
  std::set<int> rows;
  for (int lane = 0; lane < 32; ++lane) {
    for (int fragment = 0; fragment < 4; ++fragment) {
      for (int i = 0; i < 4; ++i) {  // register i / 2 has row lane / 4, columns 2 (lane % 4).. of its matrix
        const int matrix = fragment % 2 * 2 + i / 2;
        const device::Position from = weight_matrix_row(matrix * 8 + lane / 4, fragment / 2);
        const device::Position b = device::mma_b(lane, i);
        check::equal(from.row, weight_row(fragment, b.column), "the weight's row of an element of b, lane", lane);
        check::equal(from.column + lane % 4 * 2 + i % 2, b.row, "the depth of an element of b, lane", lane);
        const device::Position d = device::mma_d(lane, i);
        check::equal(weight_row(fragment, d.column), lane % 4 * 8 + fragment * 2 + i % 2, "the column of a sum, lane", lane);
        rows.insert(weight_row(fragment, d.column));
      }
    }
  }
  check::equal(rows.size(), kSm80WarpWeights, "rows of a warp");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"each element has an item", each_element_has_an_item},
                     {"plans keep their limits", plans_keep_their_limits},
                     {"the plan of a model", the_plan_of_a_model},
                     {"what is covered", what_is_covered},
                     {"each piece has its place", each_piece_has_its_place},
                     {"lanes meet no bank twice", lanes_meet_no_bank_twice},
                     {"fragments are the rows of a weight", fragments_are_the_rows_of_a_weight}},
                    1);
}
