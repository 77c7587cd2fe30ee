// sm_90: mbarriers, the copy engine (tiles and runs of bytes), and clusters.
//
// A copy takes effect at some moment after it was started, seldom at once. Where it will write is NaN until then, so reading
// too early shows; what it reads is read late, so writing too early shows as well.
#pragma once

#include "async.h"

namespace emulator {

// ---- mbarrier: the word in shared memory is phase, arrivals and bytes in our own encoding, with a mark that says so.

struct Mbarrier {
  uint64_t parity : 1, expected : 14, pending : 14;
  int64_t bytes : 22;  // announced and not yet arrived
  uint64_t mark : 13;
};
static_assert(sizeof(Mbarrier) == 8);
constexpr uint64_t kMbarrierMark = 0x0ba5;
constexpr int kMostBytes = (1 << 20) - 1;  // that the hardware counts

// A byte of shared memory in this block or, in a cluster, in one of the others.
struct Place {
  Block* block;
  uint8_t* pointer;
  uint32_t address() const { return shared_address(*block, pointer); }
};

inline Place own(const void* smem) { return {&current_block(), static_cast<uint8_t*>(const_cast<void*>(smem))}; }

inline Mbarrier read_mbarrier(const Place& place, const char* what) {
  check_aligned(place.pointer, 8, what);
  if (!is_shared(*place.block, place.pointer, 8)) fail("%s: the mbarrier is not in shared memory", what);
  Mbarrier barrier;
  memcpy(&barrier, place.pointer, 8);
  if (barrier.mark != kMbarrierMark)
    fail("%s: no mbarrier at shared address 0x%x (not initialized?)", what, place.address());
  return barrier;
}

inline void settle(const Place& place, Mbarrier barrier, const char* what) {
  MbarrierWatch& watch = place.block->mbarriers[place.address()];
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.parity ^= 1;
    barrier.pending = barrier.expected;
    watch.has_unseen_bytes = watch.has_bytes;
    watch.has_bytes = false;
    wake(watch.waiting);
  }
  if (barrier.bytes > kMostBytes || barrier.bytes < -kMostBytes) fail("%s: more bytes than an mbarrier counts", what);
  memcpy(place.pointer, &barrier, 8);
  progress();
}

inline void mbarrier_init(uint64_t* smem, int arrivals) {
  const Place place = own(smem);
  check_aligned(smem, 8, "mbarrier_init");
  check_shared(smem, 8, "mbarrier_init");
  if (arrivals < 1 || arrivals > 8192) fail("mbarrier_init: %d arrivals", arrivals);
  if (place.block->mbarriers.count(place.address())) fail("mbarrier_init: already one at 0x%x", place.address());
  Mbarrier barrier{};
  barrier.expected = barrier.pending = arrivals;
  barrier.mark = kMbarrierMark;
  memcpy(smem, &barrier, 8);
  place.block->mbarriers[place.address()];
}

inline void arrive(const Place& place, int bytes, const char* what) {
  Mbarrier barrier = read_mbarrier(place, what);
  if (barrier.pending == 0) {
    fail("%s: more than %d arrivals in a phase of the mbarrier at 0x%x", what, static_cast<int>(barrier.expected),
         place.address());
  }
  barrier.pending -= 1;
  barrier.bytes += bytes;
  settle(place, barrier, what);
}

inline void mbarrier_arrive(uint64_t* smem, int bytes) {
  arrive(own(smem), bytes, bytes ? "mbarrier_arrive_expect" : "mbarrier_arrive");
}

inline void bytes_arrived(const Place& place, int bytes, const char* what) {
  Mbarrier barrier = read_mbarrier(place, what);
  barrier.bytes -= bytes;
  place.block->mbarriers[place.address()].has_bytes = true;
  settle(place, barrier, what);
}

inline void mbarrier_wait(uint64_t* smem, int parity) {
  const Place place = own(smem);
  if (parity != 0 && parity != 1) fail("mbarrier_wait: parity %d", parity);
  for (;;) {
    const Mbarrier barrier = read_mbarrier(place, "mbarrier_wait");
    MbarrierWatch& watch = place.block->mbarriers[place.address()];
    if (barrier.parity != static_cast<unsigned>(parity)) {
      watch.has_unseen_bytes = false;
      return;
    }
    watch.waiting.push_back(machine.current);
    wait_for("mbarrier_wait", place.address(), parity);
  }
}

// ---- clusters

