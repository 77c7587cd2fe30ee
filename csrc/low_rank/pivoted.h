// What the host side and the kernels share of the pivoted form of low_rank (PIFA): h = x v^T, rounded, is y at the pivot
// columns, and h c^T is y at all others, in their order; bias is added to either.
#pragma once

#include <cstdint>

#include "host/op_table.h"
#include "low_rank/decode_pivoted_layout.h"

namespace low_rank {

struct PivotedParams {
  const uint16_t* x;      // [m, k], like v and c with 16-byte aligned rows
  const uint16_t* v;      // [r, k]: the pivot rows of the dense weight [n, k]
  const uint16_t* c;      // [n - r, r]: what the other rows are made of them
  const int64_t* pivots;  // [r], strictly ascending in [0, n), 16-byte aligned
  const uint16_t* bias;   // [n] or null
  float* partials;        // [splits, m, r], workspace
  uint16_t* h;            // [m, r] or null, where nobody wants it
  uint16_t* y;            // [m, n]
  uint64_t* counter;      // the barrier's: see DecodeParams
  int m, n, k, r;
  int splits, tiles, prefetch;  // of the plan
};

// The plan for a problem's dtype, alignment and GPU. token_tiles 0: not with our kernel.
DecodePlan choose_pivoted(const Problem& problem);

// Returns null, or what CUDA says is wrong. Fills in what comes from the plan.
const char* launch_pivoted(const DecodePlan& plan, PivotedParams params, Dtype dtype, void* stream);

}  // namespace low_rank
