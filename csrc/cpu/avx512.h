// The vector types of the AVX-512 files: 24 sums, 4 weights and one x fit the 32 registers.
#pragma once

#include <immintrin.h>

#include "cpu/store_x86.h"

namespace cpu {
namespace {

struct Avx512 : FourSums {
  static constexpr int kRows = 4, kTogether = 4;
  using Sum = __m512;

  static Sum zero() { return _mm512_setzero_ps(); }

  // a b c d in each quarter
  static __m512 quarters(const Sum (&v)[4]) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));  // a b a b per quarter
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    return _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  }

  // Halves added, side by side: quarters 0 1 of v, then of w.
  static __m512 halves(__m512 v, __m512 w) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(v, w, 0x44), _mm512_shuffle_f32x4(v, w, 0xee));
  }

  // The sums of four vectors of each token: 13 instructions where four separate reductions take 32. For four tokens 45,
  // and they share all that follows: a quarter of the time at r = 96, where a row of u is three steps.
  template <int kMany>
  static auto reduce(const Sum (*v)[4]) {
    if constexpr (kMany == 4) {
      const __m512 first = halves(quarters(v[0]), quarters(v[1])), second = halves(quarters(v[2]), quarters(v[3]));
      return _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
    } else {
      const __m512 abcd = quarters(*v);
      const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(abcd), 1));
      const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), upper);
      return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
  }

  using FourSums::add_partial;
  using FourSums::keep_partial;
  using FourSums::scaled;
  using FourSums::store;
  static __m512 scaled(__m512 sums, float scale) { return _mm512_mul_ps(sums, _mm512_set1_ps(scale)); }
  static __m512 add_partial(__m512 sums, const float* partial) { return _mm512_add_ps(sums, _mm512_loadu_ps(partial)); }
  static void keep_partial(float* partial, __m512 sums) { _mm512_storeu_ps(partial, sums); }

  static void store_tokens(float* y, int64_t stride, __m512 sums) {
    _mm_storeu_ps(y, _mm512_castps512_ps128(sums));
    _mm_storeu_ps(y + stride, _mm512_extractf32x4_ps(sums, 1));
    _mm_storeu_ps(y + 2 * stride, _mm512_extractf32x4_ps(sums, 2));
    _mm_storeu_ps(y + 3 * stride, _mm512_extractf32x4_ps(sums, 3));
  }
  static void store_tokens(uint16_t* y, int64_t stride, __m512 sums) {
    const __m512i bits = _mm512_castps_si512(sums);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(sums, sums, _CMP_UNORD_Q);
    const __m512i all = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x00400000));
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16));
    const __m128i low = _mm256_castsi256_si128(halves), high = _mm256_extracti128_si256(halves, 1);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(y), low);
    _mm_storeh_pd(reinterpret_cast<double*>(y + stride), _mm_castsi128_pd(low));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(y + 2 * stride), high);
    _mm_storeh_pd(reinterpret_cast<double*>(y + 3 * stride), _mm_castsi128_pd(high));
  }

  template <class Weight>
  static void store(Weight* y, int64_t stride, __m512 sums, const Weight* bias, int64_t rows) {
    if (rows < 4) {
      float each[16];
      _mm512_storeu_ps(each, sums);
      for (int t = 0; t < 4; ++t) store(y + t * stride, stride, _mm_loadu_ps(each + 4 * t), bias, rows);
      return;
    }
    store_tokens(y, stride, bias ? _mm512_add_ps(sums, _mm512_broadcast_f32x4(load4(bias))) : sums);
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
  static __m512 load_part(const float* from) { return _mm512_loadu_ps(from); }
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
  static __m512i load_part(const uint16_t* from) { return load_bits(from); }
  static void store_part(uint16_t* to, __m512i part) { _mm512_storeu_si512(to, part); }
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
  static __m512 load_part(const float* from) { return _mm512_loadu_ps(from); }
  static void store_part(float* to, __m512 part) { _mm512_storeu_ps(to, part); }
  static Sum multiply_add(__m512 w, __m512 x, Sum sum) { return _mm512_fmadd_ps(w, x, sum); }
};

}  // namespace
}  // namespace cpu
