// How the gradients of dictionary choose between their own kernels and the library on a GPU, in words.
#include "dictionary/backward.h"

namespace dictionary {
namespace {

Described describe(const Problem& p) {
  if (p.m == 0) return {{"path", "empty"}};
  const sparse24::BackwardPlan plan = choose_backward(p, kNeedsDx | kNeedsDd | kNeedsDvalues | kNeedsDb);
  if (plan.tile == 0) return {{"path", "library"}};
  return {{"path", "kernels"},
          {"tile", plan.tile},
          {"dh_splits", plan.dx_splits},
          {"values_splits", plan.values_splits},
          {"starts", plan.starts},
          {"partials", plan.partials}};
}

const RegisterOp registered({"dictionary_backward", {}, compiled_cuda_archs(), &describe});

}  // namespace
}  // namespace dictionary
