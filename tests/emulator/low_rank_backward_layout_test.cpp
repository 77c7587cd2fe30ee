// Who does what in the backward kernels of low_rank, for every size in range: each piece and each tile once, no bank twice.
#include "low_rank/backward.h"

#include <set>
#include <vector>

#include "check.h"

namespace {

using namespace low_rank;

constexpr int kTiles[] = {kSmallTile, kLargeTile};

// Rows and pieces in a row of both operands of a tile: across the contraction, and along it.
std::vector<std::pair<int, int>> operands_of(int tile) {
  return {{tile_depth(tile), tile / 8}, {tile, tile_depth(tile) / 8}};
}

void each_piece_has_its_place(uint64_t) {
  for (int tile : kTiles) {
    for (const auto& [rows, pieces] : operands_of(tile)) {
      std::vector<int> uses(rows * pieces);
      for (int row = 0; row < rows; ++row) {
        for (int piece = 0; piece < pieces; ++piece) ++uses.at(tile_piece(pieces, row, piece));
      }
      for (size_t i = 0; i < uses.size(); ++i) check::equal(uses[i], 1, "uses of a place", i);
    }
  }
}

// The eight lanes that the memory serves at a time have eight groups of four banks.
void lanes_meet_no_bank_twice(uint64_t) {
  for (int tile : kTiles) {
    for (const auto& [rows, pieces] : operands_of(tile)) {
      for (int first = 0; first < rows; first += 8) {  // ldmatrix, of either kind: a column of eight rows
        for (int piece = 0; piece < pieces; ++piece) {
          std::set<int> groups;
          for (int row = first; row < first + 8; ++row) groups.insert(tile_piece(pieces, row, piece) % 8);
          check::equal(groups.size(), 8, "groups of banks, a read; row", first);
        }
      }
      for (int thread = 0; thread < rows * pieces; thread += 8) {  // copies: neighbouring pieces
        std::set<int> groups;
        for (int i = thread; i < thread + 8; ++i) groups.insert(tile_piece(pieces, i / pieces, i % pieces) % 8);
        check::equal(groups.size(), 8, "groups of banks, a copy; piece", thread);
      }
    }
    std::set<int> banks;  // a tile of c: written as pairs of a fragment, read as pieces
    for (int lane = 0; lane < 32; ++lane) {
      const device::Position at = device::mma_d(lane, 0);
      banks.insert((at.row * c_stride(tile) + at.column) * 2 / 4 % 32);
    }
    check::equal(banks.size(), 32, "banks of a write of c; tile", tile);
    check::that(c_stride(tile) % 8 == 0 && c_stride(tile) >= tile, "rows of c are 16-byte aligned and have room", tile);
    check::that(tile * c_stride(tile) * 2 <= kBackwardStages * 16384, "c fits where the stages were", tile);
  }
}

// The matrices that a lane's rows select become the registers of mma_a (transposed) and of two mma_b.
void transposed_matrices_are_the_fragments(uint64_t) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {  // register i / 2 has row 2 (lane % 4) + i % 2, column lane / 4 of its matrix
      const int matrix = i / 2, row = lane % 4 * 2 + i % 2, column = lane / 4;
      const device::Position first = transposed_a_row(matrix * 8);
      const device::Position a = device::mma_a(lane, i);
      check::that(a.column == first.row + row && a.row == first.column + column, "an element of a, lane", lane);
      const device::Position first_b = device::ldmatrix_row(matrix * 8), b = device::mma_b(lane, i % 4);
      check::equal(b.row, first_b.row + row, "the row of an element of b, lane", lane);
      check::equal(i / 4 * 8 + b.column, first_b.column + column, "the column of an element of b, lane", lane);
    }
    check::equal(transposed_a_row(lane).row, transposed_a_row(lane / 8 * 8).row + lane % 8, "rows of a matrix, lane", lane);
  }
}

void each_tile_and_split_has_one_block(uint64_t) {
  for (int row_tiles = 1; row_tiles < 20; ++row_tiles) {
    for (int column_tiles = 1; column_tiles < 20; ++column_tiles) {
      for (int splits : {1, 2, 5}) {
        std::set<int> places;
        const int count = row_tiles * column_tiles * splits;
        for (int index = 0; index < count; ++index) {
          const Place at = place_of(row_tiles, column_tiles, index);
          check::that(at.row_tile >= 0 && at.row_tile < row_tiles, "row tile", index);
          check::that(at.column_tile >= 0 && at.column_tile < column_tiles, "column tile", index);
          check::that(at.split >= 0 && at.split < splits, "split", index);
          places.insert((at.split * 20 + at.row_tile) * 20 + at.column_tile);
        }
        check::equal(places.size(), count, "places; row tiles", row_tiles);
      }
    }
  }
  const Place wide = place_of(2, 9, 1), high = place_of(9, 2, 1);
  check::that(wide.row_tile == 1 && high.column_tile == 1, "the shorter side changes first");
}

void splits_share_the_contraction(uint64_t) {
  for (int tile : kTiles) {
    for (int depth = 1; depth < 3000; depth += 1 + depth / 50) {
      const int steps = parts_of(depth, tile_depth(tile));
      for (int splits = 1; splits <= steps; splits += 1 + splits / 4) {
        int next = 0;
        for (int split = 0; split < splits; ++split) {
          const Range mine = steps_of_split(tile, depth, splits, split);
          check::equal(mine.first, next, "splits follow each other; depth", depth);
          check::that(mine.last > mine.first, "no split is empty; depth", depth);
          next = mine.last;
        }
        check::that(next * tile_depth(tile) >= depth && (next - 1) * tile_depth(tile) < depth, "all of it; depth", depth);
      }
    }
  }
}

