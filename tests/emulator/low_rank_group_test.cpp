// The decode kernels of a group in the emulator: members of several sizes and ranks, and SwiGLU, both dtypes.
//
// Outputs and workspace start as NaN and have exact bounds; each access outside is reported. Threads run in another order
// with each seed, and all must agree to the bit.
#include "low_rank/decode_group.cu"

#include <memory>

#include "check.h"
#include "low_rank_truth.h"

namespace {

using namespace low_rank;
using namespace low_rank_truth;

constexpr int kH200 = 232448;  // bytes of shared memory in a block

struct Group {
  int m, k;
  std::vector<Sizes> members;
  bool is_swiglu;
  int sm_count, smem_limit;
};

// members: r, n, has_bias.
Group group(int m, int k, std::initializer_list<std::tuple<int, int, bool>> members, bool is_swiglu, int sm_count,
            int smem_limit = kH200) {
  Group all{m, k, {}, is_swiglu, sm_count, smem_limit};
  for (const auto& [r, n, has_bias] : members) all.members.push_back({m, k, r, n, has_bias});
  return all;
}

const Group kGroups[] = {
    group(1, 8, {{8, 1, true}}, false, 4),                                                      // one of everything
    group(3, 264, {{40, 50, true}, {24, 17, false}}, false, 5),                                 // tails; one has no bias
    group(8, 520, {{72, 82, false}, {40, 33, true}, {40, 33, true}}, false, 7),                 // q, k, v
    group(12, 136, {{296, 100, true}, {8, 200, true}, {96, 16, false}, {32, 70, true}}, false, 2),  // all four in a block
    group(9, 72, {{136, 333, true}, {40, 333, true}}, false, 5, 57 << 10),                      // u does not fit
    group(2, 1032, {{8, 64, false}, {16, 20, true}}, false, 132),                               // splits, and idle blocks
    group(5, 2088, {{24, 40, true}, {8, 8, false}, {8, 24, true}}, false, 1),                   // more units than blocks
    group(1, 8, {{8, 1, true}, {8, 1, true}}, true, 4),
    group(7, 264, {{40, 150, true}, {40, 150, true}}, true, 4),
    group(16, 136, {{40, 90, false}, {264, 90, true}}, true, 3),                                // ranks differ
    group(4, 520, {{296, 333, true}, {72, 333, false}}, true, 5, 38 << 10),                     // u does not fit
    group(11, 1032, {{16, 40, true}, {8, 40, true}}, true, 132),
};
constexpr size_t kCount = sizeof kGroups / sizeof *kGroups;

template <class T>
constexpr double kRoundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11;

// The members' operands, of which x is the first's.
template <class T>
std::vector<Operands> operands_of(const Group& g, bool is_whole) {
  std::vector<Operands> all;
  for (size_t i = 0; i < g.members.size(); ++i) {
    Sizes like = g.members[i];
    all.push_back(operands<T>(like, is_whole));
    if (i == 0) continue;
    all[i].x = all[0].x;
    if (like.r == g.members[0].r && like.n == g.members[0].n) {  // other values than the first's, whose seed it shares
      std::reverse(all[i].v.begin(), all[i].v.end());
      std::reverse(all[i].u.begin(), all[i].u.end());
      std::rotate(all[i].bias.begin(), all[i].bias.begin() + all[i].bias.size() / 2, all[i].bias.end());
    }
  }
  return all;
}

GroupPlan plan_of(const Group& g) {
  int64_t n[kMostMembers] = {}, r[kMostMembers] = {};
  for (size_t i = 0; i < g.members.size(); ++i) n[i] = g.members[i].n, r[i] = g.members[i].r;
  const int count = static_cast<int>(g.members.size());
  const GroupPlan plan = plan_group(g.m, g.k, count, n, r, g.is_swiglu, g.sm_count, g.smem_limit);
  check::that(plan.token_tiles > 0, "the group is covered");
  return plan;
}

using Results = std::vector<std::vector<uint16_t>>;  // y of each member; of SwiGLU only the first's

// One member's arrays.
struct Memory {
  emulator::Buffer<uint16_t> v, u, bias, y;
  Memory(const Operands& in, size_t count) : v("v", in.v), u("u", in.u), bias("bias", in.bias), y("y", count) {}
};

// Runs the op `times` over, outputs and workspace poisoned again before each.
template <class T>
Results run(const Group& g, const std::vector<Operands>& in, emulator::Options options, int times = 1) {
  const GroupPlan plan = plan_of(g);
  emulator::Buffer<uint16_t> x("x", in[0].x);
  emulator::Buffer<float> partials("partials", plan.partials);
  emulator::Buffer<uint64_t> counter("counter", 1);
  counter[0] = 0;
  std::vector<std::unique_ptr<Memory>> members;
  GroupParams p{};
  p.x = x.data(), p.partials = partials.data(), p.counter = counter.data();
  p.m = g.m, p.k = g.k;
  for (size_t i = 0; i < g.members.size(); ++i) {
    const Sizes& s = g.members[i];
    const bool has_y = i == 0 || !g.is_swiglu;
    members.push_back(std::make_unique<Memory>(in[i], has_y ? size_t(s.m) * s.n : 0));
    Memory& of = *members.back();
    p.members[i] = {of.v.data(), of.u.data(), s.has_bias ? of.bias.data() : nullptr, of.y.data(), s.n, s.r};
    if (!has_y) p.members[i].y = nullptr;
  }
  Results results;
  for (int i = 0; i < times; ++i) {
    for (auto& one : members) one->y.poison();
    partials.poison();
    const Dtype dtype = std::is_same<T, device::Bf16>::value ? Dtype::bfloat16 : Dtype::float16;
    check::that(launch_group(plan, p, dtype, nullptr) == nullptr, "the launch");
    emulator::synchronize(options);
    ++options.seed;
    Results now;
    for (auto& one : members) now.emplace_back(one->y.data(), one->y.data() + one->y.size());
    if (g.is_swiglu) now.resize(1);
    if (i > 0) check::that(now == results, "the same bits the next time");
    results = std::move(now);
  }
  check::equal(counter[0], uint64_t(times) * plan.grid, "arrivals");
  return results;
}

// Of silu(gate) up; `two_gemms` is the same with gate, silu and up rounded, as several ops have it.
Truth swiglu_truth(const Truth& gate, const Truth& up, double roundoff, std::vector<double> (*round)(std::vector<double>)) {
  const auto silu_of = [](double z) { return z / (1 + std::exp(-z)); };
  Truth t;
  std::vector<double> active;
  for (size_t i = 0; i < gate.y.size(); ++i) {
    const double g = gate.y[i], u = up.y[i], y = silu_of(g) * u;
    const double g_bound = gate.y_bound[i] - roundoff * std::fabs(g), u_bound = up.y_bound[i] - roundoff * std::fabs(u);
    t.y.push_back(y);
    t.y_bound.push_back(roundoff * std::fabs(y) + 1.1 * g_bound * (std::fabs(u) + u_bound) +  // 1.1: silu is no steeper
                        std::fabs(silu_of(g)) * u_bound + 16 * 0x1p-24 * (std::fabs(g * u) + std::fabs(y)));
    active.push_back(silu_of(gate.two_gemms[i]));
  }
  active = round(active);
  for (size_t i = 0; i < active.size(); ++i) active[i] *= up.two_gemms[i];
  t.two_gemms = round(active);
  return t;
}

// What is the same for every seed.
struct KnownGroup {
  std::vector<Operands> in;
  std::vector<Truth> truths;  // of each result
  Results first;              // of the first seed
};

template <class T>
KnownGroup& known_group(size_t number, bool is_whole) {
  static std::map<size_t, KnownGroup> all;
  KnownGroup& known = all[2 * number + is_whole];
  if (!known.in.empty()) return known;
  const Group& g = kGroups[number];
  known.in = operands_of<T>(g, is_whole);
  for (size_t i = 0; i < g.members.size(); ++i) {
    known.truths.push_back(truth_of<T>(g.members[i], known.in[i]));
    for (double one : known.truths[i].h) check::that(!is_whole || std::fabs(one) <= 256, "h is exact in bf16", number);
  }
  if (g.is_swiglu) known.truths = {swiglu_truth(known.truths[0], known.truths[1], kRoundoff<T>, rounded<T>)};
  return known;
}

// --- kernels ---

template <class T>
void ragged_groups(uint64_t seed) {
  Errors errors;
  for (size_t number = 0; number < kCount; ++number) {
    KnownGroup& known = known_group<T>(number, false);
    const Results results = run<T>(kGroups[number], known.in, {seed});
    if (seed == 1) known.first = results;
    check::that(results == known.first, "every seed gives the same bits; group", number);
    check::equal(results.size(), known.truths.size(), "results of group", number);
    for (size_t i = 0; i < results.size(); ++i) {
      const auto y = wide<T>(results[i]);
      within(y, known.truths[i].y, known.truths[i].y_bound, emulator::text("y %zu of group %zu", i, number).c_str());
      errors.add(y, known.truths[i]);
    }
  }
  errors.pass();
}

// Every sum is exact, so each single term counts; silu leaves its own error in float, and a rounding.
template <class T>
void whole_numbers(uint64_t seed) {
  for (size_t number = 0; number < kCount; ++number) {
    const Group& g = kGroups[number];
    const KnownGroup& known = known_group<T>(number, true);
    const Results results = run<T>(g, known.in, {seed});
    for (size_t i = 0; i < results.size(); ++i) {
      const auto y = wide<T>(results[i]), &due = known.truths[i].y;
      const std::string what = emulator::text("y %zu of group %zu", i, number);
      if (!g.is_swiglu) {
        equal(y, due, what.c_str());
        continue;
      }
      std::vector<double> bound;
      for (double one : due) bound.push_back((kRoundoff<T> + 16 * 0x1p-24) * std::fabs(one) + 0x1p-24);
      within(y, due, bound, what.c_str());
    }
  }
}

void launches_one_after_another(uint64_t seed) {
  for (size_t number : {2, 9}) run<device::Bf16>(kGroups[number], known_group<device::Bf16>(number, false).in, {seed}, 2);
}

void one_launch_with_few_blocks_resident(uint64_t seed) {
  const Group& g = kGroups[2];
  check::reports("cooperative launch", [&] { run<device::Bf16>(g, operands_of<device::Bf16>(g, false), {seed, 2}); });
}

// How much of u is prefetched does not show.
void bits_depend_on_sizes_alone(uint64_t seed) {
  for (size_t number : {4, 10}) {
    Group g = kGroups[number];
    const auto& in = known_group<device::Bf16>(number, false).in;
    g.smem_limit = kH200;
    const GroupPlan plan = plan_of(g);
    const Results all = run<device::Bf16>(g, in, {seed});
    check::that(plan.prefetch > 2, "all items fit; found", plan.prefetch);
    for (int prefetch : {0, 1, 2}) {
      g.smem_limit = group_memory(plan.token_tiles, plan.tiles, plan.row_of_h, prefetch).bytes;
      check::equal(plan_of(g).prefetch, prefetch, "prefetch");
      check::that(run<device::Bf16>(g, in, {seed}) == all, "the same bits with a prefetch of", prefetch);
    }
  }
}

// A member has nothing of another, and a row of x nothing of another, not even in what is zero times something.
void not_a_number_stays_where_it_is(uint64_t seed) {
  const Group& g = kGroups[3];
  for (size_t bad : {seed % 4, (seed + 1) % 4}) {
    auto in = operands_of<device::Bf16>(g, false);
    in[bad].v[g.k + 5] = 0x7fc0;  // of one row, so of one column of h
    const Results results = run<device::Bf16>(g, in, {seed});
    for (size_t i = 0; i < results.size(); ++i) {
      for (double one : wide<device::Bf16>(results[i])) check::that(std::isnan(one) == (i == bad), "one member is NaN", i);
    }
  }
  auto in = operands_of<device::Bf16>(g, false);
  for (auto& one : in) one.x[4 * g.k + 100] = 0x7fc0;
  const Results results = run<device::Bf16>(g, in, {seed});
  for (size_t i = 0; i < results.size(); ++i) {
    const auto y = wide<device::Bf16>(results[i]);
    for (size_t at = 0; at < y.size(); ++at) {
      check::that(std::isnan(y[at]) == (at / g.members[i].n == 4), "one row is NaN", at / g.members[i].n);
    }
  }
}

// q, k and v of a layer with grouped heads, on many blocks; once, and not under AddressSanitizer, which has seen every path.
void layer_of_a_model(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__
  return;
#endif
  if (seed != 1) return;
  const Group g = group(6, 1024, {{256, 2048, true}, {128, 512, true}, {128, 512, false}}, false, 132);
  check::equal(plan_of(g).grid, 128, "blocks: one for each unit of the first product");
  const auto in = operands_of<device::Bf16>(g, true);
  const Results results = run<device::Bf16>(g, in, {seed});
  for (size_t i = 0; i < results.size(); ++i) {
    const Sizes& s = g.members[i];
    const auto x = wide<device::Bf16>(in[i].x), v = wide<device::Bf16>(in[i].v), u = wide<device::Bf16>(in[i].u);
    const auto due = product<float>(product<float>(x, v, s.m, s.r, s.k), u, s.m, s.n, s.r, wide<device::Bf16>(in[i].bias));
    equal(wide<device::Bf16>(results[i]), due, "y");
  }
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"ragged groups, bf16", ragged_groups<device::Bf16>},
                     {"ragged groups, fp16", ragged_groups<device::Fp16>},
                     {"whole numbers, bf16", whole_numbers<device::Bf16>},
                     {"launches one after another", launches_one_after_another},
                     {"one launch, few blocks resident", one_launch_with_few_blocks_resident},
                     {"bits depend on sizes alone", bits_depend_on_sizes_alone},
                     {"NaN stays where it is", not_a_number_stays_where_it_is},
                     {"layer of a model", layer_of_a_model}});
}
