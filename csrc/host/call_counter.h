// Counts which path each op took, so that a test or a bench can assert that it ran the kernel and not the library.
#pragma once

#include <atomic>
#include <cstdint>

struct CallCounter {
  CallCounter(const char* op, const char* device, const char* path);
  void count() { calls.fetch_add(1, std::memory_order_relaxed); }

  const char* const op;
  const char* const device;
  const char* const path;
  std::atomic<int64_t> calls{0};
  CallCounter* const next;  // all counters of the library, newest first
};

// The calls so far of one path; -1 for a path that does not exist. Python reads it through ctypes.
extern "C" __attribute__((visibility("default"))) int64_t lowfat_calls(const char* op, const char* device, const char* path);
