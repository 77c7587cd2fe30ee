// A wavelet adapter on a GPU, y = scale W^T C W x with W the Haar transform of neighbours: two launches, and none for the
// transform.
//
//   x [m, k]   v [r, pairs k / 2]   u [pairs n / 2, r]   y [m, n]      bf16 or fp16, rows 16-byte aligned, sums in float
//
//   middle    h[p] = W x v[p]^T        [pairs, m, r]   in floats, a piece of the sum for each split of k
//   outputs   h = their sum, rounded once;  c = h u^T of both halves;  y = W^T c [m, n], rounded once
//
// Ranks are small: x and y are what takes the time, and neither is read or written more than once (or, of a middle of more
// than 64 numbers, once for each 64). The transform is where it costs nothing:
//
//   middle    a number of v stands for two neighbours of x, the second with its sign: the factor is doubled on its way into
//             shared memory, and x passes untouched from there into the tensor core. No half of x is rounded, or exists.
//
//               x     x0 x1 x2 x3 ..          v   a  b ..    low    a  a  b  b ..
//                                                            high   a -a  b -b ..
//
//   outputs   a lane of the tensor core has sums of both halves for the same coefficients: it stores l + h, l - h.
//
// The gradient dx is the same with the factors exchanged: then u is in the middle, and lies across the contraction, and v is
// with the outputs, the same. Tiles, splits and stages are those of low_rank/backward.cu.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator. It HAS NEVER RUN ON A GPU, no speed is claimed.
#include "wavelet/haar.h"

#include "device/launch.h"
#include "device/splits.h"
#include "low_rank/backward_steps.h"

namespace wavelet {

using low_rank::tile_piece;

// kAlong: of the factor, whether it lies along the contraction.
template <class T, bool kAlong>
struct MiddleConfig : low_rank::TileSizes<T, false, kTile> {
  using Sizes = low_rank::TileSizes<T, false, kTile>;
  static constexpr bool kIsAlong = kAlong;
  static constexpr int kStages = low_rank::kBackwardStages;
  struct Shared {
    typename Sizes::Operand x[kStages];
    typename Sizes::Operand factor[kFactorStages];
  };
  static_assert(Sizes::kThreads == kThreads && Sizes::kDepth == kDepth, "what the layout says of a stage");
  static_assert(kTile * kDepth / 8 == 2 * kThreads, "of a stage's factor a thread writes two pieces");
};

template <class T, bool kAlong>
struct OutputConfig : low_rank::TileSizes<T, false, kTile> {
  using Sizes = low_rank::TileSizes<T, false, kTile>;
  static constexpr bool kIsAlong = kAlong;
  static constexpr int kSplitsAtOnce = 4;  // loads on their way
};

struct MiddleParams {
  const uint16_t* x;       // [m, 2 width]
  const uint16_t* factor;  // v, along the contraction, or u
  float* partials;         // [splits, pairs, m, r]
  int m, width, r, pairs;  // width: coefficients of a half
  int row_tiles, column_tiles, splits;
};

struct OutputParams {
  const float* partials;   // [splits, pairs, m, r]
  const uint16_t* factor;  // u, along the contraction, or v; not read for no width
  uint16_t* h;             // [pairs, m, r] or null
  uint16_t* y;             // [m, 2 width]
  int m, width, r, pairs;  // width: coefficients of a half; 0: only h is wanted
  int splits, parts;
  float h_scale, y_scale;
};

// --- the middle ---

// A thread's part in bringing the factor: a piece for each stage, asked for one stage before it is written.
template <class Config>
struct Doubling {
  const uint16_t* from;
  int coefficient;
  const int width;
  const int64_t step;  // elements from stage to stage
  bool has_column;
  uint32_t signs;  // of a number's second: its sign bits
  uint4 asked;

