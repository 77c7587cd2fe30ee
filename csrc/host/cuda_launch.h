// What host code does about a launch on a GPU that was refused.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>

#include "host/op_table.h"

// error: null, or what CUDA says is wrong. arch: 80 for compute capability 8.0.
inline void check_launch(const char* op, const char* error, int arch) {
  if (!error) return;
  std::string archs;
  for (const std::string& built : compiled_cuda_archs()) archs += " " + built;
  STD_TORCH_CHECK(false, op, ": ", error, "; built for", archs, ", this device is sm_", arch);
}
