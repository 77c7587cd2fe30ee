// A row of kept values written out, zeros between them, for the library's products: what is moved is not looked at.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cpu {

// to [depth]. mask: input j is bit j % 32 of word j / 32. Whatever it holds, no more than `stored` values are read.
template <class T>
void expand_mask(const uint32_t* mask, const T* values, int64_t stored, int64_t depth, T* to) {
  std::fill_n(to, depth, T{0});
  int64_t next = 0;
  for (int64_t d = 0; d < depth; d += 32) {
    for (uint32_t bits = mask[d / 32]; bits != 0; bits &= bits - 1) {
      const int64_t at = d + __builtin_ctz(bits);
      if (at < depth && next < stored) to[at] = values[next++];
    }
  }
}

// The same by the kept inputs' numbers; one that there is not is left out.
template <class T>
void expand_positions(const int16_t* positions, const T* values, int64_t stored, int64_t depth, T* to) {
  std::fill_n(to, depth, T{0});
  for (int64_t i = 0; i < stored; ++i)
    if (positions[i] >= 0 && positions[i] < depth) to[positions[i]] = values[i];
}

}  // namespace cpu
