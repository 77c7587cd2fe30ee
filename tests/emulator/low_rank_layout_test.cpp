// Who does what in the decode kernels of low_rank, for every size in range: each element once, nothing outside, no bank twice.
#include "low_rank/decode_layout.h"

#include <set>
#include <vector>

#include "check.h"

namespace {

using namespace low_rank;

// Depths and ranks: all small ones, then ever fewer.
std::vector<int> multiples_of_8(int last) {
  std::vector<int> all;
  for (int value = 8; value <= last; value += value < 1100 ? 8 : value / 8 / 8 * 8 + 8) all.push_back(value);
  all.push_back(last);
  return all;
}

void each_element_of_k_is_read_once(uint64_t) {
  for (int k : multiples_of_8(kDecodeMaxDepth)) {
    for (int splits = 1; splits <= larger(1, k / 256); splits += 1 + splits / 8) {
      std::vector<uint8_t> reads(k / 8);
      for (int unit = 0; unit < first_units(8, splits); ++unit) {
        const FirstUnit one = first_unit(k, splits, unit);
        const int steps = parts_of(one.last_column - one.first_column, kDecodeWarps * kStep);
        check::that(one.tile == 0 && one.split == unit, "the splits of a tile follow each other", unit);
        check::that(one.last_column > one.first_column, "no split is empty; k", k);
        for (int warp = 0; warp < kDecodeWarps; ++warp) {
          check::that(first_column(one, warp, steps) >= one.last_column, "no step is left; k", k);
          for (int step = 0; step < steps; ++step) {
            for (int lane = 0; lane < 4; ++lane) {
              const int column = first_column(one, warp, step) + lane_column(lane);
              if (column < one.last_column) ++reads.at(column / 8);
            }
          }
        }
      }
      for (size_t i = 0; i < reads.size(); ++i) check::equal(reads[i], 1, "reads of a piece of k", i);
    }
  }
}

void each_row_of_v_has_a_tile(uint64_t) {
  for (int r : multiples_of_8(kDecodeMaxRank)) {
    for (int splits : {1, 3, 132}) {
      const int last = first_units(r, splits) - 1;
      check::equal(first_unit(splits * 256, splits, last).tile, (r - 1) / kTileRows, "the last tile; r", r);
      check::equal(first_unit(splits * 256, splits, last).split, splits - 1, "its last split; r", r);
    }
  }
}

// A tile of u belongs to one block, an item to one warp, a slot to one tile and warp.
void each_item_of_u_is_multiplied_once(uint64_t) {
  for (int n = 1; n < 70000; n += 1 + n / 7) {
    for (int r : {8, 24, 32, 40, 96, 512, 520, 1024, 2048}) {
      for (int grid : {1, 2, 7, 128, 132}) {
        int tiles = 0;
        for (int block = 0; block < grid; ++block) {
          const SecondShare mine = second_share(n, r, grid, block);
          check::equal(mine.tiles.first, tiles, "blocks follow each other; n", n);
          tiles = mine.tiles.last;
          const int count = tiles - mine.tiles.first;
          check::that(count <= parts_of(parts_of(n, kTileRows), grid), "no block has more than it has room for; n", n);
          if (block > 2 && block < grid - 2) continue;  // the others are alike
          std::vector<std::set<int>> warps(count);
          int item = 0;
          for (int warp = 0; warp < kDecodeWarps; ++warp) {
            const Range items = warp_items(mine, warp);
            check::equal(items.first, item, "warps follow each other; n", n);
            for (; item < items.last; ++item) warps[item / mine.steps].insert(warp);
          }
          check::equal(item, items_of(mine), "all items are dealt; n", n);
          std::set<int> slots;
          for (int tile = 0; tile < count; ++tile) {
            const Range due = warps_of_tile(mine, tile);
            check::equal(due.last - due.first, warps[tile].size(), "warps of a tile; n", n);
            for (int warp = due.first; warp < due.last; ++warp) {
              check::that(warps[tile].count(warp), "each of them has items of it; n", n);
              check::that(slots.insert(slot_of(tile, warp)).second, "a slot is used once; n", n);
              check::that(slot_of(tile, warp) < slots_for(count), "a slot is there; n", n);
            }
          }
        }
        check::equal(tiles, parts_of(n, kTileRows), "all tiles are dealt; n", n);
      }
    }
  }
}

void regions_of_shared_memory_do_not_overlap(uint64_t) {
  for (int r : multiples_of_8(kDecodeMaxRank)) {
    for (int token_tiles : {1, 2}) {
      for (int tiles : {1, 2, 7, 61}) {
        const DecodeMemory at = decode_memory(token_tiles, tiles, r, 3);
        const int tokens = token_tiles * kTokenTile;
        check::that(at.sums == 0 && at.bias % 16 == 0 && at.h % 16 == 0 && at.weights % 16 == 0, "16-byte aligned; r", r);
        check::that(slots_for(tiles) >= kDecodeWarps, "a slot for each warp of the first product");
        check::that(sum_at(tokens - 1, kTileRows - 1) < slot_floats(token_tiles), "the last sum is in its slot");
        check::that(at.bias >= slots_for(tiles) * slot_floats(token_tiles) * 4, "sums end before the bias; r", r);
        check::that(at.h >= at.bias + tiles * kTileRows * 2, "the bias ends before h; r", r);
        check::that(h_stride(r) >= parts_of(r, kStep) * kStep, "a row of h has room for whole steps; r", r);
        check::that(at.weights >= at.h + tokens * h_stride(r) * 2, "h ends before u; r", r);
        check::equal(at.weights + piece_at(3, kDecodeWarps - 1, 2, 1, 31) + 16, at.bytes, "u ends with the memory; r", r);
      }
    }
  }
  std::set<int> pieces;
  for (int i = 0; i < kDecodeWarps * 5 * 64; ++i) {
    check::that(pieces.insert(piece_at(5, i / 320, i / 64 % 5, i / 32 % 2, i % 32)).second, "a piece is in one place", i);
  }
}

// Lanes that one pass over the 32 banks serves must not meet: 32 of them at 4 bytes each, 8 at 16.
void lanes_meet_no_bank_twice(uint64_t) {
  for (int i = 0; i < 4; ++i) {
    std::set<int> banks;
    for (int lane = 0; lane < 32; ++lane) {
      const device::Position at = device::mma_d(lane, i);
      banks.insert(sum_at(at.column, at.row) % 32);
    }
    check::equal(banks.size(), 32, "banks of a store of sums", i);
  }
  for (int r : multiples_of_8(kDecodeMaxRank)) {
    for (int eight = 0; eight < 32; eight += 8) {
      std::set<int> of_h, of_u;
      for (int lane = eight; lane < eight + 8; ++lane) {
        of_h.insert((lane_row(lane) * h_stride(r) + lane_column(lane)) * 2 / 16 % 8);
        of_u.insert(piece_at(3, 1, 1, 0, lane) / 16 % 8);
      }
      check::that(of_h.size() == 8 && of_u.size() == 8, "16-byte loads of h and u; r", r);
    }
  }
}

// That a lane's pairs of 16 bytes are what the product takes as one contraction index, for weights and tokens alike.
void contraction_is_permuted_alike(uint64_t) {
  std::set<int> columns;
  for (int pair = 0; pair < 2; ++pair) {  // x, y feed one product, z, w the next
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {  // elements of b: half i % 2 of register i / 2
        const int column = lane_column(lane) + pair * 4 + i;
        const device::Position b = device::mma_b(lane, i);
        const device::Position a = device::mma_a(lane, i / 2 * 4 + i % 2);  // upper row: registers 0 and 2
        check::that(a.column == b.row && a.row == b.column && a.row == lane_row(lane), "a and b agree", lane);
        check::equal(device::mma_a(lane, i / 2 * 4 + 2 + i % 2).row, lane_row(lane) + 8, "the row 8 below", lane);
        columns.insert(column * 100 + pair * 16 + b.row);  // one index of one product for each column
      }
    }
  }
  check::equal(columns.size(), kStep, "columns of a step");
}

