// low_rank on an sm_90 for some hundred to some thousand rows of x: both products in one launch, h = x v^T rounded once.
//
//   x [m, k]   v [r, k]   u [n, r]   bias [n]   residual [m, n]   h [m, r]   y = activation(h u^T + bias) + residual  [m, n]
//   bf16 or fp16, rows 16-byte aligned, sums in float
//
//        h: tiles of x v^T            y: tiles of h u^T           blocks draw tickets, the numbers of tiles:
//      [ 0 | 1 ]  128 tokens        [ 6 | 7 | 8 ]                    block 0   0    4    7 ...
//      [ 2 | 3 ]  128 tokens        [ 9 |10 |11 ]                    block 1   2    5    8 ...
//      [ 4 | 5 ]  128 tokens        [12 |13 |14 ]                    block 2   1    3    6 ...
//
// A tile of y waits until the tiles of h of the same tokens are counted as done. Their tickets are smaller, and who holds a
// ticket is running and works on its tickets in turn, so all waits end, however few of the blocks are resident.
//
// In a block one thread draws tickets and loads slabs by TMA into a ring; two warpgroups multiply, each every other tile, so
// that one multiplies while the other brings its result away. What does not depend on h (u) is asked for before h is there.
//
// Where the first product has few tiles and is deep, its depth is split: each split writes its sums to a workspace, and the
// one that comes last adds up all of a tile, in the order of the splits. The same inputs give the same bits.
//
// Compiled for sm_90a, and run by tests in an emulator; it HAS NEVER RUN ON A GPU, and no speed is claimed.
#include "device/convert.h"
#include "device/grid.h"
#include "device/launch.h"
#include "device/load.h"
#include "device/mma.h"
#include "device/tma.h"
#include "device/wgmma.h"
#include "low_rank/epilogue.h"
#include "low_rank/low_rank.h"

namespace low_rank {

// The activation is part of the config because it is inlined 128 times: a switch at each place would be 200 KB of code.
template <class T, Activation kActivationOfY>
struct ChainConfig {
  using Element = T;
  static constexpr Activation kActivation = kActivationOfY;
};

static_assert(kChainThreads == 3 * device::kWarpgroupThreads, "registers are moved from one warpgroup to two");
static_assert(kChainTile == 2 * 64 && kChainSlab * 2 == 128, "two products of 64 rows, one row of the swizzle");

struct ChainParams {
  device::TensorMap x, v, h, u, y, residual;  // boxes of 128 rows by a slab
  const uint16_t* bias;                       // [n] or null
  float* partials;                            // [units of the first product][128 x 128], where it is split: partial_at
  uint32_t* counters;                         // [counters_of]
  int n;
  bool has_residual;
  ChainPlan plan;
};

// A thread's of a tile [128 tokens, 128 columns], 64 tokens at a time: see wgmma.h.
using ChainTileSums = float[2][kChainTile / 2];

// A position in a ring of kCount: the slot, and the parity of the phase that a consumer waits for there.
template <int kCount>
struct ChainTurn {
  int slot = 0, parity = 0;
  LOWFAT_DEVICE void advance() {
    if (++slot == kCount) {
      slot = 0;
      parity ^= 1;
    }
  }
  LOWFAT_DEVICE void skip(int slots) {
    parity ^= (slot + slots) / kCount & 1;
    slot = (slot + slots) % kCount;
  }
};

// --- loads: one thread ---

// The slabs of a unit; returns the next ticket, drawn as late as it can be without a wait for it: a block that draws early
// keeps a unit from blocks that are idle.
LOWFAT_DEVICE int load_unit(const ChainParams& p, ChainShared& smem, ChainTurn<kChainSlots>& at, const ChainUnit& unit) {
  const device::TensorMap* weights = unit.is_second ? &p.u : &p.v;
  const device::TensorMap* tokens = unit.is_second ? &p.h : &p.x;
  const auto load_weights = [&](const ChainTurn<kChainSlots>& turn, int slab) {
    device::mbarrier_wait(smem.empty + turn.slot, turn.parity ^ 1);
    device::mbarrier_arrive_expect(smem.full + turn.slot, sizeof(ChainShared::Slot));
    device::tma_load(smem.slots[turn.slot].weights, weights, unit.column, slab * kChainSlab, smem.full + turn.slot);
  };
  int asked = unit.slabs.first;
  if (unit.is_second) {
    const uint32_t* done = p.counters + tiles_done(unit.row_block);
    const uint32_t all = p.plan.first_columns;
    bool is_there = device::load_acquire(done) >= all;
    ChainTurn<kChainSlots> ahead = at;
    while (!is_there && asked < smaller(unit.slabs.last, kChainSlots)) {
      load_weights(ahead, asked++);
      ahead.advance();
      is_there = device::load_acquire(done) >= all;
    }
    if (!is_there) device::wait_until_reached(done, all);
    device::fence_async_global();  // h comes by the copy engine, which has a way of its own to memory: see count_tile
  }
  uint32_t next = 0;
#pragma unroll 1
  for (int slab = unit.slabs.first; slab < unit.slabs.last; ++slab) {
    if (slab == unit.slabs.last - 1) next = device::take_ticket(p.counters + kNextTicket);
    if (slab >= asked) load_weights(at, slab);
    device::tma_load(smem.slots[at.slot].tokens, tokens, unit.row, slab * kChainSlab, smem.full + at.slot);
    at.advance();
  }
  return static_cast<int>(next);
}

LOWFAT_DEVICE void produce(const ChainParams& p, ChainShared& smem) {
  ChainTurn<kChainSlots> slot;
  ChainTurn<kChainTickets> turn;
  int number = static_cast<int>(device::take_ticket(p.counters + kNextTicket));
#pragma unroll 1
  for (;;) {
    device::mbarrier_wait(smem.ticket_empty + turn.slot, turn.parity ^ 1);
    smem.ticket[turn.slot] = number;
    device::mbarrier_arrive(smem.ticket_full + turn.slot);
    turn.advance();
    if (number >= chain_units(p.plan)) return;
    number = load_unit(p, smem, slot, chain_unit(p.plan, number));
  }
}

// --- products and results: a warpgroup ---

// What a thread of a warpgroup knows of it.
struct ChainConsumer {
  const int index, thread;
  ChainTurn<kChainSlots> slot;
  int turn_parity, residual_parity = 0;

