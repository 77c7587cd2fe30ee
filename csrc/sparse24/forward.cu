// sparse24 on a GPU for up to 64 rows of x: y = x w^T + bias, where of each four neighbours in a row of w two are stored.
//
//   x [m, k]   values [n, k / 2]   mask [n, k / 32]   bias [n]   y [m, n]      m <= 64, k a multiple of 64, bf16 or fp16
//
// The weight is the sparse tall operand of the tensor core's product, 16 of its rows times 8 rows of x (tokens), sums in
// float. Values are loaded as they lie, straight to the registers that multiply: a lane's 16 bytes are four groups of four
// inputs, which the two products of a step take in turn, so that k is permuted by whole groups. x is permuted alike on its
// way to shared memory, and each lane makes its metadata from the mask (forward_layout.h).
//
//      k ->  split 0   split 1        a block: some rows and one split at a time, always the same split, whose x it keeps
//   w  [---------|---------]  rows    a warp: tiles of 16 of the rows, every so many-th batch of 256 inputs
//      [---------|---------]
//
// Each warp has the next batch on its way while it multiplies one, from the first to the last of all its rows. What the
// warps have summed meets in shared memory, what splits have in global memory, behind a barrier of the grid: both are added
// in an order that the sizes alone decide, so that the same inputs give the same bits. An input that no row keeps is not
// read for it: unlike in a dense product, NaN in x stays away from rows that have dropped it.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator; it HAS NEVER RUN ON A GPU, no speed is claimed.
#include "device/convert.h"
#include "device/grid.h"
#include "device/launch.h"
#include "device/load.h"
#include "device/mma.h"
#include "device/reduce.h"
#include "device/splits.h"
#include "sparse24/sparse24_cuda.h"

namespace sparse24 {

template <class T, int kTileCount>
struct ForwardConfig {
  using Element = T;
  static constexpr Shape kShape = shape_of(kTileCount);
  static constexpr int kTokenTiles = kTileCount, kRowTiles = kShape.row_tiles, kDepthWarps = kShape.depth_warps;
  static constexpr int kThreads = kShape.threads(), kRows = kShape.rows();
  static constexpr int kSlotFloats = kShape.slot_floats(), kSumsBytes = kShape.sums_bytes();
  static constexpr int kSplitsAtOnce = 4;  // loads on their way
  static_assert(kThreads % kRows == 0, "a thread stores one column of y");
  static_assert(kSumsBytes % 16 == 0, "what follows the sums is 16-byte aligned");
};

struct ForwardParams {
  ForwardOperands in;
  SplitSums sums;
  int splits;
};

template <class Config>
using Sums = float[Config::kRowTiles][Config::kTokenTiles][4];

// --- a warp's way through its units, batch by batch ---

struct Unit {
  int row_block, split;
};
LOWFAT_DEVICE Unit unit_of(const ForwardParams& p, int number) { return {number / p.splits, number % p.splits}; }

template <class Config>
LOWFAT_DEVICE int units_of(const ForwardParams& p) {
  return parts_of(p.in.n, Config::kRows) * p.splits;
}

template <class Config>
struct Walk {
  const Range batches;  // of the block's split
  int unit, batch;

  LOWFAT_DEVICE explicit Walk(const ForwardParams& p)
      : batches(batches_of(p.in.k, p.splits, unit_of(p, blockIdx.x).split)), unit(blockIdx.x), batch(first()) {}

