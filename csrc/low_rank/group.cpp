// Host side of low_rank_group and low_rank_swiglu: members with one input.   x [..., k]  v_i [r_i, k]  u_i [n_i, r_i]
#include <optional>
#include <vector>

#include "host/call_counter.h"
#include "host/tensor.h"
#include "low_rank/forward.h"

namespace low_rank {

namespace {

CallCounter group_calls("low_rank_group", "cpu", "members"), swiglu_calls("low_rank_swiglu", "cpu", "members");

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

}  // namespace
}  // namespace low_rank

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) {
  m.impl("low_rank_group", TORCH_BOX(&low_rank::low_rank_group_cpu));
  m.impl("low_rank_swiglu", TORCH_BOX(&low_rank::low_rank_swiglu_cpu));
}
