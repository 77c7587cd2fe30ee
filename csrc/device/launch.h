// The launch of a kernel on a stream, with the attributes that our kernels use; in tests, on the emulator.
#pragma once

#include "device/simt.h"
#ifndef __CUDACC__
#include "launch_queue.h"
#endif

namespace device {

struct Launch {
  dim3 grid;                    // blocks
  int threads = 0;              // of a block
  size_t smem_bytes = 0;        // dynamic shared memory of a block
  int cluster = 1;              // neighbouring blocks (in x) that share their shared memory
  bool is_cooperative = false;  // all blocks are resident together, as a grid barrier needs
  bool is_dependent = false;    // may start before the kernel before it on the stream has ended: see wait_for_dependency
  void* stream = nullptr;       // a cudaStream_t
};

// Queues kernel(params). Null, or what CUDA says is wrong.
template <class Params>
const char* launch(void (*kernel)(Params), const Launch& shape, const Params& params) {
#ifdef __CUDACC__
  cudaError_t code = cudaSuccess;
  if (shape.smem_bytes > 48 << 10) {  // more than every GPU grants without being asked
    code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(shape.smem_bytes));
    if (code != cudaSuccess) return cudaGetErrorString(code);
  }
  cudaLaunchAttribute attributes[3] = {};
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  if (shape.is_cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (shape.is_dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.smem_bytes;
  config.stream = static_cast<cudaStream_t>(shape.stream);
  config.attrs = attributes;
  config.numAttrs = count;
  code = cudaLaunchKernelEx(&config, kernel, Params(params));
  return code == cudaSuccess ? nullptr : cudaGetErrorString(code);
#else
  emulator::enqueue(reinterpret_cast<void*>(kernel), shape, [kernel, params] { kernel(params); });
  return nullptr;
#endif
}

}  // namespace device
