#include "host/cpu_level.h"

#include <cstdlib>
#include <cstring>

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
