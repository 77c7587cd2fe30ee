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

Kernel masked_kernel([[maybe_unused]] CpuLevel level, Dtype dtype, int64_t m) {
#ifdef LOWFAT_X86
  // Expanding 16-bit numbers takes VBMI2, which one family with AVX-512 BF16 has not (Cooper Lake).
  static const bool has_vbmi2 = __builtin_cpu_supports("avx512vbmi2");
  if (level == CpuLevel::avx512_bf16 && has_vbmi2) return masked_kernel_vbmi2(dtype, m);
  if (level >= CpuLevel::avx2_fma) return masked_kernel_avx2(dtype, m);
#endif
  return masked_kernel_scalar(dtype, m);
}

Kernel positions_kernel([[maybe_unused]] CpuLevel level, Dtype dtype, int64_t m) {
#ifdef LOWFAT_X86
  if (level == CpuLevel::avx512_bf16) return positions_kernel_avx512(dtype, m);
  if (level == CpuLevel::avx2_fma) return positions_kernel_avx2(dtype, m);
#endif
  return positions_kernel_scalar(dtype, m);
}

}  // namespace cpu
