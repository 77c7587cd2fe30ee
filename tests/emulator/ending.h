// What threads and blocks must not leave behind when they end.
#pragma once

#include "bulk.h"

namespace emulator {

inline void end_thread() {
  Fiber& self = current();
  if (!self.copies.empty()) fail("unfinished: the thread ends before it has waited for its cp.async copies");
  for (auto& store : self.stores) {
    if (!store->is_awaited) fail("unfinished: the thread ends before it has waited for its tma_store to read shared memory");
  }
  if (self.block->products_in_flight[self.thread / 128])
    fail("unfinished: the thread ends before its wgmma results were waited for");
  if (self.cluster_arrival != Fiber::kNotArrived)
    fail("unfinished: the thread ends between cluster_arrive and cluster_wait");
}

inline void end_block(Block& block) {
  for (const Flight& flight : machine.flights) {
    if (flight.block == &block || flight.other_block == &block) {
      fail("unfinished: %s ends while a %s is under way", name_of(block).c_str(), flight.what);
    }
  }
  for (auto& [address, watch] : block.mbarriers) {
    const Mbarrier barrier = read_mbarrier({&block, shared_pointer(block, address)}, "end of block");
    if (barrier.bytes != 0) {
      fail("unfinished: %s ends with %d bytes announced and not arrived at the mbarrier at 0x%x", name_of(block).c_str(),
           static_cast<int>(barrier.bytes), address);
    }
    if (watch.has_unseen_bytes || watch.has_bytes) {
      fail("unfinished: %s ends, and nobody has waited for the bytes that came to the mbarrier at 0x%x",
           name_of(block).c_str(), address);
    }
  }
  memset(block.smem, 0xff, block.smem_bytes);  // others of the cluster who still read it get NaN
}

}  // namespace emulator
