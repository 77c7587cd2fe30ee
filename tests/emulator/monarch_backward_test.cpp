// The backward kernels of monarch in the emulator: both forms and dtypes, every group of blocks, every choice of gradients.
//
// Outputs and workspace start as NaN and have exact bounds; each access outside is reported, and so is any of an operand
// that the wanted gradients do not need. All seeds must agree to the bit: threads run in another order with each.
#include "monarch/backward.cu"
#include "monarch/batched.cu"

#include <map>
#include <random>

#include "check.h"
#include "gradient_truth.h"

namespace {

using namespace monarch;
using namespace gradient_truth;

enum Forms { kInterleaved = 1, kRuns = 2, kBoth = 3 };

struct Shape {
  int m, k, n, b_in, b_out, r;
  int forms;
  int splits;  // of the tokens, for the weights; 0: as planned
};

const Shape kRagged[] = {
    {1, 8, 8, 1, 1, 8, kBoth, 0},               // one of everything
    {5, 64, 64, 8, 8, 1, kBoth, 0},             // a group of eight blocks: pieces with an element of each
    {40, 256, 256, 16, 16, 1, kBoth, 2},        // two groups; splits of the tokens
    {70, 208, 168, 9, 4, 8, kInterleaved, 0},   // four blocks between each other; inputs that the blocks do not divide
    {33, 120, 136, 16, 2, 4, kInterleaved, 3},  // two; the last input block is padding; the last split has one token
    {130, 144, 272, 2, 2, 68, kBoth, 0},        // several tiles of rows and columns; a rank of no whole pieces
    {257, 72, 144, 1, 3, 8, kRuns, 5},          // three output blocks: the last of a group are missing
    {65, 256, 120, 8, 16, 1, kBoth, 2},         // outputs that the blocks do not divide: the last one has some, or none
    {300, 80, 104, 2, 4, 12, kInterleaved, 4},  // single elements of dz from a group
    {49, 48, 56, 3, 8, 8, kInterleaved, 0},     // pieces of dz along the rank, of eight blocks
    {35, 48, 32, 6, 2, 8, kBoth, 0},            // and of two
};

struct Case {
  Shape shape;
  bool interleave;
};

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const Shape& s : kRagged) {
    if (s.forms & kInterleaved) cases.push_back({s, true});
    if (s.forms & kRuns) cases.push_back({s, false});
  }
  return cases;
}
const std::vector<Case> kCases = all_cases();

Sizes sizes_of(const Case& c) {
  return {c.shape.m, c.shape.n, c.shape.k, c.shape.b_in, c.shape.b_out, c.shape.r, c.interleave};
}

// --- as the op defines them: sums in Sum; of middles [b_out, m, b_in r], of dz as of h ---

// The output that row c of block o makes; n and beyond: none.
int output_of(const Sizes& s, int o, int c) { return s.interleave ? o + c * s.b_out : o * s.s() + c; }

// visit(token, o, e, i, row of v): of every element of a middle.
template <class Visit>
void each_of_middle(const Sizes& s, const Visit& visit) {
  for (int o = 0; o < s.b_out; ++o) {
    for (int token = 0; token < s.m; ++token) {
      for (int e = 0; e < s.b_in * s.r; ++e) visit(token, o, e, e / s.r, e % s.r * s.b_out + o);
    }
  }
}
size_t in_middle(const Sizes& s, int token, int o, int e) { return (size_t(o) * s.m + token) * s.b_in * s.r + e; }
size_t in_v(const Sizes& s, int i, int row, int d) { return (size_t(i) * s.r * s.b_out + row) * s.p() + d; }
size_t in_u(const Sizes& s, int o, int c, int e) { return (size_t(o) * s.s() + c) * s.b_in * s.r + e; }

template <class Sum>
Wide forward_middle(const Sizes& s, const Wide& x, const Wide& v) {
  Wide h(size_t(s.b_out) * s.m * s.b_in * s.r);
  each_of_middle(s, [&](int token, int o, int e, int i, int row) {
    Sum sum = 0;
    for (int d = 0; d < s.p() && i * s.p() + d < s.k; ++d) {
      sum += static_cast<Sum>(x[size_t(token) * s.k + i * s.p() + d]) * static_cast<Sum>(v[in_v(s, i, row, d)]);
    }
    h[in_middle(s, token, o, e)] = sum;
  });
  return h;
}

template <class Sum>
Wide backward_middle(const Sizes& s, const Wide& dy, const Wide& u) {
  Wide dz(size_t(s.b_out) * s.m * s.b_in * s.r);
  each_of_middle(s, [&](int token, int o, int e, int, int) {
    Sum sum = 0;
    for (int c = 0; c < s.s() && output_of(s, o, c) < s.n; ++c) {
      sum += static_cast<Sum>(dy[size_t(token) * s.n + output_of(s, o, c)]) * static_cast<Sum>(u[in_u(s, o, c, e)]);
    }
    dz[in_middle(s, token, o, e)] = sum;
  });
  return dz;
}

