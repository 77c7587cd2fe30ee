// Who does what in the backward kernels of monarch, for a wide range of sizes: each element where the op defines it, each
// tile and piece once, whole pieces where they are promised, and no bank more often than it has to be.
#include "monarch/backward_layout.h"

#include <map>
#include <set>
#include <vector>

#include "check.h"

namespace {

using namespace monarch;

constexpr int kGroups[] = {1, 2, 4, 8};
constexpr int kAll = 15;

// Those that the kernels cover.
template <class Visit>
void each_problem(const Visit& visit) {
  for (int b_in : {1, 2, 9, 16}) {
    for (int b_out : {1, 2, 3, 4, 8, 24}) {
      for (int r : {1, 2, 4, 8, 12, 68}) {
        for (int rows : {1, 8, 24, 136}) {
          for (int missing : {0, b_out / 2}) {
            for (bool interleave : {true, false}) {
              const int n = b_out * rows - missing, k = b_in * 16 - b_in / 9 * 8;
              if (n < 1 || !plan_backward(300, n, k, b_in, b_out, r, interleave, kAll, 4, 99 << 10).is_covered) continue;
              visit(Sizes{300, n, k, b_in, b_out, r, interleave});
            }
          }
        }
      }
    }
  }
}

template <class Visit>
void each_product(const Sizes& s, const Visit& visit) {
  for (const Product& p : {dz_product(s), dx_product(s), dv_product(s), du_product(s)}) visit(p, plan_product(p, 4));
}

void elements_are_where_the_op_says(uint64_t) {
  int problems = 0;
  each_problem([&](const Sizes& s) {
    ++problems;
    const int p = s.p(), rows = s.s(), q = s.r * s.b_out, t = s.b_in * s.r;
    const int64_t token = 5;
    const Product dz = dz_product(s), dx = dx_product(s), dv = dv_product(s), du = du_product(s);
    for (int o : {0, s.b_out - 1}) {
      for (int c = 0; c < rows; ++c) {
        const int output = s.interleave ? o + c * s.b_out : o * rows + c;
        check::that(dz.a.has(o, c) == (output < s.n) && du.a.has(o, c) == (output < s.n), "an output there is", c);
        check::equal(dz.a.offset(o, token, c), token * s.n + output, "dy", c);
        check::equal(du.a.in_row(o, c), output, "the output of a row of du", c);
        check::equal(dz.b.offset(o, c, 3), (double(o) * rows + c) * t + 3, "u", c);
        check::equal(du.c.offset(o, c, 3), (double(o) * rows + c) * t + 3, "du", c);
      }
      for (int e = 0; e < t; ++e) {
        const double place = (double(e / s.r) * s.m + token) * q + o * s.r + e % s.r;
        check::equal(dz.c.offset(o, token, e), place, "dz, of an output block", e);
        check::equal(dx.a.offset(e / s.r, token, o * s.r + e % s.r), place, "dz, of an input block", e);
        check::equal(du.b.offset(o, token, e), (double(o) * s.m + token) * t + e, "h", e);
      }
      check::that(!dz.a.has(o, rows) && !dz.b.has(o, t) && dz.c.has(o, t - 1), "no column past the last");
    }
    for (int i : {0, s.b_in - 1}) {
      for (int d = 0; d < p; ++d) {
        const int input = i * p + d;
        check::that(dx.c.has(i, d) == (input < s.k) && dv.b.has(i, d) == (input < s.k), "an input there is", d);
        check::equal(dx.c.offset(i, token, d), token * s.k + input, "dx", d);
        check::equal(dv.b.offset(i, token, d), token * s.k + input, "x", d);
      }
      std::set<int> found;
      for (int row = 0; row < q; ++row) {  // of dz: by output block, then by rank
        const double place = (double(i) * q + row % s.r * s.b_out + row / s.r) * p + 1;
        check::equal(dx.b.offset(i, row, 1), place, "v", row);
        check::equal(dv.c.offset(i, row, 1), place, "dv", row);
        found.insert(dx.b.row_at(row));
      }
      check::equal(found.size(), q, "each row of v once");
    }
    each_product(s, [&](const Product& product, const ProductPlan&) {
      check::that(product.rows > 0 && product.columns > 0 && product.depth > 0, "sizes");
      check::that(product.is_across == (product.depth == s.m), "weights contract the tokens");
    });
  });
  check::that(problems > 100, "there were problems", problems);
}

void each_tile_and_split_has_one_cta(uint64_t) {
  each_problem([](const Sizes& s) {
    each_product(s, [&](const Product& p, const ProductPlan& plan) {
      std::vector<int> results(p.blocks * p.rows * p.columns);
      for (int index = 0; index < plan.grid; ++index) {
        const ProductPlace at = place_of(plan, index);
        check::that(at.split >= 0 && at.split < plan.splits, "split", index);
        check::that(at.block < p.blocks && at.row < p.rows && at.column < p.columns, "no CTA is empty", index);
        if (at.split != plan.splits - 1) continue;
        for (int block = at.block; block < smaller(p.blocks, at.block + plan.group); ++block) {
          for (int row = at.row; row < smaller(p.rows, at.row + rows_of_group(plan.group)); ++row) {
            for (int column = at.column; column < smaller(p.columns, at.column + kTileColumns); ++column) {
              ++results[(block * p.rows + row) * p.columns + column];
            }
          }
        }
      }
      for (int times : results) check::equal(times, 1, "times a result is made");
      int next = 0;
      for (int split = 0; split < plan.splits; ++split) {
        const Steps steps = steps_of_split(p, plan, split);
        check::equal(steps.first, next, "splits follow each other");
        check::that(steps.last > steps.first, "no split is empty");
        next = steps.last;
      }
      check::equal(next, parts_of(p.depth, product_depth(plan.group)), "all of the depth");
    });
  });
}

// Eight neighbours of a's tile that a thread copies together are neighbours in memory, aligned, and all there or none.
void pieces_are_whole(uint64_t) {
  int gathered = 0, runs = 0;
  each_problem([&](const Sizes& s) {
    each_product(s, [&](const Product& p, const ProductPlan& plan) {
      for (int block = 0; block < p.blocks; block += plan.gathers ? plan.group : 1) {
        const int count = plan.gathers ? p.a.columns * plan.group : p.a.columns;  // of elements in a row of shared memory
        for (int first = 0; first < count; first += 8) {
          const int in_block = plan.gathers ? first / plan.group : first;
          const int64_t from = p.a.in_row(block, in_block);
          const bool is_there = p.a.has(block, in_block);
          check::that(!is_there || from % 8 == 0, "aligned", from);
          for (int e = first; e < smaller(first + 8, count); ++e) {
            const int column = plan.gathers ? e / plan.group : e, of_block = block + (plan.gathers ? e % plan.group : 0);
            check::equal(p.a.in_row(of_block, column), from + e - first, "neighbours", e);
            check::that(p.a.has(of_block, column) == is_there, "all of them or none", e);
          }
          ++(plan.gathers ? gathered : runs);
        }
      }
      check::that(p.a.row_step % 8 == 0 && p.b.row_step % 8 == 0 && p.b.columns % 8 == 0, "rows are whole pieces");
      if (stores_of(p, plan) == Stores::along) {
        check::that(p.c.row_step % 8 == 0 && p.c.unit_step % 8 == 0, "results, too");
        for (int block = 0; block < p.blocks; ++block) {
          for (int column = 0; column < p.columns; column += 8) {
            check::equal(p.c.offset(block, 0, column) % 8, 0, "an aligned piece", column);
            check::equal(p.c.offset(block, 1, column + 7), p.c.offset(block, 1, column) + 7, "in one run", column);
            check::that(p.c.has(block, column) == p.c.has(block, column + 7), "all of it or nothing", column);
          }
        }
      }
      if (stores_of(p, plan) == Stores::across) {
        const int unit = p.c.unit;
        for (int block = 0; block < p.blocks; block += plan.group) {
          for (int column = 0; column < p.columns; column += unit) {
            const int64_t first = p.c.offset(block, 7, column);
            check::equal(first % 8, 0, "an aligned piece of several blocks", column);
            for (int e = 0; e < plan.group * unit; ++e) {
              check::equal(p.c.offset(block + e / unit, 7, column + e % unit), first + e, "in one run, of blocks", e);
            }
          }
        }
      }
    });
  });
  check::that(gathered > 1000 && runs > 1000, "both kinds were there");
}

void lanes_meet_no_bank_more_often_than_they_must(uint64_t) {
  for (int group : kGroups) {
    for (bool is_across : {false, true}) {
      const int pieces = pieces_of_a(group, is_across), rows = is_across ? product_depth(group) : rows_of_group(group);
      check::equal(pieces * 16 * rows, bytes_of_a(group), "bytes of a; group", group);
      std::set<int> places;
      for (int row = 0; row < rows; ++row) {
        for (int piece = 0; piece < pieces; ++piece) {
          places.insert(piece_at(pieces, row, piece));
          if (row % 8) continue;
          std::set<int> banks;  // of ldmatrix: eight rows
          for (int i = 0; i < 8; ++i) banks.insert(piece_at(pieces, row + i, piece) % 8);
          check::equal(banks.size(), 8, "groups of banks, eight rows; pieces", pieces);
        }
      }
      check::that(int(places.size()) == pieces * rows && *places.rbegin() == pieces * rows - 1, "each place once", pieces);
      if (group == 1) continue;
      std::map<int, std::set<int>> words;  // of each bank, when a warp gathers the first elements of a fragment
      for (int lane = 0; lane < 32; ++lane) {
        const device::Position at = device::mma_a(lane, 0);
        const int token = is_across ? at.column : at.row, number = (is_across ? at.row : at.column) * group;
        const int word = piece_at(pieces, token, number / 8) * 4 + number % 8 / 2;
        words[word % 32].insert(word);
      }
      for (const auto& [bank, found] : words) check::that(found.size() <= 4, "a lane has one word of a piece; group", group);
    }
  }
  std::set<int> banks;
  for (int lane = 0; lane < 32; ++lane) {
    const device::Position at = device::mma_d(lane, 0);
    banks.insert((at.row * kStrideOfC + at.column) / 2 % 32);
  }
  check::equal(banks.size(), 32, "banks of a write of c");
  check::that(kStrideOfC % 8 == 0 && kStrideOfC >= kTileColumns, "rows of c are aligned and have room");
}

void plans_keep_their_limits(uint64_t) {
  each_problem([](const Sizes& s) {
    for (int m : {1, 64, 300, 5000}) {
      for (int sm_count : {1, 108, 132}) {
        for (int needs = 1; needs <= kAll; ++needs) {
          const BackwardPlan plan =
              plan_backward(m, s.n, s.k, s.b_in, s.b_out, s.r, s.interleave, needs, sm_count, 99 << 10);
          check::that(plan.is_covered, "covered");
          check::that((plan.dz.group > 0) == bool(needs & 3) && (plan.dx.group > 0) == bool(needs & 1) &&
                          (plan.dv.group > 0) == bool(needs & 2) && (plan.du.group > 0) == bool(needs & 12) &&
                          (plan.middle.tokens > 0) == bool(needs & 4),
                      "what is needed", needs);
          for (const ProductPlan* one : {&plan.dz, &plan.dx, &plan.dv, &plan.du}) {
            if (one->group == 0) continue;
            const bool is_weight = one == &plan.dv || one == &plan.du;
            check::that(is_weight || one->splits == 1, "only tokens are split");
            check::that(one->splits == 1 || one->grid <= kResidentBlocks * sm_count, "no more than the GPU has room for");
            check::equal(one->grid, one->groups * one->row_tiles * one->column_tiles * one->splits, "CTAs");
            check::that(one->gathers == (s.interleave && s.b_out > 1 && one != &plan.dx && one != &plan.dv), "gathers");
          }
          const int64_t dv = int64_t{s.b_in} * s.r * s.b_out * s.p(), du = int64_t{s.b_out} * s.s() * s.b_in * s.r;
          const int64_t of_dv = needs & 2 && plan.dv.splits > 1 ? plan.dv.splits * dv : 0;
          const int64_t of_du = plan.du.splits > 1 ? plan.du.splits * ((needs & 4 ? du : 0) + (needs & 8 ? s.n : 0)) : 0;
          check::equal(plan.partials, of_dv + of_du, "floats of workspace");
        }
      }
    }
  });
  for (int group : kGroups) {
    check::that(product_smem_bytes(group) <= 99 << 10, "fits an sm_86; group", group);
    check::that(product_smem_bytes(group) >= kTileRows * kStrideOfC * 2, "c has room; group", group);
  }
}

void what_is_covered(uint64_t) {
  const auto covers = [](int64_t n, int64_t k, int64_t b_in, int64_t b_out, int64_t r, bool interleave = true,
                         int smem_limit = 99 << 10) {
    return plan_backward(64, n, k, b_in, b_out, r, interleave, kAll, 108, smem_limit).is_covered;
  };
  check::that(covers(4096, 4096, 64, 64, 1) && covers(768, 768, 4, 4, 48) && covers(8, 8, 1, 1, 8), "models");
  check::that(covers(768, 768, 4, 2, 4) && covers(768, 768, 4, 24, 2), "2, 4 or multiples of 8 output blocks");
  check::that(!covers(768, 768, 4, 3, 8) && !covers(768, 768, 4, 12, 8), "others lie between each other in other ways");
  check::that(covers(768, 768, 4, 3, 8, false) && covers(768, 768, 4, 12, 8, false), "in runs they do not");
  check::that(!covers(768, 768, 4, 5, 8, false), "runs that begin anywhere");
  check::that(!covers(764, 768, 4, 4, 48) && !covers(768, 764, 4, 4, 48), "sizes that are no whole pieces");
  check::that(!covers(768, 768, 8, 4, 1) && !covers(768, 768, 4, 8, 1), "ranks of one side that are none");
  check::that(!covers(768, 768, 4, 4, 48, true, 0), "a GPU without machine code");
  const BackwardPlan many = plan_backward(4096, 4096, 4096, 64, 64, 1, true, kAll, 132, 227 << 10);
  check::that(many.dz.group == 8 && many.dx.group == 1 && many.dv.group == 4 && many.dv.splits == 16, "64 blocks of 64");
  const BackwardPlan few = plan_backward(4096, 768, 768, 4, 4, 48, true, kAll, 132, 227 << 10);
  check::that(few.dz.group == 4 && few.dx.group == 1 && few.dv.group == 1, "4 blocks of 192");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"elements are where the op says", elements_are_where_the_op_says},
                     {"each tile and split has one CTA", each_tile_and_split_has_one_cta},
                     {"pieces are whole", pieces_are_whole},
                     {"lanes meet no bank more often than they must", lanes_meet_no_bank_more_often_than_they_must},
                     {"plans keep their limits", plans_keep_their_limits},
                     {"what is covered", what_is_covered}},
                    1);
}
