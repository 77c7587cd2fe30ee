// What the host side of low_rank asks of CUDA: counters for tickets.
#include "host/counters.h"
#include "low_rank/low_rank.h"

namespace low_rank {
namespace {

constexpr size_t kChains = 1024;
__device__ uint32_t counters_of_chains[kChains * kChainCounters];

}  // namespace

uint32_t* chain_counters(int device, void* stream, const char*& error) {
  static Counters<uint32_t> all(counters_of_chains, kChains, kChainCounters);
  return all.of(device, stream, 0, error);
}

}  // namespace low_rank
