// Who does what in the backward kernels of a sparse factor, for every size in range: runs share a row's values, each piece
// has room, no bank twice.
#include "sparse24/backward.h"

#include <set>

#include "check.h"
#include "host/gpu.h"

namespace {

using namespace sparse24;

constexpr int kTiles[] = {kSmallTile, kLargeTile};

SparseSizes sizes_of(int columns, int kept, int group) {
  return {64, 64, columns, 1, 1, columns / group * kept, kept, group};
}

void runs_share_the_values_of_a_row(uint64_t) {
  for (int tile : kTiles) {
    for (int group : {1, 2, 3, 4, 5, 8, 16, 32, 64, 128}) {
      for (int kept = 1; kept <= group; kept += 1 + kept / 3) {
        for (int columns = group; columns < 700; columns += group * (1 + columns / 50)) {
          const SparseSizes s = sizes_of(columns, kept, group);
          check::that(has_even_runs(s) == (64 % group == 0), "which patterns are even; group", group);
          if (!has_even_runs(s)) continue;
          int next = 0;
          for (int number = 0; number * tile < columns; ++number) {
            const Run run = even_run(s, tile, number);
            check::equal(run.first, next, "runs follow each other; columns", columns);
            check::that(run.count > 0 && run.count <= tile, "a tile's values; columns", columns);
            next += run.count;
          }
          check::equal(next, s.stored, "all values; columns", columns);
          check::equal(even_run(s, tile, parts_of(columns, tile)).count, 0, "none behind them");
        }
      }
    }
  }
  check::that(!has_even_runs({64, 64, 64, 1, 1, 7, 0, 0}), "any pattern is counted");
}

// Whatever was counted: never outside of the row's values.
void counted_runs_stay_in_their_row(uint64_t) {
  for (int stored = 1; stored < 40; ++stored) {
    for (int first = 0; first < 60; ++first) {
      for (int next = first; next < 60; ++next) {
        const Run run = counted_run(stored, first, next);
        check::that(run.first >= 0 && run.count >= 0 && run.first + run.count <= stored, "inside", first);
        if (next <= stored) check::that(run.first == first && run.count == next - first, "what was counted", first);
      }
    }
  }
}

void pieces_have_room_and_lanes_their_banks(uint64_t) {
  for (int tile : kTiles) {
    for (int begin = 0; begin < 8; ++begin) {
      check::that(parts_of(begin + tile, 8) <= run_pieces(tile), "pieces of the longest run; begin", begin);
    }
    check::equal(row_threads(tile) * kThreadColumns, tile, "the threads of a row have all its columns");
    check::equal(row_threads(tile) * low_rank::tile_depth(tile), low_rank::kBackwardThreads, "each thread has a row");
    check::that(kWordBits % kThreadColumns == 0, "a thread's columns are in one word");
    std::set<int> banks;  // a run on its way: of eight rows, four neighbours
    for (int lane = 0; lane < 32; ++lane) banks.insert((lane / 4 * run_stride(tile) + lane % 4) % 32);
    check::equal(banks.size(), 32, "banks of a write of runs; tile", tile);
    check::that(run_stride(tile) >= tile, "room for a run of all columns; tile", tile);
  }
}

void blocks_of_rows_share_them(uint64_t) {
  for (int n = 8; n < 700; n += 8) {
    for (int p = 1; p < 20; ++p) {
      const SparseSizes s{64, n, 64, p, 1, 8, 0, 0};
      int sum = 0;
      for (int block = 0; block < p; ++block) {
        check::that(s.rows_of(block) >= 0 && s.rows_of(block) <= s.rows(), "rows of a block", block);
        sum += s.rows_of(block);
      }
      check::equal(sum, n, "rows of all blocks; p", p);
    }
  }
}

void plans_keep_their_limits(uint64_t) {
  for (int64_t m : {1, 64, 65, 130, 2048, 65536, 1 << 24}) {
    for (int64_t n : {8, 768, 4096, 14336, 128256}) {
      for (int64_t columns : {8, 200, 1024, 4096, 28672}) {
        for (const auto& [p, q] : {std::pair{1, 1}, std::pair{2, 3}, std::pair{24, 1}}) {
          if (n / p * p != n || n / p % 8) continue;
          for (int group : {0, 4, 5}) {
            const int kept = group / 2;
            if (group > 0 && (columns % group || p * q > 1)) continue;
            const int64_t stored = group > 0 ? columns / group * kept : columns / 8;
            for (int sm_count : {1, 20, 108, 132}) {
              for (int needs : {1, 2, 3, 8, 9, 10, 11}) {
                const BackwardPlan plan = plan_backward(m, n, columns, p, q, stored, kept, group, needs, sm_count);
                if (plan.tile == 0) {
                  const int64_t tiles = m * columns * p * q / 64 / 64;
                  check::that(tiles > low_rank::kBackwardMaxBlocks / 4, "covered, or too large; m", m);
                  continue;
                }
                const SparseSizes s{int(m), int(n), int(columns), p, q, int(stored), kept, group};
                check::equal(plan.tile, m <= 64 || s.rows() <= 64 || columns <= 64 ? 64 : 128, "tile; m", m);
                const auto fits = [&](int splits, int64_t tiles, int64_t depth) {
                  const int64_t steps = device::ceil_div(depth, low_rank::tile_depth(plan.tile));
                  check::that(splits >= 1 && splits <= steps, "each split has a step; m", m);
                  check::that(splits == 1 || splits * tiles <= 2 * sm_count, "two blocks to a multiprocessor; m", m);
                  check::that(splits * tiles <= int64_t{1} << 31, "blocks of a grid; m", m);
                };
                fits(plan.dx_splits, dx_tiles(s, plan.tile), s.rows());
                fits(plan.values_splits, larger(1, int(values_tiles(s, needs, plan.tile))), m);
                check::that((plan.dx_splits == 1 || needs & 1) && (plan.values_splits == 1 || needs & ~1), "what is wanted");
                const int64_t dx = plan.dx_splits * s.outputs();
                const int64_t values = plan.values_splits * ((needs & 2 ? s.values() : 0) + (needs & 8 ? n : 0));
                check::that(plan.dx_splits == 1 || plan.partials >= dx, "room for dx; m", m);
                check::that(plan.values_splits == 1 || plan.partials >= values, "room for values; m", m);
                check::that(plan.partials <= (dx > values ? dx : values), "no more than that; m", m);
                check::that(plan.partials == 0 || plan.dx_splits > 1 || plan.values_splits > 1, "none without splits; m", m);
                const int64_t tiles = device::ceil_div(columns, plan.tile);
                check::equal(plan.starts, group == 4 ? 0 : n * q * tiles, "where runs begin, counted; group", group);
              }
            }
          }
        }
      }
    }
  }
  const auto tile = [](int64_t m, int64_t n, int64_t columns, int64_t p, int64_t stored) {
    return plan_backward(m, n, columns, p, 1, stored, 0, 0, 11, 132).tile;
  };
  for (int64_t m : {int64_t{0}, int64_t{1} << 40}) check::equal(tile(m, 8, 8, 1, 4), 0, "m", m);
  for (int64_t n : {0, 4, 12}) check::equal(tile(64, n, 8, 1, 4), 0, "n", n);
  for (int64_t columns : {0, 4, 12}) check::equal(tile(64, 8, columns, 1, 1), 0, "columns", columns);
  for (int64_t p : {0, 3, 5000}) check::equal(tile(64, 40, 8, p, 4), 0, "blocks of rows that are no whole pieces", p);
  for (int64_t stored : {0, 9}) check::equal(tile(64, 8, 8, 1, stored), 0, "stored", stored);
}

// Nothing that has not been measured: see choose_backward.
void kernels_are_chosen_where_they_are_meant(uint64_t) {
  const auto problem = [](int64_t m, int64_t n, int64_t k, int64_t kept, int64_t group, Dtype dtype) {
    Problem p;
    p.m = m, p.n = n, p.k = k, p.kept = kept, p.group = group, p.dtype = dtype, p.device = Device::cuda;
    return p;
  };
  const auto tile = [](const Problem& p) { return choose_backward(p, 11).tile; };
  const Dtype bf16 = Dtype::bfloat16;
  for (int64_t m : {0, 1, 63}) check::equal(tile(problem(m, 4096, 4096, 2, 4, bf16)), 0, "fewer rows", m);
  check::equal(tile(problem(64, 4096, 4096, 2, 4, bf16)), kSmallTile, "64 rows");
  check::equal(tile(problem(65, 4096, 4096, 1, 8, Dtype::float16)), kLargeTile, "65 rows");
  check::equal(tile(problem(8192, 4100, 4096, 2, 4, bf16)), 0, "rows of dy that are not 16-byte aligned");
  check::equal(tile(problem(8192, 4096, 4100, 2, 4, bf16)), 0, "rows of x");
  check::equal(tile(problem(8192, 4096, 4096, 2, 5, bf16)), 0, "a group that does not divide them");
  for (const auto& [kept, group] : {std::pair{0, 4}, std::pair{5, 4}, std::pair{1, 0}, std::pair{-1, -4}}) {
    check::equal(tile(problem(8192, 4096, 4096, kept, group, bf16)), 0, "a pattern that there is not; kept", kept);
  }
  for (Dtype dtype : {Dtype::float32, Dtype::float64}) check::equal(tile(problem(8192, 64, 64, 2, 4, dtype)), 0, "dtypes");
  Problem p = problem(8192, 4096, 4096, 2, 4, bf16);
  for (int arch : {75, 100, 120}) check::equal((p.arch = arch, tile(p)), 0, "other GPUs", arch);
  for (int arch : {80, 86, 89, 90}) check::equal((p.arch = arch, tile(p)), kLargeTile, "GPUs", arch);
  for (int arch : {80, 86, 89, 90}) check::that(shared_memory_of(arch) >= kBackwardSmemBytes, "shared memory", arch);
  p.is_aligned = false;
  check::equal(tile(p), 0, "operands that are not aligned");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"runs share the values of a row", runs_share_the_values_of_a_row},
                     {"counted runs stay in their row", counted_runs_stay_in_their_row},
                     {"pieces have room and lanes their banks", pieces_have_room_and_lanes_their_banks},
                     {"blocks of rows share them", blocks_of_rows_share_them},
                     {"plans keep their limits", plans_keep_their_limits},
                     {"kernels are chosen where they are meant", kernels_are_chosen_where_they_are_meant}},
                    1);
}
