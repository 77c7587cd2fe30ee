#include "host/op_table.h"

#include <algorithm>
#include <sstream>

#include "build_info.h"

std::vector<Op>& op_table() {
  static std::vector<Op> table;  // inside the function: the ops register themselves before main, in any order
  return table;
}

std::vector<std::string> compiled_cpu_levels() {
#ifdef LOWFAT_X86
  std::vector<std::string> names;
  for (CpuLevel level : kCpuLevels) names.emplace_back(name_of(level));
  return names;
#else
  return {name_of(CpuLevel::scalar)};
#endif
}

std::vector<std::string> compiled_cuda_archs() {
  std::istringstream archs(LOWFAT_BUILT_ARCHS);  // "80-real 90a-real 90-virtual"
  std::vector<std::string> names;
  for (std::string arch; archs >> arch;) {
    const auto dash = arch.find('-');
    const bool is_virtual = dash != std::string::npos && arch.substr(dash) == "-virtual";
    names.push_back((is_virtual ? "compute_" : "sm_") + arch.substr(0, dash));
  }
  return names;
}

bool has_sm90_kernels() {
  static const std::vector<std::string> archs = compiled_cuda_archs();
  return archs.empty() || std::find(archs.begin(), archs.end(), "sm_90a") != archs.end();
}
