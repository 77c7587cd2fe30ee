// The CPU decode product, written once over a vector type: y = x w^T + bias for a handful of rows of x.
//
// Included by every low_rank_cpu_<isa>.cpp, which defines the vector type V. Everything is in the anonymous namespace and nothing
// of the standard library is instantiated: a function shared between the files could be linked in its AVX-512 version and run on
// a CPU without it.
//
//        depth ->                   A tile is V::kRows rows of w by up to V::kTokens rows of x: that many sums stay in registers
//   w  [=======|====]  row tile     while both are read once along depth. A block is some row tiles, together about 16 KB. All rows
//      [=======|====]               of x pass over a block before the next one, so that w comes from memory once; and each pass
//      [-------|----]  next tile    asks for its share of the next block, so that memory works while the arithmetic does.
#pragma once

#include <cstdint>

#include "low_rank/low_rank.h"

namespace low_rank {
namespace {

constexpr int64_t kBlockBytes = 16384;

struct Block {
  int64_t first_row, last_row;
  const char* ahead;  // the block after this one
};

inline const char* offset(const char* p, int64_t bytes) {  // may point outside of the tensor: only ever prefetched
  return reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes));
}

// Rows [first_row, last_row) of y for kTokens rows of x. kAhead: how many rows of each tile of the next block this pass asks for.
template <class V, int kTokens, int kAhead>
void multiply_block(const Product& product, const Block& block, int64_t token, int64_t ahead_row) {
  using Weight = typename V::Weight;
  const int64_t depth = product.depth, row_bytes = depth * static_cast<int64_t>(sizeof(Weight));
  const auto* x = static_cast<const typename V::Input*>(product.x) + token * V::x_stride(depth);
  const auto* w = static_cast<const Weight*>(product.w);
  const auto* bias = static_cast<const Weight*>(product.bias);
  auto* y = static_cast<Weight*>(product.y) + token * product.rows;

  for (int64_t row = block.first_row; row < block.last_row; row += V::kRows) {
    const int64_t here = row + V::kRows <= product.rows ? V::kRows : product.rows - row;
    const Weight* rows[V::kRows];  // past the last row: the last row again, and its sums are dropped
    for (int i = 0; i < V::kRows; ++i) rows[i] = w + (row + (i < here ? i : here - 1)) * depth;
    const char* ahead = offset(block.ahead, (row - block.first_row + ahead_row) * row_bytes);

    typename V::Sum sums[kTokens][V::kRows];
    for (int t = 0; t < kTokens; ++t)
      for (int i = 0; i < V::kRows; ++i) sums[t][i] = V::zero();

    int64_t d = 0;
    for (; d + V::kStep <= depth; d += V::kStep) {
      typename V::Wide wide[V::kRows];
      for (int i = 0; i < V::kRows; ++i) wide[i] = V::load(rows[i] + d);
      for (int i = 0; i < kAhead; ++i)
        __builtin_prefetch(offset(ahead, i * row_bytes + d * static_cast<int64_t>(sizeof(Weight))), 0, 2);  // into L2
      for (int t = 0; t < kTokens; ++t) {
        const auto x_wide = V::load_x(x + t * V::x_stride(depth) + d);
        for (int i = 0; i < V::kRows; ++i) sums[t][i] = V::multiply_add(wide[i], x_wide, sums[t][i]);
      }
    }
    if (d < depth) {
      typename V::Wide wide[V::kRows];
      for (int i = 0; i < V::kRows; ++i) wide[i] = V::load_tail(rows[i] + d, depth - d);
      for (int t = 0; t < kTokens; ++t) {
        const auto x_wide = V::load_x_tail(x + t * V::x_stride(depth) + d, depth - d);
        for (int i = 0; i < V::kRows; ++i) sums[t][i] = V::multiply_add(wide[i], x_wide, sums[t][i]);
      }
    }
    for (int t = 0; t < kTokens; ++t)
      V::store(y + t * product.rows + row, V::reduce(sums[t]), bias ? bias + row : nullptr, here);
  }
}

template <class V, int kAhead, int kTokens = V::kTokens>
void multiply_tokens(const Product& product, const Block& block, int64_t token, int64_t tokens, int64_t ahead_row) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) return multiply_tokens<V, kAhead, kTokens - 1>(product, block, token, tokens, ahead_row);
  }
  multiply_block<V, kTokens, kAhead>(product, block, token, ahead_row);
}

template <class V>
void multiply(const Product& product, int64_t first_tile, int64_t last_tile) {
  const int64_t tile_bytes = V::kRows * product.depth * static_cast<int64_t>(sizeof(typename V::Weight));
  const int64_t tiles = tile_bytes >= kBlockBytes || tile_bytes == 0 ? 1 : kBlockBytes / tile_bytes;  // in a block
  const int64_t passes = (product.m + V::kTokens - 1) / V::kTokens;
  const int64_t share = passes == 1 ? V::kRows : (V::kRows + 1) / 2;  // rows of each tile that one pass asks for

  for (int64_t tile = first_tile; tile < last_tile; tile += tiles) {
    Block block;
    block.first_row = tile * V::kRows;
    block.last_row = (tile + tiles < last_tile ? tile + tiles : last_tile) * V::kRows;
    const auto* w = static_cast<const char*>(product.w);
    block.ahead = (tile + tiles) * V::kRows < product.rows ? offset(w, (tile + tiles) * tile_bytes)
                  : product.then                          ? static_cast<const char*>(product.then)
                                                          : offset(w, tile * tile_bytes);  // cached: costs nothing
    for (int64_t pass = 0, token = 0; pass < passes; ++pass) {
      const int64_t tokens = product.m / passes + (pass < product.m % passes ? 1 : 0);  // as even as can be
      const int64_t ahead_row = pass * share;
      if (passes == 1)
        multiply_tokens<V, V::kRows>(product, block, token, tokens, ahead_row);
      else if (ahead_row < V::kRows)
        multiply_tokens<V, (V::kRows + 1) / 2>(product, block, token, tokens, ahead_row);
      else
        multiply_tokens<V, 0>(product, block, token, tokens, ahead_row);
      token += tokens;
    }
  }
}

template <class V>
CpuKernel kernel_of() {
  return {V::kRows, &V::prepared_bytes, &V::prepare, &multiply<V>};
}

// bf16 is the upper half of a float.
inline float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, 4);
  return wide;
}

inline uint16_t round_to_bf16(float value) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x0040);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store_one(float* y, float sum, const float* bias) { *y = bias ? sum + *bias : sum; }
inline void store_one(uint16_t* y, float sum, const uint16_t* bias) { *y = round_to_bf16(bias ? sum + widen(*bias) : sum); }

}  // namespace
}  // namespace low_rank
