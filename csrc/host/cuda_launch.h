// What host code does about what CUDA says of a launch, and has to get for one.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>

#include "host/grid_counter.h"
#include "host/op_table.h"

// error: null, or what CUDA says is wrong. arch: 80 for compute capability 8.0.
inline void check_launch(const char* op, const char* error, int arch) {
  if (!error) return;
  std::string archs;
  for (const std::string& built : compiled_cuda_archs()) archs += " " + built;
  STD_TORCH_CHECK(false, op, ": ", error, "; built for", archs, ", this device is sm_", arch);
}

// grid_counter for a call of op: null when there are no more; raises when CUDA says that something is wrong.
inline uint64_t* barrier_counter(const char* op, int device, void* stream, int grid, int arch) {
  const char* error = nullptr;
  uint64_t* counter = grid_counter(device, stream, grid, error);
  check_launch(op, error, arch);
  return counter;
}
