// The decode kernel of low_rank_sparse in the emulator: both dtypes, ragged and real shapes, entries that fit shared memory
// and that do not, all rows of x at once and some at a time; and supports that are none.
//
// Outputs and workspace start as NaN and have exact bounds; each access outside is reported. All seeds must agree to the
// bit: threads run in another order with each.
#include "low_rank_sparse/decode.cu"

#include "low_rank_sparse_truth.h"
#include "low_rank_truth.h"

namespace {

using namespace low_rank_sparse;
using low_rank_sparse_truth::bad_rows, low_rank_sparse_truth::dense, low_rank_sparse_truth::Rows;
using low_rank_sparse_truth::rows_of;
using low_rank_truth::absolute, low_rank_truth::equal, low_rank_truth::Errors, low_rank_truth::Outputs;
using low_rank_truth::product, low_rank_truth::rounded, low_rank_truth::squared, low_rank_truth::Truth;
using low_rank_truth::wide, low_rank_truth::within;

struct Shape : low_rank_truth::Sizes {
  int entries;
  bool uneven, wants_h;
  int sm_count, smem_limit;
  int tokens;  // of x that are in shared memory at a time
  bool fits;   // a block's entries, all of them
};

constexpr int kH200 = 232448;  // bytes of shared memory in a block
// m, k, r, n, has bias; entries, uneven, wants h, multiprocessors, bytes; tokens, fits
const Shape kShapes[] = {
    {{1, 8, 8, 1, true}, 1, false, true, 4, kH200, 1, true},            // one of everything
    {{1, 8, 8, 3, true}, 0, false, true, 4, kH200, 1, true},            // no entries
    {{2, 40, 24, 17, true}, 100, false, true, 4, kH200, 2, true},       // tails of tiles, of a step, of a piece of entries
    {{3, 264, 40, 50, false}, 1307, false, true, 7, kH200, 4, true},
    {{8, 264, 40, 50, true}, 50 * 264, false, true, 7, kH200, 8, true},  // all entries
    {{9, 264, 40, 50, false}, 301, false, true, 7, kH200, 16, true},     // the first of the second tile of tokens
    {{16, 520, 136, 328, true}, 6001, false, false, 9, kH200, 16, true},
    {{5, 136, 264, 200, true}, 203, true, true, 3, kH200, 8, false},     // one row has more than its block has room for
    {{2, 1032, 8, 64, true}, 2000, false, true, 132, kH200, 2, true},    // splits; blocks with no rows
    {{7, 296, 136, 333, true}, 9000, false, true, 5, 16 << 10, 1, false},    // next to nothing of S fits, nor of x
    {{13, 296, 136, 333, false}, 3003, true, false, 5, 44 << 10, 8, false},  // two passes, the second of five rows
    {{6, 520, 40, 100, true}, 2222, false, true, 12, 16 << 10, 4, true},     // two passes, the second of two rows
    {{12, 520, 40, 100, true}, 555, false, true, 12, 22 << 10, 2, true},     // six passes
};
constexpr size_t kCount = sizeof kShapes / sizeof *kShapes;

struct Operands {
  low_rank_truth::Operands low_rank;
  std::vector<uint16_t> values;
  Rows s;
  float scale;
};

template <class T>
Operands operands(const Shape& s, bool is_whole) {
  std::mt19937_64 random(s.entries * 7 + s.n);
  const size_t count = s.entries;
  return {low_rank_truth::operands<T>(s, is_whole),
          is_whole ? low_rank_truth::whole<T>(random, count, 0.5)
                   : low_rank_truth::normal<T>(random, count, std::sqrt(double(s.n) / (s.entries + 1))),
          rows_of(s.n, s.k, s.entries, s.uneven), is_whole ? 2.f : 0.7f};
}

DecodePlan plan_of(const Shape& s) {
  const DecodePlan plan = plan_decode(s.m, s.n, s.k, s.r, s.entries, s.sm_count, s.smem_limit);
  check::that(plan.token_tiles > 0, "the shape is covered");
  return plan;
}

// Runs the op `times` over, outputs and workspace poisoned again before each; the counter goes on from `count`.
template <class T>
Outputs run(const Shape& s, const Operands& in, emulator::Options options, int times = 1, uint64_t count = 0) {
  const DecodePlan plan = plan_of(s);
  emulator::Buffer<uint16_t> x("x", in.low_rank.x), v("v", in.low_rank.v), u("u", in.low_rank.u);
  emulator::Buffer<uint16_t> values("values", in.values), bias("bias", in.low_rank.bias);
  const low_rank_sparse_truth::InMemory rows(in.s, false);
  emulator::Buffer<uint16_t> y("y", size_t(s.m) * s.n), h("h", s.wants_h ? size_t(s.m) * s.r : 0);
  emulator::Buffer<float> partials("partials", size_t(plan.splits) * s.m * s.r);
  emulator::Buffer<uint64_t> counter("counter", 1);
  counter[0] = count * plan.grid;
  Outputs out;
  for (int i = 0; i < times; ++i) {
    y.poison(), h.poison(), partials.poison();
    DecodeParams p{};
    p.x = x.data(), p.v = v.data(), p.u = u.data(), p.values = values.data(), p.starts = rows.support.starts;
    p.columns = static_cast<const uint16_t*>(rows.support.columns);
    p.bias = s.has_bias ? bias.data() : nullptr, p.h = s.wants_h ? h.data() : nullptr, p.y = y.data();
    p.scale = in.scale, p.m = s.m, p.n = s.n, p.k = s.k, p.r = s.r, p.entries = in.s.entries();
    p.partials = partials.data(), p.counter = counter.data();
    const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
    check::that(launch_decode(plan, p, dtype, nullptr) == nullptr, "the launch");
    emulator::synchronize(options);
    ++options.seed;
    Outputs now{{y.data(), y.data() + y.size()}, {h.data(), h.data() + h.size()}};
    if (i > 0) check::that(now.y == out.y && now.h == out.h, "the same bits the next time");
    out = std::move(now);
  }
  check::that(counter[0] == (count + times) * plan.grid, "each block arrived once");
  return out;
}

// --- what it has to be ---

std::vector<double> times(std::vector<double> values, double factor) {
  for (double& one : values) one *= factor;
  return values;
}

std::vector<double> sum(std::vector<double> a, const std::vector<double>& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

// two_gemms: each product rounded, as a framework's are.
template <class T>
Truth truth_of(const Shape& s, const Operands& in) {
  const auto x = wide<T>(in.low_rank.x), v = wide<T>(in.low_rank.v), u = wide<T>(in.low_rank.u);
  const auto bias = wide<T>(in.low_rank.bias), rest = dense(in.s, wide<T>(in.values));
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11, in_float = 6 * 0x1p-24, least = 0x1p-24;
  Truth t;
  t.h = times(product<double>(x, v, s.m, s.r, s.k), in.scale);
  t.y = sum(product<double>(t.h, u, s.m, s.n, s.r, bias), product<double>(x, rest, s.m, s.n, s.k));
  const auto plain_h = rounded<T>(times(product<float>(x, v, s.m, s.r, s.k), in.scale));
  t.two_gemms = rounded<T>(sum(product<float>(plain_h, u, s.m, s.n, s.r, bias), product<float>(x, rest, s.m, s.n, s.k)));
  const auto h_size = times(product<double>(absolute(x), absolute(v), s.m, s.r, s.k), std::fabs(in.scale));
  const auto y_size = sum(product<double>(h_size, absolute(u), s.m, s.n, s.r, absolute(bias)),
                          product<double>(absolute(x), absolute(rest), s.m, s.n, s.k));
  const auto spread = product<double>(squared(t.h), squared(u), s.m, s.n, s.r);
  for (size_t i = 0; i < t.h.size(); ++i) {
    t.h_bound.push_back(roundoff * std::fabs(t.h[i]) + in_float * std::sqrt(s.k) * h_size[i] + least);
  }
  for (size_t i = 0; i < t.y.size(); ++i) {
    t.y_bound.push_back(roundoff * std::fabs(t.y[i]) + in_float * std::sqrt(2 * s.k + s.r) * y_size[i] +
                        6 * roundoff * std::sqrt(spread[i]) + least);
  }
  return t;
}

struct Known {  // the same for every seed
  Operands in;
  Truth truth;
  Outputs first;  // of the first seed
};

template <class T>
Known& known_of(size_t shape, bool is_whole) {
  static std::map<size_t, Known> all;
  Known& known = all[2 * shape + is_whole];
  if (known.truth.y.empty()) {
    known.in = operands<T>(kShapes[shape], is_whole);
    known.truth = truth_of<T>(kShapes[shape], known.in);
  }
  return known;
}

// --- cases ---

void plans_are_as_the_shapes_say(uint64_t) {
  for (size_t i = 0; i < kCount; ++i) {
    const Shape& s = kShapes[i];
    const DecodePlan plan = plan_of(s);
    check::equal(plan.tokens, s.tokens, "tokens at a time; shape", i);
    const Rows rows = rows_of(s.n, s.k, s.entries, s.uneven);
    bool fits = true;
    for (int block = 0; block < plan.grid; ++block) {
      const Range tiles = low_rank::share(parts_of(s.n, kTileRows), plan.grid, block);
      const int first = smaller(tiles.first * kTileRows, s.n), last = smaller(tiles.last * kTileRows, s.n);
      const Range entries = entries_between(rows.starts[first], rows.starts[last], s.entries);
      fits = fits && held_of(entries, plan.room).last >= entries.last;
    }
    check::equal(fits, s.fits, "all entries fit; shape", i);
  }
}

template <class T>
void ragged_shapes(uint64_t seed) {
  Errors errors;
  for (size_t i = 0; i < kCount; ++i) {
    const Shape& s = kShapes[i];
    Known& known = known_of<T>(i, false);
    const Outputs out = run<T>(s, known.in, {seed});
    if (seed == 1) known.first = out;
    check::that(out.y == known.first.y && out.h == known.first.h, "every seed gives the same bits; shape", i);
    const auto y = wide<T>(out.y), h = wide<T>(out.h);
    within(y, known.truth.y, known.truth.y_bound, emulator::text("y of shape %zu", i).c_str());
    if (s.wants_h) within(h, known.truth.h, known.truth.h_bound, emulator::text("h of shape %zu", i).c_str());
    if (s.n > 16) errors.add(y, known.truth);
  }
  errors.pass();
}

// Every product and sum is exact, so each single term counts.
template <class T>
void whole_numbers(uint64_t seed) {
  for (size_t i = 0; i < kCount; ++i) {
    const Known& known = known_of<T>(i, true);
    for (double one : known.truth.h) check::that(std::fabs(one) <= 256, "h is exact in bf16", i);
    for (double one : known.truth.y) check::that(std::fabs(one) <= 256, "y is exact in bf16", i);
    const Outputs out = run<T>(kShapes[i], known.in, {seed});
    equal(wide<T>(out.y), known.truth.y, emulator::text("y of shape %zu", i).c_str());
    if (kShapes[i].wants_h) equal(wide<T>(out.h), known.truth.h, emulator::text("h of shape %zu", i).c_str());
  }
}

// How many entries and rows of x shared memory holds does not show; nor does which row a token is in, or in which company.
void bits_depend_on_sizes_alone(uint64_t seed) {
  Shape s{{12, 296, 256, 333, true}, 4000, false, true, 5, kH200, 16, true};
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs fits = run<device::Bf16>(s, in, {seed});
  check::that(plan_of(s).tokens == 16, "all rows at once");
  for (const auto& [kilobytes, tokens] : {std::pair{52, 16}, std::pair{46, 8}, std::pair{42, 2}, std::pair{32, 1}}) {
    s.smem_limit = kilobytes << 10;
    check::equal(plan_of(s).tokens, tokens, "rows at a time");
    check::that(run<device::Bf16>(s, in, {seed}).y == fits.y, "the same bits; bytes", s.smem_limit);
  }
  s.smem_limit = kH200;
  for (int m : {1, 2, 5}) {
    Operands less = in;
    less.low_rank.x.assign(in.low_rank.x.begin() + 7 * s.k, in.low_rank.x.begin() + (7 + m) * s.k);
    Shape few = s;
    few.m = m;
    const Outputs out = run<device::Bf16>(few, less, {seed});
    check::that(std::equal(out.y.begin(), out.y.end(), fits.y.begin() + 7 * s.n), "rows 7.. by themselves; m", m);
  }
}

void explicit_zeros_are_entries(uint64_t seed) {
  const Shape s{{2, 40, 72, 24, false}, 301, false, false, 2, kH200, 2, true};
  Operands in = operands<device::Bf16>(s, true);
  for (size_t i = 0; i < in.values.size(); i += 3) in.values[i] = i % 2 ? 0x8000 : 0;
  equal(wide<device::Bf16>(run<device::Bf16>(s, in, {seed}).y), truth_of<device::Bf16>(s, in).y, "y");
}

void not_a_number_stays_in_its_row(uint64_t seed) {
  const Shape s{{11, 264, 40, 56, true}, 2000, false, true, 7, kH200, 16, true};
  for (int row : {0, 3, 10}) {
    Operands in = operands<device::Bf16>(s, false);
    in.low_rank.x[row * s.k + 263] = 0x7fc0;
    const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}).y);
    for (int i = 0; i < s.m * s.n; ++i) check::that(std::isnan(y[i]) == (i / s.n == row), "only one row", i / s.n);
  }
}

