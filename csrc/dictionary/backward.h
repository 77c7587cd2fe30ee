// What the host side and the kernels of dictionary's gradients share: those of y = h s^T are sparse24's, over the bitmap of
// s (sparse24/backward.h); the dense products with the dictionary are the library's.
#pragma once

#include <cstdint>

#include "host/op_table.h"
#include "sparse24/backward.h"

namespace dictionary {

enum BackwardNeeds { kNeedsDx = 1, kNeedsDd = 2, kNeedsDvalues = 4, kNeedsDb = 16 };

// Of the product with s alone: dh for dx and dd.
constexpr int sparse_needs(int needs) {
  return (needs & (kNeedsDx | kNeedsDd) ? sparse24::kNeedsDx : 0) | (needs & kNeedsDvalues ? sparse24::kNeedsDvalues : 0) |
         (needs & kNeedsDb ? sparse24::kNeedsDb : 0);
}

// The plan of a call, with tile 0 where the library does it: see sparse24's.
inline sparse24::BackwardPlan choose_backward(const Problem& p, int needs) {
  if (!sparse24::has_backward_kernels(p)) return {};
  return sparse24::plan_backward(p.m, p.n, p.r, p.b_out, p.b_in, p.kept, 0, 0, sparse_needs(needs), p.sm_count);
}

}  // namespace dictionary
