// Host side of wavelet on a GPU, forward and backward: plan, launches, registration. (The conditions: check.cpp.)
//   x [..., k]   v [r, columns]   gain [P, r]   u [rows, r]   h [P, m, r]   dy, y [..., n]
#include "wavelet/haar.h"

#ifdef LOWFAT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "host/call_counter.h"
#include "host/cuda_launch.h"
#include "host/cuda_stream.h"
#include "host/gpu.h"
#include "wavelet/wavelet.h"

namespace wavelet {
namespace {

CallCounter kernel_calls("wavelet", "cuda", "kernels"), reference_calls("wavelet", "cuda", "reference"),
    backward_kernel_calls("wavelet_backward", "cuda", "kernels"),
    backward_reference_calls("wavelet_backward", "cuda", "reference");

int size_of(int64_t value) { return static_cast<int>(value); }
uint16_t* bits(const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }

// Contiguous: the same bits for every layout of the same values.
struct Arguments {
  Tensor x, v, u;

  Arguments(const Tensor& x_any, const Tensor& v_any, const Tensor& u_any)
      : x(as_contiguous(x_any)), v(as_contiguous(v_any)), u(as_contiguous(u_any)) {}

  bool are_aligned() const { return is_aligned(x) && is_aligned(v) && is_aligned(u); }
};

// No problem of the kernels' where there are gains.
Problem problem_of(const Call& s, bool has_gain, bool are_aligned, const Gpu& gpu) {
  Problem problem = on_gpu({s.m, s.n, s.k, s.r, s.dtype}, gpu, are_aligned);
  problem.pairs = has_gain ? 0 : s.pairs;
  return problem;
}

void forward(const Call& s, const Arguments& in, const ForwardPlan& plan, uint16_t* h, uint16_t* y, const Gpu& gpu,
             void* stream) {
  const Tensor partials = floats(s.kind, plan.partials);
  const ForwardOperands operands{elements(in.x), elements(in.v), elements(in.u), h, y, float_data(partials), size_of(s.m),
                                 size_of(s.n), size_of(s.k), size_of(s.r), size_of(s.pairs), s.scale};
  check_launch("wavelet", launch_forward(plan, operands, s.dtype, stream), gpu.arch);
}

struct Result {
  Tensor y, h;  // h empty where it was not asked for
};

Result forward_cuda(const Options& options, const Tensor& x, const Tensor& v, const std::optional<Tensor>& gain,
                    const Tensor& u, bool keep_h) {
  const Call s = check(options, x, v, gain, u);
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Arguments in(x, v, u);
  const Gpu gpu = gpu_of(device);
  const ForwardPlan plan = choose_forward(problem_of(s, gain.has_value(), in.are_aligned(), gpu));
  if (plan.splits == 0) {
    if (s.m > 0) reference_calls.count();
    auto [y, h] = by_reference(options, x, v, gain, u);
    return {std::move(y), std::move(h)};
  }
  kernel_calls.count();
  Result result{empty_rows(x, s.kind, s.n), empty(s.kind, keep_h ? Dimensions{s.pairs, s.m, s.r} : Dimensions{0})};
  forward(s, in, plan, keep_h ? bits(result.h) : nullptr, bits(result.y), gpu, current_cuda_stream(device));
  return result;
}

Tensor wavelet_cuda(const Tensor& x, const Tensor& v, const std::optional<Tensor>& gain, const Tensor& u,
                    const std::string& filter, int64_t levels, const std::string& subbands, int64_t n, double scale) {
  return forward_cuda({filter, levels, subbands, n, scale}, x, v, gain, u, false).y;
}

std::tuple<Tensor, Tensor> wavelet_training_cuda(const Tensor& x, const Tensor& v, const std::optional<Tensor>& gain,
                                                 const Tensor& u, const std::string& filter, int64_t levels,
                                                 const std::string& subbands, int64_t n, double scale) {
  Result result = forward_cuda({filter, levels, subbands, n, scale}, x, v, gain, u, true);
  return {std::move(result.y), std::move(result.h)};
}

Gradients wavelet_backward_cuda(const Tensor& dy_any, const Tensor& x, const std::optional<Tensor>& kept_h, const Tensor& v,
                                const std::optional<Tensor>& gain, const Tensor& u, int64_t needs, const std::string& filter,
                                int64_t levels, const std::string& subbands, int64_t n, double scale) {
  const Options options{filter, levels, subbands, n, scale};
  const Call s = check(options, dy_any, x, kept_h, v, gain, u);
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Arguments in(x, v, u);
  const Tensor dy = as_contiguous(dy_any);
  Tensor h = kept_h ? as_contiguous(*kept_h) : empty(s.kind, {0});
  const Gpu gpu = gpu_of(device);
  const bool are_aligned = in.are_aligned() && is_aligned(dy) && is_aligned(h);
  const int wanted_ones = static_cast<int>(needs) & (kNeedsDx | kNeedsDv | kNeedsDu);
  const BackwardPlan plan = choose_backward(problem_of(s, gain.has_value(), are_aligned, gpu), wanted_ones);
  if (plan.weight_splits == 0) {
    if (s.m > 0) backward_reference_calls.count();
    return backward_by_reference(options, dy_any, x, kept_h, v, gain, u, needs);
  }
  backward_kernel_calls.count();
  void* stream = current_cuda_stream(device);
  if (wanted_ones & kNeedsDu && !kept_h) {
    h = empty(s.kind, {s.pairs, s.m, s.r});
    forward(s, in, plan.h, bits(h), nullptr, gpu, stream);
  }
  const auto wanted = [&](int need, const Dimensions& sizes) {
    return empty(s.kind, wanted_ones & need ? sizes : Dimensions{0});
  };
  Tensor dx = wanted_ones & kNeedsDx ? empty_rows(x, s.kind, s.k) : empty(s.kind, {0});
  Tensor dv = wanted(kNeedsDv, {s.r, s.pairs * s.width()}), du = wanted(kNeedsDu, {s.pairs * s.height(), s.r});
  const Tensor dh = wanted(kNeedsDv, {s.pairs, s.m, s.r}), partials = floats(s.kind, plan.partials);
  const BackwardOperands operands{elements(dy), elements(in.x), elements(h), elements(in.v), elements(in.u), bits(dh),
                                  float_data(partials), bits(dx), bits(dv), bits(du), size_of(s.m), size_of(s.n),
                                  size_of(s.k), size_of(s.r), size_of(s.pairs), s.scale, wanted_ones};
  check_launch("wavelet_backward", launch_backward(plan, operands, s.dtype, gpu.sm_count, stream), gpu.arch);
  return {std::move(dx), std::move(dv), empty(s.kind, {0}), std::move(du)};
}

}  // namespace
}  // namespace wavelet

STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) {
  m.impl("wavelet", TORCH_BOX(&wavelet::wavelet_cuda));
  m.impl("wavelet_training", TORCH_BOX(&wavelet::wavelet_training_cuda));
  m.impl("wavelet_backward", TORCH_BOX(&wavelet::wavelet_backward_cuda));
}
#endif
