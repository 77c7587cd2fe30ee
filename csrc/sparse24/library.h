// A sparse factor on a GPU with its zeros, for products of the library, and what is kept of their dense gradient.
#pragma once

#include "host/cuda_launch.h"
#include "host/gpu.h"
#include "host/tensor.h"
#include "sparse24/dense.h"

namespace sparse24 {

// Which factor, and for which op and where it is wanted.
struct SparseFactor {
  const char* op;
  Kind kind;
  Dtype dtype;
  const Tensor& mask;                     // [rows, blocks words]
  int64_t rows, blocks, columns, stored;  // the latter two of a row and block
  const Gpu& gpu;
  void* stream;

  // values [rows, blocks stored] -> [rows, blocks columns]
  Tensor expanded(const Tensor& values) const { return moved(launch_expand_dense, values, columns); }

  // dense [rows, blocks columns] -> [rows, blocks stored]
  Tensor selected(const Tensor& dense) const { return moved(launch_select_dense, dense, stored); }

 private:
  template <class Launch>
  Tensor moved(const Launch& launch, const Tensor& from, int64_t width) const {
    const Tensor to = empty(kind, {rows, blocks * width});
    const DenseOperands operands{from.const_data_ptr(), to.mutable_data_ptr(), words_of(mask), rows * blocks,
                                 static_cast<int>(columns), static_cast<int>(stored)};
    const int bytes = dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
    if (rows > 0 && columns > 0) check_launch(op, launch(operands, bytes, gpu.sm_count, stream), gpu.arch);
    return to;
  }
};

// The condition that the reference checks with a named error.
inline SparseFactor checked(const SparseFactor& factor) {
  STD_TORCH_CHECK(factor.columns <= kDenseMaxColumns, factor.op, ": the sparse factor has ", factor.columns,
                  " columns, a GPU takes ", kDenseMaxColumns, " at most");
  return factor;
}

}  // namespace sparse24
