// The forward kernel of sparse24 in the emulator: every number of tokens, both dtypes, ragged and real shapes.
//
// Outputs and workspace start as NaN and have exact bounds; each access outside is reported. All seeds must agree to the
// bit: threads run in another order with each.
#include "sparse24/forward.cu"

#include "check.h"
#include "sparse24_truth.h"

namespace {

using namespace sparse24;
using sparse24_truth::expanded, sparse24_truth::known_of, sparse24_truth::Known, sparse24_truth::Operands;
using sparse24_truth::operands, sparse24_truth::Truth, sparse24_truth::truth_of;
using low_rank_truth::equal, low_rank_truth::Errors, low_rank_truth::wide, low_rank_truth::within;

struct Shape : sparse24_truth::Sizes {
  int sm_count, smem_limit;
};

constexpr int kH200 = 232448;  // bytes of shared memory in a block
// m, k, n, has bias, 2:4, multiprocessors
const Shape kShapes[] = {
    {{1, 64, 1, true}, 4, kH200},          // one of everything
    {{3, 192, 17, true}, 4, kH200},        // tails of a batch and of a tile of rows
    {{8, 1024, 50, false}, 3, kH200},      // all tokens of one tile; units in turn
    {{5, 4352, 40, true}, 2, kH200},       // more batches than warps; none for all of them at the end
    {{9, 320, 40, true}, 7, kH200},        // the first of the second tile
    {{16, 640, 70, false}, 2, kH200},
    {{17, 448, 45, true}, 3, kH200},       // four tiles of tokens, one of them there
    {{32, 2112, 65, true}, 1, kH200},
    {{33, 384, 130, false}, 2, kH200},     // eight tiles of tokens
    {{64, 576, 200, true}, 2, kH200},
    {{2, 8192, 17, true}, 8, kH200},       // splits
    {{4, 1088, 333, true}, 5, 19 << 10},   // splits because x does not fit: several units to a block
    {{20, 2048, 70, false}, 6, 62 << 10},  // all of it together, more tokens
    {{61, 1408, 131, true}, 5, 148 << 10},
};
constexpr size_t kCount = sizeof kShapes / sizeof *kShapes;

ForwardPlan plan_of(const Shape& s) {
  const ForwardPlan plan = plan_forward(s.m, s.n, s.k, s.sm_count, s.smem_limit);
  check::that(plan.token_tiles > 0, "the shape is covered");
  return plan;
}

// Runs the op `times` over, output and workspace poisoned again before each; the counter goes on from `count`.
template <class T>
std::vector<uint16_t> run(const Shape& s, const Operands& in, emulator::Options options, int times = 1, uint64_t count = 0) {
  const ForwardPlan plan = plan_of(s);
  const bool has_splits = plan.splits > 1;
  emulator::Buffer<uint16_t> x("x", in.x), values("values", in.values), bias("bias", in.bias), y("y", size_t(s.m) * s.n);
  emulator::Buffer<uint32_t> mask("mask", in.mask);
  const size_t stride = partial_stride(shape_of(plan.token_tiles).rows(), s.n);
  emulator::Buffer<float> partials("partials", has_splits ? plan.splits * s.m * stride : 0);
  emulator::Buffer<uint64_t> counter("counter", 1);
  counter[0] = count * plan.grid;
  std::vector<uint16_t> out;
  for (int i = 0; i < times; ++i) {
    y.poison(), partials.poison();
    const ForwardOperands operands{x.data(), values.data(), mask.data(), s.has_bias ? bias.data() : nullptr, y.data(),
                                   s.m, s.n, s.k};
    const SplitSums sums{has_splits ? partials.data() : nullptr, has_splits ? counter.data() : nullptr};
    const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
    check::that(launch_forward(plan, operands, sums, dtype, nullptr) == nullptr, "the launch");
    emulator::synchronize(options);
    ++options.seed;
    std::vector<uint16_t> now{y.data(), y.data() + y.size()};
    if (i > 0) check::that(now == out, "the same bits the next time");
    out = std::move(now);
  }
  check::that(!has_splits || counter[0] == (count + times) * plan.grid, "each block arrived once");
  return out;
}

template <class T>
void ragged_shapes(uint64_t seed) {
  Errors errors;
  for (size_t i = 0; i < kCount; ++i) {
    Known& known = known_of<T>(i, kShapes[i], false);
    const auto bits = run<T>(kShapes[i], known.in, {seed});
    if (seed == 1) known.first = bits;
    check::that(bits == known.first, "every seed gives the same bits; shape", i);
    const auto y = wide<T>(bits);
    within(y, known.truth.y, known.truth.y_bound, emulator::text("y of shape %zu", i).c_str());
    errors.add(y, low_rank_truth::Truth{{}, known.truth.y, known.truth.dense, {}, {}});
  }
  errors.pass();
}

// Every product and sum is exact, so each single term counts.
template <class T>
void whole_numbers(uint64_t seed) {
  for (size_t i = 0; i < kCount; ++i) {
    const Known& known = known_of<T>(i, kShapes[i], true);
    for (double one : known.truth.y) check::that(std::fabs(one) <= 256, "y is exact in bf16", i);
    equal(wide<T>(run<T>(kShapes[i], known.in, {seed})), known.truth.y, emulator::text("y of shape %zu", i).c_str());
  }
}

// One x that is not zero at a time: it reaches the rows that keep it, with their value, and no others.
void every_input_meets_its_values(uint64_t seed) {
  const Shape s{{8, 256, 16, false}, 1, kH200};
  Operands in = operands<device::Bf16>(s, false);
  const auto w = expanded(s, in, wide<device::Bf16>(in.values));
  for (int first = static_cast<int>(seed) - 1; first < s.k; first += 8 * 3) {
    std::fill(in.x.begin(), in.x.end(), 0);
    for (int token = 0; token < s.m; ++token) in.x[token * s.k + (first + token) % s.k] = device::narrow<device::Bf16>(1);
    const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}));
    for (int token = 0; token < s.m; ++token) {
      for (int row = 0; row < s.n; ++row) {
        check::equal(y[token * s.n + row], w[row * s.k + (first + token) % s.k], "w", (first + token) * 100 + row);
      }
    }
  }
}

