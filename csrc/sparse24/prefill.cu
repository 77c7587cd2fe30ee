// sparse24 on a GPU for many rows of x: y = x w^T + bias, where of each four neighbours in a row of w two are stored.
//
//   x [m, k]   values [n, k / 2]   mask [n, ceil(k / 32)]   bias [n]   y [m, n]      k a multiple of 16, bf16 or fp16
//
// The weight is the sparse tall operand of the tensor core's product, 16 of its rows times 8 rows of x (tokens), sums in
// float. A block has one tile of rows and tokens after the other, and takes it slab by slab: 64 inputs, which cp.async
// brings as they lie into a ring of stages, two or three ahead of the one in use.
//
//      k ->  slab  slab  slab             a stage   values [rows, 32]   mask [rows, 64 bits]   x [tokens, 64]
//   w  [-----|-----|-----]  256 rows
//      [-----|-----|-----]                8 warps: 64 rows x 64 tokens each (the largest of three shapes of tiles)
//   x  [-----|-----|-----]  128 tokens
//
// The stages are one sequence through all tiles of a block: the first slabs of the next one are on their way while the sums
// of one are rounded and stored. What the tensor core wants to know of where values belong, its metadata, each lane makes
// from the 16 bits of the mask that it has to tell about; nothing is packed beforehand. Rows of the weight are dealt to
// fragments so that a lane's sums of a token are 16 bytes of y, and go there from registers.
//
// Sums are in the order of k, whatever the tile: the same inputs give the same bits. An input that no row keeps is not read
// for it: unlike in a dense product, NaN in x stays away from rows that have dropped it.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator; it HAS NEVER RUN ON A GPU, no speed is claimed.
#include "sparse24/prefill_layout.h"

#include "device/async_copy.h"
#include "device/convert.h"
#include "device/launch.h"
#include "device/load.h"
#include "device/mma.h"
#include "device/warp_product.h"
#include "sparse24/sparse24_cuda.h"

namespace sparse24 {

template <class T, int kRowCount>
struct PrefillConfig {
  using Element = T;
  static constexpr PrefillShape kShape = prefill_shape(kRowCount);
  static constexpr int kRows = kRowCount, kTokens = kShape.tokens();  // of a tile
  static constexpr int kThreads = kShape.threads(), kStages = kShape.stages, kBlocks = kShape.blocks;
  static constexpr int kTokenWarps = kShape.token_warps, kWarpRows = kShape.warp_rows(), kWarpTokens = kShape.warp_tokens();
  static constexpr int kRowTiles = kShape.row_tiles, kTokenTiles = kShape.token_tiles;  // of a warp
  static constexpr int kLaneRows = 2 * kRowTiles;                                       // neighbours in y
  struct Stage {
    uint4 values[kRows * kValuePieces];
    uint4 x[kTokens * kTokenPieces];
    uint32_t mask[kRows * kMaskWords];
  };
  static_assert(kRows == kShape.rows() && sizeof(Stage) == kShape.stage_bytes(), "the shape is that of its rows");
  static_assert(kThreads / kValuePieces == kWarpRows, "a thread copies the same row of each warp's");
  static_assert(kRows * kMaskWords % kThreads == 0 && kTokens * kTokenPieces % kThreads == 0, "each thread copies as much");
  static_assert(kThreads / kMaskWords % kWarpRows == 0, "and masks of rows that are whole warps' apart");
};

struct PrefillParams {
  ForwardOperands in;
  int row_tiles, token_tiles, slabs;  // of n, m, k
};

template <class Config>
using PrefillSums = float[Config::kRowTiles][Config::kTokenTiles][4];

template <class Config>
LOWFAT_DEVICE PrefillTile tile_of(const PrefillParams& p, int index) {
  return prefill_tile(Config::kRows, Config::kTokens, p.row_tiles, p.token_tiles, index);
}

// --- from memory to the stages ---

// A thread's part in copying a block's slabs, one after the other through all of its tiles: the same piece of some rows of
// values, of some rows of x, and the same word of some masks. Zeros stand for what is outside.
template <class Config>
struct SlabCopies {
  const PrefillParams& p;
  int index, slab;  // what is asked for next: of which tile, which one
  int row, mask_row, token;
  const uint16_t *values, *x;
  const uint32_t* mask;

