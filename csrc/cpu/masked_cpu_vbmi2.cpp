// Masked weights with AVX-512 and VBMI2, decoded and written out: one instruction spreads what is kept to where it belongs.
//
// bf16 has two kernels, as without a mask (product_cpu_avx512.cpp): with m <= 4, where w streams by, vdpbf16ps, which takes
// subnormal numbers as zero. Its x is half as long as floats are: 32 KB for four rows of 4096, all of it in the L1 cache.
#include "cpu/avx512.h"
#include "cpu/expand.h"
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

void expand_32(uint32_t bits, const uint16_t* values, uint16_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_expandloadu_epi16(bits, values));  // reads no more than there are bits
}

void expand_32(uint32_t bits, const uint32_t* values, uint32_t* to) {
  const auto low = static_cast<__mmask16>(bits), high = static_cast<__mmask16>(bits >> 16);
  _mm512_storeu_si512(to, _mm512_maskz_expandloadu_epi32(low, values));
  _mm512_storeu_si512(to + 16, _mm512_maskz_expandloadu_epi32(high, values + __builtin_popcount(low)));
}

template <class T>
void expand_words(const uint32_t* mask, const void* values, int64_t stored, int64_t depth, void* to) {
  const auto* from = static_cast<const T*>(values);
  int64_t next = 0;
  for (int64_t d = 0; d < depth; d += 32) {
    const uint32_t bits = mask[d / 32];
    const int64_t after = next + __builtin_popcount(bits);
    if (d + 32 > depth || after > stored) {
      next = expand_word(bits, from, next, stored, d, depth, static_cast<T*>(to));
    } else {
      expand_32(bits, from + next, static_cast<T*>(to) + d);
      next = after;
    }
  }
}

}  // namespace

ExpandMask expand_mask_vbmi2(int64_t bytes) { return bytes == 2 ? &expand_words<uint16_t> : &expand_words<uint32_t>; }

Kernel masked_kernel_vbmi2(Dtype dtype, int64_t m) {
  if (dtype == Dtype::float32) return masked_kernel_of<Avx512Float, ExpandFloats>(m);
  return m <= kStreamTokens ? stream_of<Streamed<Avx512Bf16Pairs, ExpandPairs, uint16_t>>(m)
                            : kernel_of<Grouped<Avx512Bf16Wide, ExpandWide>>();
}

}  // namespace cpu
