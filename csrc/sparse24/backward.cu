// The gradients of a sparse factor with a bitmap on a GPU, by dy: never its dense gradient [n, k], and of the factor no more
// dense than two tiles in shared memory.
//
//   x [m, k]   values [n, stored]   mask [n, words]   dy [m, n]   bf16 or fp16, rows of x and dy 16-byte aligned, float sums
//
//   dx = dy w        [m, k]       expanding product: w's tiles are made dense on their way to the tensor core
//   dvalues          [n, stored]  selecting product: tiles of dy^T x, of which only what the mask keeps leaves the GPU
//   db = sum of dy   [n]          by whoever has the first columns of dvalues
//
// The factor may lie in p x q blocks, each with columns and an x of its own (a dictionary's coefficients, h, dh). Tiles,
// splits and what becomes of them are those of low_rank/backward.cu. What is new: of each row, the values in one tile are a
// run. Where it begins is arithmetic where each group keeps as many; else one launch counts the bits of all rows first.
//
//   a row of w    . 3 7 . | 5 . . 2 | 1 . 8 . |      mask 0110 1001 1010, lowest bit first
//   its values      3 7     5     2   1   8          place of a column: the bits in front of it
//
// The expanding product's stages: values come by cp.async, two stages ahead, in whole pieces of 16 bytes around the run; one
// step before they are multiplied, each thread writes 16 columns of a row, with zeros, where ldmatrix will find them.
//
//   step i:   multiply i    |   expand i + 1: values -> dense   |   on their way: a of i + 2, values of i + 3
//
// A wrong mask gives wrong numbers, but the same ones each time, and no access outside: runs end where the row's values do,
// and values that no bit names have gradient 0.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator. It HAS NEVER RUN ON A GPU, no speed is claimed.
#include "sparse24/backward.h"

#include "device/bits.h"
#include "device/launch.h"
#include "low_rank/backward.h"
#include "low_rank/backward_steps.h"

