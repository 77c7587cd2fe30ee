// What the host side and the kernels share of several low_rank members with one input: y_i = (x v_i^T) u_i^T + bias_i, each
// x v_i^T rounded once, or for SwiGLU the one y = silu(y_gate) * y_up, rounded once.
#pragma once

#include <cstdint>

#include "host/op_table.h"
#include "low_rank/decode_group_layout.h"

namespace low_rank {

// Elements are bf16 or fp16; x, v and u have 16-byte aligned rows.
struct GroupMember {
  const uint16_t* v;     // [r, k]
  const uint16_t* u;     // [n, r]
  const uint16_t* bias;  // [n] or null
  uint16_t* y;           // [m, n]; of SwiGLU the gate's is the result, and the up's is not used
  int n, r;
};

struct GroupParams {
  const uint16_t* x;                  // [m, k]
  GroupMember members[kMostMembers];  // for SwiGLU gate and up, of one n
  float* partials;                    // workspace, as many as the plan says
  uint64_t* counter;                  // the barrier's: see DecodeParams
  int count, m, k;
  int splits, tiles, row_of_h, prefetch;  // of the plan
  GroupTable table;                       // of the plan
};

// The plan for a problem's dtype, alignment and GPU; its n and r are not read. token_tiles 0: not with our kernels.
GroupPlan choose_group(const Problem& problem, int count, const int64_t* n, const int64_t* r, bool is_swiglu);

// Returns null, or what CUDA says is wrong. Fills in what comes from the plan.
const char* launch_group(const GroupPlan& plan, GroupParams params, Dtype dtype, void* stream);

}  // namespace low_rank
