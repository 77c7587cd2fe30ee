// How sparse24 chooses between its kernels and the library on a GPU: a pure function of the problem, with no torch in sight.
#include "host/gpu.h"
#include "sparse24/sparse24_cuda.h"

namespace sparse24 {

namespace {

bool has_kernels(const Problem& p) {
  const bool has_type = p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16;
  return has_type && p.is_aligned && p.kept == 2 && p.group == 4;
}

}  // namespace

// Not measured on a GPU yet: our kernels wherever they can, since the library has to write the weight out first. Of many
// tokens that is a small part of the time, and on an sm_90 the library has the faster instruction (wgmma): what to measure
// first.
ForwardPlan choose_forward(const Problem& p) {
  if (!has_kernels(p)) return ForwardPlan();
  return plan_forward(p.m, p.n, p.k, p.sm_count, shared_memory_of(p.arch));
}

PrefillPlan choose_prefill(const Problem& p) {
  if (!has_kernels(p) || p.m <= kForwardTokens) return PrefillPlan();
  return plan_prefill(p.m, p.n, p.k, p.sm_count, shared_memory_of(p.arch));
}

Described describe_sparse24_cuda(const Problem& p) {
  if (p.m == 0) return {{"path", "empty"}};
  if (const PrefillPlan plan = choose_prefill(p); plan.rows > 0) {
    return {{"path", "prefill"}, {"rows", plan.rows}, {"tokens", plan.tokens}, {"grid", plan.grid},
            {"smem_bytes", plan.smem_bytes}};
  }
  const ForwardPlan plan = choose_forward(p);
  if (plan.token_tiles == 0) return {{"path", "library"}};
  return {{"path", "decode"},
          {"token_tiles", plan.token_tiles},
          {"splits", plan.splits},
          {"grid", plan.grid},
          {"smem_bytes", plan.smem_bytes}};
}

}  // namespace sparse24
