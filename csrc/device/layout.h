// Where things are: fragments, swizzled tiles, shares of work. Pure functions for kernels, the host and tests alike.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LOWFAT_CONSTEXPR __host__ __device__ constexpr
#else
#define LOWFAT_CONSTEXPR constexpr
#endif

namespace device {

struct Position {
  int row, column;
};

constexpr int kWordBits = 32;  // of a bitmap: entry j of a row is bit j % 32 of its word j / 32

LOWFAT_CONSTEXPR int64_t ceil_div(int64_t total, int64_t part) { return (total + part - 1) / part; }
LOWFAT_CONSTEXPR int64_t round_up(int64_t total, int64_t part) { return ceil_div(total, part) * part; }
LOWFAT_CONSTEXPR int parts_of(int total, int part) { return (total + part - 1) / part; }
LOWFAT_CONSTEXPR int smaller(int a, int b) { return a < b ? a : b; }
LOWFAT_CONSTEXPR int larger(int a, int b) { return a > b ? a : b; }

// Elements of a lane's fragments, in order: element i is half i % 2 of register i / 2.
LOWFAT_CONSTEXPR Position mma_a(int lane, int i) {  // [16, 16], i in 0..7
  return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8};
}
LOWFAT_CONSTEXPR Position mma_b(int lane, int i) {  // [16, 8], i in 0..3; [32, 8] of the sparse product, i in 0..7
  return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4};
}
LOWFAT_CONSTEXPR Position mma_d(int lane, int i) {  // [16, 8] floats, i in 0..3
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}
LOWFAT_CONSTEXPR Position mma_a_tf32(int lane, int i) {  // [16, 8], i in 0..3
  return {lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4};
}
LOWFAT_CONSTEXPR Position mma_b_tf32(int lane, int i) {  // [8, 8], i in 0..1
  return {lane % 4 + i * 4, lane / 4};
}

// The bits that tell where row `row` keeps its two of columns 4 four..4 four + 3, in a sparse a [16, 32].
struct MetadataPlace {
  int lane, shift;  // four bits of that lane's word
};
LOWFAT_CONSTEXPR MetadataPlace mma_sp_metadata(int row, int four, int selector) {
  return {row % 8 * 4 + selector * 2 + four / 4, row / 8 * 16 + four % 4 * 4};
}

// Which row of shared memory a lane names for ldmatrix and stmatrix of a [16, 16] block whose four matrices become the
// registers of mma_a: matrices 0, 1 are the left half, upper and lower. column: 0 or 8.
LOWFAT_CONSTEXPR Position ldmatrix_row(int lane) { return {lane % 16, lane / 16 * 8}; }

// Element i of a warpgroup thread's d [64, n], i in 0..n / 2 - 1.
LOWFAT_CONSTEXPR Position wgmma_d(int thread, int i) {
  return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + thread % 4 * 2 + i % 2};
}

// The 128-byte swizzle of an offset into a 1024-byte aligned tile: 16-byte piece p of row i (128 bytes long) moves to
// p xor i % 8, so that eight rows' pieces of one column lie in different banks.
LOWFAT_CONSTEXPR uint32_t swizzle128(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// Byte offset of 16-byte piece `piece` of row `row` in a swizzled tile [rows][128 bytes].
LOWFAT_CONSTEXPR uint32_t swizzled_piece(int row, int piece) { return swizzle128(row * 128 + piece * 16); }

// The same for tiles with rows of 64 or 32 bytes, eight rows to an atom of 512 or 256 bytes: their swizzle exchanges as many
// bits as a row has pieces for.
template <int kRowBytes>
LOWFAT_CONSTEXPR uint32_t swizzled_narrow_piece(int row, int piece) {
  static_assert(kRowBytes == 32 || kRowBytes == 64, "the swizzles of less than 128 bytes");
  const uint32_t offset = row * kRowBytes + piece * 16;
  return offset ^ (offset >> 7 & (kRowBytes / 16 - 1)) << 4;
}

// Which row a lane names for ldmatrix of two neighbouring b fragments that lie [columns, depth], 16 of each: matrices 0, 1 are
// the halves of the depth of the one, 2, 3 those of the other. row: a column of b; column: 0 or 8 along the depth.
LOWFAT_CONSTEXPR Position ldmatrix_pair_row(int lane) { return {lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8}; }

// What is dealt to part `index` of `parts`: neighbouring items, sizes differing by one at most, the larger shares first.
struct Share {
  int64_t begin, end;
};
LOWFAT_CONSTEXPR Share share_of(int64_t items, int parts, int index) {
  const int64_t each = items / parts, more = items % parts;
  const int64_t begin = index * each + (index < more ? index : more);
  return {begin, begin + each + (index < more ? 1 : 0)};
}

}  // namespace device
