// How groups of low_rank members and the pivoted form choose between their kernel and the library. No torch in sight.
#include "low_rank/group.h"
#include "low_rank/low_rank.h"
#include "low_rank/pivoted.h"

namespace low_rank {
namespace {

// Not measured on a GPU yet: as for low_rank alone, our kernel where a pass over the weights is all there is to do.
bool has_decode(const Problem& p) {
  return p.device == Device::cuda && (p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16) && p.is_aligned;
}

}  // namespace

GroupPlan choose_group(const Problem& p, int count, const int64_t* n, const int64_t* r, bool is_swiglu) {
  if (!has_decode(p)) return GroupPlan();
  return plan_group(p.m, p.k, count, n, r, is_swiglu, p.sm_count, shared_memory_of(p.arch));
}

DecodePlan choose_pivoted(const Problem& p) {
  if (!has_decode(p)) return DecodePlan();
  return plan_pivoted(p.m, p.n, p.k, p.r, p.sm_count, shared_memory_of(p.arch));
}

}  // namespace low_rank
