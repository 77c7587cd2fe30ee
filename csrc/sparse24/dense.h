// What the host side and the kernel of dense.cu share: a sparse factor with its zeros, for products of the library, and of
// their dense gradient what is kept.
#pragma once

#include <cstdint>

namespace sparse24 {

constexpr int64_t kDenseMaxColumns = 1 << 30;  // places in a row are counted in 32 bits

// Of any dtype, as its elements' bytes: 2, 4 or 8.
struct DenseOperands {
  const void* from;      // values [rows, stored]; or dense [rows, columns]
  void* to;              // the other one
  const uint32_t* mask;  // [rows, words]
  int64_t rows;          // of all blocks
  int columns, stored;
};

// Return null, or what CUDA says is wrong.
const char* launch_expand_dense(const DenseOperands& operands, int element_bytes, int sm_count, void* stream);
const char* launch_select_dense(const DenseOperands& operands, int element_bytes, int sm_count, void* stream);

}  // namespace sparse24
