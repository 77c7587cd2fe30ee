// What the ops' choices between their CPU kernels and the library have in common.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/product.h"

namespace cpu {

enum class Path { empty, decode, library };

constexpr int64_t kTaskBytes = 256 << 10;    // of weights: below, handing a task to a thread costs more than it saves
constexpr int64_t kThreadedBytes = 1 << 20;  // of all factors: below, one thread is done before others have woken up

inline int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Pieces of so many bytes that make a task.
inline int64_t grain_of(int64_t piece_bytes) { return parts_of(kTaskBytes, std::max<int64_t>(1, piece_bytes)); }

// Of an op whose kernel takes every size.
inline Path path_of(const Problem& p) {
  if (p.m == 0) return Path::empty;
  const bool has_kernel = p.dtype == Dtype::float32 || p.dtype == Dtype::bfloat16;
  return has_kernel && p.m <= kMostTokens ? Path::decode : Path::library;
}

}  // namespace cpu
