// The decode kernel of dictionary in the emulator: both dtypes, ragged and real shapes, one chunk of coefficients and many.
//
// Outputs and workspace start as NaN and have exact bounds; each access outside is reported. All seeds must agree to the
// bit: threads run in another order with each.
#include "dictionary/forward.cu"

#include "check.h"
#include "dictionary_truth.h"

namespace {

using namespace dictionary;
using dictionary_truth::Known, dictionary_truth::known_of, dictionary_truth::Operands, dictionary_truth::operands;
using low_rank_truth::equal, low_rank_truth::Errors, low_rank_truth::Outputs, low_rank_truth::wide, low_rank_truth::within;

struct Shape : dictionary_truth::Sizes {
  bool wants_h;
  int sm_count, smem_limit;
};

constexpr int kH200 = 232448;  // bytes of shared memory in a block
// m, k, atoms, n, has bias, stored, wants h, multiprocessors
const Shape kShapes[] = {
    {{{1, 8, 8, 8, true}, 1}, true, 4, kH200},              // one of everything
    {{{3, 40, 24, 24, true}, 12}, true, 4, kH200},          // tails of a tile of d, of a tile of rows, of a word
    {{{8, 264, 40, 56, false}, 13}, true, 7, kH200},        // all tokens of one tile; rows of odd length
    {{{9, 264, 40, 56, false}, 40}, true, 7, kH200},        // the first of the second; everything is kept
    {{{16, 520, 136, 328, true}, 68}, false, 9, kH200},
    {{{5, 136, 264, 200, true}, 100}, true, 3, kH200},      // more tiles than warps
    {{{2, 1032, 8, 64, true}, 3}, true, 132, kH200},        // splits; blocks with no rows
    {{{7, 296, 136, 336, true}, 50}, true, 5, 18 << 10},    // two chunks and more
    {{{12, 296, 136, 336, true}, 70}, false, 2, 34 << 10},  // eleven tiles, a few at a time
    {{{4, 40, 520, 104, false}, 400}, true, 2, 50 << 10},   // one tile at a time
};
constexpr size_t kCount = sizeof kShapes / sizeof *kShapes;

ForwardPlan plan_of(const Shape& s) {
  const ForwardPlan plan = plan_forward(s.m, s.n, s.k, s.r, s.stored, s.sm_count, s.smem_limit);
  check::that(plan.token_tiles > 0, "the shape is covered");
  return plan;
}

// Runs the op `times` over, outputs and workspace poisoned again before each; the counter goes on from `count`.
template <class T>
Outputs run(const Shape& s, const Operands& in, emulator::Options options, int times = 1, uint64_t count = 0) {
  const ForwardPlan plan = plan_of(s);
  emulator::Buffer<uint16_t> x("x", in.x), v("v", in.v), values("values", in.values), bias("bias", in.bias);
  emulator::Buffer<uint32_t> mask("mask", in.mask);
  emulator::Buffer<uint16_t> y("y", size_t(s.m) * s.n), h("h", s.wants_h ? size_t(s.m) * s.r : 0);
  emulator::Buffer<float> partials("partials", size_t(plan.splits) * s.m * s.r);
  emulator::Buffer<uint64_t> counter("counter", 1);
  counter[0] = count * plan.grid;
  Outputs out;
  for (int i = 0; i < times; ++i) {
    y.poison(), h.poison(), partials.poison();
    const ForwardParams p{x.data(), v.data(), values.data(), mask.data(), s.has_bias ? bias.data() : nullptr,
                          s.wants_h ? h.data() : nullptr, y.data(), s.m, s.n, s.k, s.r, s.stored,
                          partials.data(), counter.data(), 0, 0, 0};
    const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
    check::that(launch_forward(plan, p, dtype, nullptr) == nullptr, "the launch");
    emulator::synchronize(options);
    ++options.seed;
    Outputs now{{y.data(), y.data() + y.size()}, {h.data(), h.data() + h.size()}};
    if (i > 0) check::that(now.y == out.y && now.h == out.h, "the same bits the next time");
    out = std::move(now);
  }
  check::that(counter[0] == (count + times) * plan.grid, "each block arrived once");
  return out;
}

template <class T>
void ragged_shapes(uint64_t seed) {
  Errors errors;
  for (size_t i = 0; i < kCount; ++i) {
    const Shape& s = kShapes[i];
    Known& known = known_of<T>(i, s, false);
    const Outputs out = run<T>(s, known.in, {seed});
    if (seed == 1) known.first = out;
    check::that(out.y == known.first.y && out.h == known.first.h, "every seed gives the same bits; shape", i);
    const auto y = wide<T>(out.y), h = wide<T>(out.h);
    within(y, known.truth.y, known.truth.y_bound, emulator::text("y of shape %zu", i).c_str());
    if (s.wants_h) within(h, known.truth.h, known.truth.h_bound, emulator::text("h of shape %zu", i).c_str());
    errors.add(y, known.truth);
  }
  errors.pass();
}

// Every product and sum is exact, so each single term counts.
template <class T>
void whole_numbers(uint64_t seed) {
  for (size_t i = 0; i < kCount; ++i) {
    const Known& known = known_of<T>(i, kShapes[i], true);
    for (double one : known.truth.h) check::that(std::fabs(one) <= 256, "h is exact in bf16", i);
    for (double one : known.truth.y) check::that(std::fabs(one) <= 256, "y is exact in bf16", i);
    const Outputs out = run<T>(kShapes[i], known.in, {seed});
    equal(wide<T>(out.y), known.truth.y, emulator::text("y of shape %zu", i).c_str());
    if (kShapes[i].wants_h) equal(wide<T>(out.h), known.truth.h, emulator::text("h of shape %zu", i).c_str());
  }
}

// The sums of a token are those of low_rank's kernel whatever the chunks are.
void bits_depend_on_sizes_alone(uint64_t seed) {
  Shape s{{{12, 296, 256, 336, true}, 100}, true, 2, kH200};
  const Operands in = operands<device::Bf16>(s, true);
  check::that(plan_of(s).buffers == 1, "all of it fits");
  const Outputs fits = run<device::Bf16>(s, in, {seed});
  for (int at_once : {1, 3, 4}) {
    s.smem_limit = forward_memory(2, {s.r, s.stored}, at_once, 2).bytes;
    check::that(plan_of(s).buffers == 2 && plan_of(s).at_once == at_once, "chunks of", at_once);
    check::that(run<device::Bf16>(s, in, {seed}).y == fits.y, "the same whole numbers in chunks of", at_once);
  }
}

// Wrong numbers in the rows of a bad mask, and nothing else. Bits that there are no values for count as zeros.
void a_mask_of_another_count_harms_its_row_alone(uint64_t seed) {
  const Shape s{{{3, 40, 136, 56, true}, 61}, false, 2, kH200};
  const Operands good = operands<device::Bf16>(s, true);
  const auto due = run<device::Bf16>(s, good, {seed}).y;
  Operands in = good;
  const int words = 5;
  for (int row : {7, 20, 55}) {
    for (int word = 0; word < words; ++word) in.mask[row * words + word] = row == 20 ? 0u : ~0u;
    for (int atom = 0; atom < s.r; ++atom) {
      in.u[row * s.r + atom] = row == 20 || atom >= s.stored ? 0 : in.values[row * s.stored + atom];
    }
  }
  const auto y = run<device::Bf16>(s, in, {seed}).y;
  const auto expected = low_rank_truth::truth_of<device::Bf16>(s, in).y;
  for (int i = 0; i < s.m * s.n; ++i) {
    const bool is_bad = i % s.n == 7 || i % s.n == 20 || i % s.n == 55;
    check::that(is_bad || y[i] == due[i], "the other rows have the same bits", i % s.n);
    check::equal(device::widen<device::Bf16>(y[i]), expected[i], "y", i);
  }
}

void explicit_zeros_are_values(uint64_t seed) {
  const Shape s{{{2, 40, 72, 24, false}, 31}, false, 2, kH200};
  Operands in = operands<device::Bf16>(s, true);
  for (size_t i = 0; i < in.values.size(); i += 3) in.values[i] = i % 2 ? 0x8000 : 0;
  size_t next = 0;
  for (size_t i = 0; i < in.u.size(); ++i) {
    if (in.mask[i / s.r * 3 + i % s.r / 32] >> i % s.r % 32 & 1) in.u[i] = in.values[next++];
  }
  equal(wide<device::Bf16>(run<device::Bf16>(s, in, {seed}).y), low_rank_truth::truth_of<device::Bf16>(s, in).y, "y");
}

void not_a_number_stays_in_its_row(uint64_t seed) {
  const Shape s{{{11, 264, 40, 56, true}, 20}, true, 7, kH200};
  for (int row : {0, 3, 10}) {
    Operands in = operands<device::Bf16>(s, false);
    in.x[row * s.k + 263] = 0x7fc0;
    const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}).y);
    for (int i = 0; i < s.m * s.n; ++i) check::that(std::isnan(y[i]) == (i / s.n == row), "only one row is NaN", i / s.n);
  }
}

