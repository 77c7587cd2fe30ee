// What the host side and the kernel of monarch on a GPU share: y = blocks of (x v^T), permuted, u^T + bias.
#pragma once

#include <cstdint>

#include "host/op_table.h"
#include "monarch/batched_layout.h"

namespace monarch {

// The plan for a problem's dtype, alignment and GPU; of no tokens: the library.
MonarchPlan choose_monarch(const Problem& problem);

// How choose_config tells of a GPU's.
Described describe_monarch_cuda(const Problem& problem);

struct MonarchOperands {
  const uint16_t* x;     // [m, k]
  const uint16_t* v;     // [b_in, r b_out, p]
  const uint16_t* u;     // [b_out, s, b_in r]
  const uint16_t* bias;  // [n] or null, at any address
  uint16_t* h;           // [b_out, m, b_in r], written before it is read
  uint16_t* y;           // [m, n]
  Sizes sizes;
};

// Two launches. Returns null, or what CUDA says is wrong.
const char* launch_monarch(const MonarchPlan& plan, const MonarchOperands& operands, Dtype dtype, void* stream);

// The first of them alone: h of x and v, the rounded middle.
const char* launch_middle(const Plan& plan, const MonarchOperands& operands, Dtype dtype, void* stream);

}  // namespace monarch
