// Decode with AVX2 and FMA: 8 floats at a time; bf16 becomes float by a shift or a mask, 8 even and 8 odd numbers of 16.
#include <immintrin.h>

#include "cpu/store_x86.h"

namespace cpu {
namespace {

// 8 sums, 4 weights and one x of the 16 registers.
struct Avx2 : FourSums {
  static constexpr int kRows = 4, kTokens = 2, kTogether = 1;
  using Sum = __m256;

  static Sum zero() { return _mm256_setzero_ps(); }
  static __m256 load_part(const float* from) { return _mm256_loadu_ps(from); }
  static void store_part(float* to, __m256 part) { _mm256_storeu_ps(to, part); }
  static Sum multiply_add(__m256 w, __m256 x, Sum sum) { return _mm256_fmadd_ps(w, x, sum); }
  template <int>
  static __m128 reduce(const Sum (*tokens)[4]) {
    const Sum(&v)[4] = *tokens;
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));  // a b c d in both halves
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  }
};

struct Avx2Float : Avx2, Packed<Avx2Float, 8> {
  static constexpr int kStep = 8, kParts = 1;
  using Weight = float;
  struct Wide {
    __m256 part[1];
  };

  static Wide load(const float* p) { return {{_mm256_loadu_ps(p)}}; }
  static Wide load_tail(const float* p, int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {{_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane))}};
  }
  template <int>
  static __m256 load_x(const float* p, int64_t) { return _mm256_loadu_ps(p); }
};

struct Avx2Bf16 : Avx2, Packed<Avx2Bf16, 16> {
  static constexpr int kStep = 16, kParts = 2;
  using Weight = uint16_t;
  struct Wide {
    __m256 part[2];  // even, odd
  };

  static Wide load(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
             _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000))))}};
  }
  static Wide load_tail(const uint16_t* p, int64_t count) {  // AVX2 has no masked load of 16-bit numbers
    uint16_t padded[kStep] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
    return load(padded);
  }
  template <int kPart>
  static __m256 load_x(const float* p, int64_t) { return _mm256_loadu_ps(p + 8 * kPart); }
};

}  // namespace

Kernel kernel_avx2(Dtype dtype) { return dtype == Dtype::float32 ? kernel_of<Avx2Float>() : kernel_of<Avx2Bf16>(); }

}  // namespace cpu
