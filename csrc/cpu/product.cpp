// Chooses the kernel of a product, and what writes out masked rows, by the processor's level.
#include "cpu/product.h"

#include "cpu/expand.h"

namespace cpu {
namespace {

#ifdef LOWFAT_X86
// Expanding 16-bit numbers takes VBMI2, which one family with AVX-512 BF16 has not (Cooper Lake).
bool has_vbmi2(CpuLevel level) {
  static const bool has = __builtin_cpu_supports("avx512vbmi2");
  return level == CpuLevel::avx512_bf16 && has;
}
#endif

template <class T>
void expand_words(const uint32_t* mask, const void* values, int64_t stored, int64_t depth, void* to) {
  int64_t next = 0;
  for (int64_t d = 0; d < depth; d += 32)
    next = expand_word(mask[d / 32], static_cast<const T*>(values), next, stored, d, depth, static_cast<T*>(to));
}

}  // namespace

Kernel kernel([[maybe_unused]] CpuLevel level, Dtype dtype, [[maybe_unused]] int64_t m) {
#ifdef LOWFAT_X86
  if (level == CpuLevel::avx512_bf16) return kernel_avx512(dtype, m);
  if (level == CpuLevel::avx2_fma) return kernel_avx2(dtype);
#endif
  return kernel_scalar(dtype);
}

Kernel masked_kernel([[maybe_unused]] CpuLevel level, Dtype dtype, int64_t m) {
#ifdef LOWFAT_X86
  if (has_vbmi2(level)) return masked_kernel_vbmi2(dtype, m);
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

ExpandMask expand_mask([[maybe_unused]] CpuLevel level, int64_t bytes) {
#ifdef LOWFAT_X86
  if (bytes <= 4 && has_vbmi2(level)) return expand_mask_vbmi2(bytes);
#endif
  return bytes == 2 ? &expand_words<uint16_t> : bytes == 4 ? &expand_words<uint32_t> : &expand_words<uint64_t>;
}

}  // namespace cpu
