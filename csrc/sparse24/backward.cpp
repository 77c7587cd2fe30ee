// Host side of the gradients of sparse24 on a GPU: checks, plan, launches, registration.
//   dy [..., n]   x [..., k]   values [n, k kept / group]   mask [n, ceil(k / 32)]
#include "sparse24/backward.h"

#ifdef LOWFAT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <tuple>

#include "host/call_counter.h"
#include "host/cuda_launch.h"
#include "host/cuda_stream.h"
#include "host/gpu.h"
#include "sparse24/forward.h"
#include "sparse24/library.h"

namespace sparse24 {
namespace {

CallCounter kernel_calls("sparse24_backward", "cuda", "kernels"), library_calls("sparse24_backward", "cuda", "library");

using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // dx, dvalues, db; empty where not wanted

// The conditions that the reference checks with a named error.
Call check(const Tensor& dy, const Tensor& x, const Tensor& values, const Tensor& mask, int64_t kept, int64_t group) {
  const Call s = sparse24::check(x, values, mask, std::nullopt, kept, group);
  const auto x_sizes = x.sizes(), dy_sizes = dy.sizes();
  const bool is_like_y = dy.dim() == x.dim() && std::equal(x_sizes.begin(), x_sizes.end() - 1, dy_sizes.begin()) &&
                         dy.size(dy.dim() - 1) == s.n;
  STD_TORCH_CHECK(is_like_y, "sparse24_backward: dy must be [..., ", s.n, "] with the leading sizes of x");
  STD_TORCH_CHECK(kind_of(dy) == s.kind,
                  "sparse24_backward: dy must have one dtype with x (or use autocast) and be on its device");
  return s;
}

// Contiguous, dy and x as rows: the same bits for every layout of the same values.
struct Arguments {
  Tensor dy, x, values, mask;

  Arguments(const Call& s, const Tensor& dy_any, const Tensor& x_any, const Tensor& values_any, const Tensor& mask_any)
      : dy(torch::stable::view(as_contiguous(dy_any), {s.m, s.n})),
        x(torch::stable::view(as_contiguous(x_any), {s.m, s.k})),
        values(as_contiguous(values_any)),
        mask(as_contiguous(mask_any)) {}
};

// What the reference does: by torch's own products, of the dense weight.
Gradients library(const Call& s, const Arguments& in, const Tensor& x, int64_t needs, const Gpu& gpu, void* stream) {
  library_calls.count();
  const SparseFactor weight =
      checked({"sparse24_backward", s.kind, s.dtype, in.mask, s.n, 1, s.k, s.stored(), gpu, stream});
  const auto wanted = [&](int need, const auto& gradient) { return needs & need ? gradient() : empty(s.kind, {0}); };
  const int64_t rows[] = {0};
  return {wanted(kNeedsDx,
                 [&] { return shaped_like(torch::stable::matmul(in.dy, weight.expanded(in.values)), x); }),
          wanted(kNeedsDvalues,
                 [&] {
                   const Tensor dense = torch::stable::matmul(torch::stable::transpose(in.dy, 0, 1), in.x);
                   return weight.selected(as_contiguous(dense));
                 }),
          wanted(kNeedsDb, [&] { return torch::stable::sum(in.dy, rows); })};
}

// Of no tokens.
Gradients no_gradients(const Call& s, const Tensor& x, int64_t needs) {
  const auto wanted = [&](int need, const Dimensions& sizes) { return zeros(s.kind, needs & need ? sizes : Dimensions{0}); };
  return {wanted(kNeedsDx, sizes_like(x, s.k)), wanted(kNeedsDvalues, {s.n, s.stored()}), wanted(kNeedsDb, {s.n})};
}

Gradients sparse24_backward_cuda(const Tensor& dy_any, const Tensor& x_any, const Tensor& values_any, const Tensor& mask_any,
                                 int64_t needs, int64_t kept, int64_t group) {
  const Call s = check(dy_any, x_any, values_any, mask_any, kept, group);
  needs &= kNeedsDx | kNeedsDvalues | kNeedsDb;
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (s.m == 0) return no_gradients(s, x_any, needs);
  const Arguments in(s, dy_any, x_any, values_any, mask_any);
  const Gpu gpu = gpu_of(device);
  const bool aligned = is_aligned(in.dy) && is_aligned(in.x) && is_aligned(in.values);
  Problem problem = on_gpu({s.m, s.n, s.k, 0, s.dtype}, gpu, aligned);
  problem.kept = kept, problem.group = group;
  const BackwardPlan plan = choose_backward(problem, static_cast<int>(needs));
  void* stream = current_cuda_stream(device);
  if (plan.tile == 0 || needs == 0) return library(s, in, x_any, needs, gpu, stream);

  kernel_calls.count();
  const auto wanted = [&](int need, std::vector<int64_t> sizes) {
    return needs & need ? empty(s.kind, sizes) : empty(s.kind, {0});
  };
  Tensor dx = wanted(kNeedsDx, {s.m, s.k}), dvalues = wanted(kNeedsDvalues, {s.n, s.stored()}), db = wanted(kNeedsDb, {s.n});
  const Tensor starts = floats(s.kind, plan.starts), partials = floats(s.kind, plan.partials);  // an int for each float
  const auto to = [](const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); };
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  const BackwardOperands operands{
      elements(in.dy), elements(in.x), elements(in.values), words_of(in.mask),
      static_cast<int32_t*>(starts.mutable_data_ptr()), float_data(partials), to(dx), to(dvalues), to(db),
      {size(s.m), size(s.n), size(s.k), 1, 1, size(s.stored()), size(kept), size(group)}, size(needs)};
  check_launch("sparse24_backward", launch_backward(plan, operands, s.dtype, gpu.sm_count, stream), gpu.arch);
  if (needs & kNeedsDx) dx = shaped_like(dx, x_any);
  return {std::move(dx), std::move(dvalues), std::move(db)};
}

}  // namespace
}  // namespace sparse24

STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) {
  m.impl("sparse24_backward", TORCH_BOX(&sparse24::sparse24_backward_cuda));
}
#endif
