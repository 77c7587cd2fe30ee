// Host side of low_rank: checks, choice of configuration, launch, registration.   x [..., k]  v [r, k]  u [n, r]  y [..., n]
#include "low_rank/low_rank.h"

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <string>
#include <tuple>

#include "host/call_counter.h"
#include "host/tensor.h"
#include "low_rank/forward.h"
#ifdef LOWFAT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "host/cuda_launch.h"
#include "host/cuda_stream.h"
#endif

namespace low_rank {

namespace {

CallCounter decode_calls("low_rank", "cpu", "decode"), library_calls("low_rank", "cpu", "library");
#ifdef LOWFAT_CUDA
CallCounter cuda_decode_calls("low_rank", "cuda", "decode"), cuda_small_batch_calls("low_rank", "cuda", "small batch"),
    cuda_chain_calls("low_rank", "cuda", "chain"), cuda_library_calls("low_rank", "cuda", "library");
#endif

constexpr std::array<const char*, 5> kActivations{"none", "relu", "gelu", "gelu_tanh", "silu"};  // in their order

Activation activation_of(const std::string& name) {
  const auto found = std::find(kActivations.begin(), kActivations.end(), name);
  STD_TORCH_CHECK(found != kActivations.end(), "low_rank: activation is '", name,
                  "', must be one of none, relu, gelu, gelu_tanh, silu");
  return static_cast<Activation>(found - kActivations.begin());
}

bool has_shape_of_y(const Tensor& t, const Tensor& x, int64_t n) {
  if (t.dim() != x.dim() || t.size(t.dim() - 1) != n) return false;
  const auto sizes = t.sizes(), x_sizes = x.sizes();
  return std::equal(sizes.begin(), sizes.end() - 1, x_sizes.begin());
}

Sizes check(const Who& who, const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias,
            const Epilogue& epilogue) {
  const Sizes s = low_rank::check(who, x, v, u, bias);
  const std::optional<Tensor>& residual = epilogue.residual;
  STD_TORCH_CHECK(!residual || has_shape_of_y(*residual, x, s.n), who.op, ": residual must be [..., ", s.n,
                  "] with the leading sizes of x");
  STD_TORCH_CHECK(!residual || kind_of(*residual) == s.kind, who.op, ": residual must have the dtype and device of x");
  return s;
}

// The epilogue where no kernel does it: by torch's ops, each of which rounds.
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

CpuKernel cpu_kernel([[maybe_unused]] CpuLevel level, Dtype dtype, [[maybe_unused]] int64_t m) {
#ifdef LOWFAT_X86
  if (level == CpuLevel::avx512_bf16) return cpu_kernel_avx512(dtype, m);
  if (level == CpuLevel::avx2_fma) return cpu_kernel_avx2(dtype);
#endif
  return cpu_kernel_scalar(dtype);
}

// Memory that starts at a cache line: vectors of a packed x that cross lines cost a tenth of the time at m = 8 and more.
struct FreeLines {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Lines = std::unique_ptr<void, FreeLines>;

Lines new_lines(int64_t bytes) { return Lines(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})); }

void multiply(const CpuKernel& kernel, Product product, int64_t grain) {
  Lines prepared;
  if (const int64_t bytes = kernel.prepared_bytes(product.m, product.depth)) {
    prepared = new_lines(bytes);
    kernel.prepare(product.x, prepared.get(), product.m, product.depth);
    product.x = prepared.get();
  }
  const int64_t tiles = (product.rows + kernel.row_tile - 1) / kernel.row_tile;
  if (grain == 0) return kernel.multiply(product, 0, tiles);
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t first, int64_t last) { kernel.multiply(product, first, last); });
}

// The same bits for every layout of the same values, on whichever path.
struct Arguments {
  Tensor x, v, u;
  std::optional<Tensor> bias;

  Arguments(const Tensor& x_any, const Tensor& v_any, const Tensor& u_any, const std::optional<Tensor>& bias_any)
      : x(as_contiguous(x_any)), v(as_contiguous(v_any)), u(as_contiguous(u_any)) {
    if (bias_any) bias = as_contiguous(*bias_any);
  }