  LOWFAT_DEVICE int first() const { return batches.first + device::warp_index() % Config::kDepthWarps; }
  LOWFAT_DEVICE void advance() {
    batch += Config::kDepthWarps;
    if (batch < batches.last) return;
    batch = first();
    unit += gridDim.x;
  }
};

// Lane t of a quad has word s of it in words[t], of step s, and gets word t of each lane.
LOWFAT_DEVICE void transpose_quad(uint32_t (&words)[4]) {
  const bool is_odd = device::lane_index() & 1, is_high = device::lane_index() & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(device::kAllLanes, is_odd ? words[i] : words[i + 1], 1);
    words[i] = is_odd ? other : words[i];
    words[i + 1] = is_odd ? words[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(device::kAllLanes, is_high ? words[i] : words[i + 2], 2);
    words[i] = is_high ? other : words[i];
    words[i + 2] = is_high ? words[i + 2] : other;
  }
}

// A batch on its way: of each row tile, a lane's 16 bytes of each step of its row and of the one 8 below, and the mask of
// its own step. Where there is no such row, or nothing left, they stay what they were: each row has its own sums.
template <class Config>
struct Weights {
  const ForwardParams& p;
  Walk<Config> at;  // what is asked for
  const uint16_t* values;
  int row;          // of the lane; past the last where nothing is left
  uint4 upper[Config::kRowTiles][kBatchSteps] = {}, lower[Config::kRowTiles][kBatchSteps] = {};
  uint2 upper_mask[Config::kRowTiles] = {}, lower_mask[Config::kRowTiles] = {};

  LOWFAT_DEVICE explicit Weights(const ForwardParams& params) : p(params), at(params) {
    begin_batch();
#pragma unroll
    for (int step = 0; step < kBatchSteps; ++step) load_values(step);
  }

  LOWFAT_DEVICE int input() const { return at.batch * kBatch; }

  LOWFAT_DEVICE void begin_batch() {
    const int lane = device::lane_index(), first_row = device::warp_index() / Config::kDepthWarps * Config::kRowTiles;
    const bool is_over = at.batch >= at.batches.last;  // also of no batch at all; units past the last have no rows
    row = is_over ? p.in.n : unit_of(p, at.unit).row_block * Config::kRows + first_row * kTileRows + lane / 4;
    values = p.in.values + (int64_t{row} * (p.in.k / 2) + (input() / 2 + lane % 4 * 8));
    const int step_of_lane = input() + lane % 4 * kStep, words = p.in.k / 32;
    const uint32_t* mask = p.in.mask + (int64_t{row} * words + step_of_lane / 32);
#pragma unroll
    for (int tile = 0; tile < Config::kRowTiles; ++tile) {
      const int down = tile * kTileRows;
      const bool is_inside = step_of_lane < p.in.k;
      if (is_inside && row + down < p.in.n) upper_mask[tile] = device::load8_weights(mask + int64_t{down} * words);
      if (is_inside && row + down + 8 < p.in.n) lower_mask[tile] = device::load8_weights(mask + int64_t{down + 8} * words);
    }
  }

  LOWFAT_DEVICE void load_values(int step) {
    const bool is_inside = input() + step * kStep < p.in.k;
    const int64_t stride = p.in.k / 2;
#pragma unroll
    for (int tile = 0; tile < Config::kRowTiles; ++tile) {
      const int down = tile * kTileRows;
      const uint16_t* from = values + down * stride + step * (kStep / 2);
      if (is_inside && row + down < p.in.n) upper[tile][step] = device::load16_weights(from);
      if (is_inside && row + down + 8 < p.in.n) lower[tile][step] = device::load16_weights(from + 8 * stride);
    }
  }

