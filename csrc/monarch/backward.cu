// The gradients of monarch on a GPU, by dy: for each block two products down the chain and two across the tokens, never the
// weight's [n, k], and nothing permuted but on the way through shared memory.
//
//   x [m, k]   v [b_in, r b_out, p]   h [b_out, m, b_in r]   u [b_out, s, b_in r]   dy [m, n]   bf16, fp16; sums in float
//
//   dz = dy[o] u[o]     [b_in, m, b_out r]  rounded once   activations: a lies along the contraction   a   [rows, depth]
//   dx = dz[i] v[i]     [m, k]                                                                          b   [depth, columns]
//   du = dy[o]^T h[o]   like u   db = sum of dy            weights: both lie across it, the tokens     a   [depth, rows]
//   dv = dz[i]^T x[i]   like v                                                                          b   [depth, columns]
//
// One kernel does all four. A CTA has a tile of 256 rows times 64 columns: rows of one block, or of several neighbours (a
// group), 32 to a warp. cp.async brings stage after stage of the contraction into shared memory, two ahead of the one in use;
// ldmatrix turns what lies the wrong way round on its way to the tensor core. Where columns of dy's blocks lie between each
// other (o + b_out c), each piece of 16 bytes has elements of every block of the group, and a warp gathers those of its own
// from shared memory, one by one: dy is read from global memory in whole pieces of which all is used.
//
//     dy, 4 blocks, a group of 4           8 warps: blocks x parts of 32 rows       a stage of a: rows of all blocks
//     token  0 1 2 3 0 1 2 3 0 1 2 3           [0 0] [1 1] [2 2] [3 3]                        of b: [0] [1] [2] [3]
//
// Columns of dz are ordered by output block, so that a group's results are runs, too.
//
// What splits of the tokens have summed lies in global memory, in floats, until the last launch adds it up in their order
// and rounds: the same call gives the same bits. Whoever has the first columns of du sums dy for db.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator. It HAS NEVER RUN ON A GPU, no speed is claimed.
#include "monarch/backward.h"

#include "device/async_copy.h"
#include "device/convert.h"
#include "device/launch.h"
#include "device/load.h"
#include "device/reduce.h"
#include "device/splits.h"
#include "device/warp_product.h"
#include "monarch/monarch_cuda.h"

namespace monarch {

template <class T, bool kAcross, bool kGathered, int kGroupSize>
struct BackwardConfig {
  using Element = T;
  static constexpr bool kIsAcross = kAcross;  // weights: a lies [depth, rows]
  static constexpr bool kGathers = kGathered;
  static constexpr int kGroup = kGroupSize;  // blocks
  static constexpr int kDepth = product_depth(kGroup), kRows = rows_of_group(kGroup);
  static constexpr int kThreads = kBackwardThreads;
  static constexpr int kStages = kBackwardStages;
  static constexpr int kStageBytes = product_stage_bytes(kGroup);
  static constexpr int kParts = kRows / kPartRows;  // warps to a block
  static constexpr int kRowFragments = kPartRows / 16, kColumnFragments = kTileColumns / 8;
  static constexpr int kPiecesOfA = pieces_of_a(kGroup, kIsAcross);
  static constexpr int kTogetherOfA = kThreads / kPiecesOfA, kTogetherOfB = kThreads / kPiecesOfB;  // rows copied at once
  static constexpr int kBlocksOfB = kTogetherOfB / kDepth;  // whose rows these are
  static_assert(kDepth % 16 == 0 && kRows % kPartRows == 0, "whole products, whole warps");
  static_assert(kGroup % kBlocksOfB == 0 && kTogetherOfB % kDepth == 0, "every thread copies as much of b");
  static_assert((kIsAcross ? kDepth : kRows) % kTogetherOfA == 0, "every thread copies as much of a");
};

struct BackwardProduct {
  Product product;
  ProductPlan plan;
  const uint16_t* a;
  const uint16_t* b;
  uint16_t* c;        // or null: into partials
  float* partials;    // [splits, count], each like c; or null
  int64_t count;      // elements of c
  uint16_t* a_sum;    // [n]: a summed over the depth; or null
  float* a_partials;  // [splits, n] or null
  Stores stores;
};

template <class Config>
struct BackwardTile {
  using T = typename Config::Element;
  const BackwardProduct& p;
  const Product& product;
  const ProductPlace place;
  uint8_t* const smem;
  const bool sums_a;
  float sums[Config::kRowFragments][Config::kColumnFragments][4];
  float a_sums[Config::kRowFragments][2];  // a lane's pairs of rows lane / 4 and 8 below

