// What the host side and the kernel of dictionary on a GPU share, for one block: y = (x d^T) s^T + bias.
#pragma once

#include <cstdint>

#include "dictionary/forward_layout.h"
#include "host/op_table.h"

namespace dictionary {

// The plan for a problem's blocks, dtype, alignment and GPU; of no tokens: the library.
ForwardPlan choose_forward(const Problem& problem);

// How choose_config tells of a GPU's.
Described describe_dictionary_cuda(const Problem& problem);

// Elements are bf16 or fp16; x, v, values, mask start at multiples of 16 bytes. What low_rank has too is called as there.
struct ForwardParams {
  const uint16_t* x;       // [m, k]
  const uint16_t* v;       // [r, k], the dictionary's atoms
  const uint16_t* values;  // [n, stored], the coefficients that are kept
  const uint32_t* mask;    // [n, ceil(r / 32)], `stored` of each row's bits set
  const uint16_t* bias;    // [n] or null, at any address
  uint16_t* h;             // [m, r] or null: not wanted
  uint16_t* y;             // [m, n]
  int m, n, k, r, stored;
  float* partials;    // [splits, m, r], workspace
  uint64_t* counter;  // the barrier's: used by no grid of another size, and by none at the same time
  int splits, at_once, buffers;  // of the plan
};

// One launch. Returns null, or what CUDA says is wrong. Fills in what comes from the plan.
const char* launch_forward(const ForwardPlan& plan, ForwardParams params, Dtype dtype, void* stream);

}  // namespace dictionary
