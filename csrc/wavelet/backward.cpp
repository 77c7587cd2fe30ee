// Host side of the gradients of wavelet on a CPU: choice of path, calls, registration.
//   dy [..., n]   x [..., k]   h [pairs, m, r]   v [r, pairs width]   gain [pairs, r]   u [pairs height, r]
//
// By the library's products, with factors that have the transform folded into them or of halves of x and dy, as forward.
// The factors' own gradients in bf16 always of halves: products of whole rows would be rounded before their differences.
#include <algorithm>
#include <tuple>

#include "host/call_counter.h"
#include "wavelet/folded.h"
#include "wavelet/wavelet_cpu.h"

namespace wavelet {
namespace {

CallCounter folded_calls("wavelet_backward", "cpu", "folded"), halves_calls("wavelet_backward", "cpu", "halves"),
    reference_calls("wavelet_backward", "cpu", "reference");

Tensor across(const Tensor& rows) { return torch::stable::transpose(rows, 0, 1); }

// dv of dh, and du of h, both [m, pairs r]. In float: what features have, back to coefficients.
void weigh_in_float(const Call& s, const Tensor* dh, const Tensor& x, const Tensor* h, const Tensor& dy, const Tensor& dv,
                    const Tensor& du) {
  const int pairs = static_cast<int>(s.pairs);
  if (dh) {
    const Tensor of_features = as_contiguous(torch::stable::matmul(across(*dh), x));  // [pairs r, k]
    for_rows(s.pairs * s.r, s.k, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t pair = row / s.r, rank = row % s.r;
        unfold_along(data_of<float>(of_features) + row * s.k, source_of(pairs, static_cast<int>(pair)), s.k, kRootHalf,
                     data_to<float>(dv) + (rank * s.pairs + pair) * s.width());
      }
    });
  }
  if (!h) return;
  const Tensor of_features = as_contiguous(torch::stable::matmul(across(dy), *h));  // [n, pairs r]
  for_rows(s.pairs * s.height(), s.r, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int pair = static_cast<int>(row / s.height());
      const int64_t feature = row % s.height() * 2, step = s.pairs * s.r;
      const float *even = data_of<float>(of_features) + (feature * s.pairs + pair) * s.r, scale = s.scale * kRootHalf;
      float* to = data_to<float>(du) + row * s.r;
      const float sign = target_of(pairs, pair) == 0 ? 1.0f : -1.0f;
      for (int64_t j = 0; j < s.r; ++j) to[j] = scale * (feature + 1 < s.n ? even[j] + sign * even[step + j] : even[j]);
    }
  });
}

Tensor columns_beside(const Call& s, Tensor beside, int64_t pair) {
  return torch::stable::narrow(beside, 1, pair * s.r, s.r);
}

// The same by halves b of x and c of dy.
template <class E>
void weigh_halves(const Call& s, const Tensor* dh, const Tensor& b, const Tensor* h, const Tensor& c, const Tensor& dv,
                  const Tensor& du) {
  const int pairs = static_cast<int>(s.pairs);
  for (int pair = 0; pair < pairs && dh; ++pair) {
    const Tensor half = one_of(b, source_of(pairs, pair));
    const Tensor found = as_contiguous(torch::stable::matmul(across(columns_beside(s, *dh, pair)), half));  // [r, width]
    for (int64_t rank = 0; rank < s.r; ++rank) {
      std::copy_n(data_of<E>(found) + rank * s.width(), s.width(), data_to<E>(dv) + (rank * pairs + pair) * s.width());
    }
  }
  for (int pair = 0; pair < pairs && h; ++pair) {
    const Tensor half = one_of(c, target_of(pairs, pair));
    const Tensor found = as_contiguous(torch::stable::matmul(across(half), columns_beside(s, *h, pair)));  // [height, r]
    std::copy_n(data_of<E>(found), s.height() * s.r, data_to<E>(du) + pair * s.height() * s.r);
  }
}

// Of each gain, over all rows in their order.
template <class E>
void sum_gains(const Call& s, const Tensor& weighed, const Tensor& h, const Tensor& dgain) {
  const int64_t columns = s.pairs * s.r;
  std::vector<double> sums(columns);
  const E *a = data_of<E>(weighed), *b = data_of<E>(h);
  for (int64_t row = 0; row < s.m; ++row, a += columns, b += columns)
    for (int64_t i = 0; i < columns; ++i) sums[i] += double{cpu::widen(a[i])} * cpu::widen(b[i]);
  E* to = data_to<E>(dgain);
  for (int64_t i = 0; i < columns; ++i) to[i] = narrowed<E>(static_cast<float>(sums[i]));
}

template <class E>
struct Backward {
  const Call& s;
  const Arguments& in;
  const Tensor& dy;
  bool folds;  // else by halves, each pair from a half to the same of the outputs
  std::optional<Tensor> v, b, c;

