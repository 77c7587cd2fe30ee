// Who does what in the batched products of monarch, for a wide range of sizes: each result once, from the weight row and to
// the place that the op defines, in whole pieces where they are promised, and no bank twice.
#include "monarch/batched_layout.h"

#include <set>
#include <vector>

#include "check.h"

namespace {

using namespace monarch;

constexpr int kLimits[] = {163 << 10, 99 << 10, 227 << 10};  // bytes of shared memory in a block: sm_80, sm_86 and 89, sm_90

template <class Visit>
void each_problem(const Visit& visit) {
  for (int b_in : {1, 2, 9, 16, 20}) {
    for (int b_out : {1, 2, 5, 12, 24, 40}) {
      for (int r : {1, 2, 7, 8, 12, 68, 136}) {
        if (b_in * r % 8 != 0) continue;
        for (int s : {1, 3, 8, 20, 130}) {
          for (int missing : {0, b_out / 2}) {
            const int n = b_out * s - missing;
            if (n < 1 || parts_of(n, b_out) != s) continue;
            for (bool interleave : {true, false}) visit(Sizes{37, n, b_in * 16, b_in, b_out, r, interleave});
          }
        }
      }
    }
  }
}

struct Gpu {
  int sm_count, smem_limit;
};

// Both products of a problem, on GPUs that have work and on one that is hard to fill.
template <class Visit>
void each_plan(const Sizes& s, const Visit& visit) {
  for (const Gpu& gpu : {Gpu{1, kLimits[0]}, Gpu{1, kLimits[1]}, Gpu{132, kLimits[2]}}) {
    const MonarchPlan plan = plan_monarch(s.m, s.n, s.k, s.b_in, s.b_out, s.r, s.interleave, gpu.sm_count, gpu.smem_limit);
    check::that(plan.first.tokens > 0, "covered; rank", s.r);
    visit(first_batch(s), plan.first, gpu);
    visit(second_batch(s), plan.second, gpu);
  }
}

// --- as the op defines them ---

void results_are_where_the_op_says(uint64_t) {
  each_problem([](const Sizes& s) {
    const Batch first = first_batch(s), second = second_batch(s);
    const int t = s.b_in * s.r;
    std::vector<int> rows(first.rows);
    for (int c = 0; c < first.rows; ++c) {
      const int row = first.weight_row(c), o = row % s.b_out, j = row / s.b_out;
      check::that(row >= 0 && row < first.rows && rows[row]++ == 0, "each row of v once; column", c);
      for (int i : {0, s.b_in - 1}) {
        const double place = (double(o) * s.m + 5) * t + i * s.r + j;  // of token 5
        check::equal(first.offset_of(i, c) + 5.0 * first.result_step, place, "place in h", c);
      }
    }
    for (int c = 0; c < second.rows; ++c) {
      check::equal(second.weight_row(c), c, "row of u");
      for (int o : {0, s.b_out - 1}) {
        const int column = s.interleave ? o + c * s.b_out : o * s.s() + c;
        check::equal(second.offset_of(o, c) + 5.0 * second.result_step, 5.0 * s.n + column, "place in y", c);
        check::equal(second.offset_of_output(o, c), column, "column of y", c);
      }
    }
    check::equal(first.results, double(s.b_out) * s.m * t, "size of h");
    int inputs = 0;
    for (int i = 0; i < s.b_in; ++i) inputs += first.depth_of(i);
    check::equal(inputs, s.k, "inputs of all blocks");
    for (int o = 0; o < s.b_out; ++o) check::equal(second.depth_of(o), t, "the middle of a block has no padding");
  });
  const Batch padded = first_batch({1, 8, 120, 16, 1, 1, true});
  check::that(padded.depth_of(14) == 8 && padded.depth_of(15) == 0, "a block of nothing but padding");
}

// --- what CTAs do ---

// A token's results of one CTA: number by number.
struct Walked {
  const Batch& b;
  const Plan& plan;
  Place at;

