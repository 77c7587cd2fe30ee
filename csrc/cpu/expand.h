// A row of kept values written out, zeros between them, for the library's products: what is moved is not looked at.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host/op_table.h"

namespace cpu {

// to [depth]. mask: input j is bit j % 32 of word j / 32. Whatever it holds, no more than `stored` values are read.
using ExpandMask = void (*)(const uint32_t* mask, const void* values, int64_t stored, int64_t depth, void* to);

// Of elements of 2, 4 or 8 bytes.
ExpandMask expand_mask(CpuLevel level, int64_t bytes);
ExpandMask expand_mask_vbmi2(int64_t bytes);  // 2 or 4

namespace {  // a copy for each instruction set

// One word of a mask: inputs d to d + 32 of a row. Returns how many values have been taken now.
template <class T>
int64_t expand_word(uint32_t bits, const T* values, int64_t next, int64_t stored, int64_t d, int64_t depth, T* to) {
  for (int64_t at = d; at < depth && at < d + 32; ++at) to[at] = 0;
  for (; bits != 0; bits &= bits - 1) {
    const int64_t at = d + __builtin_ctz(bits);
    if (at < depth && next < stored) to[at] = values[next++];
  }
  return next;
}

}  // namespace

// The same by the kept inputs' numbers; one that there is not is left out.
template <class T>
void expand_positions(const int16_t* positions, const T* values, int64_t stored, int64_t depth, T* to) {
  std::fill_n(to, depth, T{0});
  for (int64_t i = 0; i < stored; ++i)
    if (positions[i] >= 0 && positions[i] < depth) to[positions[i]] = values[i];
}

}  // namespace cpu
