// The pivoted form of low_rank (PIFA) on a GPU for a few rows of x, in one pass over the weights. r columns of y, the pivots,
// are h = x v^T; the others, in their order, are h c^T. h is rounded once, and bias added to either.
//
//   x [m, k]   v [r, k]   c [n - r, r]   pivots [r]   bias [n]   h [m, r]   y [m, n]     m <= 16, bf16 or fp16, aligned rows
//
//   pivots 1 4 5      y [.][h0][.][.][h1][h2][.]
//                      c0      c1 c2         c3
//
// The kernel is decode (decode.cu) with c for u. Nobody stores where the rows of c go: a block searches the pivots for it
// while it waits for h. Each block writes some columns of h to y.
//
// Pivots are strictly ascending and lie in [0, n). Of others y is wrong, but all of it is written, and nothing outside.
//
// Compiled for sm_80, sm_90a and as PTX, run by tests in an emulator; it HAS NEVER RUN ON A GPU, and no speed is claimed.
#include "device/grid.h"
#include "device/launch.h"
#include "low_rank/decode_steps.h"
#include "low_rank/epilogue.h"
#include "low_rank/pivoted.h"

namespace low_rank {

struct PivotedForm : SingleForm<PivotedParams> {
  LOWFAT_DEVICE static Share share_of_block(const Params& p) {
    return second_share(p.n - p.r, p.r, gridDim.x, blockIdx.x);
  }
  LOWFAT_DEVICE static TileOfU u_at(const Params& p, const Share& mine, const Cursor& at) {
    return {p.c, (mine.tiles.first + at.tile) * kTileRows, p.n - p.r, p.r};
  }
  LOWFAT_DEVICE static DecodeMemory memory(const Params& p, int token_tiles) {
    return pivoted_memory(token_tiles, p.tiles, p.r, gridDim.x, p.prefetch);
  }
};

template <class T, int kTileCount>
struct PivotedConfig : DecodeSizes<T, kTileCount>, PivotedForm {
  static_assert(kTileCount * kTokenTile * 2 >= sizeof(int64_t), "the pivots fit where h will be");
};

// --- from the sums to y ---

// The columns of y that a block writes: of its tiles of c, then of its pivots.
struct Columns {
  Range pivots;  // of the block
  int of_tiles, count;
  uint16_t* smem_bias;
  int* smem_columns;

