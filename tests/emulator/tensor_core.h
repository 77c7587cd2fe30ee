// Tensor-core instructions of a warp: fragments are scattered over the lanes as the PTX documentation says.
#pragma once

#include "device/convert.h"
#include "warp.h"

namespace emulator {

inline float widen_tf32(uint32_t bits) {  // the unit reads the sign, 8 exponent and 10 fraction bits
  bits &= 0xffffe000u;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// d += a b, [16 x depth] x [depth x 8]: products are exact in double, the sum is rounded to float once. The hardware's own
// order of summation is not documented; integers small enough come out the same.
template <int kDepth>
void multiply_16x8(const float (&a)[16][kDepth], const float (&b)[kDepth][8], float (&d)[16][8]) {
  for (int row = 0; row < 16; ++row) {
    double sums[8];
    for (int column = 0; column < 8; ++column) sums[column] = d[row][column];
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) sums[column] += static_cast<double>(a[row][k]) * b[k][column];
    }
    for (int column = 0; column < 8; ++column) d[row][column] = static_cast<float>(sums[column]);
  }
}

// d of m16n8: c0, c1 in row lane / 4, c2, c3 eight rows below, at columns 2 (lane % 4) and the next.
template <class Lanes>
void gather_16x8(const Lanes& lanes, float (&d)[16][8]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = lanes[lane]->d[i];
  }
}

template <class Lanes>
void scatter_16x8(const float (&d)[16][8], const Lanes& lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

struct MmaLane {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  uint32_t metadata = 0;
};

// One of the two 16-bit elements of a register.
template <class T>
float element(uint32_t bits, int half) {
  return device::widen<T>(static_cast<uint16_t>(bits >> (16 * half)));
}

// a of m16n8k16: rows group and group + 8 alternate, columns 8.. are in the last two registers.
template <class T>
void gather_16x16(MmaLane** lanes, float (&a)[16][16]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[lane / 4 + i % 2 * 8][lane % 4 * 2 + half + i / 2 * 8] = element<T>(lanes[lane]->a[i], half);
      }
    }
  }
}

// b of m16n8k16 and of the sparse m16n8k32: eight rows to a register.
template <class T, int kDepth>
void gather_columns(MmaLane** lanes, float (&b)[kDepth][8]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < kDepth / 8; ++i) {
      for (int half = 0; half < 2; ++half) b[lane % 4 * 2 + half + i * 8][lane / 4] = element<T>(lanes[lane]->b[i], half);
    }
  }
}

template <class T>
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b) {
  MmaLane values{d, a, b};
  meet_warp("mma_m16n8k16", 0, values, [](MmaLane** lanes) {
    float rows[16][16], columns[16][8], sums[16][8];
    gather_16x16<T>(lanes, rows);
    gather_columns<T>(lanes, columns);
    gather_16x8(lanes, sums);
    multiply_16x8(rows, columns, sums);
    scatter_16x8(sums, lanes);
  });
}

inline void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  MmaLane values{d, a, b};
  meet_warp("mma_m16n8k8_tf32", 0, values, [](MmaLane** lanes) {
    float rows[16][8], columns[8][8], sums[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, in_group = lane % 4;
      for (int i = 0; i < 4; ++i) rows[group + i % 2 * 8][in_group + i / 2 * 4] = widen_tf32(lanes[lane]->a[i]);
      for (int i = 0; i < 2; ++i) columns[in_group + i * 4][group] = widen_tf32(lanes[lane]->b[i]);
    }
    gather_16x8(lanes, sums);
    multiply_16x8(rows, columns, sums);
    scatter_16x8(sums, lanes);
  });
}

// Two of four neighbours along k are kept. The lanes 2 selector and 2 selector + 1 of quad g hold where: each word covers 16
// of the 32 columns, row g in its lower half and g + 8 in the upper, four bits per four columns, two bits per kept element.
template <class T>
void mma_sp_m16n8k32(float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, int selector) {
  MmaLane values{d, a, b, metadata};
  meet_warp("mma_sp_m16n8k32", selector, values, [selector](MmaLane** lanes) {
    float kept[16][16], rows[16][32] = {}, columns[32][8], sums[16][8];
    gather_16x16<T>(lanes, kept);
    for (int row = 0; row < 16; ++row) {
      for (int four = 0; four < 8; ++four) {
        const uint32_t word = lanes[row % 8 * 4 + selector * 2 + four / 4]->metadata;
        const uint32_t places = word >> (row / 8 * 16 + four % 4 * 4);
        const int first = places & 3, second = places >> 2 & 3;
        if (first >= second)
          fail("mma_sp_m16n8k32: row %d, columns %d..: positions %d, %d do not ascend", row, four * 4, first, second);
        rows[row][four * 4 + first] = kept[row][four * 2];
        rows[row][four * 4 + second] = kept[row][four * 2 + 1];
      }
    }
    gather_columns<T>(lanes, columns);
    gather_16x8(lanes, sums);
    multiply_16x8(rows, columns, sums);
    scatter_16x8(sums, lanes);
  });
}

// ldmatrix and stmatrix: lane 8 i + j has the address of row j of matrix i (8 rows of 16 bytes); lane l keeps of each matrix
// the two elements 2 (l % 4) and the next of row l / 4, or when transposed, of column l / 4.
struct MatrixLane {
  uint32_t* registers;
  uint8_t* row;
};

inline void move_element(MatrixLane** lanes, int matrix, int lane, int half, bool is_transposed, bool is_load) {
  const int row = is_transposed ? lane % 4 * 2 + half : lane / 4;
  const int column = is_transposed ? lane / 4 : lane % 4 * 2 + half;
  uint8_t* in_memory = lanes[matrix * 8 + row]->row + column * 2;
  uint8_t* in_register = reinterpret_cast<uint8_t*>(&lanes[lane]->registers[matrix]) + half * 2;
  memcpy(is_load ? in_register : in_memory, is_load ? in_memory : in_register, 2);
}

inline void move_matrices(const char* what, int count, bool is_transposed, bool is_load, uint32_t* registers,
                          const void* row) {
  if (current().thread % 32 < count * 8) {  // the other lanes' addresses are not read
    check_aligned(row, 16, what);
    check_shared(row, 16, what);
  }
  MatrixLane values{registers, static_cast<uint8_t*>(const_cast<void*>(row))};
  meet_warp(what, count + (is_transposed ? 8 : 0), values, [&](MatrixLane** lanes) {
    for (int matrix = 0; matrix < count; ++matrix) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int half = 0; half < 2; ++half) move_element(lanes, matrix, lane, half, is_transposed, is_load);
      }
    }
  });
}

}  // namespace emulator
