// The batched products of monarch in the emulator: both dtypes, both forms, every tile, ragged sizes; every seed must give
// the same bits.
//
// Outputs start as NaN and have exact bounds; each access outside is reported, and so is one that is not aligned.
#include "monarch/batched.cu"

#include <map>

#include "check.h"
#include "monarch_truth.h"

namespace {

using namespace monarch;
using monarch_truth::equal, monarch_truth::Errors, monarch_truth::operands, monarch_truth::Operands, monarch_truth::Outputs,
    monarch_truth::Truth, monarch_truth::truth_of, monarch_truth::wide, monarch_truth::within;

struct Shape {
  int m, k, n, b_in, b_out, r;
  bool has_bias;
  int sm_count = 2;
  int smem_limit = 163 << 10;
  TileSize tile{};  // none: as planned
};

const Shape kRagged[] = {
    {1, 8, 8, 1, 1, 8, true},              // one of everything
    {5, 64, 64, 8, 8, 1, true},            // groups of eight blocks, one slab that is not full
    {16, 256, 256, 16, 16, 1, false, 1},   // groups of 16, whole sectors
    {40, 320, 320, 20, 20, 2, true},       // the last groups are smaller
    {33, 120, 130, 5, 3, 8, true},         // outputs that are no multiple of 8: single elements
    {70, 208, 168, 9, 4, 24, true},        // inputs that the blocks do not divide
    {17, 120, 40, 16, 2, 16, false},       // the last input block has no inputs but padding
    {65, 264, 144, 1, 3, 72, true},        // the large tile, ragged; tiles of 128 columns over three output blocks
    {130, 144, 136, 2, 2, 68, true},       // a rank of no whole pieces: both input blocks in a group
    {70, 144, 136, 1, 1, 136, false},      // one block: a plain product; more columns than a tile has
    {20, 384, 384, 24, 24, 1, true, 1},    // outputs in groups of 16 and 8
    {20, 384, 384, 24, 24, 1, true, 300},  // as few blocks in a group as keep multiprocessors busy: elements
    {35, 96, 100, 4, 50, 2, false, 4},     // output blocks of two
    {9, 200, 44, 1, 44, 8, true, 1},       // output blocks of one
    {48, 1056, 72, 2, 3, 12, true, 3, 99 << 10},  // nine slabs: stages go around
};
constexpr size_t kShapes = sizeof kRagged / sizeof *kRagged;

Sizes sizes_of(const Shape& s, bool interleave) { return {s.m, s.n, s.k, s.b_in, s.b_out, s.r, interleave}; }

MonarchPlan plan_of(const Shape& s, bool interleave) {
  MonarchPlan plan = plan_monarch(s.m, s.n, s.k, s.b_in, s.b_out, s.r, interleave, s.sm_count, s.smem_limit);
  check::that(plan.first.tokens > 0 && plan.second.tokens > 0, "the shape is covered");
  const Sizes sizes = sizes_of(s, interleave);
  if (s.tile.tokens > 0) {
    const auto planned = [&](const Batch& b) { return plan_of_tile(b, s.tile, group_with_room(b, s.tile, 227 << 10)); };
    plan.first = planned(first_batch(sizes)), plan.second = planned(second_batch(sizes));
  }
  return plan;
}

struct Known {
  Operands in;
  Truth truth;
  Outputs first;  // of the first seed
};

template <class T>
Known& known_of(size_t shape, bool interleave, bool is_whole) {
  static std::map<size_t, Known> all;
  Known& known = all[4 * shape + 2 * interleave + is_whole];
  if (known.truth.y.empty()) {
    known.in = operands<T>(sizes_of(kRagged[shape], interleave), kRagged[shape].has_bias, is_whole);
    known.truth = truth_of<T>(sizes_of(kRagged[shape], interleave), known.in);
  }
  return known;
}

template <class T>
Outputs run(const Shape& s, bool interleave, const Operands& in, emulator::Options options) {
  const MonarchPlan plan = plan_of(s, interleave);
  emulator::Buffer<uint16_t> x("x", in.x), v("v", in.v), u("u", in.u), bias("bias", in.bias, 1);
  emulator::Buffer<uint16_t> y("y", size_t(s.m) * s.n), h("h", size_t(s.b_out) * s.m * s.b_in * s.r);
  const MonarchOperands operands{x.data(), v.data(), u.data(), s.has_bias ? bias.data() : nullptr,
                                 h.data(), y.data(), sizes_of(s, interleave)};
  const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
  const char* error = launch_monarch(plan, operands, dtype, nullptr);
  check::that(error == nullptr, error ? error : "");
  emulator::synchronize(options);
  return {{y.data(), y.data() + y.size()}, {h.data(), h.data() + h.size()}};
}

// --- cases ---

template <class T, bool kInterleave>
void ragged_shapes(uint64_t seed) {
  if (seed > 1 && std::is_same<T, device::Fp16>::value) return;  // the order of threads knows no dtype
  Errors errors;
  for (size_t i = 0; i < kShapes; ++i) {
    Known& known = known_of<T>(i, kInterleave, false);
    const Outputs out = run<T>(kRagged[i], kInterleave, known.in, {seed});
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
template <class T, bool kInterleave>
void whole_numbers(uint64_t seed) {
  if (seed > 1) return;  // every seed gives the same bits
  for (size_t i = 0; i < kShapes; ++i) {
    const Known& known = known_of<T>(i, kInterleave, true);
    for (double one : known.truth.h) check::that(std::fabs(one) <= 256, "h is exact in bf16", i);
    for (double one : known.truth.y) check::that(std::fabs(one) <= 256, "y is exact in bf16", i);
    const Outputs out = run<T>(kRagged[i], kInterleave, known.in, {seed});
    equal(wide<T>(out.h), known.truth.h, emulator::text("h of shape %zu", i).c_str());
    equal(wide<T>(out.y), known.truth.y, emulator::text("y of shape %zu", i).c_str());
  }
}

// How results are tiled does not show, nor in which row or company a token is.
template <class T, bool kInterleave>
void every_tile_gives_the_same_bits(uint64_t seed) {
  if (seed > 1) return;
  for (Shape s : {Shape{130, 80, 136, 2, 4, 24, true}, Shape{66, 80, 60, 10, 20, 4, true}}) {
    const Operands in = operands<T>(sizes_of(s, kInterleave), s.has_bias, false);
    const Outputs expected = run<T>(s, kInterleave, in, {seed});
    for (const TileSize& tile : kTiles) {
      s.tile = tile;
      const Outputs found = run<T>(s, kInterleave, in, {seed});
      check::that(found.y == expected.y && found.h == expected.h, "the same bits; tokens of a tile", tile.tokens);
    }
    s.tile = {};
    const int all = s.m;
    for (int rows : {1, 20}) {
      s.m = rows;
      Operands less = in;
      less.x.assign(in.x.end() - rows * s.k, in.x.end());
      const Outputs few = run<T>(s, kInterleave, less, {seed});
      check::that(std::equal(few.y.begin(), few.y.end(), expected.y.end() - rows * s.n), "the last rows alone", rows);
    }
    s.m = all;
  }
}

// Not in what is zero times something, either: rows and columns past the end of a tile.
void not_a_number_stays_in_its_row(uint64_t seed) {
  const Shape s{33, 208, 44, 9, 4, 8, true};
  for (int row : {0, 32}) {
    Operands in = operands<device::Bf16>(sizes_of(s, true), s.has_bias, false);
    in.x[row * s.k + 207] = 0x7fc0;
    const auto y = wide<device::Bf16>(run<device::Bf16>(s, true, in, {seed}).y);
    for (int token = 0; token < s.m; ++token) {
      for (int column = 0; column < s.n; ++column) {
        check::that(std::isnan(y[token * s.n + column]) == (token == row), "only one row is NaN; found", token);
      }
    }
  }
}

void layer_of_a_model(uint64_t seed) {
  if (seed != 1) return;
  for (const Shape& s : {Shape{64, 768, 768, 4, 4, 48, true, 12}, Shape{40, 1024, 1024, 32, 32, 1, true, 2}}) {
    const Operands in = operands<device::Bf16>(sizes_of(s, true), s.has_bias, true);
    const Truth truth = truth_of<device::Bf16>(sizes_of(s, true), in);
    equal(wide<device::Bf16>(run<device::Bf16>(s, true, in, {seed}).y), truth.y, "y");
  }
}

void an_empty_plan_is_refused(uint64_t) {
  MonarchOperands none{};
  none.sizes = {1, 8, 8, 1, 1, 8, true};
  const char* error = launch_monarch(MonarchPlan(), none, Dtype::bfloat16, nullptr);
  check::that(error && strstr(error, "does not cover"), "an error in words");
}

}  // namespace

int main(int count, char** arguments) {
  using device::Bf16, device::Fp16;
  return check::run(count, arguments,
                    {{"ragged shapes, interleaved, bf16", ragged_shapes<Bf16, true>},
                     {"ragged shapes, interleaved, fp16", ragged_shapes<Fp16, true>},
                     {"ragged shapes, runs, bf16", ragged_shapes<Bf16, false>},
                     {"ragged shapes, runs, fp16", ragged_shapes<Fp16, false>},
                     {"whole numbers, interleaved, bf16", whole_numbers<Bf16, true>},
                     {"whole numbers, interleaved, fp16", whole_numbers<Fp16, true>},
                     {"whole numbers, runs, bf16", whole_numbers<Bf16, false>},
                     {"whole numbers, runs, fp16", whole_numbers<Fp16, false>},
                     {"every tile gives the same bits, interleaved, bf16", every_tile_gives_the_same_bits<Bf16, true>},
                     {"every tile gives the same bits, runs, fp16", every_tile_gives_the_same_bits<Fp16, false>},
                     {"NaN stays in its row", not_a_number_stays_in_its_row},
                     {"layer of a model", layer_of_a_model},
                     {"an empty plan is refused", an_empty_plan_is_refused}});
}
