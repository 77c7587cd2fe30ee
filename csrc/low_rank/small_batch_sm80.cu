// low_rank on GPUs of compute capability 8 for 17 to 256 rows of x: y = activation((x v^T) u^T + bias) + residual,
// h = x v^T rounded once.
//
//   x [m, k]   v [r, k]   u [n, r]   bias [n]   h [m, r]   residual, y [m, n]      bf16 or fp16, rows 16-byte aligned
//
// One cooperative grid does both products, with a barrier in between. A work item is a tile of 64 rows of a weight times 64
// or 128 rows of x (tokens), in the first product one split of k as well. A block has every grid-th item, and takes it slab
// by slab: 64 of the contraction, which cp.async brings into two rings of slots, three slabs ahead of the one in use.
//
//      k ->  split 0   split 1              r ->
//   v  [---------|---------]  64 rows    u  [----|----|----]  64 rows     8 warps: a quarter of the tokens times
//      [---------|---------]                [----|----|----]                       32 rows of the weight each
//       a block: one tile, one split         a block: a tile and all of r
//
// The weights' slabs are one sequence through both products: the last ones of v are followed by the first ones of u, and
// what the ring of weights takes of these is on its way before h is there.
//
// What the splits of k add up to meets in global memory. Behind the barrier each block sums a part of h over the splits, and
// rounds it; a second barrier shows it to all. All sums are added in an order that the sizes alone decide: the same inputs
// give the same bits.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator; it HAS NEVER RUN ON A GPU, no speed is claimed.
#include "low_rank/small_batch_sm80_layout.h"

#include "device/async_copy.h"
#include "device/convert.h"
#include "device/grid.h"
#include "device/launch.h"
#include "device/load.h"
#include "device/splits.h"
#include "device/warp_product.h"
#include "low_rank/epilogue.h"
#include "low_rank/low_rank.h"

namespace low_rank {

template <class T, int kTokenCount>
struct SmallBatchSm80Config {
  using Element = T;
  static constexpr int kTokens = kTokenCount;  // of a group
  static constexpr int kThreads = kSm80Threads;
  static constexpr int kWarpTokens = kTokens / kSm80WarpRows;
  static constexpr int kTokenFragments = kWarpTokens / 16, kWeightFragments = kSm80WarpWeights / 8;
  static constexpr int kAhead = kSm80TokenSlots - 1;  // slabs
  static constexpr int kSplitsAtOnce = 8;             // loads on their way
  static_assert(kTokens == 64 || kTokens == 128, "what the plan chooses");
  static_assert(kWeightFragments == 4, "a lane's sums of a token are 16 bytes of y");
};

struct SmallBatchSm80Params {
  SmallBatchOperands in;
  float* partials;    // [splits, m, r]; not used if there is one split
  uint64_t* counter;  // the barrier's
  int groups, splits, weight_slots;
};

template <class Config>
using SumsSm80 = float[Config::kTokenFragments][Config::kWeightFragments][4];

// --- a block's way through its items, slab by slab ---

template <class Config>
struct Walk {
  const SmallBatchSm80Params& p;
  const bool goes_on;  // from the first product to the second
  bool is_second;
  int index, slab;
  SplitItem item;

  LOWFAT_DEVICE Walk(const SmallBatchSm80Params& params, bool goes_on_then, bool starts_in_second)
      : p(params), goes_on(goes_on_then) {
    start(starts_in_second);
  }

  LOWFAT_DEVICE int rows() const { return is_second ? p.in.n : p.in.r; }  // of the weight
  LOWFAT_DEVICE int depth() const { return is_second ? p.in.r : p.in.k; }
  LOWFAT_DEVICE const uint16_t* weights() const { return is_second ? p.in.u : p.in.v; }
  LOWFAT_DEVICE const uint16_t* tokens() const { return is_second ? p.in.h : p.in.x; }
  LOWFAT_DEVICE int splits() const { return is_second ? 1 : p.splits; }
  LOWFAT_DEVICE bool is_over() const { return index >= parts_of(rows(), kBatchRows) * p.groups * splits(); }

