// The gradients of a dictionary's coefficients in the emulator: the bitmap of positions, and that gradients by it are those
// that the positions say. The products themselves are tested over bitmaps, in blocks, in sparse24_backward_test.cpp.
#include "dictionary/bitmap.cu"
#include "low_rank/backward.cu"
#include "sparse24/backward.cu"

#include <random>

#include "check.h"
#include "dictionary/backward.h"
#include "gradient_truth.h"

namespace {

using namespace dictionary;
using namespace gradient_truth;

struct Rows {
  int64_t rows;
  int atoms, stored;
};

const Rows kRagged[] = {{1, 1, 1}, {9, 31, 7}, {17, 32, 32}, {70, 33, 1}, {40, 200, 100}, {300, 90, 45}, {2, 32767, 3000}};

std::vector<int16_t> positions_of(const Rows& r, std::mt19937_64& random) {
  std::vector<int16_t> atoms(r.atoms), positions;
  for (int i = 0; i < r.atoms; ++i) atoms[i] = static_cast<int16_t>(i);
  for (int64_t row = 0; row < r.rows; ++row) {
    std::shuffle(atoms.begin(), atoms.end(), random);
    positions.insert(positions.end(), atoms.begin(), atoms.begin() + r.stored);
    std::sort(positions.end() - r.stored, positions.end());
  }
  return positions;
}

std::vector<uint32_t> marked(const Rows& r, const std::vector<int16_t>& positions, uint64_t seed) {
  const int words = sparse24::parts_of(r.atoms, 32);
  emulator::Buffer<int16_t> in("positions", positions);
  emulator::Buffer<uint32_t> mask("mask", r.rows * words);
  check::that(launch_mark({in.data(), mask.data(), r.rows, words, r.stored}, 1, nullptr) == nullptr, "the launch");
  emulator::synchronize({seed});
  return {mask.data(), mask.data() + mask.size()};
}

void bits_are_where_positions_say(uint64_t seed) {
  std::mt19937_64 random(seed);
  for (const Rows& r : kRagged) {
    const std::vector<int16_t> positions = positions_of(r, random);
    const int words = sparse24::parts_of(r.atoms, 32);
    std::vector<uint32_t> expected(r.rows * words);
    for (size_t i = 0; i < positions.size(); ++i) {
      expected[i / r.stored * words + positions[i] / 32] |= 1u << positions[i] % 32;
    }
    check::that(marked(r, positions, seed) == expected, "the bitmap; atoms", r.atoms);
  }
}

// No access outside, and no more bits than positions.
void wrong_positions(uint64_t seed) {
  const Rows r{40, 70, 9};
  std::mt19937_64 random(seed);
  for (int kind = 0; kind < 4; ++kind) {
    std::vector<int16_t> positions(r.rows * r.stored);
    for (int16_t& one : positions) {
      one = static_cast<int16_t>(kind == 0 ? -1 : kind == 1 ? 32767 : kind == 2 ? 69 : random());
    }
    const std::vector<uint32_t> mask = marked(r, positions, seed);
    for (int64_t row = 0; row < r.rows; ++row) {
      int bits = 0;
      for (int word = 0; word < 3; ++word) bits += __builtin_popcount(mask[row * 3 + word]);
      check::that(bits <= r.stored && (kind != 2 || bits == 1) && (kind > 1 || bits == 0), "bits of a row", row);
    }
  }
}

// dh and dvalues of whole numbers, exactly: in 2 x 3 blocks.
void gradients_follow_positions(uint64_t seed) {
  if (has_run<device::Bf16>(seed)) return;
  const sparse24::SparseSizes s{65, 144, 40, 2, 3, 6, 0, 0};
  std::mt19937_64 random(seed);
  const auto numbers = [&](size_t count, int zeros) {
    Wide values(count);
    for (double& one : values) one = random() % zeros ? 0 : random() % 2 ? 1 : -1;
    return values;
  };
  const Wide dy = numbers(size_t(s.m) * s.n, 3), h = numbers(s.outputs(), 1), values = numbers(s.values(), 1);
  const Rows r{int64_t{s.n} * s.q, s.columns, s.stored};
  const std::vector<int16_t> positions = positions_of(r, random);

  using device::Bf16;
  const int needs = sparse_needs(kNeedsDx | kNeedsDvalues);
  const sparse24::BackwardPlan plan =
      sparse24::plan_backward(s.m, s.n, s.columns, s.p, s.q, s.stored, 0, 0, needs, 4);
  emulator::Buffer<uint16_t> b_dy("dy", narrowed<Bf16>(dy)), b_h("h", narrowed<Bf16>(h));
  emulator::Buffer<uint16_t> b_values("values", narrowed<Bf16>(values));
  emulator::Buffer<uint16_t> dh("dh", s.outputs()), dvalues("dvalues", s.values());
  emulator::Buffer<int16_t> b_positions("positions", positions);
  emulator::Buffer<uint32_t> mask("mask", r.rows * s.words());
  emulator::Buffer<int32_t> starts("starts", plan.starts);
  emulator::Buffer<float> partials("partials", plan.partials);
  check::that(!launch_mark({b_positions.data(), mask.data(), r.rows, s.words(), s.stored}, 4, nullptr), "the first launch");
  const sparse24::BackwardOperands o{b_dy.data(), b_h.data(), b_values.data(), mask.data(), starts.data(), partials.data(),
                                     dh.data(), dvalues.data(), nullptr, s, needs};
  check::that(!sparse24::launch_backward(plan, o, Dtype::bfloat16, 4, nullptr), "the launches");
  emulator::synchronize({seed});

  Wide exact_dh(s.outputs()), exact_dvalues(s.values());
  for (int token = 0; token < s.m; ++token) {
    for (size_t i = 0; i < exact_dvalues.size(); ++i) {
      const int row = static_cast<int>(i / s.stored) / s.q, block = static_cast<int>(i / s.stored) % s.q;
      const size_t place = ((size_t(row / s.rows()) * s.m + token) * s.q + block) * s.columns + positions[i];
      exact_dh[place] += dy[size_t(token) * s.n + row] * values[i];
      exact_dvalues[i] += dy[size_t(token) * s.n + row] * h[place];
    }
  }
  const Wide found_dh = wide<Bf16>(Bits(dh.data(), dh.data() + dh.size()));
  const Wide found_dvalues = wide<Bf16>(Bits(dvalues.data(), dvalues.data() + dvalues.size()));
  for (size_t i = 0; i < exact_dh.size(); ++i) check::equal(found_dh[i], exact_dh[i], "dh", i);
  for (size_t i = 0; i < exact_dvalues.size(); ++i) check::equal(found_dvalues[i], exact_dvalues[i], "dvalues", i);
}

void each_gradient_asks_for_its_products(uint64_t) {
  using sparse24::kNeedsDvalues;
  check::equal(sparse_needs(kNeedsDx), sparse24::kNeedsDx, "dx");
  check::equal(sparse_needs(kNeedsDd), sparse24::kNeedsDx, "dd, by dh too");
  check::equal(sparse_needs(dictionary::kNeedsDvalues), kNeedsDvalues, "dvalues");
  check::equal(sparse_needs(kNeedsDb), sparse24::kNeedsDb, "db");
  Problem p;
  p.m = 4096, p.n = 4096, p.k = 4096, p.r = 2048, p.kept = 1024, p.device = Device::cuda;
  check::equal(choose_backward(p, 1 | 2 | 4 | 16).tile, 128, "a layer of a model");
  p.b_in = 4, p.b_out = 8, p.r = 60;
  check::equal(choose_backward(p, 31).tile, 0, "rows of h that are no whole pieces");
  p.r = 64, p.kept = 16;
  check::equal(choose_backward(p, 31).tile, 64, "small blocks");
  for (int64_t blocks : {0, 1000}) check::equal((p.b_out = blocks, choose_backward(p, 31).tile), 0, "blocks", blocks);
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"bits are where positions say", bits_are_where_positions_say},
                     {"wrong positions", wrong_positions},
                     {"gradients follow positions", gradients_follow_positions},
                     {"each gradient asks for its products", each_gradient_asks_for_its_products}});
}
