// The Haar transform of one level on a CPU: of rows and back, and folded into factors. Elements are float, or bf16 as
// uint16_t.
//
// A half has (size + 1) / 2 coefficients: the last of an odd size stands for one feature, beside a zero.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/multiply.h"
#include "wavelet/haar_layout.h"

namespace wavelet {

template <class E>
E narrowed(float value) {
  if constexpr (std::is_same_v<E, float>) return value;
  else return cpu::round_to_bf16(value);
}

// `width` coefficients of both halves of a row, times scale; high null: of the low one.
template <class E>
void split_row(const E* row, int64_t size, float scale, E* low, E* high) {
  const int64_t whole = size / 2;
  for (int64_t i = 0; i < whole; ++i) low[i] = narrowed<E>(scale * (cpu::widen(row[2 * i]) + cpu::widen(row[2 * i + 1])));
  if (size % 2) low[whole] = narrowed<E>(scale * cpu::widen(row[size - 1]));
  if (!high) return;
  for (int64_t i = 0; i < whole; ++i) high[i] = narrowed<E>(scale * (cpu::widen(row[2 * i]) - cpu::widen(row[2 * i + 1])));
  if (size % 2) high[whole] = narrowed<E>(scale * cpu::widen(row[size - 1]));
}

// The way back; high null: of zeros.
template <class E>
void join_row(const E* low, const E* high, int64_t size, float scale, E* row) {
  for (int64_t i = 0; i < size / 2; ++i) {
    const float l = cpu::widen(low[i]), h = high ? cpu::widen(high[i]) : 0;
    row[2 * i] = narrowed<E>(scale * (l + h)), row[2 * i + 1] = narrowed<E>(scale * (l - h));
  }
  if (size % 2) row[size - 1] = narrowed<E>(scale * (cpu::widen(low[size / 2]) + (high ? cpu::widen(high[size / 2]) : 0)));
}

// A row of v's coefficients of one half as it acts on features, [size]: each twice, of the high half the second negative.
template <class E>
void fold_along(const E* coefficients, int half, int64_t size, float scale, E* row) {
  const float second = half == 0 ? scale : -scale;
  for (int64_t i = 0; i < size / 2; ++i) {
    const float value = cpu::widen(coefficients[i]);
    row[2 * i] = narrowed<E>(scale * value), row[2 * i + 1] = narrowed<E>(second * value);
  }
  if (size % 2) row[size - 1] = narrowed<E>(scale * cpu::widen(coefficients[size / 2]));
}

// Its transpose, for gradients: what features have back to coefficients.
inline void unfold_along(const float* row, int half, int64_t size, float scale, float* coefficients) {
  for (int64_t i = 0; i < size / 2; ++i) {
    coefficients[i] = scale * (half == 0 ? row[2 * i] + row[2 * i + 1] : row[2 * i] - row[2 * i + 1]);
  }
  if (size % 2) coefficients[size / 2] = scale * row[size - 1];
}

}  // namespace wavelet
