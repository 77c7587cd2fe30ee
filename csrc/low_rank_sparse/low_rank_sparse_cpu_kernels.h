// The sparse products of low_rank_sparse on a CPU, written once over a vector type V.
//
// Included by every low_rank_sparse_cpu_<isa>.cpp, which defines V. Everything is in the anonymous namespace and nothing of
// the standard library is instantiated: a function shared between the files could be linked in its AVX-512 version and run
// on a CPU without it.
//
// Entries of S are anywhere, so that no two of a row make a vector of inputs. Tokens do: packed, an input of 64 tokens is
// four lines that follow each other, and an entry costs four loads and multiplications, without an index inside.
//
//        64 tokens                   entries of a row          16 rows          y
//   x  [==========]  column 0     o---o-------o----o--o     [==========]     [====....]  token 0
//   T  [==========]  column 1    their sums stay in     ->  [==========]  -> [====....]  token 1
//        ...                     registers, twice four       ... 4 KB          ...  transposed in fours, added
#pragma once

#include "cpu/multiply.h"
#include "low_rank_sparse/low_rank_sparse_cpu.h"

namespace low_rank_sparse {
namespace {

using cpu::widen;

typedef float Float4 __attribute__((vector_size(16)));
typedef uint16_t Half4 __attribute__((vector_size(8)));
typedef uint32_t Bits4 __attribute__((vector_size(16)));
typedef int32_t Order4 __attribute__((vector_size(16)));

inline Float4 load4(const float* p) {
  Float4 four;
  __builtin_memcpy(&four, p, sizeof(four));
  return four;
}
inline Float4 load4(const uint16_t* p) {
  Half4 half;
  __builtin_memcpy(&half, p, sizeof(half));
  return reinterpret_cast<Float4>(__builtin_convertvector(half, Bits4) << 16);
}
inline void store4(float* p, Float4 four) { __builtin_memcpy(p, &four, sizeof(four)); }

__attribute__((always_inline)) inline void transpose4(Float4 (&rows)[4]) {
  const Order4 low{0, 4, 1, 5}, high{2, 6, 3, 7}, first{0, 1, 4, 5}, second{2, 3, 6, 7};
  const Float4 ab = __builtin_shuffle(rows[0], rows[1], low), AB = __builtin_shuffle(rows[0], rows[1], high);
  const Float4 cd = __builtin_shuffle(rows[2], rows[3], low), CD = __builtin_shuffle(rows[2], rows[3], high);
  rows[0] = __builtin_shuffle(ab, cd, first), rows[1] = __builtin_shuffle(ab, cd, second);
  rows[2] = __builtin_shuffle(AB, CD, first), rows[3] = __builtin_shuffle(AB, CD, second);
}

// What does not make a square: up to four tokens from t on, of columns first to last. Apart, since it would be unrolled.
template <class Element>
__attribute__((noinline)) void pack_rest(const Element* from, int64_t from_row, int64_t t, int64_t count, int64_t first,
                                         int64_t last, int64_t width, float* to) {
  for (int64_t i = t; i < width && i < t + 4; ++i)
    for (int64_t d = first; d < last; ++d) to[d * width + i] = i < count ? widen(from[i * from_row + d]) : 0.0f;
}

// [count, columns] -> [columns, kWidth]
template <class Element, int kWidth>
void pack_tokens(const Element* from, int64_t from_row, int64_t count, int64_t columns, float* to) {
  constexpr int64_t kLine = 64 / sizeof(Element);  // columns that are read together
  for (int64_t first = 0; first < columns; first += kLine) {
    const int64_t last = columns - first < kLine ? columns : first + kLine;
    for (int64_t t = 0; t < kWidth; t += 4) {
      int64_t d = first;
      if (kWidth >= 4 && t + 4 <= count) {
        for (; d + 4 <= last; d += 4) {
          Float4 rows[4];
          for (int i = 0; i < 4; ++i) rows[i] = load4(from + (t + i) * from_row + d);
          transpose4(rows);
          for (int i = 0; i < 4; ++i) store4(to + (d + i) * kWidth + t, rows[i]);
        }
      }
      if (d < last) pack_rest(from, from_row, t, count, d, last, kWidth, to);
    }
  }
}

// --- many tokens ---

constexpr int64_t kTileRows = 16;

template <class V>
struct Tokens {
  using Vector = typename V::Vector;
  static constexpr int kLanes = sizeof(Vector) / sizeof(float), kVectors = kBlockTokens / kLanes;
  // Sums that are in the registers: two for each vector of tokens, where there are as many, since one waits for itself.
  static constexpr int kTogether = kVectors < V::kSums ? kVectors : V::kSums;
  static constexpr int kChains = V::kSums >= 2 * kTogether ? 2 : 1;

  static Vector load(const float* p) {
    Vector vector;
    __builtin_memcpy(&vector, p, sizeof(vector));
    return vector;
  }

