// The kernels of wavelet in the emulator, forward and backward: every kind of pairs, every choice of gradients, both dtypes.
//
// Outputs and workspace start as NaN and have exact bounds; each access outside is reported, and so is any of an operand
// that the wanted gradients do not need. All seeds must agree to the bit: threads run in another order with each.
#include "low_rank/backward.cu"
#include "wavelet/backward.cu"
#include "wavelet/forward.cu"

#include <map>
#include <memory>
#include <random>

#include "check.h"
#include "gradient_truth.h"

namespace {

using namespace wavelet;
using gradient_truth::Bits, gradient_truth::Wide, gradient_truth::wide, gradient_truth::narrowed, gradient_truth::has_run;

constexpr int kEvery = kNeedsDx | kNeedsDv | kNeedsDu;

struct Shape {
  int m, n, k, r, pairs;
  int splits, parts, dy_splits, weight_splits;  // of k, of the outputs, of n, of m; 0: as planned
};

const Shape kShapes[] = {
    {1, 16, 16, 8, 1, 0, 0, 0, 0},         // one of everything
    {7, 48, 80, 8, 2, 2, 0, 2, 0},         // half a step of the tensor core; splits of one stage
    {64, 144, 208, 24, 2, 0, 2, 0, 0},     // ranks and features that end inside of a tile
    {65, 272, 336, 16, 4, 2, 2, 3, 2},     // one row more; each half has two pairs
    {70, 528, 144, 40, 4, 3, 3, 2, 2},     // the middle has three tiles, and a pair crosses from one to the next
    {130, 160, 176, 72, 1, 0, 0, 2, 3},    // one half is never there
    {33, 304, 656, 128, 2, 5, 0, 0, 0},    // the largest middle
    {20, 160, 48, 256, 1, 2, 0, 0, 0},     // the second split has nothing to do
    {9, 32, 1040, 64, 4, 0, 0, 0, 0},
};
constexpr size_t kShapeCount = sizeof kShapes / sizeof *kShapes;
constexpr float kScales[] = {2.0f, 0.375f, 1.0f};

struct Operands {
  Bits x, v, u, dy, h;
  float scale;
};

struct Results {  // in double: what the kernels wrote, or ought to have written; empty where not wanted
  Wide h, y, dh, dx, dv, du;
  std::vector<std::pair<const char*, Wide*>> all() {
    return {{"h", &h}, {"y", &y}, {"dh", &dh}, {"dx", &dx}, {"dv", &dv}, {"du", &du}};
  }
};

size_t middle_of(const Shape& s) { return size_t(s.pairs) * s.m * s.r; }

// Normal values, the rows of x and dy of different sizes, so that no row can pass for another. Or whole numbers, factors so
// few that no sum is rounded.
template <class T>
Operands operands(const Shape& s, bool is_whole) {
  std::mt19937_64 random(s.m * 1000003 + s.k * 1009 + s.r * 31 + s.n);
  std::normal_distribution<double> normal(0, 1);
  const auto make = [&](size_t count, size_t row, double density) {
    Wide values(count);
    for (size_t i = 0; i < count; ++i) {
      const double value = normal(random);
      values[i] = is_whole ? (random() % 1000 < density * 1000 ? (value > 0 ? 1 : -1) : 0)
                           : value * (row ? std::ldexp(1, static_cast<int>(i / row % 5) - 2) : 1);
    }
    return narrowed<T>(values);
  };
  const double few = 2.0 / s.r;  // of each output: terms
  return {make(size_t(s.m) * s.k, s.k, 1), make(size_t(s.r) * s.pairs * (s.k / 2), 0, few),
          make(size_t(s.pairs) * (s.n / 2) * s.r, 0, few), make(size_t(s.m) * s.n, s.n, 1), make(middle_of(s), 0, 1),
          kScales[s.m % 3]};
}

ForwardPlan plan_of(const Shape& s) {
  ForwardPlan plan = plan_forward(s.m, s.n, s.k, s.r, s.pairs, 4);
  check::that(plan.splits > 0, "the shape is covered");
  if (s.splits > 0) plan.splits = s.splits;
  if (s.parts > 0) plan.parts = s.parts;
  plan.partials = int64_t{plan.splits} * s.pairs * s.m * s.r;
  return plan;
}

BackwardPlan backward_plan_of(const Shape& s, int needs) {
  BackwardPlan plan = plan_backward(s.m, s.n, s.k, s.r, s.pairs, needs, 4);
  check::that(plan.weight_splits > 0, "the shape is covered");
  plan.h = ForwardPlan();
  if (s.dy_splits > 0) plan.dx.splits = s.dy_splits;
  if (s.weight_splits > 0) plan.weight_splits = s.weight_splits;
  plan.partials = partials_of(plan, s.m, s.n, s.k, s.pairs * s.r, needs);
  return plan;
}

template <class T>
constexpr Dtype dtype_of() {
  return std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
}

template <class Buffer>
auto pointer(Buffer& buffer) {
  return buffer.size() ? buffer.data() : nullptr;
}

template <class T>
Wide found(const emulator::Buffer<uint16_t>& buffer) {
  return wide<T>(Bits(buffer.data(), buffer.data() + buffer.size()));
}

// keeps: bit 0 is y, bit 1 is h.
template <class T>
void run_forward(const Shape& s, const Operands& in, int keeps, emulator::Options options, Results& out) {
  const ForwardPlan plan = plan_of(s);
  emulator::Buffer<uint16_t> x("x", in.x), v("v", in.v), u("u", keeps & 1 ? in.u : Bits());
  emulator::Buffer<uint16_t> y("y", keeps & 1 ? size_t(s.m) * s.n : 0), h("h", keeps & 2 ? middle_of(s) : 0);
  emulator::Buffer<float> partials("partials", plan.partials);
  const ForwardOperands o{x.data(), v.data(), pointer(u), pointer(h), pointer(y), partials.data(), s.m, s.n, s.k, s.r,
                          s.pairs, in.scale};
  check::that(launch_forward(plan, o, dtype_of<T>(), nullptr) == nullptr, "the launch");
  emulator::synchronize(options);
  out.y = found<T>(y), out.h = found<T>(h);
}

template <class T>
void run_backward(const Shape& s, const Operands& in, int needs, emulator::Options options, Results& out) {
  const BackwardPlan plan = backward_plan_of(s, needs);
  const bool has_dh = needs & (kNeedsDx | kNeedsDv);
  const auto input = [](const char* name, const Bits& bits, bool is_needed) {
    return std::make_unique<emulator::Buffer<uint16_t>>(name, is_needed ? bits : Bits());
  };
  const auto output = [](const char* name, size_t count, bool is_needed) {
    return std::make_unique<emulator::Buffer<uint16_t>>(name, is_needed ? count : 0);
  };
  const auto dy = input("dy", in.dy, true), x = input("x", in.x, needs & kNeedsDv), h = input("h", in.h, needs & kNeedsDu),
             v = input("v", in.v, needs & kNeedsDx), u = input("u", in.u, has_dh);
  const auto dh = output("dh", middle_of(s), needs & kNeedsDv), dx = output("dx", in.x.size(), needs & kNeedsDx),
             dv = output("dv", in.v.size(), needs & kNeedsDv), du = output("du", in.u.size(), needs & kNeedsDu);
  emulator::Buffer<float> partials("partials", plan.partials);
  const BackwardOperands o{pointer(*dy), pointer(*x), pointer(*h), pointer(*v), pointer(*u), pointer(*dh), pointer(partials),
                           pointer(*dx), pointer(*dv), pointer(*du), s.m, s.n, s.k, s.r, s.pairs, in.scale, needs};
  check::that(launch_backward(plan, o, dtype_of<T>(), 4, nullptr) == nullptr, "the launch");
  emulator::synchronize(options);
  out.dh = found<T>(*dh), out.dx = found<T>(*dx), out.dv = found<T>(*dv), out.du = found<T>(*du);
}

template <class T>
Results run(const Shape& s, const Operands& in, emulator::Options options) {
  Results out;
  run_forward<T>(s, in, 3, options, out);
  run_backward<T>(s, in, kEvery, options, out);
  return out;
}

// --- what it has to be: plain loops over pairs ---

// A half's number of a row: its neighbours' sum or difference.
double half_of(const Wide& x, int size, int row, int half, int i) {
  const double even = x[size_t(row) * size + 2 * i], odd = x[size_t(row) * size + 2 * i + 1];
  return half == 0 ? even + odd : even - odd;
}

// The sums that the kernels round, without their factors of scale and the roots; `absolute` of sizes instead.
struct Sums {
  const Shape& s;
  bool is_absolute;

