// How dictionary chooses between its kernel and the library on a GPU: a pure function of the problem, no torch in sight.
#include "dictionary/dictionary_cuda.h"
#include "host/gpu.h"

namespace dictionary {

// Not measured on a GPU yet: our kernel wherever it can, since the library has to write the coefficients out first.
ForwardPlan choose_forward(const Problem& p) {
  const bool has_type = p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16;
  if (!has_type || !p.is_aligned || p.b_in != 1 || p.b_out != 1) return ForwardPlan();
  return plan_forward(p.m, p.n, p.k, p.r, p.kept, p.sm_count, shared_memory_of(p.arch));
}

Described describe_dictionary_cuda(const Problem& p) {
  if (p.m == 0) return {{"path", "empty"}};
  const ForwardPlan plan = choose_forward(p);
  if (plan.token_tiles == 0) return {{"path", "library"}};
  return {{"path", "decode"},
          {"token_tiles", plan.token_tiles},
          {"splits", plan.splits},
          {"grid", plan.grid},
          {"at_once", plan.at_once},
          {"buffers", plan.buffers},
          {"smem_bytes", plan.smem_bytes}};
}

}  // namespace dictionary
