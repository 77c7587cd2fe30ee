// Host side of monarch: checks, and on a CPU choice of configuration, calls, registration. (A GPU's: monarch_cuda.cpp.)
//   x [..., k]   v [b_in, b_out r, p]   u [b_out, s, b_in r]   bias [n]   h [b_out, m, b_in r]   y [..., n]
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/lines.h"
#include "cpu/product.h"
#include "host/call_counter.h"
#include "host/tensor.h"
#include "monarch/forward.h"
#include "monarch/monarch_cpu.h"
#include "monarch/transpose.h"

namespace monarch {

namespace {

CallCounter decode_calls("monarch", "cpu", "decode"), library_calls("monarch", "cpu", "library");

constexpr int64_t kTaskNumbers = 1 << 16;  // moved by a thread, at least

// T: unsigned, of an element's size. The kernels know the dtype; here numbers are moved, not looked at.
template <class T>
struct Operands {
  const T* x;     // [m, k]
  const T* v;     // [b_in, b_out r, p]
  const T* u;     // [b_out, s, b_in r]
  const T* bias;  // [n] or null
  T* h;           // [b_out, m, b_in r]
  T* y;           // [m, n]
};

template <class T>
T* elements_of(const cpu::Lines& lines) {
  return static_cast<T*>(lines.get());
}

template <class T>
cpu::Lines new_elements(int64_t count) {
  return cpu::new_lines(count * static_cast<int64_t>(sizeof(T)));
}

// to [m, p]: block i of x, and zeros where there is no more of x.
template <class T>
void pad_block(const Call& s, const T* x, int64_t i, T* to) {
  const int64_t first = std::min(s.k, i * s.p), count = std::min(s.k - first, s.p);
  for (int64_t token = 0; token < s.m; ++token, to += s.p)
    std::fill(std::copy_n(x + token * s.k + first, count, to), to + s.p, T{0});
}

// to [s]: what is added to output block o, and zeros where n ends.
template <class T>
void gather_bias(const Call& s, const T* bias, int64_t o, T* to) {
  const int64_t step = s.interleave ? s.b_out : 1;
  for (int64_t row = 0, at = s.interleave ? o : o * s.s; row < s.s; ++row, at += step) to[row] = at < s.n ? bias[at] : T{0};
}

// Products of input blocks to their places in h.
Move first_move(const Call& s, int64_t blocks, int64_t from_block) {
  return {blocks, s.m, s.r, s.b_out, from_block, s.t(), s.m * s.t(), blocks * s.r};
}

// Products of the output blocks from o on to y, in turn.
Move second_move(const Call& s, int64_t blocks, int64_t o, int64_t from_block) {
  const int64_t left = s.n - (s.s - 1) * s.b_out - o;
  return {blocks, s.m, 1, s.s, from_block, s.n, s.b_out, std::clamp<int64_t>(left, 0, blocks)};
}

// Elements from one product that waits to the next: not a power of two, so that rows of all of them stay in the L1 cache.
template <class T>
int64_t waiting_stride(int64_t count) {
  return count + 64 / static_cast<int64_t>(sizeof(T));
}

// Not so: one output block's middle, and outputs that lie in a row, are written where they belong.
bool moves_middle(const Call& s) { return s.b_out > 1; }
bool moves_outputs(const Call& s) { return s.interleave && s.b_out > 1; }

void multiply(const cpu::Kernel& kernel, cpu::Product product, void* prepared) {
  if (kernel.prepared_bytes(product.m, product.depth) > 0) {
    kernel.prepare(product, prepared);
    product.x = prepared;
  }
  kernel.multiply(product, 0, (product.rows + kernel.row_tile - 1) / kernel.row_tile);
}

// h = the products of input blocks first..last.
template <class T>
void first_stage(const Call& s, const Operands<T>& in, const cpu::Kernel& kernel, int64_t group, int64_t first,
                 int64_t last) {
  const int64_t p = s.p, q = s.q(), full = p > 0 ? s.k / p : s.b_in;  // blocks without padding
  const cpu::Lines prepared = cpu::new_lines(kernel.prepared_bytes(s.m, p));
  const cpu::Lines padded = new_elements<T>(last > full ? s.m * p : 0);
  const int64_t stride = waiting_stride<T>(s.m * q);
  const cpu::Lines waiting = new_elements<T>(moves_middle(s) ? group * stride : 0);
  for (int64_t start = first; start < last; start += group) {
    const int64_t end = std::min(start + group, last);
    T* z = elements_of<T>(waiting);
    for (int64_t i = start; i < end; ++i, z += stride) {
      const T* w = in.v + i * q * p;
      const T* then = i + 1 < s.b_in ? w + q * p : in.u;
      cpu::Product product{in.x + i * p, w, nullptr, z, s.m, p, q, s.k, q, then};
      if (i >= full) {
        pad_block(s, in.x, i, elements_of<T>(padded));
        product.x = padded.get(), product.x_row = p;
      }
      if (!moves_middle(s)) product.y = in.h + i * s.r, product.y_row = s.t();
      multiply(kernel, product, prepared.get());
    }
    if (moves_middle(s)) move(first_move(s, end - start, stride), elements_of<const T>(waiting), in.h + start * s.r, 0, s.m);
  }
}

// y = the products of output blocks first..last.
template <class T>
void second_stage(const Call& s, const Operands<T>& in, const cpu::Kernel& kernel, int64_t group, int64_t first,
                  int64_t last) {
  const int64_t t = s.t(), rows = s.s;
  const bool moves = moves_outputs(s);
  const cpu::Lines prepared = cpu::new_lines(kernel.prepared_bytes(s.m, t));
  const int64_t stride = waiting_stride<T>(s.m * rows);
  const cpu::Lines waiting = new_elements<T>(moves ? group * stride : 0), block_bias = new_elements<T>(moves ? rows : 0);
  for (int64_t start = first; start < last; start += group) {
    const int64_t end = std::min(start + group, last);
    T* z = elements_of<T>(waiting);
    for (int64_t o = start; o < end; ++o, z += stride) {
      const T* w = in.u + o * rows * t;
      const T* then = o + 1 < s.b_out ? w + rows * t : nullptr;
      cpu::Product product{in.h + o * s.m * t, w, in.bias, z, s.m, t, rows, t, rows, then};
      if (!moves) {
        const int64_t at = std::min(s.n, o * rows);
        product.rows = std::min(rows, s.n - at);
        product.y = in.y + at, product.y_row = s.n;
        if (in.bias) product.bias = in.bias + at;
      } else if (in.bias) {
        gather_bias(s, in.bias, o, elements_of<T>(block_bias));
        product.bias = block_bias.get();
      }
      multiply(kernel, product, prepared.get());
    }
    if (moves) move(second_move(s, end - start, start, stride), elements_of<const T>(waiting), in.y + start, 0, s.m);
  }
}

template <class Task>
void for_blocks(int64_t blocks, int64_t grain, const Task& task) {
  if (grain == 0) return task(0, blocks);
  torch::stable::parallel_for(0, blocks, grain, task);
}

template <class T>
void decode(const Call& s, const CpuConfig& config, const Operands<T>& in) {
  const cpu::Kernel kernel = cpu::kernel(cpu_level(), s.dtype, s.m);
  for_blocks(s.b_in, config.first_grain, [&](int64_t first, int64_t last) {
    first_stage(s, in, kernel, config.first_group, first, last);
  });
  for_blocks(s.b_out, config.second_grain, [&](int64_t first, int64_t last) {
    second_stage(s, in, kernel, config.second_group, first, last);
  });
}

// --- the library: torch's batched products, and the same moves between them ---

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 1, 2); }

