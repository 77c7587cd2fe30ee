// What blocks do together: flags in global memory, a barrier of the whole grid, tickets, and grids that depend on another.
#pragma once

#include "device/simt.h"
#ifndef __CUDACC__
#include "grid_memory.h"
#endif

namespace device {

// Reads a flag: what was written before its release is visible afterwards.
LOWFAT_DEVICE uint64_t load_acquire(const uint64_t* gmem) {
#ifdef __CUDACC__
  uint64_t v;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(gmem) : "memory");
  return v;
#else
  return emulator::load_acquire(gmem);
#endif
}

LOWFAT_DEVICE uint32_t load_acquire(const uint32_t* gmem) {
#ifdef __CUDACC__
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(gmem) : "memory");
  return v;
#else
  return emulator::load_acquire(gmem);
#endif
}

// Adds to a counter after everything this thread (and, after a barrier, its block) wrote; the value before.
LOWFAT_DEVICE uint64_t add_release(uint64_t* gmem, uint64_t v) {
#ifdef __CUDACC__
  uint64_t old;
  asm volatile("atom.add.release.gpu.global.u64 %0, [%1], %2;" : "=l"(old) : "l"(gmem), "l"(v) : "memory");
  return old;
#else
  return emulator::add(gmem, v, "add_release");
#endif
}

LOWFAT_DEVICE uint32_t add_release(uint32_t* gmem, uint32_t v) {
#ifdef __CUDACC__
  uint32_t old;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(gmem), "r"(v) : "memory");
  return old;
#else
  return emulator::add(gmem, v, "add_release");
#endif
}

LOWFAT_DEVICE void store_release(uint32_t* gmem, uint32_t v) {
#ifdef __CUDACC__
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(gmem), "r"(v) : "memory");
#else
  emulator::store_flag(gmem, v, "store_release");
#endif
}

LOWFAT_DEVICE void store_release(uint64_t* gmem, uint64_t v) {
#ifdef __CUDACC__
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(gmem), "l"(v) : "memory");
#else
  emulator::store_flag(gmem, v, "store_release");
#endif
}

// The next number of a queue that all blocks draw from; it orders nothing else. One thread draws for its block.
LOWFAT_DEVICE uint32_t take_ticket(uint32_t* gmem) {
#ifdef __CUDACC__
  uint32_t old;
  asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], 1;" : "=r"(old) : "l"(gmem) : "memory");
  return old;
#else
  return emulator::add(gmem, uint32_t{1}, "take_ticket");
#endif
}

// One thread waits until a counter has reached a value.
template <class Counter>
LOWFAT_DEVICE void wait_until_reached(const Counter* gmem, Counter value) {
  while (load_acquire(gmem) < value) {
  }
}

// The barrier of all blocks, in two halves so that loads can be issued in between. The counter only ever grows, is used by
// grids of one size, and so needs no reset between launches; 64 bits never wrap. The launch must be cooperative: all blocks
// resident. No __threadfence: release and acquire order what the blocks wrote.
LOWFAT_DEVICE uint64_t grid_arrive(uint64_t* counter) {  // the value to wait for, in thread 0
  __syncthreads();
  if (threadIdx.x != 0) return 0;
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  return (add_release(counter, 1) / blocks + 1) * blocks;
}

LOWFAT_DEVICE void grid_wait(const uint64_t* counter, uint64_t target) {
  if (threadIdx.x == 0) wait_until_reached(counter, target);
  __syncthreads();
}

LOWFAT_DEVICE void grid_barrier(uint64_t* counter) { grid_wait(counter, grid_arrive(counter)); }

// In a dependent launch: blocks until the grid before has completed and its writes are visible. Before the first read of
// what it wrote, and before the first global write at all.
LOWFAT_DEVICE void wait_for_dependency() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#else
  emulator::wait_for_dependency();
#endif
}

// Allows the dependent grid after this one to start, once every block has said so or ended.
LOWFAT_DEVICE void launch_dependents() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#else
  emulator::launch_dependents();
#endif
}

}  // namespace device
