// The chained kernel of low_rank in the emulator: both dtypes, ragged sizes, splits, every activation, with few blocks
// resident; every seed must give the same bits.
//
// Outputs start as NaN and have exact bounds; each access outside is reported. Counters must be zero after every launch.
#include "low_rank/chain.cu"

#include "check.h"
#include "low_rank_truth.h"

namespace {

using namespace low_rank;
using namespace low_rank_truth;

struct Shape : Sizes {
  int sm_count;
  int splits = 1;
  bool has_residual = false;
  Activation activation = Activation::none;
  bool is_bias_odd = false;  // off its alignment by an element
};

constexpr int kH200 = 232448;  // bytes of shared memory in a block
const Shape kRagged[] = {
    {{257, 8, 8, 8, true}, 132},                                 // one of everything, three row blocks
    {{130, 200, 136, 264, false}, 3, 1, true},                   // tails of all tiles; fewer blocks than tiles
    {{140, 72, 264, 136, true}, 2, 1, false, Activation::none, true},
    {{129, 456, 200, 72, true}, 5, 3, true},                     // 8 slabs in three splits
    {{5, 1032, 24, 392, true}, 132, 8, true},                    // one row block, 17 slabs
    {{128, 64, 64, 64, false}, 1},                               // one tile of each, whole slabs
    {{256, 136, 520, 8, true}, 4, 2},                            // 9 slabs of u, asked for before h is there
};
constexpr size_t kShapes = sizeof kRagged / sizeof *kRagged;

ChainPlan plan_of(const Shape& s) {
  ChainPlan plan = plan_chain(s.m, s.n, s.k, s.r, s.sm_count, kH200);
  check::that(plan.row_blocks > 0, "the shape is covered");
  plan.splits = s.splits;
  plan.grid = smaller(s.sm_count, chain_units(plan));
  return plan;
}

std::vector<uint16_t> residual_of(const Shape& s, const std::vector<uint16_t>& x) {  // values as those of x
  std::vector<uint16_t> residual(size_t(s.m) * s.n);
  for (size_t i = 0; i < residual.size(); ++i) residual[i] = x[i * 7 % x.size()];
  return residual;
}

// Runs the op `times` over: queued one after the other, as on a stream, into one h and one y.
template <class T>
Outputs run(const Shape& s, const Operands& in, emulator::Options options, int times = 1) {
  const ChainPlan plan = plan_of(s);
  emulator::Buffer<uint16_t> x("x", in.x), v("v", in.v), u("u", in.u), bias("bias", in.bias, s.is_bias_odd);
  emulator::Buffer<uint16_t> residual("residual", residual_of(s, in.x));
  emulator::Buffer<uint16_t> y("y", size_t(s.m) * s.n), h("h", size_t(s.m) * s.r);
  emulator::Buffer<float> partials("partials", chain_partials(plan));
  emulator::Buffer<uint32_t> counters("counters", counters_of(plan));
  std::fill_n(counters.data(), counters.size(), 0);
  const ChainOperands operands{{x.data(), v.data(), u.data(), s.has_bias ? bias.data() : nullptr,
                                s.has_residual ? residual.data() : nullptr, s.activation, h.data(), y.data(),
                                s.m, s.n, s.k, s.r}, partials.data(), counters.data()};
  const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
  for (int i = 0; i < times; ++i) {
    const char* error = launch_chain(plan, operands, dtype, nullptr);
    check::that(error == nullptr, error ? error : "");
  }
  emulator::synchronize(options);
  for (size_t i = 0; i < counters.size(); ++i) check::equal(counters[i], 0, "a counter after the launch", i);
  return {{y.data(), y.data() + y.size()}, {h.data(), h.data() + h.size()}};
}

// --- what y has to be ---

double activated_in_double(double z, Activation activation) {
  switch (activation) {
    case Activation::relu: return std::fmax(z, 0);
    case Activation::gelu: return 0.5 * z * std::erfc(-z / std::sqrt(2.));
    case Activation::gelu_tanh: return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::silu: return z / (1 + std::exp(-z));
    case Activation::none: break;
  }
  return z;
}

// The truth and what two products do about it, taken on through activation and residual. No activation is steeper than 1.13.
template <class T>
Truth finished_truth(const Shape& s, const Operands& in, Truth t) {
  const auto residual = wide<T>(residual_of(s, in.x));
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11;
  for (size_t i = 0; i < t.y.size(); ++i) {
    const double more = s.has_residual ? residual[i] : 0;
    t.y[i] = activated_in_double(t.y[i], s.activation) + more;
    t.two_gemms[i] = activated_in_double(t.two_gemms[i], s.activation) + more;
    t.y_bound[i] = 1.13 * t.y_bound[i] + roundoff * (std::fabs(t.y[i]) + std::fabs(more));
  }
  t.two_gemms = rounded<T>(t.two_gemms);
  return t;
}

// --- the kernel ---

template <class T>
void ragged_shapes(uint64_t seed) {
  Errors errors;
  for (size_t i = 0; i < kShapes; ++i) {
    Known& known = known_of<T>(i, kRagged[i], false);
    const Outputs out = run<T>(kRagged[i], known.in, {seed});
    if (seed == 1) known.first = out;
    check::that(out.y == known.first.y && out.h == known.first.h, "every seed gives the same bits; shape", i);
    const Truth truth = finished_truth<T>(kRagged[i], known.in, known.truth);
    const auto y = wide<T>(out.y), h = wide<T>(out.h);
    within(h, truth.h, truth.h_bound, emulator::text("h of shape %zu", i).c_str());
    within(y, truth.y, truth.y_bound, emulator::text("y of shape %zu", i).c_str());
    errors.add(y, truth);
  }
  errors.pass();
}

// Every product and sum is exact, so each single term counts.
template <class T>
void whole_numbers(uint64_t seed) {
  if (seed > 1 && std::is_same<T, device::Fp16>::value) return;  // other seeds have bf16
  for (size_t i = 0; i < kShapes; ++i) {
    Shape s = kRagged[i];
    if (i % 2) s.activation = Activation::relu;
    const Known& known = known_of<T>(i, s, true);
    const Truth truth = finished_truth<T>(s, known.in, known.truth);
    for (double one : truth.h) check::that(std::fabs(one) <= 256, "h is exact in bf16", i);
    for (double one : truth.y) check::that(std::fabs(one) <= 256, "y is exact in bf16", i);
    const Outputs out = run<T>(s, known.in, {seed});
    equal(wide<T>(out.h), truth.h, emulator::text("h of shape %zu", i).c_str());
    equal(wide<T>(out.y), truth.y, emulator::text("y of shape %zu", i).c_str());
  }
}

template <class T>
void activations(uint64_t seed) {
  Shape s{{20, 64, 40, 136, true}, 132};
  const Operands in = operands<T>(s, false);
  const Truth truth = truth_of<T>(s, in);
  for (Activation activation : {Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu}) {
    for (bool has_residual : {false, true}) {
      s.activation = activation, s.has_residual = has_residual;
      const Truth due = finished_truth<T>(s, in, truth);
      const auto y = wide<T>(run<T>(s, in, {seed}).y);
      within(y, due.y, due.y_bound, emulator::text("y of activation %d", static_cast<int>(activation)).c_str());
      Errors errors;
      errors.add(y, due);
      errors.pass();
    }
  }
}

// Who holds a ticket can always go on: even a block that is alone, whatever the others hold.
void few_blocks_resident(uint64_t seed) {
  const Shape s{{300, 136, 200, 264, true}, 8, 2};
  check::equal(plan_of(s).grid, 8, "blocks");
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs all = run<device::Bf16>(s, in, {seed});
  for (int resident : {1, 2, 3}) {
    const Outputs few = run<device::Bf16>(s, in, {seed, resident});
    check::that(all.y == few.y && all.h == few.h, "the same bits; resident blocks", resident);
  }
}

// The counters are as they were: the next launch, or the next run of a graph, finds zeros.
void calls_one_after_another(uint64_t seed) {
  const Shape s{{140, 136, 72, 136, true}, 4, 2, true};
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs one = run<device::Bf16>(s, in, {seed}), three = run<device::Bf16>(s, in, {seed}, 3);
  check::that(one.y == three.y && one.h == three.h, "the same bits");
}

// How many blocks there are does not show, nor in which row or company a token is.
void bits_depend_on_depth_and_splits_alone(uint64_t seed) {
  Shape s{{300, 200, 72, 136, true}, 132, 2, true};
  const Operands in = operands<device::Bf16>(s, false);
  const Outputs many = run<device::Bf16>(s, in, {seed});
  s.sm_count = 2;
  check::that(run<device::Bf16>(s, in, {seed}).y == many.y, "the same bits in two blocks");
  s.m = 100;
  Operands less = in;
  less.x.resize(s.m * s.k);
  s.has_residual = false;
  const Outputs few = run<device::Bf16>(s, less, {seed});
  s.m = 300;
  const Outputs all = run<device::Bf16>(s, in, {seed});
  check::that(std::equal(few.y.begin(), few.y.end(), all.y.begin()), "the first rows by themselves");
}

// In any other order the last one is lost beside the first or the second.
void splits_are_added_in_their_order(uint64_t seed) {
  const Shape s{{130, 192, 72, 8, false}, 6, 3};
  Operands in{std::vector<uint16_t>(s.m * s.k), std::vector<uint16_t>(s.r * s.k), std::vector<uint16_t>(s.n * s.r), {}};
  const float values[] = {4096, -4096, 0x1p-13f};
  for (int split = 0; split < 3; ++split) {
    for (int row = 0; row < s.m; ++row) in.x[row * s.k + split * kChainSlab] = device::narrow<device::Bf16>(1);
    for (int row = 0; row < s.r; ++row) {
      in.v[row * s.k + split * kChainSlab] = device::narrow<device::Bf16>(values[split]);
    }
  }
  for (double one : wide<device::Bf16>(run<device::Bf16>(s, in, {seed}).h)) check::equal(one, 0x1p-13, "h");
}

// Not in what is zero times something, either: rows and columns past the end of a tile.
void not_a_number_stays_in_its_row(uint64_t seed) {
  const Shape s{{140, 72, 40, 56, true}, 132};
  for (int row : {0, 127, 139}) {
    Operands in = operands<device::Bf16>(s, false);
    in.x[row * s.k + 71] = 0x7fc0;
    const auto y = wide<device::Bf16>(run<device::Bf16>(s, in, {seed}).y);
    for (int token = 0; token < s.m; ++token) {
      for (int column = 0; column < s.n; ++column) {
        check::that(std::isnan(y[token * s.n + column]) == (token == row), "only one row is NaN; found", token);
      }
    }
  }
}

// Rows of 768, as a layer of a model has, on so many multiprocessors that k is split. Once: other seeds have small shapes.
void layer_of_a_model(uint64_t seed) {
  if (seed != 1) return;
  Shape s{{384, 1024, 192, 768, true}, 12};
  s.splits = plan_chain(s.m, s.n, s.k, s.r, s.sm_count, kH200).splits;
  check::equal(s.splits, 2, "splits");
  const Operands in = operands<device::Bf16>(s, true);
  const Truth truth = truth_of<device::Bf16>(s, in);
  equal(wide<device::Bf16>(run<device::Bf16>(s, in, {seed}).y), truth.y, "y");
}

void an_empty_plan_is_refused(uint64_t) {
  const char* error = launch_chain(ChainPlan(), ChainOperands(), Dtype::bfloat16, nullptr);
  check::that(error && strstr(error, "does not cover"), "an error in words");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"ragged shapes, bf16", ragged_shapes<device::Bf16>},
                     {"ragged shapes, fp16", ragged_shapes<device::Fp16>},
                     {"whole numbers, bf16", whole_numbers<device::Bf16>},
                     {"whole numbers, fp16", whole_numbers<device::Fp16>},
                     {"activations, bf16", activations<device::Bf16>},
                     {"activations, fp16", activations<device::Fp16>},
                     {"few blocks resident", few_blocks_resident},
                     {"calls one after another", calls_one_after_another},
                     {"bits depend on depth and splits alone", bits_depend_on_depth_and_splits_alone},
                     {"splits are added in their order", splits_are_added_in_their_order},
                     {"NaN stays in its row", not_a_number_stays_in_its_row},
                     {"layer of a model", layer_of_a_model},
                     {"an empty plan is refused", an_empty_plan_is_refused}});
}
