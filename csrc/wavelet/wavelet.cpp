// Host side of wavelet on a CPU: choice of path, calls, registration. (Gradients: backward.cpp. A GPU's: wavelet_cuda.cpp.)
//   x [..., k]   v [r, pairs width]   gain [pairs, r]   u [pairs height, r]   h [pairs, m, r]   y [..., n]
//
// Haar with one level takes one of three ways. Few rows are transformed as they are, in no time, and decode kernels read the
// factors once. Of many rows, with a small rank, a pass over x and y would take longer than the products: the transform
// is folded into the factors, and the library multiplies by these. That is twice the arithmetic: with a larger rank it
// multiplies halves of x, and y is joined from its own.
#include <algorithm>
#include <tuple>

#include "cpu/config.h"
#include "cpu/run.h"
#include "host/call_counter.h"
#include "wavelet/folded.h"
#include "wavelet/wavelet_cpu.h"

namespace wavelet {
namespace {

CallCounter decode_calls("wavelet", "cpu", "decode"), folded_calls("wavelet", "cpu", "folded"),
    halves_calls("wavelet", "cpu", "halves"), reference_calls("wavelet", "cpu", "reference");

struct Result {
  Tensor y, h;  // h empty where it was not asked for
};

// --- few rows ---

// Whole factors: threads from a megabyte on.
void multiply(Dtype dtype, const cpu::Product& product) {
  const cpu::Kernel kernel = cpu::kernel(cpu_level(), dtype, product.m);
  const int64_t row_bytes = product.depth * element_bytes(dtype);
  const bool is_threaded = product.rows * row_bytes >= cpu::kThreadedBytes;
  cpu::multiply(kernel, product, is_threaded ? cpu::grain_of(kernel.row_tile * row_bytes) : 0);
}

// Both halves of a row are rows, and v's columns of each pair rows of their own: one product has all of the middle, of two
// pairs beside what is not wanted.
template <class E>
void decode(const Call& s, const Arguments& in, const Tensor& h, const Tensor& y) {
  const int64_t rows = s.m * s.pairs, width = s.width(), height = s.height();
  const auto workspace = [](int64_t count) { return cpu::new_lines(count * static_cast<int64_t>(sizeof(E))); };
  const cpu::Lines halves = workspace(rows * width), products = workspace(rows * s.r * s.pairs),
                   outputs = workspace(rows * height);
  auto* b = static_cast<E*>(halves.get());
  const E* x = data_of<E>(in.x);
  for (int64_t row = 0; row < s.m; ++row) {
    E* low = b + row * s.pairs * width;
    split_row(x + row * s.k, s.k, kRootHalf, low, s.pairs == 2 ? low + width : nullptr);
  }
  auto* found = static_cast<E*>(products.get());
  const int64_t columns = s.r * s.pairs;
  multiply(s.dtype, {b, in.v.const_data_ptr(), nullptr, found, rows, width, columns, width, columns,
                     in.u.const_data_ptr()});
  auto* middle = static_cast<E*>(h.mutable_data_ptr());
  for (int64_t pair = 0; pair < s.pairs; ++pair) {
    for (int64_t row = 0; row < s.m; ++row) {
      const E* from = found + (row * s.pairs + pair) * columns + pair;
      for (int64_t j = 0; j < s.r; ++j) middle[(pair * s.m + row) * s.r + j] = from[j * s.pairs];
    }
  }
  const Tensor weighed = in.gain ? weigh<E>(s, h, *in.gain) : h;
  auto* c = static_cast<E*>(outputs.get());
  for (int64_t pair = 0; pair < s.pairs; ++pair) {
    multiply(s.dtype, {data_of<E>(weighed, pair * s.m * s.r), data_of<E>(in.u, pair * height * s.r), nullptr,
                       c + pair * s.m * height, s.m, s.r, height, s.r, height, nullptr});
  }
  auto* to = static_cast<E*>(y.mutable_data_ptr());
  for (int64_t row = 0; row < s.m; ++row) {
    join_row(c + row * height, s.pairs == 2 ? c + (s.m + row) * height : nullptr, s.n, s.scale * kRootHalf, to + row * s.n);
  }
}

// --- many rows ---

template <class E>
Result folded(const Call& s, const Arguments& in, bool keep_h) {
  Tensor beside = multiply_features<E>(in.x, fold_v<E>(s, in.v));
  Result result{Tensor(), keep_h ? apart<E>(s, beside) : empty(s.kind, {0})};
  if (in.gain) weigh_beside<E>(s, beside, *in.gain);
  result.y = library_linear(beside, fold_u<E>(s, in.u));
  return result;
}

// Each pair goes from a half to the same of the outputs.
template <class E>
Result by_halves(const Call& s, const Arguments& in) {
  const Tensor b = halves_of<E>(s, in.x, s.k, kRootHalf), h = empty(s.kind, {s.pairs, s.m, s.r});
  for (int64_t pair = 0; pair < s.pairs; ++pair) {
    const Tensor middle = library_linear(one_of(b, pair), columns_of(s, in.v, pair));
    std::copy_n(data_of<E>(middle), s.m * s.r, data_to<E>(h) + pair * s.m * s.r);
  }
  const Tensor weighed = in.gain ? weigh<E>(s, h, *in.gain) : h;
  std::vector<Tensor> c;
  for (int64_t pair = 0; pair < s.pairs; ++pair)
    c.push_back(library_linear(one_of(weighed, pair), rows_of_pair(s, in.u, pair)));
  return {joined<E>(s, c[0], s.pairs == 2 ? &c[1] : nullptr, s.n, s.scale * kRootHalf), h};
}

// --- the op ---

template <class E>
Result computed(const Call& s, CpuPath path, const Arguments& in, const Tensor& x, bool keep_h) {
  if (path == CpuPath::folded || path == CpuPath::halves) {
    (path == CpuPath::folded ? folded_calls : halves_calls).count();
    Result result = path == CpuPath::folded ? folded<E>(s, in, keep_h) : by_halves<E>(s, in);
    result.y = shaped_like(result.y, x);
    return result;
  }
  decode_calls.count();
  Result result{empty_rows(x, s.kind, s.n), empty(s.kind, {s.pairs, s.m, s.r})};
  decode<E>(s, in, result.h, result.y);
  return result;
}

Result forward_cpu(const Options& options, const Tensor& x, const Tensor& v, const std::optional<Tensor>& gain,
                   const Tensor& u, bool keep_h) {
  const Call s = check(options, x, v, gain, u);
  const CpuPath path = choose_cpu_path(problem_of(s));
  if (path == CpuPath::empty || path == CpuPath::reference) {
    if (path == CpuPath::reference) reference_calls.count();
    auto [y, h] = by_reference(options, x, v, gain, u);
    return {std::move(y), std::move(h)};
  }
  const Arguments in(s, x, v, gain, u);
  return s.dtype == Dtype::float32 ? computed<float>(s, path, in, x, keep_h) : computed<uint16_t>(s, path, in, x, keep_h);
}

Tensor wavelet_cpu(const Tensor& x, const Tensor& v, const std::optional<Tensor>& gain, const Tensor& u,
                   const std::string& filter, int64_t levels, const std::string& subbands, int64_t n, double scale) {
  return forward_cpu({filter, levels, subbands, n, scale}, x, v, gain, u, false).y;
}

std::tuple<Tensor, Tensor> wavelet_training_cpu(const Tensor& x, const Tensor& v, const std::optional<Tensor>& gain,
                                                const Tensor& u, const std::string& filter, int64_t levels,
                                                const std::string& subbands, int64_t n, double scale) {
  Result result = forward_cpu({filter, levels, subbands, n, scale}, x, v, gain, u, true);
  return {std::move(result.y), std::move(result.h)};
}

}  // namespace
}  // namespace wavelet

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) {
  m.impl("wavelet", TORCH_BOX(&wavelet::wavelet_cpu));
  m.impl("wavelet_training", TORCH_BOX(&wavelet::wavelet_training_cpu));
}
