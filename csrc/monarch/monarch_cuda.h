// What the host side and the kernel of monarch on a GPU share: y = blocks of (x v^T), permuted, u^T + bias.
#pragma once

#include <cstdint>

#include "host/op_table.h"
#include "monarch/batched_layout.h"
#include "monarch/stationary_layout.h"

namespace monarch {

// The plans for a problem's dtype, alignment and GPU. Clusters first; of no tokens: the batched products; of none either: the
// library.
StationaryPlan choose_stationary(const Problem& problem);
MonarchPlan choose_monarch(const Problem& problem);

// How choose_config tells of a GPU's.
Described describe_monarch_cuda(const Problem& problem);

struct MonarchOperands {
  const uint16_t* x;     // [m, k]
  const uint16_t* v;     // [b_in, r b_out, p]
  const uint16_t* u;     // [b_out, s, b_in r]
  const uint16_t* bias;  // [n] or null, at any address
  uint16_t* h;           // [b_out, m, b_in r], written before it is read; of launch_stationary or null: not wanted
  uint16_t* y;           // [m, n]
  Sizes sizes;
};

// One launch. Returns null, or what CUDA says is wrong.
const char* launch_stationary(const StationaryPlan& plan, const MonarchOperands& operands, Dtype dtype, void* stream);

// Two launches. Returns null, or what CUDA says is wrong.
const char* launch_monarch(const MonarchPlan& plan, const MonarchOperands& operands, Dtype dtype, void* stream);

// The first of them alone: h of x and v, the rounded middle.
const char* launch_middle(const Plan& plan, const MonarchOperands& operands, Dtype dtype, void* stream);

}  // namespace monarch
