// The steps of low_rank's decode kernels: x times rows of a first factor, split over k, and h times those of a second one.
// Which rows of which factor, each kernel says by its form.
#pragma once

#include "device/async_copy.h"
#include "device/convert.h"
#include "device/load.h"
#include "device/mma.h"
#include "low_rank/decode_layout.h"

namespace low_rank {

template <class T, int kTileCount>
struct DecodeSizes {
  using Element = T;
  static constexpr int kTokenTiles = kTileCount;  // m <= 8 or m <= 16
  static constexpr int kTokens = kTokenTiles * kTokenTile;
  static constexpr int kThreads = kDecodeThreads;
  static constexpr int kBatch = 4;     // steps whose weights are asked for together: 8 loads a lane, and 8 more ahead
  static constexpr int kTogether = 2;  // fours of h that a thread sums at a time, 4 splits of each: 8 loads on their way
  static constexpr int kSplitsAtOnce = 4;
  static_assert(kTileCount == 1 || kTileCount == 2, "d of more tokens would not stay in registers");
  static_assert(slot_floats(kTileCount) * 4 % 16 == 0, "what follows the sums is 16-byte aligned");

  // What is done to a sum of h before it is rounded: a config may have its own.
  template <class AnyParams>
  LOWFAT_DEVICE static float of_h(const AnyParams&, float sum) { return sum; }
};

// A config is these sizes and a form, which has what sets one kernel apart:
//
//   Params   p.x, p.m, p.k, p.splits, p.prefetch         first_units(p)   first_work(p, number)   memory(p, token_tiles)
//   Share    what a block does of the second product     share_of_block(p)
//   Cursor   where a warp is in its (tile, step) items   u_at(p, share, cursor)   h_at(p, share, cursor)

// A unit of the first product, and the factor that it is of.
struct FirstWork {
  const uint16_t* v;  // [r, k]
  float* partials;    // [splits, m, r]
  int r;
  FirstUnit unit;
};

// The second factor's tile that a cursor is in.
struct TileOfU {
  const uint16_t* u;  // [n, r]
  int first_row, n, r;
};

// Where its h is in shared memory.
struct PlaceOfH {
  int first, stride;  // elements; from token to token
};

template <class Config>
using Params = typename Config::Params;
template <class Config>
using Share = typename Config::Share;
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

using device::zero16;

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

// --- first product: partials [splits, m, r] = x v^T, of each factor ---

template <class Config>
LOWFAT_DEVICE void load_v(const Params<Config>& p, const FirstWork& work, int step, WeightBatch<Config>& batch) {
  const int row = work.unit.tile * kTileRows + lane_row(device::lane_index());
  const int column = first_column(work.unit, device::warp_index(), step) + lane_column(device::lane_index());
  const int from = row * p.k + column;  // 32 bits hold it (kDecodeMaxRank, kDecodeMaxDepth), and spare registers
#pragma unroll
  for (int i = 0; i < Config::kBatch; ++i) {
    const int ahead = i * kDecodeWarps * kStep;
    const bool is_inside = column + ahead < work.unit.last_column;
    batch.upper[i] = is_inside && row < work.r ? device::load16_weights(work.v + (from + ahead)) : zero16();
    batch.lower[i] = is_inside && row + 8 < work.r ? device::load16_weights(work.v + (from + 8 * p.k + ahead)) : zero16();
  }
}

// The same steps of x, which all warps read: it comes from L1 or L2.
template <class Config>
LOWFAT_DEVICE void load_x(const Params<Config>& p, const FirstUnit& unit, int step, TokenBatch<Config>& batch) {
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
LOWFAT_DEVICE void store_partial(const Params<Config>& p, const FirstWork& work, const float* smem_sums) {
  for (int i = threadIdx.x; i < Config::kTokens * kTileRows; i += Config::kThreads) {
    const int token = i / kTileRows, row = work.unit.tile * kTileRows + i % kTileRows;
    if (token >= p.m || row >= work.r) continue;
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      sum += smem_sums[warp * slot_floats(Config::kTokenTiles) + sum_at(token, i % kTileRows)];
    }
    device::store(work.partials + (int64_t{work.unit.split} * p.m + token) * work.r + row, sum);
  }
}

// What a warp has asked for: the first batch before anything else, then a batch ahead of the arithmetic. x comes just before
// it is used, except that it must not queue behind u where u is asked for first (kIsBeforeU). It has no second buffer, and no
// early start in decode_first, because with two tiles of tokens half of the registers would then not do.
template <class Config, bool kIsBeforeU>
struct First {
  const Params<Config>& p;
  WeightBatch<Config> even, odd;
  TokenBatch<Config> tokens;

