// cp.async: copies that each thread starts and waits for by itself.
#pragma once

#include "warp.h"

namespace emulator {

inline void land(const SharedCopy& copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
}

// The copy takes place when its group is waited for, or (one in four) at once: both are legal, and show reads that come too
// early or data that comes while the buffer is still in use.
inline void copy16_async(void* smem, const void* gmem, bool is_valid) {
  check_aligned(smem, 16, "copy16_async");
  check_shared(smem, 16, "copy16_async");
  if (is_valid) {
    check_aligned(gmem, 16, "copy16_async");
    check_global(gmem, 16, false, "copy16_async");
  }
  Fiber& self = current();
  self.copies.push_back({smem, gmem, is_valid ? size_t{16} : 0, self.copy_groups});
  memset(smem, 0xff, 16);  // nobody may read it before it has landed
  if (machine.random.one_in(4)) land(self.copies.back());
}

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
