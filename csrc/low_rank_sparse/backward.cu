// The gradients of low_rank_sparse's entries on a GPU, by dy: of dy^T x [n, k] what S has places for, and the bias's.
//
//   dy [m, n]   x [m, k]   starts [n + 1]   columns [nnz]   dvalues [nnz]   db = sum of dy [n]
//   bf16 or fp16, rows of dy and x 16-byte aligned, float sums
//
// The dense gradient is made tile by tile, and none of it leaves the GPU but what is wanted. A block has a square tile and a
// split of m, as in low_rank's backward kernels (low_rank/backward.cu). Each row of a tile has a run of neighbouring
// entries, which is looked for before the product begins. When the tile's sums lie where the stages were, four lanes have a
// row, and take from it what its run asks for, in order.
//
//   row  [ . . o . . o . o ]  tile of dy^T x        dvalues  [ ... | o o o | ... ]   its run, among those of the row
//
// What splits have summed is added up in their order by another launch (low_rank/backward.h). Whoever has the first columns
// sums dy for db. The same call gives the same bits.
//
// Indices are not trusted. Rows share the entries, and tiles those of a row, by searches that give each entry to one of them
// whatever starts and columns hold (support_layout.h): every gradient is written once, with 0 where no place belongs to it.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator. It HAS NEVER RUN ON A GPU, no speed is claimed.
#include "low_rank_sparse/backward.h"

#include "device/launch.h"
#include "low_rank/backward.h"
#include "low_rank/backward_steps.h"
#include "low_rank_sparse/support.h"

namespace low_rank_sparse {

using low_rank::Matrix, low_rank::TileSizes, low_rank::TileSums;

template <class T, int kTileSize>
struct SelectConfig : TileSizes<T, true, kTileSize> {
  using Sizes = TileSizes<T, true, kTileSize>;
  static constexpr int kStages = low_rank::kBackwardStages;
  static constexpr int kRowLanes = 4;  // that share the run of a row
  struct Stage {
    typename Sizes::Operand a, b;
  };
  struct Shared {
    union {
      Stage stages[kStages];
      float tile[kTileSize * tile_stride(kTileSize)];
    };
    Range runs[kTileSize];
  };
  static_assert(2 * kTileSize <= Sizes::kThreads, "a thread looks for one end of a row's run");
  static_assert(sizeof(Shared) <= kTileSmemBytes, "two blocks share a multiprocessor");
};

// A place of the grid is a tile and a split.
struct SelectProduct {
  BackwardOperands o;
  int row_tiles, column_tiles, splits;
  uint16_t* rounded;  // dvalues; or null: into partials
  float* partials;    // [splits, padded_entries]; or null: no dvalues are wanted
  uint16_t* a_sum;    // [n]: dy summed over m; or null
  float* a_partials;  // [splits, n] or null
};

template <class Config>
struct Selection {
  const SelectProduct& p;
  const low_rank::Place& at;
  typename Config::Shared& smem;

  LOWFAT_DEVICE int row_of_s(int row) const { return at.row_tile * Config::kTile + row; }
  LOWFAT_DEVICE int first_column() const { return at.column_tile * Config::kTile; }

  // Of each row: the first threads find where its run begins, as many others where it ends. The last tile of a row has all
  // that is left of it.
  LOWFAT_DEVICE void find_runs() const {
    const Support& s = p.o.s;
    const int row = threadIdx.x % Config::kTile, end = threadIdx.x / Config::kTile, tile = at.column_tile + end;
    if (end > 1) return;
    int found = 0;
    if (row_of_s(row) < s.n) {
      const Range all = own_entries(s, row_of_s(row));
      found = static_cast<int>(first_from(s.columns, s.is_wide, all.first, all.last, tile * Config::kTile));
      if (tile == p.column_tiles) found = all.last;
    }
    (end == 0 ? smem.runs[row].first : smem.runs[row].last) = found;
  }

  LOWFAT_DEVICE void store_one(int entry, float value) const {
    if (p.rounded) {
      device::store(p.rounded + entry, device::narrow<typename Config::Element>(value));
    } else {
      device::store(p.partials + (at.split * padded_entries(p.o.s.entries) + entry), value);
    }
  }

  LOWFAT_DEVICE void store(const TileSums<typename Config::Sizes>& sums) const {
    const Support& s = p.o.s;
    __syncthreads();
    sums.each_pair([&](int row, int column, float left, float right) {
      *reinterpret_cast<float2*>(smem.tile + (row * tile_stride(Config::kTile) + column)) = make_float2(left, right);
    });
    __syncthreads();
    const uint32_t columns = smaller(Config::kTile, s.k - first_column());
    for (int row = threadIdx.x / Config::kRowLanes; row < Config::kTile; row += Config::kThreads / Config::kRowLanes) {
      const Range run = smem.runs[row];
      for (int entry = run.first + threadIdx.x % Config::kRowLanes; entry < run.last; entry += Config::kRowLanes) {
        const uint32_t column = column_of(s, entry) - first_column();
        store_one(entry, column < columns ? smem.tile[row * tile_stride(Config::kTile) + column] : 0);
      }
    }
  }

