// What the host side and the backward kernels of monarch share: gradients of y = blocks of (x v^T), permuted, u^T + bias.
#pragma once

#include <cstdint>

#include "host/op_table.h"
#include "monarch/backward_layout.h"

namespace monarch {

// Elements are bf16 or fp16, rows 16-byte aligned. What `needs` does not ask for is neither read nor written: no pointer has
// to be there then.
struct BackwardOperands {
  const uint16_t* dy;  // [m, n]
  const uint16_t* x;   // [m, k], for dv; and for du without h
  const uint16_t* h;   // [b_out, m, b_in r], for du: the rounded middle; or null: it is made
  const uint16_t* v;   // [b_in, r b_out, p], for dx; and for du without h
  const uint16_t* u;   // [b_out, s, b_in r], for dx and dv
  uint16_t* dz;        // [b_in, m, b_out r], for dx and dv: workspace
  uint16_t* made_h;    // like h, for du without it: workspace
  float* partials;     // workspace, as many as the plan says
  uint16_t* dx;        // [m, k]
  uint16_t* dv;        // like v
  uint16_t* du;        // like u
  uint16_t* db;        // [n]
  Sizes sizes;
  int needs;  // Needs
};

// Returns null, or what CUDA says is wrong.
const char* launch_backward(const BackwardPlan& plan, const BackwardOperands& operands, Dtype dtype, int sm_count,
                            void* stream);

// The plan for a problem's dtype, alignment and GPU; not covered: the library.
BackwardPlan choose_backward(const Problem& problem, int needs);

}  // namespace monarch
