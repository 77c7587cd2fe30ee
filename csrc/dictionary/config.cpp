// How dictionary chooses between its own kernel and the library: a pure function of the problem, with no torch in sight.
#include <algorithm>

#include "cpu/product.h"
#include "dictionary/dictionary_cpu.h"
#include "dictionary/dictionary_cuda.h"

namespace dictionary {
namespace {

constexpr int64_t kTaskBytes = 256 << 10;    // of weights: below, handing a task to a thread costs more than it saves
constexpr int64_t kThreadedBytes = 1 << 20;  // of all factors: below, one thread is done before others have woken up

int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

CpuConfig decode_config(const Problem& p) {
  CpuConfig config;
  config.path = CpuPath::decode;
  const int64_t bytes = p.dtype == Dtype::float32 ? 4 : 2;
  const int64_t atom_bytes = std::max<int64_t>(1, parts_of(p.k, std::max<int64_t>(1, p.b_in)) * bytes);
  const int64_t support_bytes = std::min(parts_of(p.r, 32) * 4, p.kept * 2);  // in the smaller form
  const int64_t row_bytes = std::max<int64_t>(1, p.b_in * (p.kept * bytes + support_bytes));
  if (p.b_out * p.b_in * p.r * atom_bytes + p.n * row_bytes >= kThreadedBytes) {
    config.first_grain = parts_of(kTaskBytes, atom_bytes);
    config.second_grain = parts_of(kTaskBytes, row_bytes);
  }
  return config;
}

Described describe(const Problem& p) {
  if (p.device == Device::cuda) return describe_dictionary_cuda(p);
  const CpuConfig config = choose_cpu_config(p);
  if (config.path == CpuPath::empty) return {{"path", "empty"}};
  if (config.path == CpuPath::library) return {{"path", "library"}};
  return {{"path", "decode"},
          {"level", name_of(p.level)},
          {"first_grain", config.first_grain},
          {"second_grain", config.second_grain}};
}

const RegisterOp registered({"dictionary", compiled_cpu_levels(), compiled_cuda_archs(), &describe});

}  // namespace

CpuConfig choose_cpu_config(const Problem& p) {
  CpuConfig config;
  if (p.m == 0) {
    config.path = CpuPath::empty;
    return config;
  }
  const bool has_kernel = p.dtype == Dtype::float32 || p.dtype == Dtype::bfloat16;
  return has_kernel && p.m <= cpu::kMostTokens ? decode_config(p) : config;
}

}  // namespace dictionary
