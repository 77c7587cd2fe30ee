// The small-batch kernels of low_rank in the emulator: both dtypes, every size of a group, ragged sizes; every seed must
// give the same bits.
//
// Outputs start as NaN and have exact bounds; each access outside is reported.
#include "low_rank/small_batch.cu"

#include "check.h"
#include "low_rank_epilogue_truth.h"

namespace {

using namespace low_rank;
using namespace low_rank_truth;

struct Shape : Sizes {
  int sm_count;
};

constexpr int kH200 = 232448;  // bytes of shared memory in a block
const Shape kRagged[] = {
    {17, 8, 8, 8, true, 132},        // one of everything
    {31, 264, 72, 136, false, 132},  // tails of a tile of v, of a tile of u, of a slab; a cluster of 4, one share larger
    {64, 520, 64, 72, true, 132},    // a cluster of 8
    {100, 136, 200, 328, true, 132},
    {129, 200, 72, 88, true, 132},   // the second half has one token
    {129, 200, 72, 88, false, 1},    // no halves, no cluster
    {256, 72, 8, 200, true, 3},
    {256, 136, 136, 72, false, 132},
    {40, 2056, 8, 16, true, 1},      // 33 slabs in one block: rings go around
    {20, 24, 512, 40, true, 132},
    {250, 456, 200, 40, true, 4},    // 8 slabs, of which two at a time fit
    {70, 16, 1032, 24, false, 132},  // u does not fit
};
constexpr size_t kShapes = sizeof kRagged / sizeof *kRagged;

SmallBatchPlan plan_of(const Shape& s) {
  const SmallBatchPlan plan = plan_small_batch(s.m, s.n, s.k, s.r, s.sm_count, kH200);
  check::that(plan.first.tokens > 0, "the shape is covered");
  return plan;
}

// Runs the op `times` over: queued one after the other, as on a stream, into one h and one y.
template <class T>
Outputs run(const Shape& s, const Operands& in, emulator::Options options, int times = 1, const Epilogue& epilogue = {}) {
  emulator::Buffer<uint16_t> x("x", in.x), v("v", in.v), u("u", in.u), bias("bias", in.bias);
  emulator::Buffer<uint16_t> residual("residual", epilogue.residual);
  emulator::Buffer<uint16_t> y("y", size_t(s.m) * s.n), h("h", size_t(s.m) * s.r);
  const SmallBatchOperands operands{x.data(), v.data(), u.data(), s.has_bias ? bias.data() : nullptr,
                                    residual.size() ? residual.data() : nullptr, epilogue.activation, h.data(), y.data(),
                                    s.m, s.n, s.k, s.r};
  const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
  for (int i = 0; i < times; ++i) {
    const char* error = launch_small_batch(plan_of(s), operands, dtype, nullptr);
    check::that(error == nullptr, error ? error : "");
  }
  emulator::synchronize(options);
  return {{y.data(), y.data() + y.size()}, {h.data(), h.data() + h.size()}};
}

// --- kernels ---

template <class T>
void ragged_shapes(uint64_t seed) {
  Errors errors;
  for (size_t i = 0; i < kShapes; ++i) {
    Known& known = known_of<T>(i, kRagged[i], false);
    const Outputs out = run<T>(kRagged[i], known.in, {seed});
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
  for (size_t i = 0; i < kShapes; ++i) {
    const Known& known = known_of<T>(i, kRagged[i], true);
    for (double one : known.truth.h) check::that(std::fabs(one) <= 256, "h is exact in bf16", i);
    for (double one : known.truth.y) check::that(std::fabs(one) <= 256, "y is exact in bf16", i);
    const Outputs out = run<T>(kRagged[i], known.in, {seed});
    equal(wide<T>(out.h), known.truth.h, emulator::text("h of shape %zu", i).c_str());
    equal(wide<T>(out.y), known.truth.y, emulator::text("y of shape %zu", i).c_str());
  }
}

// The functions by themselves: the two gelus differ by less than a rounding of y.
void activations(uint64_t) {
  for (const Activation one : kActivations) {
    for (float z = -12; z <= 12; z += 0.0137f) {
      const double expected = low_rank_truth::activated(double{z}, one), found = low_rank::activated(z, one);
      check::that(std::fabs(found - expected) <= 0x1p-22 * std::fabs(z), "an activation of 1000 z =", std::lround(1000 * z));
    }
    check::that(std::isnan(low_rank::activated(NAN, one)), "NaN stays NaN");
  }
}

// Each activation and residual meets each size of a group.
template <class T>
void activations_and_residuals(uint64_t seed) {
  Errors errors;
  for (size_t i = 0; i < kShapes; ++i) {
    const Shape& s = kRagged[i];
    const Epilogue end = epilogue<T>(s, kActivations[(2 * seed + i) % 5], (seed + i / 2) % 2, false);
    const Known& known = known_of<T>(i, s, false);
    Truth truth = known.truth;
    finish<T>(truth, end);
    const auto y = wide<T>(run<T>(s, known.in, {seed}, 1, end).y);
    within(y, truth.y, truth.y_bound, emulator::text("y of shape %zu", i).c_str());
    errors.add(y, truth);
  }
  errors.pass();
}

void whole_residuals(uint64_t seed) {
  using T = device::Bf16;
  for (size_t i = 0; i < kShapes; ++i) {
    const Known& known = known_of<T>(i, kRagged[i], true);
    const Epilogue end = epilogue<T>(kRagged[i], (seed + i) % 2 ? Activation::relu : Activation::none, true, true);
    Truth truth = known.truth;
    finish<T>(truth, end);
    equal(wide<T>(run<T>(kRagged[i], known.in, {seed}, 1, end).y), truth.y, emulator::text("y of shape %zu", i).c_str());
  }
}

// A call may follow at once, into the same h: its first kernel depends on nothing, and so waits for all before it.
void calls_one_after_another(uint64_t seed) {
  const Shape s{40, 136, 136, 72, true, 132};
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs one = run<device::Bf16>(s, in, {seed}), three = run<device::Bf16>(s, in, {seed}, 3);
  check::that(one.y == three.y && one.h == three.h, "the same bits");
}

// Only a cluster has to be resident together: nothing waits for the rest of its grid.
void few_blocks_resident(uint64_t seed) {
  const Shape s{40, 264, 136, 200, true, 132};
  check::equal(plan_of(s).first.splits, 4, "blocks of a cluster");
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs all = run<device::Bf16>(s, in, {seed}), few = run<device::Bf16>(s, in, {seed, 4});
  check::that(all.y == few.y && all.h == few.h, "the same bits");
}

// How tokens are grouped does not show, nor in which row or company one is.
void bits_depend_on_depth_alone(uint64_t seed) {
  Shape s{200, 64, 136, 72, true, 132};
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs halves = run<device::Bf16>(s, in, {seed});
  check::equal(plan_of(s).first.groups, 2, "groups");
  s.sm_count = 1;
  check::equal(plan_of(s).first.groups, 1, "groups");
  check::that(run<device::Bf16>(s, in, {seed}).y == halves.y, "the same bits in one group");
  for (int rows : {17, 50, 100}) {
    s.m = rows;
    Operands less = in;
    less.x.assign(in.x.end() - rows * s.k, in.x.end());
    const Outputs few = run<device::Bf16>(s, less, {seed});
    check::that(std::equal(few.y.begin(), few.y.end(), halves.y.end() - rows * s.n), "the last rows by themselves", rows);
  }
}

// Not in what is zero times something, either: rows and columns past the end of a tile.
void not_a_number_stays_in_its_row(uint64_t seed) {
  const Shape s{33, 264, 40, 56, true, 132};
  for (int row : {0, 32}) {
    Operands in = operands<device::Bf16>(s, false);
    in.x[row * s.k + 263] = 0x7fc0;
    const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}).y);
    for (int token = 0; token < s.m; ++token) {
      for (int column = 0; column < s.n; ++column) {
        check::that(std::isnan(y[token * s.n + column]) == (token == row), "only one row is NaN; found", token);
      }
    }
  }
}

