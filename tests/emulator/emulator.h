// A GPU for tests: the kernels' own source, compiled by the host compiler, runs here with one fiber per CUDA thread.
//
//   emulator::Buffer<uint16_t> x("x", values), y("y", count);     global memory, with bounds
//   device::launch(kernel<Config>, {grid, threads, smem_bytes}, params);   queues, as on a stream
//   emulator::synchronize({seed});                                 runs all that is queued; throws a Report
//
// The order of threads is random (the seed repeats it), asynchronous operations take effect as late as they may, or early,
// memory starts as NaN, and what a GPU would punish in silence or by hanging is reported: accesses out of bounds or
// misaligned, divergent warp operations, deadlocks with who waits on what, operations left unfinished.
// Not modelled: the memory model and fences (every write is seen at once; only that a copy of what others wrote comes after
// a fence_async_global is checked), time, registers.
#pragma once

#include <cmath>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#ifndef __restrict__
#define __restrict__ __restrict
#endif

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#include "async.h"
#include "ending.h"
#include "grid_memory.h"
#include "launch_queue.h"
#include "warp.h"

#define threadIdx (dim3(emulator::current().thread, 0, 0))
#define blockIdx (emulator::current_block().index)
#define blockDim (dim3(emulator::current_block().threads))
#define gridDim (emulator::current_block().grid->size)
