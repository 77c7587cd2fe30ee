// Host side of the gradients of dictionary on a GPU: checks, plan, launches, products of the library, registration.
//   dy [..., n]   x [..., k]   h [P, m, Q a]   d [P, Q, a, p]   values [n, Q s]   support
#include "dictionary/backward.h"

#ifdef LOWFAT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <tuple>

#include "dictionary/library.h"
#include "host/call_counter.h"
#include "host/cuda_stream.h"

namespace dictionary {
namespace {

using torch::stable::matmul, torch::stable::transpose;

CallCounter kernel_calls("dictionary_backward", "cuda", "kernels"), library_calls("dictionary_backward", "cuda", "library");

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, dd, dvalues, db; empty where not wanted

constexpr int kNeedsDh = kNeedsDx | kNeedsDd;

// The conditions that the reference checks with a named error.
Call check(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& h, const Tensor& d, const Tensor& values,
           const Tensor& support) {
  const Call s = dictionary::check(x, d, values, support, std::nullopt);
  const auto x_sizes = x.sizes(), dy_sizes = dy.sizes();
  const bool is_like_y = dy.dim() == x.dim() && std::equal(x_sizes.begin(), x_sizes.end() - 1, dy_sizes.begin()) &&
                         dy.size(dy.dim() - 1) == s.n;
  STD_TORCH_CHECK(is_like_y, "dictionary_backward: dy must be [..., ", s.n, "] with the leading sizes of x");
  STD_TORCH_CHECK(!h || (h->dim() == 3 && h->size(0) == s.b_out && h->size(1) == s.m && h->size(2) == s.middle()),
                  "dictionary_backward: h must be [", s.b_out, ", ", s.m, ", ", s.middle(), "]");
  STD_TORCH_CHECK(kind_of(dy) == s.kind && (!h || kind_of(*h) == s.kind),
                  "dictionary_backward: dy and h must have one dtype with x (or use autocast) and be on its device");
  return s;
}

// Contiguous, dy and x as rows: the same bits for every layout of the same values. h where dvalues are wanted.
struct Arguments {
  Tensor dy, x, d, values, support;
  std::optional<Tensor> h;

