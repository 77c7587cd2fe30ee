// What the host files of sparse24 share: the sizes of a call, and its conditions.
//   x [..., k]   values [n, k kept / group]   mask [n, ceil(k / 32)]   bias [n]   y [..., n]
#pragma once

#include <optional>

#include "device/layout.h"
#include "host/tensor.h"

namespace sparse24 {

struct Call {
  int64_t m, n, k;
  int64_t kept, group;
  Kind kind;  // of every tensor but the mask, which is int32
  Dtype dtype;

  int64_t stored() const { return k / group * kept; }                      // of a row
  int64_t words() const { return device::ceil_div(k, device::kWordBits); }  // of a row's mask
};

// The conditions that the Python function checks with a named error, for callers of torch.ops. The mask's bits are not read.
Call check(const Tensor& x, const Tensor& values, const Tensor& mask, const std::optional<Tensor>& bias, int64_t kept,
           int64_t group);

}  // namespace sparse24
