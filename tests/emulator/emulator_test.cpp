// The emulator itself: kernels that are wrong on purpose, each of which must be reported or give a wrong result.
#include "device/async_copy.h"
#include "device/cluster.h"
#include "device/grid.h"
#include "device/launch.h"
#include "device/load.h"
#include "device/mma.h"
#include "device/reduce.h"
#include "device/tma.h"
#include "device/wgmma.h"

#include "check.h"

namespace emulator_test {  // named, so that reports can name the kernels

using namespace device;
using emulator::Buffer;

struct Params {
  const uint32_t* in;  // kWords, 1, 2, 3 ...
  uint32_t* out;       // kWords, poison
  uint64_t* counter;   // 0
  TensorMap map;       // of in: 64 rows of 64 16-bit elements, one swizzled box of 8192 bytes
  TensorMap out_map;   // of out, the same
};
constexpr int kWords = 2048;
constexpr size_t kTileBytes = 8192, kSmemBytes = kTileBytes + 64;

struct Memory {
  Buffer<uint32_t> in{"in", counted()}, out{"out", kWords};
  Buffer<uint64_t> counter{"counter", 1};
  Params params{in.data(), out.data(), counter.data(), {}, {}};
  Memory() {
    counter[0] = 0;
    make_tensor_map(params.map, {in.data(), 64, 64, 64, 64, 64});
    make_tensor_map(params.out_map, {out.data(), 64, 64, 64, 64, 64});
  }
  static std::vector<uint32_t> counted() {
    std::vector<uint32_t> values(kWords);
    for (int i = 0; i < kWords; ++i) values[i] = i + 1;
    return values;
  }
};

using Kernel = void (*)(Params);

struct Shape {
  int blocks = 1, threads = 64, cluster = 1;
  bool is_cooperative = false;
  int resident_blocks = 0;
};

void run(Kernel kernel, uint64_t seed, Memory& memory, Shape shape = {}) {
  launch(kernel, {dim3(shape.blocks), shape.threads, kSmemBytes, shape.cluster, shape.is_cooperative}, memory.params);
  emulator::synchronize({seed, shape.resident_blocks});
}

void reported(const char* words, Kernel kernel, uint64_t seed, Shape shape = {}) {
  Memory memory;
  check::reports(words, [&] { run(kernel, seed, memory, shape); });
}

// The kernel must leave out[i] = in[i] for i < count, if all is right.
bool copies(Kernel kernel, uint64_t seed, int count, Shape shape = {}) {
  Memory memory;
  run(kernel, seed, memory, shape);
  return std::equal(memory.in.data(), memory.in.data() + count, memory.out.data());
}

// Timing decides whether it shows: among twenty orders some must.
void goes_wrong(Kernel kernel, uint64_t seed, int count, Shape shape = {}) {
  int wrong = 0;
  for (uint64_t i = 0; i < 20; ++i) wrong += !copies(kernel, 20 * seed + i, count, shape);
  check::that(wrong > 0, "a wrong result in 20 runs");
}

uint32_t* words_of(uint8_t* smem) { return reinterpret_cast<uint32_t*>(smem); }
uint64_t* barrier_of(uint8_t* smem) { return reinterpret_cast<uint64_t*>(smem + kTileBytes); }

void init_barrier(int arrivals) {
  if (threadIdx.x == 0) {
    mbarrier_init(barrier_of(shared_memory()), arrivals);
    fence_mbarrier_init();
  }
  __syncthreads();
}

void store_shared_words(Params p, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) store(p.out + i, words_of(shared_memory())[i]);
}

// ---- order: barriers that are missing

template <bool kHasBarrier>
void exchange(Params p) {
  uint32_t* smem = words_of(shared_memory());
  smem[threadIdx.x] = load(p.in + threadIdx.x);
  if (kHasBarrier) __syncthreads();
  store(p.out + 63 - threadIdx.x, smem[63 - threadIdx.x]);
}

template <bool kHasBarrier>
void exchange_blocks(Params p) {  // four blocks, each reads what the next wrote
  if (threadIdx.x == 0) store(p.out + 4 + blockIdx.x, load(p.in + blockIdx.x));
  if (kHasBarrier) grid_barrier(p.counter);
  const int next = (blockIdx.x + 1) % 4;
  const uint4 line = load16_l2(p.out + 4);
  const uint32_t of_four[4] = {line.x, line.y, line.z, line.w};
  if (threadIdx.x == 0) store(p.out + next, of_four[next]);
}

