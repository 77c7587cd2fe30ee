// How wavelet's ops choose between their kernels and the reference: pure functions of the problem, with no torch in sight.
// The problem is haar with one level, with factors for each pair; anything else is the reference's.
#include "wavelet/haar.h"
#include "wavelet/wavelet_cpu.h"

namespace wavelet {
namespace {

// Pairs times rank, up to which the transform is folded into the factors: their products then take twice the arithmetic of
// those with halves of x, and no pass over x and y.
constexpr int64_t kFoldedMiddle = 512;
constexpr int64_t kFoldedShare = 4;  // times as many as there are rows: above, folding takes longer than to transform those

bool has_cpu_kernels(const Problem& p) {
  const bool has_type = p.dtype == Dtype::float32 || p.dtype == Dtype::bfloat16;
  return has_type && p.r >= 1 && (p.pairs == 1 || p.pairs == 2 || p.pairs == 4) && p.r <= kFoldedMiddle / p.pairs;
}

bool folds(const Problem& p) { return p.m >= (p.pairs * p.r + kFoldedShare - 1) / kFoldedShare; }

Described in_words(CpuPath path, const Problem& p) {
  switch (path) {
    case CpuPath::empty: return {{"path", "empty"}};
    case CpuPath::decode: return {{"path", "decode"}, {"level", name_of(p.level)}};
    case CpuPath::folded: return {{"path", "folded"}, {"middle", p.pairs * p.r}};
    case CpuPath::reference: break;
  }
  return {{"path", "reference"}};
}

Described describe(const Problem& p) {
  return p.device == Device::cuda ? describe_forward_cuda(p) : in_words(choose_cpu_path(p), p);
}

Described describe_backward(const Problem& p) {
  return p.device == Device::cuda ? describe_backward_cuda(p) : in_words(choose_cpu_backward_path(p), p);
}

const RegisterOp registered({"wavelet", compiled_cpu_levels(), compiled_cuda_archs(), &describe});
const RegisterOp registered_backward({"wavelet_backward", compiled_cpu_levels(), compiled_cuda_archs(), &describe_backward});

}  // namespace

CpuPath choose_cpu_path(const Problem& p) {
  if (p.m == 0) return CpuPath::empty;
  if (!has_cpu_kernels(p)) return CpuPath::reference;
  if (p.pairs <= 2 && p.m <= cpu::kMostTokens / p.pairs) return CpuPath::decode;
  return folds(p) ? CpuPath::folded : CpuPath::reference;
}

CpuPath choose_cpu_backward_path(const Problem& p) {
  if (p.m == 0) return CpuPath::empty;
  return has_cpu_kernels(p) && folds(p) ? CpuPath::folded : CpuPath::reference;
}

}  // namespace wavelet