void plans_keep_their_limits(uint64_t) {
  for (int sm_count : {1, 20, 46, 108, 132}) {
    for (int limit : {101376, 166912, 232448}) {
      for (int m : {1, 8, 9, 16}) {
        for (int r : multiples_of_8(kDecodeMaxRank)) {
          for (int k : {8, 264, 768, 4096, 32768}) {
            for (int n : {1, 15, 768, 4096, 14336}) {
              for (bool is_two : {false, true}) {
                const DecodePlan plan = plan_decode(m, n, k, r, sm_count, limit, is_two);
                if (plan.token_tiles == 0) {
                  check::that(decode_memory(2, parts_of(n, 16 * sm_count) + 1, r, 0).bytes + 11264 > limit, "covered, or too large; r", r);
                  continue;
                }
                const int units = first_units(r, plan.splits), tiles = parts_of(n, kTileRows);
                check::equal(plan.token_tiles, m <= 8 ? 1 : 2, "tiles of tokens");
                check::that(plan.grid >= 1 && plan.grid <= sm_count, "one block to a multiprocessor; r", r);
                check::equal(parts_of(units, plan.grid), parts_of(units, sm_count), "no block has more units for it; r", r);
                check::equal(parts_of(tiles, plan.grid), parts_of(tiles, sm_count), "nor more tiles; r", r);
                check::that(plan.splits == 1 || (units <= sm_count && k / plan.splits >= 256), "splits; r", r);
                check::equal(plan.smem_bytes, decode_memory(plan.token_tiles, plan.tiles, r, plan.prefetch).bytes, "bytes; r", r);
                check::equal(plan.first_smem_bytes > 0, is_two, "launches");
                const int of_both = is_two ? plan.smem_bytes + plan.first_smem_bytes + 2048 : plan.smem_bytes + 1024;
                check::that(of_both <= limit + 1024, "what a multiprocessor has, 1 KB for each block; r", r);
              }
            }
          }
        }
      }
    }
  }
  const auto is_covered = [](int64_t m, int64_t n, int64_t k, int64_t r) {
    return plan_decode(m, n, k, r, 132, 232448, false).token_tiles > 0;
  };
  check::that(is_covered(1, 1, 8, 8) && is_covered(16, kDecodeMaxColumns / 16, kDecodeMaxDepth, 512), "the ends of the range");
  for (int64_t m : {int64_t{0}, int64_t{17}, int64_t{1} << 40}) check::that(!is_covered(m, 8, 8, 8), "m", m);
  for (int64_t n : {int64_t{0}, kDecodeMaxColumns + 1}) check::that(!is_covered(1, n, 8, 8), "n", n);
  for (int64_t k : {int64_t{0}, int64_t{4}, int64_t{12}, kDecodeMaxDepth + 8}) check::that(!is_covered(1, 8, k, 8), "k", k);
  for (int64_t r : {int64_t{0}, int64_t{4}, int64_t{12}, kDecodeMaxRank + 8}) check::that(!is_covered(1, 8, 8, r), "r", r);
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"each element of k is read once", each_element_of_k_is_read_once},
                     {"each row of v has a tile", each_row_of_v_has_a_tile},
                     {"each item of u is multiplied once", each_item_of_u_is_multiplied_once},
                     {"regions of shared memory do not overlap", regions_of_shared_memory_do_not_overlap},
                     {"lanes meet no bank twice", lanes_meet_no_bank_twice},
                     {"contraction is permuted alike", contraction_is_permuted_alike},
                     {"plans keep their limits", plans_keep_their_limits}},
                    1);
}