namespace sparse24 {

using low_rank::Matrix, low_rank::TileOfC, low_rank::TileSizes, low_rank::TileSums;

template <class T, int kTileSize>
struct SelectConfig : TileSizes<T, true, kTileSize> {
  using Sizes = TileSizes<T, true, kTileSize>;
  static constexpr int kStages = low_rank::kBackwardStages;
  static constexpr int kWords = kTileSize / kWordBits;  // of a row's mask
  struct Stage {
    typename Sizes::Operand a, b;
  };
  struct Shared {
    union {
      Stage stages[kStages];
      float runs[kTileSize * run_stride(kTileSize)];
    };
    uint2 words[kTileSize][kWords];  // of the mask; and how many entries of the row's run are in front of the word
    Run row_runs[kTileSize];
  };
  static_assert(kTileSize <= Sizes::kThreads, "a thread has a row's mask");
};

template <class T, int kTileSize>
struct ExpandConfig : TileSizes<T, false, kTileSize> {
  using Sizes = TileSizes<T, false, kTileSize>;
  static constexpr int kStages = kExpandStages;
  static constexpr int kRowThreads = row_threads(kTileSize), kRunPieces = run_pieces(kTileSize);
  struct Values {
    uint4 pieces[Sizes::kDepth * kRunPieces];
  };
  struct Stages {
    typename Sizes::Operand a[kStages];
    Values values[kStages];
    typename Sizes::Operand b[kDenseStages];
  };
  union Shared {
    Stages stages;
    uint16_t c[kTileSize * low_rank::c_stride(kTileSize)];
  };
  static_assert(kRowThreads * Sizes::kDepth == Sizes::kThreads, "a thread has one row of a stage");
  static_assert(kRunPieces == 2 * kRowThreads + 1, "of which it copies two pieces, and the first thread the last one, too");
};

// Both products' operands; a place of the grid is a tile of one block, and a split.
struct SparseProduct {
  BackwardOperands o;
  int row_tiles, column_tiles, splits;
  int q;                // blocks beside each other: 1 where only db is wanted
  uint16_t* rounded;    // dx or dvalues; or null: into partials
  float* partials;      // [splits, each like dx or dvalues]; or null: no dvalues are wanted
  uint16_t* a_sum;      // of the selecting product, [n]: dy summed over m; or null
  float* a_partials;    // [splits, n] or null
};

struct BlockPlace {
  low_rank::Place tile;  // its split is that of the contraction
  int block_row, block_column, rows;  // of the factor; rows of this block
};

LOWFAT_DEVICE BlockPlace place_of(const SparseProduct& p, int index) {
  const int tiles = p.row_tiles * p.column_tiles, blocks = p.o.sizes.p * p.q;
  const int block = index / tiles % blocks;
  BlockPlace place{low_rank::place_of(p.row_tiles, p.column_tiles, index % tiles), block / p.q, block % p.q, 0};
  place.tile.split = index / tiles / blocks;
  place.rows = p.o.sizes.rows_of(place.block_row);
  return place;
}

// Where things of a block are.
LOWFAT_DEVICE int64_t first_row_of(const SparseSizes& s, const BlockPlace& at) { return int64_t{at.block_row} * s.rows(); }
LOWFAT_DEVICE int64_t offset_in_x(const SparseSizes& s, const BlockPlace& at) {
  return (int64_t{at.block_row} * s.m * s.q + at.block_column) * s.columns;
}

// The run of a row of the factor, counted from its first, in a tile of a block's columns.
LOWFAT_DEVICE Run run_of(const BackwardOperands& o, int tile, int column_tile, int block_column, int64_t row) {
  const SparseSizes& s = o.sizes;
  if (!o.starts) return even_run(s, tile, column_tile);
  const int tiles = parts_of(s.columns, tile);
  const int32_t* starts = o.starts + ((row * s.q + block_column) * tiles + column_tile);
  return counted_run(s.stored, device::load(starts), column_tile + 1 < tiles ? device::load(starts + 1) : s.stored);
}

// --- where runs begin ---

struct CountConfig {
  static constexpr int kThreads = 256;
};

struct CountParams {
  const uint32_t* mask;  // [rows, words]
  int32_t* starts;       // [rows, tiles]
  int64_t rows;
  int words, tile_words;  // of a row, of a tile
};

// A warp has a row, and a word of 32 neighbours each of its lanes.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads) backward_count(const __grid_constant__ CountParams p) {
  constexpr int kWarps = Config::kThreads / device::kWarpThreads;
  const int lane = device::lane_index(), tiles = parts_of(p.words, p.tile_words);
  for (int64_t row = int64_t{blockIdx.x} * kWarps + device::warp_index(); row < p.rows; row += int64_t{gridDim.x} * kWarps) {
    int before = 0;
    for (int first = 0; first < p.words; first += device::kWarpThreads) {
      const int word = first + lane;
      int sum = word < p.words ? device::popcount(device::load(p.mask + (row * p.words + word))) : 0;
      const int below = device::lanes_before<device::kWarpThreads>(sum);
      if (word < p.words && word % p.tile_words == 0) {
        device::store(p.starts + (row * tiles + word / p.tile_words), before + below);
      }
      before += sum;
    }
  }
}

// --- the selecting product ---

template <class Config>
struct Selection {
  const SparseProduct& p;
  const BlockPlace& at;
  typename Config::Shared& smem;

  LOWFAT_DEVICE int64_t factor_row(int row) const {
    return first_row_of(p.o.sizes, at) + at.tile.row_tile * Config::kTile + row;
  }
  LOWFAT_DEVICE bool has_row(int row) const { return at.tile.row_tile * Config::kTile + row < at.rows; }