inline void release_if_all_arrived(Cluster& cluster) {
  int alive = 0;
  for (auto& block : cluster.blocks) alive += block->threads - block->ended;
  if (cluster.arrived == 0 || cluster.arrived < alive) return;
  cluster.arrived = 0;
  ++cluster.generation;
  wake(cluster.waiting);
}

inline void cluster_arrive() {
  Fiber& self = current();
  Cluster& cluster = *self.block->cluster;
  if (self.cluster_arrival != Fiber::kNotArrived) fail("cluster_arrive: twice without cluster_wait");
  self.cluster_arrival = cluster.generation;
  ++cluster.arrived;
  release_if_all_arrived(cluster);
}

inline void cluster_wait() {
  Fiber& self = current();
  Cluster& cluster = *self.block->cluster;
  if (self.cluster_arrival == Fiber::kNotArrived) fail("cluster_wait: without cluster_arrive");
  while (cluster.generation == self.cluster_arrival) {
    cluster.waiting.push_back(&self);
    wait_for("cluster_wait");
  }
  self.cluster_arrival = Fiber::kNotArrived;
}

constexpr int kRankShift = 24;  // of a cluster-wide address: the rank plus one, so that it is no block's own address

inline Block& peer(int rank, const char* what) {
  Block& block = current_block();
  if (rank < 0 || rank >= block.grid->cluster) fail("%s: rank %d in a cluster of %d", what, rank, block.grid->cluster);
  Block& other = *block.cluster->blocks[rank];
  if (other.ended == other.threads) fail("%s: the block of rank %d has ended", what, rank);
  return other;
}

inline uint32_t peer_address(const void* smem, int rank) {
  check_shared(smem, 1, "peer_address");
  peer(rank, "peer_address");
  return static_cast<uint32_t>(rank + 1) << kRankShift | shared_address(current_block(), smem);
}

inline uint8_t* peer_pointer(const void* smem, int rank) {
  check_shared(smem, 1, "peer_pointer");
  return shared_pointer(peer(rank, "peer_pointer"), shared_address(current_block(), smem));
}

inline Place place_of(uint32_t cluster_address, const char* what) {
  Block& block = peer(static_cast<int>(cluster_address >> kRankShift) - 1, what);
  return {&block, shared_pointer(block, cluster_address & ((1u << kRankShift) - 1))};
}

inline void mbarrier_arrive_peer(uint32_t peer_barrier) {
  arrive(place_of(peer_barrier, "mbarrier_arrive_peer"), 0, "mbarrier_arrive_peer");
}

// ---- copies

// The source's description as a kernel passes it, copied when a copy starts: the thread may end before it lands.
struct alignas(64) TensorMap {
  const uint8_t* gmem;
  int64_t rows, row_bytes, stride_bytes;  // row_bytes: of the matrix; stride_bytes: from row to row
  int box_rows, box_row_bytes, element_bytes;
  bool is_swizzled;
  uint8_t unused[64];
};
static_assert(sizeof(TensorMap) == 128, "as large as CUDA's");

inline size_t box_bytes(const TensorMap& map) { return static_cast<size_t>(map.box_rows) * map.box_row_bytes; }

// Where piece `piece` (16 bytes) of a box's row lies in shared memory: the swizzle exchanges bits of the address itself.
inline size_t piece_offset(const TensorMap& map, uint32_t address, int row, int piece) {
  const uint32_t plain = address + row * map.box_row_bytes + piece * 16;
  return (map.is_swizzled ? plain ^ (plain >> 7 & 7) << 4 : plain) - address;
}

// Calls move(global, offset in the box, bytes) for each run inside the matrix, outside(offset, bytes) for the rest.
template <class Move, class Outside>
void for_each_piece(const TensorMap& map, uint32_t address, int row, int column, const Move& move, const Outside& outside) {
  for (int i = 0; i < map.box_rows; ++i) {
    for (int byte = 0; byte < map.box_row_bytes; byte += map.element_bytes) {
      const size_t offset = piece_offset(map, address, i, byte / 16) + byte % 16;
      const int64_t from_row = int64_t{row} + i, from_byte = int64_t{column} * map.element_bytes + byte;
      if (from_row >= 0 && from_row < map.rows && from_byte >= 0 && from_byte < map.row_bytes) {
        move(const_cast<uint8_t*>(map.gmem) + from_row * map.stride_bytes + from_byte, offset, map.element_bytes);
      } else {
        outside(offset, map.element_bytes);
      }
    }
  }
}