  LOWFAT_DEVICE explicit First(const Params<Config>& params) : p(params) { begin(blockIdx.x); }

  LOWFAT_DEVICE void begin(int number) {  // past the last unit: zeros
    const FirstWork work = Config::first_work(p, number);
    load_v<Config>(p, work, 0, even);
    if (kIsBeforeU) load_x<Config>(p, work.unit, 0, tokens);
  }

  LOWFAT_DEVICE void finish(float* smem_sums) {
    constexpr int kBatch = Config::kBatch;
    const int units = Config::first_units(p);
    for (int number = blockIdx.x; number < units; number += gridDim.x) {
      const FirstWork work = Config::first_work(p, number);
      const FirstUnit& unit = work.unit;
      const int steps = parts_of(unit.last_column - unit.first_column, kDecodeWarps * kStep);  // of warp 0, the most
      Sums<Config> sums;
      clear<Config>(sums);
      for (int step = 0; step < steps; step += 2 * kBatch) {
        load_v<Config>(p, work, step + kBatch, odd);
        if (!kIsBeforeU || step > 0) load_x<Config>(p, unit, step, tokens);
        multiply_batch<Config>(sums, even, tokens);
        if (step + kBatch >= steps) break;
        load_v<Config>(p, work, step + 2 * kBatch, even);
        load_x<Config>(p, unit, step + kBatch, tokens);
        multiply_batch<Config>(sums, odd, tokens);
      }
      const int next = number + gridDim.x;
      if (next < units) begin(next);
      store_sums<Config>(smem_sums + device::warp_index() * slot_floats(Config::kTokenTiles), sums);
      __syncthreads();
      store_partial<Config>(p, work, smem_sums);
      if (next < units) __syncthreads();  // the next unit's sums go where these were
    }
  }
};

// --- second product: the sums of h u^T ---

// Where a warp is in its list of items, all of one u: the tile counts from the block's first.
struct Cursor {
  int tile, step;
  template <class AnyParams>
  LOWFAT_DEVICE Cursor(const AnyParams&, const SecondShare& mine, int item)
      : tile(item / mine.steps), step(item % mine.steps) {}
  template <class AnyParams>
  LOWFAT_DEVICE void advance(const AnyParams&, const SecondShare& mine) {
    if (++step < mine.steps) return;
    step = 0;
    ++tile;
  }
  template <class AnyParams>
  LOWFAT_DEVICE bool is_last_step(const AnyParams&, const SecondShare& mine) const { return step == mine.steps - 1; }
};

// What forms with one v and one second factor have in common.
template <class AnyParams>
struct SingleForm {
  using Params = AnyParams;
  using Share = SecondShare;
  using Cursor = low_rank::Cursor;

  LOWFAT_DEVICE static int first_units(const Params& p) { return low_rank::first_units(p.r, p.splits); }
  LOWFAT_DEVICE static FirstWork first_work(const Params& p, int number) {
    return {p.v, p.partials, p.r, first_unit(p.k, p.splits, number)};
  }
  LOWFAT_DEVICE static PlaceOfH h_at(const Params& p, const Share&, const Cursor&) { return {0, h_stride(p.r)}; }
};

// A lane's two pieces of a second factor at one step.
struct PiecesOfU {
  const uint16_t* upper;
  const uint16_t* lower;
  bool has_upper, has_lower;
  LOWFAT_DEVICE PiecesOfU(const TileOfU& at, int step) {
    const int row = at.first_row + lane_row(device::lane_index());
    const int column = step * kStep + lane_column(device::lane_index());
    upper = at.u + int64_t{row} * at.r + column;
    lower = upper + int64_t{8} * at.r;
    has_upper = row < at.n && column < at.r;
    has_lower = row + 8 < at.n && column < at.r;
  }
};

// Asks for the warp's first items. Each lane copies what it alone will read: it has to wait, and nobody else.
template <class Config>
LOWFAT_DEVICE int prefetch_u(const Params<Config>& p, const Share<Config>& mine, uint8_t* smem_weights) {
  const int warp = device::warp_index(), lane = device::lane_index();
  const Range items = warp_items(mine, warp);
  const int count = smaller(items.last - items.first, p.prefetch);
  if (count == 0) return 0;
  typename Config::Cursor at(p, mine, items.first);
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const PiecesOfU pieces(Config::u_at(p, mine, at), at.step);
    device::copy16_async(smem_weights + piece_at(p.prefetch, warp, i, 0, lane), pieces.upper, pieces.has_upper);
    device::copy16_async(smem_weights + piece_at(p.prefetch, warp, i, 1, lane), pieces.lower, pieces.has_lower);
    at.advance(p, mine);
  }
  device::commit_copies();
  return count;
}

