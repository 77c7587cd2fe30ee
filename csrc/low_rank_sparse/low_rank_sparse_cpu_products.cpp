// S, read once for a call, and its products with many tokens on a CPU.
#include "low_rank_sparse/low_rank_sparse_cpu_products.h"

#include <algorithm>

namespace low_rank_sparse {

namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kChunkBytes = 1 << 20;      // of packed tokens: they stay in the L2 cache while rows go by
constexpr int64_t kPieceRows = 256;           // of S, so that few tokens keep many threads busy
constexpr int64_t kTaskProducts = 1 << 20;    // done by a thread, at least
constexpr int64_t kTaskNumbers = 1 << 16;     // moved by a thread, at least

const TokensKernel& kernel() { return kernels_of(cpu_level()).tokens; }

// Tokens side by side, a chunk of blocks of them.
class Packed {
 public:
  Packed(const float* from, int64_t m, int64_t columns, int64_t most)
      : from_(from), m_(m), columns_(columns), numbers_(most * columns * kBlockTokens) {}

  void fill(int64_t first_block, int64_t blocks) {
    const int64_t grain = 1 + kTaskNumbers / (1 + columns_ * kBlockTokens);
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t token = (first_block + i) * kBlockTokens;
        kernel().pack(from_ + token * columns_, columns_, std::min(kBlockTokens, m_ - token), columns_, block(i));
      }
    });
  }

  float* block(int64_t i) const { return numbers_.get() + i * columns_ * kBlockTokens; }

 private:
  const float* from_;
  int64_t m_, columns_;
  Numbers<float> numbers_;
};

// Blocks that are packed together: what L2 holds of them, and one for each thread.
int64_t chunk_of(int64_t blocks, int64_t columns) {
  const int64_t fit = kChunkBytes / (1 + columns * kBlockTokens * static_cast<int64_t>(sizeof(float)));
  return std::min(blocks, std::max<int64_t>({1, fit, torch::stable::get_num_threads()}));
}

int64_t blocks_of(int64_t m) { return (m + kBlockTokens - 1) / kBlockTokens; }

// y [m, rows] += x S^T of a chunk.
void add_chunk(const ReadSupport& support, const Packed& x, int64_t m, int64_t first_block, int64_t blocks, float* y) {
  const Entries s = support.entries();
  const int64_t pieces = (support.rows + kPieceRows - 1) / kPieceRows;
  const int64_t work = pieces > 0 ? support.bounds[support.rows] / pieces * kBlockTokens : 0;  // of a piece and block
  torch::stable::parallel_for(0, blocks * pieces, 1 + kTaskProducts / (1 + work), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t block = i / pieces, row = i % pieces * kPieceRows, token = (first_block + block) * kBlockTokens;
      kernel().add_rows(s, x.block(block), std::min(kBlockTokens, m - token), row, std::min(support.rows, row + kPieceRows),
                        y + token * support.rows, support.rows);
    }
  });
}

// to[e] += the inner products of a chunk: block after block, whoever computes them.
void add_products(const ReadSupport& support, const Packed& dy, const Packed& x, int64_t blocks, float* to) {
  const Entries s = support.entries();
  const int64_t row_work = 1 + support.bounds[support.rows] / (1 + support.rows) * kBlockTokens * blocks;
  torch::stable::parallel_for(0, support.rows, 1 + kTaskProducts / row_work, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < blocks; ++i) kernel().add_products(s, dy.block(i), x.block(i), first, last, to);
  });
}

template <class T>
void scale_by(T* numbers, int64_t count, double scale) {
  if (scale == 1) return;
  torch::stable::parallel_for(0, count, kTaskNumbers, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) numbers[i] *= static_cast<T>(scale);
  });
}

template <class T>
void add_entries(const Call& s, const T* values, const Numbers<int32_t>& bounds, const Columns& columns, T* weight) {
  torch::stable::parallel_for(0, s.n, 1 + kTaskNumbers / (1 + s.nnz / (1 + s.n)), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      for (int64_t e = bounds[row]; e < bounds[row + 1]; ++e)
        if (const int64_t column = columns[e]; column >= 0) weight[row * s.k + column] += values[e];
  });
}

}  // namespace

const Kernels& kernels_of([[maybe_unused]] CpuLevel level) {
#ifdef LOWFAT_X86
  if (level == CpuLevel::avx512_bf16) return kernels_avx512();
  if (level == CpuLevel::avx2_fma) return kernels_avx2();
#endif
  return kernels_scalar();
}

Tensor wide(const Tensor& t, const Call& s) {
  return s.dtype == Dtype::float32 || s.dtype == Dtype::float64 ? t : torch::stable::to(t, ScalarType::Float);
}

Tensor rounded(const Tensor& t, const Call& s) {
  if (s.dtype == Dtype::float32 || s.dtype == Dtype::float64) return t;
  return torch::stable::to(t, s.dtype == Dtype::bfloat16 ? ScalarType::BFloat16 : ScalarType::Half);
}

