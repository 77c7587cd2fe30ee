// Permutations around the library's batched products, as the reference has them: by torch's own views and copies.
#pragma once

#include "monarch/forward.h"

namespace monarch {

inline Tensor times_transposed(const Tensor& a, const Tensor& w) {
  return torch::stable::matmul(a, torch::stable::transpose(w, 1, 2));
}

// [m, k] -> [b_in, m, p]
inline Tensor split_inputs(const Call& s, const Tensor& x) {
  return torch::stable::transpose(shaped(padded(x, s.b_in * s.p), {s.m, s.b_in, s.p}), 0, 1);
}

// [b_in, m, p] -> [m, k]
inline Tensor join_inputs(const Call& s, const Tensor& x) {
  Tensor rows = shaped(torch::stable::transpose(x, 0, 1), {s.m, s.b_in * s.p});
  return as_contiguous(torch::stable::narrow(rows, 1, 0, s.k));
}

// [b_in, m, r b_out] -> [b_out, m, b_in r]
inline Tensor to_middle(const Call& s, const Tensor& z) {
  return as_contiguous(shaped(permuted(shaped(z, {s.b_in, s.m, s.r, s.b_out}), {3, 1, 0, 2}), {s.b_out, s.m, s.t()}));
}

// [b_out, m, b_in r] -> [b_in, m, r b_out]
inline Tensor from_middle(const Call& s, const Tensor& h) {
  return shaped(permuted(shaped(h, {s.b_out, s.m, s.b_in, s.r}), {2, 1, 3, 0}), {s.b_in, s.m, s.q()});
}

// [rows, n] -> [b_out, rows, s]
inline Tensor split_outputs(const Call& s, const Tensor& rows) {
  const Tensor all = padded(rows, s.b_out * s.s);
  return s.interleave ? permuted(shaped(all, {rows.size(0), s.s, s.b_out}), {2, 0, 1})
                      : torch::stable::transpose(shaped(all, {rows.size(0), s.b_out, s.s}), 0, 1);
}

// [b_out, m, s] -> [m, n]
inline Tensor join_outputs(const Call& s, const Tensor& y) {
  Tensor rows = shaped(s.interleave ? permuted(y, {1, 2, 0}) : torch::stable::transpose(y, 0, 1), {s.m, s.b_out * s.s});
  return as_contiguous(torch::stable::narrow(rows, 1, 0, s.n));
}

}  // namespace monarch
