// How monarch chooses between its kernel and the library on a GPU: a pure function of the problem, with no torch in sight.
#include "host/gpu.h"
#include "monarch/monarch_cuda.h"

namespace monarch {
// Where clusters can hold both factors. Not measured on a GPU yet: one launch, and the middle stays in shared memory, where the
// batched products have two and bring it to memory and back.
StationaryPlan choose_stationary(const Problem& p) {
  const bool has_type = p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16;
  if (!has_type || !p.is_aligned || p.arch != 90 || !has_sm90_kernels()) return StationaryPlan();
  return plan_stationary(p.m, p.n, p.k, p.b_in, p.b_out, p.r, p.interleave, p.sm_count, shared_memory_of(p.arch));
}

// Not measured on a GPU yet: our kernel wherever it can, since the library's products need two permuted copies, of the
// middle and of y, that it does not.
MonarchPlan choose_monarch(const Problem& p) {
  if ((p.dtype != Dtype::bfloat16 && p.dtype != Dtype::float16) || !p.is_aligned) return MonarchPlan();
  return plan_monarch(p.m, p.n, p.k, p.b_in, p.b_out, p.r, p.interleave, p.sm_count, shared_memory_of(p.arch));
}

Described describe_monarch_cuda(const Problem& p) {
  if (p.m == 0) return {{"path", "empty"}};
  if (const StationaryPlan plan = choose_stationary(p); plan.tokens > 0) {
    return {{"path", "stationary"},       {"tokens", plan.tokens},         {"together", plan.together},
            {"middles", plan.middles},    {"inputs", plan.inputs},         {"tiles", plan.tiles},
            {"clusters", plan.clusters},  {"smem_bytes", plan.smem_bytes}};
  }
  const MonarchPlan plan = choose_monarch(p);
  if (plan.first.tokens == 0) return {{"path", "library"}};
  Described all{{"path", "batched"}};
  const auto add = [&](const std::string& which, const Plan& one) {
    all.insert(all.end(), {{which + "_tokens", one.tokens},
                           {which + "_columns", one.columns},
                           {which + "_group", one.group},
                           {which + "_grid", one.grid},
                           {which + "_smem_bytes", one.smem_bytes},
                           {which + "_stores", one.is_wide ? "16 bytes" : "elements"}});
  };
  add("first", plan.first);
  add("second", plan.second);
  return all;
}

}  // namespace monarch
