// The gradients of low_rank_sparse on a CPU, by the cheap forms. No dense matrix of the weight's size is made; but in fp64,
// which is as the reference has it.
//   dy [..., n]   x [..., k]   h [m, r]   v [r, k]   u [n, r]   values [nnz]   starts [n + 1]   columns [nnz]
#include <algorithm>
#include <tuple>

#include "host/call_counter.h"
#include "low_rank_sparse/low_rank_sparse_cpu_products.h"

namespace low_rank_sparse {
namespace {

CallCounter kernel_calls("low_rank_sparse_backward", "cpu", "kernels"),
    library_calls("low_rank_sparse_backward", "cpu", "library");

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // dx, dv, du, dvalues, db; empty where not wanted

// Contiguous rows, in what products are computed in.
struct Arguments {
  Tensor dy, x, v, u, values, starts, columns;
  std::optional<Tensor> h;

  Arguments(const Call& s, const Tensor& dy_any, const Tensor& x_any, const std::optional<Tensor>& h_any,
            const Tensor& v_any, const Tensor& u_any, const Tensor& values_any, const Tensor& starts_any,
            const Tensor& columns_any)
      : dy(rows(s, dy_any, s.n)), x(rows(s, x_any, s.k)), v(wide(as_contiguous(v_any), s)), u(wide(as_contiguous(u_any), s)),
        values(as_contiguous(values_any)), starts(as_contiguous(starts_any)), columns(as_contiguous(columns_any)) {
    if (h_any) h = wide(as_contiguous(*h_any), s);
  }

  static Tensor rows(const Call& s, const Tensor& any, int64_t last) {
    return wide(shaped(as_contiguous(any), {s.m, last}), s);
  }
};

Tensor across(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// scale a b^T, rounded once as the forward's h is.
Tensor middle(const Call& s, const Tensor& a, const Tensor& b, double scale) {
  return wide(rounded(scaled_product(s, a, b, scale), s), s);
}

// dvalues in fp64.
Tensor gathered(const Call& s, const Arguments& in) {
  const Tensor full = torch::stable::matmul(across(in.dy), in.x), found = zeros(s.kind, {s.nnz});
  const Numbers<int32_t> bounds = bounds_of(s, in.starts);
  const Columns columns(s, in.columns);
  for (int64_t row = 0; row < s.n; ++row)
    for (int64_t e = bounds[row]; e < bounds[row + 1]; ++e)
      if (columns[e] >= 0) data_to<double>(found)[e] = data_of<double>(full)[row * s.k + columns[e]];
  return found;
}

Gradients low_rank_sparse_backward_cpu(const Tensor& dy_any, const Tensor& x_any, const std::optional<Tensor>& h_any,
                                       const Tensor& v_any, const Tensor& u_any, const Tensor& values_any,
                                       const Tensor& starts_any, const Tensor& columns_any, int64_t needs, double scale) {
  const Call s = check_backward(dy_any, x_any, h_any, v_any, u_any, values_any, starts_any, columns_any);
  const Arguments in(s, dy_any, x_any, h_any, v_any, u_any, values_any, starts_any, columns_any);
  const bool is_library = s.dtype == Dtype::float64;
  (is_library ? library_calls : kernel_calls).count();
  const auto none = [&] { return empty(s.kind, {0}); };
  Tensor dx = none(), dv = none(), du = none(), dvalues = none(), db = none();

  if (needs & (kNeedsDx | kNeedsDv)) {
    const Tensor dh = middle(s, in.dy, across(in.u), scale);
    if (needs & kNeedsDx) dx = torch::stable::matmul(dh, in.v);
    if (needs & kNeedsDv) dv = rounded(torch::stable::matmul(across(dh), in.x), s);
  }
  if (needs & kNeedsDu) {
    const Tensor h = in.h ? *in.h : middle(s, in.x, in.v, scale);
    du = rounded(torch::stable::matmul(across(in.dy), h), s);
  }
  if (is_library) {
    if (needs & kNeedsDx) {
      const Tensor sparse = zeros(s.kind, {s.n, s.k});
      add_entries(s, in.values, in.starts, in.columns, sparse);
      dx = add(dx, torch::stable::matmul(in.dy, sparse));
    }
    if (needs & kNeedsDvalues) dvalues = gathered(s, in);
  } else if (needs & (kNeedsDx | kNeedsDvalues)) {
    if (needs & kNeedsDvalues) dvalues = floats(s.kind, s.nnz);
    const ReadSupport support = read_support(s, in.values, in.starts, in.columns);
    sparse_gradients(support, s.m, data_of<float>(in.dy), data_of<float>(in.x),
                     needs & kNeedsDx ? data_to<float>(dx) : nullptr,
                     needs & kNeedsDvalues ? data_to<float>(dvalues) : nullptr);
    dvalues = rounded(dvalues, s);
  }
  if (needs & kNeedsDx) dx = shaped(rounded(dx, s), sizes_like(x_any, s.k));
  if (needs & kNeedsDb) {
    const int64_t rows[] = {0};
    db = rounded(torch::stable::sum(in.dy, rows), s);
  }
  return {std::move(dx), std::move(dv), std::move(du), std::move(dvalues), std::move(db)};
}

}  // namespace
}  // namespace low_rank_sparse

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) {
  m.impl("low_rank_sparse_backward", TORCH_BOX(&low_rank_sparse::low_rank_sparse_backward_cpu));
}
