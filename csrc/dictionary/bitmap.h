// What the host side and the kernel of bitmap.cu share.
#pragma once

#include <cstdint>

namespace dictionary {

struct MarkOperands {
  const int16_t* positions;  // [rows, stored], ascending
  uint32_t* mask;            // [rows, words]
  int64_t rows;              // of all blocks
  int words, stored;
};

// The bitmap of positions. Returns null, or what CUDA says is wrong.
const char* launch_mark(const MarkOperands& operands, int sm_count, void* stream);

}  // namespace dictionary