  LOWFAT_DEVICE Doubling(const MiddleParams& p, int first_column, int first_coefficient)
      : width(p.width), step(int64_t{kDepth / 2} * (Config::kIsAlong ? 1 : p.r)) {
    const FactorPiece piece = Config::kIsAlong ? piece_of_v(threadIdx.x) : piece_of_u(threadIdx.x);
    const int column = first_column + piece.column, pair = column / p.r, rank = column % p.r;
    has_column = column < p.pairs * p.r;
    coefficient = first_coefficient + piece.coefficient;
    from = p.factor + (Config::kIsAlong ? place_in_v(p.pairs, p.width, pair, rank, coefficient)
                                        : place_in_u(p.r, p.width, pair, rank, coefficient));
    const int half = Config::kIsAlong ? source_of(p.pairs, pair) : target_of(p.pairs, pair);
    signs = half == 0 ? 0 : Config::kIsAlong ? 0x80000000u : 0x80008000u;
  }

  // Also for a stage behind the split's last: of another split, or of zeros, and never written.
  LOWFAT_DEVICE void ask() {
    asked = has_column && coefficient < width ? device::load16(from) : device::zero16();
    coefficient += kDepth / 2;
    from += step;
  }

  LOWFAT_DEVICE uint32_t twice(uint32_t number) const { return (number | number << 16) ^ signs; }
  LOWFAT_DEVICE uint4 four_twice(uint32_t two, uint32_t next) const {
    return make_uint4(twice(two & 0xffff), twice(two >> 16), twice(next & 0xffff), twice(next >> 16));
  }

  // Of v, 16 features of a column, in rows of columns; of u, two features of eight columns, in rows of features.
  LOWFAT_DEVICE void write(uint4* smem) const {
    constexpr int kPieces = kTile / 8;
    if constexpr (Config::kIsAlong) {
      const FactorPiece piece = piece_of_v(threadIdx.x);
      const int first = piece.coefficient / 4;
      device::store16_shared(smem + tile_piece(kPieces, piece.column, first), four_twice(asked.x, asked.y));
      device::store16_shared(smem + tile_piece(kPieces, piece.column, first + 1), four_twice(asked.z, asked.w));
    } else {
      const FactorPiece piece = piece_of_u(threadIdx.x);
      const int row = 2 * piece.coefficient, column = piece.column / 8;
      device::store16_shared(smem + tile_piece(kPieces, row, column), asked);
      device::store16_shared(smem + tile_piece(kPieces, row + 1, column),
                             make_uint4(asked.x ^ signs, asked.y ^ signs, asked.z ^ signs, asked.w ^ signs));
    }
  }
};

template <class Config, class Sizes>
LOWFAT_DEVICE void multiply_stage(low_rank::TileSums<Sizes>& sums, const uint4* smem_x, const uint4* smem_factor) {
  if constexpr (!Config::kIsAlong) {
    sums.multiply(smem_x, smem_factor, false);
  } else {
    const device::Position warp = low_rank::warp_place<Sizes>();
    const device::Position a = device::ldmatrix_row(device::lane_index());
    const device::Position b = device::ldmatrix_pair_row(device::lane_index());
#pragma unroll
    for (int depth = 0; depth < kDepth; depth += 16) {
      device::multiply_k16<typename Config::Element>(
          sums.sums,
          [&](int i) {
            return smem_x + tile_piece(Sizes::kPiecesOfA, warp.row + i * 16 + a.row, (depth + a.column) / 8);
          },
          [&](int pair) {
            return smem_factor + tile_piece(kDepth / 8, warp.column + pair * 16 + b.row, (depth + b.column) / 8);
          });
    }
  }
}

// Through all stages of a split: wait for x, ask for it three stages ahead; write the factor one stage ahead, ask for it
// two. The barrier shows everybody's part, and that nobody still reads where the next ones go.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) middle(const __grid_constant__ MiddleParams p) {
  using Sizes = typename Config::Sizes;
  auto& smem = *reinterpret_cast<typename Config::Shared*>(device::shared_memory());
  const low_rank::Place place = low_rank::place_of(p.row_tiles, p.column_tiles, blockIdx.x);
  const int first_row = place.row_tile * kTile, first_column = place.column_tile * kTile;
  const low_rank::Range range = low_rank::steps_of_split(kTile, 2 * p.width, p.splits, place.split);
  const int steps = range.last - range.first, from = range.first * kDepth;

