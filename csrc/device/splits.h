// What the splits of a contraction have summed, each for itself, in global memory: added up in their order.
#pragma once

#include "device/load.h"

namespace device {

// Four neighbours of [splits, stride], kAtOnce loads on their way.
template <int kAtOnce>
LOWFAT_DEVICE float4 sum_of_splits(const float* partials, int64_t stride, int splits) {
  float4 sum = make_float4(0, 0, 0, 0);
  for (int split = 0; split < splits; split += kAtOnce) {
    float4 parts[kAtOnce];
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      parts[s] = make_float4(0, 0, 0, 0);
      if (split + s < splits) parts[s] = load16_floats_l2(partials + (split + s) * stride);
    }
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      sum.x += parts[s].x;
      sum.y += parts[s].y;
      sum.z += parts[s].z;
      sum.w += parts[s].w;
    }
  }
  return sum;
}

}  // namespace device
