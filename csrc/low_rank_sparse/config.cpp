// How low_rank_sparse chooses between its own kernels, one dense product and the library: a pure function of the problem,
// with no torch in sight.
#include <algorithm>

#include "cpu/config.h"
#include "low_rank_sparse/low_rank_sparse_cpu.h"
#include "low_rank_sparse/low_rank_sparse_cuda.h"

namespace low_rank_sparse {
namespace {

// What takes as long as so many multiply-adds of a library's fp32 product. Fitted to both plans' times in 336 cases
// (AVX-512, 256 to 1024 features, r from 0 to 3/4 of them, 0.3 to 60 % of entries, m from 17 to 2048): the choice by these
// takes 0.4 % more time in the mean than the better plan of each case.
constexpr double kEntryCost = 3;     // an entry of S and a token
constexpr double kFeatureCost = 20;  // an input or output and a token: packed, or added to
constexpr double kWeightCost = 40;   // an element of W

CpuConfig decode_config(const Problem& p) {
  CpuConfig config;
  config.path = CpuPath::decode;
  const int64_t bytes = element_bytes(p.dtype), index_bytes = p.k <= INT16_MAX + 1 ? 2 : 4;
  const int64_t sparse_bytes = p.entries * (bytes + index_bytes);
  const int64_t row_bytes = p.r * bytes + sparse_bytes / std::max<int64_t>(1, p.n);
  if (p.r * (p.k + p.n) * bytes + sparse_bytes >= cpu::kThreadedBytes) {
    config.first_grain = cpu::grain_of(cpu::kRowTile * std::max<int64_t>(1, p.k) * bytes);
    config.second_grain = cpu::grain_of(cpu::kRowTile * row_bytes);
  }
  return config;
}

double split_cost(const Problem& p) {
  const auto m = static_cast<double>(p.m), r = static_cast<double>(p.r), entries = static_cast<double>(p.entries);
  const auto features = static_cast<double>(p.k) + static_cast<double>(p.n);
  const auto tokens = static_cast<double>(cpu::parts_of(p.m, kBlockTokens) * kBlockTokens);
  return m * r * features + (entries > 0 ? tokens * (entries * kEntryCost + features * kFeatureCost) : 0);
}

double materialize_cost(const Problem& p) {
  const double elements = static_cast<double>(p.n) * static_cast<double>(p.k);
  return elements * (static_cast<double>(p.m) + static_cast<double>(p.r) + kWeightCost);
}

const char* name_of_path(CpuPath path) {
  switch (path) {
    case CpuPath::empty: return "empty";
    case CpuPath::decode: return "decode";
    case CpuPath::split: return "split";
    case CpuPath::materialize: return "materialize";
    case CpuPath::library: break;
  }
  return "library";
}

Described describe(const Problem& p) {
  if (p.device == Device::cuda) return describe_low_rank_sparse_cuda(p);
  const CpuConfig config = choose_cpu_config(p);
  Described all{{"path", name_of_path(config.path)}};
  if (config.path == CpuPath::decode || config.path == CpuPath::split) all.emplace_back("level", name_of(p.level));
  if (config.path == CpuPath::decode)
    all.insert(all.end(), {{"first_grain", config.first_grain}, {"second_grain", config.second_grain}});
  return all;
}

// The gradients: on a CPU, no plan to choose.
Described describe_backward(const Problem& p) {
  if (p.device == Device::cuda) return describe_low_rank_sparse_backward_cuda(p);
  if (p.dtype == Dtype::float64) return {{"path", "library"}};
  return {{"path", "kernels"}, {"level", name_of(p.level)}};
}

const RegisterOp registered({"low_rank_sparse", compiled_cpu_levels(), compiled_cuda_archs(), &describe});
const RegisterOp registered_backward({"low_rank_sparse_backward", compiled_cpu_levels(), compiled_cuda_archs(),
                                      &describe_backward});

}  // namespace

CpuConfig choose_cpu_config(const Problem& p) {
  CpuConfig config;
  if (p.m == 0)
    config.path = CpuPath::empty;
  else if (p.dtype == Dtype::float64)
    config.path = CpuPath::library;
  else if (p.m <= cpu::kMostTokens && p.dtype != Dtype::float16)
    return decode_config(p);
  else
    config.path = split_cost(p) <= materialize_cost(p) ? CpuPath::split : CpuPath::materialize;
  return config;
}

}  // namespace low_rank_sparse
