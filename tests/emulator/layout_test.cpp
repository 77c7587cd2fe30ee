// The index functions of device/layout.h, over all their arguments: each element has one owner, tiles keep their bytes and
// their alignment, accesses of a warp meet no bank conflicts, work is dealt out completely.
#include "device/layout.h"

#include <set>

#include "check.h"

namespace {

using namespace device;

// 32 banks of four bytes; a warp's 16-byte accesses go in four rounds of eight lanes. The most lanes of a round that need
// different words of one bank.
template <class Address>
int bank_conflicts(const Address& address) {
  int most = 0;
  for (int round = 0; round < 4; ++round) {
    std::map<int, std::set<uint32_t>> words;
    for (int lane = round * 8; lane < round * 8 + 8; ++lane) {
      for (int word = 0; word < 4; ++word) {
        const uint32_t at = address(lane) / 4 + word;
        words[at % 32].insert(at);
      }
    }
    for (auto& [bank, of_bank] : words) most = std::max(most, static_cast<int>(of_bank.size()));
  }
  return most;
}

// Every element of [rows, columns] belongs to exactly one (thread, i).
template <class Owner>
void check_owners(const char* what, int threads, int elements, int rows, int columns, const Owner& owner) {
  std::vector<int> owners(rows * columns, 0);
  for (int thread = 0; thread < threads; ++thread) {
    for (int i = 0; i < elements; ++i) {
      const Position at = owner(thread, i);
      check::that(at.row >= 0 && at.row < rows && at.column >= 0 && at.column < columns, what, thread * 1000 + i);
      ++owners[at.row * columns + at.column];
    }
  }
  for (int i = 0; i < rows * columns; ++i) check::equal(owners[i], 1, what, i);
}

void fragments(uint64_t) {
  check_owners("mma_a", 32, 8, 16, 16, mma_a);
  check_owners("mma_b", 32, 4, 16, 8, mma_b);
  check_owners("mma_b, sparse", 32, 8, 32, 8, mma_b);
  check_owners("mma_d", 32, 4, 16, 8, mma_d);
  check_owners("mma_a_tf32", 32, 4, 16, 8, mma_a_tf32);
  check_owners("mma_b_tf32", 32, 2, 8, 8, mma_b_tf32);
  for (int n : {16, 32, 64, 128, 256}) check_owners("wgmma_d", 128, n / 2, 64, n, wgmma_d);
}

// One corner of each, from the pictures of the PTX documentation.
void known_places(uint64_t) {
  auto is_at = [](Position found, int row, int column) { return found.row == row && found.column == column; };
  check::that(is_at(mma_a(31, 7), 15, 15) && is_at(mma_a(5, 2), 9, 2) && is_at(mma_a(5, 4), 1, 10), "mma_a");
  check::that(is_at(mma_b(5, 2), 10, 1) && is_at(mma_b(31, 7), 31, 7), "mma_b");
  check::that(is_at(mma_d(5, 3), 9, 3), "mma_d");
  check::that(is_at(mma_a_tf32(5, 1), 9, 1) && is_at(mma_a_tf32(5, 2), 1, 5), "mma_a_tf32");
  check::that(is_at(mma_b_tf32(5, 1), 5, 1), "mma_b_tf32");
  check::that(is_at(wgmma_d(127, 127), 63, 255) && is_at(wgmma_d(33, 2), 24, 2), "wgmma_d");
}

// ldmatrix turns rows named by lane 8 i + j into register i of the lanes, elements (lane / 4, 2 (lane % 4)) of matrix i.
void ldmatrix_rows(uint64_t) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    const Position corner = ldmatrix_row(matrix * 8);
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        const Position wanted = mma_a(lane, matrix * 2 + half);
        check::equal(corner.row + lane / 4, wanted.row, "row", lane);
        check::equal(corner.column + lane % 4 * 2 + half, wanted.column, "column", lane);
      }
    }
  }
}

void metadata(uint64_t) {
  for (int selector = 0; selector < 2; ++selector) {
    std::set<std::pair<int, int>> places;
    for (int row = 0; row < 16; ++row) {
      for (int four = 0; four < 8; ++four) {
        const MetadataPlace place = mma_sp_metadata(row, four, selector);
        check::equal(place.lane % 4 / 2, selector, "lane", place.lane);
        check::that(place.lane < 32 && place.shift % 4 == 0 && place.shift < 32, "in a word", place.shift);
        check::that(places.insert({place.lane, place.shift}).second, "one place each", row);
      }
    }
  }
}