// Two of four, all six ways, for every group of a batch and row of a tile.
void every_way_to_keep_two(uint64_t seed) {
  const Shape s{{1, 384, 32, false}, 2, kH200};
  constexpr uint32_t kWays[] = {0x3, 0x5, 0x9, 0x6, 0xa, 0xc};
  Operands in = operands<device::Fp16>(s, true);
  for (size_t way = seed - 1; way < 6; way += 3) {
    for (size_t i = 0; i < in.mask.size(); ++i) in.mask[i] = kWays[way] * 0x11111111;
    const Truth truth = truth_of<device::Fp16>(s, in);
    equal(wide<device::Fp16>(run<device::Fp16>(s, in, {seed})), truth.y, "y");
  }
}

// Zeros and negative zeros among the values are values; so is the mask the only thing that says where they belong.
void explicit_zeros_are_values(uint64_t seed) {
  const Shape s{{2, 320, 20, false}, 2, kH200};
  Operands in = operands<device::Bf16>(s, true);
  for (size_t i = 0; i < in.values.size(); i += 3) in.values[i] = i % 2 ? 0x8000 : 0;
  const Truth truth = truth_of<device::Bf16>(s, in);
  equal(wide<device::Bf16>(run<device::Bf16>(s, in, {seed})), truth.y, "y");
}

// Wrong numbers in the rows of a bad mask, and nothing else: bounds are checked, and that metadata ascends.
void a_mask_that_is_no_2_of_4_harms_its_row_alone(uint64_t seed) {
  const Shape s{{3, 448, 40, true}, 2, kH200};
  const Operands good = operands<device::Bf16>(s, true);
  const auto due = run<device::Bf16>(s, good, {seed});
  Operands in = good;
  const int words = sparse24_truth::words_of(s.k);
  std::mt19937_64 random(seed);
  for (int row : {0, 7, 8, 25}) {
    for (int i = 0; i < words; ++i) in.mask[row * words + i] = i % 3 ? static_cast<uint32_t>(random()) : i % 2 ? ~0u : 0u;
  }
  const auto y = run<device::Bf16>(s, in, {seed});
  for (int token = 0; token < s.m; ++token) {
    for (int row = 0; row < s.n; ++row) {
      const bool is_bad = row == 0 || row == 7 || row == 8 || row == 25;
      check::that(is_bad || y[token * s.n + row] == due[token * s.n + row], "the other rows have the same bits", row);
    }
  }
}

void not_a_number_stays_in_its_row_of_x(uint64_t seed) {
  for (const Shape& s : {Shape{{11, 832, 50, true}, 3, kH200}, Shape{{40, 448, 50, true}, 3, kH200}}) {
    for (int row : {0, 3, 10}) {
      Operands in = operands<device::Bf16>(s, false);
      for (int i = 0; i < 4; ++i) in.x[row * s.k + s.k - 1 - i] = 0x7fc0;  // each row keeps two of these
      const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}));
      for (int token = 0; token < s.m; ++token) {
        for (int column = 0; column < s.n; ++column) {
          check::that(std::isnan(y[token * s.n + column]) == (token == row), "only one row is NaN; found", token);
        }
      }
    }
  }
}

void not_a_number_stays_in_its_row_of_the_weight(uint64_t seed) {
  const Shape s{{3, 192, 70, true}, 1, kH200};  // batches with steps past the end, units one after the other
  for (int row : {0, 17, 69}) {
    Operands in = operands<device::Bf16>(s, false);
    in.values[row * s.k / 2 + 5] = 0x7fc0;
    const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}));
    for (int i = 0; i < s.m * s.n; ++i) check::that(std::isnan(y[i]) == (i % s.n == row), "only one column is NaN", i % s.n);
  }
}

