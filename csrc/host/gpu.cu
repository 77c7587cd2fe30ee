// Asks CUDA, once for each device.
#include "host/gpu.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>

Gpu gpu_of(int device) {
  static std::mutex mutex;
  static std::map<int, Gpu> known;
  const std::lock_guard<std::mutex> lock(mutex);
  Gpu& gpu = known[device];
  if (gpu.arch == 0) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&gpu.sm_count, cudaDevAttrMultiProcessorCount, device);
    gpu.arch = major * 10 + minor;
  }
  return gpu;
}
