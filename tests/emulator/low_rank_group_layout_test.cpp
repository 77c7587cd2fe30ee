// Who does what in the decode kernels of a group: each tile and item of every member once, shares balanced, nothing outside.
#include "low_rank/decode_group_layout.h"

#include <set>
#include <vector>

#include "check.h"

namespace {

using namespace low_rank;

struct Members {
  int count;
  int64_t n[kMostMembers], r[kMostMembers];
};

int64_t drawn(emulator::Random& random, std::initializer_list<int64_t> values) {
  return values.begin()[random.below(values.size())];
}

// Pairs have one n.
Members some_members(emulator::Random& random, bool is_paired) {
  Members all{is_paired ? 2 : 1 + static_cast<int>(random.below(kMostMembers)), {}, {}};
  for (int i = 0; i < all.count; ++i) {
    all.n[i] = is_paired && i > 0 ? all.n[0] : drawn(random, {1, 15, 16, 17, 100, 264, 1024, 1500, 4096});
    all.r[i] = drawn(random, {8, 24, 32, 40, 64, 96, 264, 512, 1024, 2048});
  }
  return all;
}

constexpr int kRounds = 3000;

// What a list says of a member's tile or item, the member's own sizes say too, and back.
void lists_have_each_member_once(uint64_t seed) {
  emulator::Random random(seed);
  for (int round = 0; round < kRounds; ++round) {
    const bool is_paired = round % 3 == 0;
    const Members all = some_members(random, is_paired);
    const GroupTable table = group_table(all.count, all.n, all.r);
    int number = 0, tiles = 0, items = 0;
    for (int i = 0; i < all.count; ++i) {
      check::equal(table.first_rank[i], i ? table.first_rank[i - 1] + all.r[i - 1] : 0, "ranks before", i);
      for (int tile = 0; tile < parts_of(static_cast<int>(all.r[i]), kTileRows); ++tile, ++number) {
        const GroupTile at = row_tile_at(table, number);
        check::that(at.member == i && at.tile == tile, "a tile of v; number", number);
      }
      tiles += parts_of(static_cast<int>(all.n[i]), kTileRows);
    }
    check::equal(table.row_tiles, number, "tiles of v");
    check::that(row_tile_at(table, number).member == all.count - 1, "past the end is the last member", number);
    check::equal(table.tiles, tiles, "tiles of u");
    std::set<std::pair<int, int>> seen;
    for (int tile = 0; tile < tiles; ++tile) {
      const GroupTile at = tile_at(table, is_paired, tile);
      check::that(at.member < all.count, "a member", tile);
      check::that(at.tile < parts_of(static_cast<int>(all.n[at.member]), kTileRows), "a tile of it", tile);
      check::that(seen.insert({at.member, at.tile}).second, "each tile of u once", tile);
      check::equal(first_item_of(table, is_paired, tile), items, "a tile begins where the one before ended", tile);
      const int steps = parts_of(static_cast<int>(all.r[at.member]), kStep);
      for (int step = 0; step < steps; step += larger(1, steps - 1), ++items) {
        const GroupItem one = item_at(table, is_paired, first_item_of(table, is_paired, tile) + step);
        check::that(one.number == tile && one.step == step, "an item; tile", tile);
      }
      items = first_item_of(table, is_paired, tile) + steps;
      if (is_paired) check::that(at.member == tile % 2 && at.tile == tile / 2, "gate and up in turn", tile);
    }
    check::equal(table.items, items, "items");
    check::equal(first_item_of(table, is_paired, tiles), items, "the end of the list");
    check::equal(item_at(table, is_paired, items).number, tiles, "the end of the list is behind the last tile");
  }
}

void blocks_share_all_tiles(uint64_t seed) {
  emulator::Random random(seed);
  for (int round = 0; round < kRounds; ++round) {
    const bool is_paired = round % 3 == 0;
    const Members all = some_members(random, is_paired);
    const GroupTable table = group_table(all.count, all.n, all.r);
    const int grid = static_cast<int>(drawn(random, {1, 2, 3, 7, 46, 128, 132}));
    const GroupMost most = most_of_blocks(table, is_paired, grid);
    int tiles = 0, items = 0, most_steps = 0;
    for (int i = 0; i < all.count; ++i) most_steps = larger(most_steps, table.steps[i]);
    if (is_paired) most_steps = table.steps[0] + table.steps[1];
    for (int block = 0; block < grid; ++block) {
      const GroupShare mine = group_share(table, is_paired, grid, block);
      check::equal(mine.tiles.first, tiles, "blocks follow each other", block);
      check::equal(mine.first_item, items, "and so do their items", block);
      tiles = mine.tiles.last, items += mine.items;
      if (is_paired) check::that(mine.tiles.first % 2 == 0 && tiles % 2 == 0, "whole pairs", block);
      check::that(mine.items < parts_of(table.items, grid) + most_steps, "shares differ by less than a tile or pair", block);
      check::that(tiles - mine.tiles.first <= most.tiles && mine.items <= most.items, "the most that the plan knows", block);
      check::that(row_of_h(table, mine) <= most.row_of_h, "and of h", block);

      std::set<int> members, slots;
      std::vector<std::set<int>> warps(tiles - mine.tiles.first);
      int item = 0;
      for (int warp = 0; warp < kDecodeWarps; ++warp) {
        const Range due = warp_items(mine, warp);
        check::equal(due.first, item, "warps follow each other", block);
        for (; item < due.last; ++item) {
          warps.at(item_at(table, is_paired, mine.first_item + item).number - mine.tiles.first).insert(warp);
        }
      }
      check::equal(item, mine.items, "all items are dealt", block);
      for (size_t tile = 0; tile < warps.size(); ++tile) {
        members.insert(tile_at(table, is_paired, mine.tiles.first + tile).member);
        const Range due = warps_of_tile(table, is_paired, mine, tile);
        check::equal(due.last - due.first, warps[tile].size(), "warps of a tile", tile);
        for (int warp = due.first; warp < due.last; ++warp) {
          check::that(warps[tile].count(warp), "each of them has items of it", tile);
          check::that(slots.insert(slot_of(tile, warp)).second, "a slot is used once", tile);
          check::that(slot_of(tile, warp) < slots_for(most.tiles), "a slot is there", tile);
        }
      }
      // Regions of h: one for each member of the block, in order, up to the row's end.
      check::equal(mine.members.last - mine.members.first, members.size(), "members of a block", block);
      int end = 0;
      for (int member : members) {
        check::that(member >= mine.members.first && member < mine.members.last, "a member of the block", member);
        check::equal(place_of_h(table, mine, 8, member), end, "h follows that of the member before", member);
        end += 8 * h_stride(static_cast<int>(all.r[member]));
      }
      check::equal(8 * row_of_h(table, mine), end, "elements of h", block);
    }
    check::that(tiles == table.tiles && items == table.items, "all tiles are dealt", tiles);
  }
}

void plans_keep_their_limits(uint64_t seed) {
  emulator::Random random(seed);
  int covered = 0;
  for (int round = 0; round < kRounds; ++round) {
    const bool is_swiglu = round % 3 == 0;
    const Members all = some_members(random, is_swiglu);
    const int64_t m = drawn(random, {1, 8, 9, 16}), k = drawn(random, {8, 264, 768, 4096, 32768});
    const int sm_count = static_cast<int>(drawn(random, {1, 20, 108, 132}));
    const int limit = static_cast<int>(drawn(random, {101376, 232448}));
    const GroupPlan plan = plan_group(m, k, all.count, all.n, all.r, is_swiglu, sm_count, limit);
    if (plan.token_tiles == 0) continue;
    ++covered;
    const int units = plan.table.row_tiles * plan.splits;
    const GroupMost most = most_of_blocks(plan.table, is_swiglu, plan.grid);
    check::that(plan.is_swiglu == is_swiglu && plan.token_tiles == (m <= 8 ? 1 : 2), "what was asked", round);
    check::that(plan.grid >= 1 && plan.grid <= sm_count, "one block to a multiprocessor", round);
    check::equal(parts_of(units, plan.grid), parts_of(units, sm_count), "no block has more units for it", round);
    check::that(most.items <= most_of_blocks(plan.table, is_swiglu, sm_count).items, "nor more items", round);
    check::that(plan.splits == 1 || (units <= sm_count && k / plan.splits >= 256), "splits", round);
    check::that(plan.tiles == most.tiles && plan.row_of_h == most.row_of_h, "room for every block", round);
    const DecodeMemory at = group_memory(plan.token_tiles, plan.tiles, plan.row_of_h, plan.prefetch);
    check::that(plan.smem_bytes == at.bytes && at.bytes <= limit, "bytes", round);
    check::that(at.bias % 16 == 0 && at.h % 16 == 0 && at.weights % 16 == 0, "16-byte aligned", round);
    int64_t ranks = 0;
    for (int i = 0; i < all.count; ++i) ranks += all.r[i];
    check::equal(plan.partials, plan.splits * m * ranks, "floats of workspace", round);
    if (all.count == 1) {
      const DecodePlan one = plan_decode(m, all.n[0], k, all.r[0], sm_count, limit, false);
      check::that(one.grid == plan.grid && one.splits == plan.splits && one.tiles == plan.tiles &&
                      one.prefetch == plan.prefetch && one.smem_bytes == plan.smem_bytes,
                  "a group of one is low_rank", round);
    }
  }
  check::that(covered > kRounds / 2, "most of it is covered", covered);
}

void what_is_not_covered(uint64_t) {
  const int64_t n[] = {64, 64, 64, 64, 64}, r[] = {32, 32, 32, 32, 32}, other[] = {64, 80}, odd[] = {32, 36};
  const int64_t wide[] = {kDecodeMaxColumns + 1, 8}, high[] = {2048, 2048, 2048, 2048};
  const auto is_planned = [](int64_t m, int count, const int64_t* sizes, const int64_t* ranks, bool is_swiglu) {
    return plan_group(m, 256, count, sizes, ranks, is_swiglu, 132, 232448).token_tiles > 0;
  };
  check::that(is_planned(1, 4, n, r, false) && is_planned(16, 2, n, r, true), "equal members");
  check::that(is_planned(1, 2, other, r, false), "unequal members");
  check::that(is_planned(8, 4, n, high, false), "h of two members in a block");
  check::that(!is_planned(0, 2, n, r, false) && !is_planned(17, 2, n, r, false), "m");
  check::that(!is_planned(1, 0, n, r, false) && !is_planned(1, 5, n, r, false), "count");
  check::that(!is_planned(1, 2, other, r, true) && !is_planned(1, 3, n, r, true), "SwiGLU takes two of one size");
  check::that(!is_planned(1, 2, n, odd, false) && !is_planned(1, 2, wide, r, false), "ranks and columns of low_rank");
  check::that(plan_group(16, 256, 4, n, high, false, 1, 232448).token_tiles == 0, "h of four large members in one block");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"lists have each member once", lists_have_each_member_once},
                     {"blocks share all tiles", blocks_share_all_tiles},
                     {"plans keep their limits", plans_keep_their_limits},
                     {"what is not covered", what_is_not_covered}},
                    2);
}