  LOWFAT_DEVICE void start(bool in_second) {
    is_second = in_second;
    index = blockIdx.x;
    enter();
  }
  LOWFAT_DEVICE void enter() {
    if (goes_on && !is_second && is_over()) {
      is_second = true;
      index = blockIdx.x;
    }
    if (is_over()) return;
    item = split_item(Config::kTokens, p.groups, splits(), depth(), index);
    slab = item.slabs.first;
  }
  LOWFAT_DEVICE void next_item() {
    index += gridDim.x;
    enter();
  }
  LOWFAT_DEVICE void advance() {
    if (++slab == item.slabs.last) next_item();
  }
};

// Starts copying a slab of kRows rows; zeros stand for what is outside of the matrix.
template <class Config, int kRows, class Place>
LOWFAT_DEVICE void copy_slab(const uint16_t* gmem, int first_row, int slab, int rows, int depth, const Place& place) {
  constexpr int kPieces = kSlab / 8, kTogether = Config::kThreads / kPieces;  // rows
  const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces, column = slab * kSlab + piece * 8;
  const uint16_t* from = gmem + (int64_t{first_row + row} * depth + column);
#pragma unroll
  for (int down = 0; down < kRows; down += kTogether) {
    const bool is_inside = first_row + row + down < rows && column < depth;
    device::copy16_async(place(row + down, piece), from + int64_t{down} * depth, is_inside);
  }
}

// --- the rings ---

// Slabs are counted through both products; that of number i is in slot i of its ring, modulo the slots. A group of copies is
// committed for each step, so that a step knows from their number that its own have come.
template <class Config>
struct Slabs {
  const SmallBatchSm80Params& p;
  uint8_t *smem_weights, *smem_tokens;
  Walk<Config> weights, tokens;  // what is asked for next
  int weights_asked = 0, tokens_asked = 0, used = 0;
  int slot_asked = 0, slot_used = 0;  // of weights

  LOWFAT_DEVICE explicit Slabs(const SmallBatchSm80Params& params)
      : p(params), weights(params, true, false), tokens(params, false, false) {
    const Sm80Memory at = sm80_memory(Config::kTokens, p.weight_slots);
    smem_weights = device::shared_memory() + at.weights;
    smem_tokens = device::shared_memory() + at.tokens;
  }

  LOWFAT_DEVICE int next_slot(int slot) const { return slot + 1 == p.weight_slots ? 0 : slot + 1; }

  // Up to the slab of number `end`, which is not in it.
  LOWFAT_DEVICE void ask_for_weights(int end) {
    for (; weights_asked < end && !weights.is_over(); ++weights_asked) {
      uint8_t* smem = smem_weights + slot_asked * kWeightSlotBytes;
      copy_slab<Config, kBatchRows>(weights.weights(), weights.item.at.row, weights.slab, weights.rows(), weights.depth(),
                                    [&](int row, int piece) { return smem + weight_piece(row, piece); });
      slot_asked = next_slot(slot_asked);
      weights.advance();
    }
  }

  LOWFAT_DEVICE void ask_for_tokens() {
    if (tokens.is_over()) return;
    uint8_t* smem = smem_tokens + tokens_asked % kSm80TokenSlots * token_slot_bytes(Config::kTokens);
    copy_slab<Config, Config::kTokens>(tokens.tokens(), tokens.item.at.token, tokens.slab, p.in.m, tokens.depth(),
                                       [&](int row, int piece) { return smem + device::swizzled_piece(row, piece); });
    ++tokens_asked;
    tokens.advance();
  }

  // The first slabs of a product, for the steps that follow.
  LOWFAT_DEVICE void begin(bool is_second) {
    if (is_second) tokens.start(true);
    for (int i = 1; i <= Config::kAhead; ++i) {
      ask_for_weights(used + i);
      ask_for_tokens();
      device::commit_copies();  // also of nothing: groups are counted
    }
  }

  // As much of u as there is room for, when nobody reads v any more.
  LOWFAT_DEVICE void fill_with_u() {
    ask_for_weights(used + p.weight_slots);
    device::commit_copies();
  }

