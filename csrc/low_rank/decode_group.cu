// Several low_rank of one input on a GPU, for a few rows of x, in one pass over the weights: y_i = (x v_i^T) u_i^T + bias_i
// (q, k, v), or y = silu(y_0) y_1 (gate and up of SwiGLU), where only y is written. Each x v_i^T is rounded once.
//
//   x [m, k]   v_i [r_i, k]   u_i [n_i, r_i]   bias_i [n_i]   y_i [m, n_i]   i < 4   m <= 16, bf16 or fp16, aligned rows
//
// The kernel is decode (decode.cu) with longer lists (decode_group_layout.h):
//
//   v_0 [--|--]  tiles of 16 rows of all v,        u_0 [---]  tiles of 16 rows of all u,          u_0 [---]  for SwiGLU
//   v_0 [--|--]  times splits of k: a unit         u_0 [---]  times steps of their rank:          u_1 [--]   in turn
//   v_1 [--|--]  for a block                       u_1 [--]   a block has neighbouring tiles      u_0 [---]
//   v_2 [--|--]                                    u_2 [----] with its share of the items         u_1 [--]
//
// A block gathers h of those members whose tiles it has. Gate and up of a column are added up in the same block, and silu
// takes what has not been rounded.
//
// Compiled for sm_80, sm_90a and as PTX, run by tests in an emulator; it HAS NEVER RUN ON A GPU, and no speed is claimed.
#include "device/grid.h"
#include "device/launch.h"
#include "low_rank/decode_steps.h"
#include "low_rank/epilogue.h"
#include "low_rank/group.h"

namespace low_rank {

// Where a warp is: the tile counts from the block's first. What is the same for all of a tile's items is asked for once.
template <bool kIsPaired>
struct GroupCursor {
  int tile, step, steps;
  TileOfU u;
  int first_of_h;  // of a token

  LOWFAT_DEVICE GroupCursor(const GroupParams& p, const GroupShare& mine, int item) {
    const GroupItem one = item_at(p.table, kIsPaired, mine.first_item + item);
    tile = one.number - mine.tiles.first;
    step = one.step;
    enter_tile(p, mine);
  }
  LOWFAT_DEVICE void enter_tile(const GroupParams& p, const GroupShare& mine) {
    const GroupTile at = tile_at(p.table, kIsPaired, mine.tiles.first + tile);
    const GroupMember& member = p.members[at.member];
    steps = p.table.steps[at.member];
    u = {member.u, at.tile * kTileRows, member.n, member.r};
    first_of_h = place_of_h(p.table, mine, 1, at.member);
  }
  LOWFAT_DEVICE void advance(const GroupParams& p, const GroupShare& mine) {
    if (++step < steps) return;
    step = 0;
    ++tile;
    enter_tile(p, mine);
  }
  LOWFAT_DEVICE bool is_last_step(const GroupParams&, const GroupShare&) const { return step == steps - 1; }
};

template <bool kIsPaired>
struct GroupForm {
  using Params = GroupParams;
  using Share = GroupShare;
  using Cursor = GroupCursor<kIsPaired>;
  static constexpr bool kIsSwiglu = kIsPaired;  // one y of two members; run-time would have every loop ask

