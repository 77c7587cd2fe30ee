// Decode with AVX-512: 16 floats, or 32 bf16 in pairs by vdpbf16ps, at a time. 24 sums, 4 weights and one x fit 32 registers.
//
// vdpbf16ps takes subnormal bf16 numbers as zero, as torch's own bf16 matmul does on these CPUs.
#include <immintrin.h>

#include "low_rank/store_x86.h"

namespace low_rank {
namespace {

struct Avx512 {
  static constexpr int kRows = 4, kTokens = 6;
  using Sum = __m512;

  static Sum zero() { return _mm512_setzero_ps(); }

  // The sums of four vectors: 13 instructions where four separate reductions take 32.
  static __m128 reduce(const Sum (&v)[4]) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));  // a b a b per quarter
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));  // a b c d in each quarter
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(abcd), 1));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), upper);
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }

  static int64_t x_stride(int64_t depth) { return depth; }  // x is used as it is
  static int64_t prepared_bytes(int64_t, int64_t) { return 0; }
  static void prepare(const void*, void*, int64_t, int64_t) {}
};

struct Avx512Float : Avx512 {
  static constexpr int kStep = 16;
  using Weight = float;
  using Input = float;
  using Wide = __m512;

  static Wide load(const float* p) { return _mm512_loadu_ps(p); }
  static Wide load_tail(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  }
  static Wide load_x(const float* p) { return load(p); }
  static Wide load_x_tail(const float* p, int64_t count) { return load_tail(p, count); }
  static Sum multiply_add(Wide w, Wide x, Sum sum) { return _mm512_fmadd_ps(w, x, sum); }
  static void store(float* y, __m128 sums, const float* bias, int64_t rows) { store_rows(y, sums, bias, rows); }
};

struct Avx512Bf16 : Avx512 {
  static constexpr int kStep = 32;
  using Weight = uint16_t;
  using Input = uint16_t;
  using Wide = __m512i;

  static Wide load(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static Wide load_tail(const uint16_t* p, int64_t count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), p);
  }
  static Wide load_x(const uint16_t* p) { return load(p); }
  static Wide load_x_tail(const uint16_t* p, int64_t count) { return load_tail(p, count); }
  static Sum multiply_add(Wide w, Wide x, Sum sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
  static void store(uint16_t* y, __m128 sums, const uint16_t* bias, int64_t rows) { store_rows(y, sums, bias, rows); }
};

}  // namespace

CpuKernel cpu_kernel_avx512(Dtype dtype) {
  return dtype == Dtype::bfloat16 ? kernel_of<Avx512Bf16>() : kernel_of<Avx512Float>();
}

}  // namespace low_rank
