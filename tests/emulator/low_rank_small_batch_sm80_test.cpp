// The small-batch kernel of low_rank for compute capability 8 in the emulator: both dtypes, both sizes of a group, ragged
// sizes; every seed must give the same bits.
//
// Outputs and workspace start as NaN and have exact bounds; each access outside is reported.
#include "low_rank/small_batch_sm80.cu"

#include "check.h"
#include "low_rank_epilogue_truth.h"

namespace {

using namespace low_rank;
using namespace low_rank_truth;

struct Shape : Sizes {
  int sm_count;
  int smem_limit;
};

constexpr int kA100 = 163 << 10, kLess = 99 << 10;  // bytes of shared memory in a block
const Shape kRagged[] = {
    {17, 8, 8, 8, true, 108, kA100},         // one of everything
    {31, 264, 72, 136, false, 108, kLess},   // tails of a tile of v, of a tile of u, of a slab; a block with none of v
    {64, 776, 72, 136, true, 7, kA100},      // three splits; blocks with none of u
    {100, 136, 136, 200, true, 3, kLess},    // large groups; two tiles of u for one block
    {129, 776, 40, 72, true, 4, kA100},      // the second large group has one token; two splits, one larger
    {129, 200, 72, 88, false, 108, kLess},   // small groups: three
    {256, 72, 8, 136, true, 1, kA100},       // all in one block
    {256, 264, 72, 72, false, 3, kLess},
    {40, 2056, 8, 16, true, 2, kA100},       // 33 slabs in two splits: rings go around
    {20, 24, 520, 136, true, 1, kLess},      // 27 slabs of u in one block: more than the ring takes
    {100, 72, 328, 72, true, 2, kLess},      // the same with four slots
    {70, 520, 136, 24, false, 108, kA100},
};
constexpr size_t kShapes = sizeof kRagged / sizeof *kRagged;

SmallBatchSm80Plan plan_of(const Shape& s) {
  const SmallBatchSm80Plan plan = plan_small_batch_sm80(s.m, s.n, s.k, s.r, s.sm_count, s.smem_limit);
  check::that(plan.tokens > 0, "the shape is covered");
  return plan;
}

// Runs the op `times` over: queued one after the other, as on a stream, into one h and one y. The counter goes on from
// `count`.
template <class T>
Outputs run(const Shape& s, const Operands& in, emulator::Options options, const Epilogue& epilogue = {}, int times = 1,
            uint64_t count = 0) {
  const SmallBatchSm80Plan plan = plan_of(s);
  emulator::Buffer<uint16_t> x("x", in.x), v("v", in.v), u("u", in.u), bias("bias", in.bias, 1);
  emulator::Buffer<uint16_t> residual("residual", epilogue.residual);
  emulator::Buffer<uint16_t> y("y", size_t(s.m) * s.n), h("h", size_t(s.m) * s.r);
  emulator::Buffer<float> partials("partials", partials_of(plan, s.m, s.r));
  emulator::Buffer<uint64_t> counter("counter", 1);
  const uint64_t each = uint64_t(plan.splits > 1 ? 2 : 1) * plan.grid;
  counter[0] = count * plan.grid;
  const SmallBatchOperands operands{x.data(), v.data(), u.data(), s.has_bias ? bias.data() : nullptr,
                                    residual.size() ? residual.data() : nullptr, epilogue.activation, h.data(), y.data(),
                                    s.m, s.n, s.k, s.r};
  const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
  for (int i = 0; i < times; ++i) {
    const char* error = launch_small_batch_sm80(plan, operands, partials.size() ? partials.data() : nullptr, counter.data(),
                                                dtype, nullptr);
    check::that(error == nullptr, error ? error : "");
  }
  emulator::synchronize(options);
  check::that(counter[0] == count * plan.grid + times * each, "each block arrived once at each barrier");
  return {{y.data(), y.data() + y.size()}, {h.data(), h.data() + h.size()}};
}

// --- kernels ---

template <class T>
void ragged_shapes(uint64_t seed) {
  if (seed > 1 && std::is_same<T, device::Fp16>::value) return;  // the order of threads knows no dtype
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
  if (seed > 1 && std::is_same<T, device::Fp16>::value) return;
  for (size_t i = seed % 2; i < kShapes; i += 2) {
    const Known& known = known_of<T>(i, kRagged[i], true);
    for (double one : known.truth.h) check::that(std::fabs(one) <= 256, "h is exact in bf16", i);
    Truth truth = known.truth;
    const Epilogue end = epilogue<T>(kRagged[i], i % 4 < 2 ? Activation::relu : Activation::none, seed > 1, true);
    finish<T>(truth, end);
    for (double one : truth.y) check::that(std::fabs(one) <= 256, "y is exact in bf16", i);
    const Outputs out = run<T>(kRagged[i], known.in, {seed}, end);
    equal(wide<T>(out.h), truth.h, emulator::text("h of shape %zu", i).c_str());
    equal(wide<T>(out.y), truth.y, emulator::text("y of shape %zu", i).c_str());
  }
}

template <class T>
void activations_and_residuals(uint64_t seed) {
  Errors errors;
  for (size_t i = 0; i < kShapes; i += 3) {  // both sizes of a group
    const Epilogue end = epilogue<T>(kRagged[i], kActivations[(2 * seed + i) % 5], (seed + i) % 2, false);
    const Known& known = known_of<T>(i, kRagged[i], false);
    Truth truth = known.truth;
    finish<T>(truth, end);
    const auto y = wide<T>(run<T>(kRagged[i], known.in, {seed}, end).y);
    within(y, truth.y, truth.y_bound, emulator::text("y of shape %zu", i).c_str());
    errors.add(y, truth);
  }
  errors.pass();
}

// Into one h and one workspace; the barrier's counter is never reset, and passes 32 bits.
void calls_one_after_another(uint64_t seed) {
  const Shape s{40, 456, 40, 136, true, 9, kA100};
  check::equal(plan_of(s).splits, 2, "splits");
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs one = run<device::Bf16>(s, in, {seed}), three = run<device::Bf16>(s, in, {seed}, {}, 3, (1ull << 33) + 7);
  check::that(one.y == three.y && one.h == three.h, "the same bits");
}

// The barrier needs all blocks at once, and says so to whoever starts them.
void few_blocks_resident(uint64_t seed) {
  const Shape s{40, 264, 136, 200, true, 5, kA100};
  const Operands in = operands<device::Bf16>(s, false);
  check::reports("cooperative launch", [&] { run<device::Bf16>(s, in, {seed, 2}); });
}

// How tokens are grouped does not show, nor in which row or company one is, nor how much of u is asked for early.
void bits_depend_on_depth_alone(uint64_t seed) {
  Shape s{200, 72, 136, 40, true, 108, kA100};
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs small = run<device::Bf16>(s, in, {seed});
  check::equal(plan_of(s).tokens, 64, "tokens of a group");
  s.sm_count = 2, s.smem_limit = kLess;
  check::equal(plan_of(s).tokens, 128, "tokens of a group");
  check::equal(plan_of(s).weight_slots, 4, "slots");
  check::that(run<device::Bf16>(s, in, {seed}).y == small.y, "the same bits in large groups");
  for (int rows : {17, 100}) {
    s.m = rows;
    Operands less = in;
    less.x.assign(in.x.end() - rows * s.k, in.x.end());
    const Outputs few = run<device::Bf16>(s, less, {seed});
    check::that(std::equal(few.y.begin(), few.y.end(), small.y.end() - rows * s.n), "the last rows by themselves", rows);
  }
}

// Not in what is zero times something, either: rows and columns past the end of a tile.
void not_a_number_stays_in_its_row(uint64_t seed) {
  const Shape s{33, 520, 40, 56, true, 4, kA100};
  for (int row : {0, 32}) {
    Operands in = operands<device::Bf16>(s, false);
    in.x[row * s.k + 519] = 0x7fc0;
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
#ifdef __SANITIZE_ADDRESS__
  return;  // it has seen every path by then
#endif
  if (seed != 1) return;
  const Shape s{128, 768, 192, 768, true, 108, kA100};
  check::equal(plan_of(s).splits, 3, "splits");
  check::equal(plan_of(s).weight_slots, 4, "slots: all of u is asked for early");
  const Operands in = operands<device::Bf16>(s, true);
  const Truth truth = truth_of<device::Bf16>(s, in);
  equal(wide<device::Bf16>(run<device::Bf16>(s, in, {seed}).y), truth.y, "y");
}

void an_empty_plan_is_refused(uint64_t) {
  const char* error =
      launch_small_batch_sm80(SmallBatchSm80Plan(), SmallBatchOperands(), nullptr, nullptr, Dtype::bfloat16, nullptr);
  check::that(error && strstr(error, "does not cover"), "an error in words");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"ragged shapes, bf16", ragged_shapes<device::Bf16>},
                     {"ragged shapes, fp16", ragged_shapes<device::Fp16>},
                     {"whole numbers, bf16", whole_numbers<device::Bf16>},
                     {"whole numbers, fp16", whole_numbers<device::Fp16>},
                     {"activations and residuals, bf16", activations_and_residuals<device::Bf16>},
                     {"activations and residuals, fp16", activations_and_residuals<device::Fp16>},
                     {"calls one after another", calls_one_after_another},
                     {"few blocks resident", few_blocks_resident},
                     {"bits depend on the depth alone", bits_depend_on_depth_alone},
                     {"NaN stays in its row", not_a_number_stays_in_its_row},
                     {"layer of a model", layer_of_a_model},
                     {"an empty plan is refused", an_empty_plan_is_refused}});
}
