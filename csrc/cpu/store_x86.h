// Four finished sums of neighbouring rows to y: bias, rounding, the last ragged tile. For the AVX2 and AVX-512 files alike.
#pragma once

#include <immintrin.h>

#include "cpu/multiply.h"

namespace cpu {
namespace {

// Rounding in integers, not by vcvtneps2bf16: that instruction flushes subnormal results, which y and h may hold.
inline __m128i round_to_bf16(__m128 value) {
  const __m128i bits = _mm_castps_si128(value);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i rounded = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd);
  const __m128i quiet = _mm_or_si128(bits, _mm_set1_epi32(0x00400000));
  const __m128i is_nan = _mm_castps_si128(_mm_cmpunord_ps(value, value));
  return _mm_srli_epi32(_mm_blendv_epi8(rounded, quiet, is_nan), 16);
}

inline __m128 load4(const float* p) { return _mm_loadu_ps(p); }
inline __m128 load4(const uint16_t* p) {
  return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline void store4(float* y, __m128 sums) { _mm_storeu_ps(y, sums); }
inline void store4(uint16_t* y, __m128 sums) {
  const __m128i rounded = round_to_bf16(sums);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(y), _mm_packus_epi32(rounded, rounded));
}

// The part of V that is the same for both: four sums are one __m128.
struct FourSums {
  static __m128 scaled(__m128 sums, float scale) { return _mm_mul_ps(sums, _mm_set1_ps(scale)); }
  static __m128 add_partial(__m128 sums, const float* partial) { return _mm_add_ps(sums, _mm_loadu_ps(partial)); }
  static void keep_partial(float* partial, __m128 sums) { _mm_storeu_ps(partial, sums); }

  template <class Weight>
  static void store(Weight* y, int64_t, __m128 sums, const Weight* bias, int64_t rows) {
    if (rows == 4) return store4(y, bias ? _mm_add_ps(sums, load4(bias)) : sums);
    float each[4];
    _mm_storeu_ps(each, sums);
    for (int64_t i = 0; i < rows; ++i) store_one(y + i, each[i], bias ? bias + i : nullptr);
  }
};

}  // namespace
}  // namespace cpu
