// How groups of low_rank members and the pivoted form choose between their kernel and other ways. No torch in sight.
#include "low_rank/group.h"
#include "low_rank/low_rank.h"
#include "low_rank/pivoted.h"

namespace low_rank {
namespace {

// Not measured on a GPU yet: as for low_rank alone, our kernel where a pass over the weights is all there is to do.
bool has_decode(const Problem& p) {
  return p.device == Device::cuda && (p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16) && p.is_aligned;
}

// instead: what a call does without the kernel, by the name that it is counted under.
template <class Plan>
Described described(const Problem& p, const Plan& plan, const char* instead) {
  if (p.m == 0) return {{"path", "empty"}};
  if (plan.token_tiles == 0) return {{"path", instead}};
  return {{"path", "decode"},     {"token_tiles", plan.token_tiles}, {"splits", plan.splits},
          {"grid", plan.grid},    {"tiles", plan.tiles},             {"prefetch", plan.prefetch},
          {"smem_bytes", plan.smem_bytes}};
}

GroupPlan of_equal_members(const Problem& p, int count, bool is_swiglu) {
  const int64_t n[kMostMembers] = {p.n, p.n, p.n, p.n}, r[kMostMembers] = {p.r, p.r, p.r, p.r};
  return choose_group(p, count, n, r, is_swiglu);
}

Described describe_group(const Problem& p) {
  if (p.device == Device::cpu) return {{"path", "members"}, {"level", name_of(p.level)}};  // each goes low_rank's way
  return described(p, of_equal_members(p, p.members, false), "members");
}

Described describe_swiglu(const Problem& p) {
  return p.device == Device::cpu ? describe_group(p) : described(p, of_equal_members(p, 2, true), "members");
}

// On a CPU the path is that of the products, which are low_rank's.
Described describe_pivoted(const Problem& p) {
  if (p.device == Device::cuda) return described(p, choose_pivoted(p), "library");
  const bool is_decode = choose_config(p).path == Path::decode;
  return {{"path", p.m == 0 ? "empty" : is_decode ? "decode" : "library"}, {"level", name_of(p.level)}};
}

const RegisterOp registered_group({"low_rank_group", compiled_cpu_levels(), compiled_cuda_archs(), &describe_group});
const RegisterOp registered_swiglu({"low_rank_swiglu", compiled_cpu_levels(), compiled_cuda_archs(), &describe_swiglu});
const RegisterOp registered_pivoted({"low_rank_pivoted", compiled_cpu_levels(), compiled_cuda_archs(), &describe_pivoted});

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
