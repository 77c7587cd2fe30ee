// Loads and stores of global memory, by what is read: weights that pass once, inputs, what other blocks wrote.
//
// All are volatile: the compiler keeps them where the kernel has them, before or after a wait or barrier.
#pragma once

#include "device/simt.h"

namespace device {

LOWFAT_DEVICE uint4 zero16() { return make_uint4(0, 0, 0, 0); }  // what is not there to be loaded

// 16 bytes of weights: read once and not kept in L1, the line's other half fetched into L2.
LOWFAT_DEVICE uint4 load16_weights(const void* gmem) {
  uint4 v;
#ifdef __CUDACC__
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(gmem));
#else
  emulator::load(&v, gmem, 16, "load16_weights");
#endif
  return v;
}

// The same of 8 bytes: of a mask, two words.
LOWFAT_DEVICE uint2 load8_weights(const void* gmem) {
  uint2 v;
#ifdef __CUDACC__
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(gmem));
#else
  emulator::load(&v, gmem, 8, "load8_weights");
#endif
  return v;
}

// 16 bytes that nobody writes while the kernel runs, and that several warps read: x, bias.
LOWFAT_DEVICE uint4 load16(const void* gmem) {
  uint4 v;
#ifdef __CUDACC__
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(gmem));
#else
  emulator::load(&v, gmem, 16, "load16");
#endif
  return v;
}

// 16 bytes that other blocks of this grid, or the grid before, wrote: from L2, where they meet. Only after the barrier or
// wait.
LOWFAT_DEVICE uint4 load16_l2(const void* gmem) {
  uint4 v;
#ifdef __CUDACC__
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(gmem)
               : "memory");
#else
  emulator::load(&v, gmem, 16, "load16_l2");
#endif
  return v;
}

LOWFAT_DEVICE float4 load16_floats_l2(const float* gmem) {
  float4 v;
#ifdef __CUDACC__
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(gmem)
               : "memory");
#else
  emulator::load(&v, gmem, 16, "load16_floats_l2");
#endif
  return v;
}

LOWFAT_DEVICE void store16(void* gmem, uint4 v) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(gmem), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#else
  emulator::store(gmem, &v, 16, "store16");
#endif
}

// One element (1, 2, 4 or 8 bytes), for tails, biases and accumulators. The pointer is to global memory.
template <class T>
LOWFAT_DEVICE T load(const T* gmem) {
#ifdef __CUDACC__
  return *static_cast<const volatile T*>(gmem);
#else
  T v;
  emulator::load(&v, gmem, sizeof(T), "load");
  return v;
#endif
}

template <class T>
LOWFAT_DEVICE void store(T* gmem, T v) {
#ifdef __CUDACC__
  *gmem = v;
#else
  emulator::store(gmem, &v, sizeof(T), "store");
#endif
}

// 16 bytes of shared memory, aligned.
LOWFAT_DEVICE uint4 load16_shared(const void* smem) {
#ifdef __CUDACC__
  return *static_cast<const uint4*>(smem);
#else
  uint4 v;
  emulator::load_shared(&v, smem, 16, "load16_shared");
  return v;
#endif
}

LOWFAT_DEVICE void store16_shared(void* smem, uint4 v) {
#ifdef __CUDACC__
  *static_cast<uint4*>(smem) = v;
#else
  emulator::store_shared(smem, &v, 16, "store16_shared");
#endif
}

}  // namespace device
