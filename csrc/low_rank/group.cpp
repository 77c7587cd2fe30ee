// Host side of low_rank_group and low_rank_swiglu: members with one input.   x [..., k]  v_i [r_i, k]  u_i [n_i, r_i]
#include <optional>
#include <vector>

#include "host/call_counter.h"
#include "host/tensor.h"
#include "low_rank/forward.h"
#ifdef LOWFAT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "host/cuda_launch.h"
#include "host/cuda_stream.h"
#include "low_rank/group.h"
#endif

namespace low_rank {

namespace {

CallCounter group_calls("low_rank_group", "cpu", "members"), swiglu_calls("low_rank_swiglu", "cpu", "members");
#ifdef LOWFAT_CUDA
CallCounter cuda_group_decode_calls("low_rank_group", "cuda", "decode"),
    cuda_group_calls("low_rank_group", "cuda", "members"),
    cuda_swiglu_decode_calls("low_rank_swiglu", "cuda", "decode"),
    cuda_swiglu_calls("low_rank_swiglu", "cuda", "members");
#endif

struct Members {
  const char* op;
  const std::vector<Tensor>&v, &u;
  const std::vector<std::optional<Tensor>>& bias;

  size_t count() const { return v.size(); }
};

// The conditions that the Python functions check with a named error, for callers of torch.ops; each member's sizes follow.
void check(const Members& in) {
  STD_TORCH_CHECK(in.v.size() == in.u.size() && in.v.size() == in.bias.size(), in.op, ": v has ", in.v.size(),
                  " members, u ", in.u.size(), " and bias ", in.bias.size(), "; must be one number for all");
  STD_TORCH_CHECK(!in.v.empty(), in.op, ": v has no members, must have at least one");
}

void check_gate_and_up(const Members& in) {
  check(in);
  STD_TORCH_CHECK(in.count() == 2, in.op, ": v has ", in.count(), " members, must have two, gate and up");
  const bool has_rows = in.u[0].dim() == 2 && in.u[1].dim() == 2;
  STD_TORCH_CHECK(!has_rows || in.u[0].size(0) == in.u[1].size(0), in.op, ": u[0] (gate) has ", in.u[0].size(0),
                  " rows, u[1] (up) has ", in.u[1].size(0), "; gate and up are multiplied element by element");
}

using Forward = Result (*)(const Who&, const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, bool,
                           const Epilogue&);

// Each member by the path that low_rank takes for it.
std::vector<Tensor> one_by_one(Forward forward, const Tensor& x, const Members& in) {
  const Tensor rows = as_contiguous(x);
  std::vector<Tensor> y;
  y.reserve(in.count());
  for (size_t i = 0; i < in.count(); ++i) {
    y.push_back(forward({in.op, static_cast<int64_t>(i)}, rows, in.v[i], in.u[i], in.bias[i], false, {}).y);
  }
  return y;
}

Tensor silu_times_up(const std::vector<Tensor>& y) {
  return call_torch("aten::mul_", "Tensor", call_torch("aten::silu_", "", y[0]), y[1]);
}

std::vector<Tensor> low_rank_group_cpu(const Tensor& x, const std::vector<Tensor>& v, const std::vector<Tensor>& u,
                                       const std::vector<std::optional<Tensor>>& bias) {
  const Members in{"low_rank_group", v, u, bias};
  check(in);
  group_calls.count();
  return one_by_one(&forward_cpu, x, in);
}

Tensor low_rank_swiglu_cpu(const Tensor& x, const std::vector<Tensor>& v, const std::vector<Tensor>& u,
                           const std::vector<std::optional<Tensor>>& bias) {
  const Members in{"low_rank_swiglu", v, u, bias};
  check_gate_and_up(in);
  swiglu_calls.count();
  return silu_times_up(one_by_one(&forward_cpu, x, in));
}

#ifdef LOWFAT_CUDA

// The members as the kernels take them. Holds what had to be made contiguous.
struct GroupOperands {
  Tensor x;
  std::vector<Tensor> v, u;
  std::vector<std::optional<Tensor>> bias;
  int64_t n[kMostMembers] = {}, r[kMostMembers] = {};

  GroupOperands(const Tensor& x_any, const Members& in) : x(as_contiguous(x_any)) {
    for (size_t i = 0; i < in.count(); ++i) {
      v.push_back(as_contiguous(in.v[i])), u.push_back(as_contiguous(in.u[i]));
      bias.push_back(in.bias[i] ? std::optional<Tensor>(as_contiguous(*in.bias[i])) : std::nullopt);
      n[i] = u[i].size(0), r[i] = v[i].size(0);
    }
  }

