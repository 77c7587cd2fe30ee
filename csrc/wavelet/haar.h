// What the host side and the kernels of wavelet on a GPU share: haar, one level, pairs with factors of their own, no gains.
//   x [m, k]   v [r, pairs k / 2]   u [pairs n / 2, r]   h [pairs, m, r]   y [m, n]
#pragma once

#include <cstdint>

#include "host/op_table.h"
#include "wavelet/haar_layout.h"

namespace wavelet {

// Elements are bf16 or fp16, starts 16-byte aligned.
struct ForwardOperands {
  const uint16_t* x;  // [m, k]
  const uint16_t* v;  // [r, pairs k / 2]
  const uint16_t* u;  // [pairs n / 2, r]
  uint16_t* h;        // [pairs, m, r] or null: not wanted
  uint16_t* y;        // [m, n] or null: only h is
  float* partials;    // workspace, as many as the plan says
  int m, n, k, r, pairs;
  float scale;
};

// What `needs` does not ask for is neither read nor written: no pointer has to be there then.
struct BackwardOperands {
  const uint16_t* dy;  // [m, n]
  const uint16_t* x;   // [m, k], for dv
  const uint16_t* h;   // [pairs, m, r], for du
  const uint16_t* v;   // [r, pairs k / 2], for dx
  const uint16_t* u;   // [pairs n / 2, r], for dx and dv
  uint16_t* dh;        // [pairs, m, r], for dv: workspace
  float* partials;     // workspace, as many as the plan says
  uint16_t* dx;        // [m, k]
  uint16_t* dv;        // [r, pairs k / 2]
  uint16_t* du;        // [pairs n / 2, r]
  int m, n, k, r, pairs;
  float scale;
  int needs;  // BackwardNeeds
};

// Return null, or what CUDA says is wrong.
const char* launch_forward(const ForwardPlan& plan, const ForwardOperands& operands, Dtype dtype, void* stream);
const char* launch_backward(const BackwardPlan& plan, const BackwardOperands& operands, Dtype dtype, int sm_count,
                            void* stream);

// The gradients' first half: dh, and dx where there is one, from dy by u and v. For launch_backward.
const char* launch_input_gradient(const ForwardPlan& plan, const BackwardOperands& operands, Dtype dtype, void* stream);

// The plans for a problem's dtype, alignment and GPU; of no splits: the library.
ForwardPlan choose_forward(const Problem& problem);
BackwardPlan choose_backward(const Problem& problem, int needs);

// How choose_config tells of a GPU's.
Described describe_forward_cuda(const Problem& problem);
Described describe_backward_cuda(const Problem& problem);

}  // namespace wavelet
