// The gradients of low_rank on a GPU, by dy: two products down the chain and two across the rows, never the weight's [n, k].
//
//   x [m, k]   v [r, k]   u [n, r]   h [m, r]   dy [m, n]      bf16 or fp16, rows 16-byte aligned, sums in float
//
//   dh = dy u     [m, r]  rounded once        activations: a lies along the contraction     a   [rows, depth]
//   dx = dh v     [m, k]                                                                     b   [depth, columns]
//   du = dy^T h   [n, r]  db = sum of dy      weights: both lie across it, which is m       a   [depth, rows]
//   dv = dh^T x   [r, k]                                                                     b   [depth, columns]
//
// One kernel does all four. A block has a square tile of c and a split of the contraction, of which cp.async brings stage
// after stage into shared memory, three ahead of the one in use; ldmatrix turns what lies the wrong way round on its way to
// the tensor core. du and dv are one launch. Whoever has the first columns of du has all of dy in its fragments, and sums
// it for db.
//
//               columns                     stages in shared memory       8 warps: halves x quarters of a tile
//        c   [ tile | tile ]      split 0   [ use | on | on | on ]              [ 0 | 1 | 2 | 3 ]
//   rows     [ tile | tile ]      split 1              its  way                 [ 4 | 5 | 6 | 7 ]
//
// What splits have summed lies in global memory, in floats, until the next launch adds it up in their order and rounds: the
// same call gives the same bits. That launch also adds to gradients that are kept in floats.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator. It HAS NEVER RUN ON A GPU, no speed is claimed.
#include "low_rank/backward.h"

#include "device/async_copy.h"
#include "device/convert.h"
#include "device/launch.h"
#include "device/load.h"
#include "device/mma.h"
#include "device/reduce.h"
#include "device/splits.h"

namespace low_rank {

template <class T, bool kAcross, int kTileSize>
struct BackwardConfig {
  using Element = T;
  static constexpr bool kIsAcross = kAcross;  // weights: a lies [depth, rows]
  static constexpr int kTile = kTileSize;
  static constexpr int kDepth = tile_depth(kTile);
  static constexpr int kStages = kBackwardStages;
  static constexpr int kThreads = kBackwardThreads;
  static constexpr int kBlocks = kBackwardBlocks;  // that share a multiprocessor: 128 registers for each thread
  static constexpr int kPiecesOfA = (kIsAcross ? kTile : kDepth) / 8, kPiecesOfB = kTile / 8;  // 16 bytes each, of a row
  static constexpr int kRows = kTile / kBackwardWarpRows, kColumns = kTile / kBackwardWarpColumns;  // of a warp
  static constexpr int kRowFragments = kRows / 16, kColumnFragments = kColumns / 8;
  struct Stage {
    uint4 a[kTile * kDepth / 8], b[kTile * kDepth / 8];
  };
  union Shared {
    Stage stages[kStages];
    uint16_t c[kTile * c_stride(kTile)];
  };
  static_assert(kDepth % 16 == 0 && kColumnFragments % 2 == 0, "ldmatrix moves 16 x 16 elements");
  static_assert(kTile * kDepth / 8 % kThreads == 0, "every thread copies as much");
  static_assert(kRowFragments <= kBackwardWarpColumns, "a warp sums one row fragment of a for db");
};

// c [rows, columns] = a b, rounded to `c`; or what each split has summed, to `partials`.
struct BackwardProduct {
  const uint16_t* a;    // [rows, depth]; of weights [depth, rows]
  const uint16_t* b;    // [depth, columns]; columns may be 0
  uint16_t* c;          // [rows, columns] or null
  float* partials;      // [splits, rows, columns] or null
  uint16_t* a_sum;      // of weights, [rows]: a summed over depth; or null
  float* a_partials;    // [splits, rows] or null
  int rows, columns, depth;
  int row_tiles, column_tiles, splits;
};

struct BackwardProducts {
  BackwardProduct list[2];
  int blocks_of_first;
};

// Floats that splits have left, to be added up: sum [count].
struct BackwardSum {
  const float* partials;  // [splits, count]
  void* sum;              // [count] of the dtype, or float
  int64_t count;          // a multiple of 8
  int splits;
  bool is_added;  // to the floats that are there
};

struct BackwardSums {
  BackwardSum list[3];
  int count;
};

// --- products ---

// A thread's part in copying an operand, a row-major matrix, stage by stage: the same piece of some rows. Zeros stand for
// what is outside of the matrix, along the contraction or not.
template <class Config, int kPieces, bool kMovesDown>
struct Operand {
  const uint16_t* from;
  int row, column, rows, columns;

