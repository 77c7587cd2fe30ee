// Workspace of CPU kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace cpu {

// Memory that starts at a cache line: vectors of a packed x that cross lines cost a tenth of the time at m = 8 and more.
struct FreeLines {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Lines = std::unique_ptr<void, FreeLines>;

inline Lines new_lines(int64_t bytes) { return Lines(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})); }

}  // namespace cpu