Tensor scaled_product(const Call& s, const Tensor& a, const Tensor& b, double scale) {
  const Tensor product = library_linear(a, b);
  const int64_t count = product.size(0) * product.size(1);
  if (s.dtype == Dtype::float64)
    scale_by(data_to<double>(product), count, scale);
  else
    scale_by(data_to<float>(product), count, scale);
  return product;
}

Numbers<int32_t> bounds_of(const Call& s, const Tensor& starts) {
  Numbers<int32_t> bounds(s.n + 1);
  bounds[0] = 0;
  const auto* ends = data_of<int32_t>(starts) + 1;
  for (int64_t row = 0; row < s.n; ++row)
    bounds[row + 1] = std::max(bounds[row], std::min(ends[row], static_cast<int32_t>(s.nnz)));
  return bounds;
}

ReadSupport read_support(const Call& s, const Tensor& values, const Tensor& starts, const Tensor& columns) {
  ReadSupport support{s.n, s.k, s.nnz, bounds_of(s, starts), Numbers<int32_t>(s.nnz), Numbers<float>(s.nnz), {}};
  const Tensor wide_values = wide(values, s);
  const auto* from = data_of<float>(wide_values);
  const Columns inputs(s, columns);
  for (int64_t e = 0; e < s.nnz; ++e) {
    const int64_t column = inputs[e];
    support.places[e] = static_cast<int32_t>(std::max<int64_t>(0, column));
    support.values[e] = column < 0 ? 0 : from[e];
    if (column < 0) support.outside.push_back(static_cast<int32_t>(e));
  }
  return support;
}

// Rows in ascending order in each column, so that sums do not depend on how the entries came.
ReadSupport transposed(const ReadSupport& support) {
  const int64_t count = support.bounds[support.rows];
  ReadSupport to{support.columns, support.rows, count, Numbers<int32_t>(support.columns + 1), Numbers<int32_t>(count),
                 Numbers<float>(count), {}};
  Numbers<int32_t> next(support.columns + 1);
  std::fill_n(next.get(), support.columns + 1, 0);
  for (int64_t e = 0; e < count; ++e) ++next[support.places[e] + 1];
  for (int64_t column = 0; column < support.columns; ++column) next[column + 1] += next[column];
  std::copy_n(next.get(), support.columns + 1, to.bounds.get());
  for (int64_t row = 0; row < support.rows; ++row)
    for (int64_t e = support.bounds[row]; e < support.bounds[row + 1]; ++e) {
      const int32_t at = next[support.places[e]]++;
      to.places[at] = static_cast<int32_t>(row);
      to.values[at] = support.values[e];
    }
  return to;
}

void add_entries(const Call& s, const Tensor& values, const Tensor& starts, const Tensor& columns, const Tensor& weight) {
  const Numbers<int32_t> bounds = bounds_of(s, starts);
  if (s.dtype == Dtype::float64)
    add_entries(s, data_of<double>(values), bounds, Columns(s, columns), data_to<double>(weight));
  else
    add_entries(s, data_of<float>(values), bounds, Columns(s, columns), data_to<float>(weight));
}

void add_sparse_product(const ReadSupport& support, int64_t m, const float* x, float* y) {
  if (support.bounds[support.rows] == 0) return;
  const int64_t blocks = blocks_of(m), chunk = chunk_of(blocks, support.columns);
  Packed packed(x, m, support.columns, chunk);
  for (int64_t first = 0; first < blocks; first += chunk) {
    const int64_t count = std::min(chunk, blocks - first);
    packed.fill(first, count);
    add_chunk(support, packed, m, first, count, y);
  }
}

void sparse_gradients(const ReadSupport& support, int64_t m, const float* dy, const float* x, float* dx, float* dvalues) {
  if (dvalues) std::fill_n(dvalues, support.nnz, 0.0f);
  if (support.bounds[support.rows] == 0) return;
  const int64_t blocks = blocks_of(m), chunk = chunk_of(blocks, std::max(support.rows, support.columns));
  const ReadSupport across = dx ? transposed(support) : ReadSupport{};
  Packed packed_dy(dy, m, support.rows, chunk), packed_x(x, m, support.columns, dvalues ? chunk : 0);
  for (int64_t first = 0; first < blocks; first += chunk) {
    const int64_t count = std::min(chunk, blocks - first);
    packed_dy.fill(first, count);
    if (dx) add_chunk(across, packed_dy, m, first, count, dx);
    if (!dvalues) continue;
    packed_x.fill(first, count);
    add_products(support, packed_dy, packed_x, count, dvalues);
  }
  if (dvalues)
    for (const int32_t e : support.outside) dvalues[e] = 0;
}

}  // namespace low_rank_sparse
