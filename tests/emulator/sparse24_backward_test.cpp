// The backward kernels of a sparse factor in the emulator: patterns of groups, and blocks of any pattern; every choice of
// gradients, both dtypes.
//
// Outputs and workspace start as NaN and have exact bounds; each access outside is reported, and so is any of an operand
// that the wanted gradients do not need. All seeds must agree to the bit: threads run in another order with each.
#include "low_rank/backward.cu"
#include "sparse24/backward.cu"

#include <map>
#include <random>

#include "check.h"
#include "gradient_truth.h"

namespace {

using namespace sparse24;
using namespace gradient_truth;

constexpr int kEvery = kNeedsDx | kNeedsDvalues | kNeedsDb;

struct Shape {
  SparseSizes sizes;
  int dx_splits, values_splits;  // 0: as planned
};

// m, n, columns, p, q, stored, kept, group
const Shape kShapes[] = {
    {{1, 8, 8, 1, 1, 4, 2, 4}, 0, 0},            // one of everything
    {{7, 40, 24, 1, 1, 12, 2, 4}, 2, 0},         // a last word of 24 bits; the second split has nothing to do
    {{64, 72, 200, 1, 1, 50, 1, 4}, 0, 0},       // runs of 16 values that begin anywhere in 16 bytes
    {{65, 200, 72, 1, 1, 36, 4, 8}, 2, 2},       // one row more: the second split of m has one
    {{70, 136, 40, 1, 1, 24, 3, 5}, 2, 0},       // groups that tiles cut: runs are counted
    {{130, 72, 264, 1, 1, 132, 2, 4}, 3, 3},     // the large tile; every third step
    {{257, 136, 136, 1, 1, 34, 1, 4}, 2, 5},     // each step of m its own split, the last of one row
    {{65, 72, 264, 1, 1, 165, 5, 8}, 0, 0},
    {{66, 72, 80, 1, 1, 80, 4, 4}, 0, 2},        // all of them kept
    {{130, 72, 280, 1, 1, 56, 1, 5}, 0, 0},      // counted, three tiles
    {{33, 40, 40, 1, 1, 7, 0, 0}, 0, 2},         // any pattern, in one block
    {{65, 144, 24, 2, 3, 5, 0, 0}, 2, 2},        // in six
    {{20, 136, 16, 9, 2, 3, 0, 0}, 0, 0},        // the last rows of blocks are missing
    {{70, 64, 8, 9, 1, 8, 0, 0}, 2, 0},          // and a whole block of them
    {{130, 272, 136, 2, 2, 60, 0, 0}, 2, 2},     // the large tile
    {{9, 24, 2120, 1, 1, 530, 0, 0}, 0, 0},      // more words than lanes
};
constexpr size_t kShapeCount = sizeof kShapes / sizeof *kShapes;

struct Operands {
  Bits dy, x, values;
  std::vector<uint32_t> mask;
  std::vector<int> places;  // of each value: its column of the block
};

// Which columns of a row's block are kept. The first quarter of any pattern is kept by many rows, as atoms that are dense.
std::vector<int> pattern(const SparseSizes& s, std::mt19937_64& random) {
  const auto some = [&](int first, int count, int kept) {
    std::vector<int> all(count);
    for (int i = 0; i < count; ++i) all[i] = first + i;
    std::shuffle(all.begin(), all.end(), random);
    all.resize(kept);
    std::sort(all.begin(), all.end());
    return all;
  };
  if (s.group == 0) {
    const int dense = random() % 2 ? smaller(s.stored, s.columns) / 4 : 0;
    std::vector<int> kept = some(dense, s.columns - dense, s.stored - dense);
    for (int i = dense; i-- > 0;) kept.insert(kept.begin(), i);
    return kept;
  }
  std::vector<int> kept;
  for (int first = 0; first < s.columns; first += s.group) {
    for (int one : some(first, s.group, s.kept)) kept.push_back(one);
  }
  return kept;
}

size_t in_values(const SparseSizes& s, int row, int block, int i) { return (size_t(row) * s.q + block) * s.stored + i; }
size_t in_x(const SparseSizes& s, int row, int token, int block, int column) {  // of the block of rows that has this row
  return ((size_t(row / s.rows()) * s.m + token) * s.q + block) * s.columns + column;
}

// Normal values; the rows of dy are of different sizes, so that no row can pass for another. Or whole numbers, so few that
// every result is exact.
template <class T>
Operands operands(const SparseSizes& s, bool is_whole) {
  std::mt19937_64 random(s.m * 1000003 + s.columns * 1009 + s.stored * 31 + s.n);
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
  Operands in{narrowed<T>(dy), narrowed<T>(make(s.outputs())), narrowed<T>(make(s.values())), {}, {}};
  in.mask.resize(size_t(s.n) * s.q * s.words());
  for (size_t block = 0; block < size_t(s.n) * s.q; ++block) {
    const std::vector<int> kept = pattern(s, random);
    check::equal(kept.size(), s.stored, "values of a row's block");
    for (int column : kept) {
      in.mask[block * s.words() + column / kWordBits] |= 1u << column % kWordBits;
      in.places.push_back(column);
    }
  }
  return in;
}

BackwardPlan plan_of(const Shape& shape, int needs) {
  const SparseSizes& s = shape.sizes;
  BackwardPlan plan = plan_backward(s.m, s.n, s.columns, s.p, s.q, s.stored, s.kept, s.group, needs, 4);
  check::that(plan.tile > 0, "the shape is covered");
  if (shape.dx_splits > 0) plan.dx_splits = shape.dx_splits;
  if (shape.values_splits > 0) plan.values_splits = shape.values_splits;
  plan.partials = partials_of(plan, s, needs);
  return plan;
}

// dv: of the values.
template <class T>
Gradients run(const Shape& shape, const Operands& in, int needs, emulator::Options options) {
  const SparseSizes& s = shape.sizes;
  const BackwardPlan plan = plan_of(shape, needs);
  const bool has_mask = needs & (kNeedsDx | kNeedsDvalues);
  const auto input = [](const char* name, const auto& values, bool is_needed) {
    using Values = std::decay_t<decltype(values)>;
    return std::make_unique<emulator::Buffer<typename Values::value_type>>(name, is_needed ? values : Values());
  };
  const auto dy = input("dy", in.dy, true), x = input("x", in.x, needs & kNeedsDvalues),
             values = input("values", in.values, needs & kNeedsDx);
  const auto mask = input("mask", in.mask, has_mask);
  emulator::Buffer<int32_t> starts("starts", has_mask ? plan.starts : 0);
  emulator::Buffer<float> partials("partials", plan.partials);
  const auto output = [](const char* name, size_t count, bool is_needed) {
    return std::make_unique<emulator::Buffer<uint16_t>>(name, is_needed ? count : 0);
  };
  const auto dx = output("dx", s.outputs(), needs & kNeedsDx), db = output("db", s.n, needs & kNeedsDb),
             dvalues = output("dvalues", s.values(), needs & kNeedsDvalues);
  const auto pointer = [](auto& buffer) { return buffer.size() ? buffer.data() : nullptr; };
  const BackwardOperands o{pointer(*dy),  pointer(*x),       pointer(*values),  pointer(*mask), pointer(starts),
                           pointer(partials), pointer(*dx), pointer(*dvalues), pointer(*db), s, needs};
  const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
  check::that(launch_backward(plan, o, dtype, 4, nullptr) == nullptr, "the launch");
  emulator::synchronize(options);
  const auto found = [](auto& buffer) { return wide<T>(Bits(buffer->data(), buffer->data() + buffer->size())); };
  return {found(dx), found(dvalues), {}, found(db)};
}

// --- what it has to be ---

template <class Sum>
Gradients gradients(const SparseSizes& s, const Operands& in, const Wide& dy, const Wide& x, const Wide& values) {
  std::vector<Sum> dx(s.outputs()), dvalues(values.size()), db(s.n);
  for (int token = 0; token < s.m; ++token) {
    for (int row = 0; row < s.n; ++row) {
      const Sum of_row = dy[size_t(token) * s.n + row];
      db[row] += of_row;
      for (int block = 0; block < s.q; ++block) {
        for (int i = 0; i < s.stored; ++i) {
          const size_t value = in_values(s, row, block, i), place = in_x(s, row, token, block, in.places[value]);
          dx[place] += of_row * static_cast<Sum>(values[value]);
          dvalues[value] += of_row * static_cast<Sum>(x[place]);
        }
      }
    }
  }
  return {{dx.begin(), dx.end()}, {dvalues.begin(), dvalues.end()}, {}, {db.begin(), db.end()}};
}

// What the gradients have to be, what a plain sum in float makes of them, and how far from the truth an element may be: its
// rounding, six times the spread of the sum's; and the smallest number of fp16.
struct Truth {
  Gradients exact, plain, bound;
};

template <class T>
Truth truth_of(const SparseSizes& s, const Operands& in) {
  const Wide dy = wide<T>(in.dy), x = wide<T>(in.x), values = wide<T>(in.values);
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11, in_float = 6 * 0x1p-24, least = 0x1p-24;
  Truth truth{gradients<double>(s, in, dy, x, values), gradients<float>(s, in, dy, x, values), {}};
  Gradients size = gradients<double>(s, in, absolute(dy), absolute(x), absolute(values));
  const int terms[] = {s.rows(), s.m, 0, s.m};
  for (int which : {0, 1, 3}) {
    Wide& plain = *truth.plain.all()[which].second;
    plain = rounded<T>(plain);
    const Wide& exact = *truth.exact.all()[which].second;
    for (size_t i = 0; i < exact.size(); ++i) {
      truth.bound.all()[which].second->push_back(roundoff * std::fabs(exact[i]) + least +
                                                 in_float * std::sqrt(terms[which]) * (*size.all()[which].second)[i]);
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
Known& known_of(size_t shape, bool is_whole) {
  static std::map<size_t, Known> all;
  Known& known = all[2 * shape + is_whole];
  if (known.truth.exact.dx.empty()) {
    known.in = operands<T>(kShapes[shape].sizes, is_whole);
    known.truth = truth_of<T>(kShapes[shape].sizes, known.in);
  }
  return known;
}

// --- cases ---

template <class T>
void ragged_shapes(uint64_t seed) {
  if (has_run<T>(seed)) return;
  std::map<std::string, Errors> errors;  // of each gradient
  for (size_t i = 0; i < kShapeCount; ++i) {
    Known& known = known_of<T>(i, false);
    Gradients out = run<T>(kShapes[i], known.in, kEvery, {seed});
    if (seed == 1) known.first = out;
    check::that(is_same(out, known.first), "every seed gives the same bits; shape", i);
    for (size_t which : {0, 1, 3}) {
      const auto [name, values] = out.all()[which];
      const Wide &found = *values, &exact = *known.truth.exact.all()[which].second;
      const Wide &plain = *known.truth.plain.all()[which].second, &bound = *known.truth.bound.all()[which].second;
      const std::string words = emulator::text("%s of shape %zu", name, i);
      check::equal(found.size(), exact.size(), words.c_str());
      for (size_t e = 0; e < exact.size(); ++e) {
        if (!(std::fabs(found[e] - exact[e]) <= bound[e])) check::equal(found[e], exact[e], words.c_str(), e);
      }
      if (known.truth.exact.all()[which].second->size() > 64) errors[name].add(found, plain, exact);
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
  for (size_t i = seed % 3; i < kShapeCount; i += 3) {
    Known& known = known_of<T>(i, true);
    Gradients exact = known.truth.exact, out = run<T>(kShapes[i], known.in, kEvery, {seed, seed == 2 ? 2 : 0});
    for (size_t which : {0, 1, 3}) {
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

// Each set of gradients, with and without splits, groups and blocks: the same bits as all of them, and nothing else read or
// written.
void every_choice(uint64_t seed) {
  if (has_run<device::Bf16>(seed)) return;
  for (bool has_groups : {false, true}) {
    for (int splits : {1, 2}) {
      if ((has_groups + splits + seed) % 2) continue;  // every other seed
      const SparseSizes s = has_groups ? SparseSizes{65, 72, 40, 1, 1, 20, 2, 4} : SparseSizes{65, 144, 24, 2, 3, 5, 0, 0};
      const Shape shape{s, splits, splits};
      const Operands in = operands<device::Bf16>(s, false);
      Gradients all = run<device::Bf16>(shape, in, kEvery, {seed});
      for (int needs = 1; needs < kEvery; ++needs) {
        if (needs & ~kEvery) continue;
        Gradients some = run<device::Bf16>(shape, in, needs, {seed});
        for (int which : {0, 1, 3}) {
          const bool is_wanted = needs >> which & 1;
          const auto [name, found] = some.all()[which];
          check::that(*found == (is_wanted ? *all.all()[which].second : Wide()), name, needs);
        }
      }
    }
  }
}

void not_a_number_stays_where_it_belongs(uint64_t seed) {
  const SparseSizes s{65, 136, 72, 1, 1, 36, 2, 4};
  for (int row : {0, 33, 64}) {
    Operands in = operands<device::Bf16>(s, false);
    in.dy[row * s.n + 135] = 0x7fc0;
    const Gradients out = run<device::Bf16>({s, 2, 2}, in, kEvery, {seed});
    for (int i = 0; i < s.m * s.columns; ++i) {
      check::that(std::isnan(out.dx[i]) == (i / s.columns == row), "dx: only one row", i / s.columns);
    }
    for (int i = 0; i < s.n * s.stored; ++i) {
      check::that(std::isnan(out.dv[i]) == (i / s.stored == 135), "dvalues: only one row", i / s.stored);
    }
    for (int i = 0; i < s.n; ++i) check::that(std::isnan(out.db[i]) == (i == 135), "db: only one element", i);
  }
}

// Zeros in kept places, and -0, are values as any other: the mask alone says what is kept.
void zeros_that_are_kept(uint64_t seed) {
  if (seed != 1) return;
  const SparseSizes s{65, 72, 72, 1, 1, 36, 2, 4};
  Operands in = operands<device::Bf16>(s, false);
  for (size_t i = 0; i < in.values.size(); i += 3) in.values[i] = i % 2 ? 0x8000 : 0;
  const Gradients out = run<device::Bf16>({s, 0, 0}, in, kEvery, {seed});
  const Truth truth = truth_of<device::Bf16>(s, in);
  for (size_t i = 0; i < out.dv.size(); ++i) {
    check::that(std::fabs(out.dv[i] - truth.exact.dv[i]) <= truth.bound.dv[i], "dvalues", i);
  }
  for (size_t i = 0; i < out.dx.size(); ++i) {
    check::that(std::fabs(out.dx[i] - truth.exact.dx[i]) <= truth.bound.dx[i], "dx", i);
  }
}

// Wrong masks: no access outside, all gradients written, the same ones each time; gradient 0 where no bit names a value.
void wrong_masks(uint64_t seed) {
  if (has_run<device::Bf16>(seed)) return;
  static std::map<int, Gradients> first;
  const SparseSizes sizes[] = {{65, 72, 40, 1, 1, 20, 2, 4}, {65, 72, 200, 1, 1, 50, 0, 0}, {65, 144, 24, 2, 3, 5, 0, 0},
                               {65, 72, 264, 1, 1, 132, 2, 4}};
  int number = 0;
  for (const SparseSizes& s : sizes) {
    for (const uint32_t bits : {0u, ~0u, 0x80000001u, 0x12345678u}) {
      Operands in = operands<device::Bf16>(s, false);
      for (uint32_t& word : in.mask) word = bits;
      const Gradients out = run<device::Bf16>({s, 2, 1}, in, kEvery, {seed});
      for (double one : out.dx) check::that(std::isfinite(one) && (bits != 0 || one == 0), "dx", number);
      for (double one : out.dv) check::that(std::isfinite(one) && (bits != 0 || one == 0), "dvalues", number);
      if (seed == 1) first[number] = out;
      check::that(is_same(out, first[number]), "every seed gives the same bits", number);
      ++number;
    }
  }
}

// As a plan for a whole GPU has it: many blocks, few of them resident.
void as_planned_for_a_gpu(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__
  return;
#endif
  if (seed != 1) return;
  const SparseSizes s{520, 264, 136, 1, 1, 68, 2, 4};
  const BackwardPlan plan = plan_backward(520, 264, 136, 1, 1, 68, 2, 4, kEvery, 132);
  check::that(plan.tile == kLargeTile && plan.dx_splits == 2 && plan.values_splits == 4, "the plan");
  const Shape split{s, plan.dx_splits, plan.values_splits};
  const Operands in = operands<device::Bf16>(s, false);
  const Gradients all = run<device::Bf16>(split, in, kEvery, {seed}), few = run<device::Bf16>(split, in, kEvery, {seed, 3});
  check::that(is_same(all, few), "the same bits");
}

void an_empty_plan_is_refused(uint64_t) {
  BackwardOperands none{};
  none.sizes = {1, 8, 8, 1, 1, 4, 2, 4}, none.needs = kEvery;
  const char* error = launch_backward(BackwardPlan(), none, Dtype::bfloat16, 1, nullptr);
  check::that(error && strstr(error, "does not cover"), "an error in words");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"wrong masks", wrong_masks},
                     {"whole numbers, bf16", whole_numbers<device::Bf16>},
                     {"whole numbers, fp16", whole_numbers<device::Fp16>},
                     {"every choice of gradients", every_choice},
                     {"NaN stays where it belongs", not_a_number_stays_where_it_belongs},
                     {"zeros that are kept", zeros_that_are_kept},
                     {"ragged shapes, bf16", ragged_shapes<device::Bf16>},
                     {"ragged shapes, fp16", ragged_shapes<device::Fp16>},
                     {"as planned for a GPU", as_planned_for_a_gpu},
                     {"an empty plan is refused", an_empty_plan_is_refused}});
}
