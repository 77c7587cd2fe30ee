// A warp's product of 16 of the contraction, from operands that lie along it in shared memory.
#pragma once

#include "device/mma.h"

namespace device {

// sums[i][j] [16, 8] += a's fragment i times b's fragment j. row_of_a(i) is where the lane's row of a's 16 x 16 elements
// begins (ldmatrix_row), row_of_b(pair) its row of two fragments of b (ldmatrix_pair_row).
template <class T, int kRows, int kColumns, class RowOfA, class RowOfB>
LOWFAT_DEVICE void multiply_k16(float (&sums)[kRows][kColumns][4], const RowOfA& row_of_a, const RowOfB& row_of_b) {
  static_assert(kColumns % 2 == 0, "fragments of b are loaded in pairs");
  uint32_t a[kRows][4], b[kColumns / 2][4];
#pragma unroll
  for (int i = 0; i < kRows; ++i) ldmatrix<4>(a[i], row_of_a(i));
#pragma unroll
  for (int pair = 0; pair < kColumns / 2; ++pair) ldmatrix<4>(b[pair], row_of_b(pair));
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const uint32_t of_column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
      mma_m16n8k16<T>(sums[i][j], a[i], of_column);
    }
  }
}

template <int kRows, int kColumns>
LOWFAT_DEVICE void clear(float (&sums)[kRows][kColumns][4]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
    }
  }
}

}  // namespace device
