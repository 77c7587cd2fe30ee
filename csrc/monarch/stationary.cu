// monarch on an sm_90 for many blocks, whose factors clusters hold in their shared memory: y = blocks of (x v^T), permuted,
// u^T + bias. Weights are read once by each cluster; tokens stream through, and the middle never leaves the clusters.
//
//   x [m, k]   v [b_in, r b_out, p]   u [b_out, s, b_in r]   bias [n]   y [m, n]   h [b_out, m, b_in r], where it is wanted
//   bf16 or fp16, sums in float, the middle rounded once
//
//    a cluster of 8 CTAs, tile after tile of 16 or 32 tokens          in a CTA:
//                                                                       a warp     brings its weights, once
//      x  | 0 | 1 | .. | 7 |   a CTA: its input blocks                  a warp     brings tokens of input blocks, to a ring
//           \   \ /   /        every CTA sends to every one             4 warps    z[i] = v[i] x[i]^T, and send it
//      y  | 0 | 1 | .. | 7 |   a CTA: its output blocks                 4 warps    y[o] = u[o] h[o], and store it
//
// Weights are the tall operand of a warpgroup's products, tokens the other one, so that the first product's results come
// feature by feature, tokens side by side. Rows of them that go to one output block wait together (a run), and one copy
// takes them to the CTA that has this block, where they are rows of h[o]. The second product takes h[o] just so, its
// contraction from row to row. Nothing is transposed on this way.
//
// A tile is between the products in a slot, of two as a rule: the runs that are sent, and what is received from the others.
// Bytes that arrive are counted by a barrier of the receiver. When it has used them it tells all senders, and they know that
// its slot is free, and, when all have said so, their own runs too.
//
// All sums are added along the contraction, whatever the tile: the same inputs give the same bits.
//
// Compiled for sm_90a, and run by tests in an emulator; it HAS NEVER RUN ON A GPU, and no speed is claimed. It counts on 8
// neighbouring multiprocessors for each cluster: where a GPU has place for fewer clusters at a time, the others come after.
#include "device/cluster.h"
#include "device/convert.h"
#include "device/launch.h"
#include "device/load.h"
#include "device/mma.h"
#include "device/tma.h"
#include "device/wgmma.h"
#include "monarch/monarch_cuda.h"

