// How wavelet's ops choose between kernels and the reference on a GPU: pure functions of the problem, no torch in sight.
#include "host/gpu.h"
#include "wavelet/haar.h"

namespace wavelet {

namespace {

bool has_kernels(const Problem& p) {
  const bool has_type = p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16;
  if (!has_type || !p.is_aligned || p.r < 1 || p.r > kMaxMiddle || p.pairs < 1 || p.pairs > 4) return false;
  const int r = static_cast<int>(p.r), pairs = static_cast<int>(p.pairs);
  return larger(output_smem_bytes(r, pairs, true), output_smem_bytes(r, pairs, false)) <= shared_memory_of(p.arch);
}

}  // namespace

// Not measured on a GPU yet: our kernels wherever they can, since the reference is some thirty launches and as many passes.
ForwardPlan choose_forward(const Problem& p) {
  return has_kernels(p) ? plan_forward(p.m, p.n, p.k, p.r, p.pairs, p.sm_count) : ForwardPlan();
}

BackwardPlan choose_backward(const Problem& p, int needs) {
  return has_kernels(p) ? plan_backward(p.m, p.n, p.k, p.r, p.pairs, needs, p.sm_count) : BackwardPlan();
}

Described describe_forward_cuda(const Problem& p) {
  if (p.m == 0) return {{"path", "empty"}};
  const ForwardPlan plan = choose_forward(p);
  if (plan.splits == 0) return {{"path", "reference"}};
  return {{"path", "kernels"}, {"splits", plan.splits}, {"parts", plan.parts}, {"partials", plan.partials}};
}

Described describe_backward_cuda(const Problem& p) {
  if (p.m == 0) return {{"path", "empty"}};
  const BackwardPlan plan = choose_backward(p, kNeedsDx | kNeedsDv | kNeedsDu);
  if (plan.weight_splits == 0) return {{"path", "reference"}};
  return {{"path", "kernels"},
          {"dx_splits", plan.dx.splits},
          {"dx_parts", plan.dx.parts},
          {"weight_splits", plan.weight_splits},
          {"partials", plan.partials}};
}

}  // namespace wavelet
