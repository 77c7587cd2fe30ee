// Who does what in the kernels of wavelet, for every size in range: pairs and their places in the factors, a thread's
// pieces, banks, plans.
#include "wavelet/haar.h"

#include <set>

#include "check.h"
#include "host/gpu.h"

namespace {

using namespace wavelet;

// As python/lowfat/ops/wavelet.py has them: LL; LL, HH; LL, LH, HL, HH, each "to, from".
void pairs_are_in_their_order(uint64_t) {
  const int ends[][4][2] = {{{0, 0}}, {{0, 0}, {1, 1}}, {}, {{0, 0}, {0, 1}, {1, 0}, {1, 1}}};
  for (int pairs : {1, 2, 4}) {
    for (int pair = 0; pair < pairs; ++pair) {
      check::equal(target_of(pairs, pair), ends[pairs - 1][pair][0], "target", pair);
      check::equal(source_of(pairs, pair), ends[pairs - 1][pair][1], "source", pair);
    }
    for (int half : {0, 1}) {
      std::set<int> into, from;
      for (int i = 0; i < pairs_at(pairs, half); ++i) {
        into.insert(pair_into(pairs, half, i)), from.insert(pair_from(pairs, half, i));
      }
      for (int pair = 0; pair < pairs; ++pair) {
        check::equal(into.count(pair), target_of(pairs, pair) == half, "pairs into a half", pair);
        check::equal(from.count(pair), source_of(pairs, pair) == half, "pairs from a half", pair);
      }
      check::equal(into.size() + from.size(), 2 * pairs_at(pairs, half), "no other pairs", half);
    }
  }
}

void each_number_of_a_factor_has_its_place(uint64_t) {
  for (int pairs : {1, 2, 4}) {
    std::set<int64_t> in_v, in_u;
    const int r = 24, width = 40;
    for (int pair = 0; pair < pairs; ++pair) {
      for (int rank = 0; rank < r; ++rank) {
        for (int i = 0; i < width; ++i) {
          in_v.insert(place_in_v(pairs, width, pair, rank, i)), in_u.insert(place_in_u(r, width, pair, rank, i));
        }
      }
    }
    for (const auto& places : {in_v, in_u}) {
      check::equal(places.size(), pairs * r * width, "places");
      check::equal(*places.rbegin(), pairs * r * width - 1, "the last place");
    }
  }
}

void threads_share_a_stage_of_the_factor(uint64_t) {
  std::set<std::pair<int, int>> of_v, of_u;
  for (int thread = 0; thread < kThreads; ++thread) {
    const FactorPiece v = piece_of_v(thread), u = piece_of_u(thread);
    for (int i = 0; i < 8; ++i) {
      of_v.insert({v.column, v.coefficient + i}), of_u.insert({u.column + i, u.coefficient});
    }
  }
  for (const auto& all : {of_v, of_u}) {
    check::equal(all.size(), kTile * kDepth / 2, "numbers of a stage, each once");
    check::equal(all.rbegin()->first, kTile - 1, "columns of the middle");
  }
  // Written doubled: of eight lanes, which the memory serves at a time, each has banks of its own.
  for (int first = 0; first < kThreads; first += 8) {
    std::set<int> rows_of_u;
    for (int thread = first; thread < first + 8; ++thread) {
      const FactorPiece u = piece_of_u(thread);
      rows_of_u.insert(low_rank::tile_piece(kTile / 8, 2 * u.coefficient, u.column / 8) % 8);
    }
    check::equal(rows_of_u.size(), 8, "groups of banks", first);
  }
}

void outputs_have_room_and_lanes_their_banks(uint64_t) {
  for (int pairs : {1, 2, 4}) {
    for (int r = 8; pairs * r <= kMaxMiddle; r += 8) {
      check::that(padded_rank(r) % 16 == 0 && padded_rank(r) >= r && padded_rank(r) < r + 16, "padded rank", r);
      for (int contraction : {padded_rank(r), pairs * padded_rank(r)}) {
        std::set<int> groups;
        for (int row = 0; row < 8; ++row) groups.insert(row * row_pieces(contraction) % 8);
        check::equal(groups.size(), 8, "groups of banks of eight rows", r);
        check::that(row_pieces(contraction) * 8 >= contraction, "room for a row", r);
      }
      for (bool is_along : {false, true}) {
        check::that(output_smem_bytes(r, pairs, is_along) <= kOutputSmemBytes, "shared memory", r);
        check::that(kOutputSmemBytes <= shared_memory_of(80) && 2 * kOutputSmemBytes <= 228 << 10, "of a GPU", r);
      }
    }
  }
}

void plans_cover_what_they_may(uint64_t) {
  for (int sm_count : {1, 84, 108, 132}) {
    for (int64_t m : {1, 16, 64, 65, 1000, 4096, 100000}) {
      for (int64_t size : {16, 768, 4096, 14336}) {
        for (int64_t r : {8, 16, 64}) {
          for (int64_t pairs : {1, 2, 4}) {
            const ForwardPlan plan = plan_forward(m, size, size, r, pairs, sm_count);
            check::that(plan.splits >= 1 && plan.parts >= 1, "covered", m);
            check::that(plan.parts <= parts_of(static_cast<int>(size), 128), "a part has a tile at least", size);
            check::that(plan.splits <= larger(1, parts_of(static_cast<int>(size), kDepth)), "a split has a stage", size);
            check::equal(plan.partials, plan.splits * m * pairs * r, "workspace");
            for (int needs = 0; needs < 16; ++needs) {
              const BackwardPlan back = plan_backward(m, size, size, r, pairs, needs, sm_count);
              check::that(back.weight_splits >= 1 && back.partials >= back.dx.partials, "covered", needs);
            }
          }
        }
      }
    }
  }
  const int64_t far = int64_t{1} << 60;
  const int64_t refused[][5] = {
      {0, 64, 64, 8, 2},   {1, 72, 64, 8, 2},  {1, 64, 72, 8, 2},  {1, 64, 64, 4, 2},      {1, 64, 64, 12, 2},
      {1, 64, 64, 8, 3},   {1, 64, 64, 136, 2}, {1, 64, 64, 72, 4}, {1, 0, 64, 8, 1},       {1, 64, 0, 8, 1},
      {1 << 25, 64, 64, 8, 1}, {1, 1 << 25, 64, 8, 1}, {1, 64, 1 << 25, 8, 1}, {1, 64, 64, far, 4}};
  for (const auto& [m, n, k, r, pairs] : refused) {
    check::equal(plan_forward(m, n, k, r, pairs, 132).splits, 0, "refused", m);
    check::equal(plan_backward(m, n, k, r, pairs, 15, 132).weight_splits, 0, "refused", m);
  }
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"pairs are in their order", pairs_are_in_their_order},
                     {"each number of a factor has its place", each_number_of_a_factor_has_its_place},
                     {"threads share a stage of the factor", threads_share_a_stage_of_the_factor},
                     {"outputs have room, and lanes their banks", outputs_have_room_and_lanes_their_banks},
                     {"plans cover what they may", plans_cover_what_they_may}},
                    1);
}
