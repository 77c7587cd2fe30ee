// The sparse products of low_rank_sparse for any CPU: no instruction beyond the compiler's baseline.
#include "low_rank_sparse/low_rank_sparse_cpu_kernels.h"

namespace low_rank_sparse {
namespace {

struct Scalar {
  using Vector = Float4;
  static constexpr int kSums = 8, kEntries = 4;

  template <int kCount>
  static void add_totals(const Vector (&sums)[kCount], float* to) {
    for (int i = 0; i < kCount; ++i) to[i] += (sums[i][0] + sums[i][1]) + (sums[i][2] + sums[i][3]);
  }

  template <class Element, class Index>
  static void read(const Element* values, const Index* columns, uint32_t k, List& list) {
    read_entries(values, columns, k, list);
  }

  static float gathered(const List& list, const float* x) {
    float sums[4] = {};
    for (int64_t j = 0; j < list.count; ++j) sums[j % 4] += list.values[j] * x[list.places[j]];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

}  // namespace

const Kernels& kernels_scalar() { return kKernels<Scalar>; }

}  // namespace low_rank_sparse