// An infinite input that no entry of a row names is not multiplied there, not by zero either.
void inputs_without_an_entry_are_not_read(uint64_t seed) {
  const Shape s{{5, 72, 8, 40, true}, 500, false, false, 3, kH200, 8, true};
  Operands in = operands<device::Bf16>(s, true);
  const auto due = run<device::Bf16>(s, in, {seed}).y;
  for (int column : {0, 71}) {
    Operands bad = in;
    std::vector<bool> names(s.n);
    for (int row = 0; row < s.n; ++row) {
      for (int e = in.s.starts[row]; e < in.s.starts[row + 1]; ++e) {
        if (in.s.columns[e] != column) continue;
        names[row] = true;
        bad.s.columns[e] = s.k;  // out of range: as if it were not there
      }
    }
    const auto y = run<device::Bf16>(s, bad, {seed}).y;
    for (int i = 0; i < s.m * s.n; ++i) check::that(names[i % s.n] || y[i] == due[i], "rows without it", i % s.n);
  }
}

// Some numbers or other, the same each time, all of them written, and no access outside.
void bad_supports(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__
  if (seed > 1) return;
#endif
  static std::map<size_t, std::vector<uint16_t>> first;
  size_t number = 0;
  for (int kilobytes : {12, 200}) {
    const Shape s{{3, 72, 8, 40, true}, 407, false, false, 2, kilobytes << 10, 4, true};
    Operands in = operands<device::Bf16>(s, false);
    for (const Rows& bad : bad_rows(in.s)) {
      in.s = bad;
      const auto y = run<device::Bf16>(s, in, {seed}).y;
      for (double one : wide<device::Bf16>(y)) check::that(std::isfinite(one), "a number", number);
      if (seed == 1) first[number] = y;
      check::that(y == first[number], "every seed gives the same bits", number);
      ++number;
    }
  }
}

