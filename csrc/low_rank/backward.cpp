// Host side of the gradients of low_rank on a GPU: checks, plan, launch, registration.   dy [..., n]  x [..., k]  h [..., r]
#include "low_rank/backward.h"

#ifdef LOWFAT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>

#include "host/call_counter.h"
#include "host/cuda_launch.h"
#include "host/cuda_stream.h"
#include "host/tensor.h"
#include "low_rank/forward.h"

namespace low_rank {

namespace {

CallCounter kernel_calls("low_rank_backward", "cuda", "kernels"), library_calls("low_rank_backward", "cuda", "library"),
    into_kernel_calls("low_rank_backward_into", "cuda", "kernels"),
    into_library_calls("low_rank_backward_into", "cuda", "library");

constexpr int kNeedsDh = kNeedsDx | kNeedsDv;

constexpr Who kBackward{"low_rank_backward"}, kInto{"low_rank_backward_into"};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, dv, du, db; empty where not wanted

// The conditions that the references check with a named error.
Sizes check(const Who& who, const Tensor& dy, const Tensor& x, const std::optional<Tensor>& h, const Tensor& v,
            const Tensor& u) {
  const Sizes s = low_rank::check(who, x, v, u, std::nullopt);
  STD_TORCH_CHECK(has_rows_of(dy, x, s.n), who.op, ": dy must be [..., ", s.n, "] with the leading sizes of x");
  STD_TORCH_CHECK(!h || has_rows_of(*h, x, s.r), who.op, ": h must be [..., ", s.r, "] with the leading sizes of x");
  STD_TORCH_CHECK(kind_of(dy) == s.kind && (!h || kind_of(*h) == s.kind), who.op,
                  ": dy and h must have one dtype with x (or use autocast) and be on its device");
  return s;
}

// Every tensor as rows, contiguous: the same bits for every layout of the same values.
struct Arguments {
  Tensor dy, x, v, u;
  std::optional<Tensor> h;  // where du is wanted

  Arguments(const Sizes& s, const Tensor& dy_any, const Tensor& x_any, const std::optional<Tensor>& h_any,
            const Tensor& v_any, const Tensor& u_any, int64_t needs)
      : dy(rows(dy_any, s.m, s.n)), x(rows(x_any, s.m, s.k)), v(as_contiguous(v_any)), u(as_contiguous(u_any)) {
    if (needs & kNeedsDu) h = h_any ? rows(*h_any, s.m, s.r) : library_linear(x, v);
  }

  static Tensor rows(const Tensor& any, int64_t count, int64_t last) {
    const Tensor whole = as_contiguous(any);
    return whole.dim() == 2 ? whole : torch::stable::view(whole, {count, last});
  }
};

// What the reference does, by torch's own products.
Gradients library(const Sizes& s, const Arguments& in, const Tensor& x, int64_t needs) {
  library_calls.count();
  const auto transposed = [](const Tensor& t) { return torch::stable::transpose(t, 0, 1); };
  const auto wanted = [&](int need, const auto& gradient) { return needs & need ? gradient() : empty(s.kind, {0}); };
  const Tensor dh = wanted(kNeedsDh, [&] { return torch::stable::matmul(in.dy, in.u); });
  const int64_t rows[] = {0};
  return {wanted(kNeedsDx, [&] { return shaped_like(torch::stable::matmul(dh, in.v), x); }),
          wanted(kNeedsDv, [&] { return torch::stable::matmul(transposed(dh), in.x); }),
          wanted(kNeedsDu, [&] { return torch::stable::matmul(transposed(in.dy), *in.h); }),
          wanted(kNeedsDb, [&] { return torch::stable::sum(in.dy, rows); })};
}

BackwardPlan plan_of(const Sizes& s, const Arguments& in, int64_t needs, bool is_added, const Gpu& gpu) {
  const bool aligned =
      is_aligned(in.dy) && is_aligned(in.x) && is_aligned(in.v) && is_aligned(in.u) && (!in.h || is_aligned(*in.h));
  return choose_backward(on_gpu({s.m, s.n, s.k, s.r, s.dtype}, gpu, aligned), static_cast<int>(needs), is_added);
}

struct Destinations {  // null where not wanted
  void *dx, *dv, *du, *db;
};

void run(const Who& who, const BackwardPlan& plan, const Sizes& s, const Arguments& in, int64_t needs,
         const Destinations& to, const Gpu& gpu) {
  const Tensor dh = needs & kNeedsDh ? empty(s.kind, {s.m, s.r}) : empty(s.kind, {0});
  const Tensor partials = floats(s.kind, plan.partials);
  BackwardParams p{};
  p.dy = elements(in.dy), p.x = elements(in.x), p.v = elements(in.v), p.u = elements(in.u);
  p.h = in.h ? elements(*in.h) : nullptr;
  p.dh = static_cast<uint16_t*>(dh.mutable_data_ptr());
  p.partials = float_data(partials);
  p.dx = static_cast<uint16_t*>(to.dx);
  p.dv = to.dv, p.du = to.du, p.db = to.db;
  p.m = static_cast<int>(s.m), p.n = static_cast<int>(s.n), p.k = static_cast<int>(s.k), p.r = static_cast<int>(s.r);
  p.needs = static_cast<int>(needs);
  void* stream = current_cuda_stream(s.kind.device_index);
  check_launch(who.op, launch_backward(plan, p, s.dtype, gpu.sm_count, stream), gpu.arch);
}

Gradients low_rank_backward_cuda(const Tensor& dy_any, const Tensor& x_any, const std::optional<Tensor>& h_any,
                                 const Tensor& v_any, const Tensor& u_any, int64_t needs) {
  const Sizes s = check(kBackward, dy_any, x_any, h_any, v_any, u_any);
  needs &= kNeedsDx | kNeedsDv | kNeedsDu | kNeedsDb;
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Arguments in(s, dy_any, x_any, h_any, v_any, u_any, needs);
  const Gpu gpu = gpu_of(device);
  const BackwardPlan plan = plan_of(s, in, needs, false, gpu);
  if (plan.tile == 0 || needs == 0) return library(s, in, x_any, needs);

  kernel_calls.count();
  const auto wanted = [&](int need, std::vector<int64_t> sizes) {
    return needs & need ? empty(s.kind, sizes) : empty(s.kind, {0});
  };
  Tensor dx = wanted(kNeedsDx, {s.m, s.k}), dv = wanted(kNeedsDv, {s.r, s.k}), du = wanted(kNeedsDu, {s.n, s.r});
  Tensor db = wanted(kNeedsDb, {s.n});
  const Destinations to{dx.mutable_data_ptr(), dv.mutable_data_ptr(), du.mutable_data_ptr(), db.mutable_data_ptr()};
  run(kBackward, plan, s, in, needs, to, gpu);
  if (needs & kNeedsDx) dx = shaped_like(dx, x_any);
  return {std::move(dx), std::move(dv), std::move(du), std::move(db)};
}

// --- the same, added to floats that are there ---

// dv, du and db of low_rank_backward_into.
struct Totals {
  std::optional<Tensor> dv, du, db;

