// Global memory for a program that nvcc and the host compiler both build: on a GPU, or in the emulator with its bounds.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "device/simt.h"

namespace conformance {

#ifdef __CUDACC__

inline void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  fprintf(stderr, "conformance: %s: %s\n", what, cudaGetErrorString(code));
  exit(3);
}

inline cudaStream_t stream() {
  static const cudaStream_t made = [] {
    cudaStream_t s;
    check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "cudaStreamCreate");
    return s;
  }();
  return made;
}

inline void finish() { check(cudaDeviceSynchronize(), "kernel"); }

// An array that starts as NaN (all bits set), or as a copy of an input.
template <class T>
class Array {
 public:
  Array(const char*, size_t count) : count_(count) {
    check(cudaMalloc(&data_, count * sizeof(T)), "cudaMalloc");
    fill(0xff);
  }
  Array(const char* name, const std::vector<T>& values) : Array(name, values.size()) {
    check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data_); }

  T* data() { return data_; }
  void fill(int byte) {
    check(cudaMemset(data_, byte, count_ * sizeof(T)), "cudaMemset");
    check(cudaDeviceSynchronize(), "cudaMemset");
  }
  std::vector<T> values() const {
    std::vector<T> all(count_);
    check(cudaMemcpy(all.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return all;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

#else

inline void* stream() { return nullptr; }

inline void finish() {
  try {
    emulator::synchronize({1});
  } catch (const std::exception& report) {
    fprintf(stderr, "conformance: %s\n", report.what());
    exit(3);
  }
}

template <class T>
class Array {
 public:
  Array(const char* name, size_t count) : buffer_(name, count) {}
  Array(const char* name, const std::vector<T>& values) : buffer_(name, values) {}

  T* data() { return buffer_.data(); }
  void fill(int byte) { memset(buffer_.data(), byte, buffer_.size() * sizeof(T)); }
  std::vector<T> values() const { return {buffer_.data(), buffer_.data() + buffer_.size()}; }

 private:
  emulator::Buffer<T> buffer_;
};

#endif

}  // namespace conformance
