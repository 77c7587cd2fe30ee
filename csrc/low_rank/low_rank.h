// What the host side and the kernels of low_rank share: y = (x v^T) u^T + bias.   x [m, k]   v [r, k]   u [n, r]   y [m, n]
#pragma once

#include <cstdint>

#include "host/op_table.h"

namespace low_rank {

constexpr int64_t kDecodeRows = 16;  // m up to which a pass over the weights costs more than the arithmetic

enum class Path { empty, decode, library };

struct Config {
  Path path;
  int64_t row_tile;      // rows of a weight that share one load of x
  int64_t first_grain;   // row tiles of v per task; 0: one thread does all
  int64_t second_grain;  // row tiles of u per task; 0: one thread does all
};

Config choose_config(const Problem& problem);

// One product of the chain: y = x w^T + bias, rounded once.
struct Product {
  const void* x;     // [m, depth]; on the CPU prepared
  const void* w;     // [rows, depth]
  const void* bias;  // [rows] or null
  void* y;           // [m, rows]
  int64_t m, depth, rows;
  const void* then;  // CPU: what is read after w, prefetched towards the end of it; or null
};

// One instruction set's kernel for one dtype. The order in which an element of y is summed depends on the sizes alone,
// so the bits are the same however the row tiles are split among threads.
struct CpuKernel {
  int64_t row_tile;
  int64_t (*prepared_bytes)(int64_t m, int64_t depth);                          // 0: x is used as it is
  void (*prepare)(const void* x, void* prepared, int64_t m, int64_t depth);     // x converted once, not once per weight
  void (*multiply)(const Product& product, int64_t first_tile, int64_t last_tile);
};

CpuKernel cpu_kernel_scalar(Dtype dtype);
CpuKernel cpu_kernel_avx2(Dtype dtype);
CpuKernel cpu_kernel_avx512(Dtype dtype, int64_t m);

// GPU, m <= kDecodeRows. Returns null, or what CUDA says is wrong.
const char* launch_decode(const Product& product, Dtype dtype, void* stream);
int device_arch();  // 80 for compute capability 8.0

}  // namespace low_rank
