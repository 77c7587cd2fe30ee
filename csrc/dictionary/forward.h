// What the host files of dictionary share: the sizes of a call, and its conditions.
//   x [..., k]   d [P, Q, a, p]   values [n, Q s]   support   bias [n]   h [P, m, Q a]   y [..., n]
#pragma once

#include <optional>

#include "device/layout.h"
#include "host/tensor.h"

namespace dictionary {

struct Call {
  int64_t m, n, k;
  int64_t b_out, b_in;  // P, Q: blocks of the outputs and of the inputs
  int64_t a, p, s;      // of a block: atoms, inputs (the last one may have fewer), non-zeros of a row
  bool is_bitmap;       // support is int32 [n, Q ceil(a / 32)], and not int16 [n, Q s]
  Kind kind;            // of every tensor but support
  Dtype dtype;

  int64_t rows() const { return device::ceil_div(n, b_out); }               // of a block; the last ones may have fewer
  int64_t words() const { return device::ceil_div(a, device::kWordBits); }  // of a row's bitmap for one block
  int64_t support() const { return is_bitmap ? words() : s; }               // of a row for one block
  int64_t middle() const { return b_in * a; }                               // columns of h
};

// The conditions that the Python function checks with a named error, for callers of torch.ops. Support itself is not read.
Call check(const Tensor& x, const Tensor& d, const Tensor& values, const Tensor& support,
           const std::optional<Tensor>& bias);

}  // namespace dictionary
