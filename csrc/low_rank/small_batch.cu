// low_rank on an sm_90 for 17 to 256 rows of x: y = activation((x v^T) u^T + bias) + residual, weights read once, h = x v^T
// rounded once.
//
//   x [m, k]   v [r, k]   u [n, r]   bias [n]   h [m, r]   residual, y [m, n]      bf16 or fp16, rows 16-byte aligned
//
// Weights are the tall operand of a warpgroup's product, all rows of x (tokens) its other one, sums in float: a block has a
// tile of 64 rows of a weight, and reads it once (small_batch_layout.h). Tiles come by TMA, 64 of the contraction at a time,
// into two rings; one warp keeps that of the weights full, another that of the tokens, four warps multiply.
//
//      k ->  block 0   block 1 ...          r ->
//   v  [---------|---------]  64 rows    u  [----|----|----]  64 rows    a block: a tile and all of r
//       a cluster: a tile of v               [----|----|----]
//       a block: its share of k              Before h is there, a block has asked for as much of its tile as the ring takes.
//
// Of the first product each block of a cluster has a part of every sum. They meet in the shared memory of the cluster: each
// block adds up some tokens, rank by rank, rounds, and stores h. All sums are added in an order that the sizes alone decide:
// the same inputs give the same bits.
//
// Two kernels, the second of which may start, and load u, while the first still runs.
//
// Compiled for sm_90a, and run by tests in an emulator; it HAS NEVER RUN ON A GPU, and no speed is claimed.
#include "device/cluster.h"
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

template <class T, int kTokenCount>
struct SmallBatchConfig {
  using Element = T;
  static constexpr int kTokens = kTokenCount;  // of a group
  static constexpr int kThreads = kSmallBatchThreads;
  static constexpr int kWeightWarp = kConsumerWarps;  // the one after loads tokens
  static_assert(kTokens == 32 || kTokens == 64 || kTokens == 128 || kTokens == 256, "what batch_groups chooses");
  static_assert(kConsumerWarps * 32 == device::kWarpgroupThreads, "the first warpgroup multiplies");
};

struct RingSizes {
  int weight_slots, token_slots;
};

struct SmallBatchFirst {
  device::TensorMap v, x;  // boxes of 64 rows, and of a group of tokens, by a slab
  uint16_t* h;             // [m, r]
  int m, r, groups, splits, slabs;
  RingSizes sizes;
};

struct SmallBatchSecond {
  device::TensorMap u, h;         // as v and x
  device::TensorMap residual, y;  // boxes of a group of tokens by 64 columns
  const uint16_t* bias;           // [n] or null
  Activation activation;
  bool has_residual;
  int n, groups, slabs;
  RingSizes sizes;
};

template <class Config>
using BatchSums = float[Config::kTokens / 2];  // a thread's of [64 rows, tokens]: see wgmma.h

// --- rings of slots ---

struct Ring {
  uint8_t* slots;
  int slot_bytes, count;
  uint64_t *full, *empty;
};

