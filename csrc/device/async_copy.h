// cp.async: global to shared memory without passing through registers. Each thread waits for its own copies; a barrier
// then shows them to the others.
#pragma once

#include "device/simt.h"

namespace device {

// Starts a copy of 16 aligned bytes; zeros instead if !is_valid, and then gmem is not read.
LOWFAT_DEVICE void copy16_async(void* smem, const void* gmem, bool is_valid = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(smem)), "l"(gmem),
               "r"(is_valid ? 16 : 0)
               : "memory");
#else
  emulator::copy16_async(smem, gmem, is_valid);
#endif
}

// The same of 4 bytes, and through L1: the rest of what memory sends stays there for the copies that follow.
LOWFAT_DEVICE void copy4_async(void* smem, const void* gmem, bool is_valid = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(smem)), "l"(gmem), "r"(is_valid ? 4 : 0)
               : "memory");
#else
  emulator::copy4_async(smem, gmem, is_valid);
#endif
}

// Makes a group of the copies started since the last one.
LOWFAT_DEVICE void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::commit_copies();
#endif
}

// Waits until at most kGroupsLeft of this thread's groups are on their way.
template <int kGroupsLeft>
LOWFAT_DEVICE void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#else
  emulator::wait_copies(kGroupsLeft);
#endif
}

}  // namespace device
