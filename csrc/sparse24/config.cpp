// How sparse24 chooses between its own kernel and the library: a pure function of the problem, with no torch in sight.
#include <algorithm>

#include "cpu/product.h"
#include "sparse24/sparse24_cpu.h"
#include "sparse24/sparse24_cuda.h"

namespace sparse24 {
namespace {

constexpr int64_t kTaskBytes = 256 << 10;    // of weights: below, handing a task to a thread costs more than it saves
constexpr int64_t kThreadedBytes = 1 << 20;  // of values and mask: below, one thread is done before others have woken up
constexpr int64_t kRowTile = 4;

Described describe(const Problem& p) {
  if (p.device == Device::cuda) return describe_sparse24_cuda(p);
  const CpuConfig config = choose_cpu_config(p);
  if (config.path == CpuPath::empty) return {{"path", "empty"}};
  if (config.path == CpuPath::library) return {{"path", "library"}};
  return {{"path", "decode"}, {"level", name_of(p.level)}, {"row_tile", config.row_tile}, {"grain", config.grain}};
}

const RegisterOp registered({"sparse24", compiled_cpu_levels(), compiled_cuda_archs(), &describe});

}  // namespace

CpuConfig choose_cpu_config(const Problem& p) {
  CpuConfig config;
  if (p.m == 0) {
    config.path = CpuPath::empty;
    return config;
  }
  const bool has_kernel = p.dtype == Dtype::float32 || p.dtype == Dtype::bfloat16;
  if (!has_kernel || p.m > cpu::kMostTokens) return config;
  config.path = CpuPath::decode;
  config.row_tile = kRowTile;
  const int64_t stored = p.k / std::max<int64_t>(1, p.group) * p.kept, words = (p.k + 31) / 32;
  const int64_t row_bytes = stored * (p.dtype == Dtype::float32 ? 4 : 2) + words * 4;
  if (p.n * row_bytes >= kThreadedBytes) {
    const int64_t tile_bytes = kRowTile * row_bytes;
    config.grain = std::max<int64_t>(1, (kTaskBytes + tile_bytes - 1) / tile_bytes);
  }
  return config;
}

}  // namespace sparse24