// A position in a ring: the slot, and the parity of the phase that a consumer waits for there.
struct Turn {
  int slot = 0, parity = 0;
  LOWFAT_DEVICE void advance(const Ring& ring) {
    if (++slot == ring.count) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// A block's shared memory.
template <class Config>
struct Rings {
  uint8_t* smem;
  Ring weights, tokens;

  LOWFAT_DEVICE Rings(const BatchMemory& at, const RingSizes& sizes) : smem(device::shared_memory()) {
    auto* barriers = reinterpret_cast<uint64_t*>(smem + at.barriers);
    weights = {smem + at.weights, kWeightSlotBytes, sizes.weight_slots, barriers, barriers + sizes.weight_slots};
    barriers += 2 * sizes.weight_slots;
    tokens = {smem + at.tokens, token_slot_bytes(Config::kTokens), sizes.token_slots, barriers,
              barriers + sizes.token_slots};
  }

  LOWFAT_DEVICE void begin() const {
    if (threadIdx.x == 0) {
      for (const Ring& ring : {weights, tokens}) {
#pragma unroll 1
        for (int slot = 0; slot < ring.count; ++slot) {
          device::mbarrier_init(ring.full + slot, 1);
          device::mbarrier_init(ring.empty + slot, kConsumerWarps);
        }
      }
      device::fence_mbarrier_init();
    }
    __syncthreads();
  }
};

// One thread loads the slabs of an operand in turn, each as soon as there is a slot for it.
LOWFAT_DEVICE void produce(const Ring& ring, Turn& turn, const device::TensorMap& map, int row, const Range& slabs) {
#pragma unroll 1
  for (int slab = slabs.first; slab < slabs.last; ++slab) {
    device::mbarrier_wait(ring.empty + turn.slot, turn.parity ^ 1);
    device::mbarrier_arrive_expect(ring.full + turn.slot, ring.slot_bytes);
    device::tma_load(ring.slots + turn.slot * ring.slot_bytes, &map, row, slab * kSlab, ring.full + turn.slot);
    turn.advance(ring);
  }
}

// sums [64 rows, tokens] of the slabs. The products of a slab run while the next is waited for; a slot is free when those
// that read it are done, which each warp knows of its own 16 rows. The turn of the tokens after the last slab.
template <class Config>
LOWFAT_DEVICE Turn multiply_slabs(const Rings<Config>& rings, int slabs, BatchSums<Config>& sums) {
  const auto release = [](const Ring& ring, int slot) {
    if (device::lane_index() == 0) device::mbarrier_arrive(ring.empty + slot);
  };
  Turn weight, token;
  int weight_before = 0, token_before = 0;
#pragma unroll 1
  for (int slab = 0; slab < slabs; ++slab) {
    device::mbarrier_wait(rings.weights.full + weight.slot, weight.parity);
    device::mbarrier_wait(rings.tokens.full + token.slot, token.parity);
    const uint64_t a = device::wgmma_tile(rings.weights.slots + weight.slot * kWeightSlotBytes);
    const uint64_t b = device::wgmma_tile(rings.tokens.slots + token.slot * token_slot_bytes(Config::kTokens));
    device::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSlab / 16; ++step) {
      device::wgmma<typename Config::Element, Config::kTokens>(sums, a + step * device::kNextK, b + step * device::kNextK,
                                                               slab + step > 0);
    }
    device::wgmma_commit();
    device::wgmma_wait<1>();
    if (slab > 0) {
      release(rings.weights, weight_before);
      release(rings.tokens, token_before);
    }
    weight_before = weight.slot, token_before = token.slot;
    weight.advance(rings.weights);
    token.advance(rings.tokens);
  }
  device::wgmma_wait<0>();
  release(rings.tokens, token_before);  // for the residual
  return token;
}

LOWFAT_DEVICE void sync_consumers() { device::barrier_sync(1, kConsumerWarps * 32); }

// --- first product: h = x v^T ---

// This block's part of the sums, to where the cluster reads it.
template <class Config>
LOWFAT_DEVICE void store_partial(float* smem_sums, const BatchSums<Config>& sums) {
#pragma unroll
  for (int i = 0; i < Config::kTokens / 2; ++i) {
    const device::Position at = device::wgmma_d(threadIdx.x, i);
    smem_sums[partial_at(at.column, at.row)] = sums[i];
  }
}

// A block's share of the tokens, 8 rows of v at a time: the parts of all blocks in the order of their ranks.
template <class Config>
LOWFAT_DEVICE void store_h(const SmallBatchFirst& p, const BatchItem& item, const float* smem_sums) {
  using T = typename Config::Element;
  const Range mine = share(Config::kTokens, p.splits, device::cluster_rank());
  for (int i = threadIdx.x; i < (mine.last - mine.first) * (kBatchRows / 8); i += Config::kThreads) {
    const int token = mine.first + i / (kBatchRows / 8), row = i % (kBatchRows / 8) * 8;
    if (item.token + token >= p.m || item.row + row >= p.r) continue;
    float4 low = make_float4(0, 0, 0, 0), high = make_float4(0, 0, 0, 0);
    const auto* from = reinterpret_cast<const float4*>(smem_sums + partial_at(token, row));
#pragma unroll 4
    for (int rank = 0; rank < p.splits; ++rank) {
      const float4* part = device::peer_pointer(from, rank);
      const float4 a = part[0], b = part[1];
      low = make_float4(low.x + a.x, low.y + a.y, low.z + a.z, low.w + a.w);
      high = make_float4(high.x + b.x, high.y + b.y, high.z + b.z, high.w + b.w);
    }
    device::store16(p.h + int64_t{item.token + token} * p.r + item.row + row,
                    make_uint4(device::pack2<T>(low.x, low.y), device::pack2<T>(low.z, low.w),
                               device::pack2<T>(high.x, high.y), device::pack2<T>(high.z, high.w)));
  }
}

template <class Config>
LOWFAT_DEVICE void first_product(const SmallBatchFirst& p) {
  const Rings<Config> rings(first_memory(Config::kTokens, p.sizes.weight_slots, p.sizes.token_slots), p.sizes);
  rings.begin();
  device::launch_dependents();
  const BatchItem item = batch_item(Config::kTokens, p.groups, blockIdx.x / p.splits);
  const Range slabs = share(p.slabs, p.splits, device::cluster_rank());
  auto* smem_sums = reinterpret_cast<float*>(rings.smem);
  const int warp = device::warp_index();
  Turn turn;
  if (warp < kConsumerWarps) {
    BatchSums<Config> sums;
    multiply_slabs<Config>(rings, slabs.last - slabs.first, sums);
    sync_consumers();  // no warp reads the rings any more
    store_partial<Config>(smem_sums, sums);
  } else if (device::lane_index() == 0) {
    if (warp == Config::kWeightWarp) {
      produce(rings.weights, turn, p.v, item.row, slabs);
    } else {
      produce(rings.tokens, turn, p.x, item.token, slabs);
    }
  }
  __syncwarp();
  device::cluster_sync();
  store_h<Config>(p, item, smem_sums);
  device::fence_async_global();  // h is written by stores and read by the copy engine: the writer's half, see second_product
  __syncwarp();
  device::cluster_sync();  // the others may still read our sums
}

// --- second product: y = activation(h u^T + bias) + residual ---

template <class T>
LOWFAT_DEVICE float bias_of(const SmallBatchSecond& p, int column) {
  return p.bias && column < p.n ? device::widen<T>(device::load(p.bias + column)) : 0;
}

// A tile of y, to be sent off: its rows are tokens, so what a thread has of two neighbouring tokens goes to different rows.
// The residual's tile, where there is one, lies in the same place in the same order.
template <class Config, Activation kActivation>
LOWFAT_DEVICE void store_result(uint8_t* smem_result, bool has_residual, const BatchSums<Config>& sums, float upper_bias,
                                float lower_bias) {
  using T = typename Config::Element;
#pragma unroll
  for (int j = 0; j < Config::kTokens / 8; j += 2) {  // eights of tokens
    uint8_t* piece = smem_result + result_piece(device::warp_index(), device::lane_index(), j * 8);
    uint32_t r[4] = {};
    if (has_residual) device::ldmatrix_transposed<4>(r, piece);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float bias = i % 2 ? lower_bias : upper_bias;
      const int at = 4 * (j + i / 2) + 2 * (i % 2);
      const float2 residual = device::unpack2<T>(r[i]);
      r[i] = device::pack2<T>(finished(sums[at], bias, kActivation, residual.x),
                              finished(sums[at + 1], bias, kActivation, residual.y));
    }
    device::stmatrix_transposed<4>(piece, r);
  }
}

