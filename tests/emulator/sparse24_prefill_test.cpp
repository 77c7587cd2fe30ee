// The prefill kernel of sparse24 in the emulator: every tile, both dtypes, ragged and real shapes.
//
// Outputs start as NaN and have exact bounds; each access outside is reported. All seeds must agree to the bit: threads run
// in another order with each.
#include "sparse24/prefill.cu"

#include "check.h"
#include "sparse24_truth.h"

namespace {

using namespace sparse24;
using sparse24_truth::expanded, sparse24_truth::known_of, sparse24_truth::Known, sparse24_truth::Operands;
using sparse24_truth::operands, sparse24_truth::Truth, sparse24_truth::truth_of;
using low_rank_truth::equal, low_rank_truth::Errors, low_rank_truth::wide, low_rank_truth::within;

struct Shape : sparse24_truth::Sizes {
  int rows, grid;  // of a tile; blocks
};

// m, k, n, has bias, 2:4, rows of a tile, blocks
const Shape kShapes[] = {
    {{1, 16, 1, true}, 64, 1},           // one of everything
    {{65, 64, 64, false}, 64, 2},        // tails of tokens alone
    {{70, 208, 70, true}, 64, 2},        // tails of all; a lane's rows are not whole
    {{130, 304, 132, true}, 64, 3},      // more tiles than blocks; more slabs than stages
    {{66, 1040, 600, false}, 64, 4},     // more than one patch of rows
    {{3, 16, 130, true}, 128, 2},        // fewer slabs than stages, of several tiles
    {{129, 96, 136, true}, 128, 1},      // a block with all tiles
    {{100, 336, 257, false}, 128, 2},
    {{200, 448, 129, true}, 128, 3},
    {{1, 32, 257, true}, 256, 1},
    {{130, 272, 264, true}, 256, 2},
    {{77, 400, 301, false}, 256, 2},
};
constexpr size_t kCount = sizeof kShapes / sizeof *kShapes;

// Runs the op `times` over, output poisoned again before each.
template <class T>
std::vector<uint16_t> run(const Shape& s, const Operands& in, emulator::Options options, int times = 1) {
  const PrefillShape shape = prefill_shape(s.rows);
  const PrefillPlan plan{s.rows, shape.tokens(), s.grid, shape.smem_bytes()};
  emulator::Buffer<uint16_t> x("x", in.x), values("values", in.values), bias("bias", in.bias), y("y", size_t(s.m) * s.n);
  emulator::Buffer<uint32_t> mask("mask", in.mask);
  std::vector<uint16_t> out;
  for (int i = 0; i < times; ++i) {
    y.poison();
    const ForwardOperands operands{x.data(), values.data(), mask.data(), s.has_bias ? bias.data() : nullptr, y.data(),
                                   s.m, s.n, s.k};
    const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
    check::that(launch_prefill(plan, operands, dtype, nullptr) == nullptr, "the launch");
    emulator::synchronize(options);
    ++options.seed;
    std::vector<uint16_t> now{y.data(), y.data() + y.size()};
    if (i > 0) check::that(now == out, "the same bits the next time");
    out = std::move(now);
  }
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

// One x that is not zero in each token: it reaches the rows that keep it, with their value, and no others.
void every_input_meets_its_values(uint64_t seed) {
  for (int rows : kPrefillRows) {
    const Shape s{{160, 160, rows + 8, false}, rows, 2};
    Operands in = operands<device::Bf16>(s, false);
    const auto w = expanded(s, in, wide<device::Bf16>(in.values));
    std::fill(in.x.begin(), in.x.end(), 0);
    for (int token = 0; token < s.m; ++token) in.x[token * s.k + token] = device::narrow<device::Bf16>(1);
    const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}));
    for (int i = 0; i < s.m * s.n; ++i) check::equal(y[i], w[i % s.n * s.k + i / s.n], "w, input by row", i);
  }
}

// Two of four, all six ways, for every group of a slab and row of a tile.
void every_way_to_keep_two(uint64_t seed) {
  constexpr uint32_t kWays[] = {0x3, 0x5, 0x9, 0x6, 0xa, 0xc};
  for (int rows : kPrefillRows) {
    const Shape s{{9, 192, rows, false}, rows, 1};
    Operands in = operands<device::Fp16>(s, true);
    for (size_t way = seed - 1; way < 6; way += 3) {
      for (size_t i = 0; i < in.mask.size(); ++i) in.mask[i] = kWays[way] * 0x11111111;
      const Truth truth = truth_of<device::Fp16>(s, in);
      equal(wide<device::Fp16>(run<device::Fp16>(s, in, {seed})), truth.y, "y");
    }
  }
}

// Zeros and negative zeros among the values are values; so is the mask the only thing that says where they belong. A zero
// that is kept makes NaN of infinity.
void explicit_zeros_are_values(uint64_t seed) {
  for (int rows : kPrefillRows) {
    const Shape s{{20, 80, 72, false}, rows, 1};
    Operands in = operands<device::Bf16>(s, true);
    for (size_t i = 0; i < in.values.size(); i += 3) in.values[i] = i % 2 ? 0x8000 : 0;
    const Truth truth = truth_of<device::Bf16>(s, in);
    equal(wide<device::Bf16>(run<device::Bf16>(s, in, {seed})), truth.y, "y");
    constexpr int kInput = 41;
    for (int token = 0; token < s.m; ++token) in.x[token * s.k + kInput] = 0x7f80;  // infinity
    const auto w = expanded(s, in, wide<device::Bf16>(in.values));
    const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}));
    for (int row = 0; row < s.n; ++row) {
      if (!sparse24_truth::is_kept(s, in, row, kInput)) continue;  // the emulator multiplies by a zero there, a GPU does not
      check::that(std::isnan(y[row]) == (w[row * s.k + kInput] == 0), "infinity meets what is kept; row", row);
    }
  }
}

