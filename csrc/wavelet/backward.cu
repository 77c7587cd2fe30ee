// The gradients of a wavelet adapter's factors on a GPU: products over the rows, the transform of x and dy in the store.
//
//   x [m, k]   dy [m, n]   h, dh [pairs, m, r]   dv [r, pairs k / 2]   du [pairs n / 2, r]      bf16 or fp16, sums in float
//
//   dv[p] = dh[p]^T W x        [r, k / 2] of each pair           a   [depth = m, pairs r]      dh, h
//   du[p] = (W dy)^T h[p]      [n / 2, r], written transposed    b   [depth = m, features]     x, dy
//
// Neighbouring columns of b are neighbours in a lane's sums: it stores their sum, or their difference, where a coefficient's
// gradient goes. Nothing of x or dy is rounded. One launch does both; stages, tiles and splits are those of
// low_rank/backward.cu, and so is the launch that adds up what splits have summed. dh and dx are forward.cu's, with the
// factors exchanged.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator. It HAS NEVER RUN ON A GPU, no speed is claimed.
#include "wavelet/haar.h"

#include "device/launch.h"
#include "low_rank/backward.h"
#include "low_rank/backward_steps.h"

namespace wavelet {

template <class T>
struct WeightConfig : low_rank::TileSizes<T, true, kTile> {
  using Sizes = low_rank::TileSizes<T, true, kTile>;
  static constexpr int kStages = low_rank::kBackwardStages;
  struct Stage {
    typename Sizes::Operand a, b;
  };
  struct Shared {
    Stage stages[kStages];
  };
};

struct WeightProduct {
  const uint16_t* middle;   // [pairs, m, r]
  const uint16_t* x;        // [m, 2 width]
  uint16_t* rounded;        // dv or du; or null: into partials
  float* partials;          // [splits, each like dv or du]
  int width;                // coefficients of a half
  bool is_du;
  float scale;
  int row_tiles, column_tiles;
};

struct WeightProducts {
  WeightProduct list[2];
  int blocks_of_first;
  int m, r, pairs, splits;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) weights(const __grid_constant__ WeightProducts all) {
  using Sizes = typename Config::Sizes;
  using T = typename Config::Element;
  auto& smem = *reinterpret_cast<typename Config::Shared*>(device::shared_memory());
  const int index = blockIdx.x, rank = all.r, count = all.pairs * all.r;
  const bool is_second = index >= all.blocks_of_first;
  const WeightProduct& p = all.list[is_second];
  const low_rank::Place place =
      low_rank::place_of(p.row_tiles, p.column_tiles, is_second ? index - all.blocks_of_first : index);
  const int first_row = place.row_tile * kTile, first_column = place.column_tile * kTile;
  const low_rank::Range steps = low_rank::steps_of_split(kTile, all.m, all.splits, place.split);
  const int from = steps.first * Config::kDepth;

  // A thread's pieces are of one pair; its matrix begins so that the columns of all pairs can be counted on.
  const int64_t pair = (first_row + threadIdx.x % Config::kPiecesOfA * 8) / rank;
  const low_rank::Matrix gmem_a{p.middle + pair * (int64_t{all.m} - 1) * rank, all.m, count, rank};
  const low_rank::Matrix gmem_b{p.x, all.m, 2 * p.width, 2 * p.width};
  low_rank::TileSums<Sizes> sums;
  sums.multiply_steps(smem.stages, low_rank::copies_of_a<Sizes>(gmem_a, first_row, from),
                      low_rank::CopiesOfB<Sizes>(gmem_b, from, first_column), steps.last - steps.first, false);

  sums.each_pair([&](int row, int column, float left, float right) {
    row += first_row, column += first_column;
    if (row >= count || column >= 2 * p.width) return;
    const int of_pair = row / rank, half = p.is_du ? target_of(all.pairs, of_pair) : source_of(all.pairs, of_pair);
    const int64_t at = p.is_du ? place_in_u(rank, p.width, of_pair, row % rank, column / 2)
                               : place_in_v(all.pairs, p.width, of_pair, row % rank, column / 2);
    const float gradient = p.scale * (half == 0 ? left + right : left - right);
    if (p.rounded) {
      device::store(p.rounded + at, device::narrow<T>(gradient));
    } else {
      device::store(p.partials + (int64_t{place.split} * count * p.width + at), gradient);
    }
  });
}

// --- launch ---

template <class T>
const char* launch_weights(const BackwardPlan& plan, const BackwardOperands& o, Dtype dtype, int sm_count, void* stream) {
  using Config = WeightConfig<T>;
  WeightProducts products{};
  products.m = o.m, products.r = o.r, products.pairs = o.pairs, products.splits = plan.weight_splits;
  low_rank::BackwardSums sums{};
  float* partials = o.partials;
  int count = 0, blocks = 0;
  const auto add = [&](const uint16_t* middle, const uint16_t* x, uint16_t* to, int width, bool is_du, float scale) {
    WeightProduct& p = products.list[count++];
    p = {middle, x, nullptr, nullptr, width, is_du, scale, parts_of(o.pairs * o.r, kTile), parts_of(2 * width, kTile)};
    if (plan.weight_splits == 1) {
      p.rounded = to;
    } else {
      const int64_t elements = int64_t{o.pairs} * o.r * width;
      p.partials = partials;
      partials += plan.weight_splits * elements;
      sums.list[sums.count++] = {p.partials, to, elements, plan.weight_splits, false};
    }
    blocks += p.row_tiles * p.column_tiles * plan.weight_splits;
    if (count == 1) products.blocks_of_first = blocks;
  };
  if (o.needs & kNeedsDv) add(o.dh, o.x, o.dv, o.k / 2, false, kRootHalf);
  if (o.needs & kNeedsDu) add(o.h, o.dy, o.du, o.n / 2, true, o.scale * kRootHalf);
  device::Launch shape;
  shape.grid = dim3(blocks);
  shape.threads = Config::kThreads;
  shape.smem_bytes = sizeof(typename Config::Shared);
  shape.stream = stream;
  if (const char* error = device::launch(weights<Config>, shape, products)) return error;
  return sums.count > 0 ? low_rank::launch_sums(sums, dtype, sm_count, stream) : nullptr;
}

const char* launch_backward(const BackwardPlan& plan, const BackwardOperands& o, Dtype dtype, int sm_count, void* stream) {
  if (plan.weight_splits == 0) return "the plan does not cover these sizes";
  if (o.needs & (kNeedsDx | kNeedsDv)) {
    if (const char* error = launch_input_gradient(plan.dx, o, dtype, stream)) return error;
  }
  if (!(o.needs & (kNeedsDv | kNeedsDu))) return nullptr;
  return dtype == Dtype::bfloat16 ? launch_weights<device::Bf16>(plan, o, dtype, sm_count, stream)
                                  : launch_weights<device::Fp16>(plan, o, dtype, sm_count, stream);
}

}  // namespace wavelet