  const low_rank::Matrix gmem_x{p.x, p.m, 2 * p.width, 2 * p.width};
  auto x = low_rank::copies_of_a<Sizes>(gmem_x, first_row, from);
  Doubling<Config> factor(p, first_column, from / 2);
  const auto copy = [&](int step) {
    if (step < steps) x.copy_next(smem.x[step % Config::kStages].pieces);
    device::commit_copies();  // also of nothing: groups are counted
  };
  const auto write = [&](int step) {
    if (step < steps) factor.write(smem.factor[step % kFactorStages].pieces);
    factor.ask();
  };
  factor.ask();
  for (int step = 0; step < Config::kStages - 1; ++step) copy(step);
  write(0);
  low_rank::TileSums<Sizes> sums;
  for (int step = 0; step < steps; ++step) {
    device::wait_copies<Config::kStages - 2>();
    __syncthreads();
    copy(step + Config::kStages - 1);
    write(step + 1);
    multiply_stage<Config>(sums, smem.x[step % Config::kStages].pieces, smem.factor[step % kFactorStages].pieces);
  }

  sums.each_pair([&](int row, int column, float left, float right) {
    row += first_row, column += first_column;
    if (row >= p.m || column >= p.pairs * p.r) return;
    const int64_t matrix = int64_t{place.split} * p.pairs + column / p.r;
    device::store(reinterpret_cast<float2*>(p.partials + ((matrix * p.m + row) * p.r + column % p.r)),
                  make_float2(left, right));
  });
}

// --- outputs ---

// The middle of the block's rows, rounded, into shared memory, zeros behind each pair's rank; and into h by one of the
// blocks that have these rows.
template <class Config>
LOWFAT_DEVICE void round_middle(const OutputParams& p, uint4* smem, int first_row, bool keeps_h) {
  using T = typename Config::Element;
  const int of_pair = padded_rank(p.r) / 8, of_row = p.pairs * of_pair, stride = row_pieces(p.pairs * padded_rank(p.r));
  const int64_t split_stride = int64_t{p.pairs} * p.m * p.r;
  for (int i = threadIdx.x; i < kTile * of_row; i += kThreads) {
    const int row = i / of_row, piece = i % of_row, rank = piece % of_pair * 8;
    uint4 rounded = device::zero16();
    if (first_row + row < p.m && rank < p.r) {
      const int64_t at = (int64_t{piece / of_pair} * p.m + first_row + row) * p.r + rank;
      const float4 a = device::sum_of_splits<Config::kSplitsAtOnce>(p.partials + at, split_stride, p.splits);
      const float4 b = device::sum_of_splits<Config::kSplitsAtOnce>(p.partials + at + 4, split_stride, p.splits);
      const float s = p.h_scale;
      rounded = make_uint4(device::pack2<T>(s * a.x, s * a.y), device::pack2<T>(s * a.z, s * a.w),
                           device::pack2<T>(s * b.x, s * b.y), device::pack2<T>(s * b.z, s * b.w));
      if (keeps_h) device::store16(p.h + at, rounded);
    }
    device::store16_shared(smem + (row * stride + piece), rounded);
  }
}

// A tile's factor, of all pairs: u in rows of coefficients, v in rows of the rank; zeros behind both.
template <class Config>
LOWFAT_DEVICE void copy_factor(const OutputParams& p, uint4* smem, int first_coefficient) {
  constexpr int kPieces = kTile / 8;
  const int rank = padded_rank(p.r);
  if constexpr (Config::kIsAlong) {
    const int of_row = rank / 8, stride = row_pieces(rank);
    for (int i = threadIdx.x; i < p.pairs * kTile * of_row; i += kThreads) {
      const int row = i / of_row, piece = i % of_row, coefficient = first_coefficient + row % kTile;
      device::copy16_async(smem + (row * stride + piece),
                           p.factor + place_in_u(p.r, p.width, row / kTile, piece * 8, coefficient),
                           coefficient < p.width && piece * 8 < p.r);
    }
  } else {
    for (int i = threadIdx.x; i < p.pairs * rank * kPieces; i += kThreads) {
      const int row = i / kPieces, piece = i % kPieces, coefficient = first_coefficient + piece * 8;
      device::copy16_async(smem + tile_piece(kPieces, row, piece),
                           p.factor + place_in_v(p.pairs, p.width, row / rank, row % rank, coefficient),
                           coefficient < p.width && row % rank < p.r);
    }
  }
}