// Negative zeros all over: sums begin with a zero, and the bias is added, so that y is a positive one, as torch's is.
void negative_zeros_give_zero(uint64_t seed) {
  const Shape s{{70, 80, 72, false}, 64, 2};
  Operands in = operands<device::Bf16>(s, true);
  std::fill(in.values.begin(), in.values.end(), 0x8000);
  std::fill(in.x.begin(), in.x.end(), device::narrow<device::Bf16>(1));
  for (const uint16_t bits : run<device::Bf16>(s, in, {seed})) check::equal(bits, 0, "y");
}

// Wrong numbers in the rows of a bad mask, and nothing else: bounds are checked, and that metadata ascends.
void a_mask_that_is_no_2_of_4_harms_its_row_alone(uint64_t seed) {
  for (int rows : kPrefillRows) {
    const Shape s{{12, 208, 72, true}, rows, 2};
    const Operands good = operands<device::Bf16>(s, true);
    const auto due = run<device::Bf16>(s, good, {seed});
    Operands in = good;
    const int words = sparse24_truth::words_of(s.k);
    std::mt19937_64 random(seed);
    const auto is_bad = [](int row) { return row == 0 || row == 7 || row == 8 || row == 65; };
    for (int row = 0; row < s.n; ++row) {
      if (!is_bad(row)) {  // bits past the last input are nobody's
        in.mask[row * words + words - 1] |= 0xffff0000;
        continue;
      }
      for (int i = 0; i < words; ++i) in.mask[row * words + i] = i % 3 ? static_cast<uint32_t>(random()) : i % 2 ? ~0u : 0u;
    }
    const auto y = run<device::Bf16>(s, in, {seed});
    for (int i = 0; i < s.m * s.n; ++i) {
      check::that(is_bad(i % s.n) || y[i] == due[i], "the other rows have the same bits", i % s.n);
    }
  }
}

void not_a_number_stays_in_its_row_of_x(uint64_t seed) {
  for (int rows : kPrefillRows) {
    const Shape s{{70, 112, 50, true}, rows, 2};
    for (int row : {0, 9, 69}) {
      Operands in = operands<device::Bf16>(s, false);
      for (int i = 0; i < 4; ++i) in.x[row * s.k + s.k - 1 - i] = 0x7fc0;  // each row keeps two of these
      const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}));
      for (int i = 0; i < s.m * s.n; ++i) check::that(std::isnan(y[i]) == (i / s.n == row), "only one row is NaN", i / s.n);
    }
  }
}

void not_a_number_stays_in_its_row_of_the_weight(uint64_t seed) {
  for (int rows : kPrefillRows) {
    const Shape s{{9, 112, 70, true}, rows, 1};
    for (int row : {0, 17, 69}) {
      Operands in = operands<device::Bf16>(s, false);
      in.values[row * s.k / 2 + 5] = 0x7fc0;
      const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}));
      for (int i = 0; i < s.m * s.n; ++i) check::that(std::isnan(y[i]) == (i % s.n == row), "one column is NaN", i % s.n);
    }
  }
}

void launches_one_after_another(uint64_t seed) {
  for (int rows : kPrefillRows) {
    const Shape s{{140, 400, 300, true}, rows, 3};
    run<device::Fp16>(s, operands<device::Fp16>(s, false), {seed}, 3);
  }
}

// Which tile or row a token is in does not show, nor in which company, nor how many blocks there are, or are resident.
void bits_of_a_token_are_its_own(uint64_t seed) {
  Shape s{{140, 336, 200, true}, 64, 3};
  const Operands in = operands<device::Bf16>(s, false);
  const auto all = run<device::Bf16>(s, in, {seed});
  for (int rows : kPrefillRows) {
    for (int grid : {1, 2, 100}) {
      s.rows = rows, s.grid = grid;
      check::that(run<device::Bf16>(s, in, {seed, grid == 100 ? 2 : 0}) == all, "every tile gives the same bits", rows);
    }
  }
  Operands last = in;
  constexpr int kLess = 75;
  last.x.assign(in.x.end() - size_t(kLess) * s.k, in.x.end());
  s.m = kLess;
  const auto few = run<device::Bf16>(s, last, {seed});
  check::that(std::equal(few.begin(), few.end(), all.end() - size_t(kLess) * s.n), "the last rows by themselves");
}

// Rows of 4096 on all multiprocessors, as a model's layer has them.
void layer_of_a_model(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__
  return;
#endif
  if (seed != 1) return;
  const PrefillPlan plan = plan_prefill(300, 1024, 4096, 132, 232448);
  const Shape s{{300, 4096, 1024, false}, plan.rows, plan.grid};
  const Operands in = operands<device::Bf16>(s, true);
  const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}));
  const auto w = expanded(s, in, wide<device::Bf16>(in.values));
  equal(y, low_rank_truth::product<float>(wide<device::Bf16>(in.x), w, s.m, s.n, s.k), "y");
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
                     {"negative zeros give zero", negative_zeros_give_zero},
                     {"a mask that is no 2:4 harms its row alone", a_mask_that_is_no_2_of_4_harms_its_row_alone},
                     {"NaN stays in its row of x", not_a_number_stays_in_its_row_of_x},
                     {"NaN stays in its row of the weight", not_a_number_stays_in_its_row_of_the_weight},
                     {"launches one after another", launches_one_after_another},
                     {"bits of a token are its own", bits_of_a_token_are_its_own},
                     {"layer of a model", layer_of_a_model}});
}
