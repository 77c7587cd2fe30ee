// The steps of backward kernels: a block's square tile of c = a b, from stages of the contraction in shared memory. How the
// operands get there, and where c goes, each kernel says by its own. The picture is in backward.cu.
#pragma once

#include "device/async_copy.h"
#include "device/convert.h"
#include "device/load.h"
#include "device/mma.h"
#include "device/reduce.h"
#include "device/warp_product.h"
#include "low_rank/backward_layout.h"

namespace low_rank {

template <class T, bool kAcross, int kTileSize>
struct TileSizes {
  using Element = T;
  static constexpr bool kIsAcross = kAcross;  // weights: a lies [depth, rows]
  static constexpr int kTile = kTileSize;
  static constexpr int kDepth = tile_depth(kTile);
  static constexpr int kThreads = kBackwardThreads;
  static constexpr int kBlocks = kBackwardBlocks;  // that share a multiprocessor: 128 registers for each thread
  static constexpr int kPiecesOfA = (kIsAcross ? kTile : kDepth) / 8, kPiecesOfB = kTile / 8;  // 16 bytes each, of a row
  static constexpr int kRows = kTile / kBackwardWarpRows, kColumns = kTile / kBackwardWarpColumns;  // of a warp
  static constexpr int kRowFragments = kRows / 16, kColumnFragments = kColumns / 8;
  struct Operand {
    uint4 pieces[kTile * kDepth / 8];
  };
  static_assert(kDepth % 16 == 0 && kColumnFragments % 2 == 0, "ldmatrix moves 16 x 16 elements");
  static_assert(kTile * kDepth / 8 % kThreads == 0, "every thread copies as much");
  static_assert(kRowFragments <= kBackwardWarpColumns, "a warp sums one row fragment of a for the sums of its rows");
};

// --- operands ---

struct Matrix {
  const uint16_t* from;  // [rows, columns], 16-byte aligned rows
  int rows, columns;
  int64_t row_step;  // elements from row to row
};

// A thread's part in copying an operand stage by stage: the same piece of some rows. Zeros stand for what is outside of the
// matrix, along the contraction or not.
template <class Sizes, int kPieces, bool kMovesDown>
struct OperandCopies {
  const uint16_t* from;
  int row, column, rows, columns;
  int64_t row_step;

  LOWFAT_DEVICE OperandCopies(const Matrix& gmem, int first_row, int first_column)
      : row(first_row + threadIdx.x / kPieces),
        column(first_column + threadIdx.x % kPieces * 8),
        rows(gmem.rows),
        columns(gmem.columns),
        row_step(gmem.row_step) {
    from = gmem.from + (row * row_step + column);
  }

  LOWFAT_DEVICE void copy_next(uint4* smem) {
    constexpr int kTogether = Sizes::kThreads / kPieces;  // rows
    constexpr int kCopies = Sizes::kTile * Sizes::kDepth / 8 / Sizes::kThreads;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int down = i * kTogether, smem_row = threadIdx.x / kPieces + down;
      device::copy16_async(smem + tile_piece(kPieces, smem_row, threadIdx.x % kPieces), from + down * row_step,
                           row + down < rows && column < columns);
    }
    if (kMovesDown) {
      row += Sizes::kDepth;
      from += Sizes::kDepth * row_step;
    } else {
      column += Sizes::kDepth;
      from += Sizes::kDepth;
    }
  }
};

template <class Sizes>
using CopiesOfA = OperandCopies<Sizes, Sizes::kPiecesOfA, Sizes::kIsAcross>;
template <class Sizes>
using CopiesOfB = OperandCopies<Sizes, Sizes::kPiecesOfB, true>;

// Of a from a row of c and a depth on.
template <class Sizes>
LOWFAT_DEVICE CopiesOfA<Sizes> copies_of_a(const Matrix& a, int first_row, int first_depth) {
  return {a, Sizes::kIsAcross ? first_depth : first_row, Sizes::kIsAcross ? first_row : first_depth};
}

// Where a warp's part of a tile begins.
template <class Sizes>
LOWFAT_DEVICE device::Position warp_place() {
  const int warp = device::warp_index();
  return {warp / kBackwardWarpColumns * Sizes::kRows, warp % kBackwardWarpColumns * Sizes::kColumns};
}

template <class Sizes>
LOWFAT_DEVICE void load_fragments_a(uint32_t (&a)[Sizes::kRowFragments][4], const uint4* smem_a, int depth) {
  const int row = warp_place<Sizes>().row, lane = device::lane_index();
#pragma unroll
  for (int i = 0; i < Sizes::kRowFragments; ++i) {
    if constexpr (Sizes::kIsAcross) {
      const device::Position at = transposed_a_row(lane);
      const int piece = (row + i * 16 + at.column) / 8;
      device::ldmatrix_transposed<4>(a[i], smem_a + tile_piece(Sizes::kPiecesOfA, depth + at.row, piece));
    } else {
      const device::Position at = device::ldmatrix_row(lane);
      const int piece = (depth + at.column) / 8;
      device::ldmatrix<4>(a[i], smem_a + tile_piece(Sizes::kPiecesOfA, row + i * 16 + at.row, piece));
    }
  }
}

// Two column fragments at a time: rows 0..7 and 8..15 of the contraction of one, then of the other.
template <class Sizes>
LOWFAT_DEVICE void load_fragments_b(uint32_t (&b)[Sizes::kColumnFragments / 2][4], const uint4* smem_b, int depth) {
  const int column = warp_place<Sizes>().column;
  const device::Position at = device::ldmatrix_row(device::lane_index());
#pragma unroll
  for (int j = 0; j < Sizes::kColumnFragments / 2; ++j) {
    const int piece = (column + j * 16 + at.column) / 8;
    device::ldmatrix_transposed<4>(b[j], smem_b + tile_piece(Sizes::kPiecesOfB, depth + at.row, piece));
  }
}

