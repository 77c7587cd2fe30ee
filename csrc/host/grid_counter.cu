// Counters for barriers of whole grids.
#include "host/grid_counter.h"

#include "host/counters.h"

namespace {

constexpr size_t kCounters = 16384;
__device__ uint64_t counters[kCounters];

}  // namespace

uint64_t* grid_counter(int device, void* stream, int grid, const char*& error) {
  static Counters<uint64_t> all(counters, kCounters, 1);
  return all.of(device, stream, grid, error);
}
