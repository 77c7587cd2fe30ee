// How wavelet's ops compute on a CPU: haar, one level, factors for each pair.
#pragma once

#include <cstdint>

#include "cpu/config.h"

namespace wavelet {

enum class CpuPath { empty, decode, folded, halves, reference };

CpuPath choose_cpu_path(const Problem& problem);
CpuPath choose_cpu_backward_path(const Problem& problem);

}  // namespace wavelet
