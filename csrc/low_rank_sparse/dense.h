// What the host side and the kernels of dense.cu share: S added to a dense matrix, for products of the library, and of a
// dense gradient what S has places for.
#pragma once

#include <cstdint>

#include "low_rank_sparse/support_layout.h"

namespace low_rank_sparse {

struct DenseOperands {
  const void* from;  // values [s.entries]; or dense [s.n, s.k]
  void* to;          // the other one
  Support s;
};

// Adds the values to what is there, of floats (4 bytes) or doubles (8). Returns null, or what CUDA says is wrong.
const char* launch_add_entries(const DenseOperands& operands, int element_bytes, int sm_count, void* stream);

// Writes every value, of any dtype, as its elements' bytes: 2, 4 or 8. The same.
const char* launch_select_entries(const DenseOperands& operands, int element_bytes, int sm_count, void* stream);

}  // namespace low_rank_sparse
