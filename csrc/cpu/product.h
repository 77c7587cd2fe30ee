// The product that decode on a CPU is made of, y = x w^T + bias for a handful of rows of x, and who computes it.
#pragma once

#include <cstdint>

#include "host/op_table.h"

namespace cpu {

constexpr int64_t kMostTokens = 16;  // rows of x of one call

// One product, rounded once.
struct Product {
  const void* x;     // [m, depth], a row every x_row elements, or prepared
  const void* w;     // [rows, depth]
  const void* bias;  // [rows] or null
  void* y;           // [m, rows], a row every y_row elements
  int64_t m, depth, rows;
  int64_t x_row, y_row;
  const void* then;  // what is read after w, prefetched towards the end of it; or null

  // Of a product whose w holds only what is kept of each row, in ascending order, [rows, segments kept]: which inputs these
  // are, by a bitmap (masked) or by their numbers.
  const uint32_t* mask = nullptr;      // [rows, segments, ceil(depth / 32)], input j is bit j % 32 of word j / 32
  const int16_t* positions = nullptr;  // [rows, segments, kept]
  int64_t segments = 1;                // pieces of `depth` that an input row consists of
  int64_t kept = 0;                    // of a row and segment

  // Of one whose w is dense: y = scale x w^T + added + bias, rounded once.
  float scale = 1;
  const float* added = nullptr;  // [ceil(rows / row_tile), kMostTokens, row_tile]; what is past m or rows is not looked at
};

// One instruction set's kernel for one dtype. The order in which an element of y is summed depends on the sizes alone,
// so the bits are the same however the row tiles are split among threads.
struct Kernel {
  int64_t row_tile;  // rows of w that share one load of x
  int64_t (*prepared_bytes)(int64_t m, int64_t depth);         // 0: x is used as it is
  void (*prepare)(const Product& product, void* prepared);     // x converted once, not once per weight
  void (*multiply)(const Product& product, int64_t first_tile, int64_t last_tile);
};

// float32 or bfloat16, m up to kMostTokens.
Kernel kernel(CpuLevel level, Dtype dtype, int64_t m);

// The same of products by mask and by positions. Where these are not what they should be, the result is wrong and nothing
// else: nothing outside of the tensors is read. prepare() is for one segment; the prepared ones follow each other.
Kernel masked_kernel(CpuLevel level, Dtype dtype, int64_t m);
Kernel positions_kernel(CpuLevel level, Dtype dtype, int64_t m);

constexpr int64_t kStreamTokens = 4;  // rows of x up to which a masked w is best read straight through

Kernel kernel_scalar(Dtype dtype);
Kernel kernel_avx2(Dtype dtype);
Kernel kernel_avx512(Dtype dtype, int64_t m);
Kernel masked_kernel_scalar(Dtype dtype, int64_t m);
Kernel masked_kernel_avx2(Dtype dtype, int64_t m);
Kernel masked_kernel_vbmi2(Dtype dtype, int64_t m);
Kernel positions_kernel_scalar(Dtype dtype, int64_t m);
Kernel positions_kernel_avx2(Dtype dtype, int64_t m);
Kernel positions_kernel_avx512(Dtype dtype, int64_t m);

}  // namespace cpu
