// Host side of low_rank: checks, choice of configuration, launch, registration.   x [..., k]  v [r, k]  u [n, r]  y [..., n]
#include "low_rank/low_rank.h"

#include <memory>
#include <tuple>

#include "host/call_counter.h"
#include "host/tensor.h"
#ifdef LOWFAT_CUDA
#include "host/cuda_stream.h"
#endif

namespace low_rank {

namespace {

CallCounter decode_calls("low_rank", "cpu", "decode"), library_calls("low_rank", "cpu", "library");

struct Sizes {
  int64_t m, n, k, r;
};

struct Result {
  Tensor y;                 // [..., n]
  std::optional<Tensor> h;  // [..., r], where it was asked for
};

// The conditions that the Python function checks with a named error, for callers of torch.ops.lowfat.low_rank.
Sizes check(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() >= 1, "low_rank: x has no dimensions, must be [..., k]");
  STD_TORCH_CHECK(v.dim() == 2 && u.dim() == 2, "low_rank: v has ", v.dim(), " and u ", u.dim(),
                  " dimensions, must be [r, k] and [n, r]");
  const Sizes s{rows_of(x), u.size(0), v.size(1), v.size(0)};
  STD_TORCH_CHECK(x.size(x.dim() - 1) == s.k, "low_rank: x has ", x.size(x.dim() - 1), " features, v has ", s.k);
  STD_TORCH_CHECK(u.size(1) == s.r, "low_rank: u has rank ", u.size(1), ", v has rank ", s.r);
  const auto check_like_x = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "low_rank: ", name, " and x have different dtypes");
    STD_TORCH_CHECK(t.device() == x.device(), "low_rank: ", name, " and x are on different devices");
  };
  check_like_x("v", v);
  check_like_x("u", u);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == s.n, "low_rank: bias must be [", s.n, "], the rows of u");
    check_like_x("bias", *bias);
  }
  STD_TORCH_CHECK(dtype_of(x) != Dtype::other, "low_rank: x must be float64, float32, float16 or bfloat16");
  return s;
}

Result library(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias) {
  Tensor h = library_linear(x, v);
  Tensor y = library_linear(h, u, bias);
  return {std::move(y), std::move(h)};
}

CpuKernel cpu_kernel([[maybe_unused]] CpuLevel level, Dtype dtype, [[maybe_unused]] int64_t m) {
#ifdef LOWFAT_X86
  if (level == CpuLevel::avx512_bf16) return cpu_kernel_avx512(dtype, m);
  if (level == CpuLevel::avx2_fma) return cpu_kernel_avx2(dtype);
#endif
  return cpu_kernel_scalar(dtype);
}

void multiply(const CpuKernel& kernel, Product product, int64_t grain) {
  std::unique_ptr<char[]> prepared;
  if (const int64_t bytes = kernel.prepared_bytes(product.m, product.depth)) {
    prepared.reset(new char[static_cast<size_t>(bytes)]);
    kernel.prepare(product.x, prepared.get(), product.m, product.depth);
    product.x = prepared.get();
  }
  const int64_t tiles = (product.rows + kernel.row_tile - 1) / kernel.row_tile;
  if (grain == 0) return kernel.multiply(product, 0, tiles);
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t first, int64_t last) { kernel.multiply(product, first, last); });
}

Result forward_cpu(const Tensor& x_any, const Tensor& v_any, const Tensor& u_any, const std::optional<Tensor>& bias_any,
                   bool keep_h) {
  const Sizes s = check(x_any, v_any, u_any, bias_any);
  const Dtype dtype = dtype_of(x_any);
  const Config config = choose_config({s.m, s.n, s.k, s.r, dtype, Device::cpu, cpu_level()});
  if (config.path == Path::library) {
    library_calls.count();
    return library(x_any, v_any, u_any, bias_any);
  }
  const Tensor x = as_contiguous(x_any), v = as_contiguous(v_any), u = as_contiguous(u_any);
  std::optional<Tensor> bias;
  if (bias_any) bias = as_contiguous(*bias_any);
  Result result{empty_rows(x, s.n), std::nullopt};
  if (keep_h) result.h = empty_rows(x, s.r);
  if (s.m == 0) return result;
  decode_calls.count();

  std::unique_ptr<char[]> h_inside;
  void* h = nullptr;
  if (keep_h) {
    h = result.h->mutable_data_ptr();
  } else {
    h_inside.reset(new char[static_cast<size_t>(s.m * s.r * 4)]);
    h = h_inside.get();
  }
  const CpuKernel kernel = cpu_kernel(cpu_level(), dtype, s.m);
  const void* u_data = u.const_data_ptr();
  multiply(kernel, {x.const_data_ptr(), v.const_data_ptr(), nullptr, h, s.m, s.k, s.r, u_data}, config.first_grain);
  multiply(kernel, {h, u_data, bias ? bias->const_data_ptr() : nullptr, result.y.mutable_data_ptr(), s.m, s.r, s.n, nullptr},
           config.second_grain);
  return result;
}

Tensor low_rank_cpu(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias) {
  return forward_cpu(x, v, u, bias, false).y;
}

std::tuple<Tensor, Tensor> low_rank_training_cpu(const Tensor& x, const Tensor& v, const Tensor& u,
                                                 const std::optional<Tensor>& bias) {
  Result result = forward_cpu(x, v, u, bias, true);
  return {std::move(result.y), std::move(*result.h)};
}

}  // namespace
}  // namespace low_rank

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) {
  m.impl("low_rank", TORCH_BOX(&low_rank::low_rank_cpu));
  m.impl("low_rank_training", TORCH_BOX(&low_rank::low_rank_training_cpu));
}