// --- a tile's sums, and those of the rows of a ---

// Where a tile lies in c.
struct TileOfC {
  int first_row, first_column, rows, columns;  // rows and columns: of c
  int64_t row_step;
};

template <class Sizes>
struct TileSums {
  using T = typename Sizes::Element;
  float sums[Sizes::kRowFragments][Sizes::kColumnFragments][4];
  float a_sums[2];  // of one row fragment: a lane's pairs of rows lane / 4 and 8 below

  LOWFAT_DEVICE TileSums() {
    device::clear(sums);
    a_sums[0] = a_sums[1] = 0;
  }

  // The four warps beside each other have the same fragments of a: each sums one.
  LOWFAT_DEVICE void sum_a(const uint32_t (&a)[Sizes::kRowFragments][4]) {
#pragma unroll
    for (int i = 0; i < Sizes::kRowFragments; ++i) {
      if (device::warp_index() % kBackwardWarpColumns != i) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 pair = device::unpack2<T>(a[i][e]);
        a_sums[e % 2] += pair.x + pair.y;
      }
    }
  }

  LOWFAT_DEVICE void multiply(const uint4* smem_a, const uint4* smem_b, bool sums_a) {
#pragma unroll
    for (int depth = 0; depth < Sizes::kDepth; depth += 16) {
      uint32_t a[Sizes::kRowFragments][4], b[Sizes::kColumnFragments / 2][4];
      load_fragments_a<Sizes>(a, smem_a, depth);
      load_fragments_b<Sizes>(b, smem_b, depth);
#pragma unroll
      for (int i = 0; i < Sizes::kRowFragments; ++i) {
#pragma unroll
        for (int j = 0; j < Sizes::kColumnFragments; ++j) {
          const uint32_t of_column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          device::mma_m16n8k16<T>(sums[i][j], a[i], of_column);
        }
      }
      if (sums_a) sum_a(a);
    }
  }

  // Through all steps of a split: wait for one, ask for the one three ahead, multiply. The barrier shows everybody's copies,
  // and that nobody still reads where the next ones go.
  template <class Stage, int kStages>
  LOWFAT_DEVICE void multiply_steps(Stage (&smem_stages)[kStages], CopiesOfA<Sizes> a, CopiesOfB<Sizes> b, int steps,
                                    bool sums_a) {
    const auto copy = [&](int step) {
      if (step < steps) {
        a.copy_next(smem_stages[step % kStages].a.pieces);
        b.copy_next(smem_stages[step % kStages].b.pieces);
      }
      device::commit_copies();  // also of nothing: groups are counted
    };
    for (int step = 0; step < kStages - 1; ++step) copy(step);
    for (int step = 0; step < steps; ++step) {
      device::wait_copies<kStages - 2>();
      __syncthreads();
      copy(step + kStages - 1);
      multiply(smem_stages[step % kStages].a.pieces, smem_stages[step % kStages].b.pieces, sums_a);
    }
  }

  // Of each pair of neighbours in the tile: visit(row, column, their sums).
  template <class Visit>
  LOWFAT_DEVICE void each_pair(const Visit& visit) const {
    const device::Position warp = warp_place<Sizes>();
#pragma unroll
    for (int i = 0; i < Sizes::kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < Sizes::kColumnFragments; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const device::Position at = device::mma_d(device::lane_index(), 2 * half);
          visit(warp.row + i * 16 + at.row, warp.column + j * 8 + at.column, sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
      }
    }
  }

  LOWFAT_DEVICE void store_floats(float* gmem, const TileOfC& c) const {
    each_pair([&](int row, int column, float left, float right) {
      row += c.first_row, column += c.first_column;
      if (row >= c.rows || column >= c.columns) return;
      device::store(reinterpret_cast<float2*>(gmem + (row * c.row_step + column)), make_float2(left, right));
    });
  }

  // Through shared memory, where the stages were, to be written in pieces of 16 bytes.
  LOWFAT_DEVICE void store_rounded(uint16_t* gmem, const TileOfC& c, uint16_t* smem_c) const {
    __syncthreads();
    each_pair([&](int row, int column, float left, float right) {
      *reinterpret_cast<uint32_t*>(smem_c + row * c_stride(Sizes::kTile) + column) = device::pack2<T>(left, right);
    });
    __syncthreads();
    constexpr int kPieces = Sizes::kTile / 8;
    for (int i = threadIdx.x; i < Sizes::kTile * kPieces; i += Sizes::kThreads) {
      const int row = c.first_row + i / kPieces, column = c.first_column + i % kPieces * 8;
      if (row >= c.rows || column >= c.columns) continue;
      const uint16_t* from = smem_c + i / kPieces * c_stride(Sizes::kTile) + i % kPieces * 8;
      device::store16(gmem + (row * c.row_step + column), device::load16_shared(from));
    }
  }

  // Of the rows of a that the tile has: to rounded [rows], or where that is null to floats [splits, rows].
  LOWFAT_DEVICE void store_a_sums(uint16_t* rounded, float* floats, int split, int first_row, int rows) const {
    const int lane = device::lane_index(), fragment = device::warp_index() % kBackwardWarpColumns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = device::quad_sum(a_sums[half]);
      const int row = first_row + warp_place<Sizes>().row + fragment * 16 + device::mma_d(lane, 2 * half).row;
      if (lane % 4 != 0 || fragment >= Sizes::kRowFragments || row >= rows) continue;
      if (rounded) {
        device::store(rounded + row, device::narrow<T>(sum));
      } else {
        device::store(floats + (int64_t{split} * rows + row), sum);
      }
    }
  }
};

}  // namespace low_rank
