// low_rank_sparse on a GPU, its weight: w = scale u v + s, rounded once, for one dense product of the library after it.
//
//   u [n, r]   v [r, k]   s: values [nnz], starts [n + 1], columns [nnz]   w [n, k]
//   bf16 or fp16, float sums; rows of u, v and w 16-byte aligned
//
// A block has a square tile of w: the tile of u v as low_rank's backward kernels have theirs (low_rank/backward_steps.h),
// with stages of r that cp.async brings, three ahead of the one in use. What the tensor cores have summed is scaled on its
// way to shared memory, where the stages were; then each thread adds the entries of its part of a row, which it has looked
// for before the product began; then the tile leaves in pieces of 16 bytes.
//
//   a row of s   columns 3 17 | 129 140 255 | 256 ...     a tile has its run of them
//                               part 0  part 1            a thread those of a half or a quarter of the tile's columns
//
// No atomics: an element of w has one thread that adds to it. Indices are not trusted: of a support that is none, w has some
// numbers or other, the same each time, and nothing outside is read or written.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator. It HAS NEVER RUN ON A GPU, no speed is claimed.
#include "device/launch.h"
#include "low_rank/backward_steps.h"
#include "low_rank_sparse/low_rank_sparse_cuda.h"
#include "low_rank_sparse/support.h"

namespace low_rank_sparse {

using low_rank::TileSizes, low_rank::TileSums;

template <class T, int kTileSize>
struct MaterializeConfig : TileSizes<T, false, kTileSize> {
  using Sizes = TileSizes<T, false, kTileSize>;
  static constexpr int kStages = low_rank::kBackwardStages;
  static constexpr int kParts = Sizes::kThreads / kTileSize;  // threads that share a row
  static constexpr int kPartColumns = kTileSize / kParts;
  struct Stage {
    typename Sizes::Operand a, b;
  };
  struct Shared {
    union {
      Stage stages[kStages];
      float w[kTileSize * tile_stride(kTileSize)];
    };
    Range entries[Sizes::kThreads];  // of each thread's part, up to the row's last
  };
  static_assert(kParts * kTileSize == Sizes::kThreads && kParts * kPartColumns == kTileSize, "each thread has a part");
  static_assert(sizeof(Shared) <= kTileSmemBytes, "two blocks share a multiprocessor");
};

struct MaterializeParams : MaterializeOperands {
  int row_tiles, column_tiles;
};

// A thread's part of a row of the tile.
template <class Config>
struct Part {
  const MaterializeParams& p;
  const int row, column;  // in the tile; its first column
  const int row_of_w, column_of_w;

  LOWFAT_DEVICE Part(const MaterializeParams& params, const low_rank::TileOfC& tile)
      : p(params),
        row(threadIdx.x % Config::kTile),
        column(threadIdx.x / Config::kTile * Config::kPartColumns),
        row_of_w(tile.first_row + row),
        column_of_w(tile.first_column + column) {}

  LOWFAT_DEVICE Range find() const {
    if (row_of_w >= p.s.n || column_of_w >= p.s.k) return {0, 0};
    const Range all = entries_of_row(p.s, row_of_w);
    return {static_cast<int>(first_from(p.s.columns, p.s.is_wide, all.first, all.last, column_of_w)), all.last};
  }

  LOWFAT_DEVICE void add(const Range& entries, float* smem_w) const {
    float* smem_row = smem_w + (row * tile_stride(Config::kTile) + column);
    visit_entries(p.s.columns, p.s.is_wide, p.values, entries.first, entries.last, column_of_w,
                  column_of_w + Config::kPartColumns, [&](uint32_t at, uint16_t value) {  // past the last one: not stored
                    smem_row[at - column_of_w] += device::widen<typename Config::Element>(value);
                  });
  }
};

template <class Config>
LOWFAT_DEVICE void store_tile(uint16_t* w, const low_rank::TileOfC& tile, const float* smem_w) {
  using T = typename Config::Element;
  constexpr int kPieces = Config::kTile / 8;
  for (int i = threadIdx.x; i < Config::kTile * kPieces; i += Config::kThreads) {
    const int row = tile.first_row + i / kPieces, column = tile.first_column + i % kPieces * 8;
    if (row >= tile.rows || column >= tile.columns) continue;
    const float* from = smem_w + (i / kPieces * tile_stride(Config::kTile) + i % kPieces * 8);
    const float4 left = *reinterpret_cast<const float4*>(from), right = *reinterpret_cast<const float4*>(from + 4);
    device::store16(w + (row * tile.row_step + column),
                    make_uint4(device::pack2<T>(left.x, left.y), device::pack2<T>(left.z, left.w),
                               device::pack2<T>(right.x, right.y), device::pack2<T>(right.z, right.w)));
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) materialize(
    const __grid_constant__ MaterializeParams p) {
  using Sizes = typename Config::Sizes;
  auto& smem = *reinterpret_cast<typename Config::Shared*>(device::shared_memory());
  const low_rank::Place at = low_rank::place_of(p.row_tiles, p.column_tiles, blockIdx.x);
  const low_rank::TileOfC tile{at.row_tile * Config::kTile, at.column_tile * Config::kTile, p.s.n, p.s.k, p.s.k};
  const Part<Config> part(p, tile);
  smem.entries[threadIdx.x] = part.find();

  TileSums<Sizes> sums;
  sums.multiply_steps(smem.stages, low_rank::copies_of_a<Sizes>({p.u, p.s.n, p.r, p.r}, tile.first_row, 0),
                      low_rank::CopiesOfB<Sizes>({p.v, p.r, p.s.k, p.s.k}, 0, tile.first_column),
                      parts_of(p.r, Config::kDepth), false);
  __syncthreads();
  sums.each_pair([&](int row, int column, float left, float right) {
    *reinterpret_cast<float2*>(smem.w + (row * tile_stride(Config::kTile) + column)) =
        make_float2(p.scale * left, p.scale * right);
  });
  __syncthreads();
  part.add(smem.entries[threadIdx.x], smem.w);
  __syncthreads();
  store_tile<Config>(p.w, tile, smem.w);
}

// --- launch ---

template <class T, int kTile>
const char* launch(const MaterializeOperands& operands, void* stream) {
  using Config = MaterializeConfig<T, kTile>;
  MaterializeParams p{operands, parts_of(operands.s.n, kTile), parts_of(operands.s.k, kTile)};
  device::Launch shape;
  shape.grid = dim3(p.row_tiles * p.column_tiles);
  shape.threads = Config::kThreads;
  shape.smem_bytes = sizeof(typename Config::Shared);
  shape.stream = stream;
  return device::launch(materialize<Config>, shape, p);
}

const char* launch_materialize(const MaterializePlan& plan, const MaterializeOperands& operands, Dtype dtype, void* stream) {
  using device::Bf16, device::Fp16;
  const bool is_bf16 = dtype == Dtype::bfloat16;
  switch (plan.tile) {
    case kSmallTile:
      return is_bf16 ? launch<Bf16, kSmallTile>(operands, stream) : launch<Fp16, kSmallTile>(operands, stream);
    case kLargeTile:
      return is_bf16 ? launch<Bf16, kLargeTile>(operands, stream) : launch<Fp16, kLargeTile>(operands, stream);
    default: return "the plan does not cover these sizes";
  }
}

}  // namespace low_rank_sparse
