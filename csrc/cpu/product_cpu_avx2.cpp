// Decode with AVX2 and FMA: 8 floats at a time; bf16 becomes float by a shift or a mask, 8 even and 8 odd numbers of 16.
#include <immintrin.h>

#include "cpu/masked.h"
#include "cpu/positions.h"
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

// Masked weights: a byte of the mask names one of 256 ways to spread 8 numbers.
struct Places {
  uint64_t of[256];  // of each lane the number that it gets, in a byte

  constexpr Places() : of() {
    for (uint64_t bits = 0; bits < 256; ++bits) {
      uint64_t next = 0;
      for (uint64_t lane = 0; lane < 8; ++lane) {
        of[bits] |= next << (8 * lane);
        next += bits >> lane & 1;
      }
    }
  }
};
constexpr Places kPlaces;

inline __m256 spread(uint32_t bits, __m256 values) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes), lanes);
  const __m128i places = _mm_cvtsi64_si128(static_cast<long long>(kPlaces.of[bits]));
  const __m256 spread = _mm256_permutevar8x32_ps(values, _mm256_cvtepu8_epi32(places));
  return _mm256_and_ps(spread, _mm256_castsi256_ps(kept));
}

struct ExpandFloats {
  static int count(uint32_t bits) { return __builtin_popcount(bits); }
  static Avx2Float::Wide expand(uint32_t bits, const float* values) { return {{spread(bits, _mm256_loadu_ps(values))}}; }
};

// bf16 in halves of 8 instead of even and odd numbers: each is spread for itself.
struct Avx2Bf16Halves : Avx2, Packed<Avx2Bf16Halves, 16> {
  static constexpr int kStep = 16, kParts = 2;
  using Weight = uint16_t;
  struct Wide {
    __m256 part[2];
  };

  static __m256 load8(const uint16_t* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static Wide load(const uint16_t* p) { return {{load8(p), load8(p + 8)}}; }
  static Wide load_tail(const uint16_t* p, int64_t count) {
    uint16_t padded[kStep] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
    return load(padded);
  }
  template <int kPart>
  static __m256 load_x(const float* p, int64_t) { return _mm256_loadu_ps(p + 8 * kPart); }
};

struct ExpandHalves {
  static int count(uint32_t bits) { return __builtin_popcount(bits); }
  static Avx2Bf16Halves::Wide expand(uint32_t bits, const uint16_t* values) {
    const uint32_t low = bits & 0xff;
    return {{spread(low, Avx2Bf16Halves::load8(values)),
             spread(bits >> 8, Avx2Bf16Halves::load8(values + __builtin_popcount(low)))}};
  }
};

}  // namespace

Kernel masked_kernel_avx2(Dtype dtype, int64_t m) {
  return dtype == Dtype::float32 ? masked_kernel_of<Avx2Float, ExpandFloats>(m)
                                 : masked_kernel_of<Avx2Bf16Halves, ExpandHalves>(m);
}

Kernel kernel_avx2(Dtype dtype) { return dtype == Dtype::float32 ? kernel_of<Avx2Float>() : kernel_of<Avx2Bf16>(); }

Kernel positions_kernel_avx2(Dtype dtype, int64_t m) {
  return dtype == Dtype::float32 ? positions_kernel_of<float>(m) : positions_kernel_of<uint16_t>(m);
}

}  // namespace cpu