  bool has_aligned_starts() const {
    bool all = is_aligned(x);
    for (size_t i = 0; i < v.size(); ++i) all = all && is_aligned(v[i]) && is_aligned(u[i]);
    return all;
  }
};

// All members in one launch: y of each, or the only one of SwiGLU. None where the kernels do not take this call.
std::vector<Tensor> decode_cuda(const Tensor& x, const Members& in, bool is_swiglu, CallCounter& calls) {
  std::vector<Tensor> y;
  if (in.count() > kMostMembers) return y;
  Sizes s{};
  for (size_t i = 0; i < in.count(); ++i) {
    const Who who{in.op, static_cast<int64_t>(i)};
    s = low_rank::check(who, x, in.v[i], in.u[i], in.bias[i]);
  }
  const int device = s.kind.device_index, count = static_cast<int>(in.count());
  const torch::stable::accelerator::DeviceGuard guard(device);
  const GroupOperands operands(x, in);
  const Gpu gpu = gpu_of(device);
  const Problem problem = on_gpu({s.m, s.n, s.k, s.r, s.dtype}, gpu, operands.has_aligned_starts());
  const GroupPlan plan = choose_group(problem, count, operands.n, operands.r, is_swiglu);
  if (plan.token_tiles == 0) return y;
  void* stream = current_cuda_stream(device);
  uint64_t* counter = barrier_counter(in.op, device, stream, plan.grid, gpu.arch);
  if (!counter) return y;

  calls.count();
  const Tensor partials = floats(s.kind, plan.partials);
  GroupParams p{};
  p.x = elements(operands.x);
  p.partials = float_data(partials);
  p.counter = counter;
  p.count = count, p.m = static_cast<int>(s.m), p.k = static_cast<int>(s.k);
  for (size_t i = 0; i < in.count(); ++i) {
    GroupMember& member = p.members[i];
    member.v = elements(operands.v[i]), member.u = elements(operands.u[i]);
    member.bias = operands.bias[i] ? elements(*operands.bias[i]) : nullptr;
    member.n = static_cast<int>(operands.n[i]), member.r = static_cast<int>(operands.r[i]);
    if (is_swiglu && i > 0) continue;  // gate's y is the result
    y.push_back(empty_rows(operands.x, s.kind, operands.n[i]));
    member.y = static_cast<uint16_t*>(y.back().mutable_data_ptr());
  }
  check_launch(in.op, launch_group(plan, p, s.dtype, stream), gpu.arch);
  return y;
}

std::vector<Tensor> low_rank_group_cuda(const Tensor& x, const std::vector<Tensor>& v, const std::vector<Tensor>& u,
                                        const std::vector<std::optional<Tensor>>& bias) {
  const Members in{"low_rank_group", v, u, bias};
  check(in);
  std::vector<Tensor> y = decode_cuda(x, in, false, cuda_group_decode_calls);
  if (!y.empty()) return y;
  cuda_group_calls.count();
  return one_by_one(&forward_cuda, x, in);
}

Tensor low_rank_swiglu_cuda(const Tensor& x, const std::vector<Tensor>& v, const std::vector<Tensor>& u,
                            const std::vector<std::optional<Tensor>>& bias) {
  const Members in{"low_rank_swiglu", v, u, bias};
  check_gate_and_up(in);
  const std::vector<Tensor> y = decode_cuda(x, in, true, cuda_swiglu_decode_calls);
  if (!y.empty()) return y[0];
  cuda_swiglu_calls.count();
  const torch::stable::accelerator::DeviceGuard guard(kind_of(x).device_index);
  return silu_times_up(one_by_one(&forward_cuda, x, in));
}

#endif

}  // namespace
}  // namespace low_rank

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) {
  m.impl("low_rank_group", TORCH_BOX(&low_rank::low_rank_group_cpu));
  m.impl("low_rank_swiglu", TORCH_BOX(&low_rank::low_rank_swiglu_cpu));
}

#ifdef LOWFAT_CUDA
STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) {
  m.impl("low_rank_group", TORCH_BOX(&low_rank::low_rank_group_cuda));
  m.impl("low_rank_swiglu", TORCH_BOX(&low_rank::low_rank_swiglu_cuda));
}
#endif