namespace monarch {

template <class T, int kTokenCount, int kBlockCount>
struct StationaryConfig {
  using Element = T;
  static constexpr int kTokens = kTokenCount;    // of a tile
  static constexpr int kTogether = kBlockCount;  // output blocks
  static constexpr int kRowBytes = row_bytes(kTokens);
  static_assert(kTokens == 16 || kTokens == 32, "what the narrow tiles of wgmma have");
  static_assert(kTogether == 2 || kTogether == 4 || kTogether == 8, "a store of 4, 8 or 16 bytes");
};

struct StationaryParams {
  device::TensorMap x, v, u;  // boxes of a tile of tokens, and of 64 rows of weights, by a slab
  const uint16_t* bias;       // [n] or null
  uint16_t* h;                // [b_out, m, b_in r] or null
  uint16_t* y;                // [m, n]
  Sizes sizes;
  StationaryPlan plan;
  Part first, second;
  StationaryMemory at;
};

// A thread's of a product [64 rows, tokens]: see wgmma.h.
template <class Config>
using StationarySums = float[Config::kTokens / 2];

// A position in a ring: the slot, and the parity of the phase that its consumer waits for.
struct StationaryTurn {
  int slot = 0, parity = 0;
  LOWFAT_DEVICE void advance(int count) {
    if (++slot == count) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <class Config>
struct StationaryCta {
  using T = typename Config::Element;
  static constexpr int kTokens = Config::kTokens, kRowBytes = Config::kRowBytes;
  const StationaryParams& p;
  const Sizes& s;
  uint8_t* const smem;
  const int rank;
  uint64_t* const weights_full;                        // of v, of u
  uint64_t *const middle_full, *const middle_empty;    // of each slot
  uint64_t *const input_full, *const input_empty;

  LOWFAT_DEVICE explicit StationaryCta(const StationaryParams& params)
      : p(params),
        s(params.sizes),
        smem(device::shared_memory()),
        rank(device::cluster_rank()),
        weights_full(reinterpret_cast<uint64_t*>(smem + params.at.barriers)),
        middle_full(weights_full + 2),
        middle_empty(middle_full + kMostMiddles),
        input_full(middle_empty + kMostMiddles),
        input_empty(input_full + kMostInputs) {}

  LOWFAT_DEVICE uint8_t* middle(int slot) const { return smem + p.at.middles + slot * middle_bytes(s, kTokens); }
  LOWFAT_DEVICE uint8_t* staging(int slot) const { return smem + p.at.staging + slot * staging_bytes(s, kTokens); }
  LOWFAT_DEVICE uint8_t* input(int slot) const { return smem + p.at.inputs + slot * input_slot_bytes(p.first, kTokens); }

  // Calls visit(tile) for this cluster's.
  template <class Visit>
  LOWFAT_DEVICE void for_each_tile(const Visit& visit) const {
#pragma unroll 1
    for (int tile = blockIdx.x / kClusterCtas; tile < p.plan.tiles; tile += p.plan.clusters) visit(tile);
  }

  LOWFAT_DEVICE void begin() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) device::mbarrier_init(weights_full + i, 1);
      for (int i = 0; i < p.plan.middles; ++i) {
        device::mbarrier_init(middle_full + i, 1);
        device::mbarrier_init(middle_empty + i, kClusterCtas * 4);  // each warp of each CTA's second product
      }
      for (int i = 0; i < p.plan.inputs; ++i) {
        device::mbarrier_init(input_full + i, 1);
        device::mbarrier_init(input_empty + i, 4);  // each warp of the first product
      }
      device::fence_mbarrier_init();
    }
    __syncwarp();
    device::cluster_sync();
  }

  // --- loads: one thread each ---

  LOWFAT_DEVICE void load_weights(const device::TensorMap& map, const Part& part, uint8_t* to, uint64_t* full) const {
    device::mbarrier_arrive_expect(full, part.bytes());
#pragma unroll 1
    for (int block = 0; block < part.blocks; ++block) {
#pragma unroll 1
      for (int tile = 0; tile < part.row_tiles(); ++tile) {
        const int row = (rank * part.blocks + block) * part.rows + tile * kWeightRows;
#pragma unroll 1
        for (int slab = 0; slab < part.slabs(); ++slab) {
          device::tma_load(to + (part.tile(block, tile) + slab) * kWeightTileBytes, &map, row, slab * kSlab, full);
        }
      }
    }
  }

  LOWFAT_DEVICE void load_inputs() const {
    StationaryTurn turn;
    for_each_tile([&](int tile) {
#pragma unroll 1
      for (int block = 0; block < p.first.blocks; block += kBlocksAtOnce) {
        uint64_t* full = input_full + turn.slot;
        device::mbarrier_wait(input_empty + turn.slot, turn.parity ^ 1);
        device::mbarrier_arrive_expect(full, input_slot_bytes(p.first, kTokens));
        uint8_t* to = input(turn.slot);
#pragma unroll 1
        for (int i = 0; i < kBlocksAtOnce; ++i) {
          const int column = (rank * p.first.blocks + block + i) * p.first.depth;
#pragma unroll 1
          for (int slab = 0; slab < p.first.slabs(); ++slab, to += slab_bytes(kTokens)) {
            device::tma_load(to, &p.x, tile * kTokens, column + slab * kSlab, full);
          }
        }
        turn.advance(p.plan.inputs);
      }
    });
  }

  // --- products of several blocks, by a warpgroup ---

  // An operand's tile for the first of the blocks, and how much further that of the next is.
  struct Tiles {
    uint64_t descriptor;
    int bytes;
    LOWFAT_DEVICE uint64_t of(int block) const { return descriptor + block * (bytes >> 4); }
  };

