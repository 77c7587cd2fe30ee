// What a kernel sees of CUDA: the compiler's own headers, or on the host the emulator that runs the same source in tests.
//
// Kernels use threadIdx, blockIdx, blockDim, gridDim, __syncthreads() and __syncwarp() as ever, and everything else that is
// an instruction through the functions of this folder: each has a body for the GPU and one for the emulator.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define LOWFAT_DEVICE __device__ __forceinline__
#else
#include "emulator.h"
#define LOWFAT_DEVICE inline
#endif

namespace device {

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;

LOWFAT_DEVICE int lane_index() { return threadIdx.x % kWarpThreads; }
LOWFAT_DEVICE int warp_index() { return threadIdx.x / kWarpThreads; }

// The block's dynamic shared memory, the only way to it: 1024-byte aligned, as 128-byte swizzled tiles need.
LOWFAT_DEVICE uint8_t* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) uint8_t lowfat_shared_memory[];
  return lowfat_shared_memory;
#else
  return emulator::shared_memory();
#endif
}

// The address of a byte of this block's shared memory as instructions take it.
LOWFAT_DEVICE uint32_t shared_address(const void* smem) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
#else
  return emulator::shared_address(emulator::current_block(), smem);
#endif
}

// A barrier for some warps of the block: id 1..15, threads a multiple of 32, the same at every use of the id at a time.
LOWFAT_DEVICE void barrier_sync(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::sync_named(id, threads);
#endif
}

// The same for a warp that only reports: what it wrote is there for those who sync.
LOWFAT_DEVICE void barrier_arrive(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::arrive_named(id, threads, "barrier_arrive");
#endif
}

// Stops the grid with an error: for code that this GPU cannot run and no host code launches there.
LOWFAT_DEVICE void unreachable_here() {
#ifdef __CUDACC__
  __trap();
#else
  emulator::fail("code for another GPU was reached");
#endif
}

}  // namespace device