  LOWFAT_DEVICE explicit BackwardTile(const BackwardProduct& params)
      : p(params),
        product(params.product),
        place(place_of(params.plan, blockIdx.x)),
        smem(device::shared_memory()),
        sums_a(Config::kIsAcross && (params.a_sum || params.a_partials) && place.column == 0) {
    device::clear(sums);
#pragma unroll
    for (int i = 0; i < Config::kRowFragments; ++i) a_sums[i][0] = a_sums[i][1] = 0;
  }

  // Of this warp: its block of the group, its first row of that block's in the tile.
  LOWFAT_DEVICE int block_of_warp() const { return device::warp_index() / Config::kParts; }
  LOWFAT_DEVICE int row_of_warp() const { return device::warp_index() % Config::kParts * kPartRows; }
  LOWFAT_DEVICE uint8_t* stage(int step) const { return smem + step % Config::kStages * Config::kStageBytes; }

  // --- copies: a thread has the same piece of some rows of every stage ---

  struct Copies {
    const BackwardTile& t;
    int depth;             // where the next stage begins
    int a_block, a_column;  // of this thread's piece of a: the first of its elements
    int b_block, b_row;     // of its pieces of b: the first block's, in a stage
    int asked = 0;

    LOWFAT_DEVICE Copies(const BackwardTile& tile, int first_depth) : t(tile), depth(first_depth) {
      constexpr int kPieces = Config::kPiecesOfA / Config::kGroup;  // of a block, where blocks follow each other
      const int piece = threadIdx.x % Config::kPiecesOfA;
      a_block = t.place.block + (Config::kGathers ? 0 : piece / kPieces);
      a_column = Config::kGathers ? piece * 8 / Config::kGroup : piece % kPieces * 8;
      if (Config::kIsAcross) a_column += t.place.row;
      const int row = threadIdx.x / kPiecesOfB;
      b_block = t.place.block + row / Config::kDepth;
      b_row = row % Config::kDepth;
    }

    // Zeros stand for what is outside.
    LOWFAT_DEVICE void ask_for_next() {
      copy_a(reinterpret_cast<uint4*>(t.stage(asked)));
      copy_b(reinterpret_cast<uint4*>(t.stage(asked) + bytes_of_a(Config::kGroup)));
      ++asked;
      depth += Config::kDepth;
    }

    LOWFAT_DEVICE void copy_a(uint4* to) const {
      const int row = threadIdx.x / Config::kPiecesOfA, piece = threadIdx.x % Config::kPiecesOfA;
      const int column = a_column + (Config::kIsAcross ? 0 : depth), first = row + (Config::kIsAcross ? depth : t.place.row);
      const int rows = Config::kIsAcross ? t.product.depth : t.product.rows;
      const Matrix& a = t.product.a;
      const bool has_column = a_block < t.product.blocks && a.has(a_block, column);
      const uint16_t* from = t.p.a + (first * a.row_step + a.in_row(a_block, column));
#pragma unroll
      for (int down = 0; down < (Config::kIsAcross ? Config::kDepth : Config::kRows); down += Config::kTogetherOfA) {
        device::copy16_async(to + piece_at(Config::kPiecesOfA, row + down, piece), from + down * a.row_step,
                             has_column && first + down < rows);
      }
    }

