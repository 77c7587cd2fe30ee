// monarch on a GPU: y = blocks of (x v^T), permuted, u^T + bias, by two batched products that store where permutations say.
//
//   x [m, k]   v [b_in, r b_out, p]   h [b_out, m, b_in r]   u [b_out, s, b_in r]   y [m, n]      bf16, fp16; sums in float
//
//   z[i] = x[:, i p..] v[i]^T     to h[o][token][i r + j], rounded once       a token's results of output block o: one run
//   h[o] u[o]^T + bias            to y[token][o + b_out c] or [o s + c]       blocks' results lie between each other
//
// One kernel does both. Which of v's rows stand beside each other in a tile is free: those of one output block do, so that
// a tile of the first product is whole runs of h as soon as the rank is 8 or more. Where a block's results are no whole runs
// (low ranks; y of all interleaved blocks), a CTA has several neighbouring blocks, 16 if they are many: it makes pass after
// pass over their tiles and keeps the rounded results in planes of shared memory. At the end it reads across the planes, and
// whole sectors leave. (Stored from the fragments, each element of 2 bytes would cost a sector of 32 in L2.)
//
//     blocks of a group: passes           planes                   a token's row of y, interleaved
//     h[o] -> tile of u[o]      [0 0 0 0]  [1 1 1 1]  [2 2 2 2]    0 1 2 0 1 2 0 1 2 0 1 2
//
// cp.async brings slabs of 64 of the contraction, tokens and weights, two ahead of the one in use; they are one sequence
// through all passes. 8 warps have a half of the tokens times a quarter of the columns each; with 16 tokens 4 warps.
//
// All sums are added along the contraction, whatever the tile: the same inputs give the same bits.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator; it HAS NEVER RUN ON A GPU, no speed is claimed.
#include "device/async_copy.h"
#include "device/convert.h"
#include "device/launch.h"
#include "device/load.h"
#include "device/warp_product.h"
#include "monarch/monarch_cuda.h"

namespace monarch {

template <class T, int kTokenCount, int kColumnCount>
struct BatchedConfig {
  using Element = T;
  static constexpr int kTokens = kTokenCount, kColumns = kColumnCount;  // of a tile
  static constexpr int kThreads = threads_of(kTokens);
  static constexpr int kBlocks = 2;  // that may share a multiprocessor: 128 registers for each thread
  static constexpr int kWarpTokens = kTokens / warp_rows(kTokens), kWarpColumns = kColumns / monarch::kWarpColumns;
  static constexpr int kTokenFragments = kWarpTokens / 16, kColumnFragments = kWarpColumns / 8;
  static constexpr int kPieces = kSlab / 8, kTogether = kThreads / kPieces;  // rows of a slab that are copied at once
  static constexpr int kStageBytes = stage_bytes(kTokens, kColumns);
  static constexpr int kStride = plane_stride(kColumns);
  static_assert(kTokens % kTogether == 0 && kColumns % kTogether == 0, "every thread copies as much");
  static_assert(kColumnFragments % 2 == 0, "fragments of weights are loaded in pairs");
};

struct BatchedParams {
  Batch batch;
  Plan plan;
  const uint16_t* tokens;   // of block b from b block_step on
  const uint16_t* weights;  // [blocks, rows, depth]
  const uint16_t* bias;     // by a result's offset; or null
  uint16_t* results;
};

template <class Config>
struct Tile {
  using T = typename Config::Element;
  const BatchedParams& p;
  const Batch& batch;
  const Place place;
  uint8_t* const smem;
  uint16_t* const smem_planes;
  float sums[Config::kTokenFragments][Config::kColumnFragments][4];
  uint32_t bias[Config::kColumnFragments];  // of a fragment's two columns

