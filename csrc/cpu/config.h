// What the ops' choices between their CPU kernels and the library have in common.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/product.h"

namespace cpu {

enum class Path { empty, decode, library };

constexpr int64_t kTaskBytes = 256 << 10;    // of weights: below, handing a task to a thread costs more than it saves
constexpr int64_t kThreadedBytes = 1 << 20;  // of all factors: below, one thread is done before others have woken up
constexpr int64_t kRowTile = 4;               // of every product's kernel

inline int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Pieces of so many bytes that make a task.
inline int64_t grain_of(int64_t piece_bytes) { return parts_of(kTaskBytes, std::max<int64_t>(1, piece_bytes)); }

constexpr int64_t kFloatTokens = 32, kBfloatTokens = 128;

// Rows of x up to which our products, in slices of kMostTokens, are ahead of the library's. Measured on one core with
// AVX-512: 4096 -> 4096 of rank 512 in bfloat16, 1.2 times at 128 rows; in float32 ahead at 32, behind at 64. Elsewhere, and
// where the library has tiles, it was not measured, and one slice is all.
inline int64_t most_tokens(const Problem& p) {
  if (p.level != CpuLevel::avx512_bf16) return kMostTokens;
  if (p.dtype == Dtype::float32) return kFloatTokens;
  return p.has_tiles ? kMostTokens : kBfloatTokens;
}

// Rows of a slice: of each about as many, since a few left over would have another kernel, which takes subnormals as zero.
inline int64_t slice_of(int64_t m) { return parts_of(m, std::max<int64_t>(1, parts_of(m, kMostTokens))); }

// Of an op whose kernel takes every size.
inline Path path_of(const Problem& p) {
  if (p.m == 0) return Path::empty;
  const bool has_kernel = p.dtype == Dtype::float32 || p.dtype == Dtype::bfloat16;
  return has_kernel && p.m <= most_tokens(p) ? Path::decode : Path::library;
}

}  // namespace cpu
