// The kernel that makes low_rank_sparse's weight in the emulator: both dtypes and tiles, ragged shapes, columns of both
// widths; and supports that are none.
//
// The output starts as NaN and has exact bounds; each access outside is reported. All seeds must agree to the bit: threads
// run in another order with each.
#include "low_rank_sparse/materialize.cu"

#include "gradient_truth.h"
#include "low_rank_sparse_truth.h"
#include "low_rank_truth.h"

namespace {

using namespace low_rank_sparse;
using gradient_truth::Bits, gradient_truth::has_run, gradient_truth::wide, gradient_truth::Wide;
using low_rank_sparse_truth::bad_rows, low_rank_sparse_truth::dense, low_rank_sparse_truth::Rows;
using low_rank_sparse_truth::rows_of;

struct Shape {
  int n, k, r, entries;
  bool uneven, is_wide;  // columns of 4 bytes
  int tile;
};

const Shape kShapes[] = {
    {1, 8, 8, 1, false, false, 64},          // one of everything
    {17, 40, 24, 100, false, true, 64},      // tails of a tile and of a stage
    {70, 136, 0, 777, false, false, 64},     // S alone
    {65, 72, 72, 0, false, false, 64},       // u v alone
    {64, 64, 64, 4096, false, false, 64},    // all entries, all of one tile
    {129, 264, 40, 1500, true, false, 128},  // one row has a third of them
    {130, 136, 264, 9000, false, true, 128},
    {200, 136, 136, 200 * 136, false, false, 128},
    {257, 72, 8, 1000, false, false, 64},
};
constexpr size_t kCount = sizeof kShapes / sizeof *kShapes;

struct Operands {
  Bits u, v, values;
  Rows s;
  float scale;
};

template <class T>
Operands operands(const Shape& s, bool is_whole) {
  std::mt19937_64 random(s.n * 1000003 + s.k * 1009 + s.r * 31 + s.entries);
  const auto make = [&](size_t count, double scale, double density) {
    return is_whole ? low_rank_truth::whole<T>(random, count, density) : low_rank_truth::normal<T>(random, count, scale);
  };
  return {make(size_t(s.n) * s.r, 1, 0.5), make(size_t(s.r) * s.k, 1 / std::sqrt(s.r + 1), 0.5), make(s.entries, 1, 1),
          rows_of(s.n, s.k, s.entries, s.uneven), is_whole ? 2.f : 0.7f};
}

template <class T>
Bits run(const Shape& s, const Operands& in, emulator::Options options) {
  emulator::Buffer<uint16_t> u("u", in.u), v("v", in.v), values("values", in.values), w("w", size_t(s.n) * s.k);
  const low_rank_sparse_truth::InMemory rows(in.s, s.is_wide);
  const int tile = s.tile;
  const MaterializePlan plan{tile, parts_of(s.n, tile) * parts_of(s.k, tile)};
  const MaterializeOperands o{v.data(), u.data(), values.data(), rows.support, w.data(), s.r, in.scale};
  const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
  check::that(launch_materialize(plan, o, dtype, nullptr) == nullptr, "the launch");
  emulator::synchronize(options);
  return {w.data(), w.data() + w.size()};
}

// In double: the weight, the sizes of what is added up, and in float, rounded, what a plain product makes of it.
struct Truth {
  Wide exact, size, plain;
};

template <class T>
Truth truth_of(const Shape& s, const Operands& in) {
  const Wide u = wide<T>(in.u), v = wide<T>(in.v), values = wide<T>(in.values);
  Truth t{dense(in.s, values), dense(in.s, gradient_truth::absolute(values)), {}};
  std::vector<float> plain(t.exact.size());
  for (int row = 0; row < s.n; ++row) {
    for (int d = 0; d < s.r; ++d) {
      for (int column = 0; column < s.k; ++column) {
        const double one = u[size_t(row) * s.r + d] * v[size_t(d) * s.k + column];
        t.exact[size_t(row) * s.k + column] += in.scale * one;
        t.size[size_t(row) * s.k + column] += in.scale * std::fabs(one);
        plain[size_t(row) * s.k + column] += static_cast<float>(one);
      }
    }
  }
  const Wide sparse = dense(in.s, values);
  for (size_t i = 0; i < plain.size(); ++i) t.plain.push_back(in.scale * plain[i] + static_cast<float>(sparse[i]));
  t.plain = gradient_truth::rounded<T>(t.plain);
  return t;
}

struct Known {  // the same for every seed
  Operands in;
  Truth truth;
  Bits first;  // of the first seed
};

template <class T>
Known& known_of(size_t shape, bool is_whole) {
  static std::map<size_t, Known> all;
  Known& known = all[2 * shape + is_whole];
  if (known.truth.exact.empty()) {
    known.in = operands<T>(kShapes[shape], is_whole);
    known.truth = truth_of<T>(kShapes[shape], known.in);
  }
  return known;
}

// --- cases ---

template <class T>
void ragged_shapes(uint64_t seed) {
  if (has_run<T>(seed)) return;
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11, in_float = 6 * 0x1p-24, least = 0x1p-24;
  gradient_truth::Errors errors;
  for (size_t i = 0; i < kCount; ++i) {
    Known& known = known_of<T>(i, false);
    const Bits bits = run<T>(kShapes[i], known.in, {seed});
    if (seed == 1) known.first = bits;
    check::that(bits == known.first, "every seed gives the same bits; shape", i);
    const Wide w = wide<T>(bits), &exact = known.truth.exact;
    const double of_sums = in_float * std::sqrt(kShapes[i].r + 2);
    const std::string words = emulator::text("w of shape %zu", i);
    for (size_t e = 0; e < w.size(); ++e) {
      const double bound = roundoff * std::fabs(exact[e]) + of_sums * known.truth.size[e] + least;
      if (!(std::fabs(w[e] - exact[e]) <= bound)) check::equal(w[e], exact[e], words.c_str(), e);
    }
    if (kShapes[i].r > 0 && w.size() > 64) errors.add(w, known.truth.plain, exact);
  }
  errors.pass("norm of the error");
}

// Every product and sum is exact, so each single term counts.
template <class T>
void whole_numbers(uint64_t seed) {
  if (has_run<T>(seed)) return;
  for (size_t i = 0; i < kCount; ++i) {
    const Known& known = known_of<T>(i, true);
    const Wide w = wide<T>(run<T>(kShapes[i], known.in, {seed, seed == 2 ? 2 : 0}));
    for (size_t e = 0; e < w.size(); ++e) {
      check::that(std::fabs(known.truth.exact[e]) <= 256, "exact in bf16", e);
      check::equal(w[e], known.truth.exact[e], emulator::text("w of shape %zu", i).c_str(), e);
    }
  }
}

void explicit_zeros_and_infinity(uint64_t seed) {
  const Shape s{70, 136, 24, 900, false, false, 64};
  Operands in = operands<device::Bf16>(s, true);
  for (size_t i = 0; i < in.values.size(); i += 3) in.values[i] = i % 2 ? 0x8000 : 0;
  in.values[100] = 0x7f80;
  const Wide w = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}));
  const Wide exact = truth_of<device::Bf16>(s, in).exact;
  for (size_t e = 0; e < w.size(); ++e) check::equal(w[e], exact[e], "w", e);
}

