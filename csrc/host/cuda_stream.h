// torch's current CUDA stream, in a binary that also loads where torch has no CUDA.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

// The function lives in libtorch_cuda.so alone. Weak, it is null in a CPU-only torch; elsewhere libtorch.so, which we
// link by name, has brought that library along.
#pragma weak aoti_torch_get_current_cuda_stream

inline void* current_cuda_stream(int32_t device) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "lowfat: this torch has no CUDA support");
  void* stream = nullptr;  // a cudaStream_t
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}