template <class Task>
void for_tokens(const Call& s, const Task& task) {
  torch::stable::parallel_for(0, s.m, std::max<int64_t>(1, kTaskNumbers / std::max<int64_t>(1, s.k + s.n)), task);
}

// y [m, n] from [b_out, m, s], block after block.
template <class T>
void join_outputs(const Call& s, const T* from, T* y, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    for (int64_t o = 0, at = 0; at < s.n; ++o, at += s.s)
      std::copy_n(from + (o * s.m + token) * s.s, std::min(s.s, s.n - at), y + token * s.n + at);
  }
}

// Writes all of h and y.
template <class T>
void library(const Call& s, const Operands<T>& in, const Tensor& v, const Tensor& u, Tensor& h, Tensor& y) {
  const auto data_of = [](Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
  Tensor blocks_x = empty(s.kind, {s.b_in, s.m, s.p}), z = empty(s.kind, {s.b_in, s.m, s.q()});
  for (int64_t i = 0; i < s.b_in; ++i) pad_block(s, in.x, i, data_of(blocks_x) + i * s.m * s.p);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bmm_out(z.get(), blocks_x.get(), transposed(v).get()));
  for_tokens(s, [&, from = data_of(z), to = data_of(h)](int64_t first, int64_t last) {
    move(first_move(s, s.b_in, s.m * s.q()), from, to, first, last);
  });

  Tensor blocks_y = empty(s.kind, {s.b_out, s.m, s.s});
  if (in.bias) {  // added before the only rounding
    Tensor bias = empty(s.kind, {s.b_out, 1, s.s});
    for (int64_t o = 0; o < s.b_out; ++o) gather_bias(s, in.bias, o, data_of(bias) + o * s.s);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_baddbmm_out(blocks_y.get(), bias.get(), h.get(), transposed(u).get(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bmm_out(blocks_y.get(), h.get(), transposed(u).get()));
  }
  for_tokens(s, [&, from = data_of(blocks_y), to = data_of(y)](int64_t first, int64_t last) {
    s.interleave ? move(second_move(s, s.b_out, 0, s.m * s.s), from, to, first, last)
                 : join_outputs(s, from, to, first, last);
  });
}

// --- the op ---

struct Result {
  Tensor y;                 // [..., n]
  std::optional<Tensor> h;  // [b_out, m, b_in r], where it was asked for
};

template <class T>
void forward(const Call& s, const CpuConfig& config, const Tensor& x, const Tensor& v, const Tensor& u,
             const std::optional<Tensor>& bias, Result& result) {
  const auto data_of = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  Operands<T> in{data_of(x), data_of(v), data_of(u), bias ? data_of(*bias) : nullptr, nullptr,
                 static_cast<T*>(result.y.mutable_data_ptr())};
  if (config.path == CpuPath::library) {
    library_calls.count();
    Tensor h = result.h ? *result.h : empty(s.kind, {s.b_out, s.m, s.t()});
    return library(s, in, v, u, h, result.y);
  }
  decode_calls.count();
  const int64_t most = cpu::slice_of(s.m);
  const cpu::Lines inside = new_elements<T>(s.b_out * most * s.t());
  in.h = elements_of<T>(inside);
  T* kept = result.h ? static_cast<T*>(result.h->mutable_data_ptr()) : nullptr;
  for (int64_t token = 0; token < s.m; token += most, in.x += most * s.k, in.y += most * s.n) {
    Call slice = s;
    slice.m = std::min(most, s.m - token);
    decode(slice, config, in);
    for (int64_t o = 0; o < s.b_out && kept; ++o)
      std::copy_n(in.h + o * slice.m * s.t(), slice.m * s.t(), kept + (o * s.m + token) * s.t());
  }
}

// The tensors are made contiguous: the same bits for every layout of the same values, on whichever path.
Result forward_cpu(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias, int64_t n,
                   bool interleave, bool keep_h) {
  const Call s = check(x, v, u, bias, n, interleave);
  Problem problem = on_this_cpu({});
  problem.m = s.m, problem.n = s.n, problem.k = s.k, problem.r = s.r, problem.dtype = s.dtype;
  problem.b_in = s.b_in, problem.b_out = s.b_out;
  const CpuConfig config = choose_cpu_config(problem);
  Result result{empty_rows(x, s.kind, s.n), std::nullopt};
  if (keep_h) result.h = empty(s.kind, {s.b_out, s.m, s.t()});
  if (config.path == CpuPath::empty) return result;

  const Tensor rows = as_contiguous(x), first = as_contiguous(v), second = as_contiguous(u);
  const std::optional<Tensor> added = bias ? std::optional<Tensor>(as_contiguous(*bias)) : std::nullopt;
  switch (s.dtype) {
    case Dtype::float64: forward<uint64_t>(s, config, rows, first, second, added, result); break;
    case Dtype::float32: forward<uint32_t>(s, config, rows, first, second, added, result); break;
    default: forward<uint16_t>(s, config, rows, first, second, added, result);
  }
  return result;
}

Tensor monarch_cpu(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias, int64_t n,
                   bool interleave) {
  return forward_cpu(x, v, u, bias, n, interleave, false).y;
}

std::tuple<Tensor, Tensor> monarch_training_cpu(const Tensor& x, const Tensor& v, const Tensor& u,
                                                const std::optional<Tensor>& bias, int64_t n, bool interleave) {
  Result result = forward_cpu(x, v, u, bias, n, interleave, true);
  return {std::move(result.y), std::move(*result.h)};
}

}  // namespace

