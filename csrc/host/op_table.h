// What this build has a compiled kernel for, and how each op chooses among its configurations. Filled by
// csrc/<op>/config.cpp, read by the Python module _C: a new op needs no line anywhere else.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "host/cpu_level.h"

enum class Dtype { float32, bfloat16, float16, float64, other };
enum class Device { cpu, cuda };

// One question to choose_config. Each op reads the sizes that it has.
struct Problem {
  int64_t m = 0, n = 0, k = 0, r = 0;
  Dtype dtype = Dtype::bfloat16;
  Device device = Device::cpu;
  CpuLevel level = CpuLevel::scalar;  // device cpu
  int arch = 90, sm_count = 132;      // device cuda: 80 for compute capability 8.0; multiprocessors
  bool is_aligned = true;             // device cuda: operands start at multiples of 16 bytes
  int members = 1;                    // of a group, all with these sizes
  int64_t b_in = 1, b_out = 1;        // blocks of k and of n; r is then the rank of a block
  bool interleave = true;             // outputs of a block are b_out apart, and no run
  int64_t kept = 2, group = 4;        // of every group this many are kept; of r atoms and every row, where there are atoms
  int64_t entries = 0;                // of a sparse part, in all
  int64_t pairs = 2;                  // of subbands, each with factors of its own
  bool has_tiles = false;             // device cpu: the library multiplies tiles of bfloat16
};

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

inline Problem on_this_cpu(Problem problem) {
  problem.level = cpu_level(), problem.has_tiles = cpu_has_tiles();
  return problem;
}

using Described = std::vector<std::pair<std::string, std::variant<int64_t, std::string>>>;  // a configuration, printable

struct Op {
  std::string name;
  std::vector<std::string> cpu;   // compiled levels, best first
  std::vector<std::string> cuda;  // compiled architectures
  Described (*choose_config)(const Problem&);
};

std::vector<Op>& op_table();

struct RegisterOp {
  explicit RegisterOp(Op op) { op_table().push_back(std::move(op)); }
};

std::vector<std::string> compiled_cpu_levels();
std::vector<std::string> compiled_cuda_archs();  // empty in a build without CUDA

// Whether kernels that are nothing but machine code for an sm_90 can run there; a build without CUDA plans as if they could.
bool has_sm90_kernels();