  // Before the product, so that nobody waits for it.
  LOWFAT_DEVICE void load_mask() const {
    const int row = threadIdx.x;
    if (row >= Config::kTile || !has_row(row)) return;
    const SparseSizes& s = p.o.sizes;
    const int first = at.tile.column_tile * Config::kWords;
    const uint32_t* gmem = p.o.mask + ((factor_row(row) * s.q + at.block_column) * s.words() + first);
    int before = 0;
#pragma unroll
    for (int i = 0; i < Config::kWords; ++i) {
      const uint32_t word = first + i < s.words() ? device::load(gmem + i) : 0;
      smem.words[row][i] = make_uint2(word, before);
      before += device::popcount(word);
    }
    smem.row_runs[row] = run_of(p.o, Config::kTile, at.tile.column_tile, at.block_column, factor_row(row));
  }

  // The kept ones of a row become neighbours, where the stages were.
  LOWFAT_DEVICE void select(const TileSums<typename Config::Sizes>& sums) const {
    __syncthreads();
    sums.each_pair([&](int row, int column, float left, float right) {
      if (!has_row(row)) return;
      const uint2 word = smem.words[row][column / kWordBits];
      const uint32_t here = word.x >> column % kWordBits, in_front = word.x & ((1u << column % kWordBits) - 1);
      float* to = smem.runs + (row * run_stride(Config::kTile) + word.y + device::popcount(in_front));
      if (here & 1) *to++ = left;
      if (here & 2) *to = right;
    });
    __syncthreads();
  }

