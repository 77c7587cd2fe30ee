// The emulated GPU: grids of blocks of threads, each thread a fiber, resumed in random order; and what is reported when
// no thread can go on.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

// What a kernel did that the GPU would not forgive, or might.
struct Report : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Everything random in a run comes from here, so a seed repeats it (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  size_t below(size_t bound) { return static_cast<size_t>(next() % bound); }
  bool one_in(size_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

struct Options {
  uint64_t seed = 1;
  int resident_blocks = 0;  // at most so many at a time, started in random order as others end; 0: all
};

struct Block;
struct Grid;

enum class State { ready, polling, waiting, ended };

// Why a fiber does not run, for the report.
struct Wait {
  const char* what = nullptr;
  uint32_t address = 0;  // in shared memory; of a named barrier: its number
  int detail = 0;        // parity, thread count
};

// cp.async: 16 bytes that are copied when the thread waits for their group.
struct SharedCopy {
  void* to;
  const void* from;
  size_t bytes, zeros;  // the zeros follow the bytes
  int group;
};

// A bulk store: shared memory is read late, global memory written later still.
struct BulkStore {
  std::function<void(BulkStore&)> read, write;
  std::vector<uint8_t> bytes;
  bool is_read = false, is_written = false, is_awaited = false;
  int group = 0;
};

struct Fiber {
  Context context;
  Block* block = nullptr;
  int thread = 0;
  State state = State::ready;
  Wait wait;
  static constexpr int kNotArrived = -1;
  int cluster_arrival = kNotArrived;  // the generation of the barrier it has arrived at
  std::vector<SharedCopy> copies;  // issued, not waited for
  int copy_groups = 0;             // committed so far
  std::vector<std::shared_ptr<BulkStore>> stores;  // issued, their end not waited for
  int store_groups = 0;
  bool has_fenced_global = false;  // since it last learned that others have written
};

// Where the lanes of a warp or warpgroup meet: the last to arrive computes for all.
struct Rendezvous {
  const char* what = nullptr;
  int detail = 0;
  int arrived = 0;
  Fiber* fiber[128];
  void* lane[128];
};

struct Barrier {
  int arrived = 0;
  int expected = 0;
  std::vector<Fiber*> waiting;
};

struct MbarrierWatch {
  std::vector<Fiber*> waiting;
  bool has_bytes = false;         // some have arrived in this phase
  bool has_unseen_bytes = false;  // a phase with bytes completed, and nobody has waited for it yet
};

struct Cluster {
  int number = 0;  // in its grid
  std::vector<std::unique_ptr<Block>> blocks;
  int ended_blocks = 0;
  int arrived = 0, generation = 0;
  std::vector<Fiber*> waiting;
};

struct WarpgroupProducts;  // warpgroup_products.h

struct Block {
  Grid* grid = nullptr;
  Cluster* cluster = nullptr;
  dim3 index;
  int rank = 0;  // in its cluster
  uint8_t* smem = nullptr;
  size_t smem_bytes = 0;
  std::unique_ptr<Fiber[]> fibers;
  int threads = 0, ended = 0;
  bool has_triggered = false;
  Barrier barriers[16];
  std::vector<Rendezvous> warps, warpgroups;
  std::map<uint32_t, MbarrierWatch> mbarriers;
  std::vector<std::shared_ptr<WarpgroupProducts>> products;  // per warpgroup
  std::vector<int> products_in_flight;
  ~Block();
};

struct Grid {
  uint64_t number = 0;  // of all that were ever launched, from 1
  std::string name;
  dim3 size;
  int threads = 0, cluster = 1;
  size_t smem_bytes = 0;
  bool is_cooperative = false, is_dependent = false;
  std::function<void()> body;
  Grid* previous = nullptr;
  bool has_begun = false, is_complete = false;
  std::vector<int> unstarted;  // clusters
  int blocks = 0, ended_blocks = 0, triggered_blocks = 0;
  std::vector<std::unique_ptr<Cluster>> clusters;  // started; null when ended
  std::vector<Fiber*> waiting;  // threads of the next grid, in wait_for_dependency
};

// An asynchronous operation on its way; it takes effect when `land` is called, once or (for stores) twice.
struct Flight {
  Grid* grid;
  Block* block;  // whose thread started it; null: the block may end before
  const char* what;
  std::function<bool()> land;  // true: nothing left to do
  Block* other_block = nullptr;  // whose shared memory it writes
  bool is_slow = false;
};

struct Machine {
  Options options;
  Random random;
  size_t burst = 1;     // the fiber that became ready last goes first, but for one turn in `burst`, where any may
  size_t patience = 1;  // an asynchronous operation takes effect one turn in so many
  size_t slow_one_in = 1;        // of those started, one in so many waits until all others have taken effect; 1: none
  std::vector<std::unique_ptr<Grid>> grids;
  std::vector<Fiber*> ready, polling;
  std::vector<Flight> flights;
  Fiber* current = nullptr;
  Context main;
  int resident_blocks = 0, unstarted_clusters = 0, incomplete_grids = 0;
  uint64_t idle_polls = 0;
  std::string report;
  std::set<std::string> kernels_run;  // mangled names
};

inline Machine machine;

inline Fiber& current() { return *machine.current; }
inline Block& current_block() { return *machine.current->block; }

inline std::string text(const char* format, va_list values) {
  char buffer[4096];
  vsnprintf(buffer, sizeof buffer, format, values);
  return buffer;
}

inline std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline std::string text(const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::string result = text(format, values);
  va_end(values);
  return result;
}

inline std::string name_of(const Block& block) {
  return text("%s, block (%u, %u, %u)", block.grid->name.c_str(), block.index.x, block.index.y, block.index.z);
}

// Stops the run. In a fiber nothing can be thrown past its first frame: it leaves for good, and main() throws.
inline void fail(const char* format, ...) {
  {
    va_list values;
    va_start(values, format);
    std::string message = text(format, values);
    va_end(values);
    const auto seed = static_cast<unsigned long long>(machine.options.seed);
    if (!machine.current) throw Report(message + text(" [seed %llu]", seed));
    machine.report = message + " [" + name_of(current_block()) + text(", thread %d, seed %llu]", current().thread, seed);
  }
  current().state = State::ended;
  for (;;) switch_context(current().context, machine.main, true);
}

// Memory that others may be polling has changed.
inline void progress() { machine.idle_polls = 0; }

inline void leave(State state) {
  Fiber& self = current();
  if (overflowed(self.context)) fail("the kernel needs more stack than an emulated thread has");
  self.state = state;
  switch_context(self.context, machine.main);
}

inline void wait_for(const char* what, uint32_t address = 0, int detail = 0) {
  current().wait = {what, address, detail};
  leave(State::waiting);
}

// One turn for somebody else, in a loop that reads memory until it changes.
inline void poll(const char* what) {
  current().wait = {what, 0, 0};
  machine.polling.push_back(machine.current);
  leave(State::polling);
}

inline void wake(Fiber* fiber) {
  fiber->state = State::ready;
  machine.ready.push_back(fiber);
}

inline void wake(std::vector<Fiber*>& fibers) {
  for (Fiber* fiber : fibers) wake(fiber);
  fibers.clear();
}

inline bool is_same(const Wait& a, const Wait& b) {
  return a.what == b.what && a.address == b.address && a.detail == b.detail;
}

// Who waits for what: a line for neighbouring threads of a block with the same reason.
inline std::string waits(const Block& block) {
  std::string lines;
  for (int first = 0, next; first < block.threads; first = next) {
    const Fiber& fiber = block.fibers[first];
    for (next = first + 1;
         next < block.threads && block.fibers[next].state == fiber.state && is_same(block.fibers[next].wait, fiber.wait);
         ++next) {
    }
    if (fiber.state == State::ended) continue;
    const Wait& wait = fiber.wait;
    lines += text("\n  %s, threads %d..%d: %s", name_of(block).c_str(), first, next - 1, wait.what ? wait.what : "start");
    if (wait.address) lines += text(" 0x%x, %d", wait.address, wait.detail);
  }
  return lines;
}

inline std::string waits() {
  std::string lines;
  for (auto& grid : machine.grids) {
    for (auto& cluster : grid->clusters) {
      if (!cluster) continue;
      for (auto& block : cluster->blocks) {
        if (lines.size() > 2000) return lines + "\n  and more";
        lines += waits(*block);
      }
    }
  }
  return lines;
}

inline Fiber* take(std::vector<Fiber*>& fibers) {
  const size_t last = fibers.size() - 1;
  const size_t chosen = machine.random.one_in(machine.burst) ? machine.random.below(fibers.size()) : last;
  std::swap(fibers[chosen], fibers[last]);
  Fiber* fiber = fibers.back();
  fibers.pop_back();
  return fiber;
}

// Those that only poll get a turn now and then, or when nobody else can run: for a while, then it is a deadlock.
inline Fiber* next_fiber() {
  Machine& m = machine;
  if (!m.ready.empty() && (m.polling.empty() || !m.random.one_in(16))) return take(m.ready);
  if (m.polling.empty()) return nullptr;
  if (m.ready.empty() && ++m.idle_polls > 1000 + 32 * m.polling.size()) return nullptr;
  const size_t chosen = m.random.below(m.polling.size());
  std::swap(m.polling[chosen], m.polling.back());
  Fiber* fiber = m.polling.back();
  m.polling.pop_back();
  return fiber;
}

inline Flight& start(Flight flight) {
  flight.is_slow = machine.slow_one_in > 1 && machine.random.one_in(machine.slow_one_in);
  machine.flights.push_back(std::move(flight));
  return machine.flights.back();
}

// A slow load waits for all that are not slow, a slow store for everything: whoever needs it forces it (wait_stores).
inline size_t next_flight() {
  const size_t count = machine.flights.size(), first = machine.random.below(count);
  for (size_t i = 0; i < count; ++i) {
    if (!machine.flights[(first + i) % count].is_slow) return (first + i) % count;
  }
  for (size_t i = 0; i < count; ++i) {
    if (machine.flights[(first + i) % count].block) return (first + i) % count;
  }
  return first;
}

inline void land(size_t index) {
  if (!machine.flights[index].land()) return;
  machine.flights.erase(machine.flights.begin() + index);
  progress();
}

void end_thread();                       // async.h, tensor_core.h: what must not be left behind
Block* make_block(Grid&, Cluster&, int linear, int rank);  // memory.h

inline void fiber_entry() {
  entered_from(machine.main);
  current().block->grid->body();
  end_thread();
  current().state = State::ended;
  for (;;) switch_context(current().context, machine.main, true);
}

// A dependent grid begins at some moment after every block of the one before has asked for it, or has ended; another one
// when all before it are complete.
inline bool may_begin(const Grid& grid) {
  if (grid.is_dependent && grid.previous) {
    if (grid.previous->is_complete) return true;
    return grid.previous->triggered_blocks == grid.previous->blocks && (machine.ready.empty() || machine.random.one_in(64));
  }
  for (const Grid* before = grid.previous; before; before = before->previous) {
    if (!before->is_complete) return false;
  }
  return true;
}

inline void start_cluster(Grid& grid) {
  Machine& m = machine;
  std::swap(grid.unstarted[m.random.below(grid.unstarted.size())], grid.unstarted.back());
  const int number = grid.unstarted.back();
  grid.unstarted.pop_back();
  --m.unstarted_clusters;
  Cluster& cluster = *(grid.clusters[number] = std::make_unique<Cluster>());
  cluster.number = number;
  for (int rank = 0; rank < grid.cluster; ++rank) {
    cluster.blocks.emplace_back(make_block(grid, cluster, number * grid.cluster + rank, rank));
    Block& block = *cluster.blocks.back();
    for (int t = 0; t < block.threads; ++t) {
      Fiber& fiber = block.fibers[t];
      fiber.block = &block;
      fiber.thread = t;
      prepare(fiber.context, fiber_entry);
      m.ready.push_back(&fiber);
    }
  }
  m.resident_blocks += grid.cluster;
}

inline void start_clusters() {
  if (!machine.unstarted_clusters) return;
  const int limit = machine.options.resident_blocks;
  for (auto& grid : machine.grids) {
    if (grid->is_complete) continue;
    if (!grid->has_begun && !may_begin(*grid)) return;
    if (grid->is_cooperative && limit && grid->blocks > limit) {
      fail("cooperative launch of %s: %d blocks, %d fit", grid->name.c_str(), grid->blocks, limit);
    }
    grid->has_begun = true;
    while (!grid->unstarted.empty() && (!limit || machine.resident_blocks + grid->cluster <= limit)) start_cluster(*grid);
    if (!grid->unstarted.empty()) return;
  }
}

inline void release_if_all_arrived(Block& block) {  // __syncthreads waits for those that have not ended
  Barrier& barrier = block.barriers[0];
  if (barrier.arrived == 0 || barrier.arrived < block.threads - block.ended) return;
  barrier.arrived = 0;
  wake(barrier.waiting);
}

void release_if_all_arrived(Cluster&);  // cluster.h
void end_block(Block&);                 // async.h

inline void complete(Grid& grid) {
  for (size_t i = 0; i < machine.flights.size();) {  // a grid's writes are visible when it has completed
    if (machine.flights[i].grid == &grid)
      land(i);
    else
      ++i;
  }
  grid.is_complete = true;
  --machine.incomplete_grids;
  wake(grid.waiting);
}

inline void end_fiber(Fiber& fiber) {
  Block& block = *fiber.block;
  Cluster& cluster = *block.cluster;
  Grid& grid = *block.grid;
  stacks.give_back(fiber.context.stack);
  fiber.context.stack = nullptr;
  ++block.ended;
  progress();
  release_if_all_arrived(block);
  release_if_all_arrived(cluster);
  if (block.ended < block.threads) return;
  end_block(block);
  if (!block.has_triggered) ++grid.triggered_blocks;
  --machine.resident_blocks;
  ++grid.ended_blocks;
  if (++cluster.ended_blocks == grid.cluster) grid.clusters[cluster.number].reset();  // frees the block too
  if (grid.ended_blocks == grid.blocks) complete(grid);
}

inline void resume(Fiber& fiber) {
  fiber.state = State::ready;
  machine.current = &fiber;
  switch_context(machine.main, fiber.context);
  machine.current = nullptr;
  if (!machine.report.empty()) throw Report(machine.report);
  if (fiber.state == State::ended) end_fiber(fiber);
}

inline void forget_everything() {
  machine.ready.clear();
  machine.polling.clear();
  machine.flights.clear();
  machine.grids.clear();
  machine.report.clear();
  machine.resident_blocks = machine.unstarted_clusters = machine.incomplete_grids = 0;
  machine.idle_polls = 0;
}

// Runs what was launched. Throws a Report if a kernel did something wrong; then all launches are forgotten.
inline void synchronize(Options options = {}) {
  Machine& m = machine;
  m.options = options;
  m.random = Random(options.seed);
  constexpr size_t kBursts[] = {1, 3, 40};  // all orders alike; warps that run ahead; one warp after another, nearly
  m.burst = kBursts[m.random.below(3)];
  constexpr size_t kPatience[] = {8, 200, 100000};  // the last: when nobody else can run
  m.patience = kPatience[m.random.below(3)];
  constexpr size_t kSlow[] = {1, 2, 2};
  m.slow_one_in = kSlow[m.random.below(3)];
  try {
    while (m.incomplete_grids) {
      start_clusters();
      bool is_landing = !m.flights.empty() && m.random.one_in(m.ready.empty() ? 2 : m.patience);
      if (is_landing && m.flights[next_flight()].is_slow && !m.ready.empty()) is_landing = false;
      Fiber* fiber = is_landing ? nullptr : next_fiber();
      if (fiber) {
        resume(*fiber);
      } else if (!m.flights.empty()) {
        land(next_flight());
      } else {
        fail("deadlock: no thread can go on%s", waits().c_str());
      }
    }
  } catch (...) {
    forget_everything();
    throw;
  }
  forget_everything();
}

}  // namespace emulator
