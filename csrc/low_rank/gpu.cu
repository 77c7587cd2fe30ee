// What the host side of low_rank asks of CUDA: which GPU it is, and counters for barriers of whole grids.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "low_rank/low_rank.h"

namespace low_rank {
namespace {

// Zero when the library is loaded, on each GPU, and never reset: nothing is allocated or cleared when a counter is handed out,
// so that may happen while a graph is captured.
constexpr size_t kCounters = 16384;
__device__ uint64_t counters[kCounters];

struct Counters {
  using Key = std::tuple<void*, unsigned long long, int>;  // stream, capture, blocks
  uint64_t* first = nullptr;
  std::map<Key, uint64_t*> given;
};

}  // namespace

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

// A captured launch has a counter of its capture: the graph will run on some other stream, perhaps beside what the stream of
// the capture does then. Grids of one size that run at the same time must not share one: they would let each other through.
uint64_t* grid_counter(int device, void* stream, int grid, const char*& error) {
  static std::mutex mutex;
  static std::map<int, Counters> of_devices;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  cudaError_t code = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &capture);
  if (status == cudaStreamCaptureStatusNone) capture = 0;

  const std::lock_guard<std::mutex> lock(mutex);
  Counters& all = of_devices[device];
  if (code == cudaSuccess && !all.first) {
    code = cudaGetSymbolAddress(reinterpret_cast<void**>(&all.first), counters);
  }
  if (code != cudaSuccess) {
    error = cudaGetErrorString(code);
    return nullptr;
  }
  const Counters::Key key{stream, capture, grid};
  const auto found = all.given.find(key);
  if (found != all.given.end()) return found->second;
  if (all.given.size() == kCounters) return nullptr;
  return all.given[key] = all.first + all.given.size();
}

}  // namespace low_rank