  LOWFAT_DEVICE ChainConsumer()
      : index(threadIdx.x / 128 - 1), thread(threadIdx.x % 128), turn_parity(index == 0) {}  // the first need not wait
  LOWFAT_DEVICE void sync() const { device::barrier_sync(1 + index, 128); }
};

LOWFAT_DEVICE void release_slot(ChainShared& smem, int slot) {
  if (device::lane_index() == 0) device::mbarrier_arrive(smem.empty + slot);
}

// The next ticket, also where it is the other warpgroup's.
LOWFAT_DEVICE int read_ticket(ChainShared& smem, ChainTurn<kChainTickets>& turn) {
  device::mbarrier_wait(smem.ticket_full + turn.slot, turn.parity);
  const int number = smem.ticket[turn.slot];
  __syncwarp();
  if (device::lane_index() == 0) device::mbarrier_arrive(smem.ticket_empty + turn.slot);
  turn.advance();
  return number;
}

// The products of a slab run while the next is waited for; a slot is free when those that read it are done, which each warp
// knows of its own rows.
//
// The warpgroups take turns: one that ran a whole ring ahead of the other would take a slot of this round for one of the
// next, because a barrier tells only two phases apart.
template <class T>
LOWFAT_DEVICE void multiply_slabs(ChainShared& smem, ChainConsumer& self, int slabs, ChainTileSums& sums) {
  device::mbarrier_wait(smem.turn + self.index, self.turn_parity);
  self.turn_parity ^= 1;
  int before = 0;
#pragma unroll 1
  for (int slab = 0; slab < slabs; ++slab) {
    const int slot = self.slot.slot;
    device::mbarrier_wait(smem.full + slot, self.slot.parity);
    const uint64_t upper = device::wgmma_tile(smem.slots[slot].tokens);
    const uint64_t lower = device::wgmma_tile(smem.slots[slot].tokens + kChainBoxBytes / 2);
    const uint64_t b = device::wgmma_tile(smem.slots[slot].weights);
    device::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kChainSlab / 16; ++step) {
      const uint64_t k = step * device::kNextK;
      device::wgmma<T, kChainTile>(sums[0], upper + k, b + k, slab + step > 0);
      device::wgmma<T, kChainTile>(sums[1], lower + k, b + k, slab + step > 0);
    }
    device::wgmma_commit();
    device::wgmma_wait<1>();
    if (slab > 0) release_slot(smem, before);
    before = slot;
    self.slot.advance();
  }
  if (device::lane_index() == 0) device::mbarrier_arrive(smem.turn + (1 - self.index));
  device::wgmma_wait<0>();
  release_slot(smem, before);
}

