// How sparse24 chooses between its kernel and the library on a GPU: a pure function of the problem, with no torch in sight.
#include "host/gpu.h"
#include "sparse24/sparse24_cuda.h"

namespace sparse24 {

// Not measured on a GPU yet: our kernel wherever it can, since the library has to write the weight out first.
ForwardPlan choose_forward(const Problem& p) {
  const bool has_type = p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16;
  if (!has_type || !p.is_aligned || p.kept != 2 || p.group != 4) return ForwardPlan();
  return plan_forward(p.m, p.n, p.k, p.sm_count, shared_memory_of(p.arch));
}

Described describe_sparse24_cuda(const Problem& p) {
  if (p.m == 0) return {{"path", "empty"}};
  const ForwardPlan plan = choose_forward(p);
  if (plan.token_tiles == 0) return {{"path", "library"}};
  return {{"path", "decode"},
          {"token_tiles", plan.token_tiles},
          {"splits", plan.splits},
          {"grid", plan.grid},
          {"smem_bytes", plan.smem_bytes}};
}

}  // namespace sparse24
