// Host side of the gradients of monarch on a GPU: checks, plan, launch, registration.
//   dy [..., n]   x [..., k]   h [b_out, m, b_in r]   v [b_in, r b_out, p]   u [b_out, s, b_in r]
#include "monarch/backward.h"

#ifdef LOWFAT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <tuple>

#include "host/call_counter.h"
#include "host/cuda_launch.h"
#include "host/cuda_stream.h"
#include "host/gpu.h"
#include "monarch/forward.h"
#include "monarch/library.h"

namespace monarch {
namespace {

CallCounter kernel_calls("monarch_backward", "cuda", "kernels"), library_calls("monarch_backward", "cuda", "library");

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, dv, du, db; empty where not wanted

// The conditions that the reference checks with a named error.
Call check(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& h, const Tensor& v, const Tensor& u, int64_t n,
           bool interleave) {
  const Call s = monarch::check(x, v, u, std::nullopt, n, interleave);
  const auto x_sizes = x.sizes(), dy_sizes = dy.sizes();
  const bool is_like_y = dy.dim() == x.dim() && std::equal(x_sizes.begin(), x_sizes.end() - 1, dy_sizes.begin()) &&
                         dy.size(dy.dim() - 1) == n;
  STD_TORCH_CHECK(is_like_y, "monarch_backward: dy must be [..., ", n, "] with the leading sizes of x");
  STD_TORCH_CHECK(!h || (h->dim() == 3 && h->size(0) == s.b_out && h->size(1) == s.m && h->size(2) == s.t()),
                  "monarch_backward: h must be [", s.b_out, ", ", s.m, ", ", s.t(), "]");
  STD_TORCH_CHECK(kind_of(dy) == s.kind && (!h || kind_of(*h) == s.kind),
                  "monarch_backward: dy and h must have one dtype with x (or use autocast) and be on its device");
  return s;
}

// Contiguous, dy and x as rows: the same bits for every layout of the same values.
struct Arguments {
  Tensor dy, x, v, u;
  std::optional<Tensor> h;

  Arguments(const Call& s, const Tensor& dy_any, const Tensor& x_any, const std::optional<Tensor>& h_any,
            const Tensor& v_any, const Tensor& u_any)
      : dy(torch::stable::view(as_contiguous(dy_any), {s.m, s.n})),
        x(torch::stable::view(as_contiguous(x_any), {s.m, s.k})),
        v(as_contiguous(v_any)),
        u(as_contiguous(u_any)) {
    if (h_any) h = as_contiguous(*h_any);
  }

  bool are_aligned() const {
    return is_aligned(dy) && is_aligned(x) && is_aligned(v) && is_aligned(u) && (!h || is_aligned(*h));
  }
};

// What the reference does, by torch's own products.
Gradients library(const Call& s, const Arguments& in, const Tensor& x, int64_t needs) {
  library_calls.count();
  const auto across = [](const Tensor& a, const Tensor& b) {
    return torch::stable::matmul(torch::stable::transpose(a, 1, 2), b);
  };
  const auto wanted = [&](int need, const auto& gradient) { return needs & need ? gradient() : empty(s.kind, {0}); };
  const Tensor blocks_dy = split_outputs(s, in.dy), blocks_x = split_inputs(s, in.x);
  const Tensor dz =
      wanted(kNeedsDx | kNeedsDv, [&] { return from_middle(s, torch::stable::matmul(blocks_dy, in.u)); });
  const int64_t rows[] = {0};
  return {wanted(kNeedsDx, [&] { return shaped_like(join_inputs(s, torch::stable::matmul(dz, in.v)), x); }),
          wanted(kNeedsDv, [&] { return across(dz, blocks_x); }),
          wanted(kNeedsDu,
                 [&] { return across(blocks_dy, in.h ? *in.h : to_middle(s, times_transposed(blocks_x, in.v))); }),
          wanted(kNeedsDb, [&] { return torch::stable::sum(in.dy, rows); })};
}

Gradients monarch_backward_cuda(const Tensor& dy_any, const Tensor& x_any, const std::optional<Tensor>& h_any,
                                const Tensor& v_any, const Tensor& u_any, int64_t needs, int64_t n, bool interleave) {
  const Call s = check(dy_any, x_any, h_any, v_any, u_any, n, interleave);
  needs &= kNeedsDx | kNeedsDv | kNeedsDu | kNeedsDb;
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Arguments in(s, dy_any, x_any, h_any, v_any, u_any);
  const Gpu gpu = gpu_of(device);
  Problem problem = on_gpu({s.m, s.n, s.k, s.r, s.dtype}, gpu, in.are_aligned());
  problem.b_in = s.b_in, problem.b_out = s.b_out, problem.interleave = interleave;
  const BackwardPlan plan = choose_backward(problem, static_cast<int>(needs));
  if (!plan.is_covered || needs == 0) return library(s, in, x_any, needs);

  kernel_calls.count();
  const auto where = [&](bool is_needed, std::vector<int64_t> sizes) {
    return is_needed ? empty(s.kind, sizes) : empty(s.kind, {0});
  };
  Tensor dx = where(needs & kNeedsDx, {s.m, s.k}), dv = where(needs & kNeedsDv, {s.b_in, s.q(), s.p});
  Tensor du = where(needs & kNeedsDu, {s.b_out, s.s, s.t()}), db = where(needs & kNeedsDb, {s.n});
  const Tensor dz = where(needs & (kNeedsDx | kNeedsDv), {s.b_in, s.m, s.q()});
  const Tensor made_h = where(needs & kNeedsDu && !in.h, {s.b_out, s.m, s.t()});
  const Tensor partials = floats(s.kind, plan.partials);
  const auto to = [](const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); };
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  const BackwardOperands operands{
      elements(in.dy), elements(in.x), in.h ? elements(*in.h) : nullptr, elements(in.v), elements(in.u), to(dz), to(made_h),
      float_data(partials), to(dx), to(dv), to(du), to(db),
      {size(s.m), size(s.n), size(s.k), size(s.b_in), size(s.b_out), size(s.r), interleave}, static_cast<int>(needs)};
  check_launch("monarch_backward", launch_backward(plan, operands, s.dtype, gpu.sm_count, current_cuda_stream(device)),
               gpu.arch);
  if (needs & kNeedsDx) dx = shaped_like(dx, x_any);
  return {std::move(dx), std::move(dv), std::move(du), std::move(db)};
}

}  // namespace
}  // namespace monarch

STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) {
  m.impl("monarch_backward", TORCH_BOX(&monarch::monarch_backward_cuda));
}
#endif
