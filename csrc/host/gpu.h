// Which GPU a device is, and what our kernels may take of it.
#pragma once

#include "host/op_table.h"

struct Gpu {
  int arch = 0;  // 80 for compute capability 8.0
  int sm_count = 0;
};
Gpu gpu_of(int device);

// is_aligned: operands start at multiples of 16 bytes.
inline Problem on_gpu(Problem problem, const Gpu& gpu, bool is_aligned) {
  problem.device = Device::cuda, problem.arch = gpu.arch, problem.sm_count = gpu.sm_count;
  problem.is_aligned = is_aligned;
  return problem;
}

// Bytes of shared memory that a block may have; 0: a GPU for which this build has machine code at best through PTX, where
// our kernels wait for a measurement.
inline int shared_memory_of(int arch) {
  if (arch == 90) return 227 << 10;
  if (arch == 80 || arch == 87) return 163 << 10;
  return arch > 80 && arch < 90 ? 99 << 10 : 0;
}
