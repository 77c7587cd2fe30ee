// The few things host code asks of torch, in calls that are cheap and stable: sizes, an empty tensor, the library's linear.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <optional>
#include <vector>

#include "host/op_table.h"

using Tensor = torch::stable::Tensor;
using Dimensions = std::vector<int64_t>;

// torch's own codes, not Tensor::scalar_type() and device(): those pull in functions that only newer torch has, and
// cost more.
struct Kind {
  int32_t dtype = 0, device_type = 0, device_index = 0;

  bool operator==(const Kind& other) const {
    return dtype == other.dtype && device_type == other.device_type && device_index == other.device_index;
  }
};

inline Kind kind_of(const Tensor& t) {
  Kind kind;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &kind.dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &kind.device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &kind.device_index));
  return kind;
}

inline Dtype dtype_of(const Kind& kind) {
  static const int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16(),
                       float16 = aoti_torch_dtype_float16(), float64 = aoti_torch_dtype_float64();
  return kind.dtype == float32    ? Dtype::float32
         : kind.dtype == bfloat16 ? Dtype::bfloat16
         : kind.dtype == float16  ? Dtype::float16
         : kind.dtype == float64  ? Dtype::float64
                                  : Dtype::other;
}

// A call that goes through torch's boxed dispatcher costs 1-2 us: only what needs a copy pays for it.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Uninitialized and contiguous. This function of the C shim allocates directly: 0.3 us, where new_empty through the dispatcher
// takes 1.5.
inline Tensor empty(const Kind& kind, const Dimensions& sizes) {
  Dimensions strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = stride;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  kind.dtype, kind.device_type, kind.device_index, &made));
  return Tensor(made);
}

// By torch's own fill.
inline Tensor zeros(const Kind& kind, const Dimensions& sizes) {
  Tensor made = empty(kind, sizes);
  return torch::stable::zero_(made);
}

// Workspace: floats where tensors of this kind are.
inline Tensor floats(Kind kind, int64_t count) {
  kind.dtype = aoti_torch_dtype_float32();
  return empty(kind, {count});
}

inline float* float_data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// The sizes of `like` with `last` as the last one.
inline Dimensions sizes_like(const Tensor& like, int64_t last) {
  const auto like_sizes = like.sizes();
  Dimensions sizes(like_sizes.begin(), like_sizes.end());
  sizes.back() = last;
  return sizes;
}

inline Tensor empty_rows(const Tensor& like, const Kind& kind, int64_t last) { return empty(kind, sizes_like(like, last)); }

// Rows of x when its leading dimensions are flattened. Not numel / k: k may be 0.
inline int64_t rows_of(const Tensor& x) {
  const auto sizes = x.sizes();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
  return rows;
}

template <class T>
const T* data_of(const Tensor& t, int64_t first = 0) {
  return static_cast<const T*>(t.const_data_ptr()) + first;
}
template <class T>
T* data_to(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// What kernels that load 16 bytes at a time need of an operand's start.
inline bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

inline const uint32_t* words_of(const Tensor& mask) { return static_cast<const uint32_t*>(mask.const_data_ptr()); }

// bf16 or fp16, as kernels take them.
inline const uint16_t* elements(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }

// One of torch's ops that return a tensor, through its boxed dispatcher.
template <class... Arguments>
Tensor call_torch(const char* op, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// --- torch's own views and copies, as the references have them ---

inline Tensor shaped(const Tensor& t, const Dimensions& sizes) { return torch::stable::reshape(t, sizes); }

// Rows [m, last] with the leading sizes of `like`.
inline Tensor shaped_like(const Tensor& rows, const Tensor& like) {
  return like.dim() == 2 ? rows : torch::stable::view(rows, sizes_like(like, rows.size(1)));
}

inline Tensor permuted(const Tensor& t, const Dimensions& order) {
  return call_torch("aten::permute", "", t, torch::headeronly::IntHeaderOnlyArrayRef(order));
}

// Zeros behind the columns of rows.
inline Tensor padded(const Tensor& rows, int64_t columns) {
  const int64_t more[] = {0, columns - rows.size(1)};
  return more[1] == 0 ? rows : torch::stable::pad(rows, more);
}

// --- its arithmetic ---

// a + b, not for whole numbers: the stable ABI cannot pass a number to torch's own sum, and this difference takes a double.
inline Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1); }

// The library's x w^T + bias: what an op does where its kernel does not win.
inline Tensor library_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias = std::nullopt) {
  return call_torch("aten::linear", "", x, w, bias);
}
