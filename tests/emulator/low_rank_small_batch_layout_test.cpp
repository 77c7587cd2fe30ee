// Who does what in the small-batch kernels of low_rank, for every size in range: each element once, nothing outside, no bank
// twice.
#include "low_rank/small_batch_layout.h"

#include <set>
#include <vector>

#include "check.h"

namespace {

using namespace low_rank;

constexpr int kH200 = 232448;  // bytes of shared memory in a block

// Sizes: all small ones, then ever fewer.
std::vector<int> multiples_of_8(int last) {
  std::vector<int> all;
  for (int value = 8; value <= last; value += value < 700 ? 8 : value / 6 / 8 * 8 + 8) all.push_back(value);
  all.push_back(last);
  return all;
}

// All rows and tokens are in one item, whole tiles and groups; groups of a tile are neighbours.
void items_cover(const BatchPhase& phase, int m, int rows) {
  int row = 0, token = 0;
  for (int index = 0; index < phase.items; ++index) {
    const BatchItem item = batch_item(phase.tokens, phase.groups, index);
    check::that(item.row == row && item.token == token, "items follow each other; item", index);
    check::that(item.row < rows && item.token < m, "no item is empty; item", index);
    token += phase.tokens;
    if (token >= m) {
      token = 0;
      row += kBatchRows;
    }
  }
  check::that(token == 0 && row >= rows, "all rows are dealt", rows);
}

void each_element_of_an_output_has_an_item(uint64_t) {
  for (int m = 17; m <= 256; ++m) {
    for (int rows : {8, 64, 72, 512, 4096, 14336}) {
      for (int sm_count : {1, 20, 132}) {
        const SmallBatchPlan plan = plan_small_batch(m, rows, 4096, rows, sm_count, kH200);
        items_cover(plan.first, m, rows);
        items_cover(plan.second, m, rows);
      }
    }
  }
}

// The splits of a cluster follow each other, and none is without a slab: a block always has a sum.
void each_slab_has_a_block(uint64_t) {
  for (int k : multiples_of_8(kSmallBatchMaxSize)) {
    for (int r : {8, 512, 2048, 16384}) {
      const BatchPhase phase = plan_small_batch(256, 8, k, r, 132, kH200).first;
      int slab = 0;
      for (int rank = 0; rank < phase.splits; ++rank) {
        const Range mine = share(phase.slabs, phase.splits, rank);
        check::that(mine.first == slab && mine.last > mine.first, "slabs of a block; k", k);
        check::that(mine.last - mine.first <= parts_of(phase.slabs, phase.splits), "as many as there may be slots; k", k);
        slab = mine.last;
      }
      check::that(slab == phase.slabs && int64_t{slab} * kSlab >= k && (slab - 1) * int64_t{kSlab} < k, "all of k", k);
    }
  }
}

// What a cluster adds up: each token of the group in one block.
void each_token_has_a_block(uint64_t) {
  for (int tokens : {32, 64, 128, 256}) {
    for (int splits : {1, 2, 4, 8}) {
      int token = 0;
      for (int rank = 0; rank < splits; ++rank) {
        check::equal(share(tokens, splits, rank).first, token, "tokens follow each other");
        token = share(tokens, splits, rank).last;
      }
      check::equal(token, tokens, "all tokens");
    }
  }
}

void memory_is_right(const BatchPhase& phase, const BatchMemory& at, int result_bytes) {
  check::that(at.weights == 0 && at.tokens % 1024 == 0, "tiles are aligned to the swizzle's atoms");
  check::that(kWeightSlotBytes % 1024 == 0 && token_slot_bytes(phase.tokens) % 1024 == 0, "so are the next");
  check::that(phase.weight_slots >= 1 && phase.token_slots >= 1, "a slot of each");
  const bool is_ring = phase.weight_slots >= 2 && phase.token_slots >= 2;
  check::that(is_ring || parts_of(phase.slabs, phase.splits) == 1, "one slot loads while one is used");
  check::that(phase.weight_slots + phase.token_slots <= kMostSlots, "slots have barriers");
  check::that(at.tokens >= phase.weight_slots * kWeightSlotBytes, "weights end before tokens");
  const int after_tokens = at.tokens + phase.token_slots * token_slot_bytes(phase.tokens);
  check::that(at.barriers >= after_tokens, "tokens end before the barriers");
  check::that(at.barriers >= result_bytes && at.barriers % 8 == 0, "so does what takes their place");
  check::equal(phase.smem_bytes, at.bytes, "bytes");
}

void plans_keep_their_limits(uint64_t) {
  for (int sm_count : {1, 78, 114, 132}) {
    for (int m : {17, 32, 33, 64, 65, 128, 129, 256}) {
      for (int r : multiples_of_8(kSmallBatchMaxSize)) {
        for (int k : {8, 64, 72, 768, 4096, 32768}) {
          const int n = k;
          const SmallBatchPlan plan = plan_small_batch(m, n, k, r, sm_count, kH200);
          const BatchPhase &first = plan.first, &second = plan.second;
          check::that(first.tokens > 0 && second.tokens > 0, "covered");
          memory_is_right(first, first_memory(first.tokens, first.weight_slots, first.token_slots),
                          first.tokens * kPartialStride * 4);
          memory_is_right(second, second_memory(second.tokens, second.weight_slots, second.token_slots),
                          second.tokens * 128);
          check::that(first.smem_bytes + second.smem_bytes + 2048 <= kH200 + 1024, "both share a multiprocessor; r", r);
          check::that(first.splits == 1 || first.items * first.splits <= sm_count, "splits only fill what is idle; r", r);
          check::that(first.splits <= first.slabs && kMostSplits % first.splits == 0, "no more splits than slabs; r", r);
          check::that(second.splits == 1 && second.slabs == parts_of(r, kSlab), "slabs of r", r);
          for (const BatchPhase& phase : {first, second}) {
            const bool is_filling = phase.groups == 2 && phase.items * phase.splits <= sm_count;
            check::that(phase.groups == 1 || is_filling, "halves; r", r);
            check::that(phase.tokens * phase.groups >= m && phase.tokens < larger(33, 2 * m), "tokens; m", m);
          }
          if (r <= 512) check::that(second.weight_slots == second.slabs || m > 128, "all of u is asked for early; r", r);
        }
      }
    }
  }
}

void the_plan_of_a_model(uint64_t) {
  const SmallBatchPlan plan = plan_small_batch(256, 4096, 4096, 512, 132, kH200);
  check::that(plan.first.tokens == 128 && plan.first.groups == 2 && plan.first.splits == 8, "two halves in clusters of 8");
  check::equal(plan.first.items * plan.first.splits, 128, "blocks of the first product");
  check::equal(plan.second.items, 128, "blocks of the second");
  check::equal(plan.second.weight_slots, 8, "all of u is asked for early");
  const SmallBatchPlan wide = plan_small_batch(256, 14336, 4096, 1024, 132, kH200);
  check::equal(wide.second.tokens, 256, "weights are read once where there are tiles enough");
}

void what_is_covered(uint64_t) {
  const auto is_covered = [](int64_t m, int64_t n, int64_t k, int64_t r) {
    const SmallBatchPlan plan = plan_small_batch(m, n, k, r, 132, kH200);
    check::equal(plan.first.tokens > 0, plan.second.tokens > 0, "both or none");
    return plan.first.tokens > 0;
  };
  const int64_t most = kSmallBatchMaxSize;
  check::that(is_covered(17, 8, 8, 8) && is_covered(256, most, most, most), "the ends of the range");
  for (int64_t m : {int64_t{0}, int64_t{16}, int64_t{257}, int64_t{1} << 40}) check::that(!is_covered(m, 8, 8, 8), "m", m);
  for (int64_t size : {int64_t{0}, int64_t{4}, int64_t{12}, most + 8, int64_t{1} << 40}) {
    check::that(!is_covered(32, size, 8, 8) && !is_covered(32, 8, size, 8) && !is_covered(32, 8, 8, size), "size", size);
  }
  check::that(plan_small_batch(32, 8, 8, 8, 132, 101376).first.tokens == 0, "not in 99 KB");
}

// Lanes that one pass over the 32 banks serves must not meet: 32 of them at 4 bytes each, 8 at 16.
void lanes_meet_no_bank_twice(uint64_t) {
  for (int i = 0; i < 128; ++i) {
    std::set<int> banks;
    for (int lane = 0; lane < 32; ++lane) {
      const device::Position at = device::wgmma_d(lane, i);
      banks.insert(partial_at(at.column, at.row) % 32);
    }
    check::equal(banks.size(), 32, "banks of a store of sums", i);
  }
  for (int token = 0; token < 256; ++token) {
    std::set<int> of_sums;
    for (int eight = 0; eight < 8; ++eight) of_sums.insert(partial_at(token, eight * 4) / 4 % 8);
    check::equal(of_sums.size(), 8, "16-byte loads of sums", token);
  }
  for (int eight = 0; eight < 32; eight += 8) {
    std::set<int> of_result;
    for (int lane = eight; lane < eight + 8; ++lane) of_result.insert(result_piece(3, lane, 16) / 16 % 8);
    check::equal(of_result.size(), 8, "rows of a matrix of the result", eight);
  }
}

// Sums and results fill their tile, each element in one place.
void each_result_has_one_place(uint64_t) {
  std::set<int> sums;
  for (int token = 0; token < 256; ++token) {
    for (int row = 0; row < kBatchRows; ++row) check::that(sums.insert(partial_at(token, row)).second, "a sum", token);
  }
  check::that(*sums.rbegin() < 256 * kPartialStride, "the last sum is inside");
  std::set<uint32_t> pieces;
  for (int token = 0; token < 256; token += 16) {
    for (int warp = 0; warp < kConsumerWarps; ++warp) {
      for (int lane = 0; lane < 32; ++lane) {
        const uint32_t at = result_piece(warp, lane, token);
        check::that(at % 16 == 0 && at < 256 * 128 && pieces.insert(at).second, "a piece of the result", token);
        check::equal(at / 128, token + lane / 16 * 8 + lane % 8, "a token's row", lane);
      }
    }
  }
  check::equal(pieces.size(), 256 * 8, "pieces of the result");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"each element of an output has an item", each_element_of_an_output_has_an_item},
                     {"each slab has a block", each_slab_has_a_block},
                     {"each token has a block", each_token_has_a_block},
                     {"plans keep their limits", plans_keep_their_limits},
                     {"the plan of a model", the_plan_of_a_model},
                     {"what is covered", what_is_covered},
                     {"lanes meet no bank twice", lanes_meet_no_bank_twice},
                     {"each result has one place", each_result_has_one_place}},
                    1);
}