  // What no row has: nothing, of starts that end with the entries.
  LOWFAT_DEVICE void store_rest() const {
    const Range rest = own_entries(p.o.s, p.o.s.n);
    for (int entry = rest.first + threadIdx.x; entry < rest.last; entry += Config::kThreads) store_one(entry, 0);
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) backward_select(
    const __grid_constant__ SelectProduct p) {
  using Sizes = typename Config::Sizes;
  auto& smem = *reinterpret_cast<typename Config::Shared*>(device::shared_memory());
  const int n = p.o.s.n, k = p.o.s.k;
  const low_rank::Place at = low_rank::place_of(p.row_tiles, p.column_tiles, blockIdx.x);
  const int first_row = at.row_tile * Config::kTile, first_column = at.column_tile * Config::kTile;
  const bool selects = p.rounded || p.partials;
  const bool sums_a = (p.a_sum || p.a_partials) && at.column_tile == 0;
  const Selection<Config> selection{p, at, smem};
  if (selects) selection.find_runs();

  const Matrix dy{p.o.dy, p.o.m, n, n}, x{selects ? p.o.x : p.o.dy, p.o.m, selects ? k : 0, k};
  const low_rank::Range steps = low_rank::steps_of_split(Config::kTile, p.o.m, p.splits, at.split);
  const int from = steps.first * Config::kDepth;
  TileSums<Sizes> sums;
  sums.multiply_steps(smem.stages, low_rank::copies_of_a<Sizes>(dy, first_row, from),
                      low_rank::CopiesOfB<Sizes>(x, from, first_column), steps.last - steps.first, sums_a);
  if (selects) {
    selection.store(sums);
    if (at.row_tile == 0 && at.column_tile == 0) selection.store_rest();
  }
  if (sums_a) sums.store_a_sums(p.a_sum, p.a_partials, at.split, first_row, n);
}

// --- launch ---

// db alone is a product of no columns, whose second operand is never read: the tensor cores multiply zeros while dy passes.
template <class T, int kTile>
const char* launch(const BackwardPlan& plan, const BackwardOperands& o, Dtype dtype, int sm_count, void* stream) {
  using Config = SelectConfig<T, kTile>;
  const bool needs_values = o.needs & kSelectsValues;
  SelectProduct p{};
  p.o = o;
  p.row_tiles = parts_of(o.s.n, kTile), p.column_tiles = needs_values ? parts_of(o.s.k, kTile) : 1;
  p.splits = plan.splits;
  low_rank::BackwardSums sums{};
  float* partials = o.partials;
  const auto place = [&](uint16_t* to, int64_t count, uint16_t*& rounded, float*& floats) {
    if (plan.splits == 1) {
      rounded = to;
      return;
    }
    floats = partials;
    partials += plan.splits * count;
    sums.list[sums.count++] = {floats, to, count, plan.splits, false};
  };
  if (needs_values) place(o.dvalues, padded_entries(o.s.entries), p.rounded, p.partials);
  if (o.needs & kSelectsDb) place(o.db, o.s.n, p.a_sum, p.a_partials);
  device::Launch shape;
  shape.grid = dim3(p.row_tiles * p.column_tiles * p.splits);
  shape.threads = Config::kThreads;
  shape.smem_bytes = sizeof(typename Config::Shared);
  shape.stream = stream;
  if (const char* error = device::launch(backward_select<Config>, shape, p)) return error;
  return sums.count > 0 ? low_rank::launch_sums(sums, dtype, sm_count, stream) : nullptr;
}

const char* launch_backward(const BackwardPlan& plan, const BackwardOperands& operands, Dtype dtype, int sm_count,
                            void* stream) {
  using device::Bf16, device::Fp16;
  const bool is_bf16 = dtype == Dtype::bfloat16;
  switch (plan.tile) {
    case kSmallTile:
      return is_bf16 ? launch<Bf16, kSmallTile>(plan, operands, dtype, sm_count, stream)
                     : launch<Fp16, kSmallTile>(plan, operands, dtype, sm_count, stream);
    case kLargeTile:
      return is_bf16 ? launch<Bf16, kLargeTile>(plan, operands, dtype, sm_count, stream)
                     : launch<Fp16, kLargeTile>(plan, operands, dtype, sm_count, stream);
    default: return "the plan does not cover these sizes";
  }
}

}  // namespace low_rank_sparse
