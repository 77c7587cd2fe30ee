// Tensor-core products of a warpgroup (128 threads, four warps) with both operands in shared memory; sm_90a only.
//
//   wgmma_fence();  wgmma<T, n>(d, a, b); ...  wgmma_commit();  wgmma_wait<0>();
//
// Between the first product and the wait nobody touches d, and the tiles stay. d [64, n] is spread over the threads: with
// warp and lane inside the warpgroup, group = lane / 4 and t = lane % 4, a thread has of every eight columns
//   d[4 j], d[4 j + 1]      row 16 warp + group,      columns 8 j + 2 t and the next
//   d[4 j + 2], d[4 j + 3]  row 16 warp + group + 8,  the same columns
//
// Tiles are in the one layout that TMA's swizzled boxes have: rows of 128 bytes, eight to an atom of 1024 bytes. Only where
// m or n is contiguous and all of it is 16 or 32, rows may be just as long (wgmma_tile_mn_narrow).
#pragma once

#include <type_traits>

#include "device/convert.h"
#include "device/simt.h"
#include "device/wgmma_registers.h"
#ifndef __CUDACC__
#include "warpgroup_products.h"
#endif

namespace device {

// Code for other GPUs has the kernels' names, because the host code is one for all, and nothing in them.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroupProducts = false;
#else
constexpr bool kHasWarpgroupProducts = true;
#endif

enum class Major { k, mn };  // which index of an operand is contiguous

constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
constexpr uint64_t kAtomBytes = 1024;

// A tile [rows of m or n][64 along k], 1024-byte aligned. The next 16 of k: add kNextK.
LOWFAT_DEVICE uint64_t wgmma_tile(const void* smem) {
  return kSwizzle128 | kAtomBytes >> 4 << 32 | uint64_t{1} << 16 | (shared_address(smem) & 0x3ffff) >> 4;
}
constexpr uint64_t kNextK = 32 >> 4;  // 32 bytes to the right in the same rows

// A tile [rows of k][64 along m or n]; where the product needs more than 64, the next 64 lie block_bytes further.
// The next 16 of k: add kNextKOfMn.
LOWFAT_DEVICE uint64_t wgmma_tile_mn(const void* smem, uint32_t block_bytes) {
  return kSwizzle128 | kAtomBytes >> 4 << 32 | uint64_t{block_bytes >> 4} << 16 | (shared_address(smem) & 0x3ffff) >> 4;
}
constexpr uint64_t kNextKOfMn = 2 * kAtomBytes >> 4;  // 16 rows, two atoms, further

// A tile [rows of k][kRowBytes / 2 along n], all of n: rows of 64 or 32 bytes (swizzled_narrow_piece), the tile at a multiple
// of 8 of them. The next 16 of k: add kNextKOfNarrow.
template <int kRowBytes>
LOWFAT_DEVICE uint64_t wgmma_tile_mn_narrow(const void* smem) {
  static_assert(kRowBytes == 32 || kRowBytes == 64, "the swizzles of less than 128 bytes");
  constexpr uint64_t kSwizzle = uint64_t{kRowBytes == 64 ? 2 : 3} << 62;
  return kSwizzle | uint64_t{8 * kRowBytes >> 4} << 32 | uint64_t{1} << 16 | (shared_address(smem) & 0x3ffff) >> 4;
}
template <int kRowBytes>
constexpr uint64_t kNextKOfNarrow = 16 * kRowBytes >> 4;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// The instruction with kDs accumulator registers; operands follow them by number.
#define LOWFAT_WGMMA(kN, kDs, kA, kB, kP, kTa, kTb, kType)                                                    \
  asm volatile("{\n.reg .pred is_adding;\nsetp.ne.b32 is_adding, %" kP                                        \
               ", 0;\n"                                                                                       \
               "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." kType "." kType " {" LOWFAT_REGISTERS_##kDs \
               "}, %" kA ", %" kB ", is_adding, 1, 1, %" kTa ", %" kTb ";\n}"                                 \
               : LOWFAT_IN_OUT_##kDs(d, 0)                                                                    \
               : "l"(a), "l"(b), "r"(static_cast<int>(is_adding)), "n"(kMajorA == Major::mn), "n"(kMajorB == Major::mn))
#define LOWFAT_WGMMA_OF(kN, kDs, kA, kB, kP, kTa, kTb)   \
  if constexpr (std::is_same<T, Bf16>::value) {          \
    LOWFAT_WGMMA(kN, kDs, kA, kB, kP, kTa, kTb, "bf16"); \
  } else {                                               \
    LOWFAT_WGMMA(kN, kDs, kA, kB, kP, kTa, kTb, "f16");  \
  }
#endif

// d [64, kN] = a [64, 16] b [16, kN] (+ d if is_adding), T = Bf16 or Fp16.
template <class T, int kN, Major kMajorA = Major::k, Major kMajorB = Major::k>
LOWFAT_DEVICE void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool is_adding = true) {
  static_assert(kN == 16 || kN == 32 || kN == 64 || kN == 128 || kN == 256, "the instances we use");
#ifndef __CUDACC__
  emulator::wgmma<T>(kN, kMajorA == Major::mn, kMajorB == Major::mn, d, a, b, is_adding);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (kN == 16) {
    LOWFAT_WGMMA_OF(16, 8, "8", "9", "10", "11", "12");
  } else if constexpr (kN == 32) {
    LOWFAT_WGMMA_OF(32, 16, "16", "17", "18", "19", "20");
  } else if constexpr (kN == 64) {
    LOWFAT_WGMMA_OF(64, 32, "32", "33", "34", "35", "36");
  } else if constexpr (kN == 128) {
    LOWFAT_WGMMA_OF(128, 64, "64", "65", "66", "67", "68");
  } else {
    LOWFAT_WGMMA_OF(256, 128, "128", "129", "130", "131", "132");
  }
#else
  unreachable_here();
#endif
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#undef LOWFAT_WGMMA_OF
#undef LOWFAT_WGMMA
#endif

// Before the first product of a group: what this thread did to d is done.
LOWFAT_DEVICE void wgmma_fence() {
#ifndef __CUDACC__
  emulator::wgmma_fence();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  unreachable_here();
#endif
}

// Makes a group of the products since the last one.
LOWFAT_DEVICE void wgmma_commit() {
#ifndef __CUDACC__
  emulator::wgmma_commit();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  unreachable_here();
#endif
}

// Until at most kGroupsLeft groups are under way: d is there, and the tiles may be overwritten.
template <int kGroupsLeft>
LOWFAT_DEVICE void wgmma_wait() {
#ifndef __CUDACC__
  emulator::wgmma_wait(kGroupsLeft);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
#else
  unreachable_here();
#endif
}

// Registers per thread, moved from a warpgroup that only copies to those that multiply; the first gives, the others take.
template <int kCount>
LOWFAT_DEVICE void give_registers() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "setmaxnreg takes 24, 32 .. 256");
#ifndef __CUDACC__
  emulator::set_registers("give_registers", kCount);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

template <int kCount>
LOWFAT_DEVICE void take_registers() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "setmaxnreg takes 24, 32 .. 256");
#ifndef __CUDACC__
  emulator::set_registers("take_registers", kCount);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace device