  Arguments(const Call& s, const Tensor& dy_any, const Tensor& x_any, const std::optional<Tensor>& h_any,
            const Tensor& d_any, const Tensor& values_any, const Tensor& support_any, int64_t needs)
      : dy(torch::stable::view(as_contiguous(dy_any), {s.m, s.n})),
        x(torch::stable::view(as_contiguous(x_any), {s.m, s.k})),
        d(as_contiguous(d_any)),
        values(as_contiguous(values_any)),
        support(as_contiguous(support_any)) {
    if (needs & kNeedsDvalues) h = h_any ? as_contiguous(*h_any) : middle_of(s, split_inputs(s, x), d);
  }
};

// --- the gradients of y = h s^T: dh, dvalues, db ---

struct Inner {
  Tensor dh, dvalues, db;  // dh [P, m, Q a]; empty where not wanted
};

template <class Gradient>
Tensor wanted(const Call& s, bool is_needed, const Gradient& gradient) {
  return is_needed ? gradient() : empty(s.kind, {0});
}

// What the reference does: by torch's own products, of the dense coefficients.
Inner library(const Launches& on, const Arguments& in, const Tensor& mask, int64_t needs) {
  library_calls.count();
  const Call& s = on.s;
  const sparse24::SparseFactor coefficients = on.coefficients(mask);
  const Tensor blocks_dy = split_outputs(s, in.dy);
  const int64_t rows[] = {0}, more[] = {0, 0, 0, s.b_out * s.rows() - s.n};  // of s: up to whole blocks
  return {wanted(s, needs & kNeedsDh,
                 [&] {
                   const Tensor codes = coefficients.expanded(in.values);
                   const Tensor whole = more[3] == 0 ? codes : torch::stable::pad(codes, more);
                   return matmul(blocks_dy, shaped(whole, {s.b_out, s.rows(), s.middle()}));
                 }),
          wanted(s, needs & kNeedsDvalues,
                 [&] {
                   const Tensor blocks = matmul(transpose(blocks_dy, 1, 2), *in.h);
                   Tensor all = shaped(blocks, {s.b_out * s.rows(), s.middle()});
                   return coefficients.selected(as_contiguous(torch::stable::narrow(all, 0, 0, s.n)));
                 }),
          wanted(s, needs & kNeedsDb, [&] { return torch::stable::sum(in.dy, rows); })};
}

Inner kernels(const Launches& on, const sparse24::BackwardPlan& plan, const Arguments& in, const Tensor& mask,
              int64_t needs) {
  kernel_calls.count();
  const Call& s = on.s;
  const auto made = [&](bool is_needed, std::vector<int64_t> sizes) {
    return wanted(s, is_needed, [&] { return empty(s.kind, sizes); });
  };
  Inner inner{made(needs & kNeedsDh, {s.b_out, s.m, s.middle()}), made(needs & kNeedsDvalues, {s.n, s.b_in * s.s}),
              made(needs & kNeedsDb, {s.n})};
  const Tensor starts = floats(s.kind, plan.starts), partials = floats(s.kind, plan.partials);  // an int for each float
  const auto to = [](const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); };
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  const sparse24::BackwardOperands operands{
      elements(in.dy), in.h ? elements(*in.h) : nullptr, elements(in.values), words_of(mask),
      static_cast<int32_t*>(starts.mutable_data_ptr()), float_data(partials), to(inner.dh), to(inner.dvalues), to(inner.db),
      {size(s.m), size(s.n), size(s.a), size(s.b_out), size(s.b_in), size(s.s), 0, 0}, sparse_needs(size(needs))};
  on.done(sparse24::launch_backward(plan, operands, s.dtype, on.gpu.sm_count, on.stream));
  return inner;
}

// --- the op ---

// One sum over all atoms of all output blocks.
Tensor input_gradient(const Call& s, const Tensor& dh, const Tensor& d) {
  const Tensor by_inputs = permuted(shaped(dh, {s.b_out, s.m, s.b_in, s.a}), {2, 1, 0, 3});
  const Tensor atoms = shaped(transpose(d, 0, 1), {s.b_in, s.b_out * s.a, s.p});
  const Tensor blocks = matmul(shaped(by_inputs, {s.b_in, s.m, s.b_out * s.a}), atoms);
  Tensor rows = shaped(transpose(blocks, 0, 1), {s.m, s.b_in * s.p});
  return as_contiguous(torch::stable::narrow(rows, 1, 0, s.k));
}

Tensor dictionary_gradient(const Call& s, const Tensor& dh, const Tensor& x) {
  const Tensor by_atoms = permuted(shaped(dh, {s.b_out, s.m, s.b_in, s.a}), {0, 2, 3, 1});
  return as_contiguous(matmul(by_atoms, split_inputs(s, x)));
}

// Of no tokens.
Gradients no_gradients(const Call& s, const Tensor& x, int64_t needs) {
  const auto wanted = [&](int need, const Dimensions& sizes) { return zeros(s.kind, needs & need ? sizes : Dimensions{0}); };
  return {wanted(kNeedsDx, sizes_like(x, s.k)), wanted(kNeedsDd, {s.b_out, s.b_in, s.a, s.p}),
          wanted(kNeedsDvalues, {s.n, s.b_in * s.s}), wanted(kNeedsDb, {s.n})};
}

Gradients dictionary_backward_cuda(const Tensor& dy_any, const Tensor& x_any, const std::optional<Tensor>& h_any,
                                   const Tensor& d_any, const Tensor& values_any, const Tensor& support_any, int64_t needs) {
  const Call s = check(dy_any, x_any, h_any, d_any, values_any, support_any);
  needs &= kNeedsDx | kNeedsDd | kNeedsDvalues | kNeedsDb;
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (s.m == 0) return no_gradients(s, x_any, needs);
  const Arguments in(s, dy_any, x_any, h_any, d_any, values_any, support_any, needs);
  const Launches on{"dictionary_backward", s, gpu_of(device), current_cuda_stream(device)};
  const bool aligned = is_aligned(in.dy) && is_aligned(in.values) && (!in.h || is_aligned(*in.h));
  Problem problem = on_gpu({s.m, s.n, s.k, s.a, s.dtype}, on.gpu, aligned);
  problem.b_out = s.b_out, problem.b_in = s.b_in, problem.kept = s.s;
  const sparse24::BackwardPlan plan = choose_backward(problem, static_cast<int>(needs));
  const Tensor mask = needs & ~kNeedsDb ? on.bitmap(in.support) : in.support;  // of db alone nobody reads it
  Inner inner = plan.tile == 0 || needs == 0 ? library(on, in, mask, needs) : kernels(on, plan, in, mask, needs);
  Tensor dx = wanted(s, needs & kNeedsDx, [&] { return input_gradient(s, inner.dh, in.d); });
  if (needs & kNeedsDx) dx = shaped_like(dx, x_any);
  return {std::move(dx), wanted(s, needs & kNeedsDd, [&] { return dictionary_gradient(s, inner.dh, in.x); }),
          std::move(inner.dvalues), std::move(inner.db)};
}

}  // namespace
}  // namespace dictionary

STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) {
  m.impl("dictionary_backward", TORCH_BOX(&dictionary::dictionary_backward_cuda));
}
#endif
