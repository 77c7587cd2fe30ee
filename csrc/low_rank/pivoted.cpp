// Host side of low_rank_pivoted: h = x v^T at the pivots, h c^T elsewhere.   x [..., k]  v [r, k]  c [n - r, r]  y [..., n]
#include <algorithm>
#include <optional>
#include <vector>

#include "host/call_counter.h"
#include "host/tensor.h"
#include "low_rank/forward.h"
#ifdef LOWFAT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "host/cuda_launch.h"
#include "host/cuda_stream.h"
#include "low_rank/pivoted.h"
#endif

namespace low_rank {

namespace {

using torch::headeronly::ScalarType;

CallCounter decode_calls("low_rank_pivoted", "cpu", "decode"), library_calls("low_rank_pivoted", "cpu", "library");
#ifdef LOWFAT_CUDA
CallCounter cuda_decode_calls("low_rank_pivoted", "cuda", "decode"),
    cuda_library_calls("low_rank_pivoted", "cuda", "library");
#endif

constexpr Who kWho{"low_rank_pivoted", -1, "c"};
constexpr int64_t kTaskNumbers = 1 << 16;  // moved by a thread, at least

// The conditions that the Python function checks with a named error, for callers of torch.ops. n is that of y.
Sizes check(const Tensor& x, const Tensor& v, const Tensor& c, const Tensor& pivots, const std::optional<Tensor>& bias) {
  Sizes s = check(kWho, x, v, c, std::nullopt);
  s.n += s.r;
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == s.n), kWho.op, ": bias must be [", s.n,
                  "], the rows of v and of c");
  STD_TORCH_CHECK(!bias || kind_of(*bias) == s.kind, kWho.op, ": bias must have the dtype and device of x");
  Kind of_pivots = s.kind;
  of_pivots.dtype = aoti_torch_dtype_int64();
  STD_TORCH_CHECK(pivots.dim() == 1 && pivots.size(0) == s.r, kWho.op, ": pivots must be [", s.r, "], the rows of v");
  STD_TORCH_CHECK(kind_of(pivots) == of_pivots, kWho.op, ": pivots must be int64 and on the device of x");
  return s;
}

// Which column of [h, h c^T] each column of y is. The pivots are not trusted: one of them that is out of range is no column,
// and a place for which too few columns are left has the last.
std::vector<int64_t> sources(const int64_t* pivots, int64_t r, int64_t n) {
  std::vector<int64_t> source(static_cast<size_t>(n), -1);
  for (int64_t i = 0; i < r; ++i) {
    if (static_cast<uint64_t>(pivots[i]) < static_cast<uint64_t>(n)) source[static_cast<size_t>(pivots[i])] = i;
  }
  int64_t next = r;
  for (int64_t& one : source) {
    if (one < 0) one = std::min(next++, n - 1);
  }
  return source;
}

// T: unsigned, of an element's size. Numbers are moved, not looked at.
template <class T>
struct Columns {
  const T *h, *rest;  // [m, r], [m, n - r]
  T* y;               // [m, n]
  int64_t r;

  void gather(const std::vector<int64_t>& source, int64_t m) const {
    const int64_t n = static_cast<int64_t>(source.size());
    torch::stable::parallel_for(0, m, 1 + kTaskNumbers / (1 + n), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const T *of_h = h + row * r, *of_rest = rest + row * (n - r);
        T* to = y + row * n;
        for (const int64_t one : source) *to++ = one < r ? of_h[one] : of_rest[one - r];
      }
    });
  }
};

// The other way: bias [n] to the columns of h and of the rest. What no column of y comes from is neither written nor read.
template <class T>
void split(const T* bias, const std::vector<int64_t>& source, int64_t r, T* of_h, T* of_rest) {
  for (const int64_t one : source) (one < r ? of_h[one] : of_rest[one - r]) = *bias++;
}

template <class T>
Tensor pivoted_cpu(const Sizes& s, const Tensor& x, const Tensor& v, const Tensor& c, const Tensor& pivots,
                   const std::optional<Tensor>& bias) {
  const Tensor order = as_contiguous(pivots);
  const std::vector<int64_t> source = sources(static_cast<const int64_t*>(order.const_data_ptr()), s.r, s.n);
  std::optional<Tensor> h_bias, rest_bias;
  if (bias) {
    const Tensor whole = as_contiguous(*bias);
    h_bias = empty(s.kind, {s.r}), rest_bias = empty(s.kind, {s.n - s.r});
    split(static_cast<const T*>(whole.const_data_ptr()), source, s.r, static_cast<T*>(h_bias->mutable_data_ptr()),
          static_cast<T*>(rest_bias->mutable_data_ptr()));
  }
  Result product = forward_cpu(kWho, x, v, c, rest_bias, true);
  Tensor& h = *product.h;
  if (bias) h = add(h, *h_bias);
  Tensor y = empty_rows(h, s.kind, s.n);
  const Columns<T> columns{static_cast<const T*>(h.const_data_ptr()), static_cast<const T*>(product.y.const_data_ptr()),
                           static_cast<T*>(y.mutable_data_ptr()), s.r};
  columns.gather(source, s.m);
  return y;
}

Tensor joined(const Tensor& a, const Tensor& b) {
  return call_torch("aten::cat", "", std::vector<Tensor>{a, b}, int64_t{-1});
}

