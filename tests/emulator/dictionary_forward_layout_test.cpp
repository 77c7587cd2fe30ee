// Who does what in the decode kernel of dictionary, for every size in range.
#include "dictionary/forward_layout.h"

#include <vector>

#include "check.h"

namespace {

using namespace dictionary;

void each_tile_is_in_one_chunk(uint64_t) {
  for (int n = 8; n < 70000; n += 8 * (1 + n / 50)) {
    for (int grid : {1, 2, 7, 132}) {
      const int tiles = parts_of(n, kTileRows);
      for (int block : {0, grid / 2, grid - 1}) {
        const Range mine = share(tiles, grid, block);
        for (int at_once : {1, 2, 5}) {
          int next = mine.first;
          for (int number = 0; number < chunks_of(mine, at_once); ++number) {
            const Range chunk = chunk_of(mine, at_once, number);
            check::equal(chunk.first, next, "chunks follow each other; n", n);
            check::that(chunk.last > chunk.first && chunk.last - chunk.first <= at_once, "none is empty or too large; n", n);
            next = chunk.last;
          }
          check::equal(next, mine.last, "all tiles are in one; n", n);
        }
      }
    }
  }
}

void each_word_is_counted_once(uint64_t) {
  for (int atoms = 8; atoms <= 2048; atoms += 8) {
    const Row row{atoms, 1};
    int next = 0;
    for (int part = 0; part < kCountParts; ++part) {
      const Range words = words_of_part(row, part);
      check::equal(words.first, next, "parts follow each other; atoms", atoms);
      next = words.last;
    }
    check::equal(next, row.words(), "all words are counted; atoms", atoms);
  }
}

void each_item_belongs_to_a_warp(uint64_t) {
  for (int atoms : {8, 40, 512, 2048}) {
    for (int tiles : {1, 2, 7, 30}) {
      const SecondShare items = items_of_chunk({3, 3 + tiles}, {atoms, 1});
      int next = 0;
      for (int warp = 0; warp < kDecodeWarps; ++warp) {
        const Range mine = low_rank::warp_items(items, warp);
        check::equal(mine.first, next, "warps follow each other; tiles", tiles);
        next = mine.last;
      }
      check::equal(next, tiles * parts_of(atoms, 32), "all items are dealt; tiles", tiles);
      check::that(low_rank::slot_of(tiles - 1, kDecodeWarps - 1) < low_rank::slots_for(tiles), "slots; tiles", tiles);
    }
  }
}

void regions_of_shared_memory_do_not_overlap(uint64_t) {
  for (int atoms = 8; atoms <= 2048; atoms += 8) {
    for (int stored : {1, atoms / 2 + 1, atoms}) {
      for (int at_once : {1, 3}) {
        for (int token_tiles : {1, 2}) {
          const Row row{atoms, stored};
          const ForwardMemory at = forward_memory(token_tiles, row, at_once, 2);
          const int tokens = token_tiles * kTokenTile, rows = at_once * kTileRows;
          check::that(at.h % 16 == 0 && at.parts % 16 == 0 && at.counts % 16 == 0 && at.chunks % 16 == 0, "aligned", atoms);
          check::that(at.h >= low_rank::slots_for(at_once) * low_rank::slot_floats(token_tiles) * 4, "sums; atoms", atoms);
          check::that(at.parts - at.h >= tokens * low_rank::h_stride(atoms) * 2, "h; atoms", atoms);
          check::that(at.counts - at.parts >= low_rank::kDecodeThreads * 2, "a part for each thread; atoms", atoms);
          check::that(at.chunks - at.counts >= rows * row.words() * 2, "counts; atoms", atoms);
          check::equal(rows * (stored * 2 + row.words() * 4), at_once * row.tile_bytes(), "a chunk; atoms", atoms);
          check::that(rows * stored * 2 % 16 == 0 && at_once * row.tile_bytes() % 16 == 0, "its parts are aligned", atoms);
          check::equal(at.chunks + 2 * at_once * row.tile_bytes(), at.bytes, "two buffers; atoms", atoms);
        }
      }
    }
  }
}

void plans_keep_their_limits(uint64_t) {
  for (int sm_count : {1, 20, 108, 132}) {
    for (int limit : {101376, 166912, 232448}) {
      for (int m : {1, 8, 9, 16}) {
        for (int a : {8, 384, 1000, 2048}) {
          for (int s : {1, a / 11 + 1, a / 2, a}) {
            for (int k : {8, 768, 4096}) {
              for (int n : {8, 768, 4096, 14336, 128256, 1 << 20}) {
                const ForwardPlan plan = plan_forward(m, n, k, a, s, sm_count, limit);
                const Row row{a, s};
                if (plan.token_tiles == 0) {
                  check::that(forward_memory(m <= 8 ? 1 : 2, row, 1, 2).bytes > limit, "covered, or too large; a", a);
                  continue;
                }
                const int tiles = parts_of(n, kTileRows), of_block = parts_of(tiles, plan.grid);
                check::that(plan.grid >= 1 && plan.grid <= sm_count, "one block to a multiprocessor; a", a);
                check::equal(of_block, parts_of(tiles, sm_count), "no block has more tiles for it; n", n);
                check::equal(plan.buffers, plan.at_once < of_block ? 2 : 1, "a second chunk has a buffer; n", n);
                check::that(plan.at_once <= of_block, "no room for what is not there; n", n);
                const int bytes = forward_memory(plan.token_tiles, row, plan.at_once, plan.buffers).bytes;
                check::equal(plan.smem_bytes, bytes, "bytes; a", a);
                check::that(plan.smem_bytes <= limit, "what a block may have; a", a);
              }
            }
          }
        }
      }
    }
  }
  const auto is_covered = [](int64_t m, int64_t n, int64_t k, int64_t a, int64_t s) {
    return plan_forward(m, n, k, a, s, 132, 232448).token_tiles > 0;
  };
  check::that(is_covered(1, 8, 8, 8, 1) && is_covered(16, 1 << 20, 32768, 2048, 1024), "the ends of the range");
  for (int64_t m : {0, 17}) check::that(!is_covered(m, 8, 8, 8, 1), "m", m);
  for (int64_t n : {0, 4, 12, (1 << 20) + 8}) check::that(!is_covered(1, n, 8, 8, 1), "n", n);
  for (int64_t k : {0, 12, 32776}) check::that(!is_covered(1, 8, k, 8, 1), "k", k);
  for (int64_t a : {0, 12, 2056}) check::that(!is_covered(1, 8, 8, a, 1), "a", a);
  for (int64_t s : {0, 9}) check::that(!is_covered(1, 8, 8, 8, s), "s", s);
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"each tile is in one chunk", each_tile_is_in_one_chunk},
                     {"each word is counted once", each_word_is_counted_once},
                     {"each item belongs to a warp", each_item_belongs_to_a_warp},
                     {"regions of shared memory do not overlap", regions_of_shared_memory_do_not_overlap},
                     {"plans keep their limits", plans_keep_their_limits}},
                    1);
}