  LOWFAT_DEVICE explicit SlabCopies(const PrefillParams& params) : p(params), index(blockIdx.x) { enter(); }

  LOWFAT_DEVICE static int value_slot() { return threadIdx.x / kValuePieces; }
  LOWFAT_DEVICE static int mask_slot() { return threadIdx.x / kMaskWords; }
  LOWFAT_DEVICE static int token_slot() { return threadIdx.x / kTokenPieces; }
  LOWFAT_DEVICE static int value_piece() { return threadIdx.x % kValuePieces; }
  LOWFAT_DEVICE static int mask_word() { return threadIdx.x % kMaskWords; }
  LOWFAT_DEVICE static int token_piece() { return threadIdx.x % kTokenPieces; }

  LOWFAT_DEVICE bool is_over() const { return index >= p.row_tiles * p.token_tiles; }
  LOWFAT_DEVICE int words() const { return parts_of(p.in.k, 32); }

  LOWFAT_DEVICE void enter() {
    slab = 0;
    if (is_over()) return;
    const PrefillTile tile = tile_of<Config>(p, index);
    row = tile.row + tile_row_in_slot(Config::kRowTiles, value_slot());
    mask_row = tile.row + tile_row_in_slot(Config::kRowTiles, mask_slot());
    token = tile.token + token_slot();
    values = p.in.values + (int64_t{row} * (p.in.k / 2) + value_piece() * 8);
    mask = p.in.mask + (int64_t{mask_row} * words() + mask_word());
    x = p.in.x + (int64_t{token} * p.in.k + token_piece() * 8);
  }

  LOWFAT_DEVICE void copy_next(typename Config::Stage& smem) {
    if (is_over()) return;
    const int input = slab * kSlab;
    const bool has_values = input + value_piece() * 16 < p.in.k, has_x = input + token_piece() * 8 < p.in.k;
    const bool has_mask = input + mask_word() * 32 < p.in.k;
#pragma unroll
    for (int down = 0; down < Config::kRows; down += Config::kWarpRows) {
      device::copy16_async(smem.values + value_place(value_slot() + down, value_piece()),
                           values + int64_t{down} * (p.in.k / 2), has_values && row + down < p.in.n);
    }
#pragma unroll
    for (int down = 0; down < Config::kTokens; down += Config::kThreads / kTokenPieces) {
      device::copy16_async(smem.x + token_place(token_slot() + down, token_piece()), x + int64_t{down} * p.in.k,
                           has_x && token + down < p.in.m);
    }
#pragma unroll
    for (int down = 0; down < Config::kRows; down += Config::kThreads / kMaskWords) {
      device::copy4_async(smem.mask + (mask_slot() + down) * kMaskWords + mask_word(), mask + int64_t{down} * words(),
                          has_mask && mask_row + down < p.in.n);
    }
    advance();
  }