  static void pack(const float* from, int64_t from_row, int64_t tokens, int64_t columns, float* to) {
    pack_tokens<float, kBlockTokens>(from, from_row, tokens, columns, to);
  }

  // One row of S, for kTogether vectors of tokens.
  __attribute__((always_inline)) static void sum_row(const Entries& s, int64_t row, const float* x, float* to) {
    Vector sums[kChains][kTogether] = {};
    const int64_t last = s.bounds[row + 1];
    int64_t e = s.bounds[row];
    for (; e + kChains <= last; e += kChains)
      for (int chain = 0; chain < kChains; ++chain) add_entry(s, e + chain, x, sums[chain]);
    if (kChains > 1 && e < last) add_entry(s, e, x, sums[0]);
    for (int i = 0; i < kTogether; ++i) {
      if (kChains > 1) sums[0][i] += sums[kChains - 1][i];
      __builtin_memcpy(to + i * kLanes, &sums[0][i], sizeof(Vector));
    }
  }

  __attribute__((always_inline)) static void add_entry(const Entries& s, int64_t e, const float* x,
                                                       Vector (&sums)[kTogether]) {
    const float* from = x + s.places[e] * kBlockTokens;
    const float value = s.values[e];
    for (int i = 0; i < kTogether; ++i) sums[i] += value * load(from + i * kLanes);
  }

  // tile [kTileRows, kBlockTokens] to y, transposed.
  static void add_tile(const float* tile, int64_t tokens, int64_t rows, float* y, int64_t y_row) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
      int64_t row = 0;
      for (; row + 4 <= rows; row += 4) {
        Float4 four[4];
        for (int i = 0; i < 4; ++i) four[i] = load4(tile + (row + i) * kBlockTokens + t);
        transpose4(four);
        for (int i = 0; i < 4; ++i) {
          float* at = y + (t + i) * y_row + row;
          store4(at, load4(at) + four[i]);
        }
      }
      for (; row < rows; ++row)
        for (int64_t i = t; i < t + 4; ++i) y[i * y_row + row] += tile[row * kBlockTokens + i];
    }
    for (; t < tokens; ++t)
      for (int64_t row = 0; row < rows; ++row) y[t * y_row + row] += tile[row * kBlockTokens + t];
  }

  static void add_rows(const Entries& s, const float* x, int64_t tokens, int64_t first_row, int64_t last_row, float* y,
                       int64_t y_row) {
    alignas(64) float tile[kTileRows * kBlockTokens];
    for (int64_t row = first_row; row < last_row; row += kTileRows) {
      const int64_t rows = last_row - row < kTileRows ? last_row - row : kTileRows;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t t = 0; t < kBlockTokens; t += kTogether * kLanes)
          sum_row(s, row + i, x + t, tile + i * kBlockTokens + t);
      add_tile(tile, tokens, rows, y + row, y_row);
    }
  }

  // Up to V::kEntries inner products are added up together, so that they share instructions.
  static void add_products(const Entries& s, const float* dy, const float* x, int64_t first_row, int64_t last_row,
                           float* to) {
    for (int64_t row = first_row; row < last_row; ++row) {
      const float* from = dy + row * kBlockTokens;
      const int64_t last = s.bounds[row + 1];
      int64_t e = s.bounds[row];
      for (; e + V::kEntries <= last; e += V::kEntries) add_some<V::kEntries>(s.places + e, from, x, to + e);
      for (; e + 4 <= last; e += 4) add_some<4>(s.places + e, from, x, to + e);
      for (; e < last; ++e) add_some<1>(s.places + e, from, x, to + e);
    }
  }

  template <int kCount>
  __attribute__((always_inline)) static void add_some(const int32_t* places, const float* dy, const float* x, float* to) {
    Vector sums[kCount];
    for (int j = 0; j < kCount; ++j) {
      const float* from = x + places[j] * kBlockTokens;
      sums[j] = load(dy) * load(from);
      for (int i = 1; i < kVectors; ++i) sums[j] += load(dy + i * kLanes) * load(from + i * kLanes);
    }
    V::add_totals(sums, to);
  }
};

// --- decode ---

constexpr int64_t kListed = 64;    // entries of a row that are read and widened together
constexpr uintptr_t kAhead = 4096;  // bytes

struct List {
  alignas(64) float values[kListed];
  alignas(64) int32_t places[kListed];
  int64_t count;
};

// One after the other; a column that there is not is the first one, times zero.
template <class Element, class Index>
void read_entries(const Element* values, const Index* columns, uint32_t k, List& list) {
  for (int64_t j = 0; j < list.count; ++j) {
    const auto column = static_cast<uint32_t>(columns[j]);
    const bool is_there = column < k;
    list.values[j] = is_there ? widen(values[j]) : 0.0f;
    list.places[j] = is_there ? static_cast<int32_t>(column) : 0;
  }
}

