// Who does what in the decode kernels of a group: several members with one input, y_i = (x v_i^T) u_i^T. On top of
// decode_layout.h, pure functions of the sizes as there.
//
//   first product    the row tiles of all v are one list, member after member; a unit is one of them times one split of k
//   second product   the column tiles of all u are one list, and so are their (tile, step) items. Blocks get equal shares of
//                    the items, cut where a tile begins, so ranks may differ. For SwiGLU, the list has the gate's and the
//                    up's tile of the same columns in turn, and a block gets whole pairs.
#pragma once

#include <climits>

#include "low_rank/decode_layout.h"

namespace low_rank {

constexpr int kMostMembers = 4;

// Of members that are not there, INT_MAX in every `first`: no tile or item comes after it.
struct GroupTable {
  int row_tiles, tiles, items;       // of all v, of all u, of all u
  int first_row_tile[kMostMembers];  // of a member in the list of all, and so on
  int first_tile[kMostMembers];
  int first_item[kMostMembers];
  int first_rank[kMostMembers];
  int first_of_h[kMostMembers];      // elements: where a token's h begins if all members' were in shared memory
  int steps[kMostMembers];           // of the rank
};

struct GroupPlan {
  int token_tiles = 0;   // 0: the kernels do not cover this problem
  bool is_swiglu = false;
  int splits = 0;        // of k
  int grid = 0;          // blocks
  int tiles = 0;         // of all u in a block, at most
  int prefetch = 0;      // items of u that each warp asks for before h is known
  int smem_bytes = 0;
  int row_of_h = 0;      // elements of h in shared memory from token to token, of all members that a block has, at most
  int64_t partials = 0;  // floats of workspace
  GroupTable table = {};
};

}  // namespace low_rank
