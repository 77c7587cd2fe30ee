// The bitmap of a dictionary's coefficients from the positions of their atoms, for kernels that know no other form.
//
//   positions [rows, stored]   int16, ascending      mask [rows, words]
//
// A thread has a word: it looks for the first position in it or behind it, by halves, and sets bits until one is behind.
// Positions that are wrong set the wrong bits, or none; nothing outside is read or written.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator. It HAS NEVER RUN ON A GPU, no speed is claimed.
#include "dictionary/bitmap.h"

#include "device/launch.h"
#include "device/layout.h"
#include "device/load.h"

namespace dictionary {

struct MarkConfig {
  static constexpr int kThreads = 256;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads) mark_bitmap(const __grid_constant__ MarkOperands p) {
  const int64_t count = p.rows * p.words, stride = int64_t{gridDim.x} * Config::kThreads;
  for (int64_t i = int64_t{blockIdx.x} * Config::kThreads + threadIdx.x; i < count; i += stride) {
    const int16_t* positions = p.positions + i / p.words * p.stored;
    const int first = static_cast<int>(i % p.words) * device::kWordBits;
    int at = 0;
    for (int end = p.stored; at < end;) {
      const int middle = (at + end) / 2;
      if (device::load(positions + middle) < first) {
        at = middle + 1;
      } else {
        end = middle;
      }
    }
    uint32_t word = 0;
    for (; at < p.stored; ++at) {
      const int bit = device::load(positions + at) - first;
      if (bit < 0 || bit >= device::kWordBits) break;
      word |= 1u << bit;
    }
    device::store(p.mask + i, word);
  }
}

const char* launch_mark(const MarkOperands& operands, int sm_count, void* stream) {
  const int64_t blocks = device::ceil_div(operands.rows * operands.words, MarkConfig::kThreads);
  device::Launch shape;
  shape.grid = dim3(static_cast<unsigned>(blocks < 8 * sm_count ? blocks : 8 * sm_count));
  shape.threads = MarkConfig::kThreads;
  shape.stream = stream;
  return device::launch(mark_bitmap<MarkConfig>, shape, operands);
}

}  // namespace dictionary