  LOWFAT_DEVICE explicit Tile(const BatchedParams& params)
      : p(params),
        batch(params.batch),
        place(place_of(params.batch, params.plan, blockIdx.x)),
        smem(device::shared_memory()),
        smem_planes(reinterpret_cast<uint16_t*>(smem + planes_at(Config::kTokens, Config::kColumns, params.plan.group))) {}

  LOWFAT_DEVICE int first_token() const { return device::warp_index() / kWarpColumns * Config::kWarpTokens; }
  LOWFAT_DEVICE int first_column() const { return device::warp_index() % kWarpColumns * Config::kWarpColumns; }
  LOWFAT_DEVICE uint8_t* stage(int step) const { return smem + step % kStages * Config::kStageBytes; }

  // --- copies: a thread has the same piece of the same rows of every slab ---

  struct Copies {
    const Tile& t;
    const int row = threadIdx.x / Config::kPieces, piece = threadIdx.x % Config::kPieces;
    int pass = 0, slab = 0, asked = 0;
    int64_t weight_rows[Config::kColumns / Config::kTogether];  // offsets; less than 0: outside

    LOWFAT_DEVICE explicit Copies(const Tile& tile) : t(tile) {
#pragma unroll
      for (int i = 0; i < Config::kColumns / Config::kTogether; ++i) {
        const int column = row + i * Config::kTogether;
        const bool is_inside = column < t.p.plan.used_columns && t.place.column + column < t.batch.rows;
        weight_rows[i] = is_inside ? int64_t{t.batch.weight_row(t.place.column + column)} * t.batch.depth : -1;
      }
    }

    // Zeros stand for what is outside.
    LOWFAT_DEVICE void ask_for_next() {
      if (pass < t.place.passes) {
        const int block = t.place.block + pass, column = slab * kSlab + piece * 8;
        copy_tokens(t.stage(asked), block, column);
        copy_weights(t.stage(asked) + Config::kTokens * kSlab * 2, block, column);
        ++asked;
        if (++slab == parts_of(t.batch.depth, kSlab)) slab = 0, ++pass;
      }
      device::commit_copies();  // also of nothing: groups are counted
    }

    LOWFAT_DEVICE void copy_tokens(uint8_t* to, int block, int column) const {
      const bool has_column = column < t.batch.depth_of(block);
      const int first = t.place.token + row;
      const uint16_t* from = t.p.tokens + (block * t.batch.block_step + int64_t{first} * t.batch.token_step + column);
#pragma unroll
      for (int down = 0; down < Config::kTokens; down += Config::kTogether) {
        device::copy16_async(to + device::swizzled_piece(row + down, piece), from + int64_t{down} * t.batch.token_step,
                             has_column && first + down < t.batch.m);
      }
    }

    LOWFAT_DEVICE void copy_weights(uint8_t* to, int block, int column) const {
      const bool has_column = column < t.batch.depth;
      const uint16_t* from = t.p.weights + (int64_t{block} * t.batch.rows * t.batch.depth + column);
#pragma unroll
      for (int i = 0; i < Config::kColumns / Config::kTogether; ++i) {
        device::copy16_async(to + device::swizzled_piece(row + i * Config::kTogether, piece), from + weight_rows[i],
                             has_column && weight_rows[i] >= 0);
      }
    }
  };

  // --- a pass ---

  // Before the products, which take their time.
  LOWFAT_DEVICE void load_bias(int block) {
    const int first = place.column + first_column() + device::lane_index() % 4 * 2;
#pragma unroll
    for (int j = 0; j < Config::kColumnFragments; ++j) {
      bias[j] = 0;
      if (!p.bias) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = first + j * 8 + e;
        const int64_t at = batch.offset_of_output(block, column);
        if (column < batch.rows && at < batch.results) bias[j] |= uint32_t{device::load(p.bias + at)} << 16 * e;
      }
    }
  }

