// How sparse24 chooses between its own kernel and the library: a pure function of the problem, with no torch in sight.
#include <algorithm>

#include "sparse24/sparse24_cpu.h"
#include "sparse24/sparse24_cuda.h"

namespace sparse24 {
namespace {

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
  config.path = cpu::path_of(p);
  if (config.path != CpuPath::decode) return config;
  config.row_tile = kRowTile;
  const int64_t stored = p.k / std::max<int64_t>(1, p.group) * p.kept, words = cpu::parts_of(p.k, 32);
  const int64_t row_bytes = stored * (p.dtype == Dtype::float32 ? 4 : 2) + words * 4;
  if (p.n * row_bytes >= cpu::kThreadedBytes) config.grain = cpu::grain_of(kRowTile * row_bytes);
  return config;
}

}  // namespace sparse24