  double sign(double value) const { return is_absolute ? std::fabs(value) : value; }
  double of_half(const Wide& x, int size, int row, int half, int i) const {
    return is_absolute ? std::fabs(x[size_t(row) * size + 2 * i]) + std::fabs(x[size_t(row) * size + 2 * i + 1])
                       : half_of(x, size, row, half, i);
  }

  // h of x by v, or dh of dy by u.
  Wide middle(const Wide& x, const Wide& factor, bool is_backward) const {
    const int size = is_backward ? s.n : s.k;
    Wide sums(middle_of(s));
    for (int p = 0; p < s.pairs; ++p) {
      const int half = is_backward ? target_of(s.pairs, p) : source_of(s.pairs, p);
      for (int row = 0; row < s.m; ++row) {
        for (int i = 0; i < size / 2; ++i) {
          const double number = of_half(x, size, row, half, i);
          for (int j = 0; j < s.r; ++j) {
            const size_t at = is_backward ? place_in_u(s.r, size / 2, p, j, i) : place_in_v(s.pairs, size / 2, p, j, i);
            sums[(size_t(p) * s.m + row) * s.r + j] += number * sign(factor[at]);
          }
        }
      }
    }
    return sums;
  }

  // y of h by u, or dx of dh by v.
  Wide outputs(const Wide& h, const Wide& factor, bool is_backward) const {
    const int size = is_backward ? s.k : s.n;
    Wide sums(size_t(s.m) * size);
    for (int p = 0; p < s.pairs; ++p) {
      const int half = is_backward ? source_of(s.pairs, p) : target_of(s.pairs, p);
      for (int row = 0; row < s.m; ++row) {
        for (int i = 0; i < size / 2; ++i) {
          double sum = 0;
          for (int j = 0; j < s.r; ++j) {
            const size_t at = is_backward ? place_in_v(s.pairs, size / 2, p, j, i) : place_in_u(s.r, size / 2, p, j, i);
            sum += sign(h[(size_t(p) * s.m + row) * s.r + j]) * sign(factor[at]);
          }
          sums[size_t(row) * size + 2 * i] += sum;
          sums[size_t(row) * size + 2 * i + 1] += half == 0 || is_absolute ? sum : -sum;
        }
      }
    }
    return sums;
  }

