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
#include "monarch/library.h"

// Lives in libtorch_cuda.so alone: see host/cuda_stream.h.
#pragma weak aoti_torch_cuda_baddbmm_out

namespace monarch {
namespace {

CallCounter stationary_calls("monarch", "cuda", "stationary"), batched_calls("monarch", "cuda", "batched"),
    library_calls("monarch", "cuda", "library");

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

// --- the library: what the reference does ---

Results library(const Call& s, const Arguments& in) {
  library_calls.count();
  const Tensor h = to_middle(s, times_transposed(split_inputs(s, shaped(in.x, {s.m, s.k})), in.v));
  if (!in.bias) return {join_outputs(s, times_transposed(h, in.u)), h};
  STD_TORCH_CHECK(&aoti_torch_cuda_baddbmm_out != nullptr, "monarch: this torch has no CUDA support");
  const Tensor y = empty(s.kind, {s.b_out, s.m, s.s});
  const Tensor added = split_outputs(s, shaped(*in.bias, {1, s.n}));  // before the only rounding
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cuda_baddbmm_out(y.get(), added.get(), h.get(), torch::stable::transpose(in.u, 1, 2).get(), 1, 1));
  return {join_outputs(s, y), h};
}

// --- the op ---

// wants_h: else h may come back empty.
Results run(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias, int64_t n, bool interleave,
            bool wants_h) {
  const Call s = check(x, v, u, bias, n, interleave);
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Arguments in(x, v, u, bias);
  const Gpu gpu = gpu_of(device);
  const bool aligned = is_aligned(in.x) && is_aligned(in.v) && is_aligned(in.u);
  Problem problem = on_gpu({s.m, s.n, s.k, s.r, s.dtype}, gpu, aligned);
  problem.b_in = s.b_in, problem.b_out = s.b_out, problem.interleave = interleave;
  const StationaryPlan clusters = choose_stationary(problem);
  const bool is_stationary = clusters.tokens > 0;
  const MonarchPlan plan = is_stationary ? MonarchPlan() : choose_monarch(problem);
  if (s.m > 0 && !is_stationary && plan.first.tokens == 0) {
    auto [y, h] = library(s, in);
    return {shaped_like(y, x), std::move(h)};
  }

  const bool has_h = wants_h || !is_stationary;
  Results results{empty_rows(in.x, s.kind, s.n), empty(s.kind, {s.b_out, has_h ? s.m : 0, s.b_in * s.r})};
  if (s.m == 0) return results;
  (is_stationary ? stationary_calls : batched_calls).count();
  auto& [y, h] = results;
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  const MonarchOperands operands{elements(in.x), elements(in.v), elements(in.u), in.bias ? elements(*in.bias) : nullptr,
                                 has_h ? static_cast<uint16_t*>(h.mutable_data_ptr()) : nullptr,
                                 static_cast<uint16_t*>(y.mutable_data_ptr()),
                                 {size(s.m), size(s.n), size(s.k), size(s.b_in), size(s.b_out), size(s.r), interleave}};
  void* stream = current_cuda_stream(device);
  check_launch("monarch",
               is_stationary ? launch_stationary(clusters, operands, s.dtype, stream)
                             : launch_monarch(plan, operands, s.dtype, stream),
               gpu.arch);
  return results;
}

Results forward(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias, int64_t n,
                bool interleave) {
  return run(x, v, u, bias, n, interleave, true);
}

Tensor monarch_cuda(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias, int64_t n,
                    bool interleave) {
  return std::get<0>(run(x, v, u, bias, n, interleave, false));
}

}  // namespace
}  // namespace monarch

STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) {
  m.impl("monarch", TORCH_BOX(&monarch::monarch_cuda));
  m.impl("monarch_training", TORCH_BOX(&monarch::forward));
}
#endif
