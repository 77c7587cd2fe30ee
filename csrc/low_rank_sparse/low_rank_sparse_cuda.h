// What the host side and the kernels of low_rank_sparse on a GPU share: y = x (scale u v + s)^T + bias.
//   x [m, k]   v [r, k]   u [n, r]   s: values [nnz], starts [n + 1], columns [nnz]   y [m, n]
#pragma once

#include <cstdint>

#include "host/op_table.h"
#include "low_rank_sparse/backward.h"
#include "low_rank_sparse/decode_layout.h"
#include "low_rank_sparse/materialize_layout.h"

namespace low_rank_sparse {

// The plan of decode for a problem's dtype, alignment and GPU; of no tokens: not with this kernel.
DecodePlan choose_decode(const Problem& problem);

// The same of the kernel that makes the weight, whatever m is; of no tiles: the library makes it.
MaterializePlan choose_materialize(const Problem& problem);

// How choose_config tells of a GPU's.
Described describe_low_rank_sparse_cuda(const Problem& problem);
Described describe_low_rank_sparse_backward_cuda(const Problem& problem);

// Elements are bf16 or fp16; x, v, u, values and columns start at multiples of 16 bytes. What low_rank has too is called as
// there.
struct DecodeParams {
  const uint16_t* x;       // [m, k]
  const uint16_t* v;       // [r, k]
  const uint16_t* u;       // [n, r]
  const uint16_t* values;  // [entries]
  const int32_t* starts;   // [n + 1]
  const uint16_t* columns;  // [entries], int16 read without a sign
  const uint16_t* bias;    // [n] or null, at any address
  uint16_t* h;             // [m, r] or null: not wanted
  uint16_t* y;             // [m, n]
  float scale;
  int m, n, k, r, entries;
  float* partials;    // [splits, m, r], workspace
  uint64_t* counter;  // the barrier's: used by no grid of another size, and by none at the same time
  int splits, tiles, tokens, room, prefetch;  // of the plan
};

// One launch. Returns null, or what CUDA says is wrong. Fills in what comes from the plan.
const char* launch_decode(const DecodePlan& plan, DecodeParams params, Dtype dtype, void* stream);

// Elements are bf16 or fp16; v, u and w start at multiples of 16 bytes.
struct MaterializeOperands {
  const uint16_t* v;       // [r, k]; of rank 0 not read, nor u
  const uint16_t* u;       // [n, r]
  const uint16_t* values;  // [s.entries]
  Support s;
  uint16_t* w;  // [n, k]
  int r;
  float scale;
};

// One launch. Returns null, or what CUDA says is wrong.
const char* launch_materialize(const MaterializePlan& plan, const MaterializeOperands& operands, Dtype dtype, void* stream);

}  // namespace low_rank_sparse
