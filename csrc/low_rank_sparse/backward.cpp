// Host side of the gradients of low_rank_sparse on a GPU: checks, plan, launches, products of the library, registration.
//   dy [..., n]   x [..., k]   h [m, r]   v [r, k]   u [n, r]   values [nnz]   starts [n + 1]   columns [nnz]
#include "low_rank_sparse/backward.h"

#ifdef LOWFAT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "host/call_counter.h"
#include "host/cuda_stream.h"
#include "low_rank_sparse/library.h"

namespace low_rank_sparse {
namespace {

using torch::stable::matmul, torch::stable::transpose;

// Who made dvalues and db. What the others take of S is the weight, by its own kernel wherever that can.
CallCounter kernel_calls("low_rank_sparse_backward", "cuda", "kernels"),
    library_calls("low_rank_sparse_backward", "cuda", "library");

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // dx, dv, du, dvalues, db; empty where not wanted

template <class Gradient>
Tensor wanted(const Call& s, bool is_needed, const Gradient& gradient) {
  return is_needed ? gradient() : empty(s.kind, {0});
}

struct Selected {
  Tensor dvalues, db;  // empty where not wanted
};

// By torch's own product, of which all but the entries is thrown away.
Selected library(const Launches& on, const Tensor& dy, int needs) {
  library_calls.count();
  const int64_t rows[] = {0};
  return {wanted(on.s, needs & kSelectsValues && on.s.nnz > 0,
                 [&] { return on.selected(as_contiguous(matmul(transpose(dy, 0, 1), on.in.x))); }),
          wanted(on.s, needs & kSelectsDb, [&] { return torch::stable::sum(dy, rows); })};
}

Selected kernels(const Launches& on, const BackwardPlan& plan, const Tensor& dy, int needs) {
  const Call& s = on.s;
  const Tensor partials = floats(s.kind, plan.partials);
  const auto made = [&](int need, int64_t size) { return empty(s.kind, {needs & need ? size : 0}); };
  Tensor dvalues = made(kSelectsValues, padded_entries(s.nnz));
  Selected found{torch::stable::narrow(dvalues, 0, 0, needs & kSelectsValues ? s.nnz : 0), made(kSelectsDb, s.n)};
  const auto to = [](const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); };
  const BackwardOperands operands{elements(dy), elements(on.in.x), on.support(), float_data(partials), to(dvalues),
                                  to(found.db), static_cast<int>(s.m), needs};
  if (needs != 0) {
    kernel_calls.count();
    on.done(launch_backward(plan, operands, s.dtype, on.gpu.sm_count, on.stream));
  }
  return found;
}

// Of no tokens.
Gradients no_gradients(const Call& s, const Tensor& x, int64_t needs) {
  const auto wanted = [&](int need, const Dimensions& sizes) { return zeros(s.kind, needs & need ? sizes : Dimensions{0}); };
  return {wanted(kNeedsDx, sizes_like(x, s.k)), wanted(kNeedsDv, {s.r, s.k}), wanted(kNeedsDu, {s.n, s.r}),
          wanted(kNeedsDvalues, {s.nnz}), wanted(kNeedsDb, {s.n})};
}

Gradients low_rank_sparse_backward_cuda(const Tensor& dy_any, const Tensor& x_any, const std::optional<Tensor>& h_any,
                                        const Tensor& v, const Tensor& u, const Tensor& values, const Tensor& starts,
                                        const Tensor& columns, int64_t needs, double scale) {
  const Call s = check_backward(dy_any, x_any, h_any, v, u, values, starts, columns);
  needs &= kNeedsDx | kNeedsDv | kNeedsDu | kNeedsDvalues | kNeedsDb;
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (s.m == 0) return no_gradients(s, x_any, needs);
  const Arguments in(s, x_any, v, u, values, starts, columns);
  const Tensor dy = torch::stable::view(as_contiguous(dy_any), {s.m, s.n});
  const Launches on{"low_rank_sparse_backward", s, in, scale, gpu_of(device), current_cuda_stream(device)};
  Problem problem = on.problem();
  problem.is_aligned = problem.is_aligned && is_aligned(dy);
  const int selects = (needs & kNeedsDvalues ? kSelectsValues : 0) | (needs & kNeedsDb ? kSelectsDb : 0);
  const BackwardPlan plan = choose_backward(problem, selects);
  Selected found = plan.tile > 0 && needs != 0 ? kernels(on, plan, dy, selects) : library(on, dy, selects);

  // dy^T x is never made for these: scale dy u and scale x v^T are as narrow as the rank.
  Tensor dx = wanted(s, needs & kNeedsDx,
                     [&] { return shaped_like(matmul(dy, on.weight(choose_materialize(problem))), x_any); });
  Tensor dv = wanted(s, needs & kNeedsDv, [&] {
    return as_contiguous(matmul(transpose(scaled_product(s.kind, dy, in.u, scale), 0, 1), in.x));
  });
  Tensor du = wanted(s, needs & kNeedsDu, [&] {
    const Tensor h = h_any ? as_contiguous(*h_any) : scaled_product(s.kind, in.x, transpose(in.v, 0, 1), scale);
    return as_contiguous(matmul(transpose(dy, 0, 1), h));
  });
  return {std::move(dx), std::move(dv), std::move(du), std::move(found.dvalues), std::move(found.db)};
}

}  // namespace
}  // namespace low_rank_sparse

STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) {
  m.impl("low_rank_sparse_backward", TORCH_BOX(&low_rank_sparse::low_rank_sparse_backward_cuda));
}
#endif