  // sums += the batch that is there, and asks for the next one. smem_x: the batch's first input, of the first token.
  // steps: so many are left of k.
  LOWFAT_DEVICE void multiply(Sums<Config>& sums, const uint16_t* smem_x, int stride, int steps) {
    using T = typename Config::Element;
    const int lane = device::lane_index();
    uint32_t metadata[Config::kRowTiles][kBatchSteps];
#pragma unroll
    for (int tile = 0; tile < Config::kRowTiles; ++tile) {
#pragma unroll
      for (int number = 0; number < 4; ++number) {
        metadata[tile][number] = metadata_of(upper_mask[tile].x, upper_mask[tile].y, lower_mask[tile].x, lower_mask[tile].y,
                                             number);
      }
      transpose_quad(metadata[tile]);
    }
    at.advance();
    begin_batch();
#pragma unroll
    for (int step = 0; step < kBatchSteps; ++step) {
#pragma unroll
      for (int tokens = 0; tokens < Config::kTokenTiles; ++tokens) {
        if (step >= steps) break;
        const int token = smaller(tokens * kTokenTile + lane % 8, p.in.m - 1);  // what the others give is dropped
        const uint16_t* from = smem_x + token * stride + step * kStep + lane / 8 * 8;
        uint32_t first[4], second[4];
        device::ldmatrix<4>(first, from);
        device::ldmatrix<4>(second, from + kStep / 2);
#pragma unroll
        for (int tile = 0; tile < Config::kRowTiles; ++tile) {
          const uint4 a = upper[tile][step], b = lower[tile][step];
          device::mma_sp_m16n8k32<T, 0>(sums[tile][tokens], {a.x, b.x, a.y, b.y}, first, metadata[tile][step]);
          device::mma_sp_m16n8k32<T, 1>(sums[tile][tokens], {a.z, b.z, a.w, b.w}, second, metadata[tile][step]);
        }
      }
      load_values(step);
    }
  }
};

// --- x ---

// The inputs of the block's split into shared memory, zeros up to a whole batch. A thread has 32 inputs at a time, what two
// lanes have values for.
template <class Config>
LOWFAT_DEVICE void keep_x(const ForwardParams& p, const Range& batches, uint16_t* smem_x) {
  const int first_input = batches.first * kBatch, inputs = (batches.last - batches.first) * kBatch;
  const int parts = inputs / 32, count = p.in.m * parts, stride = x_stride(inputs);
  for (int i = threadIdx.x; i < count; i += Config::kThreads) {
    const int token = i / parts, input = i % parts * 32;
    const bool is_inside = first_input + input < p.in.k;
    const uint16_t* from = p.in.x + (int64_t{token} * p.in.k + first_input + input);
    uint4 x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = is_inside ? device::load16(from + j * 8) : device::zero16();
    uint16_t* to = smem_x + token * stride + input / kStep * kStep + place_of_group(input % kStep / 4) * 4;
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // groups 2 j and 2 j + 1 of either lane
      device::store16_shared(to + place_of_group(2 * j) * 4, make_uint4(x[j].x, x[j].y, x[j + 2].x, x[j + 2].y));
      device::store16_shared(to + place_of_group(2 * j + 1) * 4, make_uint4(x[j].z, x[j].w, x[j + 2].z, x[j + 2].w));
    }
  }
}

// --- from the sums to y ---

template <class Config>
LOWFAT_DEVICE void store_sums(float* smem_sums, const Sums<Config>& sums) {
  const int lane = device::lane_index(), warp = device::warp_index();
#pragma unroll
  for (int tile = 0; tile < Config::kRowTiles; ++tile) {
    const int row_tile = warp / Config::kDepthWarps * Config::kRowTiles + tile;
    float* smem_slot = smem_sums + slot_of(Config::kDepthWarps, row_tile, warp % Config::kDepthWarps) * Config::kSlotFloats;
#pragma unroll
    for (int tokens = 0; tokens < Config::kTokenTiles; ++tokens) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const device::Position of_d = device::mma_d(lane, i);
        smem_slot[sum_at(tokens * kTokenTile + of_d.column, of_d.row)] = sums[tile][tokens][i];
      }
    }
  }
}

// A thread has one column of y, and its bias since before the sums were there.
template <class Config>
LOWFAT_DEVICE void store_unit(const ForwardParams& p, const Unit& unit, const float* smem_sums, float bias) {
  const int row = threadIdx.x % Config::kRows, column = unit.row_block * Config::kRows + row;
  const float* smem_slot = smem_sums + slot_of(Config::kDepthWarps, row / kTileRows, 0) * Config::kSlotFloats;
  for (int token = threadIdx.x / Config::kRows; token < p.in.m; token += Config::kThreads / Config::kRows) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < Config::kDepthWarps; ++warp) {
      sum += smem_slot[warp * Config::kSlotFloats + sum_at(token, row % kTileRows)];
    }
    if (p.splits > 1) {
      const int64_t stride = partial_stride(Config::kRows, p.in.n);
      device::store(p.sums.partials + ((int64_t{unit.split} * p.in.m + token) * stride + column), sum);
    } else if (column < p.in.n) {
      device::store(p.in.y + (int64_t{token} * p.in.n + column), device::narrow<typename Config::Element>(sum + bias));
    }
  }
}

