// Host side of sparse24 on a GPU: plan, launches, registration. (The conditions: sparse24.cpp.)
//   x [..., k]   values [n, k kept / group]   mask [n, ceil(k / 32)]   bias [n]   y [..., n]
#include "sparse24/sparse24_cuda.h"

#ifdef LOWFAT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "host/call_counter.h"
#include "host/cuda_launch.h"
#include "host/cuda_stream.h"
#include "host/gpu.h"
#include "sparse24/forward.h"
#include "sparse24/library.h"

namespace sparse24 {
namespace {

CallCounter decode_calls("sparse24", "cuda", "decode"), prefill_calls("sparse24", "cuda", "prefill"),
    library_calls("sparse24", "cuda", "library");

// Contiguous: the same bits for every layout of the same values, on whichever path.
struct Arguments {
  Tensor x, values, mask;
  std::optional<Tensor> bias;

  Arguments(const Tensor& x_any, const Tensor& values_any, const Tensor& mask_any, const std::optional<Tensor>& bias_any)
      : x(as_contiguous(x_any)), values(as_contiguous(values_any)), mask(as_contiguous(mask_any)) {
    if (bias_any) bias = as_contiguous(*bias_any);
  }

  const uint32_t* words() const { return static_cast<const uint32_t*>(mask.const_data_ptr()); }
};

ForwardOperands operands_of(const Call& s, const Arguments& in, const Tensor& y) {
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  return {elements(in.x), elements(in.values), in.words(), in.bias ? elements(*in.bias) : nullptr,
          static_cast<uint16_t*>(y.mutable_data_ptr()), size(s.m), size(s.n), size(s.k)};
}

// False where no counters are left, and then has done nothing.
bool decode(const Call& s, const Arguments& in, const ForwardPlan& plan, const Gpu& gpu, void* stream, const Tensor& y) {
  SplitSums sums{nullptr, nullptr};
  std::optional<Tensor> partials;
  if (plan.splits > 1) {
    sums.counter = barrier_counter("sparse24", s.kind.device_index, stream, plan.grid, gpu.arch);
    if (!sums.counter) return false;
    const int64_t stride = partial_stride(shape_of(plan.token_tiles).rows(), static_cast<int>(s.n));
    partials = floats(s.kind, plan.splits * s.m * stride);
    sums.partials = float_data(*partials);
  }
  decode_calls.count();
  check_launch("sparse24", launch_forward(plan, operands_of(s, in, y), sums, s.dtype, stream), gpu.arch);
  return true;
}

Tensor prefill(const Call& s, const Arguments& in, const PrefillPlan& plan, const Gpu& gpu, void* stream) {
  prefill_calls.count();
  const Tensor y = empty_rows(in.x, s.kind, s.n);
  check_launch("sparse24", launch_prefill(plan, operands_of(s, in, y), s.dtype, stream), gpu.arch);
  return y;
}

// torch's own product, of the weight with its zeros.
Tensor library(const Call& s, const Arguments& in, const Gpu& gpu, void* stream) {
  library_calls.count();
  const SparseFactor weight =
      checked({"sparse24", s.kind, s.dtype, in.mask, s.n, 1, s.k, s.stored(), gpu, stream});
  return library_linear(in.x, weight.expanded(in.values), in.bias);
}

Tensor sparse24_cuda(const Tensor& x, const Tensor& values, const Tensor& mask, const std::optional<Tensor>& bias,
                     int64_t kept, int64_t group) {
  const Call s = check(x, values, mask, bias, kept, group);
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Arguments in(x, values, mask, bias);
  const Gpu gpu = gpu_of(device);
  if (s.m == 0) return empty_rows(in.x, s.kind, s.n);
  const bool aligned = is_aligned(in.x) && is_aligned(in.values) && is_aligned(in.mask);
  Problem problem = on_gpu({s.m, s.n, s.k, 0, s.dtype}, gpu, aligned);
  problem.kept = kept, problem.group = group;
  const ForwardPlan plan = choose_forward(problem);
  const PrefillPlan prefill_plan = choose_prefill(problem);
  void* stream = current_cuda_stream(device);
  if (prefill_plan.rows > 0) return prefill(s, in, prefill_plan, gpu, stream);
  if (plan.token_tiles > 0) {
    const Tensor y = empty_rows(in.x, s.kind, s.n);
    if (decode(s, in, plan, gpu, stream, y)) return y;
  }
  return library(s, in, gpu, stream);
}

}  // namespace
}  // namespace sparse24

STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) { m.impl("sparse24", TORCH_BOX(&sparse24::sparse24_cuda)); }
#endif