// Numbers of some kind, the same each time, all of them written, and no access outside; what is out of range is as if it
// were not there.
void bad_supports(uint64_t seed) {
  if (has_run<device::Bf16>(seed)) return;
  static std::map<size_t, Bits> first;
  size_t number = 0;
  for (bool is_wide : {false, true}) {
    const Shape s{70, 72, 8, 805, false, is_wide, 64};
    Operands in = operands<device::Bf16>(s, false);
    for (const Rows& bad : bad_rows(in.s)) {
      in.s = bad;
      const Bits w = run<device::Bf16>(s, in, {seed});
      for (double one : wide<device::Bf16>(w)) check::that(std::isfinite(one), "a number", number);
      if (seed == 1) first[number] = w;
      check::that(w == first[number], "every seed gives the same bits", number);
      ++number;
    }
    Operands good = operands<device::Bf16>(s, true);
    Wide exact = truth_of<device::Bf16>(s, good).exact;
    const int row = 35, last = good.s.starts[row + 1] - 1;
    exact[row * s.k + good.s.columns[last]] -= device::widen<device::Bf16>(good.values[last]);
    for (int column : {s.k, -1, -32768}) {
      good.s.columns[last] = column;
      check::that(wide<device::Bf16>(run<device::Bf16>(s, good, {seed})) == exact, "without an entry", column);
    }
  }
}

void an_empty_plan_is_refused(uint64_t) {
  const char* error = launch_materialize(MaterializePlan(), MaterializeOperands{}, Dtype::bfloat16, nullptr);
  check::that(error && strstr(error, "does not cover"), "an error in words");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"ragged shapes, bf16", ragged_shapes<device::Bf16>},
                     {"ragged shapes, fp16", ragged_shapes<device::Fp16>},
                     {"whole numbers, bf16", whole_numbers<device::Bf16>},
                     {"whole numbers, fp16", whole_numbers<device::Fp16>},
                     {"explicit zeros and infinity", explicit_zeros_and_infinity},
                     {"bad supports", bad_supports},
                     {"an empty plan is refused", an_empty_plan_is_refused}});
}