// A warp has 32 rows and 16 coefficients, of both halves.
template <class Config>
struct Halves {
  using Sizes = typename Config::Sizes;
  using T = typename Config::Element;
  static constexpr int kRows = Sizes::kRowFragments, kColumns = Sizes::kColumnFragments;
  static_assert(kColumns == 2, "a warp's coefficients are one load of the factor");
  float sums[2][kRows][kColumns][4];

  LOWFAT_DEVICE Halves() { device::clear(sums[0]), device::clear(sums[1]); }

  LOWFAT_DEVICE void multiply(const OutputParams& p, const uint4* smem_middle, const uint4* smem_factor) {
    const int rank = padded_rank(p.r), stride = row_pieces(p.pairs * rank), lane = device::lane_index();
    const device::Position warp = low_rank::warp_place<Sizes>(), a_row = device::ldmatrix_row(lane);
    const device::Position b_row = Config::kIsAlong ? device::ldmatrix_pair_row(lane) : device::ldmatrix_row(lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < pairs_at(p.pairs, half); ++i) {
        const int pair = Config::kIsAlong ? pair_into(p.pairs, half, i) : pair_from(p.pairs, half, i);
        for (int depth = 0; depth < rank; depth += 16) {
          uint32_t a[kRows][4], b[4];
#pragma unroll
          for (int row = 0; row < kRows; ++row) {
            device::ldmatrix<4>(a[row], smem_middle + ((warp.row + row * 16 + a_row.row) * stride +
                                                       (pair * rank + depth + a_row.column) / 8));
          }
          if constexpr (Config::kIsAlong) {
            const int row = pair * kTile + warp.column + b_row.row;
            device::ldmatrix<4>(b, smem_factor + (row * row_pieces(rank) + (depth + b_row.column) / 8));
          } else {
            const int row = pair * rank + depth + b_row.row;
            device::ldmatrix_transposed<4>(b, smem_factor + tile_piece(kTile / 8, row, (warp.column + b_row.column) / 8));
          }
#pragma unroll
          for (int row = 0; row < kRows; ++row) {
#pragma unroll
            for (int column = 0; column < kColumns; ++column) {
              const uint32_t of_column[2] = {b[2 * column], b[2 * column + 1]};
              device::mma_m16n8k16<T>(sums[half][row][column], a[row], of_column);
            }
          }
        }
      }
    }
  }

  // Two coefficients are four features, 8 bytes; the lanes of a quad have a sector of 32.
  LOWFAT_DEVICE void store(const OutputParams& p, int first_row, int first_coefficient) const {
    const device::Position warp = low_rank::warp_place<Sizes>();
    const float s = p.y_scale;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const device::Position at = device::mma_d(device::lane_index(), e);
          const int row = first_row + warp.row + i * 16 + at.row;
          const int coefficient = first_coefficient + warp.column + j * 8 + at.column;
          if (row >= p.m || coefficient >= p.width) continue;
          const float low = sums[0][i][j][e], high = sums[1][i][j][e];
          const float next_low = sums[0][i][j][e + 1], next_high = sums[1][i][j][e + 1];
          const uint2 four = make_uint2(device::pack2<T>(s * (low + high), s * (low - high)),
                                        device::pack2<T>(s * (next_low + next_high), s * (next_low - next_high)));
          device::store(reinterpret_cast<uint2*>(p.y + (int64_t{row} * p.width + coefficient) * 2), four);
        }
      }
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) outputs(const __grid_constant__ OutputParams p) {
  auto* smem_middle = reinterpret_cast<uint4*>(device::shared_memory());
  uint4* smem_factors = smem_middle + middle_pieces(p.r, p.pairs);
  const int first_row = blockIdx.x / p.parts * kTile, part = blockIdx.x % p.parts;
  const low_rank::Range tiles = low_rank::share(parts_of(p.width, kTile), p.parts, part);
  const auto factor_of = [&](int tile) {
    return smem_factors + tile % 2 * factor_pieces(p.r, p.pairs, Config::kIsAlong);
  };
  const auto copy = [&](int tile) {
    if (tile < tiles.last) copy_factor<Config>(p, factor_of(tile), tile * kTile);
    device::commit_copies();
  };
  copy(tiles.first);
  round_middle<Config>(p, smem_middle, first_row, p.h && part == 0);
  for (int tile = tiles.first; tile < tiles.last; ++tile) {
    device::wait_copies<0>();
    __syncthreads();  // shows the copies, and the middle; and that nobody still reads where the next tile's go
    copy(tile + 1);
    Halves<Config> halves;
    halves.multiply(p, smem_middle, factor_of(tile));
    halves.store(p, first_row, tile * kTile);
  }
}

