// The selecting kernel of low_rank_sparse's backward in the emulator: both dtypes and tiles, ragged shapes, splits, columns
// of both widths, every choice of gradients; and supports that are none.
//
// Outputs and workspace start as NaN and have exact bounds; each access outside is reported, and so is any of an operand
// that the wanted gradients do not need. All seeds must agree to the bit: threads run in another order with each.
#include "low_rank/backward.cu"
#include "low_rank_sparse/backward.cu"

#include "gradient_truth.h"
#include "low_rank_sparse_truth.h"

namespace {

using namespace low_rank_sparse;
using gradient_truth::Bits, gradient_truth::has_run, gradient_truth::narrowed, gradient_truth::wide, gradient_truth::Wide;
using low_rank_sparse_truth::bad_rows, low_rank_sparse_truth::Rows, low_rank_sparse_truth::rows_of;

constexpr int kBoth = kSelectsValues | kSelectsDb;

struct Shape {
  int m, n, k, entries;
  bool uneven, is_wide;  // columns of 4 bytes
  int splits;            // 0: as planned
};

const Shape kShapes[] = {
    {1, 8, 8, 1, false, false, 0},             // one of everything
    {7, 40, 24, 101, false, true, 0},          // tails of a tile, of a stage
    {64, 72, 200, 999, false, false, 0},       // entries that are no whole pieces
    {65, 200, 72, 3001, true, false, 2},       // one row more: the second split has one step
    {70, 64, 64, 64 * 64, false, false, 0},    // all entries of one tile
    {130, 136, 264, 1703, false, false, 3},    // the large tile
    {257, 264, 136, 5000, true, true, 5},
    {66, 136, 136, 136 * 136, false, false, 0},
    {65, 72, 280, 11, false, false, 0},        // rows and tiles without any
};
constexpr size_t kCount = sizeof kShapes / sizeof *kShapes;

struct Operands {
  Bits dy, x;
  Rows s;
};

struct Found {
  Wide dvalues, db;

