// Launches wait here until emulator::synchronize() runs them.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include "memory.h"

namespace emulator {

// The kernel's name in the symbol table, where it is if the kernel is in no anonymous namespace and the program was linked
// with -rdynamic; nvcc's is the same.
inline std::string mangled_name(void* kernel) {
  Dl_info info;
  return dladdr(kernel, &info) && info.dli_sname ? info.dli_sname : "unnamed_kernel";
}

inline std::string readable_name(const std::string& mangled) {
  int status = 0;
  char* readable = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  const std::string name = status == 0 ? readable : mangled;
  free(readable);
  const size_t begin = name.compare(0, 5, "void ") == 0 ? 5 : 0;  // templates' names start with what they return
  return name.substr(begin, name.find('(', begin) - begin);
}

template <class Launch>
void enqueue(void* kernel, const Launch& shape, std::function<void()> body) {
  static uint64_t launches = 0;
  auto grid = std::make_unique<Grid>();
  grid->number = ++launches;
  const std::string mangled = mangled_name(kernel);
  machine.kernels_run.insert(mangled);
  grid->name = readable_name(mangled);
  grid->size = shape.grid;
  grid->threads = shape.threads;
  grid->smem_bytes = shape.smem_bytes;
  grid->cluster = shape.cluster;
  grid->is_cooperative = shape.is_cooperative;
  grid->is_dependent = shape.is_dependent;
  grid->body = std::move(body);
  grid->blocks = static_cast<int>(shape.grid.x * shape.grid.y * shape.grid.z);
  const char* name = grid->name.c_str();
  if (grid->blocks < 1) fail("launch of %s: no blocks; CUDA calls this an invalid configuration", name);
  if (shape.threads < 32 || shape.threads > 1024 || shape.threads % 32)
    fail("launch of %s: %d threads", name, shape.threads);
  if (shape.smem_bytes > kSharedLimit) fail("launch of %s: %zu bytes of shared memory", name, shape.smem_bytes);
  if (shape.cluster < 1 || shape.cluster > 8 || shape.grid.x % shape.cluster) {
    fail("launch of %s: clusters of %d in a grid of %u blocks", name, shape.cluster, shape.grid.x);
  }
  grid->previous = machine.grids.empty() ? nullptr : machine.grids.back().get();
  for (int i = 0; i < grid->blocks / grid->cluster; ++i) grid->unstarted.push_back(i);
  grid->clusters.resize(grid->unstarted.size());
  machine.unstarted_clusters += static_cast<int>(grid->unstarted.size());
  ++machine.incomplete_grids;
  machine.grids.push_back(std::move(grid));
}

}  // namespace emulator