template <class Config>
LOWFAT_DEVICE float bias_of(const ForwardParams& p, int column) {
  if (!p.in.bias || column >= p.in.n) return 0;
  return device::widen<typename Config::Element>(device::load(p.in.bias + column));
}

// y of splits that have all been stored: each thread of the grid has four neighbours at a time.
template <class Config>
LOWFAT_DEVICE void add_up(const ForwardParams& p) {
  const int stride = partial_stride(Config::kRows, p.in.n), fours = parts_of(p.in.n, 4), count = p.in.m * fours;
  for (int i = blockIdx.x * Config::kThreads + threadIdx.x; i < count; i += gridDim.x * Config::kThreads) {
    const int token = i / fours, column = i % fours * 4;
    const float4 sum = device::sum_of_splits<Config::kSplitsAtOnce>(p.sums.partials + (int64_t{token} * stride + column),
                                                                    int64_t{p.in.m} * stride, p.splits);
    const float of_columns[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (column + j >= p.in.n) continue;
      device::store(p.in.y + (int64_t{token} * p.in.n + column + j),
                    device::narrow<typename Config::Element>(of_columns[j] + bias_of<Config>(p, column + j)));
    }
  }
}

// --- the kernel ---

// One block to a multiprocessor.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) forward(const __grid_constant__ ForwardParams p) {
  auto* smem_sums = reinterpret_cast<float*>(device::shared_memory());
  auto* smem_x = reinterpret_cast<uint16_t*>(device::shared_memory() + Config::kSumsBytes);
  Weights<Config> weights(p);
  const Walk<Config> walk(p);
  const Range batches = walk.batches;
  keep_x<Config>(p, batches, smem_x);
  __syncthreads();

  const int stride = x_stride((batches.last - batches.first) * kBatch), units = units_of<Config>(p);
  for (int number = blockIdx.x; number < units; number += gridDim.x) {
    const Unit unit = unit_of(p, number);
    const float bias = p.splits > 1 ? 0 : bias_of<Config>(p, unit.row_block * Config::kRows + threadIdx.x % Config::kRows);
    Sums<Config> sums = {};
    for (int batch = walk.first(); batch < batches.last; batch += Config::kDepthWarps) {
      weights.multiply(sums, smem_x + (batch - batches.first) * kBatch, stride, p.in.k / kStep - batch * kBatchSteps);
    }
    store_sums<Config>(smem_sums, sums);
    __syncthreads();
    store_unit<Config>(p, unit, smem_sums, bias);
    __syncthreads();  // the next unit's sums go where these were
  }
  if (p.splits > 1) {
    device::grid_barrier(p.sums.counter);
    add_up<Config>(p);
  }
}

// --- launch ---

template <class Config>
const char* launch(const ForwardPlan& plan, const ForwardParams& params, void* stream) {
  device::Launch shape;
  shape.grid = dim3(plan.grid);
  shape.threads = Config::kThreads;
  shape.smem_bytes = plan.smem_bytes;
  shape.is_cooperative = plan.splits > 1;
  shape.stream = stream;
  return device::launch(forward<Config>, shape, params);
}

template <class T>
const char* launch_tiles(const ForwardPlan& plan, const ForwardParams& params, void* stream) {
  switch (plan.token_tiles) {
    case 1: return launch<ForwardConfig<T, 1>>(plan, params, stream);
    case 2: return launch<ForwardConfig<T, 2>>(plan, params, stream);
    case 4: return launch<ForwardConfig<T, 4>>(plan, params, stream);
    case 8: return launch<ForwardConfig<T, 8>>(plan, params, stream);
    default: return "the plan does not cover these sizes";
  }
}

const char* launch_forward(const ForwardPlan& plan, const ForwardOperands& operands, const SplitSums& sums, Dtype dtype,
                           void* stream) {
  const ForwardParams params{operands, sums, plan.splits};
  return dtype == Dtype::bfloat16 ? launch_tiles<device::Bf16>(plan, params, stream)
                                  : launch_tiles<device::Fp16>(plan, params, stream);
}

}  // namespace sparse24
