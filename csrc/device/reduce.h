// Sums, counts and maxima over the lanes of a warp, always in the same order, so that the same inputs give the same bits.
#pragma once

#include "device/simt.h"

namespace device {

constexpr unsigned kAllLanes = 0xffffffffu;

// Over kLanes neighbouring lanes (a power of two), the result in each of them. A lane and its partner add the same two
// numbers, so all lanes agree to the bit.
template <int kLanes>
LOWFAT_DEVICE float lanes_sum(float v) {
#pragma unroll
  for (int with = 1; with < kLanes; with *= 2) v += __shfl_xor_sync(kAllLanes, v, with);
  return v;
}

template <int kLanes>
LOWFAT_DEVICE float lanes_max(float v) {
#pragma unroll
  for (int with = 1; with < kLanes; with *= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, with));
  return v;
}

// Of counts in kLanes neighbouring lanes: what those below this one have; `count` becomes what all have.
template <int kLanes>
LOWFAT_DEVICE int lanes_before(int& count) {
  int before = 0;
#pragma unroll
  for (int with = 1; with < kLanes; with *= 2) {
    const int other = __shfl_xor_sync(kAllLanes, count, with);
    if (lane_index() & with) before += other;
    count += other;
  }
  return before;
}

// kCount sums (a power of two) over all lanes at once: each of the first kCount lanes gets one, and says which. In each step
// a lane gives its partner half of those that it still has. Lanes meet in the order of warp_sum, so that a sum has the same
// bits in whatever company.
template <int kCount, int kWith = 1>
LOWFAT_DEVICE float warp_sums(float (&v)[kCount], int& number) {
  static_assert((kCount & (kCount - 1)) == 0 && kCount * kWith <= kWarpThreads, "halves down to one");
  if constexpr (kCount == 1) {
    number = 0;
#pragma unroll
    for (int with = kWith; with < kWarpThreads; with *= 2) v[0] += __shfl_xor_sync(kAllLanes, v[0], with);
    return v[0];
  } else {
    constexpr int kHalf = kCount / 2;
    const bool is_upper = lane_index() & kWith;
    float kept[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = is_upper ? v[i] : v[i + kHalf];
      kept[i] = (is_upper ? v[i + kHalf] : v[i]) + __shfl_xor_sync(kAllLanes, given, kWith);
    }
    const float sum = warp_sums<kHalf, 2 * kWith>(kept, number);
    if (is_upper) number += kHalf;
    return sum;
  }
}

LOWFAT_DEVICE float quad_sum(float v) { return lanes_sum<4>(v); }  // the four lanes that share a row of an mma's d
LOWFAT_DEVICE float warp_sum(float v) { return lanes_sum<32>(v); }
LOWFAT_DEVICE float quad_max(float v) { return lanes_max<4>(v); }
LOWFAT_DEVICE float warp_max(float v) { return lanes_max<32>(v); }

}  // namespace device
