// What the CPU parts of dictionary share.   x [m, k]   d [P, Q, a, p]   values [n, Q s]   h [P, m, Q a]   y [m, n]
#pragma once

#include <cstdint>

#include "cpu/config.h"

namespace dictionary {

using CpuPath = cpu::Path;

struct CpuConfig {
  CpuPath path = CpuPath::library;
  int64_t first_grain = 0;   // rows of d per task; 0: one thread does all
  int64_t second_grain = 0;  // rows of values per task; 0: one thread does all
};

CpuConfig choose_cpu_config(const Problem& problem);

}  // namespace dictionary