template <class Config>
LOWFAT_DEVICE void second_product(const SmallBatchSecond& p) {
  const Rings<Config> rings(second_memory(Config::kTokens, p.sizes.weight_slots, p.sizes.token_slots), p.sizes);
  rings.begin();
  const BatchItem item = batch_item(Config::kTokens, p.groups, blockIdx.x);
  const Range slabs = {0, p.slabs};
  const int warp = device::warp_index();
  Turn turn;
  if (warp < kConsumerWarps) {
    const int column = item.row + warp * 16 + device::lane_index() / 4;
    const float upper_bias = bias_of<typename Config::Element>(p, column);
    const float lower_bias = bias_of<typename Config::Element>(p, column + 8);
    BatchSums<Config> sums;
    turn = multiply_slabs<Config>(rings, p.slabs, sums);
    uint8_t* smem_result = rings.smem;
    if (p.has_residual) {
      smem_result = rings.tokens.slots + turn.slot * token_slot_bytes(Config::kTokens);
      device::mbarrier_wait(rings.tokens.full + turn.slot, turn.parity);
    } else {
      sync_consumers();  // no warp reads the rings any more
    }
    with_activation(p.activation, [&](auto activation) {
      store_result<Config, decltype(activation)::value>(smem_result, p.has_residual, sums, upper_bias, lower_bias);
    });
    device::fence_async_shared();
    sync_consumers();
    if (threadIdx.x == 0) {
      device::tma_store(&p.y, item.token, item.row, smem_result);
      device::commit_stores();
      device::wait_stores_read<0>();
    }
  } else if (device::lane_index() == 0) {
    if (warp == Config::kWeightWarp) {
      produce(rings.weights, turn, p.u, item.row, slabs);  // whether h is there or not
    } else {
      device::wait_for_dependency();
      // h was written by ordinary stores of the grid before. That it has ended makes them visible to ordinary loads; the
      // copy engine has a way of its own to memory (the async proxy), and the fences on both sides order the two.
      device::fence_async_global();
      produce(rings.tokens, turn, p.h, item.token, slabs);
      const int column = item.row / kSlab;
      if (p.has_residual) produce(rings.tokens, turn, p.residual, item.token, {column, column + 1});
    }
  }
}

