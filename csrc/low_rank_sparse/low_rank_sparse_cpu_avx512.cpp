// The sparse products of low_rank_sparse with AVX-512.
#include "cpu/avx512.h"
#include "low_rank_sparse/low_rank_sparse_cpu_kernels.h"

namespace low_rank_sparse {
namespace {

struct Avx512 {
  using Vector = __m512;
  static constexpr int kSums = 8, kEntries = 16;

  template <int kCount>
  static void add_totals(const Vector (&sums)[kCount], float* to) {
    if constexpr (kCount == 16) {
      const Vector totals = cpu::Avx512::reduce<4>(reinterpret_cast<const Vector(*)[4]>(sums));
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), totals));
    } else if constexpr (kCount == 4) {
      _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), cpu::Avx512::reduce<1>(&sums)));
    } else {
      *to += _mm512_reduce_add_ps(sums[0]);
    }
  }

  static __mmask16 first(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1); }

  static Vector load(__mmask16 which, const float* p) { return _mm512_maskz_loadu_ps(which, p); }
  static Vector load(__mmask16 which, const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, p)), 16));
  }
  static __m512i load(__mmask16 which, const int32_t* p) { return _mm512_maskz_loadu_epi32(which, p); }
  static __m512i load(__mmask16 which, const int16_t* p) {
    return _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(which, p));
  }

  // Zeros behind the last one.
  template <class Element, class Index>
  static void read(const Element* values, const Index* columns, uint32_t k, List& list) {
    const __m512i end = _mm512_set1_epi32(static_cast<int>(k));
    for (int64_t j = 0; j < list.count; j += 16) {
      const __mmask16 here = first(list.count - j);
      const __m512i at = load(here, columns + j);
      const __mmask16 there = _mm512_mask_cmplt_epu32_mask(here, at, end);
      _mm512_store_si512(list.places + j, _mm512_maskz_mov_epi32(there, at));
      _mm512_store_ps(list.values + j, load(there, values + j));
    }
  }

  static float gathered(const List& list, const float* x) {
    Vector sums[2] = {};
    for (int64_t j = 0, i = 0; j < list.count; j += 16, i ^= 1) {
      const __m512i places = _mm512_load_si512(list.places + j);
      const Vector zeros = _mm512_setzero_ps();
      const Vector inputs = _mm512_mask_i32gather_ps(zeros, first(list.count - j), places, x, 4);
      sums[i] = _mm512_fmadd_ps(_mm512_load_ps(list.values + j), inputs, sums[i]);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
  }
};

}  // namespace

const Kernels& kernels_avx512() { return kKernels<Avx512>; }

}  // namespace low_rank_sparse
