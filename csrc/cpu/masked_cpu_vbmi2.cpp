// Decode of masked weights with AVX-512 and VBMI2: one instruction spreads what is kept to where it belongs.
//
// bf16 has two kernels, as without a mask (product_cpu_avx512.cpp): with m <= 4, where w streams by, vdpbf16ps, which takes
// subnormal numbers as zero. Its x is half as long as floats are: 32 KB for four rows of 4096, all of it in the L1 cache.
#include "cpu/avx512.h"
#include "cpu/masked.h"

namespace cpu {
namespace {

struct ExpandFloats {
  static int count(uint32_t bits) { return __builtin_popcount(bits); }
  static Avx512Float::Wide expand(uint32_t bits, const float* values) {
    return {{_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), _mm512_loadu_ps(values))}};
  }
};

struct ExpandPairs {
  static int count(uint32_t bits) { return __builtin_popcount(bits); }
  static Avx512Bf16Pairs::Wide expand(uint32_t bits, const uint16_t* values) {
    return {{_mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values))}};
  }
};

struct ExpandWide {
  static int count(uint32_t bits) { return __builtin_popcount(bits); }
  static Avx512Bf16Wide::Wide expand(uint32_t bits, const uint16_t* values) {
    return Avx512Bf16Wide::widen(_mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values)));
  }
};

}  // namespace

Kernel masked_kernel_vbmi2(Dtype dtype, int64_t m) {
  if (dtype == Dtype::float32) return masked_kernel_of<Avx512Float, ExpandFloats>(m);
  return m <= kStreamTokens ? stream_of<Streamed<Avx512Bf16Pairs, ExpandPairs, uint16_t>>(m)
                            : kernel_of<Grouped<Avx512Bf16Wide, ExpandWide>>();
}

}  // namespace cpu
