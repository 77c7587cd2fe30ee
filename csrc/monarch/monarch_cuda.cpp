// Host side of monarch on a GPU: checks, plan, launches, registration.
//   x [..., k]   v [b_in, r b_out, p]   u [b_out, s, b_in r]   bias [n]   h [b_out, m, b_in r]   y [..., n]
#include "monarch/monarch_cuda.h"

#ifdef LOWFAT_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "host/call_counter.h"
#include "host/cuda_launch.h"
#include "host/cuda_stream.h"
#include "host/gpu.h"
#include "host/tensor.h"
#include "monarch/forward.h"

// Lives in libtorch_cuda.so alone: see host/cuda_stream.h.
#pragma weak aoti_torch_cuda_baddbmm_out

namespace monarch {
namespace {

CallCounter batched_calls("monarch", "cuda", "batched"), library_calls("monarch", "cuda", "library");

using Dimensions = std::vector<int64_t>;
using Results = std::tuple<Tensor, Tensor>;  // y, h

// Contiguous: the same bits for every layout of the same values, on whichever path.
struct Arguments {
  Tensor x, v, u;
  std::optional<Tensor> bias;

  Arguments(const Tensor& x_any, const Tensor& v_any, const Tensor& u_any, const std::optional<Tensor>& bias_any)
      : x(as_contiguous(x_any)), v(as_contiguous(v_any)), u(as_contiguous(u_any)) {
    if (bias_any) bias = as_contiguous(*bias_any);
  }
};

// --- the library: what the reference does, by torch's own products and copies ---

Tensor padded(const Tensor& rows, int64_t columns) {
  const int64_t more[] = {0, columns - rows.size(1)};
  return more[1] == 0 ? rows : torch::stable::pad(rows, more);
}

Tensor permuted(const Tensor& t, const Dimensions& order) {
  return call_torch("aten::permute", "", t, torch::headeronly::IntHeaderOnlyArrayRef(order));
}

Tensor shaped(const Tensor& t, const Dimensions& sizes) { return torch::stable::reshape(t, sizes); }

Tensor times_transposed(const Tensor& a, const Tensor& w) {
  return torch::stable::matmul(a, torch::stable::transpose(w, 1, 2));
}

// [rows, n] -> [b_out, rows, s]
Tensor split_outputs(const Call& s, const Tensor& rows) {
  const Tensor all = padded(rows, s.b_out * s.s);
  return s.interleave ? permuted(shaped(all, {rows.size(0), s.s, s.b_out}), {2, 0, 1})
                      : torch::stable::transpose(shaped(all, {rows.size(0), s.b_out, s.s}), 0, 1);
}

// [b_out, m, s] -> [m, n]
Tensor join_outputs(const Call& s, const Tensor& y) {
  Tensor rows = shaped(s.interleave ? permuted(y, {1, 2, 0}) : torch::stable::transpose(y, 0, 1), {s.m, s.b_out * s.s});
  return as_contiguous(torch::stable::narrow(rows, 1, 0, s.n));
}

Results library(const Call& s, const Arguments& in) {
  library_calls.count();
  const Tensor blocks = shaped(padded(shaped(in.x, {s.m, s.k}), s.b_in * s.p), {s.m, s.b_in, s.p});
  const Tensor z = times_transposed(torch::stable::transpose(blocks, 0, 1), in.v);
  const Tensor h = as_contiguous(
      shaped(permuted(shaped(z, {s.b_in, s.m, s.r, s.b_out}), {3, 1, 0, 2}), {s.b_out, s.m, s.b_in * s.r}));
  if (!in.bias) return {join_outputs(s, times_transposed(h, in.u)), h};
  STD_TORCH_CHECK(&aoti_torch_cuda_baddbmm_out != nullptr, "monarch: this torch has no CUDA support");
  const Tensor y = empty(s.kind, {s.b_out, s.m, s.s});
  const Tensor added = split_outputs(s, shaped(*in.bias, {1, s.n}));  // before the only rounding
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cuda_baddbmm_out(y.get(), added.get(), h.get(), torch::stable::transpose(in.u, 1, 2).get(), 1, 1));
  return {join_outputs(s, y), h};
}

Tensor shaped_like(const Tensor& y, const Tensor& x) {
  const auto x_sizes = x.sizes();
  Dimensions sizes(x_sizes.begin(), x_sizes.end());
  sizes.back() = y.size(1);
  return x.dim() == 2 ? y : torch::stable::view(y, sizes);
}

// --- the op ---

Results forward(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias, int64_t n,
                bool interleave) {
  const Call s = check(x, v, u, bias, n, interleave);
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Arguments in(x, v, u, bias);
  const Gpu gpu = gpu_of(device);
  Problem problem{s.m, s.n, s.k, s.r, s.dtype, Device::cuda, CpuLevel::scalar, gpu.arch, gpu.sm_count};
  problem.is_aligned = is_aligned(in.x) && is_aligned(in.v) && is_aligned(in.u);
  problem.b_in = s.b_in, problem.b_out = s.b_out, problem.interleave = interleave;
  const MonarchPlan plan = choose_monarch(problem);
  if (s.m > 0 && plan.first.tokens == 0) {
    auto [y, h] = library(s, in);
    return {shaped_like(y, x), std::move(h)};
  }

  Results results{empty_rows(in.x, s.kind, s.n), empty(s.kind, {s.b_out, s.m, s.b_in * s.r})};
  if (s.m == 0) return results;
  batched_calls.count();
  auto& [y, h] = results;
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  const MonarchOperands operands{elements(in.x), elements(in.v), elements(in.u), in.bias ? elements(*in.bias) : nullptr,
                                 static_cast<uint16_t*>(h.mutable_data_ptr()), static_cast<uint16_t*>(y.mutable_data_ptr()),
                                 {size(s.m), size(s.n), size(s.k), size(s.b_in), size(s.b_out), size(s.r), interleave}};
  check_launch("monarch", launch_monarch(plan, operands, s.dtype, current_cuda_stream(device)), gpu.arch);
  return results;
}

Tensor monarch_cuda(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias, int64_t n,
                    bool interleave) {
  return std::get<0>(forward(x, v, u, bias, n, interleave));
}

}  // namespace
}  // namespace monarch

STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) {
  m.impl("monarch", TORCH_BOX(&monarch::monarch_cuda));
  m.impl("monarch_training", TORCH_BOX(&monarch::forward));
}
#endif
