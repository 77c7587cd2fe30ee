// The weight-stationary clusters of monarch in the emulator: both dtypes, both forms, every tile, ragged sizes; every seed
// must give the same bits.
//
// Outputs start as NaN and have exact bounds; each access outside is reported, and so is one that is not aligned.
#include "monarch/stationary.cu"

#include <map>

#include "check.h"
#include "monarch_truth.h"

namespace {

using namespace monarch;
using monarch_truth::equal, monarch_truth::Errors, monarch_truth::operands, monarch_truth::Operands, monarch_truth::Outputs,
    monarch_truth::Truth, monarch_truth::truth_of, monarch_truth::wide, monarch_truth::within;

constexpr int kLimit = 227 << 10;  // bytes of shared memory in a block

struct Shape {
  Sizes sizes;
  bool has_bias;
  int sm_count = 8;
};

const Shape kRagged[] = {
    {{1, 256, 256, 16, 16, 1, true}, true},                // one of everything
    {{70, 256, 256, 16, 16, 1, true}, true, 16},           // two clusters, tiles of 32
    {{30, 520, 1536, 32, 32, 1, true}, true, 17},          // outputs that the blocks do not divide; tiles of 16
    {{50, 1024, 1280, 16, 64, 2, true}, false, 24},        // two slabs and row tiles of v, stores of 16 bytes
    {{100, 1288, 1016, 16, 16, 5, true}, true},            // the same of u, no part of them full; inputs are padded
    {{90, 1152, 768, 48, 48, 1, true}, true, 16},          // six blocks of a CTA, in pairs; tiles go around
    {{20, 1024, 488, 32, 64, 1, true}, true},              // an input block of padding
    {{20, 1024, 256, 16, 128, 1, true}, true},             // 16 output blocks of a CTA, eight at a time
    {{1, 256, 256, 16, 16, 1, false}, true},               // runs of y: the smallest
    {{70, 1272, 768, 16, 16, 3, false}, true, 16},         // the last run is shorter, tiles are not full
    {{45, 1536, 488, 32, 64, 2, false}, false},            // eight blocks together, half of a warp's rows in the next
};
constexpr size_t kShapes = sizeof kRagged / sizeof *kRagged;

StationaryPlan plan_of(const Sizes& s, int sm_count) {
  const StationaryPlan plan = plan_stationary(s.m, s.n, s.k, s.b_in, s.b_out, s.r, s.interleave, sm_count, kLimit);
  check::that(plan.tokens > 0, "the shape is covered");
  return plan;
}

struct Known {
  Operands in;
  Truth truth;
  Outputs first;  // of the first seed
};

template <class T>
Known& known_of(size_t shape, bool is_whole) {
  static std::map<size_t, Known> all;
  Known& known = all[2 * shape + is_whole];
  if (known.truth.y.empty()) {
    known.in = operands<T>(kRagged[shape].sizes, kRagged[shape].has_bias, is_whole);
    known.truth = truth_of<T>(kRagged[shape].sizes, known.in);
  }
  return known;
}

template <class T>
Outputs run(const Sizes& s, const StationaryPlan& plan, const Operands& in, emulator::Options options, bool wants_h = true) {
  emulator::Buffer<uint16_t> x("x", in.x), v("v", in.v), u("u", in.u), bias("bias", in.bias, 1);
  emulator::Buffer<uint16_t> y("y", size_t(s.m) * s.n), h("h", wants_h ? size_t(s.b_out) * s.m * s.b_in * s.r : 0);
  const MonarchOperands operands{x.data(), v.data(), u.data(), in.bias.empty() ? nullptr : bias.data(),
                                 wants_h ? h.data() : nullptr, y.data(), s};
  const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
  const char* error = launch_stationary(plan, operands, dtype, nullptr);
  check::that(error == nullptr, error ? error : "");
  emulator::synchronize(options);
  return {{y.data(), y.data() + y.size()}, {h.data(), h.data() + h.size()}};
}

// --- cases ---

template <class T>
void ragged_shapes(uint64_t seed) {
  if (seed > 1 && std::is_same<T, device::Fp16>::value) return;  // the order of threads knows no dtype
  Errors errors;
  for (size_t i = 0; i < kShapes; ++i) {
    Known& known = known_of<T>(i, false);
    const Sizes& s = kRagged[i].sizes;
    const Outputs out = run<T>(s, plan_of(s, kRagged[i].sm_count), known.in, {seed});
    if (seed == 1) known.first = out;
    check::that(out.y == known.first.y && out.h == known.first.h, "every seed gives the same bits; shape", i);
    const auto y = wide<T>(out.y), h = wide<T>(out.h);
    within(h, known.truth.h, known.truth.h_bound, emulator::text("h of shape %zu", i).c_str());
    within(y, known.truth.y, known.truth.y_bound, emulator::text("y of shape %zu", i).c_str());
    errors.add(y, known.truth);
  }
  errors.pass();
}

// Every product and sum is exact, so each single term counts.
template <class T>
void whole_numbers(uint64_t seed) {
  if (seed > 1) return;  // every seed gives the same bits
  for (size_t i = 0; i < kShapes; ++i) {
    const Known& known = known_of<T>(i, true);
    for (double one : known.truth.h) check::that(std::fabs(one) <= 256, "h is exact in bf16", i);
    for (double one : known.truth.y) check::that(std::fabs(one) <= 256, "y is exact in bf16", i);
    const Sizes& s = kRagged[i].sizes;
    const Outputs out = run<T>(s, plan_of(s, kRagged[i].sm_count), known.in, {seed});
    equal(wide<T>(out.h), known.truth.h, emulator::text("h of shape %zu", i).c_str());
    equal(wide<T>(out.y), known.truth.y, emulator::text("y of shape %zu", i).c_str());
  }
}

// How tokens are dealt to tiles and clusters does not show, nor how many tiles are under way, whether all clusters run at a
// time, whether h is stored, and in which row or company a token is.
template <class T, bool kInterleave>
void every_plan_gives_the_same_bits(uint64_t seed) {
  if (seed > 1 && std::is_same<T, device::Fp16>::value) return;
  Sizes s{75, 512, 768, 16, 32, 3, kInterleave};
  const Operands in = operands<T>(s, true, false);
  const StationaryPlan plan = plan_of(s, 16);
  const Outputs expected = run<T>(s, plan, in, {seed});
  struct Other {
    int tokens, middles, inputs, clusters;
  };
  for (const Other& other : {Other{16, 1, 1, 1}, Other{16, 2, 2, 2}, Other{32, 1, 3, 1}, Other{32, 2, 1, 2}}) {
    StationaryPlan one = plan;
    one.tokens = other.tokens, one.middles = other.middles, one.inputs = other.inputs, one.clusters = other.clusters;
    one.tiles = parts_of(s.m, one.tokens);
    one.smem_bytes = stationary_memory(s, one.tokens, one.middles, one.inputs).bytes;
    const Outputs found = run<T>(s, one, in, {seed, kClusterCtas});
    check::that(found.y == expected.y && found.h == expected.h, "the same bits; tokens of a tile", one.tokens);
    check::that(run<T>(s, one, in, {seed}, false).y == expected.y, "without h; tokens of a tile", one.tokens);
  }
  const size_t row = s.m - 1;
  s.m = 1;
  Operands last = in;
  last.x.assign(in.x.begin() + row * s.k, in.x.end());
  const Outputs alone = run<T>(s, plan_of(s, 16), last, {seed});
  check::that(std::equal(alone.y.begin(), alone.y.end(), expected.y.begin() + row * s.n), "the last row alone");
}

// Not in what is zero times something, either: rows past the end of a tile; nor in another output than those of its row.
void not_a_number_stays_in_its_row(uint64_t seed) {
  const Sizes s{33, 256, 488, 32, 16, 2, true};
  for (int row : {0, 32}) {
    Operands in = operands<device::Bf16>(s, true, false);
    in.x[row * s.k + 487] = 0x7fc0;
    const auto y = wide<device::Bf16>(run<device::Bf16>(s, plan_of(s, 8), in, {seed}).y);
    for (int token = 0; token < s.m; ++token) {
      for (int column = 0; column < s.n; ++column) {
        check::that(std::isnan(y[token * s.n + column]) == (token == row), "only one row is NaN; found", token);
      }
    }
  }
}

// Of another input block: its numbers stand beside those of a block that is no multiple of a slab.
void infinity_stays_in_its_block(uint64_t seed) {
  if (seed > 1) return;
  const Sizes s{16, 256, 256, 16, 16, 1, true};
  Operands in = operands<device::Bf16>(s, false, false);
  std::fill(in.x.begin(), in.x.end(), 0);
  in.x[5 * 16] = 0x7f80;  // token 0, input block 5
  const auto h = wide<device::Bf16>(run<device::Bf16>(s, plan_of(s, 8), in, {seed}).h);
  for (int o = 0; o < s.b_out; ++o) {
    for (int i = 0; i < s.b_in; ++i) {
      check::that(std::isinf(h[size_t(o) * s.m * s.b_in + i]) == (i == 5), "one block's middle is infinite; found", i);
      if (i != 5) check::equal(h[size_t(o) * s.m * s.b_in + i], 0, "the others' is zero", i);
    }
  }
}

void layer_of_a_model(uint64_t seed) {
  if (seed != 1) return;
  for (const Sizes& s : {Sizes{40, 4096, 4096, 64, 64, 1, true}, Sizes{24, 4096, 4096, 32, 32, 2, false}}) {
    const Operands in = operands<device::Bf16>(s, true, true);
    const Truth truth = truth_of<device::Bf16>(s, in);
    equal(wide<device::Bf16>(run<device::Bf16>(s, plan_of(s, 16), in, {seed}).y), truth.y, "y");
  }
}

void an_empty_plan_is_refused(uint64_t) {
  MonarchOperands none{};
  none.sizes = {1, 8, 8, 1, 1, 8, true};
  const char* error = launch_stationary(StationaryPlan(), none, Dtype::bfloat16, nullptr);
  check::that(error && strstr(error, "does not cover"), "an error in words");
}

}  // namespace

int main(int count, char** arguments) {
  using device::Bf16, device::Fp16;
  return check::run(count, arguments,
                    {{"ragged shapes, bf16", ragged_shapes<Bf16>},
                     {"ragged shapes, fp16", ragged_shapes<Fp16>},
                     {"whole numbers, bf16", whole_numbers<Bf16>},
                     {"whole numbers, fp16", whole_numbers<Fp16>},
                     {"every plan gives the same bits, interleaved, bf16", every_plan_gives_the_same_bits<Bf16, true>},
                     {"every plan gives the same bits, runs, fp16", every_plan_gives_the_same_bits<Fp16, false>},
                     {"NaN stays in its row", not_a_number_stays_in_its_row},
                     {"infinity stays in its block", infinity_stays_in_its_block},
                     {"layer of a model", layer_of_a_model},
                     {"an empty plan is refused", an_empty_plan_is_refused}});
}