// sources() by torch's operators, on any device and without waiting for it. The stable ABI cannot pass a number to a sum.
Tensor sources_there(const Tensor& pivots, int64_t r, int64_t n) {
  const Kind kind = kind_of(pivots);
  const auto numbers = [&](int64_t count, int64_t value) {
    Tensor filled = empty(kind, {count});
    return torch::stable::fill_(filled, static_cast<double>(value));
  };
  const auto running = [&](int64_t first, const Tensor& steps) {  // first + steps[0], + steps[1], ...
    const Tensor all = joined(numbers(1, first), steps);
    Tensor sums = call_torch("aten::cumsum", "", all, int64_t{0}, std::optional<ScalarType>());
    return torch::stable::narrow(sums, 0, 1, n);
  };
  const Tensor columns = running(-1, numbers(n, 1));
  const auto pivots_before = [&](bool or_at) {
    return call_torch("aten::searchsorted", "Tensor", pivots, columns, false, or_at, std::optional<std::string>(),
                      std::optional<Tensor>());
  };
  const Tensor before = pivots_before(false), or_at = pivots_before(true);
  const Tensor of_rest = running(r - 1, call_torch("aten::le", "Tensor", or_at, before));
  const Tensor any = call_torch("aten::where", "self", call_torch("aten::gt", "Tensor", or_at, before), before, of_rest);
  return call_torch("aten::minimum", "", any, numbers(n, n - 1));
}

Tensor gathered(const Sizes& s, const Result& product, const Tensor& pivots, const std::optional<Tensor>& bias) {
  const Tensor source = sources_there(as_contiguous(pivots), s.r, s.n);
  const Tensor y = call_torch("aten::index_select", "", joined(*product.h, product.y), int64_t{-1}, source);
  return bias ? add(y, *bias) : y;
}

Tensor low_rank_pivoted_cpu(const Tensor& x, const Tensor& v, const Tensor& c, const Tensor& pivots,
                            const std::optional<Tensor>& bias) {
  const Sizes s = check(x, v, c, pivots, bias);
  const Config config = choose_config(on_this_cpu({s.m, s.n - s.r, s.k, s.r, s.dtype}));
  if (config.path != Path::decode) {
    library_calls.count();
    return gathered(s, forward_cpu(kWho, x, v, c, std::nullopt, true), pivots, bias);
  }
  decode_calls.count();
  return s.dtype == Dtype::float32 ? pivoted_cpu<uint32_t>(s, x, v, c, pivots, bias)
                                   : pivoted_cpu<uint16_t>(s, x, v, c, pivots, bias);
}

#ifdef LOWFAT_CUDA

// One launch; nothing where the kernels do not take this call.
std::optional<Tensor> decode_cuda(const Sizes& s, const Tensor& x_any, const Tensor& v_any, const Tensor& c_any,
                                  const Tensor& pivots_any, const std::optional<Tensor>& bias_any) {
  const Tensor x = as_contiguous(x_any), v = as_contiguous(v_any), c = as_contiguous(c_any);
  const Tensor pivots = as_contiguous(pivots_any);
  const std::optional<Tensor> bias = bias_any ? std::optional<Tensor>(as_contiguous(*bias_any)) : std::nullopt;
  const int device = s.kind.device_index;
  const Gpu gpu = gpu_of(device);
  const bool aligned = is_aligned(x) && is_aligned(v) && is_aligned(c) && is_aligned(pivots);
  const DecodePlan plan = choose_pivoted(on_gpu({s.m, s.n, s.k, s.r, s.dtype}, gpu, aligned));
  if (plan.token_tiles == 0) return std::nullopt;
  void* stream = current_cuda_stream(device);
  uint64_t* counter = barrier_counter(kWho.op, device, stream, plan.grid, gpu.arch);
  if (!counter) return std::nullopt;

  cuda_decode_calls.count();
  const Tensor partials = floats(s.kind, plan.splits * s.m * s.r), y = empty_rows(x, s.kind, s.n);
  PivotedParams p{};
  p.x = elements(x), p.v = elements(v), p.c = elements(c), p.bias = bias ? elements(*bias) : nullptr;
  p.pivots = static_cast<const int64_t*>(pivots.const_data_ptr());
  p.partials = float_data(partials);
  p.y = static_cast<uint16_t*>(y.mutable_data_ptr());
  p.counter = counter;
  p.m = static_cast<int>(s.m), p.n = static_cast<int>(s.n), p.k = static_cast<int>(s.k), p.r = static_cast<int>(s.r);
  check_launch(kWho.op, launch_pivoted(plan, p, s.dtype, stream), gpu.arch);
  return y;
}

Tensor low_rank_pivoted_cuda(const Tensor& x, const Tensor& v, const Tensor& c, const Tensor& pivots,
                             const std::optional<Tensor>& bias) {
  const Sizes s = check(x, v, c, pivots, bias);
  const torch::stable::accelerator::DeviceGuard guard(s.kind.device_index);
  if (std::optional<Tensor> y = decode_cuda(s, x, v, c, pivots, bias)) return *y;
  cuda_library_calls.count();
  return gathered(s, forward_cuda(kWho, x, v, c, std::nullopt, true), pivots, bias);
}

#endif

}  // namespace
}  // namespace low_rank

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) { m.impl("low_rank_pivoted", TORCH_BOX(&low_rank::low_rank_pivoted_cpu)); }

#ifdef LOWFAT_CUDA
STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) { m.impl("low_rank_pivoted", TORCH_BOX(&low_rank::low_rank_pivoted_cuda)); }
#endif
