// How dictionary chooses between its own kernel and the library: a pure function of the problem, with no torch in sight.
#include <algorithm>

#include "dictionary/dictionary_cpu.h"
#include "dictionary/dictionary_cuda.h"

namespace dictionary {
namespace {

CpuConfig decode_config(const Problem& p) {
  CpuConfig config;
  config.path = CpuPath::decode;
  const int64_t bytes = p.dtype == Dtype::float32 ? 4 : 2;
  const int64_t atom_bytes = cpu::parts_of(p.k, std::max<int64_t>(1, p.b_in)) * bytes;
  const int64_t support_bytes = std::min(cpu::parts_of(p.r, 32) * 4, p.kept * 2);  // in the smaller form
  const int64_t row_bytes = p.b_in * (p.kept * bytes + support_bytes);
  if (p.b_out * p.b_in * p.r * atom_bytes + p.n * row_bytes >= cpu::kThreadedBytes) {
    config.first_grain = cpu::grain_of(atom_bytes);
    config.second_grain = cpu::grain_of(row_bytes);
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
  config.path = cpu::path_of(p);
  return config.path == CpuPath::decode ? decode_config(p) : config;
}

}  // namespace dictionary
