#include "host/cpu_level.h"

#include <cstdlib>
#include <cstring>

#ifdef LOWFAT_X86
#include <cpuid.h>
#endif

namespace {

CpuLevel detect() {
#ifdef LOWFAT_X86
  // The compiler's check includes the operating system's: registers that it does not save count as absent.
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
  if (has_avx512) return CpuLevel::avx512_bf16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::avx2_fma;
#endif
  return CpuLevel::scalar;
}

CpuLevel choose() {
  const CpuLevel best = detect();
  CpuLevel wanted = best;
  const char* asked = std::getenv("LOWFAT_CPU_LEVEL");
  return asked && parse_cpu_level(asked, wanted) && wanted < best ? wanted : best;
}

}  // namespace

const char* name_of(CpuLevel level) {
  switch (level) {
    case CpuLevel::avx512_bf16: return "avx512_bf16";
    case CpuLevel::avx2_fma: return "avx2_fma";
    default: return "scalar";
  }
}

bool parse_cpu_level(const char* name, CpuLevel& level) {
  for (CpuLevel candidate : kCpuLevels) {
    if (std::strcmp(name, name_of(candidate)) == 0) {
      level = candidate;
      return true;
    }
  }
  return false;
}

CpuLevel cpu_level() {
  static const CpuLevel level = choose();
  return level;
}

bool cpu_has_tiles() {
#ifdef LOWFAT_X86
  constexpr unsigned kAmxBf16 = 1u << 22;  // of EDX, leaf 7
  static const bool has = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBf16);
  }();
  return has;
#else
  return false;
#endif
}