template <class Sum>
Gradients gradients(const Sizes& s, const Wide& dy, const Wide& x, const Wide& v, const Wide& dz, const Wide& h) {
  std::vector<Sum> dx(size_t(s.m) * s.k), dv(v.size()), du(size_t(s.b_out) * s.s() * s.b_in * s.r), db(s.n);
  each_of_middle(s, [&](int token, int o, int e, int i, int row) {
    const Sum to_inputs = dz[in_middle(s, token, o, e)], of_inputs = h[in_middle(s, token, o, e)];
    for (int d = 0; d < s.p() && i * s.p() + d < s.k; ++d) {
      const size_t input = size_t(token) * s.k + i * s.p() + d;
      dx[input] += to_inputs * static_cast<Sum>(v[in_v(s, i, row, d)]);
      dv[in_v(s, i, row, d)] += to_inputs * static_cast<Sum>(x[input]);
    }
    for (int c = 0; c < s.s() && output_of(s, o, c) < s.n; ++c) {
      du[in_u(s, o, c, e)] += static_cast<Sum>(dy[size_t(token) * s.n + output_of(s, o, c)]) * of_inputs;
    }
  });
  for (int token = 0; token < s.m; ++token) {
    for (int i = 0; i < s.n; ++i) db[i] += static_cast<Sum>(dy[size_t(token) * s.n + i]);
  }
  return {{dx.begin(), dx.end()}, {dv.begin(), dv.end()}, {du.begin(), du.end()}, {db.begin(), db.end()}};
}

// --- operands, and a call ---

struct Operands {
  Bits dy, x, h, v, u;
};

// Normal values; the rows of dy are of different sizes, so that no row can pass for another. Or whole numbers, so few of
// them that every result is exact.
template <class T>
Operands operands(const Case& c, bool is_whole) {
  const Sizes s = sizes_of(c);
  std::mt19937_64 random(s.m * 1000003 + s.k * 1009 + s.r * 31 + s.n + s.interleave);
  std::normal_distribution<double> normal(0, 1);
  std::uniform_real_distribution<double> uniform(-1, 1);
  const auto make = [&](size_t count, double scale, double density) {
    Wide values(count);
    for (double& one : values) {
      const double value = uniform(random);
      one = !is_whole ? normal(random) * scale : std::fabs(value) > density ? 0 : value > 0 ? 1 : -1;
    }
    return values;
  };
  const int t = s.b_in * s.r;
  Wide dy = make(size_t(s.m) * s.n, 1, 0.3);
  for (size_t i = 0; i < dy.size() && !is_whole; ++i) dy[i] *= std::ldexp(1, static_cast<int>(i / s.n % 5) - 2);
  const Wide x = make(size_t(s.m) * s.k, 1, 0.3);
  const Wide v = make(size_t(s.b_in) * s.r * s.b_out * s.p(), 1 / std::sqrt(s.p()), std::fmin(0.5, 8.0 / s.p()));
  const Wide u = make(size_t(s.b_out) * s.s() * t, 1 / std::sqrt(t), std::fmin(0.5, 8.0 / t));
  Operands in{narrowed<T>(dy), narrowed<T>(x), {}, narrowed<T>(v), narrowed<T>(u)};
  in.h = narrowed<T>(forward_middle<float>(s, wide<T>(in.x), wide<T>(in.v)));
  return in;
}

constexpr int kSmCount = 3;

BackwardPlan plan_of(const Case& c, int needs) {
  const Sizes s = sizes_of(c);
  BackwardPlan plan = plan_backward(s.m, s.n, s.k, s.b_in, s.b_out, s.r, s.interleave, needs, kSmCount, 99 << 10);
  check::that(plan.is_covered, "the shape is covered; m", s.m);
  if (c.shape.splits > 0) {
    for (ProductPlan* one : {&plan.dv, &plan.du}) {
      if (one->group == 0) continue;
      one->grid = one->grid / one->splits * c.shape.splits;
      one->splits = c.shape.splits;
    }
    plan.partials = partials_of(plan, s, needs);
  }
  return plan;
}