  LOWFAT_DEVICE Operand(const uint16_t* gmem, int first_row, int first_column, int all_rows, int all_columns)
      : row(first_row + threadIdx.x / kPieces),
        column(first_column + threadIdx.x % kPieces * 8),
        rows(all_rows),
        columns(all_columns) {
    from = gmem + (int64_t{row} * columns + column);
  }

  LOWFAT_DEVICE void copy_next(uint4* smem) {
    constexpr int kTogether = Config::kThreads / kPieces;  // rows
    constexpr int kCopies = Config::kTile * Config::kDepth / 8 / Config::kThreads;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int down = i * kTogether, smem_row = threadIdx.x / kPieces + down;
      device::copy16_async(smem + tile_piece(kPieces, smem_row, threadIdx.x % kPieces), from + int64_t{down} * columns,
                           row + down < rows && column < columns);
    }
    if (kMovesDown) {
      row += Config::kDepth;
      from += int64_t{Config::kDepth} * columns;
    } else {
      column += Config::kDepth;
      from += Config::kDepth;
    }
  }
};

template <class Config>
using OperandA = Operand<Config, Config::kPiecesOfA, Config::kIsAcross>;
template <class Config>
using OperandB = Operand<Config, Config::kPiecesOfB, true>;

// Where a warp's part of a tile begins.
template <class Config>
LOWFAT_DEVICE device::Position warp_place() {
  const int warp = device::warp_index();
  return {warp / kBackwardWarpColumns * Config::kRows, warp % kBackwardWarpColumns * Config::kColumns};
}

template <class Config>
LOWFAT_DEVICE void load_fragments_a(uint32_t (&a)[Config::kRowFragments][4], const uint4* smem_a, int depth) {
  const int row = warp_place<Config>().row, lane = device::lane_index();
#pragma unroll
  for (int i = 0; i < Config::kRowFragments; ++i) {
    if constexpr (Config::kIsAcross) {
      const device::Position at = transposed_a_row(lane);
      const int piece = (row + i * 16 + at.column) / 8;
      device::ldmatrix_transposed<4>(a[i], smem_a + tile_piece(Config::kPiecesOfA, depth + at.row, piece));
    } else {
      const device::Position at = device::ldmatrix_row(lane);
      const int piece = (depth + at.column) / 8;
      device::ldmatrix<4>(a[i], smem_a + tile_piece(Config::kPiecesOfA, row + i * 16 + at.row, piece));
    }
  }
}

// Two column fragments at a time: rows 0..7 and 8..15 of the contraction of one, then of the other.
template <class Config>
LOWFAT_DEVICE void load_fragments_b(uint32_t (&b)[Config::kColumnFragments / 2][4], const uint4* smem_b, int depth) {
  const int column = warp_place<Config>().column;
  const device::Position at = device::ldmatrix_row(device::lane_index());
#pragma unroll
  for (int j = 0; j < Config::kColumnFragments / 2; ++j) {
    const int piece = (column + j * 16 + at.column) / 8;
    device::ldmatrix_transposed<4>(b[j], smem_b + tile_piece(Config::kPiecesOfB, depth + at.row, piece));
  }
}

// A block's work: the tile's sums, and of the rows of a.
template <class Config>
struct Tile {
  using T = typename Config::Element;
  const BackwardProduct& p;
  const Place place;
  const bool sums_a;
  float sums[Config::kRowFragments][Config::kColumnFragments][4];
  float a_sums[2];  // of one row fragment: a lane's pairs of rows lane / 4 and 8 below