template <bool kWaits>
void dependent_second(Params p) {
  if (kWaits) wait_for_dependency();
  store(p.out + threadIdx.x, load(p.out + 64 + threadIdx.x));
}
void dependent_first(Params p) {
  launch_dependents();
  __syncthreads();
  store(p.out + 64 + threadIdx.x, load(p.in + threadIdx.x));
}

template <bool kWaits>
bool dependent_pair(uint64_t seed) {
  Memory memory;
  launch(Kernel(dependent_first), {dim3(1), 64}, memory.params);
  launch(Kernel(dependent_second<kWaits>), {dim3(1), 64, 0, 1, false, true}, memory.params);
  emulator::synchronize({seed});
  return std::equal(memory.in.data(), memory.in.data() + 64, memory.out.data());
}

void missing_barriers(uint64_t seed) {
  check::that(copies(exchange<true>, seed, 64), "__syncthreads");
  goes_wrong(exchange<false>, seed, 64);
  check::that(copies(exchange_blocks<true>, seed, 4, {4, 64, 1, true}), "grid_barrier");
  goes_wrong(exchange_blocks<false>, seed, 4, {4, 64, 1, true});
  int wrong = 0;
  for (uint64_t i = 0; i < 20; ++i) {
    check::that(dependent_pair<true>(20 * seed + i), "wait_for_dependency");
    wrong += !dependent_pair<false>(20 * seed + i);
  }
  check::that(wrong > 0, "a wrong result without wait_for_dependency");
}

// ---- asynchronous copies

template <bool kWaits>
void async_copy(Params p) {
  copy16_async(shared_memory() + threadIdx.x * 16, p.in + threadIdx.x * 4);
  commit_copies();
  if (kWaits) wait_copies<0>();
  __syncthreads();
  store_shared_words(p, 256);
  wait_copies<0>();
}
void abandoned_async_copy(Params p) {
  copy16_async(shared_memory() + threadIdx.x * 16, p.in + threadIdx.x * 4);
  commit_copies();
}
void uncommitted_async_copy(Params p) {
  copy16_async(shared_memory() + threadIdx.x * 16, p.in + threadIdx.x * 4);
  wait_copies<0>();
}

template <int kBytes, int kParity, bool kWaits>
void bulk_copy(Params p) {
  uint64_t* full = barrier_of(shared_memory());
  init_barrier(1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(full, kBytes);
    bulk_load(shared_memory(), p.in, 1024, full);
  }
  if (kWaits) mbarrier_wait(full, kParity);
  store_shared_words(p, 256);
}

template <bool kWaits>
void overwritten_store(Params p) {  // the tile is stored, then overwritten
  uint32_t* smem = words_of(shared_memory());
  for (int i = threadIdx.x; i < kWords; i += 64) smem[i] = 7;
  fence_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(&p.out_map, 0, 0, smem);
    commit_stores();
    if (kWaits) wait_stores_read<0>();
    smem[0] = smem[kWords - 1] = 8;
    wait_stores_read<0>();
  }
}
void abandoned_store(Params p) {
  if (threadIdx.x == 0) {
    tma_store(&p.out_map, 0, 0, shared_memory());
    commit_stores();
  }
}

template <bool kWaits>
bool sevens(uint64_t seed) {
  Memory memory;
  run(overwritten_store<kWaits>, seed, memory);
  return memory.out[0] == 7 && memory.out[kWords - 1] == 7;
}

void asynchronous_copies(uint64_t seed) {
  check::that(copies(async_copy<true>, seed, 256), "wait_copies");
  goes_wrong(async_copy<false>, seed, 256);
  reported("unfinished", abandoned_async_copy, seed);
  reported("unfinished", uncommitted_async_copy, seed);
  check::that(copies(bulk_copy<1024, 0, true>, seed, 256), "bulk_load");
  reported("unfinished", bulk_copy<1024, 0, false>, seed);  // nobody waits
  reported("", bulk_copy<1024, 1, true>, seed);             // some wait for the phase before, some for the next
  reported("deadlock", bulk_copy<1040, 0, true>, seed);     // too many bytes announced
  reported("deadlock", bulk_copy<1008, 0, true>, seed);     // too few
  reported("mbarrier_wait", bulk_copy<1040, 0, true>, seed);  // the report says who waits
  int wrong = 0;
  for (uint64_t i = 0; i < 20; ++i) {
    check::that(sevens<true>(20 * seed + i), "wait_stores_read");
    wrong += !sevens<false>(20 * seed + i);
  }
  check::that(wrong > 0, "a wrong result without wait_stores_read");
  reported("unfinished", abandoned_store, seed);
}