// For the lines that follow those of a list by kAhead, wherever they lie: memory is busy while sums are made.
inline void ask_ahead(const void* data, int64_t first, int64_t count, int64_t size) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(first * size) + kAhead;
  for (int64_t byte = 0; byte < count * size; byte += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(from + static_cast<uintptr_t>(byte)), 0, 2);
}

// Apart from what is done with a list: otherwise each of the two is compiled once for every kind of the other.
template <class V, class Element, class Index>
__attribute__((noinline)) void read_list(const Gather& s, int64_t first, int64_t last, List& list) {
  list.count = last - first < kListed ? last - first : kListed;
  ask_ahead(s.values, first, list.count, sizeof(Element));
  ask_ahead(s.columns, first, list.count, sizeof(Index));
  V::read(static_cast<const Element*>(s.values) + first, static_cast<const Index*>(s.columns) + first,
          static_cast<uint32_t>(s.k < INT32_MAX ? s.k : INT32_MAX), list);
}

// In up to four chains, since one would wait for itself; each list for itself, since short sums round less.
template <class V, int kTokens>
__attribute__((noinline)) void add_list(const List& list, const float* x, float* sums) {
  constexpr int kMostLanes = sizeof(typename V::Vector) / sizeof(float);
  constexpr int kLanes = kTokens < kMostLanes ? kTokens : kMostLanes;
  constexpr int kParts = kTokens / kLanes, kChains = kParts < 4 ? 4 : 2;
  typedef float Part __attribute__((vector_size(4 * kLanes)));
  Part chains[kChains][kParts] = {};
  const auto add = [&](int chain, int64_t j) {
    const float* from = x + int64_t{list.places[j]} * kTokens;
    for (int i = 0; i < kParts; ++i) {
      Part part;
      __builtin_memcpy(&part, from + i * kLanes, sizeof(part));
      chains[chain][i] += list.values[j] * part;
    }
  };
  int64_t j = 0;
  for (; j + kChains <= list.count; j += kChains)
    for (int chain = 0; chain < kChains; ++chain) add(chain, j + chain);
  for (; j < list.count; ++j) add(0, j);
  for (int i = 0; i < kParts; ++i) {
    Part total;
    __builtin_memcpy(&total, sums + i * kLanes, sizeof(total));
    for (int chain = 0; chain < kChains; ++chain) total += chains[chain][i];
    __builtin_memcpy(sums + i * kLanes, &total, sizeof(total));
  }
}

template <class V, class Element, class Index, int kTokens>
struct Gathered {
  static void pack(const void* from, int64_t from_row, int64_t m, int64_t columns, float* to) {
    pack_tokens<Element, kTokens>(static_cast<const Element*>(from), from_row, m, columns, to);
  }

  static void sum(const Gather& s, const float* x, int64_t m, int64_t first_row, int64_t last_row, float* sums) {
    constexpr int64_t kRows = 4;  // of a tile, on every level
    for (int64_t row = first_row; row < last_row; ++row) {
      float each[kTokens] = {};
      for (int64_t first = s.bounds[row]; first < s.bounds[row + 1]; first += kListed) {
        List list;
        read_list<V, Element, Index>(s, first, s.bounds[row + 1], list);
        if constexpr (kTokens == 1)
          each[0] += V::gathered(list, x);
        else
          add_list<V, kTokens>(list, x, each);
      }
      const int64_t at = row - first_row;
      float* to = sums + at / kRows * kRows * cpu::kMostTokens + at % kRows;
      for (int64_t t = 0; t < m; ++t) to[t * kRows] = each[t];
    }
  }
};

template <class V, class Element, class Index>
GatherKernel gather_of(int64_t m) {
  const auto of = [](auto gathered, int64_t tokens) {
    using G = decltype(gathered);
    return GatherKernel{tokens, &G::pack, &G::sum};
  };
  if (m == 1) return of(Gathered<V, Element, Index, 1>(), 1);
  if (m <= 4) return of(Gathered<V, Element, Index, 4>(), 4);
  if (m <= 8) return of(Gathered<V, Element, Index, 8>(), 8);
  return of(Gathered<V, Element, Index, 16>(), 16);
}

template <class V>
GatherKernel gather_kernel(Dtype dtype, bool is_narrow, int64_t m) {
  if (dtype == Dtype::float32) return is_narrow ? gather_of<V, float, int16_t>(m) : gather_of<V, float, int32_t>(m);
  return is_narrow ? gather_of<V, uint16_t, int16_t>(m) : gather_of<V, uint16_t, int32_t>(m);
}

template <class V>
constexpr Kernels kKernels{{&Tokens<V>::pack, &Tokens<V>::add_rows, &Tokens<V>::add_products}, &gather_kernel<V>};

}  // namespace
}  // namespace low_rank_sparse
