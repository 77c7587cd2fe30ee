// How the gradients of sparse24 choose between their own kernels and the library on a GPU, in words.
#include "sparse24/backward.h"

namespace sparse24 {
namespace {

Described describe(const Problem& p) {
  if (p.m == 0) return {{"path", "empty"}};
  const BackwardPlan plan = choose_backward(p, kNeedsDx | kNeedsDvalues | kNeedsDb);
  if (plan.tile == 0) return {{"path", "library"}};
  return {{"path", "kernels"},
          {"tile", plan.tile},
          {"dx_splits", plan.dx_splits},
          {"values_splits", plan.values_splits},
          {"starts", plan.starts},
          {"partials", plan.partials}};
}

const RegisterOp registered({"sparse24_backward", {}, compiled_cuda_archs(), &describe});

}  // namespace
}  // namespace sparse24
