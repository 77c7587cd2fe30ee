// Masked products, written once over a vector type V and over Expand, which spreads what a mask keeps to where it belongs.
//
// For up to four rows of x (kStreamTokens) w goes by once, in the order in which it lies in memory, without chunks: so few
// rows are in the L1 cache or come from L2 as fast as w comes from memory, and one long run of values with one of the mask
// beside it is what hardware prefetches best. For more, multiply.h spreads a tile as it goes and keeps it for later passes.
#pragma once

#include "cpu/multiply.h"

namespace cpu {
namespace {

constexpr uintptr_t kStreamAhead = 4096;  // bytes of values asked for ahead of their use

// x in the order in which V takes it, each row padded with zeros to whole steps: [m, depth].
template <class V, class Element>
struct Whole {

  static int64_t padded(int64_t depth) { return (depth + V::kStep - 1) / V::kStep * V::kStep; }
  static int64_t prepared_bytes(int64_t m, int64_t depth) {
    return m * padded(depth) * static_cast<int64_t>(sizeof(Element));
  }

  static void prepare(const Product& product, void* prepared) {
    auto* to = static_cast<Element*>(prepared);
    for (int64_t row = 0; row < product.m; ++row) {
      const auto* from = static_cast<const typename V::Weight*>(product.x) + row * product.x_row;
      for (int64_t d = 0; d < product.depth; d += V::kStep, to += V::kStep) {
        const int64_t left = product.depth - d;
        const auto wide = left >= V::kStep ? V::load(from + d) : V::load_tail(from + d, left);
        for (int part = 0; part < V::kParts; ++part) V::store_part(to + part * (V::kStep / V::kParts), wide.part[part]);
      }
    }
  }
};

// chain + inputs d to d + V::kStep of a row, for each token.
template <class V, int kTokens, int kChains>
__attribute__((always_inline)) inline void add_step(typename V::Sum (&chains)[kTokens][kChains], int chain,
                                                    const typename V::Wide& wide, const typename V::Input* x,
                                                    int64_t x_stride) {
  for (int part = 0; part < V::kParts; ++part)
    for (int t = 0; t < kTokens; ++t)
      chains[t][chain] = V::multiply_add(wide.part[part], V::load_part(x + t * x_stride + part * (V::kStep / V::kParts)),
                                         chains[t][chain]);
}

// Sums of one row in several chains, since one would wait for itself.
template <class V, int kTokens>
__attribute__((always_inline)) inline void add_row(const Product& product, int64_t row,
                                                   typename V::Sum (&sums)[kTokens][V::kRows], int place) {
  constexpr int kChains = kTokens == 1 ? 4 : 2;
  constexpr int64_t kTogether = kChains * V::kStep;
  const auto* values = static_cast<const typename V::Weight*>(product.w);
  const auto* x = static_cast<const typename V::Input*>(product.x);
  const int64_t row_values = product.segments * product.kept, total = product.rows * row_values;
  const int64_t words = mask_words(product.depth), x_stride = V::padded(product.depth);
  typename V::Sum chains[kTokens][kChains];
  for (int t = 0; t < kTokens; ++t)
    for (int chain = 0; chain < kChains; ++chain) chains[t][chain] = V::zero();
  const uint32_t* mask = product.mask + row * product.segments * words;
  for (int64_t segment = 0; segment < product.segments; ++segment, mask += words, x += kTokens * x_stride) {
    int64_t at = row * row_values + segment * product.kept, d = 0;
    for (; d + kTogether <= x_stride; d += kTogether) {
      const auto ahead = reinterpret_cast<uintptr_t>(values + at) + kStreamAhead;
      for (int64_t bytes = 0; bytes < kTogether * static_cast<int64_t>(sizeof(typename V::Weight)) / 2; bytes += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(ahead + static_cast<uintptr_t>(bytes)), 0, 2);
      for (int chain = 0; chain < kChains; ++chain) {
        const int64_t here = d + chain * V::kStep;
        add_step<V, kTokens, kChains>(chains, chain, take<V>(values, total, mask, here, at), x + here, x_stride);
      }
    }
    for (; d < x_stride; d += V::kStep)
      add_step<V, kTokens, kChains>(chains, 0, take<V>(values, total, mask, d, at), x + d, x_stride);
  }
  for (int t = 0; t < kTokens; ++t) {
    sums[t][place] = chains[t][0];
    for (int chain = 1; chain < kChains; ++chain) sums[t][place] = sums[t][place] + chains[t][chain];
  }
}

template <class V, int kTokens>
void stream(const Product& product, int64_t first_tile, int64_t last_tile) {
  using Weight = typename V::Weight;
  const auto* bias = static_cast<const Weight*>(product.bias);
  for (int64_t row = first_tile * V::kRows; row < last_tile * V::kRows; row += V::kRows) {
    const int64_t here = product.rows - row < V::kRows ? product.rows - row : V::kRows;
    typename V::Sum sums[kTokens][V::kRows];
    for (int t = 0; t < kTokens; ++t)
      for (int i = 0; i < V::kRows; ++i) sums[t][i] = V::zero();
    for (int i = 0; i < here; ++i) add_row<V, kTokens>(product, row + i, sums, i);
    finish<V, kTokens, 0>(sums, {}, static_cast<Weight*>(product.y) + row, product.y_row, bias ? bias + row : nullptr, here);
  }
}

template <class V, class Expand, class Element>
struct Streamed : V, Expand, Whole<V, Element> {
  using Input = Element;
  using Prepared = Whole<V, Element>;
  using Prepared::padded;
  using Prepared::prepare;
  using Prepared::prepared_bytes;
};

template <class V, class Expand>
struct Grouped : V, Expand {
  static constexpr bool kMasked = true;
};

template <class V>
Kernel stream_of(int64_t m) {
  static constexpr decltype(Kernel::multiply) kOf[] = {&stream<V, 1>, &stream<V, 2>, &stream<V, 3>, &stream<V, 4>};
  static_assert(sizeof(kOf) == kStreamTokens * sizeof(*kOf));
  return {V::kRows, &V::prepared_bytes, &V::prepare, kOf[m - 1]};
}

// Element: of x as V multiplies it.
template <class V, class Expand, class Element = float>
Kernel masked_kernel_of(int64_t m) {
  return m <= kStreamTokens ? stream_of<Streamed<V, Expand, Element>>(m) : kernel_of<Grouped<V, Expand>>();
}

}  // namespace
}  // namespace cpu