// --- the kernels ---

// Two blocks, one of each kernel, share a multiprocessor.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 2) small_batch_first(const __grid_constant__ SmallBatchFirst p) {
  if constexpr (device::kHasWarpgroupProducts) {
    first_product<Config>(p);
  } else {
    device::unreachable_here();
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 2) small_batch_second(const __grid_constant__ SmallBatchSecond p) {
  if constexpr (device::kHasWarpgroupProducts) {
    second_product<Config>(p);
  } else {
    device::unreachable_here();
  }
}

// --- launch ---

inline device::Launch launch_of(const BatchPhase& phase, void* stream) {
  device::Launch shape;
  shape.grid = dim3(phase.items * phase.splits);
  shape.threads = kSmallBatchThreads;
  shape.smem_bytes = phase.smem_bytes;
  shape.cluster = phase.splits;
  shape.stream = stream;
  return shape;
}

// A map of a row-major matrix [rows, columns], read or written box_rows x 64 at a time.
inline const char* map_rows(device::TensorMap& map, const void* gmem, int rows, int columns, int box_rows) {
  return device::make_tensor_map(map, {gmem, rows, columns, columns, box_rows, kSlab});
}

template <class Config>
const char* launch_first(const BatchPhase& phase, const SmallBatchOperands& in, void* stream) {
  SmallBatchFirst p{};
  if (const char* error = map_rows(p.v, in.v, in.r, in.k, kBatchRows)) return error;
  if (const char* error = map_rows(p.x, in.x, in.m, in.k, Config::kTokens)) return error;
  p.h = in.h, p.m = in.m, p.r = in.r;
  p.groups = phase.groups, p.splits = phase.splits, p.slabs = phase.slabs;
  p.sizes = {phase.weight_slots, phase.token_slots};
  return device::launch(small_batch_first<Config>, launch_of(phase, stream), p);
}

template <class Config>
const char* launch_second(const BatchPhase& phase, const SmallBatchOperands& in, void* stream) {
  SmallBatchSecond p{};
  if (const char* error = map_rows(p.u, in.u, in.n, in.r, kBatchRows)) return error;
  if (const char* error = map_rows(p.h, in.h, in.m, in.r, Config::kTokens)) return error;
  if (const char* error = map_rows(p.y, in.y, in.m, in.n, Config::kTokens)) return error;
  p.has_residual = in.residual != nullptr;
  if (p.has_residual) {
    if (const char* error = map_rows(p.residual, in.residual, in.m, in.n, Config::kTokens)) return error;
  }
  p.bias = in.bias, p.activation = in.activation, p.n = in.n, p.groups = phase.groups, p.slabs = phase.slabs;
  p.sizes = {phase.weight_slots, phase.token_slots};
  device::Launch shape = launch_of(phase, stream);
  shape.is_dependent = true;
  return device::launch(small_batch_second<Config>, shape, p);
}

// run(config) with the config of so many tokens.
template <class T, class Run>
const char* with_config(int tokens, const Run& run) {
  switch (tokens) {
    case 32: return run(SmallBatchConfig<T, 32>());
    case 64: return run(SmallBatchConfig<T, 64>());
    case 128: return run(SmallBatchConfig<T, 128>());
    case 256: return run(SmallBatchConfig<T, 256>());
    default: return "the plan does not cover these sizes";
  }
}

template <class T>
const char* launch_both(const SmallBatchPlan& plan, const SmallBatchOperands& in, void* stream) {
  const char* error = with_config<T>(
      plan.first.tokens, [&](auto config) { return launch_first<decltype(config)>(plan.first, in, stream); });
  if (error) return error;
  return with_config<T>(plan.second.tokens,
                        [&](auto config) { return launch_second<decltype(config)>(plan.second, in, stream); });
}

const char* launch_small_batch(const SmallBatchPlan& plan, const SmallBatchOperands& operands, Dtype dtype, void* stream) {
  return dtype == Dtype::bfloat16 ? launch_both<device::Bf16>(plan, operands, stream)
                                  : launch_both<device::Fp16>(plan, operands, stream);
}

}  // namespace low_rank
