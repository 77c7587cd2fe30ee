// Decode with AVX-512: 24 sums, 4 weights and one x fit the 32 registers.
//
// bf16 has two kernels. On the CPU this was written on (Sapphire Rapids class) vdpbf16ps does 42 G multiply-adds a
// second and fma 87: from m = 3 on, where arithmetic shows, weights are widened to float, and x was before. At m <= 2
// memory is all there is; vdpbf16ps needs no widening and is 5 % faster. It takes subnormal bf16 numbers as zero, as
// torch's bf16 matmul does there.
#include <immintrin.h>

#include "low_rank/store_x86.h"

namespace low_rank {
namespace {

struct Avx512 : FourSums {
  static constexpr int kRows = 4;
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
};

struct Avx512Float : Avx512, Packed<Avx512Float, 16> {
  static constexpr int kTokens = 6, kStep = 16, kParts = 1;
  using Weight = float;
  struct Wide {
    __m512 part[1];
  };

  static Wide load(const float* p) { return {{_mm512_loadu_ps(p)}}; }
  static Wide load_tail(const float* p, int64_t count) {
    return {{_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)}};
  }
  template <int>
  static __m512 load_x(const float* p, int64_t) { return _mm512_loadu_ps(p); }
  static void store_part(float* to, __m512 part) { _mm512_storeu_ps(to, part); }
  static Sum multiply_add(__m512 w, __m512 x, Sum sum) { return _mm512_fmadd_ps(w, x, sum); }
};

struct Bf16Weights : Avx512 {
  static constexpr int kStep = 32;
  using Weight = uint16_t;

  static __m512i load_bits(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static __m512i load_bits(const uint16_t* p, int64_t count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), p);
  }
};

struct Avx512Bf16Pairs : Bf16Weights, Unprepared<uint16_t> {
  static constexpr int kTokens = 2, kParts = 1;
  struct Wide {
    __m512i part[1];
  };

  static Wide load(const uint16_t* p) { return {{load_bits(p)}}; }
  static Wide load_tail(const uint16_t* p, int64_t count) { return {{load_bits(p, count)}}; }
  template <int>
  static __m512i load_x(const uint16_t* p, int64_t count) { return count == kStep ? load_bits(p) : load_bits(p, count); }
  static Sum multiply_add(__m512i w, __m512i x, Sum sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
};

struct Avx512Bf16Wide : Bf16Weights, Packed<Avx512Bf16Wide, 32> {
  static constexpr int kTokens = 4, kParts = 2;  // 16 sums and 8 weights; with 6 tokens the compiler spills
  struct Wide {
    __m512 part[2];  // even, odd
  };

  static Wide widen(__m512i bits) {
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
             _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))))}};
  }
  static Wide load(const uint16_t* p) { return widen(load_bits(p)); }
  static Wide load_tail(const uint16_t* p, int64_t count) { return widen(load_bits(p, count)); }
  template <int kPart>
  static __m512 load_x(const float* p, int64_t) { return _mm512_loadu_ps(p + 16 * kPart); }
  static void store_part(float* to, __m512 part) { _mm512_storeu_ps(to, part); }
  static Sum multiply_add(__m512 w, __m512 x, Sum sum) { return _mm512_fmadd_ps(w, x, sum); }
};

}  // namespace

CpuKernel cpu_kernel_avx512(Dtype dtype, int64_t m) {
  if (dtype == Dtype::float32) return kernel_of<Avx512Float>();
  return m <= 2 ? kernel_of<Avx512Bf16Pairs>() : kernel_of<Avx512Bf16Wide>();
}

}  // namespace low_rank
