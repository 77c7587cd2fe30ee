// Counters on each GPU for what the blocks of a launch do together, handed out without a call that a captured graph forbids.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

// An array of counters, a __device__ variable, which is zero when the library is loaded, on each GPU, and never reset from
// the host. It is dealt in equal parts to those who use a part one after the other.
template <class Counter>
class Counters {
 public:
  Counters(const void* symbol, size_t parts, size_t of_part) : symbol_(symbol), parts_(parts), of_part_(of_part) {}

  // A captured launch has a part of its capture: the graph will run on some other stream, perhaps beside what the stream of
  // the capture does then.
  Counter* of(int device, void* stream, int kind, const char*& error) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;
    cudaError_t code = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &capture);
    if (status == cudaStreamCaptureStatusNone) capture = 0;

    const std::lock_guard<std::mutex> lock(mutex_);
    OfDevice& all = of_devices_[device];
    if (code == cudaSuccess && !all.first) code = cudaGetSymbolAddress(reinterpret_cast<void**>(&all.first), symbol_);
    if (code != cudaSuccess) {
      error = cudaGetErrorString(code);
      return nullptr;
    }
    const Key key{stream, capture, kind};
    const auto found = all.given.find(key);
    if (found != all.given.end()) return found->second;
    if (all.given.size() == parts_) return nullptr;
    return all.given[key] = all.first + all.given.size() * of_part_;
  }

 private:
  using Key = std::tuple<void*, unsigned long long, int>;  // stream, capture, kind
  struct OfDevice {
    Counter* first = nullptr;
    std::map<Key, Counter*> given;
  };

  const void* symbol_;
  size_t parts_, of_part_;
  std::mutex mutex_;
  std::map<int, OfDevice> of_devices_;
};
