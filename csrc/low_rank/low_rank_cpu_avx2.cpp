// Decode with AVX2 and FMA: 8 floats at a time; bf16 becomes float by a shift or a mask, 8 even and 8 odd numbers of 16.
#include <immintrin.h>

#include "low_rank/store_x86.h"

namespace low_rank {
namespace {

struct Avx2 {
  static constexpr int kRows = 4;

  static __m128 sum4(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));  // a b c d in both halves
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  }
};

// 12 sums, and the weights as operands from 4 registers: all 16 in use.
struct Avx2Float : Avx2 {
  static constexpr int kStep = 8, kTokens = 2;
  using Weight = float;
  using Input = float;
  using Wide = __m256;
  using Sum = __m256;

  static Sum zero() { return _mm256_setzero_ps(); }
  static Wide load(const float* p) { return _mm256_loadu_ps(p); }
  static Wide load_tail(const float* p, int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane));
  }
  static Wide load_x(const float* p) { return load(p); }
  static Wide load_x_tail(const float* p, int64_t count) { return load_tail(p, count); }
  static Sum multiply_add(Wide w, Wide x, Sum sum) { return _mm256_fmadd_ps(w, x, sum); }
  static __m128 reduce(const Sum (&v)[4]) { return sum4(v[0], v[1], v[2], v[3]); }
  static void store(float* y, __m128 sums, const float* bias, int64_t rows) { store_rows(y, sums, bias, rows); }

  static int64_t x_stride(int64_t depth) { return depth; }  // x is used as it is
  static int64_t prepared_bytes(int64_t, int64_t) { return 0; }
  static void prepare(const void*, void*, int64_t, int64_t) {}
};

struct Avx2Bf16 : Avx2 {
  static constexpr int kStep = 16, kTokens = 2;
  using Weight = uint16_t;
  using Input = float;  // x widened once: for each 16 numbers the 8 even, then the 8 odd ones; zeros after the last
  struct Wide {
    __m256 even, odd;
  };
  using Sum = __m256;

  static Sum zero() { return _mm256_setzero_ps(); }
  static Wide load(const uint16_t* p) { return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Wide load_tail(const uint16_t* p, int64_t count) {
    uint16_t padded[kStep] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
    return load(padded);
  }
  static Wide load_x(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Wide load_x_tail(const float* p, int64_t) { return load_x(p); }
  static Sum multiply_add(const Wide& w, const Wide& x, Sum sum) {
    return _mm256_fmadd_ps(w.odd, x.odd, _mm256_fmadd_ps(w.even, x.even, sum));
  }
  static __m128 reduce(const Sum (&v)[4]) { return sum4(v[0], v[1], v[2], v[3]); }
  static void store(uint16_t* y, __m128 sums, const uint16_t* bias, int64_t rows) { store_rows(y, sums, bias, rows); }

  static int64_t x_stride(int64_t depth) { return (depth + kStep - 1) / kStep * kStep; }
  static int64_t prepared_bytes(int64_t m, int64_t depth) { return m * x_stride(depth) * 4; }
  static void prepare(const void* x, void* prepared, int64_t m, int64_t depth) {
    for (int64_t row = 0; row < m; ++row) {
      const auto* from = static_cast<const uint16_t*>(x) + row * depth;
      auto* to = static_cast<float*>(prepared) + row * x_stride(depth);
      for (int64_t d = 0; d < depth; d += kStep) {
        const Wide wide = depth - d >= kStep ? load(from + d) : load_tail(from + d, depth - d);
        _mm256_storeu_ps(to + d, wide.even);
        _mm256_storeu_ps(to + d + 8, wide.odd);
      }
    }
  }

 private:
  static Wide split(__m256i pairs) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
  }
};

}  // namespace

CpuKernel cpu_kernel_avx2(Dtype dtype) {
  return dtype == Dtype::bfloat16 ? kernel_of<Avx2Bf16>() : kernel_of<Avx2Float>();
}

}  // namespace low_rank
