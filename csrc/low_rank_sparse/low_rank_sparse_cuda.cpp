// Host side of low_rank_sparse on a GPU: plan, launches, registration. (The conditions: low_rank_sparse.cpp.)
//   x [..., k]   v [r, k]   u [n, r]   values [nnz]   starts [n + 1]   columns [nnz]   bias [n]   h [m, r]   y [..., n]
#ifdef LOWFAT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "host/call_counter.h"
#include "host/cuda_stream.h"
#include "low_rank_sparse/library.h"

namespace low_rank_sparse {
namespace {

CallCounter decode_calls("low_rank_sparse", "cuda", "decode"), materialize_calls("low_rank_sparse", "cuda", "materialize"),
    library_calls("low_rank_sparse", "cuda", "library");

struct Result {
  Tensor y, h;  // [..., n]; [m, r], empty where it was not asked for
};

// False where no counters are left, and then has done nothing.
bool decode(const Launches& on, const std::optional<Tensor>& bias, const DecodePlan& plan, const Result& result,
            bool keep_h) {
  const Call& s = on.s;
  uint64_t* counter = barrier_counter(on.op, s.kind.device_index, on.stream, plan.grid, on.gpu.arch);
  if (!counter) return false;
  decode_calls.count();
  const Tensor partials = floats(s.kind, plan.splits * s.m * s.r);
  const auto to = [](const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); };
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  DecodeParams p{};
  p.x = elements(on.in.x), p.v = elements(on.in.v), p.u = elements(on.in.u), p.values = elements(on.in.values);
  p.starts = static_cast<const int32_t*>(on.in.starts.const_data_ptr()), p.columns = elements(on.in.columns);
  p.bias = bias ? elements(*bias) : nullptr, p.h = keep_h ? to(result.h) : nullptr, p.y = to(result.y);
  p.scale = static_cast<float>(on.scale);
  p.m = size(s.m), p.n = size(s.n), p.k = size(s.k), p.r = size(s.r), p.entries = size(s.nnz);
  p.partials = float_data(partials), p.counter = counter;
  on.done(launch_decode(plan, p, s.dtype, on.stream));
  return true;
}

Result forward_cuda(const Tensor& x, const Tensor& v, const Tensor& u, const Tensor& values, const Tensor& starts,
                    const Tensor& columns, const std::optional<Tensor>& bias_any, double scale, bool keep_h) {
  const Call s = check(x, v, u, values, starts, columns, bias_any);
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  Result result{empty_rows(x, s.kind, s.n), empty(s.kind, {keep_h ? s.m : 0, s.r})};
  if (s.m == 0) return result;
  const Arguments in(s, x, v, u, values, starts, columns);
  const std::optional<Tensor> bias = bias_any ? std::optional<Tensor>(as_contiguous(*bias_any)) : std::nullopt;
  const Launches on{"low_rank_sparse", s, in, scale, gpu_of(device), current_cuda_stream(device)};
  const DecodePlan plan = choose_decode(on.problem());
  if (plan.token_tiles > 0 && decode(on, bias, plan, result, keep_h)) return result;

  const MaterializePlan materialize = choose_materialize(on.problem());
  (materialize.tile > 0 ? materialize_calls : library_calls).count();
  result.y = shaped_like(library_linear(in.x, on.weight(materialize), bias), x);
  if (keep_h) result.h = scaled_product(s.kind, in.x, torch::stable::transpose(in.v, 0, 1), scale);
  return result;
}

Tensor low_rank_sparse_cuda(const Tensor& x, const Tensor& v, const Tensor& u, const Tensor& values, const Tensor& starts,
                            const Tensor& columns, const std::optional<Tensor>& bias, double scale) {
  return forward_cuda(x, v, u, values, starts, columns, bias, scale, false).y;
}

std::tuple<Tensor, Tensor> low_rank_sparse_training_cuda(const Tensor& x, const Tensor& v, const Tensor& u,
                                                         const Tensor& values, const Tensor& starts, const Tensor& columns,
                                                         const std::optional<Tensor>& bias, double scale) {
  Result result = forward_cuda(x, v, u, values, starts, columns, bias, scale, true);
  return {std::move(result.y), std::move(result.h)};
}

}  // namespace
}  // namespace low_rank_sparse

STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) {
  m.impl("low_rank_sparse", TORCH_BOX(&low_rank_sparse::low_rank_sparse_cuda));
  m.impl("low_rank_sparse_training", TORCH_BOX(&low_rank_sparse::low_rank_sparse_training_cuda));
}
#endif
