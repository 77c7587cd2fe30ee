// Host side of the gradients of wavelet on a CPU: choice of path, calls, registration.
//   dy [..., n]   x [..., k]   h [pairs, m, r]   v [r, pairs width]   gain [pairs, r]   u [pairs height, r]
//
// By the library's products with factors that have the transform folded into them. Those of bf16 round what they find: the
// difference of neighbouring gradients would be of rounded numbers, so that their halves of x and dy are made instead.
#include <algorithm>
#include <tuple>

#include "host/call_counter.h"
#include "wavelet/folded.h"
#include "wavelet/wavelet_cpu.h"

namespace wavelet {
namespace {

CallCounter folded_calls("wavelet_backward", "cpu", "folded"), reference_calls("wavelet_backward", "cpu", "reference");

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
                     into<float>(dv) + (rank * s.pairs + pair) * s.width());
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
      float* to = into<float>(du) + row * s.r;
      const float sign = target_of(pairs, pair) == 0 ? 1.0f : -1.0f;
      for (int64_t j = 0; j < s.r; ++j) to[j] = scale * (feature + 1 < s.n ? even[j] + sign * even[step + j] : even[j]);
    }
  });
}

// Both halves of rows, each rounded once.   [2, m, (size + 1) / 2]
Tensor halves_of(const Call& s, const Tensor& rows, int64_t size, float scale) {
  const int64_t width = (size + 1) / 2;
  const Tensor halves = empty(s.kind, {2, s.m, width});
  for_rows(s.m, size, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      auto* low = into<uint16_t>(halves) + row * width;
      split_row(data_of<uint16_t>(rows) + row * size, size, scale, low, low + s.m * width);
    }
  });
  return halves;
}

Tensor half_of(const Call& s, const Tensor& halves, int half) {
  Tensor all = halves;
  return torch::stable::view(torch::stable::narrow(all, 0, half, 1), {s.m, halves.size(2)});
}

Tensor columns_of(const Call& s, const Tensor& beside, int pair) {
  Tensor all = beside;
  return torch::stable::narrow(all, 1, pair * s.r, s.r);
}

// The same in bf16, of halves.
void weigh_halves(const Call& s, const Tensor* dh, const Tensor& x, const Tensor* h, const Tensor& dy, const Tensor& dv,
                  const Tensor& du) {
  const int pairs = static_cast<int>(s.pairs);
  if (dh) {
    const Tensor b = halves_of(s, x, s.k, kRootHalf);
    for (int pair = 0; pair < pairs; ++pair) {
      const Tensor found = as_contiguous(
          torch::stable::matmul(across(columns_of(s, *dh, pair)), half_of(s, b, source_of(pairs, pair))));  // [r, width]
      for (int64_t rank = 0; rank < s.r; ++rank) {
        std::copy_n(data_of<uint16_t>(found) + rank * s.width(), s.width(),
                    into<uint16_t>(dv) + (rank * pairs + pair) * s.width());
      }
    }
  }
  if (!h) return;
  const Tensor c = halves_of(s, dy, s.n, s.scale * kRootHalf);
  for (int pair = 0; pair < pairs; ++pair) {
    const Tensor found = as_contiguous(
        torch::stable::matmul(across(half_of(s, c, target_of(pairs, pair))), columns_of(s, *h, pair)));  // [height, r]
    std::copy_n(data_of<uint16_t>(found), s.height() * s.r, into<uint16_t>(du) + pair * s.height() * s.r);
  }
}

// Of each gain, over all rows in their order.
template <class E>
void sum_gains(const Call& s, const Tensor& weighed, const Tensor& h, const Tensor& dgain) {
  const int64_t columns = s.pairs * s.r;
  std::vector<double> sums(columns);
  for (int64_t row = 0; row < s.m; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      sums[i] += double{cpu::widen(data_of<E>(weighed)[row * columns + i])} * cpu::widen(data_of<E>(h)[row * columns + i]);
    }
  }
  for (int64_t i = 0; i < columns; ++i) into<E>(dgain)[i] = narrowed<E>(static_cast<float>(sums[i]));
}

template <class E>
Gradients folded(const Call& s, const Arguments& in, const Tensor& dy, const std::optional<Tensor>& kept_h,
                 const Tensor& x_any, int64_t needs) {
  const auto wanted = [&](int need, const Dimensions& sizes) { return empty(s.kind, needs & need ? sizes : Dimensions{0}); };
  Tensor dx = empty(s.kind, {0}), dv = wanted(kNeedsDv, {s.r, s.pairs * s.width()});
  Tensor dgain = wanted(in.gain ? kNeedsDgain : 0, {s.pairs, s.r}), du = wanted(kNeedsDu, {s.pairs * s.height(), s.r});
  std::optional<Tensor> v, h, dh;
  const auto v_folded = [&] { return v ? *v : *(v = fold_v<E>(s, in.v)); };
  if (needs & (kNeedsDgain | kNeedsDu)) {
    h = kept_h ? beside<E>(s, as_contiguous(*kept_h)) : multiply_features<E>(in.x, v_folded());
  }
  if (needs & (kNeedsDx | kNeedsDv | kNeedsDgain)) {
    dh = multiply_features<E>(dy, across(fold_u<E>(s, in.u)));
    if (in.gain && needs & kNeedsDgain) sum_gains<E>(s, *dh, *h, dgain);
    if (in.gain) weigh_beside<E>(s, *dh, *in.gain);
  }
  if (needs & kNeedsDx) dx = shaped_like(torch::stable::matmul(*dh, v_folded()), x_any);
  if (in.gain && needs & kNeedsDu) weigh_beside<E>(s, *h, *in.gain);
  const auto weights = std::is_same_v<E, float> ? weigh_in_float : weigh_halves;
  weights(s, needs & kNeedsDv ? &*dh : nullptr, in.x, needs & kNeedsDu ? &*h : nullptr, dy, dv, du);
  return {std::move(dx), std::move(dv), std::move(dgain), std::move(du)};
}

Gradients wavelet_backward_cpu(const Tensor& dy_any, const Tensor& x, const std::optional<Tensor>& h, const Tensor& v,
                               const std::optional<Tensor>& gain, const Tensor& u, int64_t needs, const std::string& filter,
                               int64_t levels, const std::string& subbands, int64_t n, double scale) {
  const Options options{filter, levels, subbands, n, scale};
  const Call s = check(options, dy_any, x, h, v, gain, u);
  const CpuPath path = choose_cpu_backward_path(problem_of(s));
  if (path != CpuPath::folded) {
    if (path == CpuPath::reference) reference_calls.count();
    return backward_by_reference(options, dy_any, x, h, v, gain, u, needs);
  }
  folded_calls.count();
  const Arguments in(s, x, v, gain, u);
  const Tensor dy = torch::stable::view(as_contiguous(dy_any), {s.m, s.n});
  return s.dtype == Dtype::float32 ? folded<float>(s, in, dy, h, x, needs) : folded<uint16_t>(s, in, dy, h, x, needs);
}

}  // namespace
}  // namespace wavelet

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) { m.impl("wavelet_backward", TORCH_BOX(&wavelet::wavelet_backward_cpu)); }