    LOWFAT_DEVICE void copy_b(uint4* to) const {
      const int row = threadIdx.x / kPiecesOfB, piece = threadIdx.x % kPiecesOfB, column = t.place.column + piece * 8;
      const Matrix& b = t.product.b;
      const bool has_row = depth + b_row < t.product.depth;
      const uint16_t* from = t.p.b + (b.in_row(b_block, column) + b.row_at(depth + b_row) * b.row_step);
#pragma unroll
      for (int more = 0; more < Config::kGroup; more += Config::kBlocksOfB) {
        const bool is_inside = has_row && b_block + more < t.product.blocks && b.has(b_block + more, column);
        device::copy16_async(to + piece_at(kPiecesOfB, row + more * Config::kDepth, piece), from + more * b.block_step,
                             is_inside);
      }
    }
  };

  // --- products ---

  // Of a's tile, in which all blocks' elements lie between each other.
  LOWFAT_DEVICE uint32_t element(const uint8_t* smem_a, int token, int column) const {
    const int number = column * Config::kGroup + block_of_warp();
    const int at = piece_at(Config::kPiecesOfA, token, number / 8) * 8 + number % 8;
    return reinterpret_cast<const uint16_t*>(smem_a)[at];
  }

  LOWFAT_DEVICE void load_fragments_a(uint32_t (&a)[Config::kRowFragments][4], const uint8_t* smem_a, int depth) const {
    const int lane = device::lane_index(), block = block_of_warp();
    const uint4* smem = reinterpret_cast<const uint4*>(smem_a);
#pragma unroll
    for (int i = 0; i < Config::kRowFragments; ++i) {
      const int row = row_of_warp() + i * 16;
      if constexpr (Config::kGathers) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const device::Position at = device::mma_a(lane, 2 * e);
          const int along = depth + at.column, across = row + at.row;
          a[i][e] = Config::kIsAcross ? element(smem_a, along, across) | element(smem_a, along + 1, across) << 16
                                      : element(smem_a, across, along) | element(smem_a, across, along + 1) << 16;
        }
      } else if constexpr (Config::kIsAcross) {
        const device::Position at = device::ldmatrix_pair_row(lane);
        const int piece = (block * Config::kRows + row + at.column) / 8;
        device::ldmatrix_transposed<4>(a[i], smem + piece_at(Config::kPiecesOfA, depth + at.row, piece));
      } else {
        const device::Position at = device::ldmatrix_row(lane);
        const int piece = (block * Config::kDepth + depth + at.column) / 8;
        device::ldmatrix<4>(a[i], smem + piece_at(Config::kPiecesOfA, row + at.row, piece));
      }
    }
  }

  // Two column fragments at a time: rows 0..7 and 8..15 of the contraction of one, then of the other.
  LOWFAT_DEVICE void load_fragments_b(uint32_t (&b)[Config::kColumnFragments / 2][4], const uint8_t* smem_b,
                                      int depth) const {
    const device::Position at = device::ldmatrix_row(device::lane_index());
    const int row = block_of_warp() * Config::kDepth + depth + at.row;
#pragma unroll
    for (int j = 0; j < Config::kColumnFragments / 2; ++j) {
      const int piece = (j * 16 + at.column) / 8;
      device::ldmatrix_transposed<4>(b[j], reinterpret_cast<const uint4*>(smem_b) + piece_at(kPiecesOfB, row, piece));
    }
  }

  LOWFAT_DEVICE void sum_a(const uint32_t (&a)[Config::kRowFragments][4]) {
#pragma unroll
    for (int i = 0; i < Config::kRowFragments; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 pair = device::unpack2<T>(a[i][e]);
        a_sums[i][e % 2] += pair.x + pair.y;
      }
    }
  }

  LOWFAT_DEVICE void multiply(const uint8_t* smem_a) {
    const uint8_t* smem_b = smem_a + bytes_of_a(Config::kGroup);
#pragma unroll
    for (int depth = 0; depth < Config::kDepth; depth += 16) {
      uint32_t a[Config::kRowFragments][4], b[Config::kColumnFragments / 2][4];
      load_fragments_a(a, smem_a, depth);
      load_fragments_b(b, smem_b, depth);
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

  // Through all stages of the split: wait for one, ask for the one two ahead, multiply. The barrier shows everybody's
  // copies, and that nobody still reads where the next ones go.
  LOWFAT_DEVICE void multiply_split() {
    const Steps steps = steps_of_split(product, p.plan, place.split);
    Copies copies(*this, steps.first * Config::kDepth);
    const auto copy = [&](int step) {
      if (step < steps.last - steps.first) copies.ask_for_next();
      device::commit_copies();  // also of nothing: groups are counted
    };
    for (int step = 0; step < Config::kStages - 1; ++step) copy(step);
    for (int step = 0; step < steps.last - steps.first; ++step) {
      device::wait_copies<Config::kStages - 2>();
      __syncthreads();
      copy(step + Config::kStages - 1);
      multiply(stage(step));
    }
  }

  // --- results ---

  // Where a result of the tile goes; less than 0: nowhere. block: of the group.
  LOWFAT_DEVICE int64_t offset_of(int block, int row, int column) const {
    block += place.block, row += place.row, column += place.column;
    const bool is_inside = block < product.blocks && row < product.rows && column < product.columns;
    return is_inside && product.c.has(block, column) ? product.c.offset(block, row, column) : -1;
  }

  // Of each row of this warp: visit(row of its block in the tile, column of the lane's first pair, pair), where pair(j) are
  // the sums of the pair 8 j columns further on.
  template <class Visit>
  LOWFAT_DEVICE void each_row(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < Config::kRowFragments; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const device::Position at = device::mma_d(device::lane_index(), 2 * half);
        visit(row_of_warp() + i * 16 + at.row, at.column,
              [&](int j) { return make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]); });
      }
    }
  }

  // A row of a weight is one run.
  LOWFAT_DEVICE void store_partials() const {
    float* gmem = p.partials + place.split * p.count;
    each_row([&](int row, int column, const auto& pair) {
      const int64_t offset = offset_of(block_of_warp(), row, column);
      if (offset < 0) return;
#pragma unroll
      for (int j = 0; j < Config::kColumnFragments; ++j) {
        if (place.column + column + j * 8 >= product.columns) return;
        device::store(reinterpret_cast<float2*>(gmem + offset + j * 8), pair(j));
      }
    });
  }

  LOWFAT_DEVICE uint16_t* kept(int block, int row, int column) const {
    return reinterpret_cast<uint16_t*>(smem) + (block * Config::kRows + row) * kStrideOfC + column;
  }

  LOWFAT_DEVICE void store_along() const {
#pragma unroll 1  // like the others: they are many, and not where the time goes
    for (int i = threadIdx.x; i < kTileRows * kPiecesOfB; i += Config::kThreads) {
      const int block = i / kPiecesOfB / Config::kRows, row = i / kPiecesOfB % Config::kRows, column = i % kPiecesOfB * 8;
      const int64_t offset = offset_of(block, row, column);
      if (offset >= 0) device::store16(p.c + offset, device::load16_shared(kept(block, row, column)));
    }
  }

  // Eight results that are a unit, or part of one, of each of several blocks.
  LOWFAT_DEVICE void store_across() const {
    const int unit = product.c.unit, pieces = Config::kGroup * unit / 8;  // of what the group has beside each other
#pragma unroll 1
    for (int i = threadIdx.x; i < Config::kRows * Config::kGroup * kPiecesOfB; i += Config::kThreads) {
      const int row = i / (Config::kGroup * kPiecesOfB), piece = i % (Config::kGroup * kPiecesOfB);
      const int column = piece / pieces * unit, first = piece % pieces * 8;
      const int64_t offset = offset_of(first / unit, row, column);
      if (offset < 0) continue;
      uint32_t pairs[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int left = first + 2 * e, right = left + 1;
        pairs[e] = *kept(left / unit, row, column + left % unit) |
                   uint32_t{*kept(right / unit, row, column + right % unit)} << 16;
      }
      device::store16(p.c + offset, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
  }

  LOWFAT_DEVICE void store_elements() const {
#pragma unroll 1
    for (int i = threadIdx.x; i < kTileRows * kTileColumns; i += Config::kThreads) {
      const int row = i / kTileColumns, column = i % kTileColumns;
      const int64_t offset = offset_of(row / Config::kRows, row % Config::kRows, column);
      if (offset >= 0) device::store(p.c + offset, *kept(row / Config::kRows, row % Config::kRows, column));
    }
  }

  // Through shared memory, where the stages were.
  LOWFAT_DEVICE void store_c() const {
    __syncthreads();
    each_row([&](int row, int column, const auto& pair) {
#pragma unroll
      for (int j = 0; j < Config::kColumnFragments; ++j) {
        const float2 values = pair(j);
        *reinterpret_cast<uint32_t*>(kept(block_of_warp(), row, column + j * 8)) = device::pack2<T>(values.x, values.y);
      }
    });
    __syncthreads();
    if (Config::kIsAcross || p.stores == Stores::along) return store_along();
    if (Config::kGathers && p.stores == Stores::across) return store_across();
    store_elements();
  }

  LOWFAT_DEVICE void store_a_sums() const {
    const int lane = device::lane_index(), block = place.block + block_of_warp();
#pragma unroll
    for (int i = 0; i < Config::kRowFragments; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = device::quad_sum(a_sums[i][half]);
        const int row = place.row + row_of_warp() + i * 16 + device::mma_d(lane, 2 * half).row;
        if (lane % 4 != 0 || block >= product.blocks || !product.a.has(block, row)) continue;
        const int64_t output = product.a.in_row(block, row);
        if (p.a_sum) {
          device::store(p.a_sum + output, device::narrow<T>(sum));
        } else {
          device::store(p.a_partials + (place.split * product.a.width + output), sum);
        }
      }
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, kResidentBlocks) backward_product(
    const __grid_constant__ BackwardProduct p) {
  BackwardTile<Config> tile(p);
  tile.multiply_split();
  if (Config::kIsAcross && p.partials) {
    tile.store_partials();
  } else if (p.c) {
    tile.store_c();
  }
  if (tile.sums_a) tile.store_a_sums();
}

// --- sums over splits ---

// Floats that splits have left, to be added up: sum [count].
struct BackwardSum {
  const float* partials;  // [splits, count]
  uint16_t* sum;          // [count]
  int64_t count;          // a multiple of 8
  int splits;
};

struct BackwardSums {
  BackwardSum list[3];
  int count;
};

template <class T>
struct BackwardSumConfig {
  using Element = T;
  static constexpr int kThreads = 256;
  static constexpr int kSplitsAtOnce = 4;  // loads on their way
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads) backward_sums(const __grid_constant__ BackwardSums p) {
  for (int which = 0; which < p.count; ++which) {
    const BackwardSum& one = p.list[which];
    const int64_t stride = int64_t{4} * gridDim.x * Config::kThreads;
    for (int64_t i = 4 * (int64_t{blockIdx.x} * Config::kThreads + threadIdx.x); i < one.count; i += stride) {
      const float4 sum = device::sum_of_splits<Config::kSplitsAtOnce>(one.partials + i, one.count, one.splits);
      using T = typename Config::Element;
      const uint2 rounded = make_uint2(device::pack2<T>(sum.x, sum.y), device::pack2<T>(sum.z, sum.w));
      device::store(reinterpret_cast<uint2*>(one.sum + i), rounded);
    }
  }
}

// --- launch ---

template <class Config>
const char* launch_product(const BackwardProduct& p, void* stream) {
  device::Launch shape;
  shape.grid = dim3(p.plan.grid);
  shape.threads = Config::kThreads;
  shape.smem_bytes = product_smem_bytes(Config::kGroup);
  shape.stream = stream;
  return device::launch(backward_product<Config>, shape, p);
}

template <class T, bool kIsAcross>
const char* launch_group(const BackwardProduct& p, void* stream) {
  switch (p.plan.gathers ? p.plan.group : -p.plan.group) {
    case 8: return launch_product<BackwardConfig<T, kIsAcross, true, 8>>(p, stream);
    case 4: return launch_product<BackwardConfig<T, kIsAcross, true, 4>>(p, stream);
    case 2: return launch_product<BackwardConfig<T, kIsAcross, true, 2>>(p, stream);
    case -4: return launch_product<BackwardConfig<T, kIsAcross, false, 4>>(p, stream);
    case -1: return launch_product<BackwardConfig<T, kIsAcross, false, 1>>(p, stream);
    default: return "the plan does not cover these sizes";
  }
}

// The launches of one call, with a dtype.
template <class T>
struct Backward {
  const BackwardPlan& plan;
  const BackwardOperands& o;
  Dtype dtype;
  int sm_count;
  void* stream;
  float* partials = o.partials;
  BackwardSums sums{};

  const char* multiply(const BackwardProduct& p) const {
    return p.product.is_across ? launch_group<T, true>(p, stream) : launch_group<T, false>(p, stream);
  }

  static BackwardProduct product_of(const Product& product, const ProductPlan& plan, const uint16_t* a, const uint16_t* b) {
    BackwardProduct p{};
    p.product = product, p.plan = plan;
    p.a = a, p.b = b;
    p.stores = stores_of(product, plan);
    return p;
  }

  // Where a gradient goes, or its splits' parts.
  void place(uint16_t* to, int64_t count, int splits, uint16_t*& whole, float*& parts) {
    if (splits == 1) {
      whole = to;
      return;
    }
    parts = partials;
    partials += splits * count;
    sums.list[sums.count++] = {parts, to, count, splits};
  }

  const char* dz() const {
    BackwardProduct p = product_of(dz_product(o.sizes), plan.dz, o.dy, o.u);
    p.c = o.dz;
    return multiply(p);
  }

  const char* dx() const {
    BackwardProduct p = product_of(dx_product(o.sizes), plan.dx, o.dz, o.v);
    p.c = o.dx;
    return multiply(p);
  }

  const char* dv() {
    BackwardProduct p = product_of(dv_product(o.sizes), plan.dv, o.dz, o.x);
    p.count = int64_t{o.sizes.b_in} * q_of(o.sizes) * o.sizes.p();
    place(o.dv, p.count, plan.dv.splits, p.c, p.partials);
    return multiply(p);
  }

  // With db. db alone is a du of no columns, whose second operand is never read: the tensor cores multiply zeros while dy
  // passes.
  const char* du() {
    const uint16_t* h = o.h;
    if (o.needs & kNeedsDu && !h) {
      const MonarchOperands first{o.x, o.v, nullptr, nullptr, o.made_h, nullptr, o.sizes};
      if (const char* error = launch_middle(plan.middle, first, dtype, stream)) return error;
      h = o.made_h;
    }
    BackwardProduct p = product_of(du_or_db_product(o.sizes, o.needs), plan.du, o.dy, o.needs & kNeedsDu ? h : o.dy);
    p.count = int64_t{o.sizes.b_out} * o.sizes.s() * t_of(o.sizes);
    if (o.needs & kNeedsDu) place(o.du, p.count, plan.du.splits, p.c, p.partials);
    if (o.needs & kNeedsDb) place(o.db, o.sizes.n, plan.du.splits, p.a_sum, p.a_partials);
    return multiply(p);
  }

  const char* add_up() const {
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

  const char* all() {
    const char* error = nullptr;
    if (o.needs & (kNeedsDx | kNeedsDv)) error = dz();
    if (!error && o.needs & kNeedsDx) error = dx();
    if (!error && o.needs & kNeedsDv) error = dv();
    if (!error && o.needs & (kNeedsDu | kNeedsDb)) error = du();
    if (!error && sums.count > 0) error = add_up();
    return error;
  }
};

const char* launch_backward(const BackwardPlan& plan, const BackwardOperands& operands, Dtype dtype, int sm_count,
                            void* stream) {
  if (dtype == Dtype::bfloat16) return Backward<device::Bf16>{plan, operands, dtype, sm_count, stream}.all();
  return Backward<device::Fp16>{plan, operands, dtype, sm_count, stream}.all();
}

}  // namespace monarch
