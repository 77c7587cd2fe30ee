// What the CPU's host files of low_rank_sparse share for many tokens: S, read once for a call, and products with it.
#pragma once

#include "low_rank_sparse/forward.h"
#include "low_rank_sparse/low_rank_sparse_cpu.h"

namespace low_rank_sparse {

// In fp32, or fp64 where the inputs are: what products of many tokens are computed in, so that every result is rounded once.
// A library's bf16 product is half as fast as its fp32 product on a processor without AMX: 21 to 42 against 41 to 83 G
// multiply-adds a second on the one this was written on.
Tensor wide(const Tensor& t, const Call& s);
Tensor rounded(const Tensor& t, const Call& s);

// scale a b^T, in what `wide` gives.
Tensor scaled_product(const Call& s, const Tensor& a, const Tensor& b, double scale);

// columns as they come, unchecked.
class Columns {
 public:
  Columns(const Call& s, const Tensor& columns) : data_(columns.const_data_ptr()), is_narrow_(s.is_narrow), k_(s.k) {}

  // The input of an entry; -1 for one that there is not.
  int64_t operator[](int64_t entry) const {
    const int64_t column =
        is_narrow_ ? static_cast<const int16_t*>(data_)[entry] : static_cast<const int32_t*>(data_)[entry];
    return static_cast<uint64_t>(column) < static_cast<uint64_t>(k_) ? column : -1;
  }

 private:
  const void* data_;
  bool is_narrow_;
  int64_t k_;
};

// int32 or float workspace.
template <class T>
class Numbers {
 public:
  Numbers() = default;
  explicit Numbers(int64_t count) : lines_(cpu::new_lines(count * static_cast<int64_t>(sizeof(T)))) {}
  T* get() const { return static_cast<T*>(lines_.get()); }
  T& operator[](int64_t i) const { return get()[i]; }

 private:
  cpu::Lines lines_;
};

// Where rows begin and end, [n + 1], for any `starts` whatever: from 0, never falling, up to nnz at most.
Numbers<int32_t> bounds_of(const Call& s, const Tensor& starts);

// S in fp32, or its transposed. What leads outside of it is an entry of value 0 for the first input.
struct ReadSupport {
  int64_t rows = 0, columns = 0, nnz = 0;
  Numbers<int32_t> bounds, places;
  Numbers<float> values;
  std::vector<int32_t> outside;  // those entries

  Entries entries() const { return {bounds.get(), places.get(), values.get()}; }
};

ReadSupport read_support(const Call& s, const Tensor& values, const Tensor& starts, const Tensor& columns);
ReadSupport transposed(const ReadSupport& support);

// weight += S.   weight [n, k]   values [nnz]   both as `wide` gives them
void add_entries(const Call& s, const Tensor& values, const Tensor& starts, const Tensor& columns, const Tensor& weight);

// y += x S^T.   x [m, columns]   y [m, rows]   fp32, contiguous
void add_sparse_product(const ReadSupport& support, int64_t m, const float* x, float* y);

// The gradients: dx += dy S, by the transposed; dvalues[e] = the inner product of dy's and x's columns of entry e, in fp32.
// Null where not wanted.
void sparse_gradients(const ReadSupport& support, int64_t m, const float* dy, const float* x, float* dx, float* dvalues);

}  // namespace low_rank_sparse
