// Who does what in the backward kernels of monarch, and where it lies: pure functions of the sizes, for kernels, the host and
// tests.
//
// Every gradient but the bias's is a product of each block, c [rows, columns] = a b over a contraction `depth`. A tile has
// 256 rows times 64 columns, the rows those of one block or parts of several neighbouring blocks (a group): a warp has 32
// rows of one block. The contraction of a weight's gradient, the tokens, is cut into splits.
#pragma once

#include <cstdint>

#include "device/layout.h"
#include "monarch/batched_layout.h"

namespace monarch {

constexpr int kTileRows = 256, kTileColumns = 64;  // of all blocks of a group
constexpr int kPartRows = 32;                      // of a warp
constexpr int kBackwardThreads = kTileRows;        // a warp for 32 rows
constexpr int kBackwardStages = 3;                 // of the contraction: one in use, two on their way

// --- what is multiplied ---

constexpr int64_t kUnbounded = int64_t{1} << 62;

// A matrix of each block. Element (row, column) of block b is at offset(b, row, column).
struct Matrix {
  int64_t block_step;  // elements from a block to the next
  int64_t row_step;
  int columns;                 // of a block
  int64_t width = kUnbounded;  // of a row with all blocks: what lies beyond is padding and has no memory
  int spacing = 1;             // elements from column to column
  int run = 1 << 30;           // rows i, i + 1 of a run lie run_step rows apart, and runs one
  int run_step = 1;
  int unit = 1 << 30;  // columns that are neighbours; units are unit_step apart
  int64_t unit_step = 0;

