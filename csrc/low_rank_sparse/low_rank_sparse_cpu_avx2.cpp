// The sparse products of low_rank_sparse with AVX2 and FMA.
#include <immintrin.h>

#include "low_rank_sparse/low_rank_sparse_cpu_kernels.h"

namespace low_rank_sparse {
namespace {

struct Avx2 {
  using Vector = __m256;
  static constexpr int kSums = 8, kEntries = 4;

  static __m128 folded(Vector v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

  template <int kCount>
  static void add_totals(const Vector (&sums)[kCount], float* to) {
    if constexpr (kCount == 4) {
      const Vector pairs = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
      _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), folded(pairs)));
    } else {
      *to += total(sums[0]);
    }
  }

  static float total(Vector v) {
    const __m128 four = folded(v), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  template <class Element, class Index>
  static void read(const Element* values, const Index* columns, uint32_t k, List& list) {
    read_entries(values, columns, k, list);
  }

  static float gathered(const List& list, const float* x) {
    Vector sums[2] = {};
    int64_t j = 0;
    for (int64_t i = 0; j + 8 <= list.count; j += 8, i ^= 1) {
      const __m256i places = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(list.places + j));
      sums[i] = _mm256_fmadd_ps(_mm256_loadu_ps(list.values + j), _mm256_i32gather_ps(x, places, 4), sums[i]);
    }
    float sum = total(_mm256_add_ps(sums[0], sums[1]));
    for (; j < list.count; ++j) sum += list.values[j] * x[list.places[j]];
    return sum;
  }
};

}  // namespace

const Kernels& kernels_avx2() { return kKernels<Avx2>; }

}  // namespace low_rank_sparse
