// What the host files of wavelet share: the sizes of a call, its conditions, and the way back to the reference.
//   x [..., k]   v [r, columns]   gain [P, r]   u [rows, r]   h [P, m, r]   y [..., n]
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "host/tensor.h"

namespace wavelet {

struct Options {
  std::string filter;
  int64_t levels;
  std::string subbands;
  int64_t n;
  double scale;
};

struct Call {
  int64_t m, n, k, r;
  int64_t pairs;        // where kernels may do it: haar, one level, each pair with factors of its own; else 0
  Kind kind;            // of every tensor
  Dtype dtype;
  float scale;

  int64_t width() const { return (k + 1) / 2; }   // of a half of the inputs
  int64_t height() const { return (n + 1) / 2; }  // of the outputs
};

// The conditions that the Python function checks with a named error, for callers of torch.ops.
Call check(const Options& options, const Tensor& x, const Tensor& v, const std::optional<Tensor>& gain, const Tensor& u);
Call check(const Options& options, const Tensor& dy, const Tensor& x, const std::optional<Tensor>& h, const Tensor& v,
           const std::optional<Tensor>& gain, const Tensor& u);

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, dv, dgain, du; empty where not wanted

// What the ops do without a kernel, in Python: longer filters, more levels, shared factors, other dtypes and sizes.
std::tuple<Tensor, Tensor> by_reference(const Options& options, const Tensor& x, const Tensor& v,
                                        const std::optional<Tensor>& gain, const Tensor& u);
Gradients backward_by_reference(const Options& options, const Tensor& dy, const Tensor& x, const std::optional<Tensor>& h,
                                const Tensor& v, const std::optional<Tensor>& gain, const Tensor& u, int64_t needs);

}  // namespace wavelet
