// Host side of low_rank on a GPU: choice of configuration, launches, registration.   x [..., k]  v [r, k]  u [n, r]  y [..., n]
#ifdef LOWFAT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include <string>
#include <tuple>

#include "host/call_counter.h"
#include "host/cuda_launch.h"
#include "host/cuda_stream.h"
#include "host/tensor.h"
#include "low_rank/forward.h"
#include "low_rank/low_rank.h"

namespace low_rank {
namespace {

CallCounter decode_calls("low_rank", "cuda", "decode"), small_batch_calls("low_rank", "cuda", "small batch"),
    small_batch_sm80_calls("low_rank", "cuda", "small batch sm_80"), chain_calls("low_rank", "cuda", "chain"),
    library_calls("low_rank", "cuda", "library");

// One call: what every kernel is given, and where the results go.
struct Call {
  const Who& who;
  const Operands& in;
  const Sizes& s;
  const Epilogue& epilogue;
  const Config& config;
  const Gpu& gpu;
  void* stream;
  Result result;
  std::optional<Tensor> residual;  // contiguous
};

KernelOperands operands_of(const Call& c) {
  KernelOperands p{};
  p.x = elements(c.in.x), p.v = elements(c.in.v), p.u = elements(c.in.u);
  p.bias = c.in.bias ? elements(*c.in.bias) : nullptr;
  p.residual = c.residual ? elements(*c.residual) : nullptr;
  p.activation = c.epilogue.activation;
  p.h = c.result.h ? static_cast<uint16_t*>(c.result.h->mutable_data_ptr()) : nullptr;
  p.y = static_cast<uint16_t*>(c.result.y.mutable_data_ptr());
  p.m = static_cast<int>(c.s.m), p.n = static_cast<int>(c.s.n), p.k = static_cast<int>(c.s.k), p.r = static_cast<int>(c.s.r);
  return p;
}

void check(const Call& c, const char* error) { check_launch(c.who.op, error, c.gpu.arch); }

uint64_t* counter_of(const Call& c, int grid) {
  return barrier_counter(c.who.op, c.s.kind.device_index, c.stream, grid, c.gpu.arch);
}

// Each of these is false where no counters are left, and then has done nothing.

bool decode(const Call& c) {
  const DecodePlan& plan = c.config.plan;
  uint64_t* counter = counter_of(c, plan.grid);
  if (!counter) return false;
  decode_calls.count();
  const Tensor partials = floats(c.s.kind, plan.splits * c.s.m * c.s.r);
  const DecodeParams p{operands_of(c), float_data(partials), counter, 0, 0, 0};
  check(c, launch_decode(plan, p, c.s.dtype, c.stream));
  return true;
}

bool small_batch(const Call& c) {
  small_batch_calls.count();
  check(c, launch_small_batch(c.config.batch, operands_of(c), c.s.dtype, c.stream));
  return true;
}

bool small_batch_sm80(const Call& c) {
  const SmallBatchSm80Plan& plan = c.config.batch_sm80;
  uint64_t* counter = counter_of(c, plan.grid);
  if (!counter) return false;
  small_batch_sm80_calls.count();
  const Tensor partials = floats(c.s.kind, partials_of(plan, c.s.m, c.s.r));
  check(c, launch_small_batch_sm80(plan, operands_of(c), float_data(partials), counter, c.s.dtype, c.stream));
  return true;
}

bool chain(const Call& c) {
  const ChainPlan& plan = c.config.chain;
  const char* error = nullptr;
  uint32_t* counters = chain_counters(c.s.kind.device_index, c.stream, error);
  check(c, error);
  if (!counters) return false;
  chain_calls.count();
  std::optional<Tensor> partials;
  if (chain_partials(plan) > 0) partials = floats(c.s.kind, chain_partials(plan));
  const ChainOperands operands{operands_of(c), partials ? float_data(*partials) : nullptr, counters};
  check(c, launch_chain(plan, operands, c.s.dtype, c.stream));
  return true;
}

bool launched(const Call& c) {
  switch (c.config.path) {
    case Path::decode: return decode(c);
    case Path::small_batch: return small_batch(c);
    case Path::small_batch_sm80: return small_batch_sm80(c);
    case Path::chain: return chain(c);
    default: return false;
  }
}

Result by_library(const Operands& in, const Epilogue& epilogue) {
  library_calls.count();
  Result result = library(in);
  if (!epilogue.is_none()) result.y = finished(std::move(result.y), epilogue);
  return result;
}

Tensor low_rank_cuda(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias) {
  return forward_cuda({}, x, v, u, bias, false).y;
}

Tensor low_rank_epilogue_cuda(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias,
                              const std::string& activation, const std::optional<Tensor>& residual) {
  return forward_cuda({}, x, v, u, bias, false, {activation_of(activation), residual}).y;
}

std::tuple<Tensor, Tensor> low_rank_training_cuda(const Tensor& x, const Tensor& v, const Tensor& u,
                                                  const std::optional<Tensor>& bias) {
  Result result = forward_cuda({}, x, v, u, bias, true);
  return {std::move(result.y), std::move(*result.h)};
}

}  // namespace

Result forward_cuda(const Who& who, const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias,
                    bool keep_h, const Epilogue& epilogue) {
  const Sizes s = check(who, x, v, u, bias, epilogue);
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Operands in(x, v, u, bias);
  std::optional<Tensor> residual;
  if (epilogue.residual) residual = as_contiguous(*epilogue.residual);
  const Gpu gpu = gpu_of(device);
  const bool aligned = is_aligned(in.x) && is_aligned(in.v) && is_aligned(in.u) && (!residual || is_aligned(*residual));
  const Config config = choose_config(on_gpu({s.m, s.n, s.k, s.r, s.dtype}, gpu, aligned));
  if (config.path == Path::library) return by_library(in, epilogue);

  Result result{empty_rows(in.x, s.kind, s.n), std::nullopt};
  // decode has h in its blocks
  const bool writes_h = keep_h || (config.path != Path::empty && config.path != Path::decode);
  if (writes_h) result.h = empty_rows(in.x, s.kind, s.r);
  if (config.path == Path::empty) return result;
  Call call{who, in, s, epilogue, config, gpu, current_cuda_stream(device), std::move(result), std::move(residual)};
  return launched(call) ? std::move(call.result) : by_library(in, epilogue);
}

}  // namespace low_rank

STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) {
  m.impl("low_rank", TORCH_BOX(&low_rank::low_rank_cuda));
  m.impl("low_rank_epilogue", TORCH_BOX(&low_rank::low_rank_epilogue_cuda));
  m.impl("low_rank_training", TORCH_BOX(&low_rank::low_rank_training_cuda));
}
#endif
