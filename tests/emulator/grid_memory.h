// Flags and counters in global memory, and grids that depend on the one before.
#pragma once

#include "memory.h"

namespace emulator {

template <class T>
T load_acquire(const T* gmem) {
  check_aligned(gmem, sizeof(T), "load_acquire");
  check_global(gmem, sizeof(T), false, "load_acquire");
  poll("load_acquire");
  current().has_fenced_global = false;
  return *gmem;
}

template <class T>
T add(T* gmem, T v, const char* what) {
  check_aligned(gmem, sizeof(T), what);
  check_global(gmem, sizeof(T), true, what);
  const T old = *gmem;
  *gmem += v;
  progress();
  poll(what);  // others run between this atomic operation and whatever follows
  return old;
}

template <class T>
void store_flag(T* gmem, T v, const char* what) {
  check_aligned(gmem, sizeof(T), what);
  check_global(gmem, sizeof(T), true, what);
  *gmem = v;
  progress();
}

inline void wait_for_dependency() {
  current().has_fenced_global = false;
  Grid& grid = *current_block().grid;
  if (!grid.is_dependent || !grid.previous || grid.previous->is_complete) return;
  grid.previous->waiting.push_back(machine.current);
  wait_for("wait_for_dependency");
}

inline void launch_dependents() {
  Block& block = current_block();
  if (block.has_triggered) return;
  block.has_triggered = true;
  ++block.grid->triggered_blocks;
}

}  // namespace emulator
