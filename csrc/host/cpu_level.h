// Which instruction sets CPU kernels may use on this machine, decided once per process.
#pragma once

// Ordered: a level includes the ones before it.
enum class CpuLevel { scalar, avx2_fma, avx512_bf16 };

constexpr CpuLevel kCpuLevels[] = {CpuLevel::avx512_bf16, CpuLevel::avx2_fma, CpuLevel::scalar};  // best first

const char* name_of(CpuLevel level);
bool parse_cpu_level(const char* name, CpuLevel& level);

// The best level that this CPU has and this build contains. LOWFAT_CPU_LEVEL lowers it; a value that names no level is
// ignored here, because Python has refused it at import.
CpuLevel cpu_level();

// Whether this CPU multiplies tiles of bfloat16 (AMX), which the library's products use and ours do not.
bool cpu_has_tiles();
