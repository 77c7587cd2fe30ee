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

#include "device/launch.h"
#include "device/splits.h"
#include "low_rank/backward_steps.h"

namespace low_rank {

template <class T, bool kAcross, int kTileSize>
struct BackwardConfig : TileSizes<T, kAcross, kTileSize> {
  using Sizes = TileSizes<T, kAcross, kTileSize>;
  static constexpr int kStages = kBackwardStages;
  struct Stage {
    typename Sizes::Operand a, b;
  };
  union Shared {
    Stage stages[kStages];
    uint16_t c[kTileSize * c_stride(kTileSize)];
  };
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

// --- products ---

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) backward_products(
    const __grid_constant__ BackwardProducts all) {
  using Sizes = typename Config::Sizes;
  auto& smem = *reinterpret_cast<typename Config::Shared*>(device::shared_memory());
  const int index = blockIdx.x;
  const bool is_second = index >= all.blocks_of_first;
  const BackwardProduct& p = all.list[is_second];
  const Place place = place_of(p.row_tiles, p.column_tiles, is_second ? index - all.blocks_of_first : index);
  const TileOfC tile{place.row_tile * Config::kTile, place.column_tile * Config::kTile, p.rows, p.columns, p.columns};
  const bool sums_a = Config::kIsAcross && (p.a_sum || p.a_partials) && place.column_tile == 0;

  const Range steps = steps_of_split(Config::kTile, p.depth, p.splits, place.split);
  const int from = steps.first * Config::kDepth, a_rows = Config::kIsAcross ? p.depth : p.rows;
  const int a_columns = Config::kIsAcross ? p.rows : p.depth;
  TileSums<Sizes> sums;
  sums.multiply_steps(smem.stages, copies_of_a<Sizes>({p.a, a_rows, a_columns, a_columns}, tile.first_row, from),
                      CopiesOfB<Sizes>({p.b, p.depth, p.columns, p.columns}, from, tile.first_column),
                      steps.last - steps.first, sums_a);

  if (p.partials) {
    sums.store_floats(p.partials + int64_t{place.split} * p.rows * p.columns, tile);
  } else if (p.c) {
    sums.store_rounded(p.c, tile, smem.c);
  }
  if (sums_a) sums.store_a_sums(p.a_sum, p.a_partials, place.split, tile.first_row, p.rows);
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

template <class T>
const char* add_up(const BackwardSums& sums, int sm_count, void* stream) {
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

const char* launch_sums(const BackwardSums& sums, Dtype dtype, int sm_count, void* stream) {
  return dtype == Dtype::bfloat16 ? add_up<device::Bf16>(sums, sm_count, stream)
                                  : add_up<device::Fp16>(sums, sm_count, stream);
}

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

  const char* dh() const {
    BackwardProduct one = product_of(p.dy, p.u, p.m, p.r, p.n, kTile, plan.dh_splits);
    if (plan.dh_splits == 1) {
      one.c = p.dh;
      return multiply<false>(&one, 1);
    }
    one.partials = p.partials;
    if (const char* error = multiply<false>(&one, 1)) return error;
    return add_up<T>({{{p.partials, p.dh, int64_t{p.m} * p.r, plan.dh_splits, false}}, 1}, sm_count, stream);
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
    return is_summed_later ? add_up<T>(sums, sm_count, stream) : nullptr;
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