// What a warp has left in its registers is not multiplied by the zeros behind x: infinity stays what it is.
void infinity_stays_infinite(uint64_t seed) {
  const Shape s{{2, 4160, 16, true}, 1, kH200};  // a warp has the first batch and the last, of one step
  Operands in = operands<device::Bf16>(s, false);
  std::fill(in.x.begin(), in.x.end(), device::narrow<device::Bf16>(1));
  for (int step = 0; step < kBatchSteps; ++step) in.values[5 * s.k / 2 + step * kStep / 2] = 0x7f80;
  const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}));
  for (int i = 0; i < s.m * s.n; ++i) check::that((i % s.n == 5 ? y[i] == INFINITY : std::isfinite(y[i])), "y", i);
}

// The barrier's counter is never reset, and passes 32 bits.
void launches_one_after_another(uint64_t seed) {
  const Shape s{{6, 8192, 48, true}, 6, kH200};
  check::that(plan_of(s).splits > 1, "there is a barrier");
  const Operands in = operands<device::Bf16>(s, false);
  const auto some = run<device::Bf16>(s, in, {seed}, 3), late = run<device::Bf16>(s, in, {seed}, 2, (1ull << 33) + 7);
  check::that(some == late, "the same bits at every count");
}

// Without splits blocks need not be resident together; with them they do, and whoever starts them is told.
void few_blocks_resident(uint64_t seed) {
  const Shape one{{6, 512, 100, true}, 7, kH200}, split{{6, 8192, 48, true}, 6, kH200};
  const Operands in = operands<device::Bf16>(one, false), of_split = operands<device::Bf16>(split, false);
  check::that(plan_of(one).splits == 1 && plan_of(one).grid > 2, "more blocks than are resident");
  check::that(run<device::Bf16>(one, in, {seed}) == run<device::Bf16>(one, in, {seed, 2}), "the same bits");
  check::reports("cooperative launch", [&] { run<device::Bf16>(split, of_split, {seed, 2}); });
}

// Which row a token is in does not show, nor in which company.
void bits_of_a_token_are_its_own(uint64_t seed) {
  for (const auto& [m, less] : {std::pair{8, 3}, std::pair{16, 11}, std::pair{32, 20}, std::pair{64, 41}}) {
    Shape s{{m, 704, 50, true}, 3, kH200};
    const Operands in = operands<device::Bf16>(s, false);
    const auto all = run<device::Bf16>(s, in, {seed});
    Operands last = in;
    last.x.assign(in.x.end() - size_t(less) * s.k, in.x.end());
    s.m = less;
    const auto few = run<device::Bf16>(s, last, {seed});
    check::that(std::equal(few.begin(), few.end(), all.end() - size_t(less) * s.n), "the last rows by themselves", less);
  }
}

// Rows of 4096 on all multiprocessors: what a layer of a model is, a decoded token and a small batch of it.
void layer_of_a_model(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__
  return;
#endif
  if (seed != 1) return;
  for (const Shape& s : {Shape{{1, 4096, 4096, false}, 132, kH200}, Shape{{40, 4096, 1024, false}, 132, kH200}}) {
    const ForwardPlan plan = plan_of(s);
    check::that(s.m == 1 ? plan.splits == 1 && plan.grid >= 128 : plan.splits > 1 && plan.grid >= 100, "the GPU is in use");
    const Operands in = operands<device::Bf16>(s, true);
    const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}));
    const auto w = expanded(s, in, wide<device::Bf16>(in.values));
    equal(y, low_rank_truth::product<float>(wide<device::Bf16>(in.x), w, s.m, s.n, s.k), "y");
  }
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"ragged shapes, bf16", ragged_shapes<device::Bf16>},
                     {"ragged shapes, fp16", ragged_shapes<device::Fp16>},
                     {"whole numbers, bf16", whole_numbers<device::Bf16>},
                     {"whole numbers, fp16", whole_numbers<device::Fp16>},
                     {"every input meets its values", every_input_meets_its_values},
                     {"every way to keep two", every_way_to_keep_two},
                     {"explicit zeros are values", explicit_zeros_are_values},
                     {"a mask that is no 2:4 harms its row alone", a_mask_that_is_no_2_of_4_harms_its_row_alone},
                     {"NaN stays in its row of x", not_a_number_stays_in_its_row_of_x},
                     {"NaN stays in its row of the weight", not_a_number_stays_in_its_row_of_the_weight},
                     {"infinity stays infinite", infinity_stays_infinite},
                     {"launches one after another", launches_one_after_another},
                     {"few blocks resident", few_blocks_resident},
                     {"bits of a token are its own", bits_of_a_token_are_its_own},
                     {"layer of a model", layer_of_a_model}});
}