// Rows of 768, as a layer of a model has. Once: other seeds have the small shapes.
void layer_of_a_model(uint64_t seed) {
  if (seed != 1) return;
  const Shape s{128, 768, 192, 768, true, 132};
  check::equal(plan_of(s).first.splits, 8, "blocks of a cluster");
  check::equal(plan_of(s).second.weight_slots, 3, "slots: all of u is asked for early");
  const Operands in = operands<device::Bf16>(s, true);
  const Truth truth = truth_of<device::Bf16>(s, in);
  equal(wide<device::Bf16>(run<device::Bf16>(s, in, {seed}).y), truth.y, "y");
}

void an_empty_plan_is_refused(uint64_t) {
  const char* error = launch_small_batch(SmallBatchPlan(), SmallBatchOperands(), Dtype::bfloat16, nullptr);
  check::that(error && strstr(error, "does not cover"), "an error in words");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"ragged shapes, bf16", ragged_shapes<device::Bf16>},
                     {"ragged shapes, fp16", ragged_shapes<device::Fp16>},
                     {"whole numbers, bf16", whole_numbers<device::Bf16>},
                     {"whole numbers, fp16", whole_numbers<device::Fp16>},
                     {"activations", activations},
                     {"activations and residuals, bf16", activations_and_residuals<device::Bf16>},
                     {"activations and residuals, fp16", activations_and_residuals<device::Fp16>},
                     {"whole residuals", whole_residuals},
                     {"calls one after another", calls_one_after_another},
                     {"few blocks resident", few_blocks_resident},
                     {"bits depend on the depth alone", bits_depend_on_depth_alone},
                     {"NaN stays in its row", not_a_number_stays_in_its_row},
                     {"layer of a model", layer_of_a_model},
                     {"an empty plan is refused", an_empty_plan_is_refused}});
}
