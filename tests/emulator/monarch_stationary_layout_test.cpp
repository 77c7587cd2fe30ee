// Who does what in the weight-stationary clusters of monarch, for a wide range of sizes: memory without overlaps, each row of
// the middle from one CTA to its place, no bank twice, and plans that keep their limits.
#include "monarch/stationary_layout.h"

#include <set>
#include <vector>

#include "check.h"

namespace {

using namespace monarch;

constexpr int kLimit = 227 << 10;  // bytes of shared memory in a block

template <class Visit>
void each_plan(const Visit& visit) {
  for (int b_in : {16, 32, 48, 64, 96, 128}) {
    for (int b_out : {16, 32, 48, 64, 96, 128}) {
      for (int r : {1, 2, 3, 5, 8}) {
        for (int p : {16, 48, 64, 80, 128}) {
          for (int rows : {1, 8, 24, 64, 80, 128}) {
            for (int m : {1, 20, 300, 5000}) {
              for (bool interleave : {true, false}) {
                const Sizes s{m, b_out * rows - (rows > 8 ? 8 : 0), b_in * p - 8, b_in, b_out, r, interleave};
                const StationaryPlan plan =
                    plan_stationary(s.m, s.n, s.k, s.b_in, s.b_out, s.r, s.interleave, 132, kLimit);
                if (plan.tokens > 0) visit(s, plan);
              }
            }
          }
        }
      }
    }
  }
}

void memory_has_no_overlaps(uint64_t) {
  int plans = 0;
  each_plan([&](const Sizes& s, const StationaryPlan& plan) {
    ++plans;
    const StationaryMemory at = stationary_memory(s, plan.tokens, plan.middles, plan.inputs);
    const int ends[] = {at.v + first_part(s).bytes(),
                        at.u + second_part(s).bytes(),
                        at.middles + plan.middles * middle_bytes(s, plan.tokens),
                        at.inputs + plan.inputs * input_slot_bytes(first_part(s), plan.tokens),
                        at.staging + plan.middles * staging_bytes(s, plan.tokens),
                        at.patches + (s.interleave ? 0 : 4 * patch_bytes(plan.tokens)),
                        at.bias + second_part(s).blocks * s.s() * 2,
                        at.barriers + 8 * (2 + 2 * kMostMiddles + 2 * kMostInputs)};
    const int begins[] = {at.v, at.u, at.middles, at.inputs, at.staging, at.patches, at.bias, at.barriers, at.bytes};
    for (int i = 0; i < 8; ++i) check::that(ends[i] <= begins[i + 1], "one after the other; region", i);
    for (int i = 0; i < 4; ++i) check::equal(begins[i] % 1024, 0, "where tiles may be", i);
    for (int i = 4; i < 8; ++i) check::equal(begins[i] % 16, 0, "where pieces and barriers may be", i);
    check::equal(at.bytes, plan.smem_bytes, "bytes");
    check::that(at.bytes <= kLimit, "that a block may have");
    check::equal(block_bytes(s, plan.tokens) % (16 * row_bytes(plan.tokens)), 0, "whole steps of the contraction");
  });
  check::that(plans > 1000, "there were plans", plans);
}

// What the 8 CTAs stage of an output block are the rows of its h, in the order that u has them, each once.
void rows_of_the_middle_are_made_once(uint64_t) {
  for (const Sizes& s : {Sizes{1, 256, 256, 16, 16, 1, true}, Sizes{1, 512, 768, 48, 32, 3, true},
                         Sizes{1, 1024, 1024, 64, 16, 5, true}}) {
    const Part first = first_part(s);
    for (int o = 0; o < s.b_out; ++o) {
      std::vector<int> made(s.b_in * s.r, 0);
      for (int rank = 0; rank < kClusterCtas; ++rank) {
        for (int block = 0; block < first.blocks; ++block) {
          for (int j = 0; j < s.r; ++j) {
            const int q = j * s.b_out + o, row = run_rows(s) * rank + row_in_run(s, block, q);
            check::equal(row, (rank * first.blocks + block) * s.r + j, "i r + j", row);
            ++made.at(row);
          }
        }
      }
      for (int row = 0; row < s.b_in * s.r; ++row) check::equal(made[row], 1, "made once", row);
    }
  }
}

// A matrix of stmatrix is eight rows of 16 bytes: of neighbouring runs, or of neighbouring tokens in a patch.
void lanes_meet_no_bank_twice(uint64_t) {
  const auto banks = [](int stride) {
    std::set<int> found;
    for (int row = 0; row < 8; ++row) found.insert(row * stride % 128 / 16);
    return found.size();
  };
  each_plan([&](const Sizes& s, const StationaryPlan& plan) {
    check::equal(banks(run_stride(s, plan.tokens)), 8, "runs", run_rows(s));
    check::equal(run_stride(s, plan.tokens) % 16, 0, "whole pieces", run_rows(s));
  });
  check::equal(banks(kPatchStride), 8, "patches");
}

void plans_keep_their_limits(uint64_t) {
  std::set<int> tokens, middles, together;
  each_plan([&](const Sizes& s, const StationaryPlan& plan) {
    tokens.insert(plan.tokens), middles.insert(plan.middles), together.insert(plan.together);
    check::that(plan.inputs >= 1 && plan.inputs <= kMostInputs && plan.middles <= kMostMiddles, "slots", plan.inputs);
    check::equal(plan.tiles, parts_of(s.m, plan.tokens), "tiles", s.m);
    check::that(plan.clusters >= 1 && plan.clusters <= smaller(16, plan.tiles), "clusters", plan.clusters);
    check::equal(second_part(s).blocks % plan.together, 0, "whole groups of output blocks", s.b_out);
    check::that(plan.tokens == 16 || s.m > 256, "larger tiles where all clusters have one", s.m);
  });
  check::that(tokens.size() == 2 && middles.size() == 2 && together.size() == 3, "of each kind there was one");
}

void the_plans_of_models(uint64_t) {
  const StationaryPlan many = plan_stationary(4096, 4096, 4096, 64, 64, 1, true, 132, kLimit);
  check::that(many.tokens == 16 && many.together == 8 && many.middles == 2, "64 blocks of 64");
  check::that(many.clusters == 16 && many.inputs >= 4, "all of the GPU, a tile of inputs ahead");
  const StationaryPlan one = plan_stationary(1, 4096, 4096, 64, 64, 1, true, 132, kLimit);
  check::that(one.tokens == 16 && one.clusters == 1, "one token: one cluster");
  static_assert(plan_stationary(4096, 1024, 1024, 32, 32, 1, true, 132, 227 << 10).tokens == 32, "known at compile time");
}

void what_is_covered(uint64_t) {
  const auto covers = [](int64_t m, int64_t n, int64_t k, int64_t b_in, int64_t b_out, int64_t r, bool interleave = true) {
    return plan_stationary(m, n, k, b_in, b_out, r, interleave, 132, kLimit).tokens > 0;
  };
  check::that(covers(1, 16, 256, 16, 16, 1) && covers(kMaxRows, 4096, 4096, 64, 64, 1), "the ends of the range");
  check::that(!covers(0, 256, 256, 16, 16, 1) && !covers(kMaxRows + 1, 256, 256, 16, 16, 1), "rows");
  check::that(!covers(1, 256, 256, 8, 16, 2) && !covers(1, 256, 320, 20, 16, 4) && !covers(1, 256, 256, 16, 24, 1), "blocks");
  check::that(!covers(1, 256, 128, 16, 16, 1) && covers(1, 256, 248, 16, 16, 1), "steps of 16 inputs");
  check::that(!covers(1, 252, 256, 16, 16, 1), "outputs in whole pieces");
  check::that(covers(1, 272, 256, 16, 16, 1) && !covers(1, 272, 256, 16, 16, 1, false), "runs in whole pieces");
  check::that(!covers(4096, 4096, 4096, 32, 32, 4) && !covers(4096, 4096, 4096, 16, 16, 8), "both factors in a cluster");
  check::that(!covers(1, 1 << 20, 1 << 20, 1 << 10, 1 << 10, 1 << 10), "weights that no int counts");
  check::that(plan_stationary(1, 256, 256, 16, 16, 1, true, 7, kLimit).tokens == 0, "a GPU of less than a cluster");
  check::that(plan_stationary(1, 256, 256, 16, 16, 1, true, 132, 0).tokens == 0, "a GPU without machine code");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"memory has no overlaps", memory_has_no_overlaps},
                     {"rows of the middle are made once", rows_of_the_middle_are_made_once},
                     {"lanes meet no bank twice", lanes_meet_no_bank_twice},
                     {"plans keep their limits", plans_keep_their_limits},
                     {"the plans of models", the_plans_of_models},
                     {"what is covered", what_is_covered}},
                    1);
}