  int count() const { return at.passes * plan.used_columns; }
  int64_t offset(InTile one) const {
    const int column = at.column + one.column;
    const int64_t offset = b.offset_of(at.block + one.pass, column);
    return one.column < plan.used_columns && column < b.rows && offset < b.results ? offset : -1;
  }
};

void each_result_is_stored_once(uint64_t) {
  each_problem([](const Sizes& s) {
    each_plan(s, [&](const Batch& b, const Plan& plan, const Gpu&) {
      std::vector<int> stored(b.rows * b.blocks);
      const int64_t of_h = int64_t{s.m} * s.b_in * s.r;  // from output block to output block
      const bool is_first = b.unit_step == of_h && b.result_step == s.b_in * s.r;
      const auto place_in_row = [&](int64_t offset) {
        return is_first ? offset / of_h * b.result_step + offset % of_h : offset;
      };
      std::vector<int> offsets(is_first ? b.rows * b.blocks : s.n);
      std::vector<int> tokens(plan.token_tiles);
      for (int index = 0; index < plan.grid; ++index) {
        const Walked cta{b, plan, place_of(b, plan, index)};
        check::that(cta.at.token % plan.tokens == 0 && cta.at.token < s.m, "a tile of tokens", index);
        check::that(cta.at.passes >= 1 && cta.at.passes <= plan.group && cta.at.column < b.rows, "no CTA is empty", index);
        check::that(cta.at.block + cta.at.passes <= b.blocks, "blocks that exist", index);
        ++tokens[cta.at.token / plan.tokens];
        if (cta.at.token > 0) continue;
        InTile next = in_tile(b.unit, cta.at.passes, 0);
        for (int number = 0; number < cta.count(); ++number) {
          const InTile one = in_tile(b.unit, cta.at.passes, number);
          check::that(one.pass == next.pass && one.column == next.column, "one after the other; number", number);
          next = next_in_tile(b.unit, cta.at.passes, one);
          check::that(one.pass < cta.at.passes && one.column < plan.used_columns, "in the tile; number", number);
          if (cta.at.column + one.column >= b.rows) continue;
          ++stored[(cta.at.block + one.pass) * b.rows + cta.at.column + one.column];
          if (cta.offset(one) >= 0) ++offsets.at(place_in_row(cta.offset(one)));
        }
      }
      for (int times : stored) check::equal(times, 1, "times a result is stored");
      for (int tiles : tokens) check::equal(tiles, plan.grid / plan.token_tiles, "CTAs of each tile of tokens");
      for (int times : offsets) check::equal(times, 1, "times a place is written");
    });
  });
}

// Eight results from a multiple of 8 on are neighbours in aligned memory, all of them or none; and in their plane, too, if
// that is said.
void pieces_are_whole(uint64_t) {
  int wide = 0, along = 0;
  each_problem([&](const Sizes& s) {
    each_plan(s, [&](const Batch& b, const Plan& plan, const Gpu&) {
      if (!plan.is_wide) return;
      ++wide;
      check::equal(b.result_step % 8, 0, "tokens are whole pieces");
      for (int index = 0; index < plan.column_tiles * plan.groups; ++index) {
        const Walked cta{b, plan, place_of(b, plan, index)};
        for (int number = 0; number < cta.count(); number += 8) {
          InTile one = in_tile(b.unit, cta.at.passes, number);
          const InTile first = one;
          const int64_t offset = cta.offset(one);
          if (offset < 0) {  // then nobody has to store any of them
            for (int e = 0; e < 8 && number + e < cta.count(); ++e, one = next_in_tile(b.unit, cta.at.passes, one)) {
              check::that(cta.offset(one) < 0, "none of eight; number", number + e);
            }
            continue;
          }
          check::equal(offset % 8, 0, "aligned; number", number);
          if (is_along(b.unit, cta.at.passes)) {
            ++along;
            check::that(first.column % 8 == 0 && first.column + 8 <= plan.columns, "aligned in its plane; number", number);
          }
          for (int e = 0; e < 8; ++e, one = next_in_tile(b.unit, cta.at.passes, one)) {
            check::that(cta.offset(one) == offset + e, "neighbours; number", number + e);
            if (is_along(b.unit, cta.at.passes)) {
              check::that(one.pass == first.pass && one.column == first.column + e, "in one plane; number", number + e);
            }
          }
        }
      }
    });
  });
  check::that(wide > 1000 && along > 1000, "both kinds were there");
}

void plans_keep_their_limits(uint64_t) {
  each_problem([](Sizes s) {
    for (int m : {1, 16, 17, 300, 5000}) {
      s.m = m;
      each_plan(s, [&](const Batch& b, const Plan& plan, const Gpu& gpu) {
        check::that(plan.smem_bytes <= gpu.smem_limit, "memory; m", m);
        check::that(m > 16 || plan.tokens == 16, "a small tile where there are few tokens; m", m);
        check::that(m <= 16 || plan.tokens > 16, "no smaller than it has to be; m", m);
        check::that(plan.tokens <= 16 || m > plan.tokens / 2, "no tile is mostly empty; m", m);
        check::that(plan.group >= 1 && plan.group <= b.blocks, "group; m", m);
        check::that(plan.group == 1 || plan.used_columns % b.unit == 0, "whole units; m", m);
        check::equal(plan.grid, double(plan.token_tiles) * plan.column_tiles * plan.groups, "CTAs");
        if (plan.group == wanted_group(b, plan.columns)) return;
        const int more = plan.group * 2;
        const TileSize tile{plan.tokens, plan.columns};
        check::that(memory_of(plan.tokens, plan.columns, more) > gpu.smem_limit ||
                        tiles_of(b, tile, plan.group) <= gpu.sm_count,
                    "groups are small for a reason; m", m);
      });
    }
  });
}

void planes_are_behind_the_stages(uint64_t) {
  for (const TileSize& tile : kTiles) {
    for (int group = 1; group <= 16; ++group) {
      const int at = planes_at(tile.tokens, tile.columns, group), all = memory_of(tile.tokens, tile.columns, group);
      check::that(group == 1 || at >= kStages * stage_bytes(tile.tokens, tile.columns), "slabs stay whole", group);
      check::that(at % 16 == 0 && at + group * plane_bytes(tile.tokens, tile.columns) <= all, "room for the planes", group);
      check::that(kStages * stage_bytes(tile.tokens, tile.columns) <= all, "room for the stages", group);
    }
    std::set<int> banks;
    for (int lane = 0; lane < 32; ++lane) {  // a fragment's pairs on their way to a plane
      const device::Position place = device::mma_d(lane, 0);
      banks.insert((place.row * plane_stride(tile.columns) + place.column) / 2 % 32);
    }
    check::equal(banks.size(), 32, "banks");
  }
}

void the_plans_of_models(uint64_t) {
  const MonarchPlan many = plan_monarch(4096, 4096, 4096, 64, 64, 1, true, 132, kLimits[2]);
  check::that(many.first.group == 16 && many.second.group == 16, "whole sectors of 64 blocks of 64");
  check::that(many.first.is_wide && many.second.is_wide, "in pieces of 16 bytes");
  const MonarchPlan few = plan_monarch(4096, 4096, 4096, 4, 4, 256, true, 132, kLimits[2]);
  check::that(few.first.group == 1 && few.first.tokens == 128 && few.first.columns == 128, "h comes in runs: large tiles");
  check::that(few.second.group == 4 && few.second.tokens == 64 && few.second.columns == 128, "all four blocks of y");
  const MonarchPlan small = plan_monarch(4096, 4096, 4096, 4, 4, 256, true, 108, kLimits[1]);
  check::that(small.second.group == 4 && small.second.smem_bytes <= kLimits[1], "with less memory, smaller tiles");
  const MonarchPlan runs = plan_monarch(4096, 4096, 4096, 4, 4, 256, false, 132, kLimits[2]);
  check::that(runs.second.group == 1 && runs.second.tokens == 128, "runs of y: large tiles");
  const MonarchPlan one = plan_monarch(1, 4096, 4096, 64, 64, 1, true, 132, kLimits[2]);
  check::that(one.first.tokens == 16 && one.first.grid == 64 && one.second.grid == 64, "one token: a CTA for each block");
  static_assert(plan_monarch(4096, 768, 768, 4, 4, 48, true, 132, 227 << 10).second.is_wide, "known at compile time");
}

void what_is_covered(uint64_t) {
  const auto covers = [](int64_t m, int64_t n, int64_t k, int64_t b_in, int64_t b_out, int64_t r) {
    return plan_monarch(m, n, k, b_in, b_out, r, true, 108, kLimits[1]).first.tokens > 0;
  };
  check::that(covers(1, 1, 8, 1, 1, 8) && covers(kMaxRows, 4096, 4096, 64, 64, 1), "the ends of the range");
  check::that(!covers(0, 8, 8, 1, 1, 8) && !covers(kMaxRows + 1, 8, 8, 1, 1, 8), "rows");
  check::that(!covers(1, 0, 8, 1, 1, 8) && !covers(1, kMaxSize + 1, 8, 1, 1, 8), "outputs");
  check::that(!covers(1, 8, kMaxSize + 8, 1, 1, 8), "inputs");
  check::that(!covers(1, 8, 12, 1, 1, 8) && !covers(1, 8, 64, 4, 1, 1) && !covers(1, 8, 48, 4, 1, 2), "pieces of 16 bytes");
  check::that(!covers(1, 8, 1 << 20, 1 << 10, 1, 1 << 11), "ranks");
  check::that(plan_monarch(1, 8, 8, 1, 1, 8, true, 108, 0).first.tokens == 0, "a GPU without machine code");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"results are where the op says", results_are_where_the_op_says},
                     {"each result is stored once", each_result_is_stored_once},
                     {"pieces are whole", pieces_are_whole},
                     {"plans keep their limits", plans_keep_their_limits},
                     {"planes are behind the stages", planes_are_behind_the_stages},
                     {"the plans of models", the_plans_of_models},
                     {"what is covered", what_is_covered}},
                    1);
}