// --- launch ---

template <class Config>
const char* launch_middle(const MiddleParams& p, void* stream) {
  device::Launch shape;
  shape.grid = dim3(p.row_tiles * p.column_tiles * p.splits);
  shape.threads = Config::kThreads;
  shape.smem_bytes = sizeof(typename Config::Shared);
  shape.stream = stream;
  return device::launch(middle<Config>, shape, p);
}

template <class Config>
const char* launch_outputs(const OutputParams& p, void* stream) {
  device::Launch shape;
  shape.grid = dim3(parts_of(p.m, kTile) * p.parts);
  shape.threads = Config::kThreads;
  shape.smem_bytes = output_smem_bytes(p.r, p.pairs, Config::kIsAlong);
  shape.stream = stream;
  return device::launch(outputs<Config>, shape, p);
}

// Both, from `size` features through `first` to `outputs` features by `second`.
template <class T, bool kIsBackward>
const char* launch_both(const ForwardPlan& plan, MiddleParams p, OutputParams out, void* stream) {
  if (plan.splits == 0) return "the plan does not cover these sizes";
  p.row_tiles = parts_of(p.m, kTile), p.column_tiles = parts_of(p.pairs * p.r, kTile), p.splits = plan.splits;
  if (const char* error = launch_middle<MiddleConfig<T, !kIsBackward>>(p, stream)) return error;
  out.m = p.m, out.r = p.r, out.pairs = p.pairs, out.partials = p.partials;
  out.splits = plan.splits, out.parts = out.width > 0 ? plan.parts : 1;
  return launch_outputs<OutputConfig<T, !kIsBackward>>(out, stream);
}

const char* launch_forward(const ForwardPlan& plan, const ForwardOperands& o, Dtype dtype, void* stream) {
  const MiddleParams p{o.x, o.v, o.partials, o.m, o.k / 2, o.r, o.pairs, 0, 0, 0};
  OutputParams out{};
  out.factor = o.u, out.h = o.h, out.y = o.y, out.width = o.y ? o.n / 2 : 0;
  out.h_scale = kRootHalf, out.y_scale = o.scale * kRootHalf;
  return dtype == Dtype::bfloat16 ? launch_both<device::Bf16, false>(plan, p, out, stream)
                                  : launch_both<device::Fp16, false>(plan, p, out, stream);
}

const char* launch_input_gradient(const ForwardPlan& plan, const BackwardOperands& o, Dtype dtype, void* stream) {
  const MiddleParams p{o.dy, o.u, o.partials, o.m, o.n / 2, o.r, o.pairs, 0, 0, 0};
  OutputParams out{};
  out.factor = o.v, out.h = o.needs & kNeedsDv ? o.dh : nullptr;
  if (o.needs & kNeedsDx) out.y = o.dx, out.width = o.k / 2;
  out.h_scale = o.scale * kRootHalf, out.y_scale = kRootHalf;
  return dtype == Dtype::bfloat16 ? launch_both<device::Bf16, true>(plan, p, out, stream)
                                  : launch_both<device::Fp16, true>(plan, p, out, stream);
}

}  // namespace wavelet