template <class T>
Gradients run(const Case& c, const Operands& in, int needs, bool has_h, emulator::Options options) {
  const Sizes s = sizes_of(c);
  const BackwardPlan plan = plan_of(c, needs);
  const bool needs_dz = needs & (kNeedsDx | kNeedsDv), needs_h = needs & kNeedsDu, makes_h = needs_h && !has_h;
  const auto input = [](const char* name, const Bits& values, bool is_needed) {
    return std::make_unique<emulator::Buffer<uint16_t>>(name, is_needed ? values : Bits());
  };
  const auto dy = input("dy", in.dy, true), x = input("x", in.x, needs & kNeedsDv || makes_h),
             h = input("h", in.h, needs_h && has_h), v = input("v", in.v, needs & kNeedsDx || makes_h),
             u = input("u", in.u, needs_dz);
  const auto output = [](const char* name, size_t count, bool is_needed) {
    return std::make_unique<emulator::Buffer<uint16_t>>(name, is_needed ? count : 0);
  };
  const auto dz = output("dz", in.h.size(), needs_dz), made_h = output("made_h", in.h.size(), makes_h),
             dx = output("dx", in.x.size(), needs & kNeedsDx), dv = output("dv", in.v.size(), needs & kNeedsDv),
             du = output("du", in.u.size(), needs & kNeedsDu), db = output("db", s.n, needs & kNeedsDb);
  emulator::Buffer<float> partials("partials", plan.partials);
  const auto pointer = [](auto& buffer) { return buffer.size() ? buffer.data() : nullptr; };
  const BackwardOperands o{pointer(*dy), pointer(*x), pointer(*h), pointer(*v), pointer(*u), pointer(*dz), pointer(*made_h),
                           pointer(partials), pointer(*dx), pointer(*dv), pointer(*du), pointer(*db), s, needs};
  const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
  check::that(launch_backward(plan, o, dtype, kSmCount, nullptr) == nullptr, "the launch");
  emulator::synchronize(options);
  const auto values = [](auto& buffer) { return wide<T>(Bits(buffer->data(), buffer->data() + buffer->size())); };
  return {values(dx), values(dv), values(du), values(db)};
}

// --- what it has to be ---

// What the gradients have to be, what two plain steps in float make of them, and how far from the truth an element may be:
// its rounding, six times the spread of the middle's, and of the sums; and the smallest number of fp16.
struct Truth {
  Gradients exact, plain, bound;
};

template <class T>
Truth truth_of(const Sizes& s, const Operands& in) {
  const Wide dy = wide<T>(in.dy), x = wide<T>(in.x), v = wide<T>(in.v), u = wide<T>(in.u);
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11, in_float = 6 * 0x1p-24, least = 0x1p-24;
  const Wide dz = backward_middle<double>(s, dy, u), h = forward_middle<double>(s, x, v);
  Truth truth{gradients<double>(s, dy, x, v, dz, h),
              gradients<float>(s, dy, x, v, rounded<T>(backward_middle<float>(s, dy, u)),
                               rounded<T>(forward_middle<float>(s, x, v))),
              {}};
  const Wide size_dy = absolute(dy), size_x = absolute(x), size_v = absolute(v), size_u = absolute(u);
  Gradients size = gradients<double>(s, size_dy, size_x, size_v, backward_middle<double>(s, size_dy, size_u),
                                     forward_middle<double>(s, size_x, size_v));
  Gradients spread = gradients<double>(s, squared(dy), squared(x), squared(v), squared(dz), squared(h));
  const int terms[] = {s.s() + s.r * s.b_out, s.s() + s.m, s.p() + s.m, s.m};
  for (int which = 0; which < 4; ++which) {
    Wide& plain = *truth.plain.all()[which].second;
    plain = rounded<T>(plain);
    const Wide &exact = *truth.exact.all()[which].second, &sizes = *size.all()[which].second;
    for (size_t i = 0; i < exact.size(); ++i) {
      const double of_middle = which == 3 ? 0 : 6 * roundoff * std::sqrt((*spread.all()[which].second)[i]);  // db has none
      truth.bound.all()[which].second->push_back(roundoff * std::fabs(exact[i]) + of_middle +
                                                 in_float * std::sqrt(terms[which]) * sizes[i] + least);
    }
  }
  return truth;
}

struct Known {  // the same for every seed
  Operands in;
  Truth truth;
  Gradients first;  // of the first seed
};

template <class T>
Known& known_of(size_t number, bool is_whole) {
  static std::map<size_t, Known> all;
  Known& known = all[2 * number + is_whole];
  if (known.truth.exact.dx.empty()) {
    known.in = operands<T>(kCases[number], is_whole);
    known.truth = truth_of<T>(sizes_of(kCases[number]), known.in);
  }
  return known;
}

// --- cases ---

