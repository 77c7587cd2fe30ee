// What the CPU parts of sparse24 share.   x [m, k]   values [n, k kept / group]   y [m, n]
#pragma once

#include <cstdint>

#include "cpu/config.h"

namespace sparse24 {

using CpuPath = cpu::Path;

struct CpuConfig {
  CpuPath path = CpuPath::library;
  int64_t row_tile = 0;  // rows whose sums are finished together
  int64_t grain = 0;     // row tiles per task; 0: one thread does all
};

CpuConfig choose_cpu_config(const Problem& problem);

}  // namespace sparse24
