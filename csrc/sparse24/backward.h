// What the host side and the backward kernels of a sparse factor share: gradients of y = x w^T by dy [m, n], of w [n, k]
// with a bitmap; and of a dictionary's y = h s^T, which is the same in blocks.
#pragma once

#include <cstdint>

#include "host/op_table.h"
#include "sparse24/backward_layout.h"

namespace sparse24 {

// Elements are bf16 or fp16, starts 16-byte aligned. What `needs` does not ask for is neither read nor written: no pointer
// has to be there then.
struct BackwardOperands {
  const uint16_t* dy;      // [m, n]
  const uint16_t* x;       // [p, m, q columns], for dvalues
  const uint16_t* values;  // [n, q stored], for dx
  const uint32_t* mask;    // [n, q words], for dx and dvalues
  int32_t* starts;         // workspace, as many as the plan says
  float* partials;         // the same
  uint16_t* dx;            // [p, m, q columns]
  uint16_t* dvalues;       // [n, q stored]
  uint16_t* db;            // [n]
  SparseSizes sizes;
  int needs;  // BackwardNeeds
};

// Returns null, or what CUDA says is wrong.
const char* launch_backward(const BackwardPlan& plan, const BackwardOperands& operands, Dtype dtype, int sm_count,
                            void* stream);

constexpr int64_t kBackwardRows = 64;  // m from which the kernels are used

// The kernels have NEVER RUN ON A GPU, and no speed is claimed: until somebody has measured, they take the shapes where a
// tile is not mostly empty, because the library's products need the factor and its gradient dense.
inline bool has_backward_kernels(const Problem& p) {
  return (p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16) && p.device == Device::cuda && p.arch >= 80 &&
         p.arch <= 90 && p.is_aligned && p.m >= kBackwardRows;
}

// The plan of a call, with tile 0 where the library does it.
inline BackwardPlan choose_backward(const Problem& p, int needs) {
  if (!has_backward_kernels(p) || p.kept < 1 || p.group < p.kept || p.k % p.group) return {};
  return plan_backward(p.m, p.n, p.k, 1, 1, p.k / p.group * p.kept, p.kept, p.group, needs, p.sm_count);
}

}  // namespace sparse24
