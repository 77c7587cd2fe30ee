// How the gradients of monarch choose between their own kernels and the library on a GPU: a pure function of the problem,
// with no torch in sight.
#include "host/gpu.h"
#include "monarch/backward.h"

namespace monarch {
namespace {

constexpr int64_t kBackwardRows = 64;    // m from which
constexpr int64_t kBackwardBlock = 512;  // and inputs, outputs and ranks of a block up to which the kernels are used

Described describe(const Problem& p) {
  if (p.m == 0) return {{"path", "empty"}};
  const BackwardPlan plan = choose_backward(p, kNeedsDx | kNeedsDv | kNeedsDu | kNeedsDb);
  if (!plan.is_covered) return {{"path", "library"}};
  Described all{{"path", "kernels"}};
  const auto add = [&](const std::string& which, const ProductPlan& one) {
    all.insert(all.end(), {{which + "_group", one.group}, {which + "_grid", one.grid}, {which + "_splits", one.splits}});
  };
  add("dz", plan.dz);
  add("dx", plan.dx);
  add("dv", plan.dv);
  add("du", plan.du);
  all.insert(all.end(), {{"gathers", plan.dz.gathers ? 1 : 0}, {"partials", plan.partials}});
  return all;
}

const RegisterOp registered({"monarch_backward", {}, compiled_cuda_archs(), &describe});

}  // namespace

// The kernels have NEVER RUN ON A GPU, and no speed is claimed: until somebody has measured, they take the shapes where
// arithmetic is not all there is (with larger blocks it is, and the library's products are hard to beat in spite of the
// copies around them) and where a tile is not mostly empty.
BackwardPlan choose_backward(const Problem& p, int needs) {
  const bool is_half = p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16;
  if (!is_half || p.device != Device::cuda || !p.is_aligned || p.m < kBackwardRows || p.b_in < 1 || p.b_out < 1) return {};
  for (const int64_t size : {device::ceil_div(p.k, p.b_in), device::ceil_div(p.n, p.b_out), p.b_in * p.r, p.b_out * p.r}) {
    if (size > kBackwardBlock) return {};
  }
  return plan_backward(p.m, p.n, p.k, p.b_in, p.b_out, p.r, p.interleave, needs, p.sm_count, shared_memory_of(p.arch));
}

}  // namespace monarch
