// What dictionary's kernel is tested with and against: low_rank's operands, its second factor sparse.
#pragma once

#include <algorithm>
#include <numeric>

#include "low_rank_truth.h"

namespace dictionary_truth {

using low_rank_truth::wide;

struct Sizes : low_rank_truth::Sizes {  // r: atoms
  int stored;
};

struct Operands : low_rank_truth::Operands {  // u: dense, with zeros
  std::vector<uint16_t> values;
  std::vector<uint32_t> mask;
};

template <class T>
Operands operands(const Sizes& s, bool is_whole) {
  Operands in{low_rank_truth::operands<T>(s, is_whole), {}, {}};
  std::mt19937_64 random(s.n * 31 + s.r + s.stored);
  const int words = (s.r + 31) / 32;
  in.mask.resize(size_t(s.n) * words);
  std::vector<int> atoms(s.r);
  for (int row = 0; row < s.n; ++row) {
    std::iota(atoms.begin(), atoms.end(), 0);
    std::shuffle(atoms.begin(), atoms.end(), random);
    for (int i = 0; i < s.stored; ++i) in.mask[size_t(row) * words + atoms[i] / 32] |= 1u << atoms[i] % 32;
    for (int atom = 0; atom < s.r; ++atom) {
      uint16_t& value = in.u[size_t(row) * s.r + atom];
      if (in.mask[size_t(row) * words + atom / 32] >> atom % 32 & 1) {
        in.values.push_back(value);
      } else {
        value = 0;
      }
    }
  }
  check::equal(in.values.size(), size_t(s.n) * s.stored, "values");
  return in;
}

// What is the same for every seed, by the number of the shape in its test.
struct Known {
  Operands in;
  low_rank_truth::Truth truth;
  low_rank_truth::Outputs first;  // of the first seed
};

template <class T>
Known& known_of(size_t shape, const Sizes& s, bool is_whole) {
  static std::map<size_t, Known> all;
  Known& known = all[2 * shape + is_whole];
  if (known.truth.y.empty()) {
    known.in = operands<T>(s, is_whole);
    known.truth = low_rank_truth::truth_of<T>(s, known.in);
  }
  return known;
}

}  // namespace dictionary_truth
