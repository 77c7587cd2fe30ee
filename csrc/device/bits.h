// Bits of a word.
#pragma once

#include "device/simt.h"

namespace device {

// How many are set.
LOWFAT_DEVICE int popcount(uint32_t word) {
#ifdef __CUDACC__
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

}  // namespace device
