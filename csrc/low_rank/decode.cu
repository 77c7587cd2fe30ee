// low_rank on a GPU for a few rows of x: y = activation((x v^T) u^T + bias) + residual in one pass over the weights,
// h = x v^T rounded once.
//
//   x [m, k]   v [r, k]   u [n, r]   bias [n]   h [m, r]   residual, y [m, n]    m <= 16, bf16 or fp16, rows 16-byte aligned
//
// Weights are the tall operand of the tensor core's product, rows of x (tokens) its narrow one: 16 rows of a weight times 8 or
// 16 tokens, sums in float. The contraction may run in any order, so a lane's share of a 32-wide step is 16 neighbouring bytes
// of a row, and the same bytes of a token: nothing but 16-byte loads, straight to where they are used (decode_layout.h).
//
//      k ->  split 0   split 1              r ->
//   v  [---------|---------]  16 rows    u  [----|----|----]  tile   a block: neighbouring tiles, all of r
//      [---------|---------]                [----|----|----]  tile   a warp: neighbouring (tile, step) items
//       a block: one tile, one split
//       a warp: every 8th step              Before h is there, a block has asked for its part of u, into shared memory.
//
// What the splits of k add up to meets in global memory; every block then sums the splits for itself, rounds h to the dtype,
// and multiplies. All sums are added in an order that the sizes alone decide: the same inputs give the same bits.
//
// Two ways to launch the same code: `decode` is one cooperative grid with a barrier in the middle; `decode_first` and
// `decode_second` are two, the second of which may start, and load u, while the first still runs.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator; it HAS NEVER RUN ON A GPU, and no speed is claimed.
#include "device/async_copy.h"
#include "device/convert.h"
#include "device/grid.h"
#include "device/launch.h"
#include "device/load.h"
#include "device/mma.h"
#include "low_rank/decode_layout.h"
#include "low_rank/epilogue.h"
#include "low_rank/low_rank.h"

namespace low_rank {

template <class T, int kTileCount>
struct DecodeConfig {
  using Element = T;
  static constexpr int kTokenTiles = kTileCount;  // m <= 8 or m <= 16
  static constexpr int kTokens = kTokenTiles * kTokenTile;
  static constexpr int kThreads = kDecodeThreads;
  static constexpr int kBatch = 4;     // steps whose weights are asked for together: 8 loads a lane, and 8 more ahead
  static constexpr int kTogether = 2;  // fours of h that a thread sums at a time, 4 splits of each: 8 loads on their way
  static constexpr int kSplitsAtOnce = 4;
  static_assert(kTileCount == 1 || kTileCount == 2, "d of more tokens would not stay in registers");
  static_assert(slot_floats(kTileCount) * 4 % 16 == 0, "what follows the sums is 16-byte aligned");
};

template <class Config>
using Sums = float[Config::kTokenTiles][4];

// Weights on their way: of each step, a lane's 16 bytes of its row and of the row 8 below.
template <class Config>
struct WeightBatch {
  uint4 upper[Config::kBatch], lower[Config::kBatch];
};

// The same steps of x.
template <class Config>
struct TokenBatch {
  uint4 x[Config::kBatch][Config::kTokenTiles];
};

LOWFAT_DEVICE uint4 zero16() { return make_uint4(0, 0, 0, 0); }

// sums [16 rows, 8 tokens a tile] += one 32-wide step.
template <class Config>
LOWFAT_DEVICE void multiply(Sums<Config>& sums, uint4 upper, uint4 lower, const uint4 (&tokens)[Config::kTokenTiles]) {
#pragma unroll
  for (int tile = 0; tile < Config::kTokenTiles; ++tile) {
    const uint4 b = tokens[tile];
    device::mma_m16n8k16<typename Config::Element>(sums[tile], upper.x, lower.x, upper.y, lower.y, b.x, b.y);
    device::mma_m16n8k16<typename Config::Element>(sums[tile], upper.z, lower.z, upper.w, lower.w, b.z, b.w);
  }
}

// A warp's sums to its slot, where other warps' meet them.
template <class Config>
LOWFAT_DEVICE void store_sums(float* smem_slot, const Sums<Config>& sums) {
  const int lane = device::lane_index();
#pragma unroll
  for (int tile = 0; tile < Config::kTokenTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const device::Position at = device::mma_d(lane, i);
      smem_slot[sum_at(tile * kTokenTile + at.column, at.row)] = sums[tile][i];
    }
  }
}