// This split's sums to the workspace. The one that comes last gets the sums of all.
LOWFAT_DEVICE bool add_splits(const ChainParams& p, ChainShared& smem, const ChainConsumer& self, int number, int tile,
                              ChainTileSums& sums) {
  constexpr int kPieces = kChainTile / 8;  // of four floats, of a half
#pragma unroll
  for (int i = 0; i < 2 * kPieces; ++i) {
    const float* four = sums[i / kPieces] + i % kPieces * 4;
    device::store(reinterpret_cast<float4*>(p.partials + partial_at(number, i, self.thread)),
                  make_float4(four[0], four[1], four[2], four[3]));
  }
  self.sync();
  if (self.thread == 0) {
    uint32_t* arrived = p.counters + splits_done(p.plan, tile);
    const bool is_last = device::add_release(arrived, 1) + 1 == static_cast<uint32_t>(p.plan.splits);
    if (is_last) device::load_acquire(arrived);  // what the others wrote before they came is visible
    smem.is_last[self.index] = is_last;
  }
  self.sync();
  if (!smem.is_last[self.index]) return false;
#pragma unroll
  for (int i = 0; i < 128; ++i) sums[i / 64][i % 64] = 0;
#pragma unroll 1
  for (int split = 0; split < p.plan.splits; ++split) {
    constexpr int kAtOnce = 8;
#pragma unroll
    for (int first = 0; first < 2 * kPieces; first += kAtOnce) {
      float4 part[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        part[i] = device::load16_floats_l2(p.partials + partial_at(tile * p.plan.splits + split, first + i, self.thread));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float* four = sums[(first + i) / kPieces] + (first + i) % kPieces * 4;
        four[0] += part[i].x, four[1] += part[i].y, four[2] += part[i].z, four[3] += part[i].w;
      }
    }
  }
  return true;
}

// The row of 16 bytes that this lane names for the 16 x 16 elements from column 16 j on of its warp's rows in a half.
LOWFAT_DEVICE uint8_t* result_row(uint8_t (&boxes)[kChainBoxes][kChainBoxBytes], const ChainConsumer& self, int half,
                                  int j) {
  const device::Position mine = device::ldmatrix_row(device::lane_index());
  return boxes[j / 4] + device::swizzled_piece(half * 64 + self.thread / 32 * 16 + mine.row, j % 4 * 2 + mine.column / 8);
}

template <class T>
LOWFAT_DEVICE void round_h(ChainShared& smem, const ChainConsumer& self, const ChainTileSums& sums) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kChainTile / 16; ++j) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = device::pack2<T>(sums[half][8 * j + 2 * i], sums[half][8 * j + 2 * i + 1]);
      device::stmatrix<4>(result_row(smem.result[self.index], self, half, j), r);
    }
  }
}

// The residual is where y is to be.
template <class Config>
LOWFAT_DEVICE void finish_y(ChainShared& smem, const ChainConsumer& self, bool has_residual, const ChainTileSums& sums) {
  using T = typename Config::Element;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kChainTile / 16; ++j) {
      uint8_t* row = result_row(smem.result[self.index], self, half, j);
      uint32_t r[4] = {0, 0, 0, 0};
      if (has_residual) device::ldmatrix<4>(r, row);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // of eight columns the upper row, the lower row; of the next eight the same
        const float* sum = sums[half] + 8 * j + 2 * i;
        const float* bias = smem.bias[self.index] + 16 * j + i / 2 * 8 + self.thread % 4 * 2;
        const float2 residual = device::unpack2<T>(r[i]);
        r[i] = device::pack2<T>(finished(sum[0], bias[0], Config::kActivation, residual.x),
                                finished(sum[1], bias[1], Config::kActivation, residual.y));
      }
      device::stmatrix<4>(row, r);
    }
  }
}