// ---- mbarriers

void over_arrival(Params) {  // the bytes are still missing when the second arrives
  init_barrier(1);
  if (threadIdx.x < 2) mbarrier_arrive_expect(barrier_of(shared_memory()), 16);
}
template <int kArrivals>
void arrivals(Params) {  // the 64 threads arrive
  init_barrier(kArrivals);
  mbarrier_arrive(barrier_of(shared_memory()));
  mbarrier_wait(barrier_of(shared_memory()), 0);
}
void uninitialized_barrier(Params) { mbarrier_arrive(barrier_of(shared_memory())); }
void initialized_twice(Params) { mbarrier_init(barrier_of(shared_memory()), 1); }
void misplaced_barrier(Params) { mbarrier_init(reinterpret_cast<uint64_t*>(shared_memory() + 4), 1); }

void waits_twice(Params p) {  // the second phase never completes
  bulk_copy<1024, 0, true>(p);
  mbarrier_wait(barrier_of(shared_memory()), 1);
}

void mbarriers(uint64_t seed) {
  reported("more than 1 arrivals", over_arrival, seed);
  {
    Memory memory;
    run(arrivals<64>, seed, memory);
  }
  reported("deadlock", arrivals<65>, seed);
  reported("not initialized", uninitialized_barrier, seed);
  reported("already one", initialized_twice, seed);
  reported("not a multiple of 8", misplaced_barrier, seed);
  reported("deadlock", waits_twice, seed);
}

// ---- fences

template <bool kFences>
void loads_own_stores(Params p) {  // one block writes, and its copy engine reads
  init_barrier(1);
  for (int i = threadIdx.x; i < kWords; i += 64) store(p.out + i, load(p.in + i));
  __syncthreads();
  if (threadIdx.x != 0) return;
  fence_async_global();  // of no use before the acquire
  load_acquire(p.counter);
  if (kFences) fence_async_global();
  mbarrier_arrive_expect(barrier_of(shared_memory()), kTileBytes);
  tma_load(shared_memory(), &p.out_map, 0, 0, barrier_of(shared_memory()));
  mbarrier_wait(barrier_of(shared_memory()), 0);
}
template <bool kFences>
void loads_after_dependency(Params p) {
  init_barrier(1);
  if (threadIdx.x != 0) return;
  fence_async_global();  // of no use before the wait
  wait_for_dependency();
  if (kFences) fence_async_global();
  mbarrier_arrive_expect(barrier_of(shared_memory()), 16);
  bulk_load(shared_memory(), p.out, 16, barrier_of(shared_memory()));
  mbarrier_wait(barrier_of(shared_memory()), 0);
}

void fences(uint64_t seed) {
  Memory memory;
  run(loads_own_stores<true>, seed, memory);
  reported("tma_load: out was written by this grid", loads_own_stores<false>, seed);
  const auto second = [&](Kernel kernel) {
    launch(Kernel(dependent_first), {dim3(1), 64}, memory.params);
    launch(kernel, {dim3(1), 64, kSmemBytes, 1, false, true}, memory.params);
    emulator::synchronize({seed});
  };
  second(loads_after_dependency<true>);
  check::reports("bulk_load: out was written", [&] { second(loads_after_dependency<false>); });
}

// ---- addresses

