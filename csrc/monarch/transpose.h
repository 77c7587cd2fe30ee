// Moves products of blocks to their places: a transposition, because neighbours of a row belong to different blocks.
//
//   from [blocks][tokens][runs][columns]   element (b, t, i, c) goes to   to[t * to_token + c * to_column + b * runs + i]
//   (from one block to the next: from_block)
//
// So what `blocks` products have at one column comes to lie side by side, b first and then i: h of the output block c, of
// which input block b has `runs`, its rank; or, with one run, neighbouring elements of y. Numbers are moved, not looked at.
#pragma once

#include <cstdint>
#include <cstring>

namespace monarch {

struct Move {
  int64_t blocks, tokens, runs, columns;
  int64_t from_block;
  int64_t to_token, to_column;  // strides
  int64_t last;                 // how many of blocks * runs the last column has room for
};

// A square of 16 bytes by 16 bytes' worth of rows, transposed: log2 rounds of interleaving row i with row i + half.
template <class T>
struct Square;

template <>
struct Square<uint16_t> {
  static constexpr int kSide = 8;
  typedef uint16_t Row __attribute__((vector_size(16)));
  static Row low(Row a, Row b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
  static Row high(Row a, Row b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
};

template <>
struct Square<uint32_t> {
  static constexpr int kSide = 4;
  typedef uint32_t Row __attribute__((vector_size(16)));
  static Row low(Row a, Row b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
  static Row high(Row a, Row b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
};

template <>
struct Square<uint64_t> {
  static constexpr int kSide = 2;
  typedef uint64_t Row __attribute__((vector_size(16)));
  static Row low(Row a, Row b) { return __builtin_shufflevector(a, b, 0, 2); }
  static Row high(Row a, Row b) { return __builtin_shufflevector(a, b, 1, 3); }
};

template <class T>
inline void move_square(const T* const* rows, int64_t column, T* to, int64_t to_column) {
  constexpr int kSide = Square<T>::kSide;
  typename Square<T>::Row now[kSide], next[kSide];
  for (int i = 0; i < kSide; ++i) std::memcpy(&now[i], rows[i] + column, sizeof(now[i]));
  for (int half = 1; half < kSide; half *= 2) {
    for (int i = 0; i < kSide / 2; ++i) {
      next[2 * i] = Square<T>::low(now[i], now[i + kSide / 2]);
      next[2 * i + 1] = Square<T>::high(now[i], now[i + kSide / 2]);
    }
    for (int i = 0; i < kSide; ++i) now[i] = next[i];
  }
  for (int i = 0; i < kSide; ++i) std::memcpy(to + i * to_column, &now[i], sizeof(now[i]));
}

// The rows of one token in from, one after the other: runs of the first block, then of the next.
template <class T>
class Rows {
 public:
  Rows(const Move& move, const T* from, int64_t token)
      : at_(from + token * move.runs * move.columns), columns_(move.columns), runs_(move.runs),
        skip_(move.from_block - move.runs * move.columns) {}

  const T* next() {
    const T* row = at_;
    at_ += columns_;
    if (++run_ == runs_) run_ = 0, at_ += skip_;
    return row;
  }

 private:
  const T* at_;
  const int64_t columns_, runs_, skip_;
  int64_t run_ = 0;
};

// Of the tokens first..last. A cache line of a column is filled before the next column's: they may be a power of two apart,
// and would not stay in the L1 cache until their next squares come.
template <class T>
void move(const Move& move, const T* from, T* to, int64_t first, int64_t last) {
  constexpr int kSide = Square<T>::kSide, kLine = 64 / sizeof(T);
  const int64_t all = move.blocks * move.runs, full = move.last < all ? move.columns - 1 : move.columns;
  for (int64_t token = first; token < last; ++token) {
    Rows<T> next_rows(move, from, token);
    for (int64_t i = 0; i < all; i += kLine) {
      const T* rows[kLine];
      const int64_t here = all - i < kLine ? all - i : kLine, square = here / kSide * kSide;
      for (int64_t j = 0; j < here; ++j) rows[j] = next_rows.next();
      T* to_line = to + token * move.to_token + i;
      int64_t c = 0;
      for (; c + kSide <= full; c += kSide, to_line += kSide * move.to_column) {
        for (int64_t j = 0; j < square; j += kSide) move_square(rows + j, c, to_line + j, move.to_column);
        for (int64_t d = 0; d < kSide; ++d)
          for (int64_t j = square; j < here; ++j) to_line[d * move.to_column + j] = rows[j][c + d];
      }
      for (; c < move.columns; ++c, to_line += move.to_column) {
        const int64_t room = c < full || i + here <= move.last ? here : move.last - i;
        for (int64_t j = 0; j < room; ++j) to_line[j] = rows[j][c];
      }
    }
  }
}

}  // namespace monarch
