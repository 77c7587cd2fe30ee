// The product with rows that say by number which inputs they keep: y = the sum of values times those inputs.
//
// Included by every product_cpu_<isa>.cpp, written in the compiler's own vectors: a vector holds one input of every
// token, so that x lies in memory transposed, and a kept input costs one load and one multiplication for up to 16 tokens.
#pragma once

#include "cpu/multiply.h"

namespace cpu {
namespace {

constexpr int64_t kListed = 64;  // kept inputs of a row that are read and widened together

template <class Element, int kTokens>
struct Positions {
  typedef float Sum __attribute__((vector_size(4 * kTokens)));

  static int64_t prepared_bytes(int64_t, int64_t depth) { return depth * static_cast<int64_t>(sizeof(Sum)); }

  // [depth, kTokens], zeros for tokens that there are not.
  static void prepare(const Product& product, void* prepared) {
    auto* to = static_cast<float*>(prepared);
    const auto* x = static_cast<const Element*>(product.x);
    for (int64_t d = 0; d < product.depth; ++d)
      for (int64_t t = 0; t < kTokens; ++t) *to++ = t < product.m ? widen(x[t * product.x_row + d]) : 0.0f;
  }

  // Inputs of a row in four chains, since one would wait for itself; each list for itself, since short sums round less.
  static void sum_row(const Product& product, int64_t row, float* sums) {
    const auto* x = static_cast<const float*>(product.x);
    const auto* values = static_cast<const Element*>(product.w) + row * product.segments * product.kept;
    const int16_t* positions = product.positions + row * product.segments * product.kept;
    const auto depth = static_cast<uint16_t>(product.depth);
    Sum total = {};
    for (int64_t segment = 0; segment < product.segments; ++segment, x += product.depth * kTokens) {
      for (int64_t first = 0; first < product.kept; first += kListed) {
        const int64_t at = segment * product.kept + first;
        const int64_t count = product.kept - first < kListed ? product.kept - first : kListed;
        float wide[kListed];
        int32_t places[kListed];
        for (int64_t j = 0; j < count; ++j) {
          const auto position = static_cast<uint16_t>(positions[at + j]);
          const bool is_there = position < depth;  // else the value is left out, and any input will do
          wide[j] = is_there ? widen(values[at + j]) : 0.0f;
          places[j] = is_there ? kTokens * position : 0;
        }
        Sum chains[4] = {};
        int64_t j = 0;
        for (; j + 4 <= count; j += 4)
          for (int chain = 0; chain < 4; ++chain) add(chains[chain], wide[j + chain], x + places[j + chain]);
        for (; j < count; ++j) add(chains[0], wide[j], x + places[j]);
        total += (chains[0] + chains[1]) + (chains[2] + chains[3]);
      }
    }
    __builtin_memcpy(sums, &total, sizeof(total));
  }

  static void add(Sum& sum, float value, const float* x) {
    Sum wide;
    __builtin_memcpy(&wide, x, sizeof(wide));
    sum += value * wide;
  }

  static void multiply(const Product& product, int64_t first_row, int64_t last_row) {
    const auto* bias = static_cast<const Element*>(product.bias);
    for (int64_t row = first_row; row < last_row; ++row) {
      float sums[kTokens];
      sum_row(product, row, sums);
      auto* y = static_cast<Element*>(product.y) + row;
      for (int64_t t = 0; t < product.m; ++t) store_one(y + t * product.y_row, sums[t], bias ? bias + row : nullptr);
    }
  }
};

template <class Element>
Kernel positions_kernel_of(int64_t m) {
  const auto of = [](auto positions) {
    using P = decltype(positions);
    return Kernel{1, &P::prepared_bytes, &P::prepare, &P::multiply};
  };
  if (m == 1) return of(Positions<Element, 1>());
  if (m <= 4) return of(Positions<Element, 4>());
  return m <= 8 ? of(Positions<Element, 8>()) : of(Positions<Element, 16>());
}

}  // namespace
}  // namespace cpu