  LOWFAT_DEVICE void advance() {
    values += kSlab / 2;
    mask += kMaskWords;
    x += kSlab;
    if (++slab < p.slabs) return;
    index += gridDim.x;
    enter();
  }
};

// --- from a stage to the sums ---

// Where a warp's part of a tile begins.
template <class Config>
LOWFAT_DEVICE PrefillTile warp_part() {
  const int warp = device::warp_index();
  return {warp / Config::kTokenWarps * Config::kWarpRows, warp % Config::kTokenWarps * Config::kWarpTokens};
}

template <class Config>
LOWFAT_DEVICE void make_metadata(uint32_t (&metadata)[Config::kRowTiles], const typename Config::Stage& smem) {
  const auto* halves = reinterpret_cast<const uint16_t*>(smem.mask);
  const int lane = device::lane_index(), slot = warp_part<Config>().row + lane / 4;
#pragma unroll
  for (int i = 0; i < Config::kRowTiles; ++i) {
    const uint32_t upper = halves[mask_place(slot + i * kTileRows, lane % 4)];
    const uint32_t lower = halves[mask_place(slot + i * kTileRows + 8, lane % 4)];
    metadata[i] = kept_positions(upper | lower << 16);
  }
}

// 32 inputs: the slab's first half or its second.
template <class Config, int kHalf>
LOWFAT_DEVICE void multiply_half(PrefillSums<Config>& sums, const typename Config::Stage& smem,
                                 const uint32_t (&metadata)[Config::kRowTiles]) {
  const PrefillTile part = warp_part<Config>();
  const int lane = device::lane_index();
  const device::Position at = device::ldmatrix_row(lane);
  uint32_t a[Config::kRowTiles][4], b[Config::kTokenTiles][4];
#pragma unroll
  for (int i = 0; i < Config::kRowTiles; ++i) {
    const int slot = part.row + i * kTileRows + at.row;
    device::ldmatrix<4>(a[i], smem.values + value_place(slot, kHalf * (kValuePieces / 2) + at.column / 8));
  }
#pragma unroll
  for (int j = 0; j < Config::kTokenTiles; ++j) {
    const int token = part.token + j * kTokenTile + lane % 8;
    device::ldmatrix<4>(b[j], smem.x + token_place(token, kHalf * (kTokenPieces / 2) + lane / 8));
  }
#pragma unroll
  for (int j = 0; j < Config::kTokenTiles; ++j) {
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) {
      device::mma_sp_m16n8k32<typename Config::Element, kHalf>(sums[i][j], a[i], b[j], metadata[i]);
    }
  }
}

// --- the ring of stages ---

// A group of copies is committed for each step, so that a step knows from their number that its own have come.
template <class Config>
struct Ring {
  typename Config::Stage* smem_stages;
  SlabCopies<Config> copies;
  int used = 0;  // the stage of the next step

  LOWFAT_DEVICE explicit Ring(const PrefillParams& p)
      : smem_stages(reinterpret_cast<typename Config::Stage*>(device::shared_memory())), copies(p) {
#pragma unroll
    for (int stage = 0; stage < Config::kStages - 1; ++stage) {
      copies.copy_next(smem_stages[stage]);
      device::commit_copies();  // also of nothing: groups are counted
    }
  }

  // Waits for the step's slab and asks for another one. The barrier shows everybody's copies, and that nobody still reads
  // where the next ones go: the stage before this one.
  LOWFAT_DEVICE void multiply_next(PrefillSums<Config>& sums) {
    device::wait_copies<Config::kStages - 2>();
    __syncthreads();
    copies.copy_next(smem_stages[used == 0 ? Config::kStages - 1 : used - 1]);
    device::commit_copies();
    const typename Config::Stage& smem = smem_stages[used];
    uint32_t metadata[Config::kRowTiles];
    make_metadata<Config>(metadata, smem);
    multiply_half<Config, 0>(sums, smem, metadata);
    multiply_half<Config, 1>(sums, smem, metadata);
    used = used == Config::kStages - 1 ? 0 : used + 1;
  }
};

// --- from the sums to y ---

// Of the lane's neighbouring rows; zeros past the last.
template <class Config>
LOWFAT_DEVICE void load_bias(float (&bias)[Config::kLaneRows], const PrefillParams& p, int row) {
#pragma unroll
  for (int c = 0; c < Config::kLaneRows; ++c) {
    const bool has_one = p.in.bias && row + c < p.in.n;  // at any address
    bias[c] = has_one ? device::widen<typename Config::Element>(device::load(p.in.bias + row + c)) : 0;
  }
}

