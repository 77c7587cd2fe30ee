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
#include "device/grid.h"
#include "device/launch.h"
#include "low_rank/decode_steps.h"
#include "low_rank/epilogue.h"
#include "low_rank/low_rank.h"

namespace low_rank {

struct PlainForm : SingleForm<DecodeParams> {
  LOWFAT_DEVICE static Share share_of_block(const Params& p) { return second_share(p.n, p.r, gridDim.x, blockIdx.x); }
  LOWFAT_DEVICE static TileOfU u_at(const Params& p, const Share& mine, const Cursor& at) {
    return {p.u, (mine.tiles.first + at.tile) * kTileRows, p.n, p.r};
  }
  LOWFAT_DEVICE static DecodeMemory memory(const Params& p, int token_tiles) {
    return decode_memory(token_tiles, p.tiles, p.r, p.prefetch);
  }
};

template <class T, int kTileCount>
struct DecodeConfig : DecodeSizes<T, kTileCount>, PlainForm {};

// --- from the sums to y ---

// The residual is on its way while sums are added.
template <class Config>
LOWFAT_DEVICE void store_y(const DecodeParams& p, const SecondShare& mine, const float* smem_sums, const uint16_t* smem_bias) {
  using T = typename Config::Element;
  const int count = (mine.tiles.last - mine.tiles.first) * Config::kTokens * kTileRows;
  for (int i = threadIdx.x; i < count; i += Config::kThreads) {
    const int row = i % kTileRows, token = i / kTileRows % Config::kTokens, tile = i / (kTileRows * Config::kTokens);
    const int column = (mine.tiles.first + tile) * kTileRows + row;
    if (token >= p.m || column >= p.n) continue;
    const int64_t at = int64_t{token} * p.n + column;
    const float residual = p.residual ? device::widen<T>(device::load(p.residual + at)) : 0;
    const float sum = sum_of<Config>(smem_sums, warps_of_tile(mine, tile), tile, token, row);
    const float bias = p.bias ? device::widen<T>(smem_bias[tile * kTileRows + row]) : 0;
    device::store(p.y + at, device::narrow<T>(finished(sum, bias, p.activation, residual)));
  }
}

// h is there.
template <class Config>
LOWFAT_DEVICE void finish(const DecodeParams& p, Second<Config>& second) {
  gather_h<Config>(p, p.partials, p.r, second.smem_h, p.h);
  second.multiply();
  store_y<Config>(p, second.mine, second.smem_sums, second.smem_bias);
}

// --- the kernels ---

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
  finish<Config>(p, second);
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
  finish<Config>(p, second);
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