  LOWFAT_CONSTEXPR int row_at(int row) const { return run_step == 1 ? row : row % run * run_step + row / run; }
  LOWFAT_CONSTEXPR int64_t in_row(int block, int column) const { return block * block_step + int64_t{column} * spacing; }
  LOWFAT_CONSTEXPR bool has(int block, int column) const { return column < columns && in_row(block, column) < width; }
  LOWFAT_CONSTEXPR int64_t offset(int block, int row, int column) const {
    return block * block_step + row_at(row) * row_step + column / unit * unit_step + int64_t{column % unit} * spacing;
  }
};

struct Product {
  int blocks, rows, columns, depth;
  bool is_across;  // a lies [depth, rows], else [rows, depth]; b always [depth, columns]
  Matrix a, b, c;
};

LOWFAT_CONSTEXPR int q_of(const Sizes& s) { return s.r * s.b_out; }
LOWFAT_CONSTEXPR int t_of(const Sizes& s) { return s.r * s.b_in; }

// One block's part of the rows of x and dx, of dy.
LOWFAT_CONSTEXPR Matrix inputs_of(const Sizes& s) { return {s.p(), s.k, s.p(), s.k}; }
LOWFAT_CONSTEXPR Matrix outputs_of(const Sizes& s) {
  return {s.interleave ? 1 : s.s(), s.n, s.s(), s.n, s.interleave ? s.b_out : 1};
}

// The middle of dx, dz [b_in, m, b_out r], has its columns by output block and then by rank: whole runs of a block's results
// in the first product; and in the second the rows of v in that order.
LOWFAT_CONSTEXPR Matrix first_factor(const Sizes& s) {
  return {int64_t{q_of(s)} * s.p(), s.p(), s.p(), kUnbounded, 1, s.r, s.b_out};
}
LOWFAT_CONSTEXPR Matrix second_factor(const Sizes& s) { return {int64_t{s.s()} * t_of(s), t_of(s), t_of(s)}; }

// dz = dy u, of each output block: column i r + j goes to input block i.
LOWFAT_CONSTEXPR Product dz_product(const Sizes& s) {
  Product p{s.b_out, s.m, t_of(s), s.s(), false, outputs_of(s), second_factor(s), {s.r, q_of(s), t_of(s)}};
  p.c.unit = s.r, p.c.unit_step = int64_t{s.m} * q_of(s);
  return p;
}

// dx = dz v, of each input block.
LOWFAT_CONSTEXPR Product dx_product(const Sizes& s) {
  return {s.b_in, s.m, s.p(), q_of(s), false, {int64_t{s.m} * q_of(s), q_of(s), q_of(s)}, first_factor(s), inputs_of(s)};
}

// dv = dz^T x, of each input block.
LOWFAT_CONSTEXPR Product dv_product(const Sizes& s) {
  return {s.b_in, q_of(s), s.p(), s.m, true, {int64_t{s.m} * q_of(s), q_of(s), q_of(s)}, inputs_of(s), first_factor(s)};
}

// du = dy^T h, of each output block.
LOWFAT_CONSTEXPR Product du_product(const Sizes& s) {
  return {s.b_out, s.s(), t_of(s), s.m, true, outputs_of(s), {int64_t{s.m} * t_of(s), t_of(s), t_of(s)}, second_factor(s)};
}

// --- shared memory: stages of a, then of b; at the end the tile of c ---

// Of a stage, along the contraction: b of all blocks grows with the group.
LOWFAT_CONSTEXPR int product_depth(int group) { return group == 1 ? 32 : 16; }

LOWFAT_CONSTEXPR int rows_of_group(int group) { return kTileRows / group; }  // of each block

// 16-byte pieces of a row of a. All blocks of the group share the row: block after block, or, where their elements lie
// between each other, as in global memory.
LOWFAT_CONSTEXPR int pieces_of_a(int group, bool is_across) {
  return (is_across ? kTileRows : group * product_depth(group)) / 8;
}
constexpr int kPiecesOfB = kTileColumns / 8;  // rows of b: those of the contraction of the first block, of the next...

// Where 16-byte piece `piece` of row `row` lies, counted in pieces: moved within the row, so that one column's pieces of
// eight neighbouring rows lie in different banks. A row has 4 pieces or a multiple of 8.
LOWFAT_CONSTEXPR int piece_at(int row_pieces, int row, int piece) {
  return row * row_pieces + (row_pieces == 4 ? piece ^ row / 2 % 4 : piece ^ row % 8);
}

LOWFAT_CONSTEXPR int bytes_of_a(int group) { return kTileRows * product_depth(group) * 2; }
LOWFAT_CONSTEXPR int product_stage_bytes(int group) {
  return bytes_of_a(group) + group * product_depth(group) * kTileColumns * 2;
}
constexpr int kStrideOfC = kTileColumns + 8;  // elements: lanes with 8 rows x 4 pairs of columns meet no bank twice
LOWFAT_CONSTEXPR int product_smem_bytes(int group) {
  return larger(kBackwardStages * product_stage_bytes(group), kTileRows * kStrideOfC * 2);
}

// --- tiles and splits ---

struct ProductPlan {
  int group = 0;         // blocks; 0: this product is not covered
  bool gathers = false;  // the group's elements of a lie between each other
  int groups = 0, row_tiles = 0, column_tiles = 0, splits = 1;
  int grid = 0;
};

struct ProductPlace {
  int block, row, column, split;  // the first of the group and of the tile
};

// Tiles of the same rows follow each other: they read the same part of a, which is the larger operand.
LOWFAT_CONSTEXPR ProductPlace place_of(const ProductPlan& plan, int index) {
  const int column_tile = index % plan.column_tiles, rest = index / plan.column_tiles;
  const int group = rest % plan.groups, rows = rest / plan.groups;
  return {group * plan.group, rows % plan.row_tiles * rows_of_group(plan.group), column_tile * kTileColumns,
          rows / plan.row_tiles};
}

struct Steps {
  int first, last;
};

// Of one stage each. In 32 bits, where products of the steps of kMaxRows tokens and the splits of any GPU have room.
LOWFAT_CONSTEXPR Steps steps_of_split(const Product& p, const ProductPlan& plan, int split) {
  const int steps = parts_of(p.depth, product_depth(plan.group));
  return {steps * split / plan.splits, steps * (split + 1) / plan.splits};
}

constexpr int kResidentBlocks = 2;    // of threads, on a multiprocessor
constexpr int kProductLeastSteps = 4;  // of a split: below, filling the stages takes longer than using them

// Pieces of 16 bytes that hold one column of several blocks each, or several columns of all blocks, want 2, 4 or 8 blocks in
// a group; else a group has several blocks where one alone would leave most of a tile empty. 0: not covered.
LOWFAT_CONSTEXPR int group_of(const Product& p) {
  if (p.a.spacing > 1) return p.blocks % 8 == 0 ? 8 : p.blocks == 2 || p.blocks == 4 ? p.blocks : 0;
  return p.blocks > 1 && p.rows <= kTileRows / 2 ? 4 : 1;
}

LOWFAT_CONSTEXPR ProductPlan plan_product(const Product& p, int sm_count) {
  ProductPlan plan;
  const int group = group_of(p);
  if (group == 0) return plan;
  const int64_t groups = device::ceil_div(p.blocks, group), row_tiles = device::ceil_div(p.rows, rows_of_group(group));
  const int64_t column_tiles = larger(1, parts_of(p.columns, kTileColumns)), tiles = groups * row_tiles * column_tiles;
  if (tiles > kMaxGrid) return plan;
  plan.group = group;
  plan.gathers = p.a.spacing > 1;
  plan.groups = static_cast<int>(groups), plan.row_tiles = static_cast<int>(row_tiles);
  plan.column_tiles = static_cast<int>(column_tiles);
  if (p.is_across) {
    const int64_t room = kResidentBlocks * sm_count / tiles;
    plan.splits = larger(1, smaller(parts_of(p.depth, product_depth(group)) / kProductLeastSteps, static_cast<int>(room)));
  }
  plan.grid = static_cast<int>(tiles) * plan.splits;
  return plan;
}

// How a tile's results are stored: in pieces of 16 bytes that lie along a row of the tile, or have elements of several blocks.
enum class Stores { elements, along, across };

LOWFAT_CONSTEXPR Stores stores_of(const Product& p, const ProductPlan& plan) {
  if (p.columns % 8 == 0 && p.c.unit % 8 == 0 && p.c.block_step % 8 == 0) return Stores::along;
  const bool is_dealt = plan.gathers && p.c.unit < 8 && 8 % p.c.unit == 0 && plan.group * p.c.unit % 8 == 0;
  return is_dealt ? Stores::across : Stores::elements;
}

// --- the plan of a call ---

enum Needs { kNeedsDx = 1, kNeedsDv = 2, kNeedsDu = 4, kNeedsDb = 8 };

struct BackwardPlan {
  bool is_covered = false;
  ProductPlan dz, dx, dv, du;  // those that are needed
  Plan middle;                 // of h, should it have to be made
  int64_t partials = 0;        // floats of workspace: what splits have summed, of dv, du and db in turn
};

LOWFAT_CONSTEXPR int64_t partials_of(const BackwardPlan& plan, const Sizes& s, int needs) {
  const int64_t of_dv = int64_t{s.b_in} * q_of(s) * s.p(), of_du = int64_t{s.b_out} * s.s() * t_of(s);
  const int64_t with_dy = (needs & kNeedsDu ? of_du : 0) + (needs & kNeedsDb ? s.n : 0);
  return (plan.dv.splits > 1 ? plan.dv.splits * of_dv : 0) + (plan.du.splits > 1 ? plan.du.splits * with_dy : 0);
}

// Rows of 16-byte pieces: of dy, dz and its factors, beyond what the forward product asks for.
LOWFAT_CONSTEXPR bool has_covered_gradients(int64_t m, int64_t n, int64_t k, int64_t b_in, int64_t b_out, int64_t r,
                                            bool interleave) {
  if (!is_covered(m, n, k, b_in, b_out, r) || n % 8 != 0 || b_out * r % 8 != 0) return false;
  return interleave || b_out == 1 || device::ceil_div(n, b_out) % 8 == 0;
}

// du without columns: db alone is summed on the way.
LOWFAT_CONSTEXPR Product du_or_db_product(const Sizes& s, int needs) {
  Product p = du_product(s);
  if (!(needs & kNeedsDu)) p.columns = p.b.columns = 0;
  return p;
}

// What the kernels can do; whether they should is another question (choose_backward).
LOWFAT_CONSTEXPR BackwardPlan plan_backward(int64_t m, int64_t n, int64_t k, int64_t b_in, int64_t b_out, int64_t r,
                                            bool interleave, int needs, int sm_count, int smem_limit) {
  BackwardPlan plan;
  if (sm_count < 1 || !has_covered_gradients(m, n, k, b_in, b_out, r, interleave)) return plan;
  const Sizes s{static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), static_cast<int>(b_in),
                static_cast<int>(b_out), static_cast<int>(r), interleave};
  plan.is_covered = true;
  const auto make = [&](const Product& p) {
    const ProductPlan made = plan_product(p, sm_count);
    if (made.group == 0 || product_smem_bytes(made.group) > smem_limit) plan.is_covered = false;
    return made;
  };
  if (needs & (kNeedsDx | kNeedsDv)) plan.dz = make(dz_product(s));
  if (needs & kNeedsDx) plan.dx = make(dx_product(s));
  if (needs & kNeedsDv) plan.dv = make(dv_product(s));
  if (needs & (kNeedsDu | kNeedsDb)) plan.du = make(du_or_db_product(s, needs));
  if (needs & kNeedsDu) {
    plan.middle = plan_batch(first_batch(s), sm_count, smem_limit);
    if (plan.middle.tokens == 0) plan.is_covered = false;
  }
  plan.partials = partials_of(plan, s, needs);
  return plan.is_covered ? plan : BackwardPlan();
}

}  // namespace monarch