template <class Config>
LOWFAT_DEVICE void store_together(uint16_t* y, const uint32_t (&pairs)[Config::kRowTiles]) {
  if constexpr (Config::kRowTiles == 4) {
    device::store16(y, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
  } else {
    device::store(reinterpret_cast<uint2*>(y), make_uint2(pairs[0], pairs[1]));
  }
}

// Of each token, lanes of eight quads have neighbouring rows: 64 or 128 bytes of y.
template <class Config>
LOWFAT_DEVICE void store_tile(const PrefillParams& p, const PrefillTile& tile, const PrefillSums<Config>& sums) {
  const PrefillTile part = warp_part<Config>();
  const int lane = device::lane_index(), row = tile.row + part.row + lane / 4 * Config::kLaneRows;
  const int first_token = tile.token + part.token + device::mma_d(lane, 0).column;
  const bool is_whole = p.in.n % Config::kLaneRows == 0;  // all of a lane's rows are there or none, at an aligned address
  float bias[Config::kLaneRows];
  load_bias<Config>(bias, p, row);
#pragma unroll
  for (int j = 0; j < Config::kTokenTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int token = first_token + j * kTokenTile + e;
      if (token >= p.in.m || row >= p.in.n) continue;
      uint32_t pairs[Config::kRowTiles];
#pragma unroll
      for (int i = 0; i < Config::kRowTiles; ++i) {
        pairs[i] = device::pack2<typename Config::Element>(sums[i][j][e] + bias[2 * i], sums[i][j][2 + e] + bias[2 * i + 1]);
      }
      uint16_t* y = p.in.y + (int64_t{token} * p.in.n + row);
      if (is_whole) {
        store_together<Config>(y, pairs);
        continue;
      }
#pragma unroll
      for (int c = 0; c < Config::kLaneRows; ++c) {
        if (row + c < p.in.n) device::store(y + c, static_cast<uint16_t>(pairs[c / 2] >> c % 2 * 16));
      }
    }
  }
}

// --- the kernel ---

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) prefill(const __grid_constant__ PrefillParams p) {
  Ring<Config> ring(p);
  for (int index = blockIdx.x; index < p.row_tiles * p.token_tiles; index += gridDim.x) {
    PrefillSums<Config> sums;
    device::clear(sums);
    for (int slab = 0; slab < p.slabs; ++slab) ring.multiply_next(sums);
    store_tile<Config>(p, tile_of<Config>(p, index), sums);
  }
}

// --- launch ---

template <class Config>
const char* launch(const PrefillPlan& plan, const ForwardOperands& in, void* stream) {
  const PrefillParams params{in, parts_of(in.n, Config::kRows), parts_of(in.m, Config::kTokens), parts_of(in.k, kSlab)};
  device::Launch shape;
  shape.grid = dim3(plan.grid);
  shape.threads = Config::kThreads;
  shape.smem_bytes = Config::kStages * sizeof(typename Config::Stage);
  shape.stream = stream;
  return device::launch(prefill<Config>, shape, params);
}

template <class T>
const char* launch_rows(const PrefillPlan& plan, const ForwardOperands& in, void* stream) {
  switch (plan.rows) {
    case 256: return launch<PrefillConfig<T, 256>>(plan, in, stream);
    case 128: return launch<PrefillConfig<T, 128>>(plan, in, stream);
    case 64: return launch<PrefillConfig<T, 64>>(plan, in, stream);
    default: return "the plan does not cover these sizes";
  }
}

const char* launch_prefill(const PrefillPlan& plan, const ForwardOperands& operands, Dtype dtype, void* stream) {
  return dtype == Dtype::bfloat16 ? launch_rows<device::Bf16>(plan, operands, stream)
                                  : launch_rows<device::Fp16>(plan, operands, stream);
}

}  // namespace sparse24
