// What threads do together: barriers of a block, and operations of the 32 lanes of a warp or the 128 of a warpgroup.
#pragma once

#include "memory.h"

namespace emulator {

inline void sync_block() {
  Block& block = current_block();
  Barrier& barrier = block.barriers[0];
  if (++barrier.arrived >= block.threads - block.ended) {
    barrier.arrived = 0;
    wake(barrier.waiting);
    return;
  }
  barrier.waiting.push_back(machine.current);
  wait_for("__syncthreads");
}

// One arrival at a named barrier; true: it was the last.
inline bool arrive_named(int id, int threads, const char* what) {
  if (id < 1 || id > 15) fail("%s: barrier %d is not one of 1..15", what, id);
  if (threads % 32 || threads < 32) fail("%s: %d threads are not whole warps", what, threads);
  Barrier& barrier = current_block().barriers[id];
  if (barrier.arrived && barrier.expected != threads) {
    fail("%s: barrier %d is used for %d and for %d threads", what, id, barrier.expected, threads);
  }
  barrier.expected = threads;
  if (++barrier.arrived < threads) return false;
  barrier.arrived = 0;
  wake(barrier.waiting);
  return true;
}

inline void sync_named(int id, int threads) {
  if (arrive_named(id, threads, "barrier_sync")) return;
  current_block().barriers[id].waiting.push_back(machine.current);
  wait_for("barrier_sync", id, threads);
}

// All lanes must come, with the same operation; the last one calls compute(lanes), lanes[i] pointing to lane i's values.
template <class Values, class Compute>
void meet(Rendezvous& r, int size, const char* what, int detail, Values& values, const Compute& compute) {
  const int lane = current().thread % size;
  if (r.arrived && (strcmp(r.what, what) || r.detail != detail)) {
    fail("divergence: lane %d is at %s (%d) while others of its %s are at %s (%d)", lane, what, detail,
         size == 32 ? "warp" : "warpgroup", r.what, r.detail);
  }
  r.what = what;
  r.detail = detail;
  r.fiber[lane] = machine.current;
  r.lane[lane] = &values;
  if (++r.arrived < size) return wait_for(what, 0, detail);
  r.arrived = 0;
  Values* lanes[128];
  for (int i = 0; i < size; ++i) lanes[i] = static_cast<Values*>(r.lane[i]);
  compute(lanes);
  for (int i = 0; i < size; ++i) {
    if (i != lane) wake(r.fiber[i]);
  }
}

template <class Values, class Compute>
void meet_warp(const char* what, int detail, Values& values, const Compute& compute) {
  meet(current_block().warps[current().thread / 32], 32, what, detail, values, compute);
}

template <class Values, class Compute>
void meet_warpgroup(const char* what, int detail, Values& values, const Compute& compute) {
  Block& block = current_block();
  const int group = current().thread / 128;
  if (group * 128 + 128 > block.threads) fail("%s: the last warpgroup of the block is not whole", what);
  meet(block.warpgroups[group], 128, what, detail, values, compute);
}

inline void sync_warp() {
  int nothing = 0;
  meet_warp("__syncwarp", 0, nothing, [](int**) {});
}

// The value of lane source(lane).
template <class T, class Source>
T shuffle(const char* what, int detail, unsigned mask, T value, const Source& source) {
  if (mask != 0xffffffffu) fail("%s: only whole warps", what);
  struct Values {
    T mine, other;
  } values{value, value};
  meet_warp(what, detail, values, [&](Values** lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->other = lanes[source(i)]->mine;
  });
  return values.other;
}

}  // namespace emulator

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp() { emulator::sync_warp(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return emulator::shuffle("__shfl_xor_sync", with, mask, value, [&](int lane) { return lane ^ with; });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulator::shuffle("__shfl_sync", from, mask, value, [&](int) { return from & 31; });
}
