// What kernels may touch: buffers in global memory, registered with their bounds, and the shared memory of their block.
#pragma once

#include <cstdlib>

#include "machine.h"

namespace emulator {

struct Region {
  const char* name;
  uintptr_t begin, end;
  bool is_writable;
  uint64_t written_by = 0;  // number of the last grid
};

inline std::vector<Region> regions;

// An array in global memory. It starts as NaN (all bits set), or as a copy of an input, which kernels may not write.
// offset: elements by which it is off a 256-byte boundary.
template <class T>
class Buffer {
 public:
  Buffer(const char* name, size_t count, size_t offset = 0) : Buffer(name, count, offset, true) { poison(); }
  Buffer(const char* name, const std::vector<T>& values, size_t offset = 0) : Buffer(name, values.size(), offset, false) {
    std::copy(values.begin(), values.end(), data());
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    regions.erase(std::remove_if(regions.begin(), regions.end(), [this](const Region& r) { return r.begin == address(); }),
                  regions.end());
    ::operator delete[](memory_, std::align_val_t(256));
  }

  T* data() { return memory_ + offset_; }
  const T* data() const { return memory_ + offset_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }
  void poison() { memset(static_cast<void*>(data()), 0xff, count_ * sizeof(T)); }

 private:
  Buffer(const char* name, size_t count, size_t offset, bool is_writable)
      : memory_(static_cast<T*>(::operator new[]((count + offset) * sizeof(T), std::align_val_t(256)))),
        count_(count),
        offset_(offset) {
    regions.push_back({name, address(), address() + count * sizeof(T), is_writable});
  }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(memory_ + offset_); }

  T* memory_;
  size_t count_, offset_;
};

inline void check_aligned(const void* p, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("%s: %p is not a multiple of %zu bytes", what, p, bytes);
}

inline void check_global(const void* p, size_t bytes, bool is_write, const char* what) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  const Region* nearest = nullptr;
  for (Region& region : regions) {
    if (begin >= region.begin && begin + bytes <= region.end) {
      if (is_write && !region.is_writable) fail("%s: writes to the input %s", what, region.name);
      if (is_write) region.written_by = current_block().grid->number;
      return;
    }
    if (begin + bytes > region.begin && (!nearest || region.begin > nearest->begin)) nearest = &region;
  }
  if (!nearest) fail("%s: out of bounds, %p is in no buffer", what, p);
  fail("%s: out of bounds, %zu bytes at offset %lld of %s (%zu bytes)", what, bytes,
       static_cast<long long>(begin - nearest->begin), nearest->name, static_cast<size_t>(nearest->end - nearest->begin));
}

// The copy engine has a way of its own to memory. What this grid wrote, or one that it depends on, it sees for certain after
// the acquire (or the wait for that grid) and then a fence.
inline void check_fenced(const void* p, const char* what) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  const Grid& grid = *current_block().grid;
  const uint64_t before = grid.is_dependent && grid.previous ? grid.previous->number : grid.number;
  for (const Region& region : regions) {
    if (begin < region.begin || begin >= region.end || current().has_fenced_global) continue;
    if (region.written_by == grid.number || region.written_by == before) {
      fail("%s: %s was written by this grid or the one before, without fence_async_global in between", what, region.name);
    }
  }
}

inline void fence_async_global() { current().has_fenced_global = true; }

inline void load(void* to, const void* gmem, size_t bytes, const char* what) {
  check_aligned(gmem, bytes, what);
  check_global(gmem, bytes, false, what);
  memcpy(to, gmem, bytes);
}

inline void store(void* gmem, const void* from, size_t bytes, const char* what) {
  check_aligned(gmem, bytes, what);
  check_global(gmem, bytes, true, what);
  memcpy(gmem, from, bytes);
}

// The address window of a block's shared memory starts past what the driver keeps for itself, as on sm_90.
constexpr uint32_t kSharedBase = 1024;
constexpr size_t kSharedLimit = 232448;  // bytes of dynamic shared memory in a block, sm_90

inline bool is_shared(const Block& block, const void* p, size_t bytes) {
  const auto* begin = static_cast<const uint8_t*>(p);
  return begin >= block.smem && begin + bytes <= block.smem + block.smem_bytes;
}

inline void check_shared(const void* p, size_t bytes, const char* what) {
  if (!is_shared(current_block(), p, bytes)) {
    fail("%s: out of bounds, %zu bytes at offset %lld of shared memory (%zu bytes)", what, bytes,
         static_cast<long long>(static_cast<const uint8_t*>(p) - current_block().smem), current_block().smem_bytes);
  }
}

inline void load_shared(void* to, const void* smem, size_t bytes, const char* what) {
  check_aligned(smem, bytes, what);
  check_shared(smem, bytes, what);
  memcpy(to, smem, bytes);
}

inline void store_shared(void* smem, const void* from, size_t bytes, const char* what) {
  check_aligned(smem, bytes, what);
  check_shared(smem, bytes, what);
  memcpy(smem, from, bytes);
}

// The 32-bit address of a byte in the shared memory of its own block.
inline uint32_t shared_address(const Block& block, const void* p) {
  return kSharedBase + static_cast<uint32_t>(static_cast<const uint8_t*>(p) - block.smem);
}

inline uint8_t* shared_pointer(Block& block, uint32_t address) { return block.smem + (address - kSharedBase); }

inline uint8_t* shared_memory() { return current_block().smem; }

inline Block* make_block(Grid& grid, Cluster& cluster, int linear, int rank) {
  auto* block = new Block;
  block->grid = &grid;
  block->cluster = &cluster;
  block->rank = rank;
  block->index = dim3(linear % grid.size.x, linear / grid.size.x % grid.size.y, linear / grid.size.x / grid.size.y);
  block->smem_bytes = grid.smem_bytes;
  block->smem = static_cast<uint8_t*>(::operator new[](grid.smem_bytes, std::align_val_t(1024)));
  memset(block->smem, 0xff, grid.smem_bytes);  // NaN in every format
  block->threads = grid.threads;
  block->fibers = std::make_unique<Fiber[]>(grid.threads);
  block->warps.resize(grid.threads / 32);
  block->warpgroups.resize((grid.threads + 127) / 128);
  block->products.resize((grid.threads + 127) / 128);
  block->products_in_flight.resize((grid.threads + 127) / 128);
  return block;
}

inline Block::~Block() {
  for (int t = 0; t < threads; ++t) {
    if (fibers[t].context.stack) stacks.give_back(fibers[t].context.stack);
  }
  ::operator delete[](smem, std::align_val_t(1024));
}

}  // namespace emulator
