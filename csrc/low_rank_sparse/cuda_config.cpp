// How low_rank_sparse chooses between its kernels and the library on a GPU: a pure function of the problem, with no torch in
// sight.
#include "host/gpu.h"
#include "low_rank_sparse/low_rank_sparse_cuda.h"

namespace low_rank_sparse {

namespace {

bool has_type(const Problem& p) { return p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16; }

}  // namespace

// Not measured on a GPU yet. The first plan is decode wherever it can: it reads v, u and S once, and no more. Of more rows
// the weight is made, and multiplied by the library: an entry is a multiply-add for each row on float units, which do less
// than a tenth of what tensor cores do, so that from some hundreds of rows on the weight costs less. What is between, 17 rows
// and more, is what to measure first.
DecodePlan choose_decode(const Problem& p) {
  if (!has_type(p) || !p.is_aligned || p.m > kDecodeTokens) return DecodePlan();
  return plan_decode(p.m, p.n, p.k, p.r, p.entries, p.sm_count, shared_memory_of(p.arch));
}

// Shared memory of other GPUs than those this build has machine code for: see shared_memory_of.
MaterializePlan choose_materialize(const Problem& p) {
  if (!has_type(p) || !p.is_aligned || shared_memory_of(p.arch) < kTileSmemBytes) return MaterializePlan();
  return plan_materialize(p.n, p.k, p.r, p.entries, p.sm_count);
}

BackwardPlan choose_backward(const Problem& p, int needs) {
  const bool has_kernel = has_type(p) && p.is_aligned && shared_memory_of(p.arch) >= kTileSmemBytes;
  if (!has_kernel || p.m < kBackwardRows) return {};
  return plan_backward(p.m, p.n, p.k, p.entries, needs, p.sm_count);
}

Described describe_low_rank_sparse_cuda(const Problem& p) {
  if (p.m == 0) return {{"path", "empty"}};
  if (const DecodePlan plan = choose_decode(p); plan.token_tiles > 0) {
    return {{"path", "decode"},
            {"token_tiles", plan.token_tiles},
            {"splits", plan.splits},
            {"grid", plan.grid},
            {"tokens", plan.tokens},
            {"room", plan.room},
            {"prefetch", plan.prefetch},
            {"smem_bytes", plan.smem_bytes}};
  }
  if (const MaterializePlan plan = choose_materialize(p); plan.tile > 0)
    return {{"path", "materialize"}, {"tile", plan.tile}, {"grid", plan.grid}};
  return {{"path", "library"}};
}

Described describe_low_rank_sparse_backward_cuda(const Problem& p) {
  if (p.m == 0) return {{"path", "empty"}};
  const BackwardPlan plan = choose_backward(p, kSelectsValues | kSelectsDb);
  if (plan.tile == 0) return {{"path", "library"}};
  return {{"path", "kernels"},
          {"tile", plan.tile},
          {"splits", plan.splits},
          {"partials", plan.partials},
          {"weight_tile", choose_materialize(p).tile}};
}

}  // namespace low_rank_sparse
