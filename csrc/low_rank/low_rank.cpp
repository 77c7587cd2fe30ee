// Host side of low_rank: checks, and on a CPU choice of configuration, calls, registration. (A GPU's: low_rank_cuda.cpp.)
//   x [..., k]  v [r, k]  u [n, r]  y [..., n]
#include "low_rank/low_rank.h"

#include <algorithm>
#include <array>
#include <string>
#include <tuple>

#include "cpu/config.h"
#include "cpu/run.h"
#include "host/call_counter.h"
#include "host/tensor.h"
#include "low_rank/forward.h"

namespace low_rank {

namespace {

CallCounter decode_calls("low_rank", "cpu", "decode"), library_calls("low_rank", "cpu", "library");

constexpr std::array<const char*, 5> kActivations{"none", "relu", "gelu", "gelu_tanh", "silu"};  // in their order

cpu::Product first(const Operands& in, const Sizes& s, const void* x, void* h) {
  return {x, in.v.const_data_ptr(), nullptr, h, s.m, s.k, s.r, s.k, s.r, in.u.const_data_ptr()};
}

cpu::Product second(const Operands& in, const Sizes& s, const void* h, void* y) {
  return {h, in.u.const_data_ptr(), in.bias ? in.bias->const_data_ptr() : nullptr, y, s.m, s.r, s.n, s.r, s.n, nullptr};
}

Result product_cpu(const Sizes& s, const Operands& in, bool keep_h) {
  const Config config = choose_config(on_this_cpu({s.m, s.n, s.k, s.r, s.dtype}));
  if (config.path == Path::library) {
    library_calls.count();
    return library(in);
  }
  Result result{empty_rows(in.x, s.kind, s.n), std::nullopt};
  if (keep_h) result.h = empty_rows(in.x, s.kind, s.r);
  if (config.path == Path::empty) return result;

  decode_calls.count();
  const int64_t bytes = element_bytes(s.dtype), most = cpu::slice_of(s.m);
  cpu::Lines h_inside;
  if (!keep_h) h_inside = cpu::new_lines(most * s.r * bytes);
  const auto* x = static_cast<const char*>(in.x.const_data_ptr());
  auto* y = static_cast<char*>(result.y.mutable_data_ptr());
  auto* kept = keep_h ? static_cast<char*>(result.h->mutable_data_ptr()) : nullptr;
  for (int64_t token = 0; token < s.m; token += most) {
    Sizes slice = s;
    slice.m = std::min(most, s.m - token);
    void* h = keep_h ? kept + token * s.r * bytes : h_inside.get();
    const cpu::Kernel kernel = cpu::kernel(cpu_level(), s.dtype, slice.m);
    cpu::multiply(kernel, first(in, slice, x + token * s.k * bytes, h), config.first_grain);
    cpu::multiply(kernel, second(in, slice, h, y + token * s.n * bytes), config.second_grain);
  }
  return result;
}

Tensor low_rank_cpu(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias) {
  return forward_cpu({}, x, v, u, bias, false).y;
}

Tensor low_rank_epilogue_cpu(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias,
                             const std::string& activation, const std::optional<Tensor>& residual) {
  return forward_cpu({}, x, v, u, bias, false, {activation_of(activation), residual}).y;
}

std::tuple<Tensor, Tensor> low_rank_training_cpu(const Tensor& x, const Tensor& v, const Tensor& u,
                                                 const std::optional<Tensor>& bias) {
  Result result = forward_cpu({}, x, v, u, bias, true);
  return {std::move(result.y), std::move(*result.h)};
}

}  // namespace

Sizes check(const Who& who, const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() >= 1, who.op, ": x has no dimensions, must be [..., k]");
  STD_TORCH_CHECK(v.dim() == 2 && u.dim() == 2, who.op, ": ", who.of("v"), " has ", v.dim(), " and ", who.of(who.u), " ",
                  u.dim(), " dimensions, must be [r, k] and [n, r]");
  const Kind kind = kind_of(x);
  const Sizes s{rows_of(x), u.size(0), v.size(1), v.size(0), kind, dtype_of(kind)};
  STD_TORCH_CHECK(x.size(x.dim() - 1) == s.k, who.op, ": x has ", x.size(x.dim() - 1), " features, ", who.of("v"), " has ",
                  s.k);
  STD_TORCH_CHECK(u.size(1) == s.r, who.op, ": ", who.of(who.u), " has rank ", u.size(1), ", ", who.of("v"), " has rank ",
                  s.r);
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == s.n), who.op, ": ", who.of("bias"), " must be [", s.n,
                  "], the rows of ", who.of(who.u));
  STD_TORCH_CHECK(kind_of(v) == kind && kind_of(u) == kind && (!bias || kind_of(*bias) == kind), who.op, ": x, ",
                  who.of("v"), ", ", who.of(who.u), " and ", who.of("bias"),
                  " must have one dtype (or use autocast) and be on one device");
  STD_TORCH_CHECK(s.dtype != Dtype::other, who.op, ": x must be float64, float32, float16 or bfloat16");
  return s;
}