  LOWFAT_DEVICE void multiply(const uint8_t* smem_tokens, int depth_left) {
    const uint8_t* smem_weights = smem_tokens + Config::kTokens * kSlab * 2;
    const device::Position of_token = device::ldmatrix_row(device::lane_index());
    const device::Position of_weight = device::ldmatrix_pair_row(device::lane_index());
#pragma unroll
    for (int depth = 0; depth < kSlab; depth += 16) {
      if (depth >= depth_left) break;  // blocks of 16 or 32 are as common as those of 64
      device::multiply_k16<T>(
          sums,
          [&](int i) {
            const int token = first_token() + i * 16 + of_token.row;
            return smem_tokens + device::swizzled_piece(token, (depth + of_token.column) / 8);
          },
          [&](int pair) {
            const int column = first_column() + pair * 16 + of_weight.row;
            return smem_weights + device::swizzled_piece(column, (depth + of_weight.column) / 8);
          });
    }
  }

  LOWFAT_DEVICE void keep(int pass) const {
    uint16_t* plane = smem_planes + pass * Config::kTokens * Config::kStride;
#pragma unroll
    for (int i = 0; i < Config::kTokenFragments; ++i) {
#pragma unroll
      for (int j = 0; j < Config::kColumnFragments; ++j) {
        const float2 added = device::unpack2<T>(bias[j]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const device::Position at = device::mma_d(device::lane_index(), 2 * half);
          const int token = first_token() + i * 16 + at.row, column = first_column() + j * 8 + at.column;
          *reinterpret_cast<uint32_t*>(plane + token * Config::kStride + column) =
              device::pack2<T>(sums[i][j][2 * half] + added.x, sums[i][j][2 * half + 1] + added.y);
        }
      }
    }
  }

  // Waits for a slab, asks for the one two ahead, multiplies; at the end of a pass keeps what has been summed. The barrier
  // shows everybody's copies, and that nobody still reads where the next ones go.
  LOWFAT_DEVICE void multiply_passes() {
    Copies copies(*this);
    for (int i = 0; i < kStages - 1; ++i) copies.ask_for_next();
    int step = 0;
    for (int pass = 0; pass < place.passes; ++pass) {
      device::clear(sums);
      load_bias(place.block + pass);
      for (int depth = 0; depth < batch.depth; depth += kSlab) {
        device::wait_copies<kStages - 2>();
        __syncthreads();
        copies.ask_for_next();
        multiply(stage(step++), batch.depth - depth);
      }
      if (p.plan.group == 1) __syncthreads();  // the plane lies where slabs are read
      keep(pass);
    }
    __syncthreads();
  }

  // --- results ---

  LOWFAT_DEVICE const uint16_t* kept(InTile at, int token) const {
    return smem_planes + (at.pass * Config::kTokens + token) * Config::kStride + at.column;
  }

  // Where a token's result goes; less than 0: nowhere.
  LOWFAT_DEVICE int64_t offset_of(InTile at) const {
    const int column = place.column + at.column;
    const int64_t offset = batch.offset_of(place.block + at.pass, column);
    return at.column < p.plan.used_columns && column < batch.rows && offset < batch.results ? offset : -1;
  }

  // Deals `count` numbers of results times the tile's tokens to the threads: store(number, tokens), a warp's lanes with
  // neighbouring numbers.
  struct Share {
    int first, last, step;  // tokens
  };
  template <class Store>
  LOWFAT_DEVICE void deal(int count, const Store& store) const {
    const int lanes = smaller(count, Config::kThreads), together = Config::kThreads / lanes, thread = threadIdx.x;
    if (thread >= lanes * together) return;
    const Share tokens{thread / lanes, smaller(Config::kTokens, batch.m - place.token), together};
    for (int i = thread % lanes; i < count; i += lanes) store(i, tokens);
  }

  LOWFAT_DEVICE uint16_t* result(int64_t offset, int token) const {
    return p.results + (offset + int64_t{place.token + token} * batch.result_step);
  }

