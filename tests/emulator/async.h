// cp.async: copies that each thread starts and waits for by itself.
#pragma once

#include "warp.h"

namespace emulator {

inline void land(const SharedCopy& copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zeros);
}

// The copy takes place when its group is waited for, or (one in four) at once: both are legal, and show reads that come too
// early or data that comes while the buffer is still in use.
inline void copy_async(void* smem, const void* gmem, size_t bytes, bool is_valid, const char* what) {
  check_aligned(smem, bytes, what);
  check_shared(smem, bytes, what);
  if (is_valid) {
    check_aligned(gmem, bytes, what);
    check_global(gmem, bytes, false, what);
  }
  Fiber& self = current();
  self.copies.push_back({smem, gmem, is_valid ? bytes : 0, is_valid ? 0 : bytes, self.copy_groups});
  memset(smem, 0xff, bytes);  // nobody may read it before it has landed
  if (machine.random.one_in(4)) land(self.copies.back());
}

inline void copy16_async(void* smem, const void* gmem, bool is_valid) {
  copy_async(smem, gmem, 16, is_valid, "copy16_async");
}
inline void copy4_async(void* smem, const void* gmem, bool is_valid) { copy_async(smem, gmem, 4, is_valid, "copy4_async"); }

inline void commit_copies() { ++current().copy_groups; }

inline void wait_copies(int groups_left) {
  Fiber& self = current();
  auto is_awaited = [&](const SharedCopy& copy) { return copy.group < self.copy_groups - groups_left; };
  for (const SharedCopy& copy : self.copies) {
    if (is_awaited(copy)) land(copy);
  }
  self.copies.erase(std::remove_if(self.copies.begin(), self.copies.end(), is_awaited), self.copies.end());
}

}  // namespace emulator