  LOWFAT_DEVICE static int first_units(const Params& p) { return p.table.row_tiles * p.splits; }
  LOWFAT_DEVICE static FirstWork first_work(const Params& p, int number) {
    FirstUnit unit = first_unit(p.k, p.splits, number);
    const GroupTile at = row_tile_at(p.table, unit.tile);
    unit.tile = at.tile;
    const GroupMember& member = p.members[at.member];
    return {member.v, partials_of(p, at.member), member.r, unit};
  }
  LOWFAT_DEVICE static float* partials_of(const Params& p, int member) {
    return p.partials + int64_t{p.table.first_rank[member]} * p.splits * p.m;
  }
  LOWFAT_DEVICE static Share share_of_block(const Params& p) {
    return group_share(p.table, kIsPaired, gridDim.x, blockIdx.x);
  }
  LOWFAT_DEVICE static TileOfU u_at(const Params&, const Share&, const Cursor& cursor) { return cursor.u; }
  LOWFAT_DEVICE static DecodeMemory memory(const Params& p, int token_tiles) {
    return group_memory(token_tiles, p.tiles, p.row_of_h, p.prefetch);
  }
};

template <class T, int kTileCount, bool kIsPaired>
struct GroupConfig : DecodeSizes<T, kTileCount>, GroupForm<kIsPaired> {
  LOWFAT_DEVICE static PlaceOfH h_at(const GroupParams&, const GroupShare&, const GroupCursor<kIsPaired>& cursor) {
    return {kTileCount * kTokenTile * cursor.first_of_h, h_stride(cursor.u.r)};
  }
};

// --- from the sums to y ---

// A column of y, which is a row of a member's u.
struct GroupColumn {
  int member, column;
};

template <class Config>
LOWFAT_DEVICE GroupColumn column_at(const GroupParams& p, const GroupShare& mine, int tile, int row) {
  const GroupTile at = tile_at(p.table, Config::kIsSwiglu, mine.tiles.first + tile);
  return {at.member, at.tile * kTileRows + row};
}

// Biases of the block's columns, while there is something to wait for; 0 of a member without.
template <class Config>
LOWFAT_DEVICE void load_biases(const GroupParams& p, const GroupShare& mine, uint16_t* smem_bias) {
  const int count = (mine.tiles.last - mine.tiles.first) * kTileRows;
  for (int i = threadIdx.x; i < count; i += Config::kThreads) {
    const GroupColumn at = column_at<Config>(p, mine, i / kTileRows, i % kTileRows);
    const GroupMember& member = p.members[at.member];
    smem_bias[i] = member.bias && at.column < member.n ? device::load(member.bias + at.column) : 0;
  }
}

template <class Config>
LOWFAT_DEVICE void gather_all_h(const GroupParams& p, const GroupShare& mine, uint16_t* smem_h) {
  for (int member = mine.members.first; member < mine.members.last; ++member) {
    gather_h<Config>(p, Config::partials_of(p, member), p.members[member].r,
                     smem_h + place_of_h(p.table, mine, Config::kTokens, member));
  }
}

// The sum of a column, bias and all.
template <class Config>
LOWFAT_DEVICE float column_sum(const GroupParams& p, const Second<Config>& second, int tile, int token, int row) {
  const Range warps = warps_of_tile(p.table, Config::kIsSwiglu, second.mine, tile);
  const float sum = sum_of<Config>(second.smem_sums, warps, tile, token, row);
  return finished(sum, device::widen<typename Config::Element>(second.smem_bias[tile * kTileRows + row]));
}

template <class Config>
LOWFAT_DEVICE void store_y(const GroupParams& p, const Second<Config>& second) {
  constexpr int kTilesOfY = Config::kIsSwiglu ? 2 : 1;  // that one tile of y is made of
  const int tiles = (second.mine.tiles.last - second.mine.tiles.first) / kTilesOfY;
  for (int i = threadIdx.x; i < tiles * Config::kTokens * kTileRows; i += Config::kThreads) {
    const int row = i % kTileRows, token = i / kTileRows % Config::kTokens;
    const int tile = i / (kTileRows * Config::kTokens) * kTilesOfY;
    const GroupColumn at = column_at<Config>(p, second.mine, tile, row);
    const GroupMember& member = p.members[at.member];
    if (token >= p.m || at.column >= member.n) continue;
    float y = column_sum<Config>(p, second, tile, token, row);
    if constexpr (Config::kIsSwiglu) y = silu(y) * column_sum<Config>(p, second, tile + 1, token, row);
    device::store(member.y + int64_t{token} * member.n + at.column, device::narrow<typename Config::Element>(y));
  }
}

// --- the kernel ---

// One block to a multiprocessor.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) decode_group(const __grid_constant__ GroupParams p) {
  First<Config, true> first(p);
  Second<Config> second(p);
  second.prefetch();
  first.finish(second.smem_sums);
  const uint64_t target = device::grid_arrive(p.counter);
  second.load_rest();
  load_biases<Config>(p, second.mine, second.smem_bias);
  device::grid_wait(p.counter, target);
  gather_all_h<Config>(p, second.mine, second.smem_h);
  second.multiply();
  store_y<Config>(p, second);
}

// --- launch ---

template <class Config>
const char* launch(const GroupPlan& plan, const GroupParams& params, void* stream) {
  device::Launch shape;
  shape.grid = dim3(plan.grid);
  shape.threads = Config::kThreads;
  shape.smem_bytes = plan.smem_bytes;
  shape.is_cooperative = true;
  shape.stream = stream;
  return device::launch(decode_group<Config>, shape, params);
}

template <class T, int kTileCount>
const char* launch(const GroupPlan& plan, const GroupParams& params, void* stream) {
  return plan.is_swiglu ? launch<GroupConfig<T, kTileCount, true>>(plan, params, stream)
                        : launch<GroupConfig<T, kTileCount, false>>(plan, params, stream);
}

const char* launch_group(const GroupPlan& plan, GroupParams params, Dtype dtype, void* stream) {
  params.splits = plan.splits, params.tiles = plan.tiles, params.row_of_h = plan.row_of_h, params.prefetch = plan.prefetch;
  params.table = plan.table;
  const bool is_bf16 = dtype == Dtype::bfloat16;
  if (plan.token_tiles == 1) {
    return is_bf16 ? launch<device::Bf16, 1>(plan, params, stream) : launch<device::Fp16, 1>(plan, params, stream);
  }
  return is_bf16 ? launch<device::Bf16, 2>(plan, params, stream) : launch<device::Fp16, 2>(plan, params, stream);
}

}  // namespace low_rank
