// What the host side and the selecting kernel of low_rank_sparse share: of y = x s^T + bias, by dy [m, n], the gradients of
// what s stores and of the bias.
#pragma once

#include <cstdint>

#include "host/op_table.h"
#include "low_rank_sparse/backward_layout.h"

namespace low_rank_sparse {

// Elements are bf16 or fp16; dy, x, dvalues and db start at multiples of 16 bytes. What `needs` does not ask for is neither
// read nor written: no pointer has to be there then, and of db alone no support.
struct BackwardOperands {
  const uint16_t* dy;  // [m, n]
  const uint16_t* x;   // [m, k], for dvalues
  Support s;
  float* partials;    // workspace, as many as the plan says
  uint16_t* dvalues;  // [padded_entries]: behind the entries anything
  uint16_t* db;       // [n]
  int m;
  int needs;  // SelectNeeds
};

// Returns null, or what CUDA says is wrong.
const char* launch_backward(const BackwardPlan& plan, const BackwardOperands& operands, Dtype dtype, int sm_count,
                            void* stream);

constexpr int64_t kBackwardRows = 64;  // m from which the kernel is used

// The plan of a call, with tile 0 where the library does it. The kernel has NEVER RUN ON A GPU, and no speed is claimed:
// until somebody has measured, it takes the shapes where a tile is not mostly empty, because the library would make the
// whole dense gradient and throw all but a few hundredths of it away.
BackwardPlan choose_backward(const Problem& problem, int needs);

}  // namespace low_rank_sparse
