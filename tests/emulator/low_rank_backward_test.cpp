// The backward kernels of low_rank in the emulator: every choice of gradients, both kinds of output, both dtypes.
//
// Outputs and workspace start as NaN and have exact bounds; each access outside is reported, and so is any of an operand
// that the wanted gradients do not need. All seeds must agree to the bit: threads run in another order with each.
#include "low_rank/backward.cu"

#include <map>
#include <random>

#include "check.h"
#include "gradient_truth.h"

namespace {

using namespace low_rank;
using namespace gradient_truth;

struct Shape {
  int m, k, r, n;
  int dh_splits, weight_splits;  // 0: as planned
  bool is_added;
};

const Shape kRagged[] = {
    {1, 8, 8, 8, 0, 0, false},           // one of everything
    {7, 40, 24, 136, 2, 0, false},       // one row tile, two splits of dh: the second of one step, and that ragged
    {64, 72, 64, 200, 0, 0, true},       // whole tiles of m and r; floats without splits
    {65, 200, 8, 72, 0, 2, false},       // one row more: the second split has one
    {130, 72, 24, 264, 3, 3, true},      // every third step; floats from splits
    {257, 72, 64, 136, 2, 5, false},     // each step of m its own split, the last of one row
    {65, 136, 72, 200, 0, 0, false},     // the large tile
    {130, 72, 136, 72, 2, 3, false},
    {257, 72, 72, 72, 3, 5, true},
};
constexpr size_t kShapes = sizeof kRagged / sizeof *kRagged;

struct Operands {
  Bits dy, x, h, v, u;
  std::vector<float> before;  // what gradients in float are added to, each from the start of this
};

// A matrix as it lies, or its transpose.
struct Matrix {
  const Wide& values;
  int rows, columns;
  bool is_transposed = false;
  double at(int i, int j) const { return is_transposed ? values[size_t(j) * rows + i] : values[size_t(i) * columns + j]; }
};

template <class Sum>
Wide product(const Matrix& a, const Matrix& b) {
  Wide c(size_t(a.rows) * b.columns);
  for (int i = 0; i < a.rows; ++i) {
    for (int j = 0; j < b.columns; ++j) {
      Sum sum = 0;
      for (int d = 0; d < a.columns; ++d) sum += static_cast<Sum>(a.at(i, d)) * static_cast<Sum>(b.at(d, j));
      c[size_t(i) * b.columns + j] = sum;
    }
  }
  return c;
}

// Normal values; the rows of dy are of different sizes, so that no row can pass for another.
template <class T>
Operands operands(const Shape& s, bool is_whole) {
  std::mt19937_64 random(s.m * 1000003 + s.k * 1009 + s.r * 31 + s.n);
  std::normal_distribution<double> normal(0, 1);
  std::uniform_real_distribution<double> uniform(-1, 1);
  const auto make = [&](int rows, int columns, double scale, double density) {
    Wide values(size_t(rows) * columns);
    for (double& one : values) {
      const double value = uniform(random);
      one = !is_whole ? normal(random) * scale : std::fabs(value) > density ? 0 : value > 0 ? 1 : -1;
    }
    return values;
  };
  Wide dy = make(s.m, s.n, 1, 0.3);
  for (size_t i = 0; i < dy.size() && !is_whole; ++i) dy[i] *= std::ldexp(1, static_cast<int>(i / s.n % 5) - 2);
  const Wide x = make(s.m, s.k, 1, 0.3), v = make(s.r, s.k, 1 / std::sqrt(s.k), 0.1);
  const Wide u = make(s.n, s.r, 1 / std::sqrt(s.r), 0.1);
  Operands in{narrowed<T>(dy), narrowed<T>(x), {}, narrowed<T>(v), narrowed<T>(u), {}};
  in.h = narrowed<T>(product<float>({wide<T>(in.x), s.m, s.k}, {wide<T>(in.v), s.k, s.r, true}));
  in.before.resize(larger(s.n, s.k) * s.r);
  for (float& one : in.before) one = static_cast<float>(is_whole ? std::floor(uniform(random) * 9) : normal(random));
  return in;
}

BackwardPlan plan_of(const Shape& s, int needs) {
  BackwardPlan plan = plan_backward(s.m, s.n, s.k, s.r, needs, s.is_added, 4);
  check::that(plan.tile > 0, "the shape is covered");
  if (s.dh_splits > 0) plan.dh_splits = s.dh_splits;
  if (s.weight_splits > 0) plan.weight_splits = s.weight_splits;
  plan.partials = partials_of(plan, s.m, s.n, s.k, s.r, needs);
  return plan;
}

// A gradient on the GPU, of the dtype or in float.
struct Output {
  emulator::Buffer<uint16_t> elements;
  emulator::Buffer<float> floats;

