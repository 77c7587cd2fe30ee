// The decode kernel of the pivoted form in the emulator: pivots of every kind, right and wrong, both dtypes.
//
// Outputs and workspace start as NaN and have exact bounds; each access outside is reported. Threads run in another order
// with each seed, and all must agree to the bit.
#include "low_rank/decode_pivoted.cu"

#include <algorithm>

#include "check.h"
#include "low_rank_truth.h"

namespace {

using namespace low_rank;
using namespace low_rank_truth;

constexpr int kH200 = 232448;  // bytes of shared memory in a block

enum class Kind { first, last, spread, random };  // which columns are pivots

struct Shape : Sizes {  // n: all columns of y
  Kind kind;
  bool wants_h;
  int sm_count, smem_limit;
};

const Shape kShapes[] = {
    {1, 8, 8, 8, true, Kind::first, true, 4, kH200},          // all columns are pivots
    {3, 40, 24, 41, true, Kind::random, true, 4, kH200},      // tails of a tile of v, of a tile of c, of a step
    {8, 264, 40, 90, false, Kind::spread, true, 7, kH200},    // all tokens of one tile
    {9, 264, 40, 90, true, Kind::last, false, 7, kH200},      // the first of the second
    {7, 296, 136, 469, true, Kind::random, true, 5, 32 << 10},  // c does not fit: the rest goes to registers
    {16, 520, 72, 154, true, Kind::first, false, 9, kH200},
    {2, 1032, 8, 72, true, Kind::random, true, 132, kH200},   // splits; blocks with no tile of c, and with no pivot
    {5, 2088, 8, 32, true, Kind::spread, true, 1, kH200},     // three batches of v, in one block
    {13, 520, 56, 56, true, Kind::first, true, 3, kH200},     // no c at all
    {4, 40, 264, 964, true, Kind::random, false, 4, 30 << 10},
};
constexpr size_t kCount = sizeof kShapes / sizeof *kShapes;

std::vector<int64_t> pivots_of(const Shape& s) {
  std::vector<int64_t> all(s.n);
  for (int i = 0; i < s.n; ++i) all[i] = i;
  std::mt19937_64 random(s.n * 31 + s.r);
  std::vector<int64_t> pivots;
  if (s.kind == Kind::first) pivots.assign(all.begin(), all.begin() + s.r);
  if (s.kind == Kind::last) pivots.assign(all.end() - s.r, all.end());
  if (s.kind == Kind::random) std::sample(all.begin(), all.end(), std::back_inserter(pivots), s.r, random);
  for (int i = 0; s.kind == Kind::spread && i < s.r; ++i) pivots.push_back(int64_t{i} * s.n / s.r);
  return pivots;
}

// u of the operands is c; bias is of all columns.
template <class T>
Operands pivoted_operands(const Shape& s, bool is_whole) {
  Sizes rest = s;
  rest.n = s.n - s.r;
  rest.has_bias = false;
  Operands in = operands<T>(rest, is_whole);
  if (s.has_bias) {
    rest.n = s.n, rest.has_bias = true, rest.k = 8, rest.m = 1;
    in.bias = operands<T>(rest, is_whole).bias;
  }
  return in;
}

template <class T>
Truth pivoted_truth(const Shape& s, const Operands& in) {
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11;
  const std::vector<int64_t> pivots = pivots_of(s);
  std::vector<int> number(s.n, -1);  // among the pivots
  for (int i = 0; i < s.r; ++i) number[pivots[i]] = i;
  Sizes rest = s;
  rest.n = s.n - s.r;
  Operands of_rest = in;
  of_rest.bias.clear();
  for (int column = 0; s.has_bias && column < s.n; ++column) {
    if (number[column] < 0) of_rest.bias.push_back(in.bias[column]);
  }
  const Truth part = truth_of<T>(rest, of_rest);
  const auto bias = wide<T>(in.bias);
  const auto h_rounded = rounded<T>(product<float>(wide<T>(in.x), wide<T>(in.v), s.m, s.r, s.k));
  Truth t;
  t.h = part.h, t.h_bound = part.h_bound;
  for (int token = 0, row = 0; token < s.m; ++token) {
    for (int column = 0; column < s.n; ++column) {
      if (number[column] < 0) {
        t.y.push_back(part.y[row]), t.y_bound.push_back(part.y_bound[row]), t.two_gemms.push_back(part.two_gemms[row]);
        ++row;
        continue;
      }
      const size_t i = size_t(token) * s.r + number[column];
      const double add = s.has_bias ? bias[column] : 0;
      t.y.push_back(part.h[i] + add);
      t.y_bound.push_back(part.h_bound[i] + roundoff * (std::fabs(part.h[i] + add) + part.h_bound[i]));
      t.two_gemms.push_back(rounded<T>({h_rounded[i] + add})[0]);
    }
  }
  return t;
}

DecodePlan plan_of(const Shape& s) {
  const DecodePlan plan = plan_pivoted(s.m, s.n, s.k, s.r, s.sm_count, s.smem_limit);
  check::that(plan.token_tiles > 0, "the shape is covered");
  return plan;
}

// Runs the op `times` over, outputs and workspace poisoned again before each.
template <class T>
Outputs run(const Shape& s, const Operands& in, const std::vector<int64_t>& which, emulator::Options options,
            int times = 1) {
  const DecodePlan plan = plan_of(s);
  emulator::Buffer<uint16_t> x("x", in.x), v("v", in.v), c("c", in.u), bias("bias", in.bias);
  emulator::Buffer<int64_t> pivots("pivots", which);
  emulator::Buffer<uint16_t> y("y", size_t(s.m) * s.n), h("h", s.wants_h ? size_t(s.m) * s.r : 0);
  emulator::Buffer<float> partials("partials", size_t(plan.splits) * s.m * s.r);
  emulator::Buffer<uint64_t> counter("counter", 1);
  counter[0] = 0;
  Outputs out;
  for (int i = 0; i < times; ++i) {
    y.poison(), h.poison(), partials.poison();
    PivotedParams p{x.data(), v.data(), c.data(), pivots.data(), s.has_bias ? bias.data() : nullptr, partials.data(),
                    s.wants_h ? h.data() : nullptr, y.data(), counter.data(), s.m, s.n, s.k, s.r, 0, 0, 0};
    const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
    check::that(launch_pivoted(plan, p, dtype, nullptr) == nullptr, "the launch");
    emulator::synchronize(options);
    ++options.seed;
    Outputs now{{y.data(), y.data() + y.size()}, {h.data(), h.data() + h.size()}};
    if (i > 0) check::that(now.y == out.y && now.h == out.h, "the same bits the next time");
    out = std::move(now);
  }
  check::equal(counter[0], uint64_t(times) * plan.grid, "arrivals");
  return out;
}

template <class T>
Known& known_of_shape(size_t number, bool is_whole) {
  static std::map<size_t, Known> all;
  Known& known = all[2 * number + is_whole];
  if (known.truth.y.empty()) {
    known.in = pivoted_operands<T>(kShapes[number], is_whole);
    known.truth = pivoted_truth<T>(kShapes[number], known.in);
  }
  return known;
}

// --- the kernel ---

template <class T>
void ragged_shapes(uint64_t seed) {
  Errors errors;
  for (size_t number = 0; number < kCount; ++number) {
    const Shape& s = kShapes[number];
    Known& known = known_of_shape<T>(number, false);
    const Outputs out = run<T>(s, known.in, pivots_of(s), {seed});
    if (seed == 1) known.first = out;
    check::that(out.y == known.first.y && out.h == known.first.h, "every seed gives the same bits; shape", number);
    const auto y = wide<T>(out.y);
    within(y, known.truth.y, known.truth.y_bound, emulator::text("y of shape %zu", number).c_str());
    within(wide<T>(out.h), known.truth.h, known.truth.h_bound, emulator::text("h of shape %zu", number).c_str());
    errors.add(y, known.truth);
  }
  errors.pass();
}

// Every product and sum is exact, so each single term and column counts.
template <class T>
void whole_numbers(uint64_t seed) {
  for (size_t number = 0; number < kCount; ++number) {
    const Shape& s = kShapes[number];
    const Known& known = known_of_shape<T>(number, true);
    for (double one : known.truth.h) check::that(std::fabs(one) <= 255, "h and bias are exact in bf16", number);
    for (double one : known.truth.y) check::that(std::fabs(one) <= 256, "y is exact in bf16", number);
    const Outputs out = run<T>(s, known.in, pivots_of(s), {seed});
    equal(wide<T>(out.y), known.truth.y, emulator::text("y of shape %zu", number).c_str());
    if (s.wants_h) equal(wide<T>(out.h), known.truth.h, emulator::text("h of shape %zu", number).c_str());
  }
}

// The numbers of each row in their order.
std::vector<uint16_t> sorted_rows(std::vector<uint16_t> y, int n) {
  for (size_t first = 0; first < y.size(); first += n) std::sort(y.begin() + first, y.begin() + first + n);
  return y;
}

// In y the same numbers at other columns: y was poison, and each access outside would be reported.
void bad_pivots_leave_nothing_unwritten(uint64_t seed) {
  const int64_t wild[] = {INT64_MIN, -1, int64_t{1} << 31, int64_t{1} << 32, (int64_t{1} << 40) + 3, INT64_MAX};
  for (size_t number : {1, 3, 8}) {
    Shape s = kShapes[number];
    const Operands& in = known_of_shape<device::Bf16>(number, false).in;
    const std::vector<int64_t> good = pivots_of(s);
    const auto run_with = [&](const std::vector<int64_t>& which) { return run<device::Bf16>(s, in, which, {seed}).y; };
    if (s.has_bias) {  // other sums, as each column has its own
      const auto y = wide<device::Bf16>(run_with(std::vector<int64_t>(s.r, -1)));
      for (size_t i = 0; i < y.size(); ++i) check::that(std::isfinite(y[i]), "a number that was written", i);
      s.has_bias = false;
    }
    const auto expected = sorted_rows(run_with(good), s.n);
    std::vector<std::vector<int64_t>> bad{std::vector<int64_t>(s.r, s.n - 1), good, good};
    std::reverse(bad[1].begin(), bad[1].end());
    bad[2][s.r / 2] = bad[2][s.r / 2 - 1];
    for (int64_t one : wild) bad.push_back(std::vector<int64_t>(s.r, one));
    for (int64_t one : {int64_t{s.n}, int64_t{-1}, int64_t{1} << 32}) {
      bad.push_back(good);
      bad.back()[s.r / 2] = one;
    }
    for (const auto& which : bad) {
      check::that(sorted_rows(run_with(which), s.n) == expected, "every number once in its row; last pivot", which.back());
    }
  }
}

void launches_one_after_another(uint64_t seed) {
  for (size_t number : {2, 4}) {
    const Shape& s = kShapes[number];
    run<device::Bf16>(s, known_of_shape<device::Bf16>(number, false).in, pivots_of(s), {seed}, 2);
  }
}

void one_launch_with_few_blocks_resident(uint64_t seed) {
  const Shape& s = kShapes[2];
  const Operands in = pivoted_operands<device::Bf16>(s, false);
  check::reports("cooperative launch", [&] { run<device::Bf16>(s, in, pivots_of(s), {seed, 2}); });
}

// How much of c is prefetched does not show, nor whether somebody wants h.
void bits_depend_on_sizes_alone(uint64_t seed) {
  Shape s = kShapes[4];
  s.smem_limit = kH200;
  const Operands& in = known_of_shape<device::Bf16>(4, false).in;
  const auto y = run<device::Bf16>(s, in, pivots_of(s), {seed}).y;
  const DecodePlan plan = plan_of(s);
  check::that(plan.prefetch > 2, "all items fit; found", plan.prefetch);
  s.wants_h = false;
  for (int prefetch : {0, 1}) {
    s.smem_limit = pivoted_memory(plan.token_tiles, plan.tiles, s.r, plan.grid, prefetch).bytes;
    check::equal(plan_of(s).prefetch, prefetch, "prefetch");
    check::that(run<device::Bf16>(s, in, pivots_of(s), {seed}).y == y, "the same bits with a prefetch of", prefetch);
  }
}

void not_a_number_stays_in_its_row(uint64_t seed) {
  const Shape& s = kShapes[3];
  Operands in = pivoted_operands<device::Bf16>(s, false);
  in.x[4 * s.k + 263] = 0x7fc0;
  const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, pivots_of(s), {seed}).y);
  for (size_t i = 0; i < y.size(); ++i) check::that(std::isnan(y[i]) == (i / s.n == 4), "one row is NaN", i);
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"ragged shapes, bf16", ragged_shapes<device::Bf16>},
                     {"ragged shapes, fp16", ragged_shapes<device::Fp16>},
                     {"whole numbers, bf16", whole_numbers<device::Bf16>},
                     {"whole numbers, fp16", whole_numbers<device::Fp16>},
                     {"bad pivots leave nothing unwritten", bad_pivots_leave_nothing_unwritten},
                     {"launches one after another", launches_one_after_another},
                     {"one launch, few blocks resident", one_launch_with_few_blocks_resident},
                     {"bits depend on sizes alone", bits_depend_on_sizes_alone},
                     {"NaN stays in its row", not_a_number_stays_in_its_row}});
}