  // For each block weights a [64, depth] times tokens b, whose next 16 of the contraction are told by next_of_b.
  template <device::Major kMajor, int kCount, class NextOfB>
  LOWFAT_DEVICE static void multiply(StationarySums<Config> (&sums)[kCount], const Tiles& a, const Tiles& b, int depth,
                                     const NextOfB& next_of_b) {
#pragma unroll 1
    for (int step = 0; step < depth / 16; ++step) {
      device::wgmma_fence();  // a fence and a group of each turn: around the loop, ptxas would add its own here
      const uint64_t next_of_a = step / 4 * (kWeightTileBytes >> 4) + step % 4 * device::kNextK;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        device::wgmma<T, kTokens, device::Major::k, kMajor>(sums[i], a.of(i) + next_of_a, b.of(i) + next_of_b(step),
                                                            step > 0);
      }
      device::wgmma_commit();
    }
    device::wgmma_wait<0>();
  }

  LOWFAT_DEVICE static Tiles weights(const Part& part, const uint8_t* smem_part, int block, int row_tile) {
    return {device::wgmma_tile(smem_part + part.tile(block, row_tile) * kWeightTileBytes),
            part.tile(1, 0) * kWeightTileBytes};
  }

  // --- first product: z[i] = v[i] x[i]^T, to the CTAs that have its output blocks ---

  LOWFAT_DEVICE void multiply_inputs(int slot, int block, int row_tile,
                                     StationarySums<Config> (&sums)[kBlocksAtOnce]) const {
    const Tiles tokens{device::wgmma_tile(input(slot)), input_bytes(p.first, kTokens)};
    multiply<device::Major::k>(sums, weights(p.first, smem, block, row_tile), tokens, p.first.depth, [](int step) {
      return step / 4 * uint64_t{slab_bytes(kTokens) >> 4} + step % 4 * device::kNextK;
    });
  }

  // To the runs, swizzled as the receiver's rows are. A warp's 16 rows of v[i] are one row of 16 neighbouring runs.
  LOWFAT_DEVICE void stage(int slot, int block, int row_tile, const StationarySums<Config> (&sums)[kBlocksAtOnce]) const {
    const int q = row_tile * kWeightRows + device::warp_index() * 16;
    if (q >= p.first.rows) return;
    const device::Position mine = device::ldmatrix_row(device::lane_index());
    uint8_t* run = staging(slot) + (q % s.b_out + mine.row) * run_stride(s, kTokens);
#pragma unroll
    for (int i = 0; i < kBlocksAtOnce; ++i) {
      const int row = row_in_run(s, block + i, q), first = run_rows(s) * rank;
#pragma unroll
      for (int j = 0; j < kTokens / 16; ++j) {
        uint32_t r[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) r[e] = device::pack2<T>(sums[i][8 * j + 2 * e], sums[i][8 * j + 2 * e + 1]);
        const uint32_t piece = device::swizzled_narrow_piece<kRowBytes>(first + row, 2 * j + mine.column / 8);
        device::stmatrix<4>(run + (piece - first * kRowBytes), r);
      }
    }
  }

  // Each run to the CTA that has its output block, and to the barrier there that counts its bytes.
  LOWFAT_DEVICE void send(int slot) const {
    const int bytes = run_rows(s) * kRowBytes;
#pragma unroll 1
    for (int o = threadIdx.x; o < s.b_out; o += 128) {
      const int to_rank = o / p.second.blocks, to_block = o % p.second.blocks;
      const uint8_t* to = middle(slot) + to_block * block_bytes(s, kTokens) + rank * bytes;
      device::bulk_copy_to_peer(device::peer_address(to, to_rank), staging(slot) + o * run_stride(s, kTokens), bytes,
                                device::peer_address(middle_full + slot, to_rank));
    }
  }

  LOWFAT_DEVICE void make_middles() const {
    StationaryTurn input_turn, turn;
    device::mbarrier_wait(weights_full, 0);
    for_each_tile([&](int) {
#pragma unroll 1
      for (int block = 0; block < p.first.blocks; block += kBlocksAtOnce) {
        device::mbarrier_wait(input_full + input_turn.slot, input_turn.parity);
#pragma unroll 1
        for (int row_tile = 0; row_tile < p.first.row_tiles(); ++row_tile) {
          StationarySums<Config> sums[kBlocksAtOnce];
          multiply_inputs(input_turn.slot, block, row_tile, sums);
          if (row_tile == p.first.row_tiles() - 1 && device::lane_index() == 0) {
            device::mbarrier_arrive(input_empty + input_turn.slot);
          }
          __syncwarp();
          if (block + row_tile == 0) device::mbarrier_wait(middle_empty + turn.slot, turn.parity ^ 1);
          stage(turn.slot, block, row_tile, sums);
        }
        input_turn.advance(p.plan.inputs);
      }
      device::fence_async_shared();
      device::barrier_sync(1, 128);
      send(turn.slot);
      __syncwarp();
      turn.advance(p.plan.middles);
    });
  }

  // --- second product: y[o] = u[o] h[o] + bias ---

  LOWFAT_DEVICE int output_block(int block) const { return rank * p.second.blocks + block; }
  LOWFAT_DEVICE int column_of(int block, int row) const {
    return s.interleave ? output_block(block) + s.b_out * row : output_block(block) * p.second.rows + row;
  }
  LOWFAT_DEVICE uint16_t* bias_at(int row, int block) const {  // [rows][blocks]
    return reinterpret_cast<uint16_t*>(smem + p.at.bias) + row * p.second.blocks + block;
  }

  LOWFAT_DEVICE void load_bias() const {
#pragma unroll 1
    for (int i = threadIdx.x - 128; i < p.second.rows * p.second.blocks; i += 128) {
      const int row = i / p.second.blocks, block = i % p.second.blocks, column = column_of(block, row);
      *bias_at(row, block) = p.bias && column < s.n ? device::load(p.bias + column) : 0;
    }
    device::barrier_sync(2, 128);
  }

  // h as the backward takes it: tokens' rows, the contraction side by side.
  LOWFAT_DEVICE void store_h(const uint8_t* smem_middle, int first_token) const {
    constexpr int kAcross = kTokens / 16;
    const int depth = p.second.depth, lane = device::lane_index();
    const device::Position mine = device::ldmatrix_row(lane);
#pragma unroll 1
    for (int i = device::warp_index() - 4; i < p.second.blocks * (depth / 16) * kAcross; i += 4) {
      const int down = i / kAcross % (depth / 16) * 16, block = i / kAcross / (depth / 16);
      uint32_t r[4];  // of eight tokens the first 8 of the contraction and the next, of the next eight tokens the same
      device::ldmatrix_transposed<4>(r, smem_middle + block * block_bytes(s, kTokens) +
                                            device::swizzled_narrow_piece<kRowBytes>(
                                                down + mine.row, i % kAcross * 2 + mine.column / 8));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = first_token + i % kAcross * 16 + e / 2 * 8 + lane / 4;
        if (token >= s.m) continue;
        uint16_t* to = p.h + (int64_t{output_block(block)} * s.m + token) * depth + down + e % 2 * 8 + lane % 4 * 2;
        device::store(reinterpret_cast<uint32_t*>(to), r[e]);
      }
    }
  }

  LOWFAT_DEVICE void multiply_middle(const uint8_t* smem_middle, int block, int row_tile,
                                     StationarySums<Config> (&sums)[Config::kTogether]) const {
    const int bytes = block_bytes(s, kTokens);
    const Tiles h{device::wgmma_tile_mn_narrow<kRowBytes>(smem_middle + block * bytes), bytes};
    multiply<device::Major::mn>(sums, weights(p.second, smem + p.at.u, block, row_tile), h, p.second.depth,
                                [](int step) { return step * device::kNextKOfNarrow<kRowBytes>; });
  }

  // Neighbouring blocks' results of a row are neighbours in y: one store.
  LOWFAT_DEVICE void store_across(int first_token, int block, int row_tile,
                                  const StationarySums<Config> (&sums)[Config::kTogether]) const {
    constexpr int kPairs = Config::kTogether / 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_tile * kWeightRows + device::wgmma_d(threadIdx.x - 128, 2 * half).row;
      const int column = column_of(block, row);
      if (column >= s.n) continue;  // so are those of rows past the last
      const auto* bias = reinterpret_cast<const uint32_t*>(bias_at(row, block));
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = 4 * j + 2 * half + e, token = first_token + device::wgmma_d(threadIdx.x - 128, i).column;
          if (token >= s.m) continue;
          uint32_t pairs[kPairs];
#pragma unroll
          for (int pair = 0; pair < kPairs; ++pair) {
            const float2 added = device::unpack2<T>(bias[pair]);
            pairs[pair] = device::pack2<T>(sums[2 * pair][i] + added.x, sums[2 * pair + 1][i] + added.y);
          }
          uint16_t* to = p.y + int64_t{token} * s.n + column;
          if constexpr (kPairs == 4) {
            device::store16(to, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
          } else if constexpr (kPairs == 2) {
            device::store(reinterpret_cast<uint2*>(to), make_uint2(pairs[0], pairs[1]));
          } else {
            device::store(reinterpret_cast<uint32_t*>(to), pairs[0]);
          }
        }
      }
    }
  }

  // A block's results are a run of y: each warp turns its 16 rows, to tokens of 16 neighbours, in its patch.
  LOWFAT_DEVICE void store_along(int first_token, int block, int row_tile,
                                 const StationarySums<Config> (&sums)[Config::kTogether]) const {
    const int warp = device::warp_index() - 4, lane = device::lane_index();
    const int row = row_tile * kWeightRows + warp * 16;
    if (row >= p.second.rows) return;
    uint8_t* patch = smem + p.at.patches + warp * patch_bytes(kTokens);
    const device::Position mine = device::ldmatrix_pair_row(lane);
#pragma unroll
    for (int i = 0; i < Config::kTogether; ++i) {
      float bias[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int one = row + half * 8 + lane / 4;
        bias[half] = one < p.second.rows ? device::widen<T>(*bias_at(one, block + i)) : 0;
      }
#pragma unroll
      for (int j = 0; j < kTokens / 16; ++j) {
        uint32_t r[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* sum = sums[i] + 8 * j + 2 * e;
          r[e] = device::pack2<T>(sum[0] + bias[e % 2], sum[1] + bias[e % 2]);
        }
        device::stmatrix_transposed<4>(patch + (j * 16 + mine.row) * kPatchStride + mine.column * 2, r);
      }
      __syncwarp();
#pragma unroll
      for (int piece = lane; piece < kTokens * 2; piece += 32) {
        const int token = first_token + piece / 2, down = row + piece % 2 * 8, column = column_of(block + i, down);
        if (token < s.m && down < p.second.rows && column < s.n) {
          device::store16(p.y + int64_t{token} * s.n + column,
                          device::load16_shared(patch + piece / 2 * kPatchStride + piece % 2 * 16));
        }
      }
      __syncwarp();
    }
  }

  // This warp reads the slot no more: to all who send to it, of whose runs it was the last to read, too.
  LOWFAT_DEVICE void release_middle(int slot) const {
    __syncwarp();
    if (device::lane_index() < kClusterCtas) {
      device::mbarrier_arrive_peer_read(device::peer_address(middle_empty + slot, device::lane_index()));
    }
    __syncwarp();
  }

  LOWFAT_DEVICE void make_results() const {
    StationaryTurn turn;
    load_bias();
    device::mbarrier_wait(weights_full + 1, 0);
    for_each_tile([&](int tile) {
      const uint8_t* smem_middle = middle(turn.slot);
      if (threadIdx.x == 128) device::mbarrier_arrive_expect(middle_full + turn.slot, middle_bytes(s, kTokens));
      __syncwarp();
      device::mbarrier_wait(middle_full + turn.slot, turn.parity);
      if (p.h) store_h(smem_middle, tile * kTokens);
#pragma unroll 1
      for (int row_tile = 0; row_tile < p.second.row_tiles(); ++row_tile) {
#pragma unroll 1
        for (int block = 0; block < p.second.blocks; block += Config::kTogether) {
          StationarySums<Config> sums[Config::kTogether];
          multiply_middle(smem_middle, block, row_tile, sums);
          if (row_tile == p.second.row_tiles() - 1 && block + Config::kTogether == p.second.blocks) {
            release_middle(turn.slot);
          }
          if (s.interleave) {
            store_across(tile * kTokens, block, row_tile, sums);
          } else {
            store_along(tile * kTokens, block, row_tile, sums);
          }
        }
      }
      turn.advance(p.plan.middles);
    });
  }

  LOWFAT_DEVICE void run() const {
    begin();
    const int warp = device::warp_index();
    if (warp < 4) {
      make_middles();
    } else if (warp < 8) {
      device::take_registers<240>();  // the sums of up to eight blocks
      make_results();
    } else {
      device::give_registers<40>();
      if (warp == 8 && device::lane_index() == 0) {
        load_weights(p.v, p.first, smem, weights_full);
        load_weights(p.u, p.second, smem + p.at.u, weights_full + 1);
      } else if (warp == 9 && device::lane_index() == 0) {
        load_inputs();
      }
    }
    __syncwarp();
    device::cluster_sync();  // others may still send to us, or tell us what they have used
  }
};

