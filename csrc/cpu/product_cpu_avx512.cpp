// Decode with AVX-512.
//
// bf16 has two kernels. On the CPU this was written on (Sapphire Rapids class) vdpbf16ps does 42 G multiply-adds a
// second and fma 87: from m = 3 on, where arithmetic shows, weights are widened to float, and x was before. At m <= 2
// memory is all there is; vdpbf16ps needs no widening and is 5 % faster. It takes subnormal bf16 numbers as zero, and makes
// sums that are subnormal zero, as torch's bf16 matmul does there. The ops' docstrings say so.
#include "cpu/avx512.h"
#include "cpu/positions.h"

namespace cpu {

Kernel kernel_avx512(Dtype dtype, int64_t m) {
  if (dtype == Dtype::float32) return kernel_of<Avx512Float>();
  return m <= 2 ? kernel_of<Avx512Bf16Pairs>() : kernel_of<Avx512Bf16Wide>();
}

Kernel positions_kernel_avx512(Dtype dtype, int64_t m) {
  return dtype == Dtype::float32 ? positions_kernel_of<float>(m) : positions_kernel_of<uint16_t>(m);
}

}  // namespace cpu