  Product first(const Sizes& s, void* h) const {
    return {x.const_data_ptr(), v.const_data_ptr(), nullptr, h, s.m, s.k, s.r, u.const_data_ptr()};
  }
  Product second(const Sizes& s, const void* h, void* y) const {
    return {h, u.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, y, s.m, s.r, s.n, nullptr};
  }
};

Result library(const Arguments& in) {
  Tensor h = library_linear(in.x, in.v);
  Tensor y = library_linear(h, in.u, in.bias);
  return {std::move(y), std::move(h)};
}

Result product_cpu(const Sizes& s, const Arguments& in, bool keep_h) {
  const Config config = choose_config({s.m, s.n, s.k, s.r, s.dtype, Device::cpu, cpu_level()});
  if (config.path == Path::library) {
    library_calls.count();
    return library(in);
  }
  Result result{empty_rows(in.x, s.kind, s.n), std::nullopt};
  if (keep_h) result.h = empty_rows(in.x, s.kind, s.r);
  if (config.path == Path::empty) return result;

  decode_calls.count();
  Lines h_inside;
  if (!keep_h) h_inside = new_lines(s.m * s.r * 4);
  void* h = keep_h ? result.h->mutable_data_ptr() : h_inside.get();
  const CpuKernel kernel = cpu_kernel(cpu_level(), s.dtype, s.m);
  multiply(kernel, in.first(s, h), config.first_grain);
  multiply(kernel, in.second(s, h, result.y.mutable_data_ptr()), config.second_grain);
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

#ifdef LOWFAT_CUDA

Result library_cuda(const Arguments& in) {
  cuda_library_calls.count();
  return library(in);
}

// The small-batch and chained kernels are nothing but machine code for an sm_90: a build with none of it, or with PTX, has
// the library.
bool has_sm_90a_code() {
  static const bool is_built = [] {
    const std::vector<std::string> archs = compiled_cuda_archs();
    return std::find(archs.begin(), archs.end(), "sm_90a") != archs.end();
  }();
  return is_built;
}

// h is written and read again, also where nobody wants it.
void small_batch_cuda(const Arguments& in, const Sizes& s, const SmallBatchPlan& plan, const Tensor& h, const Tensor& y,
                      void* stream, const Gpu& gpu) {
  cuda_small_batch_calls.count();
  SmallBatchOperands p{};
  p.x = elements(in.x), p.v = elements(in.v), p.u = elements(in.u), p.bias = in.bias ? elements(*in.bias) : nullptr;
  p.h = static_cast<uint16_t*>(h.mutable_data_ptr());
  p.y = static_cast<uint16_t*>(y.mutable_data_ptr());
  p.m = static_cast<int>(s.m), p.n = static_cast<int>(s.n), p.k = static_cast<int>(s.k), p.r = static_cast<int>(s.r);
  check_launch("low_rank", launch_small_batch(plan, p, s.dtype, stream), gpu.arch);
}

// h as above. False: there are no counters left.
bool chain_cuda(const Arguments& in, const Sizes& s, const ChainPlan& plan, const Tensor& h, const Tensor& y, void* stream,
                const Gpu& gpu) {
  const char* error = nullptr;
  uint32_t* counters = chain_counters(s.kind.device_index, stream, error);
  check_launch("low_rank", error, gpu.arch);
  if (!counters) return false;
  cuda_chain_calls.count();
  Kind floats = s.kind;
  floats.dtype = aoti_torch_dtype_float32();
  ChainOperands p{};
  std::optional<Tensor> partials;
  if (chain_partials(plan) > 0) {
    partials = empty(floats, {chain_partials(plan)});
    p.partials = static_cast<float*>(partials->mutable_data_ptr());
  }
  p.x = elements(in.x), p.v = elements(in.v), p.u = elements(in.u), p.bias = in.bias ? elements(*in.bias) : nullptr;
  p.h = static_cast<uint16_t*>(h.mutable_data_ptr());
  p.y = static_cast<uint16_t*>(y.mutable_data_ptr());
  p.counters = counters;
  p.m = static_cast<int>(s.m), p.n = static_cast<int>(s.n), p.k = static_cast<int>(s.k), p.r = static_cast<int>(s.r);
  check_launch("low_rank", launch_chain(plan, p, s.dtype, stream), gpu.arch);
  return true;
}

Result product_cuda(const Sizes& s, const Arguments& in, bool keep_h) {
  const int device = s.kind.device_index;
  const Gpu gpu = gpu_of(device);
  const bool aligned = is_aligned(in.x) && is_aligned(in.v) && is_aligned(in.u);
  const Config config =
      choose_config({s.m, s.n, s.k, s.r, s.dtype, Device::cuda, CpuLevel::scalar, gpu.arch, gpu.sm_count, aligned});
  const bool is_missing = (config.path == Path::small_batch || config.path == Path::chain) && !has_sm_90a_code();
  if (config.path == Path::library || is_missing) return library_cuda(in);
  Result result{empty_rows(in.x, s.kind, s.n), std::nullopt};
  if (keep_h) result.h = empty_rows(in.x, s.kind, s.r);
  if (config.path == Path::empty) return result;

  void* stream = current_cuda_stream(device);
  if (config.path == Path::small_batch) {
    const Tensor h = keep_h ? *result.h : empty_rows(in.x, s.kind, s.r);
    small_batch_cuda(in, s, config.batch, h, result.y, stream, gpu);
    return result;
  }
  if (config.path == Path::chain) {
    const Tensor h = keep_h ? *result.h : empty_rows(in.x, s.kind, s.r);
    return chain_cuda(in, s, config.chain, h, result.y, stream, gpu) ? result : library_cuda(in);
  }
  const char* error = nullptr;
  uint64_t* counter = grid_counter(device, stream, config.plan.grid, error);
  check_launch("low_rank", error, gpu.arch);
  if (!counter) return library_cuda(in);
  cuda_decode_calls.count();
  Kind floats = s.kind;
  floats.dtype = aoti_torch_dtype_float32();
  const Tensor partials = empty_rows(in.x, floats, config.plan.splits * s.r);
  DecodeParams p{};
  p.x = elements(in.x), p.v = elements(in.v), p.u = elements(in.u), p.bias = in.bias ? elements(*in.bias) : nullptr;
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  p.h = keep_h ? static_cast<uint16_t*>(result.h->mutable_data_ptr()) : nullptr;
  p.y = static_cast<uint16_t*>(result.y.mutable_data_ptr());
  p.counter = counter;
  p.m = static_cast<int>(s.m), p.n = static_cast<int>(s.n), p.k = static_cast<int>(s.k), p.r = static_cast<int>(s.r);
  check_launch("low_rank", launch_decode(config.plan, p, s.dtype, stream), gpu.arch);
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

#endif

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

Result forward_cpu(const Who& who, const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias,
                   bool keep_h, const Epilogue& epilogue) {
  const Sizes s = check(who, x, v, u, bias, epilogue);
  Result result = product_cpu(s, Arguments(x, v, u, bias), keep_h);
  if (!epilogue.is_none()) result.y = finished(std::move(result.y), epilogue);
  return result;
}

#ifdef LOWFAT_CUDA
Result forward_cuda(const Who& who, const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias,
                    bool keep_h, const Epilogue& epilogue) {
  const Sizes s = check(who, x, v, u, bias, epilogue);
  const torch::stable::accelerator::DeviceGuard guard(s.kind.device_index);
  Result result = product_cuda(s, Arguments(x, v, u, bias), keep_h);
  if (!epilogue.is_none()) result.y = finished(std::move(result.y), epilogue);
  return result;
}
#endif

}  // namespace low_rank

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) {
  m.impl("low_rank", TORCH_BOX(&low_rank::low_rank_cpu));
  m.impl("low_rank_epilogue", TORCH_BOX(&low_rank::low_rank_epilogue_cpu));
  m.impl("low_rank_training", TORCH_BOX(&low_rank::low_rank_training_cpu));
}

#ifdef LOWFAT_CUDA
STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) {
  m.impl("low_rank", TORCH_BOX(&low_rank::low_rank_cuda));
  m.impl("low_rank_epilogue", TORCH_BOX(&low_rank::low_rank_epilogue_cuda));
  m.impl("low_rank_training", TORCH_BOX(&low_rank::low_rank_training_cuda));
}
#endif
