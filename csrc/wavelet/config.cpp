// How wavelet's ops choose between their kernels and the reference: pure functions of the problem, with no torch in sight.
// The problem is haar with one level, with factors for each pair; anything else is the reference's.
#include "wavelet/haar.h"
#include "wavelet/wavelet_cpu.h"

namespace wavelet {
namespace {

// Pairs times rank up to which the transform is folded into the factors: their products then take twice the arithmetic of
// those with halves of x, and no pass over x and y, which takes longer in bf16. Measured at 512 x 4096: in fp32 forward,
// with 32 numbers 0.7 ms more arithmetic and 1.35 ms less for passes, with 64 it is 2.9; in bf16 the passes take 7 ms, the
// arithmetic with 32, 64 and 128 numbers 1.6, 4 to 11, and 14. Where pairs cross from half to half there is nothing else.
constexpr int64_t kFoldedFloats = 32, kFoldedBf16 = 64, kFoldedCrossing = 512;
constexpr int64_t kCrossingShare = 4;  // times as many as there are rows: above, folding takes longer than the reference

bool has_cpu_kernels(const Problem& p) {
  const bool has_type = p.dtype == Dtype::float32 || p.dtype == Dtype::bfloat16;
  return has_type && p.r >= 1 && (p.pairs == 1 || p.pairs == 2 || p.pairs == 4);
}

// Of more rows than decode takes, and of gradients.
CpuPath path_of_many(const Problem& p) {
  const bool crosses = p.pairs == 4;
  const int64_t most = crosses ? kFoldedCrossing : p.dtype == Dtype::float32 ? kFoldedFloats : kFoldedBf16;
  if (p.r <= most / p.pairs && p.pairs * p.r <= (crosses ? kCrossingShare : 1) * p.m) return CpuPath::folded;
  return crosses ? CpuPath::reference : CpuPath::halves;
}

Described in_words(CpuPath path, const Problem& p) {
  switch (path) {
    case CpuPath::empty: return {{"path", "empty"}};
    case CpuPath::decode: return {{"path", "decode"}, {"level", name_of(p.level)}};
    case CpuPath::folded: return {{"path", "folded"}, {"middle", p.pairs * p.r}};
    case CpuPath::halves: return {{"path", "halves"}, {"middle", p.pairs * p.r}};
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
  return path_of_many(p);
}

CpuPath choose_cpu_backward_path(const Problem& p) {
  if (p.m == 0) return CpuPath::empty;
  return has_cpu_kernels(p) ? path_of_many(p) : CpuPath::reference;
}

}  // namespace wavelet
