// Host side of low_rank_sparse: checks, and on a CPU choice of configuration, calls, registration.
//   x [..., k]   v [r, k]   u [n, r]   values [nnz]   starts [n + 1]   columns [nnz]   bias [n]   h [m, r]   y [..., n]
#include <algorithm>
#include <string>
#include <tuple>

#include "cpu/config.h"
#include "cpu/run.h"
#include "host/call_counter.h"
#include "low_rank/forward.h"
#include "low_rank_sparse/low_rank_sparse_cpu_products.h"

namespace low_rank_sparse {

namespace {

CallCounter decode_calls("low_rank_sparse", "cpu", "decode"), split_calls("low_rank_sparse", "cpu", "split"),
    materialize_calls("low_rank_sparse", "cpu", "materialize"), library_calls("low_rank_sparse", "cpu", "library");

constexpr int64_t kSliceRows = 128;  // of u and S, whose sums wait in L1: 8 KB

// Contiguous, x as rows: the same bits for every layout of the same values, on whichever path.
struct Operands {
  Tensor x, v, u, values, starts, columns;
  std::optional<Tensor> bias;

  Operands(const Call& s, const Tensor& x_any, const Tensor& v_any, const Tensor& u_any, const Tensor& values_any,
           const Tensor& starts_any, const Tensor& columns_any, const std::optional<Tensor>& bias_any)
      : x(shaped(as_contiguous(x_any), {s.m, s.k})), v(as_contiguous(v_any)), u(as_contiguous(u_any)),
        values(as_contiguous(values_any)), starts(as_contiguous(starts_any)), columns(as_contiguous(columns_any)) {
    if (bias_any) bias = as_contiguous(*bias_any);
  }
};

struct Result {
  Tensor y;                 // [m, n]
  std::optional<Tensor> h;  // [m, r], where it was asked for
};

// --- decode: v, then u and S beside each other, go by once ---

template <class T>
void decode(const Call& s, const CpuConfig& config, const Operands& in, double scale, T* h, T* y) {
  const cpu::Kernel kernel = cpu::kernel(cpu_level(), s.dtype, s.m);
  cpu::Product first{in.x.const_data_ptr(), in.v.const_data_ptr(), nullptr, h, s.m, s.k, s.r, s.k, s.r,
                     in.u.const_data_ptr()};
  first.scale = static_cast<float>(scale);
  cpu::multiply(kernel, first, config.first_grain);

  const GatherKernel gather = kernels_of(cpu_level()).gather(s.dtype, s.is_narrow, s.m);
  const Numbers<int32_t> bounds = bounds_of(s, in.starts);
  const Gather entries{in.values.const_data_ptr(), in.columns.const_data_ptr(), bounds.get(), s.k};
  const bool is_sparse = bounds[s.n] > 0;
  const Numbers<float> inputs(is_sparse ? s.k * gather.tokens : 0);
  if (is_sparse) gather.pack(in.x.const_data_ptr(), s.k, s.m, s.k, inputs.get());

  const cpu::Product second{h, in.u.const_data_ptr(), nullptr, y, s.m, s.r, s.n, s.r, s.n, nullptr};
  const cpu::Prepared middle(kernel, second);
  const auto task = [&](int64_t begin, int64_t end) {
    alignas(64) float sums[kSliceRows * cpu::kMostTokens];
    const int64_t last = std::min(s.n, end * kernel.row_tile);
    for (int64_t row = begin * kernel.row_tile; row < last; row += kSliceRows) {
      const int64_t rows = std::min(kSliceRows, last - row);
      cpu::Product slice = second;
      slice.x = middle.x(), slice.rows = rows, slice.y = y + row;
      slice.w = data_of<T>(in.u) + row * s.r, slice.then = data_of<T>(in.u) + (row + rows) * s.r;
      if (in.bias) slice.bias = data_of<T>(*in.bias) + row;
      if (is_sparse) {
        gather.sum(entries, inputs.get(), s.m, row, row + rows, sums);
        slice.added = sums;
      }
      kernel.multiply(slice, 0, cpu::parts_of(rows, kernel.row_tile));
    }
  };
  const int64_t tiles = cpu::parts_of(s.n, kernel.row_tile);
  if (config.second_grain == 0) return task(0, tiles);
  torch::stable::parallel_for(0, tiles, config.second_grain, task);
}

Result decode(const Call& s, const CpuConfig& config, const Operands& in, double scale, bool keep_h) {
  decode_calls.count();
  Result result{empty(s.kind, {s.m, s.n}), std::nullopt};
  if (keep_h) result.h = empty(s.kind, {s.m, s.r});
  const Numbers<float> inside(keep_h ? 0 : s.m * s.r);
  void* h = keep_h ? result.h->mutable_data_ptr() : inside.get();
  if (s.dtype == Dtype::float32)
    decode(s, config, in, scale, static_cast<uint32_t*>(h), data_to<uint32_t>(result.y));
  else
    decode(s, config, in, scale, static_cast<uint16_t*>(h), data_to<uint16_t>(result.y));
  return result;
}

// --- many tokens: dense products by the library ---

std::optional<Tensor> wide_bias(const Call& s, const Operands& in) {
  return in.bias ? std::optional<Tensor>(wide(*in.bias, s)) : std::nullopt;
}

Result split(const Call& s, const Operands& in, double scale) {
  split_calls.count();
  const Tensor x = wide(in.x, s);
  Tensor h = rounded(scaled_product(s, x, wide(in.v, s), scale), s);
  const Tensor y = library_linear(wide(h, s), wide(in.u, s), wide_bias(s, in));
  add_sparse_product(read_support(s, in.values, in.starts, in.columns), s.m, data_of<float>(x), data_to<float>(y));
  return {rounded(y, s), std::move(h)};
}

// h is of no use to y here.
Result materialize(const Call& s, const Operands& in, double scale, bool keep_h) {
  materialize_calls.count();
  const Tensor x = wide(in.x, s), v = wide(in.v, s);
  const Tensor weight = scaled_product(s, wide(in.u, s), torch::stable::transpose(v, 0, 1), scale);
  add_entries(s, wide(in.values, s), in.starts, in.columns, weight);
  Result result{rounded(library_linear(x, weight, wide_bias(s, in)), s), std::nullopt};
  if (keep_h) result.h = rounded(scaled_product(s, x, v, scale), s);
  return result;
}

// As the reference: fp64.
Result library(const Call& s, const Operands& in, double scale) {
  library_calls.count();
  Tensor h = scaled_product(s, in.x, in.v, scale);
  const Tensor sparse = zeros(s.kind, {s.n, s.k});
  add_entries(s, in.values, in.starts, in.columns, sparse);
  return {add(library_linear(h, in.u, in.bias), library_linear(in.x, sparse)), std::move(h)};
}

// --- the op ---

Result forward_cpu(const Tensor& x, const Tensor& v, const Tensor& u, const Tensor& values, const Tensor& starts,
                   const Tensor& columns, const std::optional<Tensor>& bias, double scale, bool keep_h) {
  const Call s = check(x, v, u, values, starts, columns, bias);
  Problem problem = on_this_cpu({s.m, s.n, s.k, s.r, s.dtype});
  problem.entries = s.nnz;
  const CpuConfig config = choose_cpu_config(problem);
  if (config.path == CpuPath::empty) return {empty_rows(x, s.kind, s.n), empty(s.kind, {0, s.r})};

  const Operands in(s, x, v, u, values, starts, columns, bias);
  Result result;
  switch (config.path) {
    case CpuPath::decode: result = decode(s, config, in, scale, keep_h); break;
    case CpuPath::split: result = split(s, in, scale); break;
    case CpuPath::materialize: result = materialize(s, in, scale, keep_h); break;
    default: result = library(s, in, scale);
  }
  result.y = shaped_like(result.y, x);
  return result;
}

Tensor low_rank_sparse_cpu(const Tensor& x, const Tensor& v, const Tensor& u, const Tensor& values, const Tensor& starts,
                           const Tensor& columns, const std::optional<Tensor>& bias, double scale) {
  return forward_cpu(x, v, u, values, starts, columns, bias, scale, false).y;
}

std::tuple<Tensor, Tensor> low_rank_sparse_training_cpu(const Tensor& x, const Tensor& v, const Tensor& u,
                                                        const Tensor& values, const Tensor& starts, const Tensor& columns,
                                                        const std::optional<Tensor>& bias, double scale) {
  Result result = forward_cpu(x, v, u, values, starts, columns, bias, scale, true);
  return {std::move(result.y), std::move(*result.h)};
}

template <class Sizes>
std::string in_words(const Sizes& sizes) {
  std::string words;
  for (const int64_t size : sizes) words += (words.empty() ? "" : ", ") + std::to_string(size);
  return "[" + words + "]";
}

void check_index(const char* name, const Tensor& index, int64_t count, int32_t dtype, const char* dtype_name,
                 const Kind& of_x) {
  STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == count, "low_rank_sparse: ", name, " must be [", count, "]");
  const Kind kind = kind_of(index);
  STD_TORCH_CHECK(kind.dtype == dtype && kind.device_type == of_x.device_type && kind.device_index == of_x.device_index,
                  "low_rank_sparse: ", name, " must be ", dtype_name, " and on the device of x");
}

}  // namespace