  LOWFAT_DEVICE Tile(const BackwardProduct& product, int index)
      : p(product),
        place(place_of(product.row_tiles, product.column_tiles, index)),
        sums_a(Config::kIsAcross && (product.a_sum || product.a_partials) && place.column_tile == 0) {
#pragma unroll
    for (int i = 0; i < Config::kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < Config::kColumnFragments; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
      }
    }
    a_sums[0] = a_sums[1] = 0;
  }

  LOWFAT_DEVICE int first_row() const { return place.row_tile * Config::kTile; }
  LOWFAT_DEVICE int first_column() const { return place.column_tile * Config::kTile; }

  // The four warps beside each other have the same fragments of a: each sums one.
  LOWFAT_DEVICE void sum_a(const uint32_t (&a)[Config::kRowFragments][4]) {
#pragma unroll
    for (int i = 0; i < Config::kRowFragments; ++i) {
      if (device::warp_index() % kBackwardWarpColumns != i) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 pair = device::unpack2<T>(a[i][e]);
        a_sums[e % 2] += pair.x + pair.y;
      }
    }
  }

  LOWFAT_DEVICE void multiply(const typename Config::Stage& smem) {
#pragma unroll
    for (int depth = 0; depth < Config::kDepth; depth += 16) {
      uint32_t a[Config::kRowFragments][4], b[Config::kColumnFragments / 2][4];
      load_fragments_a<Config>(a, smem.a, depth);
      load_fragments_b<Config>(b, smem.b, depth);
#pragma unroll
      for (int i = 0; i < Config::kRowFragments; ++i) {
#pragma unroll
        for (int j = 0; j < Config::kColumnFragments; ++j) {
          const uint32_t of_column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          device::mma_m16n8k16<T>(sums[i][j], a[i], of_column);
        }
      }
      if (sums_a) sum_a(a);
    }
  }

  // Through all stages of the split: wait for one, ask for the one three ahead, multiply. The barrier shows everybody's
  // copies, and that nobody still reads where the next ones go.
  LOWFAT_DEVICE void multiply_split(typename Config::Stage* smem_stages) {
    const Range steps = steps_of_split(Config::kTile, p.depth, p.splits, place.split);
    const int from = steps.first * Config::kDepth;
    OperandA<Config> a(p.a, Config::kIsAcross ? from : first_row(), Config::kIsAcross ? first_row() : from,
                       Config::kIsAcross ? p.depth : p.rows, Config::kIsAcross ? p.rows : p.depth);
    OperandB<Config> b(p.b, from, first_column(), p.depth, p.columns);
    const auto copy = [&](int step) {
      if (step < steps.last - steps.first) {
        a.copy_next(smem_stages[step % Config::kStages].a);
        b.copy_next(smem_stages[step % Config::kStages].b);
      }
      device::commit_copies();  // also of nothing: groups are counted
    };
    for (int step = 0; step < Config::kStages - 1; ++step) copy(step);
    for (int step = 0; step < steps.last - steps.first; ++step) {
      device::wait_copies<Config::kStages - 2>();
      __syncthreads();
      copy(step + Config::kStages - 1);
      multiply(smem_stages[step % Config::kStages]);
    }
  }

  // Of each pair of neighbours in the tile: visit(row, column, their sums).
  template <class Visit>
  LOWFAT_DEVICE void each_pair(const Visit& visit) const {
    const device::Position warp = warp_place<Config>();
#pragma unroll
    for (int i = 0; i < Config::kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < Config::kColumnFragments; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const device::Position at = device::mma_d(device::lane_index(), 2 * half);
          visit(warp.row + i * 16 + at.row, warp.column + j * 8 + at.column, sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
      }
    }
  }

  LOWFAT_DEVICE void store_partials() const {
    float* gmem = p.partials + int64_t{place.split} * p.rows * p.columns;
    each_pair([&](int row, int column, float left, float right) {
      row += first_row(), column += first_column();
      if (row >= p.rows || column >= p.columns) return;
      device::store(reinterpret_cast<float2*>(gmem + (int64_t{row} * p.columns + column)), make_float2(left, right));
    });
  }

  // Through shared memory, where the stages were, to be written in pieces of 16 bytes.
  LOWFAT_DEVICE void store_c(uint16_t* smem_c) const {
    __syncthreads();
    each_pair([&](int row, int column, float left, float right) {
      *reinterpret_cast<uint32_t*>(smem_c + row * c_stride(Config::kTile) + column) = device::pack2<T>(left, right);
    });
    __syncthreads();
    constexpr int kPieces = Config::kTile / 8;
    for (int i = threadIdx.x; i < Config::kTile * kPieces; i += Config::kThreads) {
      const int row = first_row() + i / kPieces, column = first_column() + i % kPieces * 8;
      if (row >= p.rows || column >= p.columns) continue;
      const uint16_t* from = smem_c + i / kPieces * c_stride(Config::kTile) + i % kPieces * 8;
      device::store16(p.c + (int64_t{row} * p.columns + column), device::load16_shared(from));
    }
  }

  LOWFAT_DEVICE void store_a_sums() const {
    const int lane = device::lane_index(), fragment = device::warp_index() % kBackwardWarpColumns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = device::quad_sum(a_sums[half]);
      const int row = first_row() + warp_place<Config>().row + fragment * 16 + device::mma_d(lane, 2 * half).row;
      if (lane % 4 != 0 || fragment >= Config::kRowFragments || row >= p.rows) continue;
      if (p.a_sum) {
        device::store(p.a_sum + row, device::narrow<T>(sum));
      } else {
        device::store(p.a_partials + (int64_t{place.split} * p.rows + row), sum);
      }
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) backward_products(
    const __grid_constant__ BackwardProducts p) {
  auto& smem = *reinterpret_cast<typename Config::Shared*>(device::shared_memory());
  const int index = blockIdx.x;
  const bool is_second = index >= p.blocks_of_first;
  Tile<Config> tile(p.list[is_second], is_second ? index - p.blocks_of_first : index);
  tile.multiply_split(smem.stages);
  if (tile.p.partials) {
    tile.store_partials();
  } else if (tile.p.c) {
    tile.store_c(smem.c);
  }
  if (tile.sums_a) tile.store_a_sums();
}