// The barrier's counter is never reset, and passes 32 bits; and needs all blocks at once.
void launches_one_after_another(uint64_t seed) {
  const Shape s{{6, 520, 48, 96, true}, 700, false, true, 6, kH200, 8, true};
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs some = run<device::Bf16>(s, in, {seed}, 3), late = run<device::Bf16>(s, in, {seed}, 2, (1ull << 33) + 7);
  check::that(some.y == late.y, "the same bits at every count");
  check::reports("cooperative launch", [&] { run<device::Bf16>(s, in, {seed, 2}); });
}

// Rows of 4096, r = 512, 3 %: what a layer of a model is.
void layer_of_a_model(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__
  return;
#endif
  if (seed != 1) return;
  const int entries = 4096 * 4096 / 100 * 3;
  const Shape s{{1, 4096, 512, 4096, false}, entries, false, false, 132, kH200, 1, true};
  const DecodePlan plan = plan_of(s);
  check::that(plan.grid == 128 && plan.prefetch == 4, "all of u is asked for early");
  const Operands in = operands<device::Bf16>(s, true);
  for (int row = 0; row < s.n; row += 32) {
    check::that(in.s.starts[row + 32] - in.s.starts[row] <= plan.room - kPiece, "and all of S; row", row);
  }
  const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}).y);
  const auto x = wide<device::Bf16>(in.low_rank.x), v = wide<device::Bf16>(in.low_rank.v);
  const auto u = wide<device::Bf16>(in.low_rank.u), rest = dense(in.s, wide<device::Bf16>(in.values));
  const auto h = times(product<float>(x, v, s.m, s.r, s.k), in.scale);
  equal(y, sum(product<float>(h, u, s.m, s.n, s.r), product<float>(x, rest, s.m, s.n, s.k)), "y");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"plans are as the shapes say", plans_are_as_the_shapes_say},
                     {"ragged shapes, bf16", ragged_shapes<device::Bf16>},
                     {"ragged shapes, fp16", ragged_shapes<device::Fp16>},
                     {"whole numbers, bf16", whole_numbers<device::Bf16>},
                     {"whole numbers, fp16", whole_numbers<device::Fp16>},
                     {"bits depend on sizes alone", bits_depend_on_sizes_alone},
                     {"explicit zeros are entries", explicit_zeros_are_entries},
                     {"NaN stays in its row", not_a_number_stays_in_its_row},
                     {"inputs without an entry are not read", inputs_without_an_entry_are_not_read},
                     {"bad supports", bad_supports},
                     {"launches one after another", launches_one_after_another},
                     {"layer of a model", layer_of_a_model}});
}
