// Host side of sparse24: checks, and on a CPU choice of configuration, calls, registration.
//   x [..., k]   values [n, k kept / group]   mask [n, ceil(k / 32)]   bias [n]   y [..., n]
#include "cpu/expand.h"
#include "cpu/lines.h"
#include "cpu/product.h"
#include "host/call_counter.h"
#include "sparse24/forward.h"
#include "sparse24/sparse24_cpu.h"

namespace sparse24 {

namespace {

CallCounter decode_calls("sparse24", "cpu", "decode"), library_calls("sparse24", "cpu", "library");

constexpr int64_t kTaskNumbers = 1 << 16;  // written by a thread, at least

// Contiguous: the same bits for every layout of the same values, on whichever path.
struct Operands {
  Tensor x, values, mask;
  std::optional<Tensor> bias;
};

void decode(const Call& s, const CpuConfig& config, const Operands& in, Tensor& y) {
  const cpu::Kernel kernel = cpu::masked_kernel(cpu_level(), s.dtype, s.m);
  cpu::Product product{in.x.const_data_ptr(), in.values.const_data_ptr(), in.bias ? in.bias->const_data_ptr() : nullptr,
                       y.mutable_data_ptr(), s.m, s.k, s.n, s.k, s.n, nullptr};
  product.mask = words_of(in.mask), product.kept = s.stored();
  const cpu::Lines prepared = cpu::new_lines(kernel.prepared_bytes(s.m, s.k));
  kernel.prepare(product, prepared.get());
  product.x = prepared.get();
  const int64_t tiles = (s.n + kernel.row_tile - 1) / kernel.row_tile;
  if (config.grain == 0) return kernel.multiply(product, 0, tiles);
  torch::stable::parallel_for(0, tiles, config.grain,
                              [&](int64_t first, int64_t last) { kernel.multiply(product, first, last); });
}

// T: unsigned, of an element's size.
template <class T>
Tensor dense(const Call& s, const Operands& in) {
  Tensor weight = empty(s.kind, {s.n, s.k});
  const auto* values = static_cast<const T*>(in.values.const_data_ptr());
  const uint32_t* mask = words_of(in.mask);
  auto* to = static_cast<T*>(weight.mutable_data_ptr());
  const int64_t stored = s.stored(), words = s.words(), grain = 1 + kTaskNumbers / (1 + s.k);
  torch::stable::parallel_for(0, s.n, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      cpu::expand_mask(mask + row * words, values + row * stored, stored, s.k, to + row * s.k);
  });
  return weight;
}

Tensor library(const Call& s, const Operands& in) {
  library_calls.count();
  const Tensor weight = s.dtype == Dtype::float64   ? dense<uint64_t>(s, in)
                        : s.dtype == Dtype::float32 ? dense<uint32_t>(s, in)
                                                    : dense<uint16_t>(s, in);
  return library_linear(in.x, weight, in.bias);
}

Tensor sparse24_cpu(const Tensor& x, const Tensor& values, const Tensor& mask, const std::optional<Tensor>& bias,
                    int64_t kept, int64_t group) {
  const Call s = check(x, values, mask, bias, kept, group);
  Problem problem;
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