template <class Config>
LOWFAT_DEVICE void clear(Sums<Config>& sums) {
#pragma unroll
  for (int tile = 0; tile < Config::kTokenTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[tile][i] = 0;
  }
}

// --- first product: partials [splits, m, r] = x v^T ---

template <class Config>
LOWFAT_DEVICE void load_v(const DecodeParams& p, const FirstUnit& unit, int step, WeightBatch<Config>& batch) {
  const int row = unit.tile * kTileRows + lane_row(device::lane_index());
  const int column = first_column(unit, device::warp_index(), step) + lane_column(device::lane_index());
  const int from = row * p.k + column;  // 32 bits hold it (kDecodeMaxRank, kDecodeMaxDepth), and spare registers
#pragma unroll
  for (int i = 0; i < Config::kBatch; ++i) {
    const int ahead = i * kDecodeWarps * kStep;
    const bool is_inside = column + ahead < unit.last_column;
    batch.upper[i] = is_inside && row < p.r ? device::load16_weights(p.v + (from + ahead)) : zero16();
    batch.lower[i] = is_inside && row + 8 < p.r ? device::load16_weights(p.v + (from + 8 * p.k + ahead)) : zero16();
  }
}

// The same steps of x, which all warps read: it comes from L1 or L2.
template <class Config>
LOWFAT_DEVICE void load_x(const DecodeParams& p, const FirstUnit& unit, int step, TokenBatch<Config>& batch) {
  const int column = first_column(unit, device::warp_index(), step) + lane_column(device::lane_index());
#pragma unroll
  for (int i = 0; i < Config::kBatch; ++i) {
    const int at = column + i * kDecodeWarps * kStep;
#pragma unroll
    for (int tile = 0; tile < Config::kTokenTiles; ++tile) {
      const int token = tile * kTokenTile + lane_row(device::lane_index());
      const bool is_inside = at < unit.last_column && token < p.m;
      batch.x[i][tile] = is_inside ? device::load16(p.x + (token * p.k + at)) : zero16();
    }
  }
}

template <class Config>
LOWFAT_DEVICE void multiply_batch(Sums<Config>& sums, const WeightBatch<Config>& weights, const TokenBatch<Config>& tokens) {
#pragma unroll
  for (int i = 0; i < Config::kBatch; ++i) multiply<Config>(sums, weights.upper[i], weights.lower[i], tokens.x[i]);
}

// The unit's sum over warps, in their order.
template <class Config>
LOWFAT_DEVICE void store_partial(const DecodeParams& p, const FirstUnit& unit, const float* smem_sums) {
  for (int i = threadIdx.x; i < Config::kTokens * kTileRows; i += Config::kThreads) {
    const int token = i / kTileRows, row = unit.tile * kTileRows + i % kTileRows;
    if (token >= p.m || row >= p.r) continue;
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      sum += smem_sums[warp * slot_floats(Config::kTokenTiles) + sum_at(token, i % kTileRows)];
    }
    device::store(p.partials + (int64_t{unit.split} * p.m + token) * p.r + row, sum);
  }
}

// What a warp has asked for: the first batch before anything else, then a batch ahead of the arithmetic. x comes just before
// it is used, except that it must not queue behind u where u is asked for first (kIsBeforeU). It has no second buffer, and no
// early start in decode_first, because with two tiles of tokens half of the registers would then not do.
template <class Config, bool kIsBeforeU>
struct First {
  const DecodeParams& p;
  WeightBatch<Config> even, odd;
  TokenBatch<Config> tokens;