// The barrier's counter is never reset, and passes 32 bits; and needs all blocks at once.
void launches_one_after_another(uint64_t seed) {
  const Shape s{{{6, 520, 48, 96, true}, 24}, true, 6, kH200};
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs some = run<device::Bf16>(s, in, {seed}, 3), late = run<device::Bf16>(s, in, {seed}, 2, (1ull << 33) + 7);
  check::that(some.y == late.y, "the same bits at every count");
  check::reports("cooperative launch", [&] { run<device::Bf16>(s, in, {seed, 2}); });
}

// Rows of 4096, half of 1024 atoms: what a layer of a model is.
void layer_of_a_model(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__
  return;
#endif
  if (seed != 1) return;
  const Shape s{{{1, 4096, 1024, 4096, false}, 512}, false, 132, kH200};
  check::that(plan_of(s).grid == 128 && plan_of(s).buffers == 1, "all coefficients are asked for early");
  const Operands in = operands<device::Bf16>(s, true);
  const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}).y);
  const auto x = wide<device::Bf16>(in.x), v = wide<device::Bf16>(in.v), u = wide<device::Bf16>(in.u);
  using low_rank_truth::product;
  equal(y, product<float>(product<float>(x, v, s.m, s.r, s.k), u, s.m, s.n, s.r), "y");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"ragged shapes, bf16", ragged_shapes<device::Bf16>},
                     {"ragged shapes, fp16", ragged_shapes<device::Fp16>},
                     {"whole numbers, bf16", whole_numbers<device::Bf16>},
                     {"whole numbers, fp16", whole_numbers<device::Fp16>},
                     {"bits depend on sizes alone", bits_depend_on_sizes_alone},
                     {"a mask of another count harms its row alone", a_mask_of_another_count_harms_its_row_alone},
                     {"explicit zeros are values", explicit_zeros_are_values},
                     {"NaN stays in its row", not_a_number_stays_in_its_row},
                     {"launches one after another", launches_one_after_another},
                     {"layer of a model", layer_of_a_model}});
}
