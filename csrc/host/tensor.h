// The few things host code asks of torch, in calls that are cheap and stable: sizes, an empty tensor, the library's linear.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <vector>

#include "host/op_table.h"

using Tensor = torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Double: return Dtype::float64;
    default: return Dtype::other;
  }
}

// A call that goes through torch's boxed dispatcher costs 1-2 us: only what needs a copy pays for it.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Uninitialized, with like's dtype and device and the shape of `like` with `last` as its last size. This function of the
// C shim allocates directly: 0.3 us, where new_empty through the dispatcher takes 1.5.
inline Tensor empty_rows(const Tensor& like, int64_t last) {
  const auto like_sizes = like.sizes();
  std::vector<int64_t> sizes(like_sizes.begin(), like_sizes.end()), strides(sizes.size());
  sizes.back() = last;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = stride;
  int32_t dtype = 0, device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  device_type, device_index, &made));
  return Tensor(made);
}

// Rows of x when its leading dimensions are flattened. Not numel / k: k may be 0.
inline int64_t rows_of(const Tensor& x) {
  const auto sizes = x.sizes();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
  return rows;
}

// The library's x w^T + bias: what an op does where its kernel does not win.
inline Tensor library_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias = std::nullopt) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(w),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}