  std::vector<std::pair<const char*, const Wide*>> all() const { return {{"dvalues", &dvalues}, {"db", &db}}; }
  bool operator==(const Found& other) const { return dvalues == other.dvalues && db == other.db; }
};

// Normal values; the rows of dy are of different sizes, so that no row can pass for another. Or whole numbers, so few that
// every result is exact.
template <class T>
Operands operands(const Shape& s, bool is_whole) {
  std::mt19937_64 random(s.m * 1000003 + s.k * 1009 + s.entries * 31 + s.n);
  std::normal_distribution<double> normal(0, 1);
  std::uniform_real_distribution<double> uniform(-1, 1);
  const auto make = [&](size_t count) {
    Wide values(count);
    for (double& one : values) {
      const double value = uniform(random);
      one = !is_whole ? normal(random) : std::fabs(value) > 0.4 ? 0 : value > 0 ? 1 : -1;
    }
    return values;
  };
  Wide dy = make(size_t(s.m) * s.n);
  for (size_t i = 0; i < dy.size() && !is_whole; ++i) dy[i] *= std::ldexp(1, static_cast<int>(i / s.n % 5) - 2);
  return {narrowed<T>(dy), narrowed<T>(make(size_t(s.m) * s.k)), rows_of(s.n, s.k, s.entries, s.uneven)};
}

BackwardPlan plan_of(const Shape& s, int needs) {
  BackwardPlan plan = plan_backward(s.m, s.n, s.k, s.entries, needs, 4);
  check::that(plan.tile > 0, "the shape is covered");
  if (s.splits > 0) plan.splits = s.splits;
  plan.partials = partials_of(plan, s.n, s.entries, needs);
  return plan;
}

template <class T>
Found run(const Shape& s, const Operands& in, int needs, emulator::Options options) {
  const BackwardPlan plan = plan_of(s, needs);
  const bool needs_values = needs & kSelectsValues;
  emulator::Buffer<uint16_t> dy("dy", in.dy), x("x", needs_values ? in.x : Bits());
  const low_rank_sparse_truth::InMemory rows(in.s, s.is_wide);
  emulator::Buffer<float> partials("partials", plan.partials);
  emulator::Buffer<uint16_t> dvalues("dvalues", needs_values ? padded_entries(s.entries) : 0);
  emulator::Buffer<uint16_t> db("db", needs & kSelectsDb ? s.n : 0);
  const auto pointer = [](auto& buffer) { return buffer.size() ? buffer.data() : nullptr; };
  Support support = rows.support;
  if (!needs_values) support.starts = nullptr, support.columns = nullptr;
  const BackwardOperands o{dy.data(), pointer(x), support, pointer(partials), pointer(dvalues), pointer(db), s.m, needs};
  const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
  check::that(launch_backward(plan, o, dtype, 4, nullptr) == nullptr, "the launch");
  emulator::synchronize(options);
  return {wide<T>(Bits(dvalues.data(), dvalues.data() + (needs_values ? s.entries : 0))),
          wide<T>(Bits(db.data(), db.data() + db.size()))};
}

// --- what it has to be ---

template <class Sum>
Found gradients(const Shape& s, const Rows& rows, const Wide& dy, const Wide& x) {
  std::vector<Sum> dvalues(s.entries), db(s.n);
  for (int token = 0; token < s.m; ++token) {
    for (int row = 0; row < s.n; ++row) {
      const Sum of_row = dy[size_t(token) * s.n + row];
      db[row] += of_row;
      for (int e = rows.starts[row]; e < rows.starts[row + 1]; ++e) {
        dvalues[e] += of_row * static_cast<Sum>(x[size_t(token) * s.k + rows.columns[e]]);
      }
    }
  }
  return {{dvalues.begin(), dvalues.end()}, {db.begin(), db.end()}};
}

struct Known {  // the same for every seed
  Operands in;
  Found exact, plain, size;
  Found first;  // of the first seed
};

template <class T>
Known& known_of(size_t shape, bool is_whole) {
  static std::map<size_t, Known> all;
  Known& known = all[2 * shape + is_whole];
  if (known.exact.db.empty()) {
    const Shape& s = kShapes[shape];
    known.in = operands<T>(s, is_whole);
    const Wide dy = wide<T>(known.in.dy), x = wide<T>(known.in.x);
    known.exact = gradients<double>(s, known.in.s, dy, x);
    known.plain = gradients<float>(s, known.in.s, dy, x);
    known.size = gradients<double>(s, known.in.s, gradient_truth::absolute(dy), gradient_truth::absolute(x));
  }
  return known;
}

// --- cases ---

template <class T>
void ragged_shapes(uint64_t seed) {
  if (has_run<T>(seed)) return;
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11, in_float = 6 * 0x1p-24, least = 0x1p-24;
  std::map<std::string, gradient_truth::Errors> errors;
  for (size_t i = 0; i < kCount; ++i) {
    Known& known = known_of<T>(i, false);
    const Found out = run<T>(kShapes[i], known.in, kBoth, {seed});
    if (seed == 1) known.first = out;
    check::that(out == known.first, "every seed gives the same bits; shape", i);
    for (size_t which : {0, 1}) {
      const auto [name, values] = out.all()[which];
      const Wide &found = *values, &exact = *known.exact.all()[which].second, &size = *known.size.all()[which].second;
      const std::string words = emulator::text("%s of shape %zu", name, i);
      for (size_t e = 0; e < exact.size(); ++e) {
        const double bound = roundoff * std::fabs(exact[e]) + in_float * std::sqrt(kShapes[i].m) * size[e] + least;
        if (!(std::fabs(found[e] - exact[e]) <= bound)) check::equal(found[e], exact[e], words.c_str(), e);
      }
      if (exact.size() > 64) errors[name].add(found, gradient_truth::rounded<T>(*known.plain.all()[which].second), exact);
    }
  }
  for (const auto& [name, one] : errors) one.pass(("norm of the error of " + name).c_str());
}

// Every product and sum is exact, so each single term counts.
template <class T>
void whole_numbers(uint64_t seed) {
  if (has_run<T>(seed)) return;
  for (size_t i = 0; i < kCount; ++i) {
    const Known& known = known_of<T>(i, true);
    const Found out = run<T>(kShapes[i], known.in, kBoth, {seed, seed == 2 ? 2 : 0});
    for (size_t which : {0, 1}) {
      const auto [name, found] = out.all()[which];
      const Wide& exact = *known.exact.all()[which].second;
      for (size_t e = 0; e < exact.size(); ++e) {
        check::that(std::fabs(exact[e]) <= 256, "exact in bf16", e);
        check::equal((*found)[e], exact[e], emulator::text("%s of shape %zu", name, i).c_str(), e);
      }
    }
  }
}

// Each choice, with and without splits: the same bits as both, and nothing else read or written.
void every_choice(uint64_t seed) {
  if (has_run<device::Bf16>(seed)) return;
  for (int splits : {1, 2}) {
    const Shape s{65, 136, 72, 500, false, false, splits};
    const Operands in = operands<device::Bf16>(s, false);
    const Found both = run<device::Bf16>(s, in, kBoth, {seed});
    check::that(run<device::Bf16>(s, in, kSelectsValues, {seed}) == Found{both.dvalues, {}}, "dvalues alone", splits);
    check::that(run<device::Bf16>(s, in, kSelectsDb, {seed}) == Found{{}, both.db}, "db alone", splits);
  }
}

void not_a_number_stays_where_it_belongs(uint64_t seed) {
  if (has_run<device::Bf16>(seed)) return;
  const Shape s{65, 136, 72, 700, false, false, 2};
  for (int row : {0, 70, 135}) {
    Operands in = operands<device::Bf16>(s, false);
    in.dy[40 * s.n + row] = 0x7fc0;
    in.s.columns[in.s.starts[row + 1] - 1] = s.k;  // an entry without a place
    const Found out = run<device::Bf16>(s, in, kBoth, {seed});
    for (int e = 0; e < s.entries; ++e) {
      const bool is_in_row = e >= in.s.starts[row] && e < in.s.starts[row + 1] - 1;
      check::that(std::isnan(out.dvalues[e]) == is_in_row, "dvalues: only one row", e);
    }
    for (int i = 0; i < s.n; ++i) check::that(std::isnan(out.db[i]) == (i == row), "db: only one element", i);
  }
}

// All gradients written, the same ones each time, and no access outside; 0 where no place belongs to an entry.
void bad_supports(uint64_t seed) {
  if (has_run<device::Bf16>(seed)) return;
  static std::map<size_t, Found> first;
  size_t number = 0;
  for (bool is_wide : {false, true}) {
    const Shape s{9, 72, 136, 805, false, is_wide, is_wide ? 2 : 1};
    Operands in = operands<device::Bf16>(s, false);
    const Rows good = in.s;
    for (const Rows& bad : bad_rows(good)) {
      in.s = bad;
      const Found out = run<device::Bf16>(s, in, kBoth, {seed});
      for (double one : out.dvalues) check::that(std::isfinite(one), "a number", number);
      if (bad.starts == good.starts) {
        for (int e = 0; e < s.entries; ++e) {
          const int column = is_wide ? bad.columns[e] : static_cast<uint16_t>(bad.columns[e]);
          if (column < 0 || column >= s.k) check::equal(out.dvalues[e], 0, "an entry without a place", number);
        }
      }
      if (seed == 1) first[number] = out;
      check::that(out == first[number], "every seed gives the same bits", number);
      ++number;
    }
    in.s = good;
    in.s.starts[s.n] = good.starts[s.n - 1] + 1;
    const Found out = run<device::Bf16>(s, in, kBoth, {seed});
    check::that(s.entries - in.s.starts[s.n] > 4, "entries behind the last row");
    for (int e = in.s.starts[s.n]; e < s.entries; ++e) check::equal(out.dvalues[e], 0, "an entry of no row", e);
  }
}

// As a plan for a whole GPU has it: many blocks, few of them resident.
void as_planned_for_a_gpu(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__
  return;
#endif
  if (seed != 1) return;
  Shape s{520, 264, 136, 3000, false, false, 0};
  const BackwardPlan plan = plan_backward(s.m, s.n, s.k, s.entries, kBoth, 132);
  check::that(plan.tile == kLargeTile && plan.splits == 4, "the plan");
  s.splits = plan.splits;
  const Operands in = operands<device::Bf16>(s, false);
  check::that(run<device::Bf16>(s, in, kBoth, {seed}) == run<device::Bf16>(s, in, kBoth, {seed, 3}), "the same bits");
}

void an_empty_plan_is_refused(uint64_t) {
  const char* error = launch_backward(BackwardPlan(), BackwardOperands{}, Dtype::bfloat16, 1, nullptr);
  check::that(error && strstr(error, "does not cover"), "an error in words");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"whole numbers, bf16", whole_numbers<device::Bf16>},
                     {"whole numbers, fp16", whole_numbers<device::Fp16>},
                     {"every choice of gradients", every_choice},
                     {"NaN stays where it belongs", not_a_number_stays_where_it_belongs},
                     {"bad supports", bad_supports},
                     {"ragged shapes, bf16", ragged_shapes<device::Bf16>},
                     {"ragged shapes, fp16", ragged_shapes<device::Fp16>},
                     {"as planned for a GPU", as_planned_for_a_gpu},
                     {"an empty plan is refused", an_empty_plan_is_refused}});
}
