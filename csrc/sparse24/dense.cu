// A sparse factor with its zeros, and of a dense matrix what a bitmap keeps: for products of the library.
//
//   values [rows, stored]   mask [rows, words]   dense [rows, columns]      any dtype: only moved
//
// A warp has a row, and goes along it by 32 words of the mask at a time, a word to each lane: loaded together, and the bits
// in front of each counted together. Then word by word, a column to each lane, the entries of some words at once. An entry's
// place among the values is the number of bits in front of it. A wrong mask gives wrong numbers, but no access outside: what
// is past the row's values is zero, and values that no bit names become zero.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator. It HAS NEVER RUN ON A GPU, no speed is claimed.
#include "device/bits.h"
#include "device/launch.h"
#include "device/layout.h"
#include "device/load.h"
#include "device/reduce.h"
#include "sparse24/dense.h"

namespace sparse24 {

using device::kWordBits, device::parts_of, device::smaller;

template <class T, bool kIntoDense>
struct DenseConfig {
  using Element = T;  // unsigned
  static constexpr bool kExpands = kIntoDense;
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / device::kWarpThreads;
  static constexpr int kAtOnce = 8;  // words whose entries are on their way: a load after a store would wait for it
  static_assert(device::kWarpThreads % kAtOnce == 0, "every word is some lane's");
};

constexpr int kNone = -1;

template <class Config>
__global__ void __launch_bounds__(Config::kThreads) move_dense(const __grid_constant__ DenseOperands p) {
  using Element = typename Config::Element;
  const int lane = device::lane_index(), words = parts_of(p.columns, kWordBits);
  const uint32_t lower = (1u << lane) - 1;
  for (int64_t row = int64_t{blockIdx.x} * Config::kWarps + device::warp_index(); row < p.rows;
       row += int64_t{gridDim.x} * Config::kWarps) {
    const Element* from = static_cast<const Element*>(p.from) + row * (Config::kExpands ? p.stored : p.columns);
    Element* to = static_cast<Element*>(p.to) + row * (Config::kExpands ? p.columns : p.stored);
    int before = 0;
    for (int first = 0; first < words; first += device::kWarpThreads) {
      const int here = smaller(words - first, device::kWarpThreads), left = p.columns - (first + lane) * kWordBits;
      uint32_t bits = lane < here ? device::load(p.mask + (row * words + first + lane)) : 0;
      if (left < kWordBits && lane < here) bits &= (1u << left) - 1;
      int count = device::popcount(bits);
      const int in_front = before + device::lanes_before<device::kWarpThreads>(count);
      for (int next = 0; next < here; next += Config::kAtOnce) {
        Element entries[Config::kAtOnce];
        int places[Config::kAtOnce];  // in `to`, or none
#pragma unroll
        for (int i = 0; i < Config::kAtOnce; ++i) {  // past the last word there are no bits
          const uint32_t word = __shfl_sync(device::kAllLanes, bits, next + i);
          const int column = (first + next + i) * kWordBits + lane;
          const int value = __shfl_sync(device::kAllLanes, in_front, next + i) + device::popcount(word & lower);
          const bool is_kept = (word >> lane & 1) && value < p.stored;
          entries[i] = is_kept ? device::load(from + (Config::kExpands ? value : column)) : Element{0};
          places[i] = Config::kExpands ? (column < p.columns ? column : kNone) : is_kept ? value : kNone;
        }
#pragma unroll
        for (int i = 0; i < Config::kAtOnce; ++i) {
          if (places[i] != kNone) device::store(to + places[i], entries[i]);
        }
      }
      before += count;
    }
    if constexpr (!Config::kExpands) {
      for (int i = before + lane; i < p.stored; i += device::kWarpThreads) device::store(to + i, Element{0});
    }
  }
}

template <class T, bool kIntoDense>
const char* launch_dense(const DenseOperands& operands, int sm_count, void* stream) {
  using Config = DenseConfig<T, kIntoDense>;
  const int64_t blocks = device::ceil_div(operands.rows, Config::kWarps);
  device::Launch shape;
  shape.grid = dim3(static_cast<unsigned>(blocks < 8 * sm_count ? blocks : 8 * sm_count));
  shape.threads = Config::kThreads;
  shape.stream = stream;
  return device::launch(move_dense<Config>, shape, operands);
}

template <bool kIntoDense>
const char* launch_of_bytes(const DenseOperands& operands, int element_bytes, int sm_count, void* stream) {
  switch (element_bytes) {
    case 2: return launch_dense<uint16_t, kIntoDense>(operands, sm_count, stream);
    case 4: return launch_dense<uint32_t, kIntoDense>(operands, sm_count, stream);
    case 8: return launch_dense<uint64_t, kIntoDense>(operands, sm_count, stream);
    default: return "elements of 2, 4 or 8 bytes are covered, no others";
  }
}

const char* launch_expand_dense(const DenseOperands& operands, int element_bytes, int sm_count, void* stream) {
  return launch_of_bytes<true>(operands, element_bytes, sm_count, stream);
}

const char* launch_select_dense(const DenseOperands& operands, int element_bytes, int sm_count, void* stream) {
  return launch_of_bytes<false>(operands, element_bytes, sm_count, stream);
}

}  // namespace sparse24
