// Who does what in the prefill kernel of sparse24, for every tile and every size in range.
#include "sparse24/prefill_layout.h"

#include <set>
#include <vector>

#include "check.h"

namespace {

using namespace sparse24;

// ldmatrix's eight rows of a matrix, and each copy's eight lanes that write together, meet no bank twice.
void lanes_meet_no_bank_twice(uint64_t) {
  for (int slot = 0; slot < 256; slot += 8) {
    for (int piece = 0; piece < kTokenPieces; ++piece) {
      std::set<int> of_values, of_tokens;
      for (int row = slot; row < slot + 8; ++row) {
        of_values.insert(value_place(row, piece % kValuePieces) % 8);
        of_tokens.insert(token_place(row, piece) % 8);
      }
      check::equal(of_values.size(), 8, "banks of a matrix of values, slot", slot);
      check::equal(of_tokens.size(), 8, "banks of a matrix of tokens, token", slot);
    }
    std::set<int> of_masks;  // words; two lanes of a quad have halves of the same one
    for (int lane = 0; lane < 32; ++lane) of_masks.insert(mask_place(slot + lane / 4, lane % 4) / 2 % 32);
    check::equal(of_masks.size(), 16, "banks of masks, slot", slot);
  }
  for (int thread = 0; thread < 256; thread += 8) {
    std::set<int> of_values, of_tokens;
    for (int t = thread; t < thread + 8; ++t) {
      of_values.insert(value_place(t / kValuePieces, t % kValuePieces) % 8);
      of_tokens.insert(token_place(t / kTokenPieces, t % kTokenPieces) % 8);
    }
    check::that(of_values.size() == 8 && of_tokens.size() == 8, "banks of eight copies, thread", thread);
  }
}

void every_piece_has_a_place(uint64_t) {
  for (int rows : kPrefillRows) {
    const PrefillShape s = prefill_shape(rows);
    std::set<int> values, tokens, of_tile;
    for (int slot = 0; slot < s.rows(); ++slot) {
      of_tile.insert(tile_row_in_slot(s.row_tiles, slot));
      for (int piece = 0; piece < kValuePieces; ++piece) values.insert(value_place(slot, piece));
    }
    for (int token = 0; token < s.tokens(); ++token) {
      for (int piece = 0; piece < kTokenPieces; ++piece) tokens.insert(token_place(token, piece));
    }
    check::that(int(values.size()) == s.rows() * kValuePieces && *values.rbegin() + 1 == int(values.size()), "values", rows);
    check::that(int(tokens.size()) == s.tokens() * kTokenPieces && *tokens.rbegin() + 1 == int(tokens.size()), "x", rows);
    check::that(int(of_tile.size()) == rows && *of_tile.rbegin() == rows - 1, "a slot for each row", rows);
  }
}

// The sums of a lane, fragment after fragment, upper row and lower, are neighbours.
void rows_of_a_lane_are_neighbours(uint64_t) {
  for (int rows : kPrefillRows) {
    const PrefillShape s = prefill_shape(rows);
    for (int lane = 0; lane < 32; ++lane) {
      for (int c = 0; c < 2 * s.row_tiles; ++c) {
        const int slot = c / 2 * kTileRows + device::mma_d(lane, c % 2 * 2).row;
        check::equal(row_in_slot(s.row_tiles, slot), lane / 4 * 2 * s.row_tiles + c, "row of a lane", lane * 8 + c);
      }
    }
    for (int first = 0; first < rows; first += s.warp_rows()) {
      check::equal(tile_row_in_slot(s.row_tiles, first), first, "a warp's rows are its own", first);
    }
  }
}

// A lane's half of a word tells of the inputs that the tensor core asks it for.
void masks_are_where_they_are_asked_for(uint64_t) {
  for (int row = 0; row < kTileRows; ++row) {
    for (int four = 0; four < kSlab / 4; ++four) {
      const device::MetadataPlace due = device::mma_sp_metadata(row, four % 8, four / 8);
      check::equal(due.lane / 4, row % 8, "the quad of a row", row);
      check::equal(due.shift / 16, row / 8, "the half of its lane's word", row);
      const int bit = mask_place(row, due.lane % 4) * 16 + due.shift % 16;  // in the stage's masks
      check::equal(bit, row * kSlab + four * 4, "the bits of four inputs", row * 16 + four);
      const uint32_t metadata = kept_positions(0xcu << due.shift | (0x33333333u & ~(0xfu << due.shift)));
      check::equal(metadata ^ 0x44444444u, (0xeu ^ 0x4u) << due.shift, "where they are kept", four);
    }
  }
}

void every_tile_has_one_index(uint64_t) {
  for (int rows : kPrefillRows) {
    const PrefillShape s = prefill_shape(rows);
    for (int row_tiles : {1, 2, 7, 8, 9, 16, 31}) {
      for (int token_tiles : {1, 2, 5, 40}) {
        std::set<std::pair<int, int>> tiles;
        for (int i = 0; i < row_tiles * token_tiles; ++i) {
          const PrefillTile tile = prefill_tile(rows, s.tokens(), row_tiles, token_tiles, i);
          check::that(tile.row >= 0 && tile.row <= (row_tiles - 1) * rows && tile.row % rows == 0, "row", tile.row);
          check::that(tile.token >= 0 && tile.token <= (token_tiles - 1) * s.tokens() && tile.token % s.tokens() == 0,
                      "token", tile.token);
          tiles.insert({tile.row, tile.token});
        }
        check::equal(tiles.size(), row_tiles * token_tiles, "each once; tiles of rows", row_tiles);
      }
    }
  }
}

// What the blocks of a GPU work on at a time is a patch that is about square in bytes: nobody reads all of the weight or x.
void tiles_of_a_time_are_neighbours(uint64_t) {
  const PrefillShape s = prefill_shape(256);
  for (int first = 0; first + 132 <= 64 * 64; first += 132) {
    std::set<int> rows, tokens;
    for (int i = first; i < first + 132; ++i) {
      const PrefillTile tile = prefill_tile(256, s.tokens(), 64, 64, i);
      rows.insert(tile.row), tokens.insert(tile.token);
    }
    check::that(rows.size() <= 2 * kPatchRows && rows.size() + tokens.size() <= 36, "tiles that are read", first);
  }
}

void shapes_fit_the_gpu(uint64_t) {
  for (int rows : kPrefillRows) {
    const PrefillShape s = prefill_shape(rows);
    check::equal(s.rows(), rows, "the rows that name it", rows);
    check::that(s.stages >= 3 && s.threads() * s.blocks <= 512, "stages and threads", rows);
    check::that(s.stage_bytes() % 16 == 0 && s.smem_bytes() <= 166912, "a block of an sm_80", rows);
    const int sums = s.row_tiles * s.token_tiles * 4, fragments = (s.row_tiles + s.token_tiles) * 4;
    check::that(sums + fragments <= 65536 / (s.threads() * s.blocks) - 24, "registers: and 24 for all else", rows);
  }
}

void plans_keep_their_limits(uint64_t) {
  for (int sm_count : {1, 20, 46, 108, 132}) {
    for (int limit : {50000, 101376, 166912, 232448}) {
      for (int m : {1, 65, 128, 129, 512, 2048, 16384, 1 << 24}) {
        for (int k : {16, 64, 768, 4096, 11008}) {
          for (int n : {1, 8, 768, 4096, 14336, 128256}) {
            const PrefillPlan plan = plan_prefill(m, n, k, sm_count, limit);
            if (limit == 50000) {
              check::equal(plan.rows, 0, "no tile fits", limit);
              continue;
            }
            const PrefillShape s = prefill_shape(plan.rows);
            const int64_t tiles = prefill_tiles(s, m, n);
            check::that(plan.rows == s.rows() && plan.tokens == s.tokens() && plan.smem_bytes == s.smem_bytes(), "shape", n);
            check::that(plan.smem_bytes <= limit && tiles <= kPrefillMaxTiles, "limits", n);
            check::that(plan.grid >= 1 && plan.grid <= tiles && plan.grid <= s.blocks * sm_count, "blocks", n);
            if (limit == 101376) check::that(plan.rows < 256 && plan.grid <= sm_count, "what fits 99 KB, once", n);
          }
        }
      }
    }
  }
  const auto is_covered = [](int64_t m, int64_t n, int64_t k) { return plan_prefill(m, n, k, 132, 232448).rows > 0; };
  check::that(is_covered(1, 1, 16) && is_covered(kPrefillMaxTokens, 1024, kForwardMaxSize), "the ends of the range");
  check::that(is_covered(65, kForwardMaxSize, 16), "the ends of the range");
  for (int64_t m : {int64_t{0}, kPrefillMaxTokens + 1, int64_t{1} << 40}) check::that(!is_covered(m, 8, 64), "m", m);
  for (int64_t n : {int64_t{0}, kForwardMaxSize + 1}) check::that(!is_covered(1, n, 64), "n", n);
  for (int64_t k : {int64_t{0}, int64_t{8}, int64_t{100}, kForwardMaxSize + 16}) check::that(!is_covered(1, 8, k), "k", k);
}

// Few tiles are cut smaller until the multiprocessors have some; many are large.
void layers_fill_the_gpu(uint64_t) {
  const auto rows_for = [](int m, int n) { return plan_prefill(m, n, 4096, 132, 232448).rows; };
  check::equal(rows_for(65, 4096), 64, "rows of a tile");
  check::equal(rows_for(512, 4096), 128, "rows of a tile");
  for (int m : {1024, 4096, 16384}) check::equal(rows_for(m, 4096), 256, "rows of a tile, m", m);
  check::equal(plan_prefill(4096, 4096, 4096, 108, 166912).rows, 256, "on an sm_80");
  check::equal(plan_prefill(512, 4096, 4096, 132, 232448).grid, 128, "blocks");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"lanes meet no bank twice", lanes_meet_no_bank_twice},
                     {"every piece has a place", every_piece_has_a_place},
                     {"rows of a lane are neighbours", rows_of_a_lane_are_neighbours},
                     {"masks are where they are asked for", masks_are_where_they_are_asked_for},
                     {"every tile has one index", every_tile_has_one_index},
                     {"tiles of a time are neighbours", tiles_of_a_time_are_neighbours},
                     {"shapes fit the GPU", shapes_fit_the_gpu},
                     {"plans keep their limits", plans_keep_their_limits},
                     {"layers fill the GPU", layers_fill_the_gpu}},
                    1);
}