// All of the warpgroup have written the result; one thread sends it off.
LOWFAT_DEVICE void send_result(const device::TensorMap& map, ChainShared& smem, const ChainConsumer& self,
                               const ChainUnit& unit) {
  device::fence_async_shared();
  self.sync();
  if (self.thread != 0) return;
  for (int box = 0; box < kChainBoxes; ++box) {
    device::tma_store(&map, unit.row, unit.column + box * kChainSlab, smem.result[self.index][box]);
  }
  device::commit_stores();
}

// One thread: a tile of h is in memory, for the copy engines of other blocks.
LOWFAT_DEVICE void count_tile(const ChainParams& p, int row_block) {
  device::wait_stores_written<0>();
  device::fence_async_global();
  device::add_release(p.counters + tiles_done(row_block), 1);
}

// A tile of h, or this split's share of it.
template <class T>
LOWFAT_DEVICE void first_unit_of_chain(const ChainParams& p, ChainShared& smem, ChainConsumer& self, int number,
                                       const ChainUnit& unit) {
  ChainTileSums sums;
  multiply_slabs<T>(smem, self, unit.slabs.last - unit.slabs.first, sums);
  if (p.plan.splits > 1 && !add_splits(p, smem, self, number, unit.tile, sums)) return;
  self.sync();  // the result before was a tile of h, which one thread has seen in memory
  round_h<T>(smem, self, sums);
  send_result(p.h, smem, self, unit);
  if (self.thread == 0) count_tile(p, unit.row_block);
}

// A tile of y. Biases and residual are asked for before the products.
template <class Config>
LOWFAT_DEVICE void second_unit_of_chain(const ChainParams& p, ChainShared& smem, ChainConsumer& self,
                                        const ChainUnit& unit) {
  using T = typename Config::Element;
  uint64_t* full = smem.residual_full + self.index;
  if (self.thread == 0) {
    device::wait_stores_read<0>();  // the result before has left
    if (p.has_residual) {
      device::mbarrier_arrive_expect(full, kChainBoxes * kChainBoxBytes);
      for (int box = 0; box < kChainBoxes; ++box) {
        device::tma_load(smem.result[self.index][box], &p.residual, unit.row, unit.column + box * kChainSlab, full);
      }
    }
  }
  const int column = unit.column + self.thread;
  smem.bias[self.index][self.thread] = p.bias && column < p.n ? device::widen<T>(device::load(p.bias + column)) : 0;

  ChainTileSums sums;
  multiply_slabs<T>(smem, self, unit.slabs.last, sums);
  self.sync();  // biases are there, and there is room for the result
  if (p.has_residual) {
    device::mbarrier_wait(full, self.residual_parity);
    self.residual_parity ^= 1;
  }
  finish_y<Config>(smem, self, p.has_residual, sums);
  send_result(p.y, smem, self, unit);
}

template <class Config>
LOWFAT_DEVICE void consume(const ChainParams& p, ChainShared& smem) {
  ChainConsumer self;
  ChainTurn<kChainTickets> turn;
#pragma unroll 1
  for (int whose = 0;; whose ^= 1) {
    const int number = read_ticket(smem, turn);
    if (number >= chain_units(p.plan)) break;
    const ChainUnit unit = chain_unit(p.plan, number);
    if (whose != self.index) {
      self.slot.skip(unit.slabs.last - unit.slabs.first);
    } else if (unit.is_second) {
      second_unit_of_chain<Config>(p, smem, self, unit);
    } else {
      first_unit_of_chain<typename Config::Element>(p, smem, self, number, unit);
    }
  }
  if (self.thread == 0) device::wait_stores_read<0>();
}

// --- the kernel ---

