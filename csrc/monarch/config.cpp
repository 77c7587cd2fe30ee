// How monarch chooses between its own kernel and the library: a pure function of the problem, with no torch in sight.
#include <algorithm>

#include "monarch/monarch_cpu.h"
#include "monarch/monarch_cuda.h"

namespace monarch {
namespace {

constexpr int64_t kGroupBytes = 32 << 10;  // of products that wait: they stay in the L1 cache

// As many blocks as wait together; in eights, since they move in squares.
int64_t group_of(int64_t blocks, int64_t bytes) {
  const int64_t fit = std::max<int64_t>(1, kGroupBytes / std::max<int64_t>(1, bytes));
  return std::min(blocks, fit < 8 ? fit : fit / 8 * 8);
}

CpuConfig decode_config(const Problem& p) {
  CpuConfig config;
  config.path = CpuPath::decode;
  const int64_t bytes = p.dtype == Dtype::float32 ? 4 : 2;
  const int64_t first_rows = p.b_out * p.r, first_bytes = first_rows * cpu::parts_of(p.k, p.b_in) * bytes;  // of a block
  const int64_t second_rows = cpu::parts_of(p.n, p.b_out), second_bytes = second_rows * p.b_in * p.r * bytes;
  const int64_t m = std::min(p.m, cpu::kMostTokens);  // of a slice
  config.first_group = group_of(p.b_in, m * first_rows * bytes);
  config.second_group = group_of(p.b_out, m * second_rows * bytes);
  if (p.b_in * first_bytes + p.b_out * second_bytes >= cpu::kThreadedBytes) {
    config.first_grain = cpu::grain_of(first_bytes);
    config.second_grain = cpu::grain_of(second_bytes);
  }
  return config;
}

Described describe(const Problem& p) {
  if (p.device == Device::cuda) return describe_monarch_cuda(p);
  const CpuConfig config = choose_cpu_config(p);
  if (config.path == CpuPath::empty) return {{"path", "empty"}};
  if (config.path == CpuPath::library) return {{"path", "library"}};
  return {{"path", "decode"},
          {"level", name_of(p.level)},
          {"first_grain", config.first_grain},
          {"second_grain", config.second_grain},
          {"first_group", config.first_group},
          {"second_group", config.second_group}};
}

const RegisterOp registered({"monarch", compiled_cpu_levels(), compiled_cuda_archs(), &describe});

}  // namespace

CpuConfig choose_cpu_config(const Problem& p) {
  CpuConfig config;
  config.path = cpu::path_of(p);
  if (p.dtype == Dtype::float32 && p.m > cpu::kMostTokens) config.path = CpuPath::library;  // measured: no slice is ahead
  return config.path == CpuPath::decode ? decode_config(p) : config;
}

}  // namespace monarch
