// What the CPU parts of monarch share: y = blocks of rank r.
//   x [m, k]   v [b_in, b_out r, p]   u [b_out, s, b_in r]   h [b_out, m, b_in r]   y [m, n]
#pragma once

#include <cstdint>

#include "cpu/config.h"

namespace monarch {

using CpuPath = cpu::Path;

struct CpuConfig {
  CpuPath path = CpuPath::library;
  int64_t first_grain = 0;   // input blocks per task; 0: one thread does all
  int64_t second_grain = 0;  // output blocks per task; 0: one thread does all
  int64_t first_group = 0;   // input blocks whose products wait for each other before they go to h
  int64_t second_group = 0;  // output blocks whose products wait for each other before they go to y
};

CpuConfig choose_cpu_config(const Problem& problem);

}  // namespace monarch
