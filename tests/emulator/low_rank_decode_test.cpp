// The decode kernels of low_rank in the emulator: both ways to launch them, both dtypes, ragged and real shapes.
//
// Outputs and workspace start as NaN and have exact bounds; each access outside is reported. Every shape is run by `decode` and
// by `decode_first` + `decode_second`, which must agree to the bit, as must all seeds: threads run in another order with each.
#include "low_rank/decode.cu"

#include "check.h"
#include "low_rank_truth.h"

namespace {

using namespace low_rank;
using namespace low_rank_truth;

struct Shape : Sizes {
  bool wants_h;
  int sm_count;
  int smem_limit;
};

constexpr int kH200 = 232448;  // bytes of shared memory in a block
const Shape kRagged[] = {
    {1, 8, 8, 1, true, true, 4, kH200},            // one of everything
    {3, 40, 24, 17, true, true, 4, kH200},         // tails of a tile of v, of a tile of u, of a step
    {8, 264, 40, 50, false, true, 7, kH200},       // all tokens of one tile
    {9, 264, 40, 50, false, true, 7, kH200},       // the first of the second
    {7, 296, 136, 333, true, true, 5, 31 << 10},   // u does not fit: the rest goes to registers
    {12, 296, 136, 333, true, true, 5, 47 << 10},
    {16, 520, 72, 82, true, false, 9, kH200},
    {2, 1032, 8, 64, true, true, 132, kH200},      // four splits; an item for each warp at most; blocks with no tile of u
    {2, 2088, 8, 24, false, true, 1, kH200},       // three batches of v, in one block
    {5, 536, 40, 100, false, false, 12, kH200},
    {13, 520, 56, 150, true, true, 3, kH200},      // more units and tiles than blocks
    {4, 40, 264, 700, false, true, 4, 27 << 10},   // next to nothing of u fits: three batches of the rest
};
constexpr size_t kShapes = sizeof kRagged / sizeof *kRagged;

DecodePlan plan_of(const Shape& s, bool is_two_launches) {
  const DecodePlan plan = plan_decode(s.m, s.n, s.k, s.r, s.sm_count, s.smem_limit, is_two_launches);
  check::that(plan.token_tiles > 0, "the shape is covered");
  return plan;
}

// What is done to a sum on its way to y, apart from the bias.
struct Ending {
  Activation activation = Activation::none;
  std::vector<uint16_t> residual;  // [m, n] or empty
};

// Runs the op `times` over, outputs and workspace poisoned again before each; the counter goes on from `count`.
template <class T>
Outputs run(const Shape& s, const Operands& in, bool is_two_launches, emulator::Options options, int times = 1,
            uint64_t count = 0, const Ending& ending = {}) {
  const DecodePlan plan = plan_of(s, is_two_launches);
  emulator::Buffer<uint16_t> x("x", in.x), v("v", in.v), u("u", in.u), bias("bias", in.bias);
  emulator::Buffer<uint16_t> residual("residual", ending.residual);
  emulator::Buffer<uint16_t> y("y", size_t(s.m) * s.n), h("h", s.wants_h ? size_t(s.m) * s.r : 0);
  emulator::Buffer<float> partials("partials", size_t(plan.splits) * s.m * s.r);
  emulator::Buffer<uint64_t> counter("counter", 1);
  counter[0] = count * plan.grid;
  Outputs out;
  for (int i = 0; i < times; ++i) {
    y.poison(), h.poison(), partials.poison();
    DecodeParams p{{x.data(), v.data(), u.data(), s.has_bias ? bias.data() : nullptr,
                    ending.residual.empty() ? nullptr : residual.data(), ending.activation, s.wants_h ? h.data() : nullptr,
                    y.data(), s.m, s.n, s.k, s.r}, partials.data(), is_two_launches ? nullptr : counter.data(), 0, 0, 0};
    const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
    check::that(launch_decode(plan, p, dtype, nullptr) == nullptr, "the launch");
    emulator::synchronize(options);
    ++options.seed;
    Outputs now{{y.data(), y.data() + y.size()}, {h.data(), h.data() + h.size()}};
    if (i > 0) check::that(now.y == out.y && now.h == out.h, "the same bits the next time");
    out = std::move(now);
  }
  check::that(is_two_launches || counter[0] == (count + times) * plan.grid, "each block arrived once");
  return out;
}

// --- kernels ---

// The first seed runs both, the second one launch, the third two.
template <class T>
void ragged_shapes(uint64_t seed) {
  Errors errors;
  for (size_t i = 0; i < kShapes; ++i) {
    const Shape& s = kRagged[i];
    Known& known = known_of<T>(i, kRagged[i], false);
    const Outputs out = run<T>(s, known.in, seed == 3, {seed});
    if (seed == 1) {
      known.first = out;
      const Outputs two = run<T>(s, known.in, true, {seed});
      check::that(out.y == two.y && out.h == two.h, "one launch and two give the same bits; shape", i);
    }
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
  for (size_t i = 0; i < kShapes; ++i) {
    const Known& known = known_of<T>(i, kRagged[i], true);
    for (double one : known.truth.h) check::that(std::fabs(one) <= 256, "h is exact in bf16", i);
    for (double one : known.truth.y) check::that(std::fabs(one) <= 256, "y is exact in bf16", i);
    const Outputs out = run<T>(kRagged[i], known.in, (seed + i) % 2, {seed});
    equal(wide<T>(out.y), known.truth.y, emulator::text("y of shape %zu", i).c_str());
    if (kRagged[i].wants_h) equal(wide<T>(out.h), known.truth.h, emulator::text("h of shape %zu", i).c_str());
  }
}

constexpr double kPi = 3.14159265358979323846;

double activation_of(double z, Activation activation) {
  switch (activation) {
    case Activation::relu: return std::fmax(z, 0);
    case Activation::gelu: return z * 0.5 * std::erfc(-z / std::sqrt(2));
    case Activation::gelu_tanh: return z * 0.5 * (1 + std::tanh(std::sqrt(2 / kPi) * (z + 0.044715 * z * z * z)));
    case Activation::silu: return z / (1 + std::exp(-z));
    case Activation::none: break;
  }
  return z;
}

// The sums are whole numbers, so nothing is left but the activation's error in float, and one rounding.
template <class T>
void activations_and_residuals(uint64_t seed) {
  const Shape s{11, 72, 40, 83, true, false, 3, kH200};
  const Operands in = operands<T>(s, true);
  const Truth truth = truth_of<T>(s, in);
  std::mt19937_64 random(7);
  const std::vector<uint16_t> some = normal<T>(random, truth.y.size(), 2);
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11, in_float = 16 * 0x1p-24, least = 0x1p-24;
  for (int number = 0; number <= static_cast<int>(Activation::silu); ++number) {
    const Activation activation = static_cast<Activation>(number);
    for (bool has_residual : {false, true}) {
      const Ending ending{activation, has_residual ? some : std::vector<uint16_t>()};
      const auto y = wide<T>(run<T>(s, in, (seed + number + has_residual) % 2, {seed}, 1, 0, ending).y);
      for (size_t i = 0; i < y.size(); ++i) {
        const double residual = has_residual ? device::widen<T>(some[i]) : 0, active = activation_of(truth.y[i], activation);
        const double size = std::fabs(truth.y[i]) + std::fabs(residual), due = active + residual;
        const double bound = roundoff * std::fabs(due) + in_float * size + least;
        if (!(std::fabs(y[i] - due) <= bound)) check::equal(y[i], due, "y", number * 10000 + i);
      }
    }
  }
}

// The barrier's counter is never reset, and passes 32 bits.
void launches_one_after_another(uint64_t seed) {
  const Shape s{6, 520, 48, 90, true, true, 6, kH200};
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs one = run<device::Bf16>(s, in, false, {seed}, 3);
  const Outputs late = run<device::Bf16>(s, in, false, {seed}, 2, (1ull << 33) + 7);
  const Outputs two = run<device::Bf16>(s, in, true, {seed}, 2);
  check::that(one.y == late.y && one.y == two.y, "the same bits at every count");
}

// Two launches need not be resident together, nor a grid as a whole.
void two_launches_with_few_blocks_resident(uint64_t seed) {
  const Shape s{6, 520, 48, 90, true, true, 6, kH200};
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs all = run<device::Bf16>(s, in, true, {seed}), few = run<device::Bf16>(s, in, true, {seed, 2});
  check::that(all.y == few.y && all.h == few.h, "the same bits");
}

// The barrier needs all blocks at once, and says so to whoever starts them.
void one_launch_with_few_blocks_resident(uint64_t seed) {
  const Shape s{6, 520, 48, 90, true, true, 6, kH200};
  const Operands in = operands<device::Bf16>(s, false);
  check::reports("cooperative launch", [&] { run<device::Bf16>(s, in, false, {seed, 2}); });
}

// How much of u is prefetched does not show; nor does which row a token is in, or in which company.
void bits_depend_on_sizes_alone(uint64_t seed) {
  Shape s{12, 296, 256, 333, true, true, 5, kH200};
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs fits = run<device::Bf16>(s, in, false, {seed});
  const DecodePlan plan = plan_of(s, false);
  check::equal(plan.prefetch, 5, "items of a warp, all of which fit");
  for (int prefetch : {0, 1, 4}) {
    s.smem_limit = decode_memory(plan.token_tiles, plan.tiles, s.r, prefetch).bytes;
    check::equal(plan_of(s, false).prefetch, prefetch, "prefetch");
    check::that(run<device::Bf16>(s, in, false, {seed}).y == fits.y, "the same bits with a prefetch of", prefetch);
  }
  s.smem_limit = kH200;
  s.m = 5;  // one tile of tokens instead of two
  Operands less = in;
  less.x.assign(in.x.begin() + 7 * s.k, in.x.end());
  const Outputs few = run<device::Bf16>(s, less, false, {seed});
  check::that(std::equal(few.y.begin(), few.y.end(), fits.y.begin() + 7 * s.n), "rows 7.. by themselves");
}

// Not in what is zero times something, either: lanes past the end of a row of h.
void not_a_number_stays_in_its_row(uint64_t seed) {
  const Shape s{11, 264, 40, 50, true, true, 7, kH200};
  for (int row : {0, 3, 10}) {
    Operands in = operands<device::Bf16>(s, false);
    in.x[row * s.k + 263] = 0x7fc0;
    const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, seed % 2, {seed}).y);
    for (int token = 0; token < s.m; ++token) {
      for (int column = 0; column < s.n; ++column) {
        check::that(std::isnan(y[token * s.n + column]) == (token == row), "only one row is NaN; found", token);
      }
    }
  }
}