  Output(const char* name, size_t count, bool is_added, const std::vector<float>& before)
      : elements(name, is_added ? 0 : count), floats(name, is_added ? count : 0) {
    for (size_t i = 0; i < floats.size(); ++i) floats[i] = before[i];
  }
  void* data() { return floats.size() ? static_cast<void*>(floats.data()) : elements.size() ? elements.data() : nullptr; }
  template <class T>
  Wide values() const {
    if (floats.size()) return Wide(floats.data(), floats.data() + floats.size());
    return wide<T>(Bits(elements.data(), elements.data() + elements.size()));
  }
};

template <class T>
Gradients run(const Shape& s, const Operands& in, int needs, emulator::Options options) {
  const BackwardPlan plan = plan_of(s, needs);
  const bool needs_dh = needs & (kNeedsDx | kNeedsDv);
  const auto input = [](const char* name, const Bits& values, bool is_needed) {
    return std::make_unique<emulator::Buffer<uint16_t>>(name, is_needed ? values : Bits());
  };
  const auto dy = input("dy", in.dy, true), x = input("x", in.x, needs & kNeedsDv), h = input("h", in.h, needs & kNeedsDu),
             v = input("v", in.v, needs & kNeedsDx), u = input("u", in.u, needs_dh);
  emulator::Buffer<uint16_t> dh("dh", needs_dh ? size_t(s.m) * s.r : 0);
  emulator::Buffer<float> partials("partials", plan.partials);
  Output dx("dx", needs & kNeedsDx ? size_t(s.m) * s.k : 0, false, in.before);
  Output dv("dv", needs & kNeedsDv ? size_t(s.r) * s.k : 0, s.is_added, in.before);
  Output du("du", needs & kNeedsDu ? size_t(s.n) * s.r : 0, s.is_added, in.before);
  Output db("db", needs & kNeedsDb ? size_t(s.n) : 0, s.is_added, in.before);
  const auto pointer = [](auto& buffer) { return buffer.size() ? buffer.data() : nullptr; };
  const BackwardParams p{pointer(*dy), pointer(*x), pointer(*h), pointer(*v), pointer(*u), pointer(dh), pointer(partials),
                         static_cast<uint16_t*>(dx.data()), dv.data(), du.data(), db.data(), s.m, s.n, s.k, s.r, needs};
  const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
  check::that(launch_backward(plan, p, dtype, 4, nullptr) == nullptr, "the launch");
  emulator::synchronize(options);
  return {dx.values<T>(), dv.values<T>(), du.values<T>(), db.values<T>()};
}

// --- what it has to be ---

// What the gradients have to be, what two plain steps in float make of them, and how far from the truth an element may be:
// its rounding, six times the spread of the middle's, and of the sums; and the smallest number of fp16.
struct Truth {
  Gradients exact, plain, bound;
};

struct Gradient {  // c = outer middle, or what is summed, where there is no middle
  Wide exact, plain, bound;
};

struct Middle {
  Wide exact, rounded, size;  // size: the sum of what it is the sum of, absolute
};

template <class T>
Middle middle_of(const Matrix& a, const Matrix& b) {
  const Wide sizes_a = absolute(a.values), sizes_b = absolute(b.values);
  return {product<double>(a, b), rounded<T>(product<float>(a, b)),
          product<double>({sizes_a, a.rows, a.columns, a.is_transposed}, {sizes_b, b.rows, b.columns, b.is_transposed})};
}

// outer times middle (or middle times outer, is_left) and its bound; terms: summands of both steps.
template <class T>
Gradient gradient_of(const Middle& middle, int rows, int columns, bool is_transposed, const Matrix& outer, bool is_left,
                     int terms, bool is_float, const std::vector<float>& before) {
  const auto multiply = [&](const Wide& m, const Wide& o, auto sum) {
    using Sum = decltype(sum);
    const Matrix mm{m, rows, columns, is_transposed}, oo{o, outer.rows, outer.columns, outer.is_transposed};
    return is_left ? product<Sum>(oo, mm) : product<Sum>(mm, oo);
  };
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11, of_float = 0x1p-24;
  Gradient g{multiply(middle.exact, outer.values, 0.), multiply(middle.rounded, outer.values, 0.f), {}};
  const Wide sizes = multiply(middle.size, absolute(outer.values), 0.);
  const Wide spread = multiply(squared(middle.exact), squared(outer.values), 0.);
  if (!is_float) g.plain = rounded<T>(g.plain);
  for (size_t i = 0; i < g.exact.size(); ++i) {
    double size = sizes[i];
    if (is_float) {
      g.exact[i] += before[i];
      g.plain[i] = static_cast<float>(g.plain[i]) + before[i];
      size += std::fabs(before[i]);
    }
    g.bound.push_back((is_float ? of_float : roundoff) * std::fabs(g.exact[i]) + 6 * roundoff * std::sqrt(spread[i]) +
                      6 * std::sqrt(terms) * of_float * size + 0x1p-24);
  }
  return g;
}

template <class T>
Truth truth_of(const Shape& s, const Operands& in) {
  const Wide dy = wide<T>(in.dy), x = wide<T>(in.x), v = wide<T>(in.v), u = wide<T>(in.u), ones(s.m, 1);
  const Middle dh = middle_of<T>({dy, s.m, s.n}, {u, s.n, s.r}), h = middle_of<T>({x, s.m, s.k}, {v, s.k, s.r, true});
  const Gradient dx = gradient_of<T>(dh, s.m, s.r, false, {v, s.r, s.k}, false, s.n + s.r, false, in.before);
  const Gradient dv = gradient_of<T>(dh, s.r, s.m, true, {x, s.m, s.k}, false, s.n + s.m, s.is_added, in.before);
  const Gradient du = gradient_of<T>(h, s.m, s.r, false, {dy, s.n, s.m, true}, true, s.k + s.m, s.is_added, in.before);
  const Middle one{ones, ones, ones};  // of db, which has none: its bound comes below
  Gradient db = gradient_of<T>(one, 1, s.m, false, {dy, s.m, s.n}, false, s.m, s.is_added, in.before);
  const double roundoff = s.is_added ? 0x1p-24 : std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11;
  const Wide sizes = product<double>({ones, 1, s.m}, {absolute(dy), s.m, s.n});
  for (int i = 0; i < s.n; ++i) {
    const double size = sizes[i] + (s.is_added ? std::fabs(in.before[i]) : 0);
    db.bound[i] = roundoff * std::fabs(db.exact[i]) + 6 * std::sqrt(s.m) * 0x1p-24 * size + 0x1p-24;
  }
  return {{dx.exact, dv.exact, du.exact, db.exact},
          {dx.plain, dv.plain, du.plain, db.plain},
          {dx.bound, dv.bound, du.bound, db.bound}};
}

struct Known {  // the same for every seed
  Operands in;
  Truth truth;
  Gradients first;  // of the first seed
};

template <class T>
Known& known_of(size_t shape, bool is_whole) {
  static std::map<size_t, Known> all;
  Known& known = all[2 * shape + is_whole];
  if (known.truth.exact.dx.empty()) {
    known.in = operands<T>(kRagged[shape], is_whole);
    known.truth = truth_of<T>(kRagged[shape], known.in);
  }
  return known;
}

// --- kernels ---

template <class T>
void ragged_shapes(uint64_t seed) {
  if (has_run<T>(seed)) return;
  std::map<std::string, Errors> errors;  // of each gradient; in float apart
  for (size_t i = 0; i < kShapes; ++i) {
    Known& known = known_of<T>(i, false);
    Gradients out = run<T>(kRagged[i], known.in, kAll, {seed});
    if (seed == 1) known.first = out;
    check::that(is_same(out, known.first), "every seed gives the same bits; shape", i);
    Truth& t = known.truth;
    for (size_t which = 0; which < 4; ++which) {
      const auto [name, values] = out.all()[which];
      const Wide &found = *values, &exact = *t.exact.all()[which].second;
      const Wide &plain = *t.plain.all()[which].second, &bound = *t.bound.all()[which].second;
      const std::string words = emulator::text("%s of shape %zu", name, i);
      for (size_t e = 0; e < exact.size(); ++e) {
        if (!(std::fabs(found[e] - exact[e]) <= bound[e])) check::equal(found[e], exact[e], words.c_str(), e);
      }
      errors[std::string(name) + (kRagged[i].is_added && which > 0 ? " in float" : "")].add(found, plain, exact);
    }
  }
  for (const auto& [name, one] : errors) one.pass(("norm of the error of " + name).c_str());
}

// Every product and sum is exact, so each single term counts. Each shape once: the seeds share them.
template <class T>
void whole_numbers(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__  // which has seen every path by then
  return;
#endif
  for (size_t i = seed % 3; i < kShapes; i += 3) {
    Known& known = known_of<T>(i, true);
    Gradients exact = known.truth.exact, out = run<T>(kRagged[i], known.in, kAll, {seed, seed == 2 ? 2 : 0});
    for (size_t which = 0; which < 4; ++which) {
      const auto [name, found] = out.all()[which];
      const Wide& expected = *exact.all()[which].second;
      check::equal(found->size(), expected.size(), name);
      for (size_t e = 0; e < expected.size(); ++e) {
        check::that(std::fabs(expected[e]) <= 256, "exact in bf16", e);
        check::equal((*found)[e], expected[e], emulator::text("%s of shape %zu", name, i).c_str(), e);
      }
    }
  }
}

// Each set of gradients, with and without splits, of the dtype and in float: the same bits as all of them, and nothing else
// read or written.
void every_choice(uint64_t seed) {
  for (bool is_added : {false, true}) {
    for (bool is_split : {false, true}) {
      if ((is_added + is_split + seed) % 2) continue;  // every other seed
      const Shape s{65, 40, 24, 72, is_split ? 2 : 1, is_split ? 2 : 1, is_added};
      const Operands in = operands<device::Bf16>(s, false);
      Gradients all = run<device::Bf16>(s, in, kAll, {seed});
      for (int needs = 1; needs < kAll; ++needs) {
        Gradients some = run<device::Bf16>(s, in, needs, {seed});
        for (int which = 0; which < 4; ++which) {
          const bool is_wanted = needs >> which & 1;
          const auto [name, found] = some.all()[which];
          check::that(*found == (is_wanted ? *all.all()[which].second : Wide()), name, needs);
        }
      }
    }
  }
}

void not_a_number_stays_where_it_belongs(uint64_t seed) {
  const Shape s{65, 72, 24, 136, 2, 2, false};
  for (int row : {0, 33, 64}) {
    Operands in = operands<device::Bf16>(s, false);
    in.dy[row * s.n + 135] = 0x7fc0;
    const Gradients out = run<device::Bf16>(s, in, kNeedsDx | kNeedsDu | kNeedsDb, {seed});
    for (int i = 0; i < s.m * s.k; ++i) check::that(std::isnan(out.dx[i]) == (i / s.k == row), "dx: only one row", i / s.k);
    for (int i = 0; i < s.n * s.r; ++i) check::that(std::isnan(out.du[i]) == (i / s.r == 135), "du: only one row", i / s.r);
    for (int i = 0; i < s.n; ++i) check::that(std::isnan(out.db[i]) == (i == 135), "db: only one element", i);
  }
}

// As a plan for a whole GPU has it: many blocks, few of them resident.
void as_planned_for_a_gpu(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__
  return;
#endif
  if (seed != 1) return;
  const Shape s{520, 72, 72, 264, 0, 0, false};
  const BackwardPlan plan = plan_backward(s.m, s.n, s.k, s.r, kAll, false, 132);
  check::that(plan.tile == kLargeTile && plan.dh_splits == 2 && plan.weight_splits == 4, "the plan");
  const Shape split{s.m, s.k, s.r, s.n, plan.dh_splits, plan.weight_splits, false};
  const Operands in = operands<device::Bf16>(s, false);
  const Gradients all = run<device::Bf16>(split, in, kAll, {seed}), few = run<device::Bf16>(split, in, kAll, {seed, 3});
  check::that(is_same(all, few), "the same bits");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"ragged shapes, bf16", ragged_shapes<device::Bf16>},
                     {"ragged shapes, fp16", ragged_shapes<device::Fp16>},
                     {"whole numbers, bf16", whole_numbers<device::Bf16>},
                     {"whole numbers, fp16", whole_numbers<device::Fp16>},
                     {"every choice of gradients", every_choice},
                     {"NaN stays where it belongs", not_a_number_stays_where_it_belongs},
                     {"as planned for a GPU", as_planned_for_a_gpu}});
}