// --- sums over splits ---

template <class T>
struct BackwardSumConfig {
  using Element = T;
  static constexpr int kThreads = 256;
  static constexpr int kSplitsAtOnce = 4;  // loads on their way
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads) backward_sums(const __grid_constant__ BackwardSums p) {
  using T = typename Config::Element;
  for (int which = 0; which < p.count; ++which) {
    const BackwardSum& one = p.list[which];
    const int64_t stride = int64_t{4} * gridDim.x * Config::kThreads;
    for (int64_t i = 4 * (int64_t{blockIdx.x} * Config::kThreads + threadIdx.x); i < one.count; i += stride) {
      float4 sum = device::sum_of_splits<Config::kSplitsAtOnce>(one.partials + i, one.count, one.splits);
      if (one.is_added) {
        float* into = static_cast<float*>(one.sum) + i;
        const float4 before = device::load16_floats_l2(into);
        sum = make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w);
        device::store(reinterpret_cast<float4*>(into), sum);
      } else {
        uint16_t* into = static_cast<uint16_t*>(one.sum) + i;
        const uint2 rounded = make_uint2(device::pack2<T>(sum.x, sum.y), device::pack2<T>(sum.z, sum.w));
        device::store(reinterpret_cast<uint2*>(into), rounded);
      }
    }
  }
}

// --- launch ---

inline BackwardProduct product_of(const uint16_t* a, const uint16_t* b, int rows, int columns, int depth, int tile,
                                  int splits) {
  BackwardProduct p{};
  p.a = a, p.b = b;
  p.rows = rows, p.columns = columns, p.depth = depth;
  p.row_tiles = parts_of(rows, tile), p.column_tiles = larger(1, parts_of(columns, tile));
  p.splits = splits;
  return p;
}

// The launches of one call, with a dtype and a size of tile.
template <class T, int kTile>
struct Backward {
  const BackwardPlan& plan;
  const BackwardParams& p;
  int sm_count;
  void* stream;

  template <bool kIsAcross>
  const char* multiply(const BackwardProduct* list, int count) const {
    using Config = BackwardConfig<T, kIsAcross, kTile>;
    BackwardProducts products{};
    int blocks = 0;
    for (int i = 0; i < count; ++i) {
      products.list[i] = list[i];
      if (i == 1) products.blocks_of_first = blocks;
      blocks += list[i].row_tiles * list[i].column_tiles * list[i].splits;
    }
    if (count == 1) products.blocks_of_first = blocks;
    device::Launch shape;
    shape.grid = dim3(blocks);
    shape.threads = Config::kThreads;
    shape.smem_bytes = sizeof(typename Config::Shared);
    shape.stream = stream;
    return device::launch(backward_products<Config>, shape, products);
  }

