// What the host side and the kernels of sparse24 on a GPU share.   x [m, k]   values [n, k / 2]   mask [n, ceil(k / 32)]
#pragma once

#include <cstdint>

#include "host/op_table.h"
#include "sparse24/forward_layout.h"
#include "sparse24/prefill_layout.h"

namespace sparse24 {

// The plan for a problem's pattern, dtype, alignment and GPU; of no tokens: the library.
ForwardPlan choose_forward(const Problem& problem);

// The same where there are more tokens than that covers; of no rows: the library.
PrefillPlan choose_prefill(const Problem& problem);

// How choose_config tells of a GPU's.
Described describe_sparse24_cuda(const Problem& problem);

// Elements are bf16 or fp16; x, values start at multiples of 16 bytes, mask of 8; y, too, of 16.
struct ForwardOperands {
  const uint16_t* x;       // [m, k]
  const uint16_t* values;  // [n, k / 2]
  const uint32_t* mask;    // [n, ceil(k / 32)], two of each four bits set
  const uint16_t* bias;    // [n] or null, at any address
  uint16_t* y;             // [m, n]
  int m, n, k;
};

// Workspace of more than one split; else both are null.
struct SplitSums {
  float* partials;    // [splits, m, partial_stride], 16-byte aligned
  uint64_t* counter;  // the barrier's: used by no grid of another size, and by none at the same time
};

// One launch. Returns null, or what CUDA says is wrong.
const char* launch_forward(const ForwardPlan& plan, const ForwardOperands& operands, const SplitSums& sums, Dtype dtype,
                           void* stream);
const char* launch_prefill(const PrefillPlan& plan, const ForwardOperands& operands, Dtype dtype, void* stream);

}  // namespace sparse24