// Once: other seeds have the small shapes.
void largest_rank(uint64_t seed) {
  if (seed != 1) return;
  const Shape s{4, 8, 2048, 20, true, true, 16, kH200};
  const Operands in = operands<device::Fp16>(s, true);
  const Truth truth = truth_of<device::Fp16>(s, in);
  equal(wide<device::Fp16>(run<device::Fp16>(s, in, false, {seed}).y), truth.y, "y");
}

// Rows of 4096, 128 blocks: what a layer of a model is. Ten seconds under AddressSanitizer, which has seen every path by then.
void layer_of_a_model(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__
  return;
#endif
  if (seed != 1) return;
  const Shape s{8, 4096, 512, 4096, false, false, 132, kH200};
  check::that(plan_of(s, false).grid == 128, "128 blocks are no slower than 132");
  check::that(plan_of(s, false).prefetch == 4, "all of u is asked for early");
  const Operands in = operands<device::Bf16>(s, true);
  const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, false, {seed}).y);
  const auto x = wide<device::Bf16>(in.x), v = wide<device::Bf16>(in.v), u = wide<device::Bf16>(in.u);
  const auto expected = product<float>(product<float>(x, v, s.m, s.r, s.k), u, s.m, s.n, s.r);
  for (size_t i = 0; i < y.size(); ++i) check::equal(y[i], expected[i], "y", i);
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
                     {"launches one after another", launches_one_after_another},
                     {"two launches, few blocks resident", two_launches_with_few_blocks_resident},
                     {"one launch, few blocks resident", one_launch_with_few_blocks_resident},
                     {"bits depend on sizes alone", bits_depend_on_sizes_alone},
                     {"NaN stays in its row", not_a_number_stays_in_its_row},
                     {"largest rank", largest_rank},
                     {"layer of a model", layer_of_a_model}});
}
