// Host side of dictionary: checks, and on a CPU choice of configuration, calls, registration.
//   x [..., k]   d [P, Q, a, p]   values [n, Q s]   support   bias [n]   h [P, m, Q a]   y [..., n]
#include <algorithm>
#include <tuple>

#include "cpu/expand.h"
#include "cpu/lines.h"
#include "cpu/product.h"
#include "dictionary/dictionary_cpu.h"
#include "dictionary/forward.h"
#include "host/call_counter.h"

namespace dictionary {

namespace {

CallCounter decode_calls("dictionary", "cpu", "decode"), library_calls("dictionary", "cpu", "library");

constexpr int64_t kTaskNumbers = 1 << 16;  // written by a thread, at least

// Contiguous: the same bits for every layout of the same values, on whichever path.
struct Operands {
  Tensor x;  // [m, Q p], padded
  Tensor d, values, support;
  std::optional<Tensor> bias;
};

// --- decode: d and values go by once ---

// Products with `rows` rows of weights each, as one run of row tiles: tasks need not end where a product does.
template <class Multiply>
void for_tiles(int64_t products, int64_t rows, int64_t row_tile, int64_t grain, const Multiply& multiply) {
  const int64_t tiles = (rows + row_tile - 1) / row_tile;
  const auto task = [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t number = first / tiles, end = std::min(last, (number + 1) * tiles);
      multiply(number, first - number * tiles, end - number * tiles);
      first = end;
    }
  };
  if (grain == 0) return task(0, products * tiles);
  torch::stable::parallel_for(0, products * tiles, std::max<int64_t>(1, grain / row_tile), task);
}

// Pieces [m, depth] as a kernel reads them, one after the other.
template <class T>
class Prepared {
 public:
  // piece(i): where piece i begins.
  template <class Piece>
  Prepared(const cpu::Kernel& kernel, int64_t count, int64_t m, int64_t depth, int64_t x_row, const Piece& piece)
      : bytes_(kernel.prepared_bytes(m, depth)) {
    if (bytes_ == 0) return;
    lines_ = cpu::new_lines(count * bytes_);
    for (int64_t i = 0; i < count; ++i)
      kernel.prepare({piece(i), nullptr, nullptr, nullptr, m, depth, 0, x_row, 0, nullptr}, inside(i));
  }

  // From piece i on; `piece` itself where the kernel takes it as it is.
  const void* from(int64_t i, const T* piece) const { return bytes_ > 0 ? inside(i) : static_cast<const void*>(piece); }

 private:
  char* inside(int64_t i) const { return static_cast<char*>(lines_.get()) + i * bytes_; }

  int64_t bytes_;
  cpu::Lines lines_;
};

template <class T>
void multiply_atoms(const Call& s, const CpuConfig& config, const Operands& in, const T* x_rows, T* h) {
  const cpu::Kernel kernel = cpu::kernel(cpu_level(), s.dtype, s.m);
  const int64_t width = s.b_in * s.p, blocks = s.b_out * s.b_in, middle = s.middle();
  const auto piece = [&](int64_t q) { return x_rows + q * s.p; };
  const Prepared<T> x(kernel, s.b_in, s.m, s.p, width, piece);
  for_tiles(blocks, s.a, kernel.row_tile, config.first_grain, [&](int64_t block, int64_t first, int64_t last) {
    const int64_t o = block / s.b_in, q = block % s.b_in;
    const T* d = data_of<T>(in.d, block * s.a * s.p);
    const T* then = block + 1 < blocks ? d + s.a * s.p : data_of<T>(in.values);
    kernel.multiply({x.from(q, piece(q)), d, nullptr, h + o * s.m * middle + q * s.a, s.m, s.p, s.a, width, middle, then},
                    first, last);
  });
}

template <class T>
void multiply_codes(const Call& s, const CpuConfig& config, const Operands& in, const T* h, T* y) {
  const cpu::Kernel kernel = (s.is_bitmap ? cpu::masked_kernel : cpu::positions_kernel)(cpu_level(), s.dtype, s.m);
  const int64_t rows = s.rows(), middle = s.middle();
  const auto piece = [&](int64_t i) { return h + i / s.b_in * s.m * middle + i % s.b_in * s.a; };
  const Prepared<T> prepared(kernel, s.b_out * s.b_in, s.m, s.a, middle, piece);
  for_tiles(s.b_out, rows, kernel.row_tile, config.second_grain, [&](int64_t o, int64_t first, int64_t last) {
    const int64_t from = o * rows, here = std::clamp<int64_t>(s.n - from, 0, rows);
    last = std::min(last, (here + kernel.row_tile - 1) / kernel.row_tile);
    if (first >= last) return;
    cpu::Product product{prepared.from(o * s.b_in, piece(o * s.b_in)), data_of<T>(in.values, from * s.b_in * s.s),
                         in.bias ? data_of<T>(*in.bias, from) : nullptr, y + from, s.m, s.a, here, middle, s.n, nullptr};
    product.segments = s.b_in, product.kept = s.s;
    if (s.is_bitmap)
      product.mask = data_of<uint32_t>(in.support, from * s.b_in * s.words());
    else
      product.positions = data_of<int16_t>(in.support, from * s.b_in * s.s);
    kernel.multiply(product, first, last);
  });
}

// --- the library: torch's products block by block, S written out ---

// to [m, ...] rows of `stride` from a tensor's.
template <class T>
void place(const Tensor& from, int64_t m, T* to, int64_t stride) {
  const int64_t columns = from.size(1);
  for (int64_t row = 0; row < m; ++row) std::copy_n(data_of<T>(from, row * columns), columns, to + row * stride);
}

// [count, Q a]: rows of S from `first` on.
template <class T>
Tensor dense_codes(const Call& s, const Operands& in, int64_t first, int64_t count) {
  Tensor dense = empty(s.kind, {count, s.middle()});
  auto* to = static_cast<T*>(dense.mutable_data_ptr());
  const cpu::ExpandMask expand = cpu::expand_mask(cpu_level(), sizeof(T));
  const int64_t blocks = count * s.b_in;
  torch::stable::parallel_for(0, blocks, 1 + kTaskNumbers / (1 + s.a), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = first * s.b_in + i;
      const T* values = data_of<T>(in.values, block * s.s);
      if (s.is_bitmap)
        expand(data_of<uint32_t>(in.support, block * s.words()), values, s.s, s.a, to + i * s.a);
      else
        cpu::expand_positions(data_of<int16_t>(in.support, block * s.s), values, s.s, s.a, to + i * s.a);
    }
  });
  return dense;
}

