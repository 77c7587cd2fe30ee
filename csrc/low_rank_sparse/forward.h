// What the host files of low_rank_sparse share: the sizes of a call, and its conditions.
//   x [..., k]   v [r, k]   u [n, r]   values [nnz]   starts [n + 1]   columns [nnz]   bias [n]   h [m, r]   y [..., n]
#pragma once

#include <optional>

#include "host/tensor.h"

namespace low_rank_sparse {

struct Call {
  int64_t m, n, k, r, nnz;
  bool is_narrow;  // columns is int16, and not int32
  Kind kind;       // of every tensor but starts and columns
  Dtype dtype;
};

enum BackwardNeeds { kNeedsDx = 1, kNeedsDv = 2, kNeedsDu = 4, kNeedsDvalues = 8, kNeedsDb = 64 };

// The conditions that the Python function checks with a named error, for callers of torch.ops. starts and columns themselves
// are not read.
Call check(const Tensor& x, const Tensor& v, const Tensor& u, const Tensor& values, const Tensor& starts,
           const Tensor& columns, const std::optional<Tensor>& bias);

// The same of the gradients' inputs.
Call check_backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& h, const Tensor& v, const Tensor& u,
                    const Tensor& values, const Tensor& starts, const Tensor& columns);

}  // namespace low_rank_sparse