  template <class Config>
  LOWFAT_DEVICE Columns(const PivotedParams& p, const Second<Config>& second)
      : pivots(pivots_of_block(p.r, gridDim.x, blockIdx.x)),
        of_tiles((second.mine.tiles.last - second.mine.tiles.first) * kTileRows),
        count(of_tiles + pivots.last - pivots.first),
        smem_bias(second.smem_bias),
        smem_columns(reinterpret_cast<int*>(second.smem_bias + columns_for(p.tiles, p.r, gridDim.x))) {}
};

// All pivots to where h will be: the search does not wait for memory at each step. Before u, not to wait for that.
LOWFAT_DEVICE void copy_pivots(const PivotedParams& p, uint16_t* smem_h) {
  for (int i = threadIdx.x * 2; i < p.r; i += blockDim.x * 2) device::copy16_async(smem_h + 4 * i, p.pivots + i);
  device::commit_copies();
}

LOWFAT_DEVICE void find_columns(const PivotedParams& p, const SecondShare& mine, const Columns& columns,
                                const uint16_t* smem_h) {
  const int64_t* smem_pivots = reinterpret_cast<const int64_t*>(smem_h);
  for (int i = threadIdx.x; i < columns.count; i += blockDim.x) {
    const int row = mine.tiles.first * kTileRows + i;
    int column = -1;
    if (i >= columns.of_tiles) {
      column = pivot_column(smem_pivots, p.r, p.n, columns.pivots.first + i - columns.of_tiles);
    } else if (row < p.n - p.r) {
      column = complement_column(smem_pivots, p.r, row);
    }
    columns.smem_columns[i] = column;
    columns.smem_bias[i] = p.bias && column >= 0 ? device::load(p.bias + column) : 0;
  }
}

template <class Config>
LOWFAT_DEVICE void store_column(const PivotedParams& p, const Columns& columns, int i, int token, float value) {
  using T = typename Config::Element;
  const int column = columns.smem_columns[i];
  if (column < 0) return;
  const float y = finished(value, device::widen<T>(columns.smem_bias[i]));
  device::store(p.y + int64_t{token} * p.n + column, device::narrow<T>(y));
}

template <class Config>
LOWFAT_DEVICE void store_tiles(const PivotedParams& p, const SecondShare& mine, const Columns& columns,
                               const float* smem_sums) {
  for (int i = threadIdx.x; i < columns.of_tiles * Config::kTokens; i += Config::kThreads) {
    const int row = i % kTileRows, token = i / kTileRows % Config::kTokens, tile = i / (kTileRows * Config::kTokens);
    if (token >= p.m) continue;
    const float sum = sum_of<Config>(smem_sums, warps_of_tile(mine, tile), tile, token, row);
    store_column<Config>(p, columns, tile * kTileRows + row, token, sum);
  }
}

template <class Config>
LOWFAT_DEVICE void store_pivots(const PivotedParams& p, const Columns& columns, const uint16_t* smem_h) {
  const int each = columns.pivots.last - columns.pivots.first;
  for (int i = threadIdx.x; i < each * p.m; i += Config::kThreads) {
    const int token = i / each, pivot = i % each;
    const uint16_t h = smem_h[token * h_stride(p.r) + columns.pivots.first + pivot];
    store_column<Config>(p, columns, columns.of_tiles + pivot, token, device::widen<typename Config::Element>(h));
  }
}

// --- the kernel ---

// One block to a multiprocessor.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) decode_pivoted(const __grid_constant__ PivotedParams p) {
  First<Config, true> first(p);
  Second<Config> second(p);
  const Columns columns(p, second);
  copy_pivots(p, second.smem_h);
  second.prefetch();
  first.finish(second.smem_sums);
  second.wait_before_prefetched();
  const uint64_t target = device::grid_arrive(p.counter);  // its barrier shows all threads the pivots
  second.load_rest();
  find_columns(p, second.mine, columns, second.smem_h);
  device::grid_wait(p.counter, target);  // and h may be where they were
  gather_h<Config>(p, p.partials, p.r, second.smem_h, p.h);
  second.multiply();
  store_tiles<Config>(p, second.mine, columns, second.smem_sums);
  store_pivots<Config>(p, columns, second.smem_h);
}

// --- launch ---

template <class Config>
const char* launch(const DecodePlan& plan, const PivotedParams& params, void* stream) {
  device::Launch shape;
  shape.grid = dim3(plan.grid);
  shape.threads = Config::kThreads;
  shape.smem_bytes = plan.smem_bytes;
  shape.is_cooperative = true;
  shape.stream = stream;
  return device::launch(decode_pivoted<Config>, shape, params);
}

const char* launch_pivoted(const DecodePlan& plan, PivotedParams params, Dtype dtype, void* stream) {
  params.splits = plan.splits, params.tiles = plan.tiles, params.prefetch = plan.prefetch;
  const bool is_bf16 = dtype == Dtype::bfloat16;
  if (plan.token_tiles == 1) {
    return is_bf16 ? launch<PivotedConfig<device::Bf16, 1>>(plan, params, stream)
                   : launch<PivotedConfig<device::Fp16, 1>>(plan, params, stream);
  }
  return is_bf16 ? launch<PivotedConfig<device::Bf16, 2>>(plan, params, stream)
                 : launch<PivotedConfig<device::Fp16, 2>>(plan, params, stream);
}

}  // namespace low_rank