Tensor part(Tensor t, int64_t dimension, int64_t first, int64_t count) {
  return as_contiguous(torch::stable::narrow(t, dimension, first, count));
}

template <class T>
void library(const Call& s, const Operands& in, Tensor& h, Tensor& y) {
  auto* middle = static_cast<T*>(h.mutable_data_ptr());
  const Tensor atoms = torch::stable::reshape(in.d, {s.b_out * s.b_in * s.a, s.p});
  for (int64_t q = 0; q < s.b_in; ++q) {
    const Tensor x = part(in.x, 1, q * s.p, s.p);
    for (int64_t o = 0; o < s.b_out; ++o)
      place(library_linear(x, part(atoms, 0, (o * s.b_in + q) * s.a, s.a)), s.m, middle + o * s.m * s.middle() + q * s.a,
            s.middle());
  }
  const Tensor rows_of_h = torch::stable::reshape(h, {s.b_out * s.m, s.middle()});
  for (int64_t o = 0; o < s.b_out; ++o) {
    const int64_t first = std::min(s.n, o * s.rows()), count = std::min(s.n - first, s.rows());
    const std::optional<Tensor> bias = in.bias ? std::optional<Tensor>(part(*in.bias, 0, first, count)) : std::nullopt;
    place(library_linear(part(rows_of_h, 0, o * s.m, s.m), dense_codes<T>(s, in, first, count), bias), s.m,
          static_cast<T*>(y.mutable_data_ptr()) + first, s.n);
  }
}

// --- the op ---

struct Result {
  Tensor y;                 // [..., n]
  std::optional<Tensor> h;  // [P, m, Q a], where it was asked for
};

template <class T>
void forward(const Call& s, const CpuConfig& config, const Operands& in, Result& result) {
  if (config.path == CpuPath::library) {
    library_calls.count();
    Tensor h = result.h ? *result.h : empty(s.kind, {s.b_out, s.m, s.middle()});
    return library<T>(s, in, h, result.y);
  }
  decode_calls.count();
  const int64_t most = cpu::slice_of(s.m);
  const cpu::Lines inside = cpu::new_lines(s.b_out * most * s.middle() * static_cast<int64_t>(sizeof(T)));
  T* h = static_cast<T*>(inside.get());
  T* kept = result.h ? static_cast<T*>(result.h->mutable_data_ptr()) : nullptr;
  T* y = static_cast<T*>(result.y.mutable_data_ptr());
  for (int64_t token = 0; token < s.m; token += most) {
    Call slice = s;
    slice.m = std::min(most, s.m - token);
    multiply_atoms(slice, config, in, data_of<T>(in.x, token * s.b_in * s.p), h);
    multiply_codes<T>(slice, config, in, h, y + token * s.n);
    for (int64_t o = 0; o < s.b_out && kept; ++o)
      std::copy_n(h + o * slice.m * s.middle(), slice.m * s.middle(), kept + (o * s.m + token) * s.middle());
  }
}

// [m, Q p], zeros where there is no more of x.
Tensor padded_rows(const Call& s, const Tensor& x, bool is_decode) {
  const Tensor rows = as_contiguous(x);
  if (s.k == s.b_in * s.p && (is_decode || x.dim() == 2)) return rows;  // decode reads them as they lie
  const int64_t more[] = {0, s.b_in * s.p - s.k};
  return torch::stable::pad(torch::stable::reshape(rows, {s.m, s.k}), more);
}