Call check(const Tensor& x, const Tensor& v, const Tensor& u, const Tensor& values, const Tensor& starts,
           const Tensor& columns, const std::optional<Tensor>& bias) {
  const low_rank::Sizes sizes = low_rank::check({"low_rank_sparse"}, x, v, u, bias);
  STD_TORCH_CHECK(values.dim() == 1, "low_rank_sparse: values has ", values.dim(), " dimensions, must be [nnz]");
  constexpr int64_t kMostEntries = INT32_MAX, kNarrowInputs = INT16_MAX + 1;
  const Call s{sizes.m, sizes.n, sizes.k, sizes.r, values.size(0), sizes.k <= kNarrowInputs, sizes.kind, sizes.dtype};
  const bool is_small = s.k == 0 || s.n <= kMostEntries / s.k;
  const int64_t most = is_small ? s.n * s.k : kMostEntries;
  STD_TORCH_CHECK(s.nnz <= most, "low_rank_sparse: values has ", s.nnz, " entries, must have at most ", most, ", for ", s.k,
                  " to ", s.n, " features");
  STD_TORCH_CHECK(kind_of(values) == s.kind,
                  "low_rank_sparse: values must have one dtype with x (or use autocast) and be on its device");
  check_index("starts", starts, s.n + 1, aoti_torch_dtype_int32(), "int32", s.kind);
  check_index("columns", columns, s.nnz, s.is_narrow ? aoti_torch_dtype_int16() : aoti_torch_dtype_int32(),
              s.is_narrow ? "int16, up to 32768 features," : "int32, above 32768 features,", s.kind);
  return s;
}

Call check_backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& h, const Tensor& v, const Tensor& u,
                    const Tensor& values, const Tensor& starts, const Tensor& columns) {
  const Call s = check(x, v, u, values, starts, columns, std::nullopt);
  STD_TORCH_CHECK(low_rank::has_rows_of(dy, x, s.n), "low_rank_sparse: dy ", in_words(dy.sizes()), " must be ",
                  in_words(sizes_like(x, s.n)));
  STD_TORCH_CHECK(!h || (h->dim() == 2 && h->size(0) == s.m && h->size(1) == s.r), "low_rank_sparse: h ",
                  in_words(h->sizes()), " must be ", in_words(Dimensions{s.m, s.r}));
  STD_TORCH_CHECK(kind_of(dy) == s.kind && (!h || kind_of(*h) == s.kind),
                  "low_rank_sparse: dy and h must have one dtype with x (or use autocast) and be on its device");
  return s;
}

}  // namespace low_rank_sparse

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) {
  m.impl("low_rank_sparse", TORCH_BOX(&low_rank_sparse::low_rank_sparse_cpu));
  m.impl("low_rank_sparse_training", TORCH_BOX(&low_rank_sparse::low_rank_sparse_training_cpu));
}
