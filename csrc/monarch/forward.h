// What the host files of monarch share: the sizes of a call, and its conditions.
//   x [..., k]   v [b_in, b_out r, p]   u [b_out, s, b_in r]   bias [n]   h [b_out, m, b_in r]   y [..., n]
#pragma once

#include <optional>

#include "host/tensor.h"

namespace monarch {

struct Call {
  int64_t m, n, k, r;
  int64_t b_in, b_out;
  int64_t p, s;  // inputs and outputs of a block; the last ones have fewer where the blocks do not divide k and n
  Kind kind;     // of every tensor
  Dtype dtype;
  bool interleave;

  int64_t q() const { return b_out * r; }
  int64_t t() const { return b_in * r; }
};

// The conditions that the Python function checks with a named error, for callers of torch.ops.
Call check(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias, int64_t n,
            bool interleave);

}  // namespace monarch