  LOWFAT_DEVICE explicit First(const DecodeParams& params) : p(params) { begin(blockIdx.x); }

  LOWFAT_DEVICE void begin(int number) {  // past the last unit: zeros
    const FirstUnit unit = first_unit(p.k, p.splits, number);
    load_v<Config>(p, unit, 0, even);
    if (kIsBeforeU) load_x<Config>(p, unit, 0, tokens);
  }

  LOWFAT_DEVICE void finish(float* smem_sums) {
    constexpr int kBatch = Config::kBatch;
    const int units = first_units(p.r, p.splits);
    for (int number = blockIdx.x; number < units; number += gridDim.x) {
      const FirstUnit unit = first_unit(p.k, p.splits, number);
      const int steps = parts_of(unit.last_column - unit.first_column, kDecodeWarps * kStep);  // of warp 0, the most
      Sums<Config> sums;
      clear<Config>(sums);
      for (int step = 0; step < steps; step += 2 * kBatch) {
        load_v<Config>(p, unit, step + kBatch, odd);
        if (!kIsBeforeU || step > 0) load_x<Config>(p, unit, step, tokens);
        multiply_batch<Config>(sums, even, tokens);
        if (step + kBatch >= steps) break;
        load_v<Config>(p, unit, step + 2 * kBatch, even);
        load_x<Config>(p, unit, step + kBatch, tokens);
        multiply_batch<Config>(sums, odd, tokens);
      }
      const int next = number + gridDim.x;
      if (next < units) begin(next);
      store_sums<Config>(smem_sums + device::warp_index() * slot_floats(Config::kTokenTiles), sums);
      __syncthreads();
      store_partial<Config>(p, unit, smem_sums);
      if (next < units) __syncthreads();  // the next unit's sums go where these were
    }
  }
};

// --- second product: y = h u^T + bias ---

// Where a warp is in its list of items: the tile counts from the block's first.
struct Cursor {
  int tile, step;
  LOWFAT_DEVICE Cursor(const SecondShare& mine, int item) : tile(item / mine.steps), step(item % mine.steps) {}
  LOWFAT_DEVICE void advance(const SecondShare& mine) {
    if (++step < mine.steps) return;
    step = 0;
    ++tile;
  }
};

// A lane's two pieces of u at a cursor.
struct PiecesOfU {
  const uint16_t* upper;
  const uint16_t* lower;
  bool has_upper, has_lower;
  LOWFAT_DEVICE PiecesOfU(const DecodeParams& p, const SecondShare& mine, const Cursor& at) {
    const int row = (mine.tiles.first + at.tile) * kTileRows + lane_row(device::lane_index());
    const int column = at.step * kStep + lane_column(device::lane_index());
    upper = p.u + int64_t{row} * p.r + column;
    lower = upper + int64_t{8} * p.r;
    has_upper = row < p.n && column < p.r;
    has_lower = row + 8 < p.n && column < p.r;
  }
};

// Asks for the warp's first items. Each lane copies what it alone will read: it has to wait, and nobody else.
LOWFAT_DEVICE int prefetch_u(const DecodeParams& p, const SecondShare& mine, uint8_t* smem_weights) {
  const int warp = device::warp_index(), lane = device::lane_index();
  const Range items = warp_items(mine, warp);
  const int count = smaller(items.last - items.first, p.prefetch);
  if (count == 0) return 0;
  Cursor at(mine, items.first);
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const PiecesOfU pieces(p, mine, at);
    device::copy16_async(smem_weights + piece_at(p.prefetch, warp, i, 0, lane), pieces.upper, pieces.has_upper);
    device::copy16_async(smem_weights + piece_at(p.prefetch, warp, i, 1, lane), pieces.lower, pieces.has_lower);
    at.advance(mine);
  }
  device::commit_copies();
  return count;
}

