// Who does what in the decode kernels of a group: several members with one input, y_i = (x v_i^T) u_i^T. On top of
// decode_layout.h, pure functions of the sizes as there.
//
//   first product    the row tiles of all v are one list, member after member; a unit is one of them times one split of k
//   second product   the column tiles of all u are one list, and so are their (tile, step) items. Blocks get equal shares of
//                    the items, cut where a tile begins, so ranks may differ. In pairs (SwiGLU), the list has the first and
//                    the second member's tile of the same columns in turn, and is cut where a pair begins.
#pragma once

#include <climits>

#include "low_rank/decode_layout.h"

namespace low_rank {

constexpr int kMostMembers = 4;

// Where members begin in the lists, and how long these are. A member that is not there begins at INT_MAX: behind everything.
struct GroupTable {
  int row_tiles, tiles, items;       // of all v; of all u
  int first_row_tile[kMostMembers];  // of a member
  int first_tile[kMostMembers];      // unless in pairs, and so is the next
  int first_item[kMostMembers];
  int first_rank[kMostMembers];      // in all ranks
  int first_of_h[kMostMembers];      // elements of shared memory: in a row that has h of every member
  int steps[kMostMembers];           // of the rank
};

LOWFAT_CONSTEXPR GroupTable group_table(int count, const int64_t* n, const int64_t* r) {
  GroupTable table = {};
  int ranks = 0, row_of_h = 0;
  for (int i = 0; i < kMostMembers; ++i) {
    const bool is_there = i < count;
    table.first_row_tile[i] = is_there ? table.row_tiles : INT_MAX;
    table.first_tile[i] = is_there ? table.tiles : INT_MAX;
    table.first_item[i] = is_there ? table.items : INT_MAX;
    table.first_rank[i] = is_there ? ranks : INT_MAX;
    table.first_of_h[i] = is_there ? row_of_h : INT_MAX;
    if (!is_there) continue;
    const int rank = static_cast<int>(r[i]), tiles = parts_of(static_cast<int>(n[i]), kTileRows);
    table.steps[i] = parts_of(rank, kStep);
    table.row_tiles += parts_of(rank, kTileRows);
    table.tiles += tiles;
    table.items += tiles * table.steps[i];
    ranks += rank;
    row_of_h += h_stride(rank);
  }
  return table;
}

// The member in whose part of a list a number is; past the end, the last.
LOWFAT_CONSTEXPR int member_at(const int (&first)[kMostMembers], int number) {
  int member = 0;
  for (int i = 1; i < kMostMembers; ++i) member += number >= first[i];
  return member;
}

struct GroupTile {
  int member, tile;  // of the member's own
};

// A tile of the list of all v.
LOWFAT_CONSTEXPR GroupTile row_tile_at(const GroupTable& table, int number) {
  const int member = member_at(table.first_row_tile, number);
  return {member, number - table.first_row_tile[member]};
}

// A tile of the list of all u.
LOWFAT_CONSTEXPR GroupTile tile_at(const GroupTable& table, bool is_paired, int number) {
  if (is_paired) return {number % 2, number / 2};
  const int member = member_at(table.first_tile, number);
  return {member, number - table.first_tile[member]};
}

// The first item of a tile of the list of all u, or the end of the list.
LOWFAT_CONSTEXPR int first_item_of(const GroupTable& table, bool is_paired, int number) {
  if (is_paired) return number / 2 * (table.steps[0] + table.steps[1]) + number % 2 * table.steps[0];
  const GroupTile at = tile_at(table, is_paired, number);
  return table.first_item[at.member] + at.tile * table.steps[at.member];
}

struct GroupItem {
  int number, step;  // of the tile in the list
};

LOWFAT_CONSTEXPR GroupItem item_at(const GroupTable& table, bool is_paired, int item) {
  if (is_paired) {
    const int pair_steps = table.steps[0] + table.steps[1], pair = item / pair_steps, step = item % pair_steps;
    const bool is_second = step >= table.steps[0];
    return {2 * pair + is_second, step - is_second * table.steps[0]};
  }
  const int member = member_at(table.first_item, item), from = item - table.first_item[member];
  return {table.first_tile[member] + from / table.steps[member], from % table.steps[member]};
}

// --- what a block does of the second product ---

struct GroupShare {
  Range tiles;     // in the list
  int first_item;  // in the list
  int items;
  int each;        // items of a warp; the last warps may have fewer
  Range members;   // that the tiles are of
};

LOWFAT_CONSTEXPR int items_of(const GroupShare& s) { return s.items; }

// Where block `block` begins: at the tile or pair in which its equal share of the items does.
LOWFAT_CONSTEXPR int first_tile_of_block(const GroupTable& table, bool is_paired, int grid, int block) {
  const int each = table.items / grid, more = table.items % grid;
  const int number = item_at(table, is_paired, block * each + smaller(block, more)).number;
  return is_paired ? number / 2 * 2 : number;
}

LOWFAT_CONSTEXPR GroupShare group_share(const GroupTable& table, bool is_paired, Range tiles) {
  const int first = first_item_of(table, is_paired, tiles.first);
  const int items = first_item_of(table, is_paired, tiles.last) - first;
  if (items == 0) return {tiles, first, 0, 0, {0, 0}};
  const Range members = is_paired ? Range{0, 2} : Range{member_at(table.first_tile, tiles.first),
                                                        member_at(table.first_tile, tiles.last - 1) + 1};
  return {tiles, first, items, parts_of(items, kDecodeWarps), members};
}

LOWFAT_CONSTEXPR GroupShare group_share(const GroupTable& table, bool is_paired, int grid, int block) {
  return group_share(table, is_paired, Range{first_tile_of_block(table, is_paired, grid, block),
                                             first_tile_of_block(table, is_paired, grid, block + 1)});
}

// The warps that have items of a tile, counted from the block's first.
LOWFAT_CONSTEXPR Range warps_of_tile(const GroupTable& table, bool is_paired, const GroupShare& s, int tile) {
  const int number = s.tiles.first + tile, first = first_item_of(table, is_paired, number) - s.first_item;
  return warps_of_items(s.each, first, first + table.steps[tile_at(table, is_paired, number).member]);
}

// Shared memory has rows of h for the block's members alone: where a member's begin. [tokens, h_stride] each.
LOWFAT_CONSTEXPR int place_of_h(const GroupTable& table, const GroupShare& s, int tokens, int member) {
  return tokens * (table.first_of_h[member] - table.first_of_h[s.members.first]);
}

LOWFAT_CONSTEXPR int row_of_h(const GroupTable& table, const GroupShare& s) {
  if (s.items == 0) return 0;
  const int last = s.members.last - 1;
  return table.first_of_h[last] + h_stride(table.steps[last] * kStep) - table.first_of_h[s.members.first];
}

LOWFAT_CONSTEXPR DecodeMemory group_memory(int token_tiles, int tiles, int row_of_h, int prefetch) {
  return decode_regions(token_tiles, tiles, tiles * kTileRows * 2, row_of_h, prefetch);
}

// --- the plan of a launch ---

struct GroupPlan {
  int token_tiles = 0;   // 0: the kernels do not cover this problem
  bool is_swiglu = false;
  int splits = 0;        // of k
  int grid = 0;          // blocks
  int tiles = 0;         // of all u in a block, at most
  int row_of_h = 0;      // elements of h in shared memory from token to token, at most
  int prefetch = 0;      // items of u that each warp asks for before h is known
  int smem_bytes = 0;
  int64_t partials = 0;  // floats of workspace
  GroupTable table = {};
};

// What one of the blocks has, at most.
struct GroupMost {
  int tiles, items, row_of_h;
};

LOWFAT_CONSTEXPR GroupMost most_of_blocks(const GroupTable& table, bool is_paired, int grid) {
  GroupMost most = {0, 0, 0};
  int first = 0;
  for (int block = 0; block < grid; ++block) {
    const int last = first_tile_of_block(table, is_paired, grid, block + 1);
    const GroupShare share = group_share(table, is_paired, Range{first, last});
    most = {larger(most.tiles, last - first), larger(most.items, share.items),
            larger(most.row_of_h, row_of_h(table, share))};
    first = last;
  }
  return most;
}

// Of one launch. n, r: [count]; for SwiGLU two members, gate and up, with equal n.
LOWFAT_CONSTEXPR GroupPlan plan_group(int64_t m, int64_t k, int count, const int64_t* n, const int64_t* r, bool is_swiglu,
                                      int sm_count, int smem_limit) {
  if (count < 1 || count > kMostMembers || sm_count < 1 || (is_swiglu && (count != 2 || n[0] != n[1]))) return GroupPlan();
  int64_t ranks = 0;
  for (int i = 0; i < count; ++i) {
    if (!is_covered(m, k, r[i]) || n[i] < 1 || n[i] > kDecodeMaxColumns) return GroupPlan();
    ranks += r[i];
  }
  GroupPlan plan;
  plan.is_swiglu = is_swiglu;
  plan.table = group_table(count, n, r);
  plan.splits = splits_of(plan.table.row_tiles, k, sm_count);
  plan.partials = plan.splits * m * ranks;
  const int first_blocks = blocks_for(plan.table.row_tiles * plan.splits, sm_count);
  const GroupMost of_all = most_of_blocks(plan.table, is_swiglu, sm_count);
  plan.grid = larger(first_blocks, parts_of(plan.table.items, of_all.items));
  GroupMost most = most_of_blocks(plan.table, is_swiglu, plan.grid);
  if (most.items > of_all.items) plan.grid = sm_count, most = of_all;
  plan.tiles = most.tiles;
  plan.row_of_h = most.row_of_h;
  const int token_tiles = m <= kTokenTile ? 1 : 2;
  const int least = group_memory(token_tiles, plan.tiles, plan.row_of_h, 0).bytes;
  if (least > smem_limit) return GroupPlan();
  plan.token_tiles = token_tiles;
  plan.prefetch = prefetch_of(most.items, least, smem_limit);
  plan.smem_bytes = group_memory(token_tiles, plan.tiles, plan.row_of_h, plan.prefetch).bytes;
  return plan;
}

}  // namespace low_rank