  // Waits for the step's slab and asks for others. The barrier shows everybody's copies, and that nobody still reads where
  // the next ones go.
  LOWFAT_DEVICE void multiply_next(SumsSm80<Config>& sums, bool is_second) {
    device::wait_copies<Config::kAhead - 1>();
    __syncthreads();
    ask_for_weights(used + (is_second ? p.weight_slots : Config::kAhead + 1));
    ask_for_tokens();
    device::commit_copies();
    multiply(sums, smem_weights + slot_used * kWeightSlotBytes,
             smem_tokens + used % kSm80TokenSlots * token_slot_bytes(Config::kTokens));
    slot_used = next_slot(slot_used);
    ++used;
  }

  LOWFAT_DEVICE static void multiply(SumsSm80<Config>& sums, const uint8_t* smem_w, const uint8_t* smem_t) {
    const int lane = device::lane_index(), warp = device::warp_index();
    const int first_token = warp / kSm80WarpColumns * Config::kWarpTokens;
    const int first_weight = warp % kSm80WarpColumns * kSm80WarpWeights;
#pragma unroll
    for (int depth = 0; depth < kSlab; depth += 16) {
      const device::Position of_token = device::ldmatrix_row(lane);
      device::multiply_k16<typename Config::Element>(
          sums,
          [&](int i) {
            const int token = first_token + i * 16 + of_token.row;
            return smem_t + device::swizzled_piece(token, (depth + of_token.column) / 8);
          },
          [&](int pair) {
            const device::Position at = weight_matrix_row(lane, pair);
            return smem_w + weight_piece(first_weight + at.row, (depth + at.column) / 8);
          });
    }
  }
};

// Of each token and the eight rows of a weight that a lane has: visit(i, half, token, row), the sums of which are
// sums[i][e / 2][2 half + e % 2].
template <class Config, class Visit>
LOWFAT_DEVICE void each_eight(const SmallBatchSm80Params& p, const SplitItem& item, int rows, const Visit& visit) {
  const int lane = device::lane_index(), warp = device::warp_index();
  const int row = item.at.row + warp % kSm80WarpColumns * kSm80WarpWeights + lane % 4 * 8;
  const int first_token = item.at.token + warp / kSm80WarpColumns * Config::kWarpTokens + lane / 4;
#pragma unroll
  for (int i = 0; i < Config::kTokenFragments; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first_token + i * 16 + half * 8;
      if (token < p.in.m && row < rows) visit(i, half, token, row);
    }
  }
}

// --- first product: h = x v^T ---

template <class Config>
LOWFAT_DEVICE void store_partial(const SmallBatchSm80Params& p, const SplitItem& item, const SumsSm80<Config>& sums) {
  each_eight<Config>(p, item, p.in.r, [&](int i, int half, int token, int row) {
    float* to = p.partials + ((int64_t{item.split} * p.in.m + token) * p.in.r + row);
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const float *left = sums[i][j] + 2 * half, *right = sums[i][j + 1] + 2 * half;
      device::store(reinterpret_cast<float4*>(to + 2 * j), make_float4(left[0], left[1], right[0], right[1]));
    }
  });
}

// h of splits that have all been stored: a block's part.
template <class Config>
LOWFAT_DEVICE void add_up(const SmallBatchSm80Params& p) {
  using T = typename Config::Element;
  const int count = p.in.m * p.in.r;
  for (int i = 4 * (blockIdx.x * Config::kThreads + threadIdx.x); i < count; i += 4 * gridDim.x * Config::kThreads) {
    const float4 sum = device::sum_of_splits<Config::kSplitsAtOnce>(p.partials + i, count, p.splits);
    device::store(reinterpret_cast<uint2*>(p.in.h + i),
                  make_uint2(device::pack2<T>(sum.x, sum.y), device::pack2<T>(sum.z, sum.w)));
  }
}

// --- second product: y = activation(h u^T + bias) + residual ---

// A lane's bias and residual, loaded before they are needed.
template <class Config>
struct Ending {
  uint32_t bias[4];  // of eight columns
  uint4 residual[Config::kTokenFragments][2];

  LOWFAT_DEVICE Ending(const SmallBatchSm80Params& p, const SplitItem& item) : bias{}, residual{} {
    each_eight<Config>(p, item, p.in.n, [&](int i, int half, int token, int column) {
      if (p.in.residual) residual[i][half] = device::load16(p.in.residual + (int64_t{token} * p.in.n + column));
      if (p.in.bias && i == 0 && half == 0) {  // at any address
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          bias[e] = device::load(p.in.bias + column + 2 * e) | uint32_t{device::load(p.in.bias + column + 2 * e + 1)} << 16;
        }
      }
    });
  }
};

