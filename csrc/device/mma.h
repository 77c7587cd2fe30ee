// Tensor-core products of one warp, and the loads and stores that bring shared memory into their fragments.
//
// All 32 lanes take part. With group = lane / 4 and t = lane % 4, 16-bit elements two to a register, the lower first:
//   a [16, 16]  a0 (group, 2t..)   a1 (group + 8, 2t..)   a2 (group, 2t + 8..)   a3 (group + 8, 2t + 8..)
//   b [16, 8]   b0 (2t.., group)   b1 (2t + 8.., group)
//   d [16, 8]   d0, d1 (group, 2t..)   d2, d3 (group + 8, 2t..)
#pragma once

#include <type_traits>

#include "device/convert.h"
#include "device/simt.h"
#ifndef __CUDACC__
#include "tensor_core.h"
#endif

namespace device {

// d [16, 8] += a [16, 16] b [16, 8], float sums of T = Bf16 or Fp16 products.
template <class T>
LOWFAT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  if constexpr (std::is_same<T, Bf16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  emulator::mma_m16n8k16<T>(d, a, b);
#endif
}

// The same with registers by name: where fragments come from 16-byte loads.
template <class T>
LOWFAT_DEVICE void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  mma_m16n8k16<T>(d, a, b);
}

// d [16, 8] += a [16, 8] b [8, 8] of floats whose lower 13 bits are not read:
//   a0 (group, t)   a1 (group + 8, t)   a2 (group, t + 4)   a3 (group + 8, t + 4)      b0 (t, group)   b1 (t + 4, group)
LOWFAT_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::mma_m16n8k8_tf32(d, a, b);
#endif
}

// d [16, 8] += a [16, 32] b [32, 8], where of every four neighbours along k a keeps two. a holds the kept elements as for
// m16n8k16, b has two more registers of the same form (b2: rows 2t + 16.., b3: 2t + 24..). Where the kept ones sit is told
// by the lanes t = 2 kSelector (columns 0..15) and t = 2 kSelector + 1 (16..31): four bits per four columns, the first kept
// position in the lower two and below the second; row group in bits 0..15, row group + 8 above. The other two lanes' words
// are not read, so one load can serve two products.
template <class T, int kSelector>
LOWFAT_DEVICE void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1, "the lower or upper two lanes of each quad");
#ifdef __CUDACC__
  if constexpr (std::is_same<T, Bf16>::value) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(kSelector));
  } else {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(kSelector));
  }
#else
  emulator::mma_sp_m16n8k32<T>(d, a, b, metadata, kSelector);
#endif
}

// kCount (1, 2, 4) 8 x 8 matrices of 16-bit elements from shared memory: lanes 8 i .. 8 i + 7 point to the 16-byte rows of
// matrix i; r[i] receives elements (lane / 4, 2 (lane % 4)..) of it.
template <int kCount>
LOWFAT_DEVICE void ldmatrix(uint32_t (&r)[kCount], const void* smem_row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "the instruction moves 1, 2 or 4 matrices");
#ifdef __CUDACC__
  const uint32_t address = shared_address(smem_row);
  if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#else
  emulator::move_matrices("ldmatrix", kCount, false, true, r, smem_row);
#endif
}

// The same, each matrix transposed on the way: r[i] receives elements (2 (lane % 4).., lane / 4).
template <int kCount>
LOWFAT_DEVICE void ldmatrix_transposed(uint32_t (&r)[kCount], const void* smem_row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "the instruction moves 1, 2 or 4 matrices");
#ifdef __CUDACC__
  const uint32_t address = shared_address(smem_row);
  if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#else
  emulator::move_matrices("ldmatrix_transposed", kCount, true, true, r, smem_row);
#endif
}

// The way back, sm_90: r[i] of the lanes is written to the rows of matrix i.
template <int kCount>
LOWFAT_DEVICE void stmatrix(void* smem_row, const uint32_t (&r)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "the instruction moves 1, 2 or 4 matrices");
#ifndef __CUDACC__
  uint32_t copy[kCount];
  std::copy(r, r + kCount, copy);
  emulator::move_matrices("stmatrix", kCount, false, false, copy, smem_row);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t address = shared_address(smem_row);
  if constexpr (kCount == 1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(address), "r"(r[0]) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]), "r"(r[1]) : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
  }
#else
  unreachable_here();
#endif
}

// The same, each matrix transposed on the way: r[i] are elements (2 (lane % 4).., lane / 4).
template <int kCount>
LOWFAT_DEVICE void stmatrix_transposed(void* smem_row, const uint32_t (&r)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "the instruction moves 1, 2 or 4 matrices");
#ifndef __CUDACC__
  uint32_t copy[kCount];
  std::copy(r, r + kCount, copy);
  emulator::move_matrices("stmatrix_transposed", kCount, true, false, copy, smem_row);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t address = shared_address(smem_row);
  if constexpr (kCount == 1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(r[0]) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]), "r"(r[1])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  }
#else
  unreachable_here();
#endif
}

}  // namespace device
