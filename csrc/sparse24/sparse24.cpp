// Host side of sparse24: checks, and on a CPU choice of configuration, calls, registration.
//   x [..., k]   values [n, k kept / group]   mask [n, ceil(k / 32)]   bias [n]   y [..., n]
#include <algorithm>
#include <cstring>

#include "cpu/expand.h"
#include "cpu/run.h"
#include "host/call_counter.h"
#include "sparse24/forward.h"
#include "sparse24/sparse24_cpu.h"

namespace sparse24 {

namespace {

CallCounter decode_calls("sparse24", "cpu", "decode"), library_calls("sparse24", "cpu", "library");

constexpr int64_t kTaskNumbers = 1 << 16;  // written by a thread, at least
constexpr int64_t kBlockBytes = 8 << 20, kFewestRows = 64;  // of a weight that are written out at a time

// Contiguous: the same bits for every layout of the same values, on whichever path.
struct Operands {
  Tensor x, values, mask;
  std::optional<Tensor> bias;
};

// Slices of x, each with the whole weight: spreading it again costs less than the products of the library.
void decode(const Call& s, const CpuConfig& config, const Operands& in, Tensor& y) {
  const auto* x = static_cast<const char*>(in.x.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const void* bias = in.bias ? in.bias->const_data_ptr() : nullptr;
  const int64_t slice = cpu::slice_of(s.m), bytes = element_bytes(s.dtype);
  for (int64_t token = 0; token < s.m; token += slice) {
    const int64_t m = std::min(slice, s.m - token);
    const cpu::Kernel kernel = cpu::masked_kernel(cpu_level(), s.dtype, m);
    cpu::Product product{x + token * s.k * bytes, in.values.const_data_ptr(), bias, to + token * s.n * bytes,
                         m, s.k, s.n, s.k, s.n, nullptr};
    product.mask = words_of(in.mask), product.kept = s.stored();
    cpu::multiply(kernel, product, config.grain);
  }
}

// Rows of the weight from `first` on, written out.
void expand(const Call& s, const Operands& in, int64_t first, Tensor& rows) {
  const cpu::ExpandMask expand = cpu::expand_mask(cpu_level(), element_bytes(s.dtype));
  const auto* values = static_cast<const char*>(in.values.const_data_ptr());
  const uint32_t* mask = words_of(in.mask);
  auto* to = static_cast<char*>(rows.mutable_data_ptr());
  const int64_t stored = s.stored(), words = s.words(), bytes = element_bytes(s.dtype), grain = 1 + kTaskNumbers / (1 + s.k);
  torch::stable::parallel_for(0, rows.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      expand(mask + (first + i) * words, values + (first + i) * stored * bytes, stored, s.k, to + i * s.k * bytes);
  });
}

// As many rows of the weight at a time as stay in the cache: memory for all of them would cost more than the product.
Tensor library(const Call& s, const Operands& in) {
  library_calls.count();
  const int64_t element = element_bytes(s.dtype);
  const int64_t most = std::max<int64_t>(kFewestRows, kBlockBytes / std::max<int64_t>(1, s.k * element));
  Tensor weight = empty(s.kind, {std::min(most, s.n), s.k});
  if (weight.size(0) == s.n) {
    expand(s, in, 0, weight);
    return library_linear(in.x, weight, in.bias);
  }
  Tensor y = empty_rows(in.x, s.kind, s.n);
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  for (int64_t first = 0; first < s.n; first += most) {
    const int64_t rows = std::min(most, s.n - first), bytes = rows * element;
    Tensor block = rows == most ? weight : torch::stable::narrow(weight, 0, 0, rows);
    expand(s, in, first, block);
    std::optional<Tensor> bias = in.bias;
    if (bias) bias = torch::stable::narrow(*bias, 0, first, rows);
    const Tensor part = library_linear(in.x, block, bias);
    const auto* from = static_cast<const char*>(part.const_data_ptr());
    for (int64_t row = 0; row < s.m; ++row) std::memcpy(to + row * s.n * element + first * element, from + row * bytes, bytes);
  }
  return y;
}

Tensor sparse24_cpu(const Tensor& x, const Tensor& values, const Tensor& mask, const std::optional<Tensor>& bias,
                    int64_t kept, int64_t group) {
  const Call s = check(x, values, mask, bias, kept, group);
  Problem problem = on_this_cpu({});
  problem.m = s.m, problem.n = s.n, problem.k = s.k, problem.dtype = s.dtype;
  problem.kept = kept, problem.group = group;
  const CpuConfig config = choose_cpu_config(problem);
  Operands in{as_contiguous(x), as_contiguous(values), as_contiguous(mask), std::nullopt};
  if (bias) in.bias = as_contiguous(*bias);
  if (config.path == CpuPath::library) return library(s, in);
  Tensor y = empty_rows(x, s.kind, s.n);
  if (config.path == CpuPath::empty) return y;
  decode_calls.count();
  decode(s, config, in, y);
  return y;
}

}  // namespace

Call check(const Tensor& x, const Tensor& values, const Tensor& mask, const std::optional<Tensor>& bias, int64_t kept,
           int64_t group) {
  STD_TORCH_CHECK(kept >= 1 && kept <= group, "sparse24: must keep a number from 1 to group of each group, found ", kept,
                  ":", group);
  STD_TORCH_CHECK(x.dim() >= 1, "sparse24: x has no dimensions, must be [..., k]");
  STD_TORCH_CHECK(values.dim() == 2 && mask.dim() == 2, "sparse24: values has ", values.dim(), " and mask ", mask.dim(),
                  " dimensions, must be [n, k kept / group] and [n, ceil(k / 32)]");
  const Kind kind = kind_of(x), mask_kind = kind_of(mask);
  const Call s{rows_of(x), values.size(0), x.size(x.dim() - 1), kept, group, kind, dtype_of(kind)};
  STD_TORCH_CHECK(s.k % group == 0, "sparse24: x has ", s.k, " features, must be a multiple of ", group, " for ", kept, ":",
                  group);
  STD_TORCH_CHECK(values.size(1) == s.stored(), "sparse24: values has ", values.size(1), " columns, must have ", s.stored(),
                  ": of the ", s.k, " features of x ", kept, " of every ", group);
  STD_TORCH_CHECK(mask.size(0) == s.n && mask.size(1) == s.words(), "sparse24: mask is [", mask.size(0), ", ",
                  mask.size(1), "], must be [", s.n, ", ", s.words(), "]: a bit for each feature in words of 32");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == s.n), "sparse24: bias must be [", s.n,
                  "], the rows of values");
  STD_TORCH_CHECK(kind_of(values) == kind && (!bias || kind_of(*bias) == kind),
                  "sparse24: x, values and bias must have one dtype (or use autocast) and be on one device");
  STD_TORCH_CHECK(mask_kind.dtype == aoti_torch_dtype_int32() && mask_kind.device_type == kind.device_type &&
                      mask_kind.device_index == kind.device_index,
                  "sparse24: mask must be int32 and on the device of x");
  STD_TORCH_CHECK(s.dtype != Dtype::other, "sparse24: x must be float64, float32, float16 or bfloat16");
  return s;
}

}  // namespace sparse24

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) { m.impl("sparse24", TORCH_BOX(&sparse24::sparse24_cpu)); }