template <class T>
void ragged_shapes(uint64_t seed) {
  if (has_run<T>(seed)) return;
  std::map<std::string, Errors> errors;  // of each gradient
  for (size_t i = 0; i < kCases.size(); ++i) {
    Known& known = known_of<T>(i, false);
    Gradients out = run<T>(kCases[i], known.in, kAll, i % 2, {seed});
    if (seed == 1) known.first = out;
    check::that(is_same(out, known.first), "every seed gives the same bits; case", i);
    for (size_t which = 0; which < 4; ++which) {
      const auto [name, values] = out.all()[which];
      const Wide &found = *values, &exact = *known.truth.exact.all()[which].second;
      const Wide &plain = *known.truth.plain.all()[which].second, &bound = *known.truth.bound.all()[which].second;
      const std::string words = emulator::text("%s of case %zu", name, i);
      for (size_t e = 0; e < exact.size(); ++e) {
        if (!(std::fabs(found[e] - exact[e]) <= bound[e])) check::equal(found[e], exact[e], words.c_str(), e);
      }
      errors[name].add(found, plain, exact);
    }
  }
  for (const auto& [name, one] : errors) one.pass(("norm of the error of " + name).c_str());
}

// Every product and sum is exact, so each single term counts. Each case once: the seeds share them.
template <class T>
void whole_numbers(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__  // which has seen every path by then
  return;
#endif
  for (size_t i = seed % 3; i < kCases.size(); i += 3) {
    Known& known = known_of<T>(i, true);
    Gradients exact = known.truth.exact, out = run<T>(kCases[i], known.in, kAll, i % 2 == 0, {seed, seed == 2 ? 2 : 0});
    for (size_t which = 0; which < 4; ++which) {
      const auto [name, found] = out.all()[which];
      const Wide& expected = *exact.all()[which].second;
      check::equal(found->size(), expected.size(), name);
      for (size_t e = 0; e < expected.size(); ++e) {
        check::that(std::fabs(expected[e]) <= 256, "exact in bf16", e);
        check::equal((*found)[e], expected[e], emulator::text("%s of case %zu", name, i).c_str(), e);
      }
    }
  }
}

// Each set of gradients, with and without splits, with h and without: the same bits as all of them, and nothing else read or
// written.
void every_choice(uint64_t seed) {
  for (bool has_h : {false, true}) {
    for (bool is_split : {false, true}) {
      if ((has_h + is_split + seed) % 2) continue;  // every other seed
      const Case c{{65, 64, 48, 8, 4, 2, kBoth, is_split ? 2 : 1}, seed != 2};
      if (!c.interleave && c.shape.n / c.shape.b_out % 8) continue;
      const Operands in = operands<device::Bf16>(c, false);
      Gradients all = run<device::Bf16>(c, in, kAll, has_h, {seed});
      for (int needs = 1; needs < kAll; ++needs) {
        Gradients some = run<device::Bf16>(c, in, needs, has_h, {seed});
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
  const Case c{{65, 72, 136, 9, 2, 8, kInterleaved, 2}, true};
  const Sizes s = sizes_of(c);
  for (int row : {0, 33, 64}) {
    Operands in = operands<device::Bf16>(c, false);
    in.dy[row * s.n + 135] = 0x7fc0;  // of block 1, its last output
    const Gradients out = run<device::Bf16>(c, in, kNeedsDx | kNeedsDu | kNeedsDb, true, {seed});
    for (int i = 0; i < s.m * s.k; ++i) check::that(std::isnan(out.dx[i]) == (i / s.k == row), "dx: only one row", i / s.k);
    const int t = s.b_in * s.r, rows = s.s();
    for (int i = 0; i < s.n * t; ++i) check::that(std::isnan(out.du[i]) == (i / t == 2 * rows - 1), "du: one row", i / t);
    for (int i = 0; i < s.n; ++i) check::that(std::isnan(out.db[i]) == (i == 135), "db: only one element", i);
  }
}

// As a plan for a whole GPU has it: many CTAs, few of them resident.
void as_planned_for_a_gpu(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__
  return;
#endif
  if (seed != 1) return;
  const Case c{{520, 64, 64, 8, 8, 1, kInterleaved, 0}, true};
  const BackwardPlan plan = plan_backward(520, 64, 64, 8, 8, 1, true, kAll, 132, 227 << 10);
  check::that(plan.dz.group == 8 && plan.dz.gathers && plan.dv.group == 4 && plan.dv.splits == 8, "the plan");
  Case split = c;
  split.shape.splits = plan.dv.splits;
  const Operands in = operands<device::Bf16>(c, false);
  const Gradients all = run<device::Bf16>(split, in, kAll, true, {seed});
  check::that(is_same(all, run<device::Bf16>(split, in, kAll, true, {seed, 3})), "the same bits");
}

void an_empty_plan_is_refused(uint64_t) {
  BackwardOperands none{};
  none.sizes = {1, 8, 8, 1, 1, 8, true}, none.needs = kAll;
  const char* error = launch_backward(BackwardPlan(), none, Dtype::bfloat16, 1, nullptr);
  check::that(error && strstr(error, "does not cover"), "an error in words");
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
                     {"as planned for a GPU", as_planned_for_a_gpu},
                     {"an empty plan is refused", an_empty_plan_is_refused}});
}