inline void check_box(const TensorMap& map, const void* smem, const char* what) {
  check_aligned(smem, map.is_swizzled ? 1024 : 128, what);
  check_shared(smem, box_bytes(map), what);
  const int64_t last = (map.rows - 1) * map.stride_bytes + map.row_bytes;
  check_global(map.gmem, static_cast<size_t>(last), false, what);
}

// Queues a copy into shared memory, which is NaN until it lands.
inline void fly(const char* what, const Place& to, size_t bytes, const Place& barrier, std::function<void()> copy) {
  if (!is_shared(*to.block, to.pointer, bytes)) fail("%s: writes outside of shared memory", what);
  read_mbarrier(barrier, what);
  memset(to.pointer, 0xff, bytes);
  start({current_block().grid, &current_block(), what,
         [=, copy = std::move(copy)] {
           copy();
           bytes_arrived(barrier, static_cast<int>(bytes), what);
           return true;
         },
         to.block});
  if (machine.random.one_in(8)) land(machine.flights.size() - 1);
}

inline void tma_load(void* smem, const TensorMap& map, int row, int column, uint64_t* barrier) {
  check_box(map, smem, "tma_load");
  check_fenced(map.gmem, "tma_load");
  const Place to = own(smem);
  fly("tma_load", to, box_bytes(map), own(barrier), [=] {
    for_each_piece(
        map, to.address(), row, column,
        [&](uint8_t* gmem, size_t offset, int bytes) { memcpy(to.pointer + offset, gmem, bytes); },
        [&](size_t offset, int bytes) { memset(to.pointer + offset, 0, bytes); });
  });
}

inline void check_run(const void* p, int bytes, const char* what) {
  check_aligned(p, 16, what);
  if (bytes < 16 || bytes % 16) fail("%s: %d bytes, not a multiple of 16", what, bytes);
}

inline void bulk_load(void* smem, const void* gmem, int bytes, uint64_t* barrier) {
  check_run(smem, bytes, "bulk_load");
  check_run(gmem, bytes, "bulk_load");
  check_global(gmem, bytes, false, "bulk_load");
  check_fenced(gmem, "bulk_load");
  fly("bulk_load", own(smem), bytes, own(barrier), [=] { memcpy(smem, gmem, bytes); });
}

inline void bulk_copy_to_peer(uint32_t peer_smem, const void* smem, int bytes, uint32_t peer_barrier) {
  const Place to = place_of(peer_smem, "bulk_copy_to_peer"), barrier = place_of(peer_barrier, "bulk_copy_to_peer");
  check_run(smem, bytes, "bulk_copy_to_peer");
  check_run(to.pointer, bytes, "bulk_copy_to_peer");
  check_shared(smem, bytes, "bulk_copy_to_peer");
  if (to.block != barrier.block) fail("bulk_copy_to_peer: data and barrier go to different blocks");
  fly("bulk_copy_to_peer", to, bytes, barrier, [=] { memcpy(to.pointer, smem, bytes); });
}

inline bool advance(BulkStore& store) {
  if (!store.is_read) {
    store.read(store);
    store.is_read = true;
  } else if (!store.is_written) {
    store.write(store);
    store.is_written = true;
  }
  return store.is_written;
}

inline void tma_store(const TensorMap& map, int row, int column, const void* smem) {
  check_box(map, smem, "tma_store");
  check_global(map.gmem, 1, true, "tma_store");
  const Place from = own(smem);
  auto store = std::make_shared<BulkStore>();
  store->read = [=](BulkStore& self) { self.bytes.assign(from.pointer, from.pointer + box_bytes(map)); };
  store->write = [=, address = from.address()](BulkStore& self) {  // the block may have ended by then
    for_each_piece(
        map, address, row, column,
        [&](uint8_t* gmem, size_t offset, int bytes) { memcpy(gmem, self.bytes.data() + offset, bytes); },
        [](size_t, int) {});
  };
  store->group = current().store_groups;
  current().stores.push_back(store);
  start({current_block().grid, nullptr, "tma_store", [store] { return advance(*store); }});
}

inline void commit_stores() { ++current().store_groups; }

inline void wait_stores(int groups_left, bool until_written) {
  Fiber& self = current();
  for (auto& store : self.stores) {
    if (store->group >= self.store_groups - groups_left) continue;
    while (!store->is_read || (until_written && !store->is_written)) advance(*store);
    store->is_awaited = true;
  }
  self.stores.erase(std::remove_if(self.stores.begin(), self.stores.end(),
                                   [](auto& store) { return store->is_awaited && store->is_written; }),
                    self.stores.end());
}

}  // namespace emulator