  const char* add_up(const BackwardSums& sums) const {
    using Config = BackwardSumConfig<T>;
    int64_t most = 0;
    for (int i = 0; i < sums.count; ++i) most = sums.list[i].count > most ? sums.list[i].count : most;
    const int64_t blocks = device::ceil_div(most, 4 * Config::kThreads);
    device::Launch shape;
    shape.grid = dim3(static_cast<unsigned>(blocks < 8 * sm_count ? blocks : 8 * sm_count));
    shape.threads = Config::kThreads;
    shape.stream = stream;
    return device::launch(backward_sums<Config>, shape, sums);
  }

  const char* dh() const {
    BackwardProduct one = product_of(p.dy, p.u, p.m, p.r, p.n, kTile, plan.dh_splits);
    if (plan.dh_splits == 1) {
      one.c = p.dh;
      return multiply<false>(&one, 1);
    }
    one.partials = p.partials;
    if (const char* error = multiply<false>(&one, 1)) return error;
    return add_up({{{p.partials, p.dh, int64_t{p.m} * p.r, plan.dh_splits, false}}, 1});
  }

  const char* dx() const {
    BackwardProduct one = product_of(p.dh, p.v, p.m, p.k, p.r, kTile, 1);
    one.c = p.dx;
    return multiply<false>(&one, 1);
  }

  // du with db, and dv. db alone is a du of no columns, whose second operand is never read: the tensor cores multiply zeros
  // while dy passes.
  const char* weights() const {
    const bool needs_du = p.needs & kNeedsDu, needs_db = p.needs & kNeedsDb;
    const bool is_summed_later = plan.weight_splits > 1 || plan.is_added;
    BackwardProduct list[2];
    BackwardSums sums{};
    float* partials = p.partials;
    const auto place = [&](void* to, int64_t count, uint16_t*& c, float*& c_partials) {
      if (!is_summed_later) {
        c = static_cast<uint16_t*>(to);
        return;
      }
      c_partials = partials;
      partials += plan.weight_splits * count;
      sums.list[sums.count++] = {c_partials, to, count, plan.weight_splits, plan.is_added};
    };
    int count = 0;
    if (needs_du || needs_db) {
      BackwardProduct& du = list[count++];
      du = product_of(p.dy, needs_du ? p.h : p.dy, p.n, needs_du ? p.r : 0, p.m, kTile, plan.weight_splits);
      if (needs_du) place(p.du, int64_t{p.n} * p.r, du.c, du.partials);
      if (needs_db) place(p.db, p.n, du.a_sum, du.a_partials);
    }
    if (p.needs & kNeedsDv) {
      BackwardProduct& dv = list[count++];
      dv = product_of(p.dh, p.x, p.r, p.k, p.m, kTile, plan.weight_splits);
      place(p.dv, int64_t{p.r} * p.k, dv.c, dv.partials);
    }
    if (const char* error = multiply<true>(list, count)) return error;
    return is_summed_later ? add_up(sums) : nullptr;
  }

  const char* all() const {
    const char* error = nullptr;
    if (p.needs & (kNeedsDx | kNeedsDv)) error = dh();
    if (!error && p.needs & kNeedsDx) error = dx();
    if (!error && p.needs & (kNeedsDv | kNeedsDu | kNeedsDb)) error = weights();
    return error;
  }
};

const char* launch_backward(const BackwardPlan& plan, const BackwardParams& params, Dtype dtype, int sm_count,
                            void* stream) {
  using device::Bf16, device::Fp16;
  const bool is_bf16 = dtype == Dtype::bfloat16;
  if (plan.tile == kSmallTile) {
    return is_bf16 ? Backward<Bf16, kSmallTile>{plan, params, sm_count, stream}.all()
                   : Backward<Fp16, kSmallTile>{plan, params, sm_count, stream}.all();
  }
  return is_bf16 ? Backward<Bf16, kLargeTile>{plan, params, sm_count, stream}.all()
                 : Backward<Fp16, kLargeTile>{plan, params, sm_count, stream}.all();
}

}  // namespace low_rank
