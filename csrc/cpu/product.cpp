// Chooses the kernel of a product by the processor's level.
#include "cpu/product.h"

namespace cpu {

Kernel kernel([[maybe_unused]] CpuLevel level, Dtype dtype, [[maybe_unused]] int64_t m) {
#ifdef LOWFAT_X86
  if (level == CpuLevel::avx512_bf16) return kernel_avx512(dtype, m);
  if (level == CpuLevel::avx2_fma) return kernel_avx2(dtype);
#endif
  return kernel_scalar(dtype);
}

}  // namespace cpu
