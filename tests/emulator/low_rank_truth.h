// What low_rank's kernels are tested with and against: operands, the true y and h in double, and how near they have to be.
#pragma once

#include <cmath>
#include <map>
#include <random>
#include <vector>

#include "check.h"
#include "device/convert.h"

namespace low_rank_truth {

struct Sizes {
  int m, k, r, n;
  bool has_bias;
};

struct Operands {
  std::vector<uint16_t> x, v, u, bias;
};

struct Outputs {
  std::vector<uint16_t> y, h;
};

template <class T>
std::vector<uint16_t> normal(std::mt19937_64& random, size_t count, double scale) {
  std::normal_distribution<double> values(0, scale);
  std::vector<uint16_t> bits(count);
  for (auto& one : bits) one = device::narrow<T>(static_cast<float>(values(random)));
  return bits;
}

// -1, 0 and 1, so few of the others that h and y stay exact in bf16.
template <class T>
std::vector<uint16_t> whole(std::mt19937_64& random, size_t count, double density) {
  std::uniform_real_distribution<double> values(-1, 1);
  std::vector<uint16_t> bits(count);
  for (auto& one : bits) {
    const double value = values(random);
    one = device::narrow<T>(std::fabs(value) > density ? 0.f : value > 0 ? 1.f : -1.f);
  }
  return bits;
}

template <class T>
Operands operands(const Sizes& s, bool is_whole) {
  std::mt19937_64 random(s.m * 1000003 + s.k * 1009 + s.r * 31 + s.n);
  const auto make = [&](size_t count, double scale, double density) {
    return is_whole ? whole<T>(random, count, density) : normal<T>(random, count, scale);
  };
  return {make(size_t(s.m) * s.k, 1, 1), make(size_t(s.r) * s.k, 1 / std::sqrt(s.k), std::fmin(1, 30.0 / s.k)),
          make(size_t(s.n) * s.r, 1 / std::sqrt(s.r), std::fmin(1, 10.0 / s.r)),
          s.has_bias ? make(s.n, 1, 1) : std::vector<uint16_t>()};
}

template <class T>
std::vector<double> wide(const std::vector<uint16_t>& bits) {
  std::vector<double> values(bits.size());
  for (size_t i = 0; i < bits.size(); ++i) values[i] = device::widen<T>(bits[i]);
  return values;
}

// a [rows, depth] times b [columns, depth] transposed, plus bias; sums in Sum.
template <class Sum>
std::vector<double> product(const std::vector<double>& a, const std::vector<double>& b, int rows, int columns, int depth,
                            const std::vector<double>& bias = {}) {
  std::vector<double> c(size_t(rows) * columns);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      Sum sum = 0;
      for (int d = 0; d < depth; ++d) {
        sum += static_cast<Sum>(a[size_t(i) * depth + d]) * static_cast<Sum>(b[size_t(j) * depth + d]);
      }
      c[size_t(i) * columns + j] = bias.empty() ? sum : sum + static_cast<Sum>(bias[j]);
    }
  }
  return c;
}

template <class T>
std::vector<double> rounded(std::vector<double> values) {
  for (double& one : values) one = device::widen<T>(device::narrow<T>(static_cast<float>(one)));
  return values;
}

inline std::vector<double> absolute(std::vector<double> values) {
  for (double& one : values) one = std::fabs(one);
  return values;
}

inline std::vector<double> squared(std::vector<double> values) {
  for (double& one : values) one *= one;
  return values;
}

// What y and h have to be, and how near.
struct Truth {
  std::vector<double> h, y, two_gemms;     // in double; in float, h rounded once
  std::vector<double> h_bound, y_bound;    // of each element: its rounding, h's, and that of the sums (gates.py, G3)
};

template <class T>
Truth truth_of(const Sizes& s, const Operands& in) {
  const auto x = wide<T>(in.x), v = wide<T>(in.v), u = wide<T>(in.u), bias = wide<T>(in.bias);
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11, in_float = 6 * 0x1p-24, least = 0x1p-24;
  Truth t;
  t.h = product<double>(x, v, s.m, s.r, s.k);
  t.y = product<double>(t.h, u, s.m, s.n, s.r, bias);
  t.two_gemms = rounded<T>(product<float>(rounded<T>(product<float>(x, v, s.m, s.r, s.k)), u, s.m, s.n, s.r, bias));
  const auto h_size = product<double>(absolute(x), absolute(v), s.m, s.r, s.k);
  const auto y_size = product<double>(h_size, absolute(u), s.m, s.n, s.r, absolute(bias));
  const auto spread = product<double>(squared(t.h), squared(u), s.m, s.n, s.r);
  for (size_t i = 0; i < t.h.size(); ++i) {
    t.h_bound.push_back(roundoff * std::fabs(t.h[i]) + in_float * std::sqrt(s.k) * h_size[i] + least);
  }
  for (size_t i = 0; i < t.y.size(); ++i) {
    t.y_bound.push_back(roundoff * std::fabs(t.y[i]) + in_float * std::sqrt(s.k + s.r) * y_size[i] +
                        6 * roundoff * std::sqrt(spread[i]) + least);
  }
  return t;
}

inline void within(const std::vector<double>& found, const std::vector<double>& expected, const std::vector<double>& bound,
                   const char* what) {
  for (size_t i = 0; i < found.size(); ++i) {
    if (!(std::fabs(found[i] - expected[i]) <= bound[i])) check::equal(found[i], expected[i], what, i);
  }
}

// Sums of squares over many shapes: of ours and of the two products' errors, each relative to the size of y.
struct Errors {
  double ours = 0, two_gemms = 0;

  void add(const std::vector<double>& y, const Truth& truth) {
    double size = 0, mine = 0, theirs = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      size += truth.y[i] * truth.y[i];
      mine += (y[i] - truth.y[i]) * (y[i] - truth.y[i]);
      theirs += (truth.two_gemms[i] - truth.y[i]) * (truth.two_gemms[i] - truth.y[i]);
    }
    ours += mine / size, two_gemms += theirs / size;
  }
  void pass() const {
    if (!(std::sqrt(ours) <= 1.25 * std::sqrt(two_gemms)))
      check::equal(std::sqrt(ours), std::sqrt(two_gemms), "norm of the error");
  }
};

inline void equal(const std::vector<double>& found, const std::vector<double>& expected, const char* what) {
  for (size_t i = 0; i < found.size(); ++i) check::equal(found[i], expected[i], what, i);
}

// What is the same for every seed, by the number of the shape in its test.
struct Known {
  Operands in;
  Truth truth;
  Outputs first;  // of the first seed
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

}  // namespace low_rank_truth