LOWFAT_DEVICE void begin_chain(ChainShared& smem) {
  constexpr int kWarps = 4;  // of a warpgroup; each reports for itself
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kChainSlots; ++slot) {
      device::mbarrier_init(smem.full + slot, 1);
      device::mbarrier_init(smem.empty + slot, kWarps);
    }
    for (int slot = 0; slot < kChainTickets; ++slot) {
      device::mbarrier_init(smem.ticket_full + slot, 1);
      device::mbarrier_init(smem.ticket_empty + slot, kChainConsumers * kWarps);
    }
    for (int consumer = 0; consumer < kChainConsumers; ++consumer) {
      device::mbarrier_init(smem.residual_full + consumer, 1);
      device::mbarrier_init(smem.turn + consumer, kWarps);
    }
    device::fence_mbarrier_init();
  }
  __syncthreads();
}

// One thread, when no ticket is left: the last block leaves the counters as the first has found them, for the next launch
// and for a graph's next run. Products may still be under way, but none that counts: who loads tiles of y has waited for h.
LOWFAT_DEVICE void reset_counters(const ChainParams& p) {
  uint32_t* ended = p.counters + kEndedBlocks;
  if (device::add_release(ended, 1) + 1 != gridDim.x) return;
  device::load_acquire(ended);
#pragma unroll 1
  for (int i = 0; i < counters_of(p.plan); ++i) device::store(p.counters + i, uint32_t{0});
}

template <class Config>
__global__ void __launch_bounds__(kChainThreads, 1) chain(const __grid_constant__ ChainParams p) {
  if constexpr (device::kHasWarpgroupProducts) {
    auto& smem = *reinterpret_cast<ChainShared*>(device::shared_memory());
    begin_chain(smem);
    if (threadIdx.x < device::kWarpgroupThreads) {
      device::give_registers<40>();
      if (threadIdx.x == 0) {
        produce(p, smem);
        reset_counters(p);
      }
    } else {
      device::take_registers<232>();
      consume<Config>(p, smem);
    }
  } else {
    device::unreachable_here();
  }
}

// --- launch ---

// A map of a row-major matrix [rows, columns], moved 128 x 64 at a time.
inline const char* map_boxes(device::TensorMap& map, const void* gmem, int rows, int columns) {
  return device::make_tensor_map(map, {gmem, rows, columns, columns, kChainTile, kChainSlab});
}

template <class Config>
const char* launch_config(const ChainPlan& plan, const ChainOperands& in, void* stream) {
  ChainParams p{};
  if (const char* error = map_boxes(p.x, in.x, in.m, in.k)) return error;
  if (const char* error = map_boxes(p.v, in.v, in.r, in.k)) return error;
  if (const char* error = map_boxes(p.h, in.h, in.m, in.r)) return error;
  if (const char* error = map_boxes(p.u, in.u, in.n, in.r)) return error;
  if (const char* error = map_boxes(p.y, in.y, in.m, in.n)) return error;
  p.has_residual = in.residual != nullptr;
  if (p.has_residual) {
    if (const char* error = map_boxes(p.residual, in.residual, in.m, in.n)) return error;
  }
  p.bias = in.bias, p.partials = in.partials, p.counters = in.counters, p.n = in.n, p.plan = plan;
  device::Launch shape;
  shape.grid = dim3(plan.grid);
  shape.threads = kChainThreads;
  shape.smem_bytes = plan.smem_bytes;
  shape.stream = stream;
  return device::launch(chain<Config>, shape, p);
}

template <class T>
const char* launch_activation(const ChainPlan& plan, const ChainOperands& in, void* stream) {
  switch (in.activation) {
    case Activation::relu: return launch_config<ChainConfig<T, Activation::relu>>(plan, in, stream);
    case Activation::gelu: return launch_config<ChainConfig<T, Activation::gelu>>(plan, in, stream);
    case Activation::gelu_tanh: return launch_config<ChainConfig<T, Activation::gelu_tanh>>(plan, in, stream);
    case Activation::silu: return launch_config<ChainConfig<T, Activation::silu>>(plan, in, stream);
    case Activation::none: break;
  }
  return launch_config<ChainConfig<T, Activation::none>>(plan, in, stream);
}

const char* launch_chain(const ChainPlan& plan, const ChainOperands& operands, Dtype dtype, void* stream) {
  if (plan.row_blocks == 0) return "the plan does not cover these sizes";
  return dtype == Dtype::bfloat16 ? launch_activation<device::Bf16>(plan, operands, stream)
                                  : launch_activation<device::Fp16>(plan, operands, stream);
}

}  // namespace low_rank