Result forward_cpu(const Tensor& x, const Tensor& d, const Tensor& values, const Tensor& support,
                   const std::optional<Tensor>& bias, bool keep_h) {
  const Call s = check(x, d, values, support, bias);
  Problem problem = on_this_cpu({});
  problem.m = s.m, problem.n = s.n, problem.k = s.k, problem.r = s.a, problem.dtype = s.dtype;
  problem.b_in = s.b_in, problem.b_out = s.b_out, problem.kept = s.s;
  const CpuConfig config = choose_cpu_config(problem);
  Result result{empty_rows(x, s.kind, s.n), std::nullopt};
  if (keep_h) result.h = empty(s.kind, {s.b_out, s.m, s.middle()});
  if (config.path == CpuPath::empty) return result;

  Operands in{padded_rows(s, x, config.path != CpuPath::library), as_contiguous(d), as_contiguous(values),
              as_contiguous(support), std::nullopt};
  if (bias) in.bias = as_contiguous(*bias);
  switch (s.dtype) {
    case Dtype::float64: forward<uint64_t>(s, config, in, result); break;
    case Dtype::float32: forward<uint32_t>(s, config, in, result); break;
    default: forward<uint16_t>(s, config, in, result);
  }
  return result;
}

Tensor dictionary_cpu(const Tensor& x, const Tensor& d, const Tensor& values, const Tensor& support,
                      const std::optional<Tensor>& bias) {
  return forward_cpu(x, d, values, support, bias, false).y;
}

std::tuple<Tensor, Tensor> dictionary_training_cpu(const Tensor& x, const Tensor& d, const Tensor& values,
                                                   const Tensor& support, const std::optional<Tensor>& bias) {
  Result result = forward_cpu(x, d, values, support, bias, true);
  return {std::move(result.y), std::move(*result.h)};
}

}  // namespace

Call check(const Tensor& x, const Tensor& d, const Tensor& values, const Tensor& support,
           const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() >= 1, "dictionary: x has no dimensions, must be [..., k]");
  STD_TORCH_CHECK(d.dim() == 4 && values.dim() == 2 && support.dim() == 2, "dictionary: d has ", d.dim(), ", values ",
                  values.dim(), " and support ", support.dim(), " dimensions, must be [P, Q, a, p], [n, Q s] and [n, ...]");
  const Kind kind = kind_of(x), support_kind = kind_of(support);
  const bool is_bitmap = support_kind.dtype == aoti_torch_dtype_int32();
  Call s{rows_of(x), values.size(0), x.size(x.dim() - 1), d.size(0), d.size(1), d.size(2), d.size(3), 0, is_bitmap, kind,
         dtype_of(kind)};
  STD_TORCH_CHECK(s.b_out >= 1 && s.b_in >= 1, "dictionary: d has ", s.b_out, " x ", s.b_in,
                  " blocks, must have one at least");
  STD_TORCH_CHECK((s.k + s.b_in - 1) / s.b_in == s.p, "dictionary: x has ", s.k, " features, must have ", s.b_in * s.p,
                  ", or up to ", s.b_in - 1, " less: ", s.b_in, " blocks of ", s.p);
  STD_TORCH_CHECK(values.size(1) % s.b_in == 0 && values.size(1) <= s.b_in * s.a, "dictionary: values has ", values.size(1),
                  " columns, must have ", s.b_in, " s, s of the ", s.a, " atoms in each block");
  s.s = values.size(1) / s.b_in;
  STD_TORCH_CHECK((is_bitmap || support_kind.dtype == aoti_torch_dtype_int16()) &&
                      support_kind.device_type == kind.device_type && support_kind.device_index == kind.device_index,
                  "dictionary: support must be int32 (a bitmap) or int16 (positions) and on the device of x");
  STD_TORCH_CHECK(is_bitmap || s.a <= INT16_MAX, "dictionary: positions in int16 reach ", INT16_MAX, " atoms, found ", s.a,
                  "; use a bitmap");
  STD_TORCH_CHECK(support.size(0) == s.n && support.size(1) == s.b_in * s.support(), "dictionary: support is [",
                  support.size(0), ", ", support.size(1), "], must be [", s.n, ", ", s.b_in * s.support(), "]");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == s.n), "dictionary: bias must be [", s.n,
                  "], the rows of values");
  STD_TORCH_CHECK(kind_of(d) == kind && kind_of(values) == kind && (!bias || kind_of(*bias) == kind),
                  "dictionary: x, d, values and bias must have one dtype (or use autocast) and be on one device");
  STD_TORCH_CHECK(s.dtype != Dtype::other, "dictionary: x must be float64, float32, float16 or bfloat16");
  return s;
}

}  // namespace dictionary

STABLE_TORCH_LIBRARY_IMPL(lowfat, CPU, m) {
  m.impl("dictionary", TORCH_BOX(&dictionary::dictionary_cpu));
  m.impl("dictionary_training", TORCH_BOX(&dictionary::dictionary_training_cpu));
}
