// Who does what in the forward kernel of sparse24, for every mask and every size in range.
#include "sparse24/forward_layout.h"

#include <set>
#include <vector>

#include "check.h"

namespace {

using namespace sparse24;

// Of every 4 bits: two positions that ascend; where two bits are set, theirs.
void positions_of_every_mask(uint64_t) {
  for (uint32_t mask = 0; mask < 16; ++mask) {
    for (int at = 0; at < 8; ++at) {
      const uint32_t others = 0x96a5c3f0 & ~(15u << 4 * at);
      const uint32_t found = kept_positions(mask << 4 * at | others) >> 4 * at & 15;
      const int first = found & 3, second = found >> 2;
      check::that(first < second, "positions ascend; mask", mask);
      if (__builtin_popcount(mask) == 2) check::equal(1 << first | 1 << second, mask, "positions of mask", mask);
      check::equal(found, kept_positions(mask * 0x11111111) & 15, "each four by itself; mask", mask);
    }
  }
}

// Group g of a step's 16 is kept by lane g / 4 in register g % 4. Which product multiplies it, at which place, and which
// word tells where its two inputs are, all say the same; and x has it there.
void every_group_of_a_step_is_at_one_place(uint64_t) {
  for (int half = 0; half < 2; ++half) {  // the upper row, the lower one
    std::set<int> places;
    for (int group = 0; group < 16; ++group) {
      const int lane = group / 4, number = group % 4;
      const int selector = number / 2;               // registers 0, 1 go to the first product, 2, 3 to the second
      const int four = lane + number % 2 * 4;        // a0, a1: kept columns 2 lane.., a2, a3: 8 more
      check::equal(device::mma_a(lane, number % 2 * 4).column, four * 2, "kept columns of a register", group);
      const device::MetadataPlace due = device::mma_sp_metadata(half * 8, four, selector);
      for (int t = 0; t < 4; ++t) {
        uint32_t words[4] = {};                      // upper low, upper high, lower low, lower high
        words[half * 2 + group / 8] = 0xcu << group % 8 * 4;  // the other groups: no bits, which is 2, 3 too: take 0, 1
        for (uint32_t& word : words) word |= 0x33333333u & ~(word ? 15u << group % 8 * 4 : 0);
        const uint32_t metadata = metadata_of(words[0], words[1], words[2], words[3], t);
        const uint32_t expected = 0x44444444u;       // 0, 1
        const uint32_t found = metadata ^ expected;
        check::equal(found, t == due.lane % 4 ? (0xeu ^ 0x4u) << due.shift : 0, "the word of a lane", group * 4 + t);
      }
      // Matrix i of four is register b_i: rows 8 i.. of the other operand, four of them to a group.
      const int place = place_of_group(group), matrix = place / 2 % 4;
      check::equal(place / 8, selector, "x of a group is with its product", group);
      check::equal(matrix * 2 + place % 2, four, "and at its rows", group);
      places.insert(place);
    }
    check::that(places.size() == 16 && *places.rbegin() == 15, "each place is used");
  }
}

void lanes_meet_no_bank_twice(uint64_t) {
  for (int batches = 1; batches < 20; ++batches) {
    std::set<int> of_matrix;
    for (int token = 0; token < 8; ++token) of_matrix.insert(token * x_stride(batches * kBatch) * 2 / 16 % 8);
    check::equal(of_matrix.size(), 8, "rows of a matrix");
  }
  for (int i = 0; i < 4; ++i) {
    std::set<int> banks;
    for (int lane = 0; lane < 32; ++lane) {
      const device::Position at = device::mma_d(lane, i);
      banks.insert(sum_at(at.column, at.row) % 32);
    }
    check::equal(banks.size(), 32, "banks of a store of sums", i);
  }
}

void every_batch_has_one_split(uint64_t) {
  for (int k = kStep; k < 1 << 16; k += kStep * (1 + k / 4096)) {
    for (int splits = 1; splits <= smaller(132, parts_of(k, kBatch)); splits += 1 + splits / 8) {
      int next = 0;
      for (int split = 0; split < splits; ++split) {
        const Range batches = batches_of(k, splits, split);
        check::equal(batches.first, next, "splits follow each other; k", k);
        check::that(batches.last > batches.first, "no split is empty; k", k);
        check::that(batches.last - batches.first <= most_batches(k, splits), "nor larger than there is room for; k", k);
        next = batches.last;
      }
      check::equal(next, parts_of(k, kBatch), "all batches are dealt; k", k);
    }
  }
}

void blocks_fit_together(uint64_t) {
  for (int m = 1; m <= kForwardTokens; ++m) {
    const Shape s = shape_of(token_tiles_of(m));
    check::that(s.token_tiles * kTokenTile >= m && (s.token_tiles == 1 || s.token_tiles * kTokenTile / 2 < m), "tiles", m);
    check::that(s.threads() % s.rows() == 0 && s.threads() <= 1024, "a thread has one column of y; m", m);
    std::set<int> slots;
    for (int tile = 0; tile < s.row_warps * s.row_tiles; ++tile) {
      for (int warp = 0; warp < s.depth_warps; ++warp) slots.insert(slot_of(s.depth_warps, tile, warp));
    }
    check::equal(slots.size() * s.slot_floats() * 4, s.sums_bytes(), "a slot for each warp and tile; m", m);
    check::equal(*slots.rbegin() + 1, slots.size(), "and none between them; m", m);
    check::that(sum_at(s.token_tiles * kTokenTile - 1, kTileRows - 1) < s.slot_floats(), "a sum is in its slot; m", m);
  }
}

void plans_keep_their_limits(uint64_t) {
  for (int sm_count : {1, 20, 46, 108, 132}) {
    for (int limit : {101376, 166912, 232448}) {
      for (int m : {1, 7, 8, 9, 16, 17, 31, 32, 33, 48, 64}) {
        for (int k : {64, 192, 384, 768, 3072, 4096, 11008, 14336, 32768}) {
          for (int n : {1, 15, 384, 768, 1024, 4096, 14336, 128256}) {
            const ForwardPlan plan = plan_forward(m, n, k, sm_count, limit);
            const Shape s = shape_of(token_tiles_of(m));
            if (plan.token_tiles == 0) {
              check::that(forward_bytes(s, m, most_batches(k, sm_count)) > limit, "covered, or too large; k", k);
              continue;
            }
            const int units = parts_of(n, s.rows()) * plan.splits;
            check::equal(plan.token_tiles, s.token_tiles, "tiles of tokens", m);
            check::that(plan.grid >= 1 && plan.grid <= sm_count && plan.grid <= units, "one block to an SM; k", k);
            check::equal(plan.grid % plan.splits, 0, "a block keeps its split; k", k);
            check::that(plan.splits <= parts_of(k, kBatch), "no split is empty; k", k);
            check::equal(plan.smem_bytes, forward_bytes(s, m, most_batches(k, plan.splits)), "bytes; k", k);
            check::that(plan.smem_bytes <= limit, "what a block may have; k", k);
            if (s.threads() * parts_of(n, s.rows()) >= 132 * 512 && m <= 8 && k <= 4096 && sm_count == 132)
              check::equal(plan.splits, 1, "no barrier where rows are enough; n", n);
          }
        }
      }
    }
  }
  const auto is_covered = [](int64_t m, int64_t n, int64_t k) {
    return plan_forward(m, n, k, 132, 232448).token_tiles > 0;
  };
  check::that(is_covered(1, 1, 64) && is_covered(64, kForwardMaxSize, 32768), "the ends of the range");
  for (int64_t m : {int64_t{0}, int64_t{65}, int64_t{1} << 40}) check::that(!is_covered(m, 8, 64), "m", m);
  for (int64_t n : {int64_t{0}, kForwardMaxSize + 1}) check::that(!is_covered(1, n, 64), "n", n);
  for (int64_t k : {int64_t{0}, int64_t{32}, int64_t{96}, kForwardMaxSize + 64}) check::that(!is_covered(1, 8, k), "k", k);
}

// Layers of models: as many blocks as multiprocessors, nearly, and one batch after the other for each.
void layers_fill_the_gpu(uint64_t) {
  for (int m : {1, 16, 64}) {
    using Pair = std::pair<int, int>;
    for (const auto& [k, n] : {Pair{4096, 4096}, Pair{4096, 14336}, Pair{14336, 4096}, Pair{4096, 1024}}) {
      const ForwardPlan plan = plan_forward(m, n, k, 132, 232448);
      const Shape s = shape_of(plan.token_tiles);
      const int64_t busiest = int64_t{parts_of(parts_of(n, s.rows()) * plan.splits, plan.grid)} * s.rows() *
                              most_batches(k, plan.splits) * kBatch;
      if (n > 1024) check::that(busiest * 132 < int64_t{n} * k * 5 / 4, "the busiest block has at most a quarter more", n);
      check::that(busiest * 64 <= int64_t{n} * k * 5 / 4, "and never twice that", n);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"positions of every mask", positions_of_every_mask},
                     {"every group of a step is at one place", every_group_of_a_step_is_at_one_place},
                     {"lanes meet no bank twice", lanes_meet_no_bank_twice},
                     {"every batch has one split", every_batch_has_one_split},
                     {"blocks fit together", blocks_fit_together},
                     {"plans keep their limits", plans_keep_their_limits},
                     {"layers fill the GPU", layers_fill_the_gpu}},
                    1);
}
