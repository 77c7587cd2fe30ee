// Blocks of a cluster: who they are, a barrier of all their threads, and each other's shared memory. sm_90.
#pragma once

#include "device/mbarrier.h"
#include "device/simt.h"

namespace device {

LOWFAT_DEVICE int cluster_rank() {
#ifndef __CUDACC__
  return emulator::current_block().rank;
#elif defined(LOWFAT_SM90)
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

LOWFAT_DEVICE int cluster_size() {
#ifndef __CUDACC__
  return emulator::current_block().grid->cluster;
#elif defined(LOWFAT_SM90)
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// All threads of all blocks arrive, and then wait; what was written before is visible after. Work may go in between.
LOWFAT_DEVICE void cluster_arrive() {
#ifndef __CUDACC__
  emulator::cluster_arrive();
#elif defined(LOWFAT_SM90)
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  unreachable_here();
#endif
}

LOWFAT_DEVICE void cluster_wait() {
#ifndef __CUDACC__
  emulator::cluster_wait();
#elif defined(LOWFAT_SM90)
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  unreachable_here();
#endif
}

// Also the last thing a block does whose shared memory others use: they may still be at it.
LOWFAT_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where the block of this rank has what we have at smem, as an address for bulk_copy_to_peer and mbarrier_arrive_peer.
LOWFAT_DEVICE uint32_t peer_address(const void* smem, int rank) {
#ifndef __CUDACC__
  return emulator::peer_address(smem, rank);
#elif defined(LOWFAT_SM90)
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(smem)), "r"(rank));
  return address;
#else
  unreachable_here();
  return 0;
#endif
}

// The same as a pointer for ordinary loads and stores.
template <class T>
LOWFAT_DEVICE T* peer_pointer(T* smem, int rank) {
#ifndef __CUDACC__
  return reinterpret_cast<T*>(emulator::peer_pointer(smem, rank));
#elif defined(LOWFAT_SM90)
  T* pointer;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(pointer) : "l"(smem), "r"(rank));
  return pointer;
#else
  unreachable_here();
  return smem;
#endif
}

}  // namespace device