void misaligned_load(Params p) { store16(p.out, load16(p.in + 1)); }
void misaligned_shared(Params) { store16_shared(shared_memory() + 8, make_uint4(0, 0, 0, 0)); }
void misaligned_tile(Params p) {
  init_barrier(1);
  if (threadIdx.x == 0) tma_load(shared_memory() + 512, &p.map, 0, 0, barrier_of(shared_memory()));
}
void misaligned_run(Params p) {
  init_barrier(1);
  if (threadIdx.x == 0) bulk_load(shared_memory(), p.in + 1, 16, barrier_of(shared_memory()));
}
void load_behind(Params p) { store(p.out, load(p.in + kWords)); }
void load_before(Params p) { store16(p.out, load16_weights(p.in - 4)); }
void store_behind(Params p) { store16(p.out + kWords - 4 + threadIdx.x / 63 * 4, make_uint4(0, 0, 0, 0)); }
void store_to_input(Params p) { store(const_cast<uint32_t*>(p.in), 1u); }
void store_nowhere(Params) {
  static uint32_t no_buffer;
  store(&no_buffer, 1u);
}
void shared_behind(Params) { load16_shared(shared_memory() + kSmemBytes); }
void matrix_behind(Params) {
  uint32_t r[4];
  ldmatrix<4>(r, shared_memory() + kSmemBytes - 16 * 32 + (lane_index() + 1) * 16);
}
void copy_behind(Params p) { copy16_async(shared_memory(), p.in + kWords); }

void addresses(uint64_t seed) {
  reported("load16: ", misaligned_load, seed);
  reported("not a multiple of 16", misaligned_load, seed);
  reported("not a multiple of 16", misaligned_shared, seed);
  reported("not a multiple of 1024", misaligned_tile, seed);
  reported("not a multiple of 16", misaligned_run, seed);
  reported("out of bounds, 4 bytes at offset 8192 of in (8192 bytes)", load_behind, seed);
  reported("out of bounds", load_before, seed);
  reported("of out (8192 bytes)", store_behind, seed);
  reported("writes to the input in", store_to_input, seed);
  reported("out of bounds", store_nowhere, seed);
  reported("shared memory", shared_behind, seed);
  reported("shared memory", matrix_behind, seed);
  reported("out of bounds", copy_behind, seed);
  reported("emulator_test::store_behind, block (0, 0, 0), thread 63, seed", store_behind, seed);  // and where
}

// ---- divergence and deadlock

void half_a_warp(Params) {
  if (lane_index() < 16) warp_sum(1.f);
}
void two_ways(Params) {
  if (lane_index() < 16) {
    warp_sum(1.f);
  } else {
    __syncwarp();
  }
}
void half_a_block(Params) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    barrier_sync(1, 64);
}
void other_count(Params) { barrier_sync(1, threadIdx.x < 32 ? 64 : 128); }
void flag_nobody_sets(Params p) {
  while (load_acquire(p.counter) == 0) __syncwarp();
}
void barrier_of_grid(Params p) { grid_barrier(p.counter); }
void endless_stack(Params p) {
  volatile char large[emulator::kStackBytes];
  for (size_t i = 0; i < sizeof large; ++i) large[i] = static_cast<char>(i);
  (void)p;
  __syncthreads();
}
void arrives_only(Params) { cluster_arrive(); }
void writes_to_ended(Params) {
  if (cluster_rank() == 1) return;
  cluster_sync();  // waits for those that have not ended
  *peer_pointer(shared_memory(), 1) = 1;
}

void stuck_threads(uint64_t seed) {
  reported("deadlock", half_a_warp, seed);
  reported("__shfl_xor_sync", half_a_warp, seed);
  reported("divergence", two_ways, seed);
  reported("deadlock", half_a_block, seed);
  reported("__syncthreads", half_a_block, seed);
  reported("used for", other_count, seed);
  reported("deadlock", flag_nobody_sets, seed);
  reported("load_acquire", flag_nobody_sets, seed);
  {
    Memory memory;
    run(barrier_of_grid, seed, memory, {4, 64, 1, true});
  }
  reported("deadlock", barrier_of_grid, seed, {4, 64, 1, false, 3});
  reported("4 blocks, 3 fit", barrier_of_grid, seed, {4, 64, 1, true, 3});
  reported("unfinished", arrives_only, seed, {2, 64, 2});
  reported("has ended", writes_to_ended, seed, {2, 32, 2});
}

void stacks(uint64_t seed) {
#ifndef __SANITIZE_ADDRESS__  // which would stop the program itself
  reported("more stack", endless_stack, seed, {1, 32});
#endif
  (void)seed;
}

// ---- wgmma: tiles of ones, so that d is 64 for a depth of 64

enum class Fault {
  none,
  no_fence,
  overwrites_tile,
  reads_early,
  no_wait,
  other_descriptors,
  inside_atom,
  no_swizzle,
  narrow_rows,
  outside,
  other_n
};