  // A warp has a row at a time.
  LOWFAT_DEVICE void store() const {
    using T = typename Config::Element;
    const SparseSizes& s = p.o.sizes;
    constexpr int kWarps = Config::kThreads / device::kWarpThreads;
    for (int row = device::warp_index(); row < Config::kTile && has_row(row); row += kWarps) {
      const Run run = smem.row_runs[row];
      const uint2 last = smem.words[row][Config::kWords - 1];
      const int selected = last.y + device::popcount(last.x);
      const int64_t first = (factor_row(row) * s.q + at.block_column) * s.stored + run.first;
      for (int i = device::lane_index(); i < run.count; i += device::kWarpThreads) {
        const float value = i < selected ? smem.runs[row * run_stride(Config::kTile) + i] : 0;
        if (p.rounded) {
          device::store(p.rounded + (first + i), device::narrow<T>(value));
        } else {
          device::store(p.partials + (at.tile.split * s.values() + first + i), value);
        }
      }
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) backward_select(
    const __grid_constant__ SparseProduct p) {
  using Sizes = typename Config::Sizes;
  auto& smem = *reinterpret_cast<typename Config::Shared*>(device::shared_memory());
  const SparseSizes& s = p.o.sizes;
  const BlockPlace at = place_of(p, blockIdx.x);
  const int first_row = at.tile.row_tile * Config::kTile, first_column = at.tile.column_tile * Config::kTile;
  if (first_row >= at.rows) return;  // of a last block that has less
  const bool selects = p.rounded || p.partials;
  const bool sums_a = (p.a_sum || p.a_partials) && at.block_column == 0 && at.tile.column_tile == 0;
  const Selection<Config> selection{p, at, smem};
  if (selects) selection.load_mask();

  const int64_t row_of_factor = first_row_of(s, at);
  const Matrix dy{p.o.dy + row_of_factor, s.m, at.rows, s.n};
  const Matrix x{selects ? p.o.x + offset_in_x(s, at) : p.o.dy, s.m, selects ? s.columns : 0, int64_t{s.q} * s.columns};
  const low_rank::Range steps = low_rank::steps_of_split(Config::kTile, s.m, p.splits, at.tile.split);
  const int from = steps.first * Config::kDepth;
  TileSums<Sizes> sums;
  sums.multiply_steps(smem.stages, low_rank::copies_of_a<Sizes>(dy, first_row, from),
                      low_rank::CopiesOfB<Sizes>(x, from, first_column), steps.last - steps.first, sums_a);
  if (selects) {
    selection.select(sums);
    selection.store();
  }
  if (sums_a) {
    uint16_t* rounded = p.a_sum ? p.a_sum + row_of_factor : nullptr;
    float* floats = p.a_partials ? p.a_partials + (int64_t{at.tile.split} * s.n + row_of_factor) : nullptr;
    sums.store_a_sums(rounded, floats, 0, first_row, at.rows);
  }
}

// --- the expanding product ---

// A thread's part in bringing a tile of the factor: 16 columns of one row of every stage, and what it copies of that row.
template <class Config>
struct Expansion {
  const SparseProduct& p;
  const BlockPlace& at;
  const int stage_row, part;  // of the row: which 16 columns
  int row;                    // of the block: the one whose run comes next
  int mask_row;               // the one whose mask comes next
  Run run{};                  // of `row`
  uint32_t asked[3] = {};     // of the last stages: where the run begins in its first piece, and 8 times its length
  uint32_t bits = 0;          // of the stage that is expanded next

  LOWFAT_DEVICE Expansion(const SparseProduct& product, const BlockPlace& place, int first_row)
      : p(product),
        at(place),
        stage_row(threadIdx.x / Config::kRowThreads),
        part(threadIdx.x % Config::kRowThreads),
        row(first_row + stage_row),
        mask_row(row) {
    find_run();
    find_bits();
  }

  LOWFAT_DEVICE int64_t block_of_row(int of_block) const {
    return (first_row_of(p.o.sizes, at) + of_block) * p.o.sizes.q + at.block_column;
  }

  // One step before it is used.
  LOWFAT_DEVICE void find_run() {
    run = Run{0, 0};
    if (row >= at.rows) return;
    run = run_of(p.o, Config::kTile, at.tile.column_tile, at.block_column, first_row_of(p.o.sizes, at) + row);
    run.count = smaller(run.count, Config::kTile);
  }

  // The pieces that the run touches: the whole of them is inside of the values, whose number is a multiple of 8.
  LOWFAT_DEVICE void ask_for_values(uint4* smem, bool has_stage) {
    asked[0] = asked[1], asked[1] = asked[2];
    if (!has_stage) return;
    const int64_t first = block_of_row(row) * p.o.sizes.stored + run.first;
    const int begin = static_cast<int>(first % 8), pieces = run.count > 0 ? parts_of(begin + run.count, 8) : 0;
    const uint16_t* from = p.o.values + (first - begin);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int piece = part + i * Config::kRowThreads;
      if (piece < pieces) device::copy16_async(smem + (stage_row * Config::kRunPieces + piece), from + piece * 8);
    }
    asked[2] = begin | run.count << 3;
    row += Config::kDepth;
    find_run();
  }

  // One step before they are used, too.
  LOWFAT_DEVICE void find_bits() {
    const SparseSizes& s = p.o.sizes;
    const int word = at.tile.column_tile * (Config::kTile / kWordBits) + part * kThreadColumns / kWordBits;
    bits = 0;
    if (mask_row < at.rows && word < s.words()) {
      bits = device::load(p.o.mask + (block_of_row(mask_row) * s.words() + word)) >> part * kThreadColumns % kWordBits;
      bits &= (1u << kThreadColumns) - 1;
    }
    mask_row += Config::kDepth;
  }

  // Of the oldest of the stages asked for. The threads of a row are neighbours in a warp.
  LOWFAT_DEVICE void expand(uint4* smem_dense, const uint4* smem_values) const {
    int sum = device::popcount(bits);
    const int in_front = device::lanes_before<Config::kRowThreads>(sum);
    const int begin = asked[0] & 7, end = begin + (asked[0] >> 3);
    const uint16_t* values = reinterpret_cast<const uint16_t*>(smem_values + stage_row * Config::kRunPieces);
    const auto element = [&](int column) -> uint32_t {
      const int place = begin + in_front + device::popcount(bits & ((1u << column) - 1));
      return bits >> column & 1 && place < end ? values[place] : 0;
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = element(half * 8 + 2 * i) | element(half * 8 + 2 * i + 1) << 16;
      device::store16_shared(smem_dense + low_rank::tile_piece(Config::kPiecesOfB, stage_row, part * 2 + half),
                             make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
  }
};

// Through all steps of a split. What is waited for was asked for two steps before: a of this step, values of the next one.
// The barrier shows everybody's copies, and what was expanded in the step before; and that nobody still reads where this
// step writes.
template <class Config, class Sizes>
LOWFAT_DEVICE void multiply_expanded(TileSums<Sizes>& sums, typename Config::Stages& smem, low_rank::CopiesOfA<Sizes> a,
                                     Expansion<Config> w, int steps) {
  const auto ask_for_values = [&](int step) {
    w.ask_for_values(smem.values[step % Config::kStages].pieces, step < steps);
  };
  const auto copy = [&](int step) {
    if (step < steps) a.copy_next(smem.a[step % Config::kStages].pieces);
    ask_for_values(step + 1);
    device::commit_copies();  // also of nothing: groups are counted
  };
  const auto expand = [&](int step) {
    if (step >= steps) return;
    w.expand(smem.b[step % kDenseStages].pieces, smem.values[step % Config::kStages].pieces);
    w.find_bits();
  };
  ask_for_values(0);
  for (int step = 0; step < Config::kStages - 1; ++step) copy(step);
  device::wait_copies<Config::kStages - 2>();
  __syncthreads();
  expand(0);
  for (int step = 0; step < steps; ++step) {
    device::wait_copies<Config::kStages - 2>();
    __syncthreads();
    copy(step + Config::kStages - 1);
    expand(step + 1);
    sums.multiply(smem.a[step % Config::kStages].pieces, smem.b[step % kDenseStages].pieces, false);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) backward_expand(
    const __grid_constant__ SparseProduct p) {
  using Sizes = typename Config::Sizes;
  auto& smem = *reinterpret_cast<typename Config::Shared*>(device::shared_memory());
  const SparseSizes& s = p.o.sizes;
  const BlockPlace at = place_of(p, blockIdx.x);
  const TileOfC tile{at.tile.row_tile * Config::kTile, at.tile.column_tile * Config::kTile, s.m, s.columns,
                     int64_t{s.q} * s.columns};
  const Matrix dy{p.o.dy + first_row_of(s, at), s.m, at.rows, s.n};
  const low_rank::Range steps = low_rank::steps_of_split(Config::kTile, at.rows, p.splits, at.tile.split);
  const int from = steps.first * Config::kDepth;
  TileSums<Sizes> sums;
  multiply_expanded(sums, smem.stages, low_rank::copies_of_a<Sizes>(dy, tile.first_row, from),
                    Expansion<Config>(p, at, from), steps.last - steps.first);
  if (p.rounded) {
    sums.store_rounded(p.rounded + offset_in_x(s, at), tile, smem.c);
  } else {
    sums.store_floats(p.partials + (at.tile.split * s.outputs() + offset_in_x(s, at)), tile);
  }
}

// --- launch ---

template <class Config>
const char* launch_product(void (*kernel)(SparseProduct), const SparseProduct& p, void* stream) {
  static_assert(sizeof(typename Config::Shared) <= kBackwardSmemBytes, "two blocks share a multiprocessor");
  device::Launch shape;
  shape.grid = dim3(p.row_tiles * p.column_tiles * p.o.sizes.p * p.q * p.splits);
  shape.threads = Config::kThreads;
  shape.smem_bytes = sizeof(typename Config::Shared);
  shape.stream = stream;
  return device::launch(kernel, shape, p);
}

// The launches of one call, with a dtype and a size of tile.
template <class T, int kTile>
struct Backward {
  const BackwardPlan& plan;
  const BackwardOperands& o;
  Dtype dtype;
  int sm_count;
  void* stream;

  const char* count() const {
    const SparseSizes& s = o.sizes;
    const CountParams p{o.mask, o.starts, int64_t{s.n} * s.q, s.words(), kTile / kWordBits};
    const int64_t blocks = device::ceil_div(p.rows, CountConfig::kThreads / device::kWarpThreads);
    device::Launch shape;
    shape.grid = dim3(static_cast<unsigned>(blocks < 8 * sm_count ? blocks : 8 * sm_count));
    shape.threads = CountConfig::kThreads;
    shape.stream = stream;
    return device::launch(backward_count<CountConfig>, shape, p);
  }

  SparseProduct product_of(int rows, int columns, int q, int splits) const {
    SparseProduct p{};
    p.o = o;
    if (plan.starts == 0) p.o.starts = nullptr;
    p.row_tiles = parts_of(rows, kTile), p.column_tiles = larger(1, parts_of(columns, kTile));
    p.q = q, p.splits = splits;
    return p;
  }

  const char* dx() const {
    using Config = ExpandConfig<T, kTile>;
    SparseProduct p = product_of(o.sizes.m, o.sizes.columns, o.sizes.q, plan.dx_splits);
    if (plan.dx_splits == 1) {
      p.rounded = o.dx;
      return launch_product<Config>(backward_expand<Config>, p, stream);
    }
    p.partials = o.partials;
    if (const char* error = launch_product<Config>(backward_expand<Config>, p, stream)) return error;
    const low_rank::BackwardSums sums{{{o.partials, o.dx, o.sizes.outputs(), plan.dx_splits, false}}, 1};
    return low_rank::launch_sums(sums, dtype, sm_count, stream);
  }

  // dvalues with db. db alone is a product of no columns, whose second operand is never read: the tensor cores multiply
  // zeros while dy passes.
  const char* values() const {
    using Config = SelectConfig<T, kTile>;
    const bool needs_values = o.needs & kNeedsDvalues;
    SparseProduct p = product_of(o.sizes.rows(), needs_values ? o.sizes.columns : 0, needs_values ? o.sizes.q : 1,
                                 plan.values_splits);
    low_rank::BackwardSums sums{};
    float* partials = o.partials;
    const auto place = [&](uint16_t* to, int64_t count, uint16_t*& rounded, float*& floats) {
      if (plan.values_splits == 1) {
        rounded = to;
        return;
      }
      floats = partials;
      partials += plan.values_splits * count;
      sums.list[sums.count++] = {floats, to, count, plan.values_splits, false};
    };
    if (needs_values) place(o.dvalues, o.sizes.values(), p.rounded, p.partials);
    if (o.needs & kNeedsDb) place(o.db, o.sizes.n, p.a_sum, p.a_partials);
    if (const char* error = launch_product<Config>(backward_select<Config>, p, stream)) return error;
    return sums.count > 0 ? low_rank::launch_sums(sums, dtype, sm_count, stream) : nullptr;
  }

  const char* all() const {
    const char* error = nullptr;
    if (plan.starts > 0 && o.needs & (kNeedsDx | kNeedsDvalues)) error = count();
    if (!error && o.needs & kNeedsDx) error = dx();
    if (!error && o.needs & (kNeedsDvalues | kNeedsDb)) error = values();
    return error;
  }
};

const char* launch_backward(const BackwardPlan& plan, const BackwardOperands& operands, Dtype dtype, int sm_count,
                            void* stream) {
  using device::Bf16, device::Fp16;
  const bool is_bf16 = dtype == Dtype::bfloat16;
  switch (plan.tile) {
    case kSmallTile:
      return is_bf16 ? Backward<Bf16, kSmallTile>{plan, operands, dtype, sm_count, stream}.all()
                     : Backward<Fp16, kSmallTile>{plan, operands, dtype, sm_count, stream}.all();
    case kLargeTile:
      return is_bf16 ? Backward<Bf16, kLargeTile>{plan, operands, dtype, sm_count, stream}.all()
                     : Backward<Fp16, kLargeTile>{plan, operands, dtype, sm_count, stream}.all();
    default: return "the plan does not cover these sizes";
  }
}

}  // namespace sparse24
