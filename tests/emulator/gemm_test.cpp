// The primitives together: a persistent TMA, mbarrier and wgmma GEMM against a plain product, on ragged sizes.
#include "gemm.cu"

#include "check.h"

namespace {

// Integers this small multiply and add exactly, also in bf16 where they end: |c| <= 256.
std::vector<uint16_t> small_integers(size_t count, emulator::Random& random) {
  std::vector<uint16_t> values(count);
  for (auto& v : values) v = device::narrow<device::Bf16>(static_cast<float>(static_cast<int>(random.below(3))) - 1);
  return values;
}

void product(uint64_t seed, int m, int n, int k, int blocks) {
  emulator::Random random(seed);
  const auto a = small_integers(size_t(m) * k, random), b = small_integers(size_t(n) * k, random);
  emulator::Buffer<uint16_t> gmem_a("a", a), gmem_b("b", b), c("c", size_t(m) * n);
  const char* wrong = gemm_test::launch_gemm(gmem_a.data(), gmem_b.data(), c.data(), m, n, k, blocks);
  check::that(!wrong, wrong ? wrong : "");
  emulator::synchronize({seed});
  for (int row = 0; row < m; ++row) {
    for (int column = 0; column < n; ++column) {
      float sum = 0;
      for (int i = 0; i < k; ++i)
        sum += device::widen<device::Bf16>(a[size_t(row) * k + i]) * device::widen<device::Bf16>(b[size_t(column) * k + i]);
      check::equal(device::widen<device::Bf16>(c[size_t(row) * n + column]), sum, "c", row * n + column);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(
      count, arguments,
      {
          {"gemm 128 x 128 x 64, one tile", [](uint64_t seed) { product(seed, 128, 128, 64, 1); }},
          {"gemm 200 x 264 x 328, fewer blocks than tiles", [](uint64_t seed) { product(seed, 200, 264, 328, 3); }},
          {"gemm 5 x 8 x 256, one row block", [](uint64_t seed) { product(seed, 5, 8, 256, 2); }},
      });
}
