// The conditions of wavelet's ops, and the way back to their references in Python.
#include <algorithm>
#include <array>

#include "host/op_table.h"
#include "wavelet/wavelet.h"

namespace wavelet {

namespace {

// Of one level and all below it: the numbers of the halves of a size, and of the last one.
struct Halves {
  int64_t sum = 0, last = 0;
};

Halves halves_of(int64_t size, int64_t levels) {
  Halves halves{0, size};
  for (int64_t level = 0; level < levels; ++level) {
    halves.last = (halves.last + 1) / 2;
    halves.sum += halves.last;
  }
  return halves;
}

int64_t most_levels(int64_t size) {
  int64_t levels = 1;
  while (levels < 62 && int64_t{1} << levels < size) ++levels;
  return levels;
}

// Columns of v, or rows of u.
int64_t coefficients(const std::string& subbands, const Halves& halves) {
  if (subbands == "all") return 3 * halves.sum + halves.last;
  if (subbands == "diag") return halves.sum + halves.last;
  return subbands == "LL" ? halves.last : halves.sum;
}

int64_t pairs_of(const std::string& subbands, int64_t levels) {
  return subbands == "LL" ? 1 : subbands == "diag" ? levels + 1 : 3 * levels + 1;
}

template <size_t kCount>
bool is_one_of(const std::string& name, const std::array<const char*, kCount>& names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

constexpr std::array<const char*, 4> kSubbands{"all", "diag", "LL", "shared+gain"};

// One of the ops in Python that have no other kernel than their reference.
template <size_t kResults, class... Arguments>
std::array<Tensor, kResults> call_reference(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, kResults> results;
  for (size_t i = 0; i < kResults; ++i) results[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return results;
}

}  // namespace

Call check(const Options& o, const Tensor& x, const Tensor& v, const std::optional<Tensor>& gain, const Tensor& u) {
  STD_TORCH_CHECK(is_one_of(o.subbands, kSubbands), "wavelet: subbands is '", o.subbands,
                  "', must be one of all, diag, LL, shared+gain");
  STD_TORCH_CHECK(x.dim() >= 1, "wavelet: x has no dimensions, must be [..., k]");
  STD_TORCH_CHECK(o.n >= 0, "wavelet: n is ", o.n, ", must be at least 0");
  const Kind kind = kind_of(x);
  Call s{rows_of(x), o.n, x.size(x.dim() - 1), 0, 0, kind, dtype_of(kind), static_cast<float>(o.scale)};
  const int64_t most = std::min(most_levels(s.k), most_levels(s.n));
  STD_TORCH_CHECK(o.levels >= 1 && o.levels <= most, "wavelet: levels is ", o.levels, ", must be between 1 and ", most,
                  " for ", s.k, " and ", s.n, " features");
  const int64_t columns = coefficients(o.subbands, halves_of(s.k, o.levels));
  const int64_t rows = coefficients(o.subbands, halves_of(s.n, o.levels)), pairs = pairs_of(o.subbands, o.levels);
  STD_TORCH_CHECK(v.dim() == 2 && v.size(1) == columns, "wavelet: v must be [r, ", columns, "] for ", o.subbands, " of ",
                  s.k, " features and ", o.levels, " levels");
  s.r = v.size(0);
  STD_TORCH_CHECK(u.dim() == 2 && u.size(0) == rows && u.size(1) == s.r, "wavelet: u must be [", rows, ", ", s.r, "] for ",
                  o.subbands, " of ", s.n, " features and ", o.levels, " levels, and the rank of v");
  STD_TORCH_CHECK(gain || o.subbands != "shared+gain", "wavelet: gain is missing, must be [", pairs, ", ", s.r, "] for ",
                  o.subbands);
  STD_TORCH_CHECK(!gain || (gain->dim() == 2 && gain->size(0) == pairs && gain->size(1) == s.r), "wavelet: gain must be [",
                  pairs, ", ", s.r, "], a row for each pair of ", o.subbands);
  STD_TORCH_CHECK(kind_of(v) == kind && kind_of(u) == kind && (!gain || kind_of(*gain) == kind),
                  "wavelet: x, v, gain and u must have one dtype (or use autocast) and be on one device");
  STD_TORCH_CHECK(s.dtype != Dtype::other, "wavelet: x must be float64, float32, float16 or bfloat16");
  const bool is_haar = o.filter == "haar" && o.levels == 1 && o.subbands != "shared+gain";
  if (is_haar && s.k > 0 && s.n > 0 && s.r > 0) s.pairs = pairs;
  return s;
}

Call check(const Options& o, const Tensor& dy, const Tensor& x, const std::optional<Tensor>& h, const Tensor& v,
           const std::optional<Tensor>& gain, const Tensor& u) {
  const Call s = check(o, x, v, gain, u);
  const auto x_sizes = x.sizes(), dy_sizes = dy.sizes();
  const bool is_like_y = dy.dim() == x.dim() && std::equal(x_sizes.begin(), x_sizes.end() - 1, dy_sizes.begin()) &&
                         dy.size(dy.dim() - 1) == s.n;
  STD_TORCH_CHECK(is_like_y, "wavelet: dy must be [..., ", s.n, "] with the leading sizes of x");
  const int64_t pairs = pairs_of(o.subbands, o.levels);
  STD_TORCH_CHECK(!h || (h->dim() == 3 && h->size(0) == pairs && h->size(1) == s.m && h->size(2) == s.r),
                  "wavelet: h must be [", pairs, ", ", s.m, ", ", s.r, "]");
  STD_TORCH_CHECK(kind_of(dy) == s.kind && (!h || kind_of(*h) == s.kind),
                  "wavelet: dy and h must have one dtype with x (or use autocast) and be on its device");
  return s;
}

std::tuple<Tensor, Tensor> by_reference(const Options& o, const Tensor& x, const Tensor& v,
                                        const std::optional<Tensor>& gain, const Tensor& u) {
  auto [y, h] = call_reference<2>("lowfat::wavelet_training_reference", x, v, gain, u, o.filter, o.levels, o.subbands, o.n,
                                  o.scale);
  return {std::move(y), std::move(h)};
}

Gradients backward_by_reference(const Options& o, const Tensor& dy, const Tensor& x, const std::optional<Tensor>& h,
                                const Tensor& v, const std::optional<Tensor>& gain, const Tensor& u, int64_t needs) {
  auto [dx, dv, dgain, du] = call_reference<4>("lowfat::wavelet_backward_reference", dy, x, h, v, gain, u, needs, o.filter,
                                               o.levels, o.subbands, o.n, o.scale);
  return {std::move(dx), std::move(dv), std::move(dgain), std::move(du)};
}

}  // namespace wavelet