bool has_rows_of(const Tensor& t, const Tensor& x, int64_t last) {
  if (t.dim() != x.dim() || t.size(t.dim() - 1) != last) return false;
  const auto sizes = t.sizes(), x_sizes = x.sizes();
  return std::equal(sizes.begin(), sizes.end() - 1, x_sizes.begin());
}

Sizes check(const Who& who, const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias,
            const Epilogue& epilogue) {
  const Sizes s = check(who, x, v, u, bias);
  const std::optional<Tensor>& residual = epilogue.residual;
  STD_TORCH_CHECK(!residual || has_rows_of(*residual, x, s.n), who.op, ": residual must be [..., ", s.n,
                  "] with the leading sizes of x");
  STD_TORCH_CHECK(!residual || kind_of(*residual) == s.kind, who.op, ": residual must have the dtype and device of x");
  return s;
}

Tensor finished(Tensor y, const Epilogue& epilogue) {
  switch (epilogue.activation) {
    case Activation::relu: y = call_torch("aten::relu_", "", y); break;
    case Activation::gelu: y = call_torch("aten::gelu_", "", y, std::string("none")); break;
    case Activation::gelu_tanh: y = call_torch("aten::gelu_", "", y, std::string("tanh")); break;
    case Activation::silu: y = call_torch("aten::silu_", "", y); break;
    case Activation::none: break;
  }
  return epilogue.residual ? add(y, *epilogue.residual) : y;
}

Activation activation_of(const std::string& name) {
  const auto found = std::find(kActivations.begin(), kActivations.end(), name);
  STD_TORCH_CHECK(found != kActivations.end(), "low_rank: activation is '", name,
                  "', must be one of none, relu, gelu, gelu_tanh, silu");
  return static_cast<Activation>(found - kActivations.begin());
}

Result library(const Operands& in) {
  Tensor h = library_linear(in.x, in.v);
  Tensor y = library_linear(h, in.u, in.bias);
  return {std::move(y), std::move(h)};
}

Result forward_cpu(const Who& who, const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias,
                   bool keep_h, const Epilogue& epilogue) {
  const Sizes s = check(who, x, v, u, bias, epilogue);
  Result result = product_cpu(s, Operands(x, v, u, bias), keep_h);
  if (!epilogue.is_none()) result.y = finished(std::move(result.y), epilogue);
  return result;
}

}  // namespace low_rank

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) {
  m.impl("low_rank", TORCH_BOX(&low_rank::low_rank_cpu));
  m.impl("low_rank_epilogue", TORCH_BOX(&low_rank::low_rank_epilogue_cpu));
  m.impl("low_rank_training", TORCH_BOX(&low_rank::low_rank_training_cpu));
}