template <Fault kFault>
void ones(Params p) {
  auto* tile = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = threadIdx.x; i < 4096; i += 128) tile[i] = narrow<Bf16>(1);
  fence_async_shared();
  __syncthreads();
  uint64_t a = wgmma_tile(tile);
  if (kFault == Fault::other_descriptors && threadIdx.x == 77) a += kNextK;
  if (kFault == Fault::inside_atom) a += 4 * kNextK;
  if (kFault == Fault::no_swizzle) a &= ~kSwizzle128;
  if (kFault == Fault::narrow_rows) a |= 3 * kSwizzle128;  // of a K-major operand
  if (kFault == Fault::outside) a += kTileBytes / 2 >> 4;
  float d[32];
  if (kFault != Fault::no_fence) wgmma_fence();
  for (int k = 0; k < 4; ++k)
    wgmma<Bf16, 64>(d, a + (kFault == Fault::inside_atom ? 0 : k * kNextK), wgmma_tile(tile) + k * kNextK, k > 0);
  if (kFault == Fault::other_n) wgmma<Bf16, 32>(reinterpret_cast<float(&)[16]>(d), a, a);
  wgmma_commit();
  const float early = d[0];
  if (kFault == Fault::overwrites_tile) tile[threadIdx.x] = 0;
  if (kFault != Fault::no_wait) wgmma_wait<0>();
  bool is_right = true;
  for (float v : d) is_right &= v == 64;
  if (kFault == Fault::reads_early) is_right &= early == 64;
  store(p.out + threadIdx.x, is_right ? threadIdx.x + 1 : 0u);
}

void products(uint64_t seed) {
  const Shape shape{1, 128};
  check::that(copies(ones<Fault::none>, seed, 128, shape), "wgmma");
  check::that(!copies(ones<Fault::overwrites_tile>, seed, 128, shape), "wrong result of an overwritten tile");
  check::that(!copies(ones<Fault::reads_early>, seed, 128, shape), "wrong result before the wait");
  reported("no wgmma_fence", ones<Fault::no_fence>, seed, shape);
  reported("unfinished", ones<Fault::no_wait>, seed, shape);
  reported("different descriptors", ones<Fault::other_descriptors>, seed, shape);
  reported("inside of an 8-row atom", ones<Fault::inside_atom>, seed, shape);
  reported("128-byte swizzle", ones<Fault::no_swizzle>, seed, shape);
  reported("rows of 32 bytes, for 64 elements of a K-major", ones<Fault::narrow_rows>, seed, shape);
  reported("outside of shared memory", ones<Fault::outside>, seed, shape);
  reported("different n", ones<Fault::other_n>, seed, shape);
}

void metadata_descends(Params) {
  float d[4] = {};
  const uint32_t zeros[4] = {};
  mma_sp_m16n8k32<Bf16, 0>(d, zeros, zeros, 0);  // both kept elements at position 0
}

// ---- launches and seeds

void order_of_threads(Params p) {  // who came when
  __syncthreads();
  const uint64_t turn = add_release(p.counter, 1);
  store(p.out + turn, static_cast<uint32_t>(threadIdx.x));
}

void launches(uint64_t seed) {
  reported("33 threads", barrier_of_grid, seed, {1, 33});
  reported("no blocks", barrier_of_grid, seed, {0, 32});
  reported("clusters of 2 in a grid of 3", barrier_of_grid, seed, {3, 32, 2});
  reported("do not ascend", metadata_descends, seed, {1, 32});
  Memory first, second, third;
  run(order_of_threads, seed, first);
  run(order_of_threads, seed, second);
  run(order_of_threads, seed + 100, third);
  check::that(std::equal(first.out.data(), first.out.data() + 64, second.out.data()), "the same seed gives the same order");
  check::that(!std::equal(first.out.data(), first.out.data() + 64, third.out.data()), "another seed another");
}

}  // namespace emulator_test

int main(int count, char** arguments) {
  using namespace emulator_test;
  return check::run(count, arguments,
                    {
                        {"missing barriers", missing_barriers},
                        {"asynchronous copies", asynchronous_copies},
                        {"mbarriers", mbarriers},
                        {"fences", fences},
                        {"addresses", addresses},
                        {"divergence and deadlock", stuck_threads},
                        {"stack", stacks},
                        {"wgmma", products},
                        {"launches and seeds", launches},
                    });
}
