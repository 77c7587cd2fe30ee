// Permutations around the library's products on a GPU, as the reference has them, and the bitmap that kernels of any support
// want.
#pragma once

#include "dictionary/bitmap.h"
#include "dictionary/forward.h"
#include "host/cuda_launch.h"
#include "host/gpu.h"
#include "sparse24/library.h"

namespace dictionary {

// [m, k] -> [Q, m, p]
inline Tensor split_inputs(const Call& s, const Tensor& x) {
  return torch::stable::transpose(shaped(padded(x, s.b_in * s.p), {s.m, s.b_in, s.p}), 0, 1);
}

// [rows, n] -> [P, rows, those of a block]
inline Tensor split_outputs(const Call& s, const Tensor& rows) {
  const Tensor all = padded(rows, s.b_out * s.rows());
  return torch::stable::transpose(shaped(all, {rows.size(0), s.b_out, s.rows()}), 0, 1);
}

inline Tensor middle_of(const Call& s, const Tensor& blocks_x, const Tensor& d) {
  const Tensor blocks = torch::stable::matmul(blocks_x, torch::stable::transpose(d, 2, 3));  // [P, Q, m, a]
  return as_contiguous(shaped(torch::stable::transpose(blocks, 1, 2), {s.b_out, s.m, s.middle()}));
}

// What both ways of a call need: where it launches, and for whom.
struct Launches {
  const char* op;
  const Call& s;
  Gpu gpu;
  void* stream;

  void done(const char* error) const { check_launch(op, error, gpu.arch); }

  sparse24::SparseFactor coefficients(const Tensor& mask) const {
    return sparse24::checked({op, s.kind, s.dtype, mask, s.n, s.b_in, s.a, s.s, gpu, stream});
  }

  Tensor bitmap(const Tensor& support) const {
    if (s.is_bitmap) return support;
    const Tensor mask = floats(s.kind, s.n * s.b_in * s.words());  // a word for each float
    // positions are int16: of no more atoms, so that words and s fit an int
    const MarkOperands operands{static_cast<const int16_t*>(support.const_data_ptr()),
                                static_cast<uint32_t*>(mask.mutable_data_ptr()), s.n * s.b_in,
                                static_cast<int>(s.words()), static_cast<int>(s.s)};
    if (s.n > 0 && s.a > 0) done(launch_mark(operands, gpu.sm_count, stream));
    return mask;
  }
};

}  // namespace dictionary