template <class Config, Activation kActivation>
LOWFAT_DEVICE void store_y(const SmallBatchSm80Params& p, const SplitItem& item, const SumsSm80<Config>& sums,
                           const Ending<Config>& ending) {
  using T = typename Config::Element;
  each_eight<Config>(p, item, p.in.n, [&](int i, int half, int token, int column) {
    const uint4 all = ending.residual[i][half];
    uint32_t pairs[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 bias = device::unpack2<T>(ending.bias[j]), residual = device::unpack2<T>(pairs[j]);
      pairs[j] = device::pack2<T>(finished(sums[i][j][2 * half], bias.x, kActivation, residual.x),
                                  finished(sums[i][j][2 * half + 1], bias.y, kActivation, residual.y));
    }
    device::store16(p.in.y + (int64_t{token} * p.in.n + column), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
  });
}

// h without splits.
template <class Config>
LOWFAT_DEVICE void store_h(const SmallBatchSm80Params& p, const SplitItem& item, const SumsSm80<Config>& sums) {
  using T = typename Config::Element;
  each_eight<Config>(p, item, p.in.r, [&](int i, int half, int token, int row) {
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = device::pack2<T>(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
    device::store16(p.in.h + (int64_t{token} * p.in.r + row), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
  });
}

// --- the kernel ---

// One block to a multiprocessor.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) small_batch_sm80(const __grid_constant__ SmallBatchSm80Params p) {
  Slabs<Config> slabs(p);
  SumsSm80<Config> sums;
  const auto multiply_item = [&](const Walk<Config>& walk) {
    device::clear(sums);
    for (int slab = walk.item.slabs.first; slab < walk.item.slabs.last; ++slab) slabs.multiply_next(sums, walk.is_second);
  };

  slabs.begin(false);
  for (Walk<Config> walk(p, false, false); !walk.is_over(); walk.next_item()) {
    multiply_item(walk);
    if (p.splits > 1) {
      store_partial<Config>(p, walk.item, sums);
    } else {
      store_h<Config>(p, walk.item, sums);
    }
  }
  const uint64_t target = device::grid_arrive(p.counter);  // and a barrier of the block
  slabs.fill_with_u();
  device::grid_wait(p.counter, target);
  if (p.splits > 1) {
    add_up<Config>(p);
    device::grid_barrier(p.counter);
  }

  slabs.begin(true);
  for (Walk<Config> walk(p, false, true); !walk.is_over(); walk.next_item()) {
    const Ending<Config> ending(p, walk.item);
    multiply_item(walk);
    with_activation(p.in.activation, [&](auto activation) {
      store_y<Config, decltype(activation)::value>(p, walk.item, sums, ending);
    });
  }
}

// --- launch ---

template <class Config>
const char* launch(const SmallBatchSm80Plan& plan, const SmallBatchSm80Params& params, void* stream) {
  device::Launch shape;
  shape.grid = dim3(plan.grid);
  shape.threads = Config::kThreads;
  shape.smem_bytes = plan.smem_bytes;
  shape.is_cooperative = true;
  shape.stream = stream;
  return device::launch(small_batch_sm80<Config>, shape, params);
}

const char* launch_small_batch_sm80(const SmallBatchSm80Plan& plan, const SmallBatchOperands& operands, float* partials,
                                    uint64_t* counter, Dtype dtype, void* stream) {
  using device::Bf16, device::Fp16;
  const SmallBatchSm80Params p{operands, partials, counter, plan.groups, plan.splits, plan.weight_slots};
  const bool is_bf16 = dtype == Dtype::bfloat16;
  switch (plan.tokens) {
    case 64:
      return is_bf16 ? launch<SmallBatchSm80Config<Bf16, 64>>(plan, p, stream)
                     : launch<SmallBatchSm80Config<Fp16, 64>>(plan, p, stream);
    case 128:
      return is_bf16 ? launch<SmallBatchSm80Config<Bf16, 128>>(plan, p, stream)
                     : launch<SmallBatchSm80Config<Fp16, 128>>(plan, p, stream);
    default: return "the plan does not cover these sizes";
  }
}

}  // namespace low_rank