  LOWFAT_DEVICE void store_elements() const {
    deal(place.passes * p.plan.used_columns, [&](int number, const Share& tokens) {
      const InTile at = in_tile(batch.unit, place.passes, number);
      const int64_t offset = offset_of(at);
      if (offset < 0) return;
      for (int token = tokens.first; token < tokens.last; token += tokens.step) {
        device::store(result(offset, token), *kept(at, token));
      }
    });
  }

  // Eight results that are neighbours in global memory, and in their plane.
  LOWFAT_DEVICE void store_along() const {
    deal(parts_of(place.passes * p.plan.used_columns, 8), [&](int piece, const Share& tokens) {
      const InTile at = in_tile(batch.unit, place.passes, piece * 8);
      const int64_t offset = offset_of(at);
      if (offset < 0) return;
      for (int token = tokens.first; token < tokens.last; token += tokens.step) {
        device::store16(result(offset, token), device::load16_shared(kept(at, token)));
      }
    });
  }

  // Eight results from several planes.
  LOWFAT_DEVICE void store_across() const {
    deal(parts_of(place.passes * p.plan.used_columns, 8), [&](int piece, const Share& tokens) {
      InTile at = in_tile(batch.unit, place.passes, piece * 8);
      const int64_t offset = offset_of(at);
      if (offset < 0) return;
      const uint16_t* from[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        from[e] = kept(at, 0);
        at = next_in_tile(batch.unit, place.passes, at);
      }
      for (int token = tokens.first; token < tokens.last; token += tokens.step) {
        uint32_t pairs[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int down = token * Config::kStride;
          pairs[e] = from[2 * e][down] | uint32_t{from[2 * e + 1][down]} << 16;
        }
        device::store16(result(offset, token), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
      }
    });
  }

  LOWFAT_DEVICE void store() const {
    if (!p.plan.is_wide) {
      store_elements();
    } else if (is_along(batch.unit, place.passes)) {
      store_along();
    } else {
      store_across();
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) batched_product(
    const __grid_constant__ BatchedParams p) {
  Tile<Config> tile(p);
  tile.multiply_passes();
  tile.store();
}

// --- launch ---

template <class Config>
const char* launch(const BatchedParams& params, void* stream) {
  device::Launch shape;
  shape.grid = dim3(params.plan.grid);
  shape.threads = Config::kThreads;
  shape.smem_bytes = params.plan.smem_bytes;
  shape.stream = stream;
  return device::launch(batched_product<Config>, shape, params);
}

template <class T>
const char* launch_tile(const BatchedParams& p, void* stream) {
  switch (p.plan.tokens) {
    case 16: return launch<BatchedConfig<T, 16, 64>>(p, stream);
    case 32: return launch<BatchedConfig<T, 32, 64>>(p, stream);
    case 64:
      return p.plan.columns == 64 ? launch<BatchedConfig<T, 64, 64>>(p, stream)
                                  : launch<BatchedConfig<T, 64, 128>>(p, stream);
    case 128: return launch<BatchedConfig<T, 128, 128>>(p, stream);
    default: return "the plan does not cover these sizes";
  }
}

const char* launch_batch(const BatchedParams& p, Dtype dtype, void* stream) {
  return dtype == Dtype::bfloat16 ? launch_tile<device::Bf16>(p, stream) : launch_tile<device::Fp16>(p, stream);
}

const char* launch_middle(const Plan& plan, const MonarchOperands& operands, Dtype dtype, void* stream) {
  const auto& o = operands;
  return launch_batch({first_batch(o.sizes), plan, o.x, o.v, nullptr, o.h}, dtype, stream);
}

const char* launch_monarch(const MonarchPlan& plan, const MonarchOperands& operands, Dtype dtype, void* stream) {
  const auto& o = operands;
  if (const char* error = launch_middle(plan.first, o, dtype, stream)) return error;
  return launch_batch({second_batch(o.sizes), plan.second, o.h, o.u, o.bias, o.y}, dtype, stream);
}

}  // namespace monarch