template <class Config>
LOWFAT_DEVICE void load_u(const Params<Config>& p, const Share<Config>& mine, int item, WeightBatch<Config>& batch) {
  const int last = warp_items(mine, device::warp_index()).last;
  typename Config::Cursor at(p, mine, item);
#pragma unroll
  for (int i = 0; i < Config::kBatch; ++i) {
    const PiecesOfU pieces(Config::u_at(p, mine, at), at.step);
    batch.upper[i] = item + i < last && pieces.has_upper ? device::load16_weights(pieces.upper) : zero16();
    batch.lower[i] = item + i < last && pieces.has_lower ? device::load16_weights(pieces.lower) : zero16();
    at.advance(p, mine);
  }
}

// h of all tokens into shared memory, from partials [splits, m, r]: the splits added in order, rounded once, zeros up to a
// whole step. Who wants h [m, r] itself gets a slice from each block.
template <class Config>
LOWFAT_DEVICE void gather_h(const Params<Config>& p, const float* partials, int r, uint16_t* smem_h,
                            uint16_t* h = nullptr) {
  using T = typename Config::Element;
  const int fours = parts_of(r, kStep) * (kStep / 4), count = p.m * fours;  // neighbouring elements that share a load
  const Range to_keep = h ? share(count, gridDim.x, blockIdx.x) : Range{0, 0};
  for (int first = threadIdx.x; first < count; first += Config::kTogether * Config::kThreads) {
    float4 sums[Config::kTogether];
    int token[Config::kTogether], column[Config::kTogether];
    const float* from[Config::kTogether];  // of those past the end, the first: a thread by itself must not branch
#pragma unroll
    for (int j = 0; j < Config::kTogether; ++j) {
      const int i = first + j * Config::kThreads;
      token[j] = i < count ? i / fours : p.m;
      column[j] = i % fours * 4;
      const bool is_there = token[j] < p.m && column[j] < r;
      from[j] = partials + (is_there ? int64_t{token[j]} * r + column[j] : 0);
      sums[j] = make_float4(0, 0, 0, 0);
    }
    for (int split = 0; split < p.splits; split += Config::kSplitsAtOnce) {
      float4 parts[Config::kSplitsAtOnce][Config::kTogether];
#pragma unroll
      for (int s = 0; s < Config::kSplitsAtOnce; ++s) {
#pragma unroll
        for (int j = 0; j < Config::kTogether; ++j) {
          parts[s][j] = split + s < p.splits ? device::load16_floats_l2(from[j] + int64_t{split + s} * p.m * r)
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
      const bool is_inside = column[j] < r;
      uint2 rounded = make_uint2(device::pack2<T>(Config::of_h(p, sums[j].x), Config::of_h(p, sums[j].y)),
                                 device::pack2<T>(Config::of_h(p, sums[j].z), Config::of_h(p, sums[j].w)));
      if (!is_inside) rounded = make_uint2(0, 0);
      *reinterpret_cast<uint2*>(smem_h + token[j] * h_stride(r) + column[j]) = rounded;
      const int i = first + j * Config::kThreads;
      const bool is_kept = is_inside && i >= to_keep.first && i < to_keep.last;
      if (is_kept) device::store(reinterpret_cast<uint2*>(h + int64_t{token[j]} * r + column[j]), rounded);
    }
  }
}

// The warp's items in order. `even` holds the first batch of those that were not prefetched.
template <class Config>
LOWFAT_DEVICE void multiply_items(const Params<Config>& p, const Share<Config>& mine, int prefetched,
                                  WeightBatch<Config>& even, const uint8_t* smem_weights, const uint16_t* smem_h,
                                  float* smem_sums) {
  const int warp = device::warp_index(), lane = device::lane_index();
  const Range items = warp_items(mine, warp);
  Sums<Config> sums;
  clear<Config>(sums);
  typename Config::Cursor at(p, mine, items.first);

  const auto add_item = [&](int item, uint4 upper, uint4 lower) {
    const PlaceOfH of_tile = Config::h_at(p, mine, at);
    const uint16_t* lane_h = smem_h + of_tile.first + lane_row(lane) * of_tile.stride + lane_column(lane);
    uint4 h[Config::kTokenTiles];
#pragma unroll
    for (int tile = 0; tile < Config::kTokenTiles; ++tile) {
      const bool is_token = tile * kTokenTile + lane_row(lane) < p.m;  // the other rows of h were not written
      h[tile] = is_token ? device::load16_shared(lane_h + tile * kTokenTile * of_tile.stride + at.step * kStep) : zero16();
    }
    multiply<Config>(sums, upper, lower, h);
    if (at.is_last_step(p, mine) || item == items.last - 1) {
      store_sums<Config>(smem_sums + slot_of(at.tile, warp) * slot_floats(Config::kTokenTiles), sums);
      clear<Config>(sums);
    }
    at.advance(p, mine);
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

// An element's sum over the warps that have items of its tile.
template <class Config>
LOWFAT_DEVICE float sum_of(const float* smem_sums, Range warps, int tile, int token, int row) {
  float sum = 0;
  for (int warp = warps.first; warp < warps.last; ++warp) {
    sum += smem_sums[slot_of(tile, warp) * slot_floats(Config::kTokenTiles) + sum_at(token, row)];
  }
  return sum;
}

// The bias of the block's columns, while there is something to wait for.
template <class AnyParams>
LOWFAT_DEVICE void load_bias(const AnyParams& p, const SecondShare& mine, uint16_t* smem_bias) {
  if (!p.bias) return;
  const int first = mine.tiles.first * kTileRows, last = smaller(mine.tiles.last * kTileRows, p.n);
  for (int column = first + threadIdx.x; column < last; column += blockDim.x) {
    smem_bias[column - first] = device::load(p.bias + column);
  }
}

// A block's shared memory, and what it does of the second product.
template <class Config>
struct Second {
  const Params<Config>& p;
  Share<Config> mine;
  float* smem_sums;
  uint16_t* smem_bias;
  uint16_t* smem_h;
  uint8_t* smem_weights;
  int prefetched = 0;
  WeightBatch<Config> first_batch;  // of the items that shared memory does not hold

  LOWFAT_DEVICE explicit Second(const Params<Config>& params) : p(params), mine(Config::share_of_block(params)) {
    uint8_t* smem = device::shared_memory();
    const DecodeMemory at = Config::memory(p, Config::kTokenTiles);
    smem_sums = reinterpret_cast<float*>(smem + at.sums);
    smem_bias = reinterpret_cast<uint16_t*>(smem + at.bias);
    smem_h = reinterpret_cast<uint16_t*>(smem + at.h);
    smem_weights = smem + at.weights;
  }

  LOWFAT_DEVICE void prefetch() { prefetched = prefetch_u<Config>(p, mine, smem_weights); }
  LOWFAT_DEVICE void load_rest() {
    load_u<Config>(p, mine, warp_items(mine, device::warp_index()).first + prefetched, first_batch);
  }
  LOWFAT_DEVICE void wait_before_prefetched() {  // for copies that were asked for before those of u
    if (prefetched > 0) {
      device::wait_copies<1>();
    } else {
      device::wait_copies<0>();
    }
  }
  LOWFAT_DEVICE void multiply() {  // h is in shared memory, for the threads that wrote it
    device::wait_copies<0>();
    __syncthreads();
    multiply_items<Config>(p, mine, prefetched, first_batch, smem_weights, smem_h, smem_sums);
    __syncthreads();
  }
};

}  // namespace low_rank