// The bias of the block's columns, while there is something to wait for.
LOWFAT_DEVICE void load_bias(const DecodeParams& p, const SecondShare& mine, uint16_t* smem_bias) {
  if (!p.bias) return;
  const int first = mine.tiles.first * kTileRows, last = smaller(mine.tiles.last * kTileRows, p.n);
  for (int column = first + threadIdx.x; column < last; column += blockDim.x) {
    smem_bias[column - first] = device::load(p.bias + column);
  }
}

template <class Config>
LOWFAT_DEVICE void load_u(const DecodeParams& p, const SecondShare& mine, int item, WeightBatch<Config>& batch) {
  const int last = warp_items(mine, device::warp_index()).last;
  Cursor at(mine, item);
#pragma unroll
  for (int i = 0; i < Config::kBatch; ++i) {
    const PiecesOfU pieces(p, mine, at);
    batch.upper[i] = item + i < last && pieces.has_upper ? device::load16_weights(pieces.upper) : zero16();
    batch.lower[i] = item + i < last && pieces.has_lower ? device::load16_weights(pieces.lower) : zero16();
    at.advance(mine);
  }
}

// h of all tokens into shared memory: the splits added in order, rounded once, zeros up to a whole step. Who wants h itself
// gets a slice from each block.
template <class Config>
LOWFAT_DEVICE void gather_h(const DecodeParams& p, uint16_t* smem_h) {
  using T = typename Config::Element;
  const int fours = parts_of(p.r, kStep) * (kStep / 4), count = p.m * fours;  // neighbouring elements that share a load
  const Range to_keep = p.h ? share(count, gridDim.x, blockIdx.x) : Range{0, 0};
  for (int first = threadIdx.x; first < count; first += Config::kTogether * Config::kThreads) {
    float4 sums[Config::kTogether];
    int token[Config::kTogether], column[Config::kTogether];
    const float* from[Config::kTogether];  // of those past the end, the first: a thread by itself must not branch
#pragma unroll
    for (int j = 0; j < Config::kTogether; ++j) {
      const int i = first + j * Config::kThreads;
      token[j] = i < count ? i / fours : p.m;
      column[j] = i % fours * 4;
      const bool is_there = token[j] < p.m && column[j] < p.r;
      from[j] = p.partials + (is_there ? int64_t{token[j]} * p.r + column[j] : 0);
      sums[j] = make_float4(0, 0, 0, 0);
    }
    for (int split = 0; split < p.splits; split += Config::kSplitsAtOnce) {
      float4 parts[Config::kSplitsAtOnce][Config::kTogether];
#pragma unroll
      for (int s = 0; s < Config::kSplitsAtOnce; ++s) {
#pragma unroll
        for (int j = 0; j < Config::kTogether; ++j) {
          parts[s][j] = split + s < p.splits ? device::load16_floats_l2(from[j] + int64_t{split + s} * p.m * p.r)
                                             : make_float4(0, 0, 0, 0);
        }
      }
#pragma unroll
      for (int s = 0; s < Config::kSplitsAtOnce; ++s) {
#pragma unroll
        for (int j = 0; j < Config::kTogether; ++j) {
          sums[j].x += parts[s][j].x;
          sums[j].y += parts[s][j].y;
          sums[j].z += parts[s][j].z;
          sums[j].w += parts[s][j].w;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < Config::kTogether; ++j) {
      if (token[j] >= p.m) continue;
      const bool is_inside = column[j] < p.r;
      uint2 rounded = make_uint2(device::pack2<T>(sums[j].x, sums[j].y), device::pack2<T>(sums[j].z, sums[j].w));
      if (!is_inside) rounded = make_uint2(0, 0);
      *reinterpret_cast<uint2*>(smem_h + token[j] * h_stride(p.r) + column[j]) = rounded;
      const int i = first + j * Config::kThreads;
      const bool is_kept = is_inside && i >= to_keep.first && i < to_keep.last;
      if (is_kept) device::store(reinterpret_cast<uint2*>(p.h + int64_t{token[j]} * p.r + column[j]), rounded);
    }
  }
}

// The warp's items in order. `even` holds the first batch of those that were not prefetched.
template <class Config>
LOWFAT_DEVICE void multiply_items(const DecodeParams& p, const SecondShare& mine, int prefetched, WeightBatch<Config>& even,
                                  const uint8_t* smem_weights, const uint16_t* smem_h, float* smem_sums) {
  const int warp = device::warp_index(), lane = device::lane_index();
  const Range items = warp_items(mine, warp);
  const uint16_t* lane_h = smem_h + lane_row(lane) * h_stride(p.r) + lane_column(lane);
  Sums<Config> sums;
  clear<Config>(sums);
  Cursor at(mine, items.first);

  const auto add_item = [&](int item, uint4 upper, uint4 lower) {
    uint4 h[Config::kTokenTiles];
#pragma unroll
    for (int tile = 0; tile < Config::kTokenTiles; ++tile) {
      const bool is_token = tile * kTokenTile + lane_row(lane) < p.m;  // the other rows of h were not written
      h[tile] = is_token ? device::load16_shared(lane_h + tile * kTokenTile * h_stride(p.r) + at.step * kStep) : zero16();
    }
    multiply<Config>(sums, upper, lower, h);
    if (at.step == mine.steps - 1 || item == items.last - 1) {
      store_sums<Config>(smem_sums + slot_of(at.tile, warp) * slot_floats(Config::kTokenTiles), sums);
      clear<Config>(sums);
    }
    at.advance(mine);
  };
  const auto add_batch = [&](int item, const WeightBatch<Config>& batch) {
#pragma unroll
    for (int i = 0; i < Config::kBatch; ++i) {
      if (item + i < items.last) add_item(item + i, batch.upper[i], batch.lower[i]);
    }
  };

  for (int i = 0; i < prefetched; ++i) {
    add_item(items.first + i, device::load16_shared(smem_weights + piece_at(p.prefetch, warp, i, 0, lane)),
             device::load16_shared(smem_weights + piece_at(p.prefetch, warp, i, 1, lane)));
  }
  WeightBatch<Config> odd;
  for (int item = items.first + prefetched; item < items.last; item += 2 * Config::kBatch) {
    load_u<Config>(p, mine, item + Config::kBatch, odd);
    add_batch(item, even);
    load_u<Config>(p, mine, item + 2 * Config::kBatch, even);
    add_batch(item + Config::kBatch, odd);
  }
}

template <class Config>
LOWFAT_DEVICE void store_y(const DecodeParams& p, const SecondShare& mine, const float* smem_sums, const uint16_t* smem_bias) {
  using T = typename Config::Element;
  const int count = (mine.tiles.last - mine.tiles.first) * Config::kTokens * kTileRows;
  for (int i = threadIdx.x; i < count; i += Config::kThreads) {
    const int row = i % kTileRows, token = i / kTileRows % Config::kTokens, tile = i / (kTileRows * Config::kTokens);
    const int column = (mine.tiles.first + tile) * kTileRows + row;
    if (token >= p.m || column >= p.n) continue;
    const int64_t at = int64_t{token} * p.n + column;
    const float residual = p.residual ? device::widen<T>(device::load(p.residual + at)) : 0;  // on its way while sums are added
    const Range warps = warps_of_tile(mine, tile);
    float sum = 0;
    for (int warp = warps.first; warp < warps.last; ++warp) {
      sum += smem_sums[slot_of(tile, warp) * slot_floats(Config::kTokenTiles) + sum_at(token, row)];
    }
    const float bias = p.bias ? device::widen<T>(smem_bias[tile * kTileRows + row]) : 0;
    device::store(p.y + at, device::narrow<T>(finished(sum, bias, p.activation, residual)));
  }
}

// --- the kernels ---

// A block's shared memory, and what it does of the second product.
template <class Config>
struct Second {
  const DecodeParams& p;
  SecondShare mine;
  float* smem_sums;
  uint16_t* smem_bias;
  uint16_t* smem_h;
  uint8_t* smem_weights;
  int prefetched = 0;
  WeightBatch<Config> first_batch;  // of the items that shared memory does not hold

  LOWFAT_DEVICE explicit Second(const DecodeParams& params)
      : p(params), mine(second_share(params.n, params.r, gridDim.x, blockIdx.x)) {
    uint8_t* smem = device::shared_memory();
    const DecodeMemory at = decode_memory(Config::kTokenTiles, p.tiles, p.r, p.prefetch);
    smem_sums = reinterpret_cast<float*>(smem + at.sums);
    smem_bias = reinterpret_cast<uint16_t*>(smem + at.bias);
    smem_h = reinterpret_cast<uint16_t*>(smem + at.h);
    smem_weights = smem + at.weights;
  }

  LOWFAT_DEVICE void prefetch() { prefetched = prefetch_u(p, mine, smem_weights); }
  LOWFAT_DEVICE void load_rest() {
    load_u<Config>(p, mine, warp_items(mine, device::warp_index()).first + prefetched, first_batch);
  }
  LOWFAT_DEVICE void finish() {  // h is there
    gather_h<Config>(p, smem_h);
    device::wait_copies<0>();
    __syncthreads();
    multiply_items<Config>(p, mine, prefetched, first_batch, smem_weights, smem_h, smem_sums);
    __syncthreads();
    store_y<Config>(p, mine, smem_sums, smem_bias);
  }
};

// One block to a multiprocessor.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) decode(const __grid_constant__ DecodeParams p) {
  First<Config, true> first(p);
  Second<Config> second(p);
  second.prefetch();
  first.finish(second.smem_sums);
  const uint64_t target = device::grid_arrive(p.counter);
  second.load_rest();
  load_bias(p, second.mine, second.smem_bias);
  device::grid_wait(p.counter, target);
  second.finish();
}

// A block of each shares a multiprocessor: half of the registers.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 2) decode_first(const __grid_constant__ DecodeParams p) {
  device::launch_dependents();
  First<Config, false> first(p);
  first.finish(reinterpret_cast<float*>(device::shared_memory()));
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 2) decode_second(const __grid_constant__ DecodeParams p) {
  Second<Config> second(p);
  second.prefetch();
  load_bias(p, second.mine, second.smem_bias);
  device::wait_for_dependency();
  second.load_rest();  // not earlier: ptxas moves loads to registers behind the wait, copies to shared memory it does not
  second.finish();
}