void swizzle(uint64_t) {
  std::vector<int> hit(8192, 0);
  for (uint32_t offset = 0; offset < 8192; ++offset) {
    const uint32_t moved = swizzle128(offset);
    ++hit[moved];
    check::equal(moved / 128, offset / 128, "stays in its row", offset);
    check::equal(moved % 16, offset % 16, "16 bytes stay together", offset);
    check::equal(swizzle128(moved), offset, "its own inverse", offset);
  }
  for (int i = 0; i < 8192; ++i) check::equal(hit[i], 1, "bijective", i);
  for (int row = 0; row < 64; ++row) {
    for (int piece = 0; piece < 8; ++piece) {
      check::equal(swizzled_piece(row, piece), swizzle128(row * 128 + piece * 16), "swizzled_piece", row);
    }
  }
  // ldmatrix and stmatrix in a swizzled tile, any 16 x 16 block of it; and the same without the swizzle, to see the check.
  for (int row = 0; row < 64; row += 16) {
    for (int piece = 0; piece < 8; piece += 2) {
      auto at = [&](int lane) {
        return swizzled_piece(row + ldmatrix_row(lane).row, piece + ldmatrix_row(lane).column / 8);
      };
      auto plain = [&](int lane) { return static_cast<uint32_t>((row + ldmatrix_row(lane).row) * 128 + piece * 16); };
      check::equal(bank_conflicts(at), 1, "ldmatrix without conflicts", row);
      check::equal(bank_conflicts(plain), 8, "conflicts are found", row);
    }
  }
  // Filling a tile row by row, 16 bytes per lane.
  check::equal(bank_conflicts([](int lane) { return swizzled_piece(lane / 8, lane % 8); }), 1, "fill");
}

// Element (row, byte) of the narrow tiles is where the swizzle of 32 or 64 bytes takes the plain address.
template <int kRowBytes>
void narrow_swizzle(uint64_t) {
  constexpr int kPieces = kRowBytes / 16;
  std::vector<int> hit(64 * kPieces, 0);
  for (int row = 0; row < 64; ++row) {
    for (int piece = 0; piece < kPieces; ++piece) {
      const uint32_t moved = swizzled_narrow_piece<kRowBytes>(row, piece);
      check::equal(moved / kRowBytes, row, "stays in its row", row);
      check::equal(moved % 16, 0, "16 bytes stay together", row);
      ++hit[moved / 16];
    }
  }
  for (int i = 0; i < 64 * kPieces; ++i) check::equal(hit[i], 1, "bijective", i);
  for (int row = 0; row < 64; row += 16) {  // ldmatrix of 16 rows, two pieces; without a swizzle twice as many in a bank
    auto at = [&](int lane) { return swizzled_narrow_piece<kRowBytes>(row + lane % 16, lane / 16); };
    auto plain = [&](int lane) { return static_cast<uint32_t>((row + lane % 16) * kRowBytes + lane / 16 * 16); };
    check::equal(bank_conflicts(at), 1, "ldmatrix without conflicts", row);
    check::equal(bank_conflicts(plain), kRowBytes / 16, "conflicts are found", row);
  }
}

void shares(uint64_t) {
  for (int64_t items = 0; items < 300; ++items) {
    for (int parts = 1; parts < 140; parts += 1 + parts / 9) {
      int64_t next = 0;
      for (int index = 0; index < parts; ++index) {
        const Share share = share_of(items, parts, index);
        check::equal(share.begin, next, "follows", index);
        const int64_t size = share.end - share.begin;
        check::that(size == items / parts || size == items / parts + 1, "even", index);
        check::that(index == 0 || size <= share_of(items, parts, index - 1).end - share_of(items, parts, index - 1).begin,
                    "larger first");
        next = share.end;
      }
      check::equal(next, items, "all", parts);
    }
    for (int64_t part : {1, 3, 16}) {
      check::that(ceil_div(items, part) * part >= items && (ceil_div(items, part) - 1) * part < items, "ceil_div", items);
      check::equal(round_up(items, part), ceil_div(items, part) * part, "round_up", items);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {
                        {"fragments", fragments},
                        {"known places", known_places},
                        {"ldmatrix rows", ldmatrix_rows},
                        {"metadata of the sparse product", metadata},
                        {"swizzle", swizzle},
                        {"swizzle of rows of 32 bytes", narrow_swizzle<32>},
                        {"swizzle of rows of 64 bytes", narrow_swizzle<64>},
                        {"shares", shares},
                    },
                    1);  // nothing random
}