  // dv of dh and x, or du of h and dy; of some rows.
  Wide weights(const Wide& h, const Wide& x, bool is_du, int first, int last) const {
    const int size = is_du ? s.n : s.k;
    Wide sums(size_t(s.pairs) * s.r * (size / 2));
    for (int p = 0; p < s.pairs; ++p) {
      const int half = is_du ? target_of(s.pairs, p) : source_of(s.pairs, p);
      for (int row = first; row < last; ++row) {
        for (int i = 0; i < size / 2; ++i) {
          const double number = of_half(x, size, row, half, i);
          for (int j = 0; j < s.r; ++j) {
            const size_t at = is_du ? place_in_u(s.r, size / 2, p, j, i) : place_in_v(s.pairs, size / 2, p, j, i);
            sums[at] += sign(h[(size_t(p) * s.m + row) * s.r + j]) * number;
          }
        }
      }
    }
    return sums;
  }

  // Each from what is rounded before it as it was found.
  Results all(const Operands& in, const Results& known, Wide (*widened)(const Bits&)) const {
    const Wide x = widened(in.x), v = widened(in.v), u = widened(in.u), dy = widened(in.dy), h = widened(in.h);
    return {middle(x, v, false), outputs(known.h, u, false), middle(dy, u, true), outputs(known.dh, v, true),
            weights(known.dh, x, false, 0, s.m), weights(h, dy, true, 0, s.m)};
  }
};

constexpr float kRoot = kRootHalf;
std::vector<float> factors_of(float scale) { return {kRoot, scale * kRoot, scale * kRoot, kRoot, kRoot, scale * kRoot}; }

// Every element within its own rounding and six times the spread of a sum in float; and the smallest number of fp16.
template <class T>
void check_near(const Shape& s, const Operands& in, Results& found, size_t shape) {
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11, in_float = 6 * 0x1p-24, least = 0x1p-24;
  Results exact = Sums{s, false}.all(in, found, wide<T>), size = Sums{s, true}.all(in, found, wide<T>);
  const int terms[] = {s.k, s.pairs * s.r, s.n, s.pairs * s.r, s.m, s.m};
  const std::vector<float> factors = factors_of(in.scale);
  for (size_t which = 0; which < factors.size(); ++which) {
    const auto [name, values] = found.all()[which];
    const Wide &sums = *exact.all()[which].second, &sizes = *size.all()[which].second;
    const std::string words = emulator::text("%s of shape %zu", name, shape);
    check::equal(values->size(), sums.size(), words.c_str());
    for (size_t i = 0; i < sums.size(); ++i) {
      const double due = factors[which] * sums[i];
      const double of_sum = factors[which] * in_float * std::sqrt(2 * terms[which]) * sizes[i];
      const double bound = roundoff * std::fabs(due) + least + of_sum;
      if (!(std::fabs((*values)[i] - due) <= bound)) check::equal((*values)[i], due, words.c_str(), i);
    }
  }
}

// --- cases ---

template <class T>
void ragged_shapes(uint64_t seed) {
  if (has_run<T>(seed)) return;
  static std::map<size_t, Results> first;
  for (size_t i = 0; i < kShapeCount; ++i) {
    const Shape& s = kShapes[i];
    const Operands in = operands<T>(s, false);
    Results out = run<T>(s, in, {seed});
    if (seed > 1) {
      for (size_t which = 0; which < 6; ++which) {
        check::that(*out.all()[which].second == *first[i].all()[which].second, "every seed gives the same bits; shape", i);
      }
      continue;
    }
    check_near<T>(s, in, out, i);
    first[i] = std::move(out);
  }
}

// What splits of the rows leave, each times its factor, added up in float.
template <class T>
Wide added_up(const Shape& s, const Wide& h, const Wide& x, bool is_du, float factor) {
  const int splits = backward_plan_of(s, kEvery).weight_splits;
  std::vector<float> sums(size_t(s.pairs) * s.r * (is_du ? s.n : s.k) / 2);
  for (int split = 0; split < splits; ++split) {
    const low_rank::Range steps = low_rank::steps_of_split(kTile, s.m, splits, split);
    const Wide part = Sums{s, false}.weights(h, x, is_du, steps.first * kDepth, smaller(s.m, steps.last * kDepth));
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += factor * static_cast<float>(part[i]);
  }
  return gradient_truth::rounded<T>(Wide(sums.begin(), sums.end()));
}

// No sum is rounded, so each result is that sum, times its factor in float, rounded once. Each shape once: seeds share them.
template <class T>
void whole_numbers(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__  // which has seen every path by then
  return;
#endif
  for (size_t i = seed % 3; i < kShapeCount; i += 3) {
    const Shape& s = kShapes[i];
    const Operands in = operands<T>(s, true);
    Results out = run<T>(s, in, {seed, seed == 2 ? 2 : 0});
    Results exact = Sums{s, false}.all(in, out, wide<T>);
    const std::vector<float> factors = factors_of(in.scale);
    for (size_t which = 0; which < factors.size(); ++which) {
      const auto [name, values] = out.all()[which];
      Wide& due = *exact.all()[which].second;
      for (size_t e = 0; e < due.size(); ++e) {
        const float sum = static_cast<float>(due[e]);
        check::that(sum == due[e], "exact in float", e);
        due[e] = device::widen<T>(device::narrow<T>(factors[which] * sum));
      }
      if (name[0] == 'd' && name[1] == 'v') due = added_up<T>(s, out.dh, wide<T>(in.x), false, factors[which]);
      if (name[0] == 'd' && name[1] == 'u') due = added_up<T>(s, wide<T>(in.h), wide<T>(in.dy), true, factors[which]);
      for (size_t e = 0; e < due.size(); ++e) {
        check::equal((*values)[e], due[e], emulator::text("%s of shape %zu", name, i).c_str(), e);
      }
    }
  }
}

// Each set of results: the same bits as all of them, and nothing else read or written.
void every_choice(uint64_t seed) {
  if (has_run<device::Bf16>(seed)) return;
  for (int splits : {1, 2}) {
    if ((splits + seed) % 2) continue;  // every other seed
    const Shape s{65, 144, 208, 16, 4, splits, 2, splits, splits};
    const Operands in = operands<device::Bf16>(s, false);
    Results all = run<device::Bf16>(s, in, {seed});
    for (int keeps = 1; keeps < 3; ++keeps) {
      Results some;
      run_forward<device::Bf16>(s, in, keeps, {seed}, some);
      check::that(some.y == (keeps & 1 ? all.y : Wide()) && some.h == (keeps & 2 ? all.h : Wide()), "y, h", keeps);
    }
    for (int needs = 1; needs < kEvery; ++needs) {
      if (needs & ~kEvery) continue;
      Results some;
      run_backward<device::Bf16>(s, in, needs, {seed}, some);
      check::that(some.dx == (needs & kNeedsDx ? all.dx : Wide()), "dx", needs);
      check::that(some.dv == (needs & kNeedsDv ? all.dv : Wide()), "dv", needs);
      check::that(some.du == (needs & kNeedsDu ? all.du : Wide()), "du", needs);
    }
  }
}

void not_a_number_stays_where_it_belongs(uint64_t seed) {
  if (has_run<device::Bf16>(seed)) return;
  const Shape s{65, 144, 208, 8, 2, 2, 0, 2, 2};
  for (int row : {0, 33, 64}) {
    Operands in = operands<device::Bf16>(s, false);
    in.x[row * s.k + 7] = in.dy[row * s.n + 143] = 0x7fc0;
    const Results out = run<device::Bf16>(s, in, {seed});
    for (size_t i = 0; i < out.y.size(); ++i) check::that(std::isnan(out.y[i]) == (int(i) / s.n == row), "y: one row", i);
    for (size_t i = 0; i < out.dx.size(); ++i) check::that(std::isnan(out.dx[i]) == (int(i) / s.k == row), "dx: one row", i);
    for (size_t i = 0; i < out.du.size(); ++i) {
      check::that(std::isnan(out.du[i]) == (int(i) / s.r % (s.n / 2) == 71), "du: one coefficient of each half", i);
    }
  }
}

// As a plan for a whole GPU has it: many blocks, few of them resident.
void as_planned_for_a_gpu(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__
  return;
#endif
  if (seed != 1) return;
  const ForwardPlan plan = plan_forward(520, 528, 1040, 16, 2, 132);
  check::that(plan.splits == 4 && plan.parts == 5, "the plan");
  const BackwardPlan back = plan_backward(520, 528, 1040, 16, 2, kEvery, 132);
  check::that(back.dx.splits == 2 && back.weight_splits == 2, "the backward's");
  const Shape s{520, 528, 1040, 16, 2, plan.splits, plan.parts, back.dx.splits, back.weight_splits};
  const Operands in = operands<device::Bf16>(s, false);
  Results all = run<device::Bf16>(s, in, {seed}), few = run<device::Bf16>(s, in, {seed, 3});
  for (size_t which = 0; which < 6; ++which) {
    check::that(*all.all()[which].second == *few.all()[which].second, "the same bits");
  }
}

void an_empty_plan_is_refused(uint64_t) {
  const char* error = launch_forward(ForwardPlan(), ForwardOperands{}, Dtype::bfloat16, nullptr);
  check::that(error && strstr(error, "does not cover"), "an error in words");
  error = launch_backward(BackwardPlan(), BackwardOperands{}, Dtype::bfloat16, 1, nullptr);
  check::that(error && strstr(error, "does not cover"), "an error in words");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"whole numbers, bf16", whole_numbers<device::Bf16>},
                     {"whole numbers, fp16", whole_numbers<device::Fp16>},
                     {"every choice of results", every_choice},
                     {"NaN stays where it belongs", not_a_number_stays_where_it_belongs},
                     {"ragged shapes, bf16", ragged_shapes<device::Bf16>},
                     {"ragged shapes, fp16", ragged_shapes<device::Fp16>},
                     {"as planned for a GPU", as_planned_for_a_gpu},
                     {"an empty plan is refused", an_empty_plan_is_refused}});
}