  // Made where they are needed first.
  const Tensor& folded_v() { return v ? *v : *(v = fold_v<E>(s, in.v)); }
  const Tensor& halves_of_x() { return b ? *b : *(b = halves_of<E>(s, in.x, s.k, kRootHalf)); }
  const Tensor& halves_of_dy() { return c ? *c : *(c = halves_of<E>(s, dy, s.n, s.scale * kRootHalf)); }

  // h and dh without gains, [m, pairs r].
  Tensor middle() {
    if (folds) return multiply_features<E>(in.x, folded_v());
    const Tensor h = empty(s.kind, {s.m, s.pairs * s.r});
    for (int64_t pair = 0; pair < s.pairs; ++pair)
      put_beside<E>(s, library_linear(one_of(halves_of_x(), pair), columns_of(s, in.v, pair)), pair, h);
    return h;
  }
  Tensor middle_gradient() {
    if (folds) return as_contiguous(multiply_features<E>(dy, across(fold_u<E>(s, in.u))));
    const Tensor dh = empty(s.kind, {s.m, s.pairs * s.r});
    for (int64_t pair = 0; pair < s.pairs; ++pair) {
      const Tensor found = torch::stable::matmul(one_of(halves_of_dy(), pair), rows_of_pair(s, in.u, pair));
      put_beside<E>(s, as_contiguous(found), pair, dh);
    }
    return dh;
  }

  Tensor inputs(const Tensor& dh) {
    if (folds) return torch::stable::matmul(dh, folded_v());
    std::vector<Tensor> db;
    for (int64_t pair = 0; pair < s.pairs; ++pair)
      db.push_back(as_contiguous(torch::stable::matmul(columns_beside(s, dh, pair), columns_of(s, in.v, pair))));
    return joined<E>(s, db[0], s.pairs == 2 ? &db[1] : nullptr, s.k, kRootHalf);
  }

  void weights(const Tensor* dh, const Tensor* h, const Tensor& dv, const Tensor& du) {
    if (std::is_same_v<E, float> && folds) return weigh_in_float(s, dh, in.x, h, dy, dv, du);
    weigh_halves<E>(s, dh, dh ? halves_of_x() : dy, h, h ? halves_of_dy() : dy, dv, du);
  }

  Gradients all(const std::optional<Tensor>& kept_h, const Tensor& x_any, int64_t needs) {
    const auto wanted = [&](int need, const Dimensions& sizes) {
      return empty(s.kind, needs & need ? sizes : Dimensions{0});
    };
    Tensor dx = empty(s.kind, {0}), dv = wanted(kNeedsDv, {s.r, s.pairs * s.width()});
    Tensor dgain = wanted(in.gain ? kNeedsDgain : 0, {s.pairs, s.r}), du = wanted(kNeedsDu, {s.pairs * s.height(), s.r});
    std::optional<Tensor> h, dh;
    if (needs & kNeedsDu || (in.gain && needs & kNeedsDgain)) h = kept_h ? beside<E>(s, as_contiguous(*kept_h)) : middle();
    if (needs & (kNeedsDx | kNeedsDv) || (in.gain && needs & kNeedsDgain)) {
      dh = middle_gradient();
      if (in.gain && needs & kNeedsDgain) sum_gains<E>(s, *dh, *h, dgain);
      if (in.gain) weigh_beside<E>(s, *dh, *in.gain);
    }
    if (needs & kNeedsDx) dx = shaped_like(inputs(*dh), x_any);
    if (in.gain && needs & kNeedsDu) weigh_beside<E>(s, *h, *in.gain);
    weights(needs & kNeedsDv ? &*dh : nullptr, needs & kNeedsDu ? &*h : nullptr, dv, du);
    return {std::move(dx), std::move(dv), std::move(dgain), std::move(du)};
  }
};

Gradients wavelet_backward_cpu(const Tensor& dy_any, const Tensor& x, const std::optional<Tensor>& h, const Tensor& v,
                               const std::optional<Tensor>& gain, const Tensor& u, int64_t needs, const std::string& filter,
                               int64_t levels, const std::string& subbands, int64_t n, double scale) {
  const Options options{filter, levels, subbands, n, scale};
  const Call s = check(options, dy_any, x, h, v, gain, u);
  const CpuPath path = choose_cpu_backward_path(problem_of(s));
  if (path != CpuPath::folded && path != CpuPath::halves) {
    if (path == CpuPath::reference) reference_calls.count();
    return backward_by_reference(options, dy_any, x, h, v, gain, u, needs);
  }
  const bool folds = path == CpuPath::folded;
  (folds ? folded_calls : halves_calls).count();
  const Arguments in(s, x, v, gain, u);
  const Tensor dy = torch::stable::view(as_contiguous(dy_any), {s.m, s.n});
  if (s.dtype == Dtype::float32) return Backward<float>{s, in, dy, folds, {}, {}, {}}.all(h, x, needs);
  return Backward<uint16_t>{s, in, dy, folds, {}, {}, {}}.all(h, x, needs);
}

}  // namespace
}  // namespace wavelet

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) { m.impl("wavelet_backward", TORCH_BOX(&wavelet::wavelet_backward_cpu)); }
