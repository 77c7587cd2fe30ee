// Barriers in shared memory that count arrivals of threads and bytes of asynchronous copies; sm_90.
//
// A phase completes when the expected arrivals have come and no bytes are outstanding; then the next begins. Waiting takes
// the parity of a phase: 0 for the first, 1 for the second, 0 ...; before the first has completed, the phase "before" it, of
// parity 1, counts as complete, so a producer's first waits for empty slots return at once.
#pragma once

#include "device/simt.h"
#ifndef __CUDACC__
#include "bulk.h"
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LOWFAT_SM90  // bulk copies, their barriers, clusters: not in code for older GPUs, where nobody launches it
#endif

namespace device {

// One thread, before any use: so many arrivals complete a phase. Then fence_mbarrier_init() and __syncthreads(), or with a
// cluster, cluster_sync().
LOWFAT_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
#ifndef __CUDACC__
  emulator::mbarrier_init(barrier, arrivals);
#elif defined(LOWFAT_SM90)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#else
  unreachable_here();
#endif
}

// Shows initialized barriers to the other blocks of the cluster and to the copy engine.
LOWFAT_DEVICE void fence_mbarrier_init() {
#ifdef LOWFAT_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

LOWFAT_DEVICE void mbarrier_arrive(uint64_t* barrier) {
#ifndef __CUDACC__
  emulator::mbarrier_arrive(barrier, 0);
#elif defined(LOWFAT_SM90)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  unreachable_here();
#endif
}

// Arrives, and announces bytes that copies will bring in this phase. Before or after the copies are started.
LOWFAT_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
#ifndef __CUDACC__
  emulator::mbarrier_arrive(barrier, bytes);
#elif defined(LOWFAT_SM90)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  unreachable_here();
#endif
}

// Arrives at the barrier of a block of the cluster; the address is peer_address()'s.
LOWFAT_DEVICE void mbarrier_arrive_peer(uint32_t peer_barrier) {
#ifndef __CUDACC__
  emulator::mbarrier_arrive_peer(peer_barrier);
#elif defined(LOWFAT_SM90)
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(peer_barrier) : "memory");
#else
  unreachable_here();
#endif
}

// The same of a thread that has only read what the barrier guards: no fence, which would wait for its stores to global memory.
LOWFAT_DEVICE void mbarrier_arrive_peer_read(uint32_t peer_barrier) {
#ifndef __CUDACC__
  emulator::mbarrier_arrive_peer(peer_barrier);
#elif defined(LOWFAT_SM90)
  asm volatile("mbarrier.arrive.release.cta.shared::cluster.b64 _, [%0];" ::"r"(peer_barrier) : "memory");
#else
  unreachable_here();
#endif
}

// Returns when the phase of this parity has completed.
LOWFAT_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
#ifndef __CUDACC__
  emulator::mbarrier_wait(barrier, parity);
#elif defined(LOWFAT_SM90)
  asm volatile(
      "{\n"
      ".reg .pred is_complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 is_complete, [%0], %1;\n"
      "@!is_complete bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  unreachable_here();
#endif
}

// The same, where other blocks of the cluster arrive after writing this block's shared memory themselves.
LOWFAT_DEVICE void mbarrier_wait_cluster(uint64_t* barrier, int parity) {
#ifndef __CUDACC__
  emulator::mbarrier_wait(barrier, parity);
#elif defined(LOWFAT_SM90)
  asm volatile(
      "{\n"
      ".reg .pred is_complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 is_complete, [%0], %1;\n"
      "@!is_complete bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  unreachable_here();
#endif
}

// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine or wgmma: between writing a
// tile with stores and the barrier after which one thread sends it off.
LOWFAT_DEVICE void fence_async_shared() {
#ifdef LOWFAT_SM90
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The same for global memory: the writer before its release, the reader between its acquire and the tma_load.
LOWFAT_DEVICE void fence_async_global() {
#ifndef __CUDACC__
  emulator::fence_async_global();
#elif defined(LOWFAT_SM90)
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

}  // namespace device
