// The counters of barriers of whole grids (device/grid.h).
#pragma once

#include <cstdint>

// For grids of one size on one stream of the current device: grids that run at the same time must not share one, they would
// let each other through. Null when there are no more, or, with `error` set, when CUDA says that something is wrong.
uint64_t* grid_counter(int device, void* stream, int grid, const char*& error);