void plans_keep_their_limits(uint64_t) {
  for (int64_t m : {1, 64, 65, 130, 2048, 65536, 1 << 24}) {
    for (int64_t n : {8, 768, 4096, 14336, 128256}) {
      for (int64_t k : {8, 1024, 4096, 28672}) {
        for (int64_t r : {8, 64, 72, 128, 256, 1024}) {
          for (int sm_count : {1, 20, 108, 132}) {
            for (int needs = 1; needs < 16; ++needs) {
              for (bool is_added : {false, true}) {
                const BackwardPlan plan = plan_backward(m, n, k, r, needs, is_added, sm_count);
                if (plan.tile == 0) {
                  check::that(m * k / 64 / 64 > kBackwardMaxBlocks / 4, "covered, or too large; m", m);
                  continue;
                }
                check::equal(plan.tile, m <= 64 || r <= 64 ? 64 : 128, "tile; r", r);
                check::that(plan.is_added == is_added, "what is done with gradients");
                const auto fits = [&](int splits, int64_t tiles, int64_t depth) {
                  const int64_t steps = device::ceil_div(depth, tile_depth(plan.tile));
                  check::that(splits >= 1 && splits <= steps, "each split has a step; m", m);
                  check::that(splits == 1 || splits * tiles <= 2 * sm_count, "two blocks to a multiprocessor; m", m);
                  check::that(splits * tiles <= int64_t{1} << 31, "blocks of a grid; m", m);
                };
                fits(plan.dh_splits, tiles_of(m, r, plan.tile), n);
                fits(plan.weight_splits, larger(1, int(weight_tiles(n, k, r, needs, plan.tile))), m);
                check::that(plan.dh_splits == 1 || needs & 3, "dh is wanted");
                const int64_t dh = plan.dh_splits * m * r, weights = plan.weight_splits * weight_elements(n, k, r, needs);
                check::that(plan.dh_splits == 1 || plan.partials >= dh, "room for dh; m", m);
                check::that((plan.weight_splits == 1 && !is_added) || plan.partials >= weights, "room for weights; m", m);
                check::that(plan.partials <= (dh > weights ? dh : weights), "no more than that; m", m);
                const bool is_direct = plan.dh_splits == 1 && plan.weight_splits == 1 && !is_added;
                check::that(!is_direct || plan.partials == 0, "no room where there are no partials; m", m);
              }
            }
          }
        }
      }
    }
  }
  check::equal(plan_backward(8192, 4096, 4096, 128, 15, false, 132).weight_splits, 4, "64 tiles on 132 multiprocessors");
  check::equal(plan_backward(8192, 4096, 4096, 128, 15, false, 132).dh_splits, 4, "of dh, too");
  for (int64_t m : {int64_t{0}, int64_t{1} << 40}) check::equal(plan_backward(m, 8, 8, 8, 15, false, 132).tile, 0, "m", m);
  for (int64_t n : {0, 4, 12}) check::equal(plan_backward(64, n, 8, 8, 15, false, 132).tile, 0, "n", n);
  for (int64_t k : {0, 4, 12}) check::equal(plan_backward(64, 8, k, 8, 15, false, 132).tile, 0, "k", k);
  for (int64_t r : {0, 4, 12}) check::equal(plan_backward(64, 8, 8, r, 15, false, 132).tile, 0, "r", r);
}

// Nothing that has not been measured: see choose_backward.
void kernels_are_chosen_where_they_are_meant(uint64_t) {
  const auto tile = [](int64_t m, int64_t n, int64_t k, int64_t r, Dtype dtype, int arch = 90, bool is_aligned = true) {
    return choose_backward({m, n, k, r, dtype, Device::cuda, CpuLevel::scalar, arch, 132, is_aligned}, 15).tile;
  };
  const Dtype bf16 = Dtype::bfloat16;
  for (int64_t m : {0, 1, 63}) check::equal(tile(m, 4096, 4096, 128, bf16), 0, "fewer rows", m);
  check::equal(tile(64, 4096, 4096, 128, bf16), kSmallTile, "64 rows");
  check::equal(tile(65, 4096, 4096, 256, Dtype::float16), kLargeTile, "65 rows");
  check::equal(tile(8192, 4096, 4096, 264, bf16), 0, "rank 264");
  check::equal(tile(8192, 4100, 4096, 128, bf16), 0, "rows of dy that are not 16-byte aligned");
  check::equal(tile(8192, 4096, 4096, 128, bf16, 90, false), 0, "operands that are not");
  for (Dtype dtype : {Dtype::float32, Dtype::float64}) check::equal(tile(8192, 4096, 4096, 128, dtype), 0, "dtypes");
  for (int arch : {75, 100, 120}) check::equal(tile(8192, 4096, 4096, 128, bf16, arch), 0, "other GPUs", arch);
  for (int arch : {80, 86, 89, 90}) check::equal(tile(8192, 4096, 4096, 128, bf16, arch), kLargeTile, "GPUs", arch);
  const auto path = [](int64_t m, int64_t r) {
    return std::get<std::string>(describe_backward<false>({m, 4096, 4096, r, Dtype::bfloat16, Device::cuda}).front().second);
  };
  check::that(path(8192, 128) == "kernels" && path(8192, 512) == "library" && path(0, 128) == "empty", "in words");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"each piece has its place", each_piece_has_its_place},
                     {"lanes meet no bank twice", lanes_meet_no_bank_twice},
                     {"transposed matrices are the fragments", transposed_matrices_are_the_fragments},
                     {"each tile and split has one block", each_tile_and_split_has_one_block},
                     {"splits share the contraction", splits_share_the_contraction},
                     {"plans keep their limits", plans_keep_their_limits},
                     {"kernels are chosen where they are meant", kernels_are_chosen_where_they_are_meant}},
                    1);
}