  int64_t needs() const { return (dv ? kNeedsDv : 0) | (du ? kNeedsDu : 0) | (db ? kNeedsDb : 0); }
  bool fit_kernels() const {
    const auto fits = [](const std::optional<Tensor>& t) { return !t || (t->is_contiguous() && is_aligned(*t)); };
    return fits(dv) && fits(du) && fits(db);
  }
};

void check_total(const char* name, const std::optional<Tensor>& total, const Sizes& s,
                 std::initializer_list<int64_t> sizes) {
  if (!total) return;
  const auto found = total->sizes();
  STD_TORCH_CHECK(found.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), found.begin()),
                  kInto.op, ": ", name, " must have the shape of what it is the gradient of");
  Kind wanted = s.kind;
  if (s.dtype != Dtype::float64) wanted.dtype = aoti_torch_dtype_float32();
  STD_TORCH_CHECK(kind_of(*total) == wanted, kInto.op, ": ", name,
                  " must be float32 (float64 for float64 inputs) and on the device of x");
}

// What the reference does: products of halves are summed and kept in floats.
void add_by_library(const Sizes& s, const Arguments& in, const std::optional<Tensor>& dh, Totals& totals) {
  using torch::headeronly::ScalarType;
  const bool is_half = s.dtype == Dtype::bfloat16 || s.dtype == Dtype::float16;
  const auto product = [&](const Tensor& a, const Tensor& b) {
    const Tensor across = torch::stable::transpose(a, 0, 1);
    return is_half ? call_torch("aten::mm", "dtype", across, b, ScalarType::Float) : torch::stable::matmul(across, b);
  };
  const auto add_to = [](Tensor& total, const Tensor& gradient) { torch::stable::copy_(total, add(total, gradient)); };
  const int64_t rows[] = {0};
  const std::optional<ScalarType> wide = is_half ? std::optional<ScalarType>(ScalarType::Float) : std::nullopt;
  if (totals.dv) add_to(*totals.dv, product(*dh, in.x));
  if (totals.du) add_to(*totals.du, product(in.dy, *in.h));
  if (totals.db) add_to(*totals.db, torch::stable::sum(in.dy, rows, false, wide));
}

Tensor low_rank_backward_into_cuda(const Tensor& dy_any, const Tensor& x_any, const std::optional<Tensor>& h_any,
                                   const Tensor& v_any, const Tensor& u_any, const std::optional<Tensor>& dv,
                                   const std::optional<Tensor>& du, const std::optional<Tensor>& db, bool needs_dx) {
  const Sizes s = check(kInto, dy_any, x_any, h_any, v_any, u_any);
  check_total("dv", dv, s, {s.r, s.k});
  check_total("du", du, s, {s.n, s.r});
  check_total("db", db, s, {s.n});
  Totals totals{dv, du, db};
  const int64_t needs = totals.needs() | (needs_dx ? kNeedsDx : 0);
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Arguments in(s, dy_any, x_any, h_any, v_any, u_any, needs);
  const Gpu gpu = gpu_of(device);
  const BackwardPlan plan = plan_of(s, in, needs, true, gpu);
  if (plan.tile == 0 || needs == 0 || !totals.fit_kernels()) {
    into_library_calls.count();
    std::optional<Tensor> dh;
    if (needs & kNeedsDh) dh = torch::stable::matmul(in.dy, in.u);
    add_by_library(s, in, dh, totals);
    return needs_dx ? shaped_like(torch::stable::matmul(*dh, in.v), x_any) : empty(s.kind, {0});
  }
  into_kernel_calls.count();
  const Tensor dx = needs_dx ? empty(s.kind, {s.m, s.k}) : empty(s.kind, {0});
  const auto place_of = [](const std::optional<Tensor>& total) { return total ? total->mutable_data_ptr() : nullptr; };
  const Destinations to{dx.mutable_data_ptr(), place_of(dv), place_of(du), place_of(db)};
  run(kInto, plan, s, in, needs, to, gpu);
  return needs_dx ? shaped_like(dx, x_any) : dx;
}

}  // namespace
}  // namespace low_rank

STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) {
  m.impl("low_rank_backward", TORCH_BOX(&low_rank::low_rank_backward_cuda));
  m.impl("low_rank_backward_into", TORCH_BOX(&low_rank::low_rank_backward_into_cuda));
}

#endif