// --- launch ---

template <class Config>
const char* launch(const DecodePlan& plan, const DecodeParams& params, void* stream) {
  device::Launch shape;
  shape.grid = dim3(plan.grid);
  shape.threads = Config::kThreads;
  shape.stream = stream;
  shape.smem_bytes = plan.smem_bytes;
  if (plan.first_smem_bytes == 0) {
    shape.is_cooperative = true;
    return device::launch(decode<Config>, shape, params);
  }
  device::Launch first = shape;
  first.smem_bytes = plan.first_smem_bytes;
  if (const char* error = device::launch(decode_first<Config>, first, params)) return error;
  shape.is_dependent = true;
  return device::launch(decode_second<Config>, shape, params);
}

const char* launch_decode(const DecodePlan& plan, DecodeParams params, Dtype dtype, void* stream) {
  params.splits = plan.splits, params.tiles = plan.tiles, params.prefetch = plan.prefetch;
  const bool is_bf16 = dtype == Dtype::bfloat16;
  if (plan.token_tiles == 1) {
    return is_bf16 ? launch<DecodeConfig<device::Bf16, 1>>(plan, params, stream)
                   : launch<DecodeConfig<device::Fp16, 1>>(plan, params, stream);
  }
  return is_bf16 ? launch<DecodeConfig<device::Bf16, 2>>(plan, params, stream)
                 : launch<DecodeConfig<device::Fp16, 2>>(plan, params, stream);
}

}  // namespace low_rank
