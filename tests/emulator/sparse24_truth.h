// What sparse24's kernels are tested with and against: operands, the weight they stand for, the true y in double, and how
// near it has to be.
#pragma once

#include <map>

#include "low_rank_truth.h"

namespace sparse24_truth {

using low_rank_truth::normal, low_rank_truth::wide, low_rank_truth::whole;

struct Sizes {
  int m, k, n;
  bool has_bias;
  int kept = 2, group = 4;
};

struct Operands {
  std::vector<uint16_t> x, values, bias;
  std::vector<uint32_t> mask;
};

inline int words_of(int k) { return (k + 31) / 32; }

// `kept` of every `group`, any of them.
inline std::vector<uint32_t> mask_of(std::mt19937_64& random, const Sizes& s) {
  std::vector<uint32_t> mask(size_t(s.n) * words_of(s.k));
  for (int row = 0; row < s.n; ++row) {
    for (int first = 0; first < s.k; first += s.group) {
      for (int left = s.kept, i = 0; i < s.group; ++i) {
        if (static_cast<int>(random() % (s.group - i)) >= left) continue;
        --left;
        mask[size_t(row) * words_of(s.k) + (first + i) / 32] |= 1u << (first + i) % 32;
      }
    }
  }
  return mask;
}

template <class T>
Operands operands(const Sizes& s, bool is_whole) {
  std::mt19937_64 random(s.m * 1000003 + s.k * 1009 + s.n * 31 + s.kept);
  const int row = s.k / s.group * s.kept;
  const auto make = [&](size_t count, double scale, double density) {
    return is_whole ? whole<T>(random, count, density) : normal<T>(random, count, scale);
  };
  Operands in{make(size_t(s.m) * s.k, 1, 1), make(size_t(s.n) * row, 1 / std::sqrt(row), std::fmin(1, 100.0 / row)),
              s.has_bias ? make(s.n, 1, 1) : std::vector<uint16_t>(), {}};
  in.mask = mask_of(random, s);
  return in;
}

inline bool is_kept(const Sizes& s, const Operands& in, int row, int input) {
  return in.mask[size_t(row) * words_of(s.k) + input / 32] >> input % 32 & 1;
}

// The weight [n, k], value after value where the mask has bits.
template <class Value>
std::vector<Value> expanded(const Sizes& s, const Operands& in, const std::vector<Value>& values) {
  std::vector<Value> dense(size_t(s.n) * s.k);
  size_t next = 0;
  for (int row = 0; row < s.n; ++row) {
    for (int input = 0; input < s.k; ++input) {
      if (is_kept(s, in, row, input)) dense[size_t(row) * s.k + input] = values.at(next++);
    }
  }
  check::equal(next, values.size(), "values that the mask has a place for");
  return dense;
}

struct Truth {
  std::vector<double> y, dense;  // in double; by a dense product in float
  std::vector<double> y_bound;   // of each element: its rounding and that of the sum (gates.py, G3)
};

template <class T>
Truth truth_of(const Sizes& s, const Operands& in) {
  using namespace low_rank_truth;
  const auto x = wide<T>(in.x), w = expanded(s, in, wide<T>(in.values)), bias = wide<T>(in.bias);
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11, in_float = 6 * 0x1p-24, least = 0x1p-24;
  Truth t;
  t.y = product<double>(x, w, s.m, s.n, s.k, bias);
  t.dense = rounded<T>(product<float>(x, w, s.m, s.n, s.k, bias));
  const auto size = product<double>(absolute(x), absolute(w), s.m, s.n, s.k, absolute(bias));
  for (size_t i = 0; i < t.y.size(); ++i) {
    t.y_bound.push_back(roundoff * std::fabs(t.y[i]) + in_float * std::sqrt(s.k) * size[i] + least);
  }
  return t;
}

// What is the same for every seed, by the number of the shape in its test.
struct Known {
  Operands in;
  Truth truth;
  std::vector<uint16_t> first;  // y of the first seed
};

template <class T>
Known& known_of(size_t shape, const Sizes& s, bool is_whole) {
  static std::map<size_t, Known> all;
  Known& known = all[2 * shape + is_whole];
  if (known.truth.y.empty()) {
    known.in = operands<T>(s, is_whole);
    known.truth = truth_of<T>(s, known.in);
  }
  return known;
}

}  // namespace sparse24_truth