Call check(const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias, int64_t n,
            bool interleave) {
  STD_TORCH_CHECK(x.dim() >= 1, "monarch: x has no dimensions, must be [..., k]");
  STD_TORCH_CHECK(v.dim() == 3 && u.dim() == 3, "monarch: v has ", v.dim(), " and u ", u.dim(),
                  " dimensions, must be [b_in, b_out r, p] and [b_out, s, b_in r]");
  const Kind kind = kind_of(x);
  const int64_t k = x.size(x.dim() - 1);
  Call s{rows_of(x), n, k, 0, v.size(0), u.size(0), v.size(2), u.size(1), kind, dtype_of(kind), interleave};
  STD_TORCH_CHECK(s.b_in >= 1 && s.b_out >= 1, "monarch: v has ", s.b_in, " blocks and u ", s.b_out,
                  ", must be one at least");
  STD_TORCH_CHECK(v.size(1) % s.b_out == 0 && v.size(1) * s.b_in == u.size(2) * s.b_out, "monarch: v has ", v.size(1),
                  " rows and u ", u.size(2), " columns in a block, must be b_out r and b_in r with b_in = ", s.b_in,
                  " and b_out = ", s.b_out);
  s.r = v.size(1) / s.b_out;
  STD_TORCH_CHECK((s.k + s.b_in - 1) / s.b_in == s.p, "monarch: x has ", s.k, " features, must have ", s.b_in * s.p,
                  ", or up to ", s.b_in - 1, " less: ", s.b_in, " blocks of ", s.p);
  STD_TORCH_CHECK(n >= 0 && (n + s.b_out - 1) / s.b_out == s.s, "monarch: n is ", n, ", must be ", s.b_out * s.s,
                  ", or up to ", s.b_out - 1, " less: ", s.b_out, " blocks of ", s.s);
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n), "monarch: bias must be [", n, "]");
  STD_TORCH_CHECK(kind_of(v) == kind && kind_of(u) == kind && (!bias || kind_of(*bias) == kind),
                  "monarch: x, v, u and bias must have one dtype (or use autocast) and be on one device");
  STD_TORCH_CHECK(s.dtype != Dtype::other, "monarch: x must be float64, float32, float16 or bfloat16");
  return s;
}

}  // namespace monarch

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) {
  m.impl("monarch", TORCH_BOX(&monarch::monarch_cpu));
  m.impl("monarch_training", TORCH_BOX(&monarch::monarch_training_cpu));
}