template <class Config>
__global__ void __launch_bounds__(kStationaryThreads, 1) stationary_product(const __grid_constant__ StationaryParams p) {
  if constexpr (device::kHasWarpgroupProducts) {
    StationaryCta<Config>(p).run();
  } else {
    device::unreachable_here();
  }
}

// --- launch ---

template <class Config>
const char* launch_clusters(const StationaryParams& params, void* stream) {
  device::Launch shape;
  shape.grid = dim3(params.plan.clusters * kClusterCtas);
  shape.threads = kStationaryThreads;
  shape.smem_bytes = params.plan.smem_bytes;
  shape.cluster = kClusterCtas;
  shape.stream = stream;
  return device::launch(stationary_product<Config>, shape, params);
}

template <class T, int kTokens>
const char* launch_tokens(const StationaryParams& params, void* stream) {
  switch (params.plan.together) {
    case 2: return launch_clusters<StationaryConfig<T, kTokens, 2>>(params, stream);
    case 4: return launch_clusters<StationaryConfig<T, kTokens, 4>>(params, stream);
    case 8: return launch_clusters<StationaryConfig<T, kTokens, 8>>(params, stream);
    default: return "the plan does not cover these sizes";
  }
}

template <class T>
const char* launch_plan(const StationaryParams& params, void* stream) {
  switch (params.plan.tokens) {
    case 16: return launch_tokens<T, 16>(params, stream);
    case 32: return launch_tokens<T, 32>(params, stream);
    default: return "the plan does not cover these sizes";
  }
}

const char* launch_stationary(const StationaryPlan& plan, const MonarchOperands& in, Dtype dtype, void* stream) {
  if (plan.tokens == 0) return "the plan does not cover these sizes";
  const Sizes& s = in.sizes;
  StationaryParams p{};
  p.bias = in.bias, p.h = in.h, p.y = in.y, p.sizes = s, p.plan = plan;
  p.first = first_part(s), p.second = second_part(s);
  p.at = stationary_memory(s, plan.tokens, plan.middles, plan.inputs);
  const auto map = [](device::TensorMap& to, const void* gmem, int64_t rows, int columns, int box_rows) {
    return device::make_tensor_map(to, {gmem, rows, columns, columns, box_rows, kSlab});
  };
  if (const char* error = map(p.x, in.x, s.m, s.k, plan.tokens)) return error;
  if (const char* error = map(p.v, in.v, int64_t{s.b_in} * p.first.rows, p.first.depth, kWeightRows)) return error;
  if (const char* error = map(p.u, in.u, int64_t{s.b_out} * p.second.rows, p.second.depth, kWeightRows)) return error;
  return dtype == Dtype::bfloat16 ? launch_plan<device::Bf16>(p, stream) : launch_plan<device::Fp16>(p, stream);
}

}  // namespace monarch
