// What monarch's kernels are tested with and against: operands, the true y and h in double, and how near they have to be.
#pragma once

#include "low_rank_truth.h"
#include "monarch/batched_layout.h"

namespace monarch_truth {

using low_rank_truth::absolute, low_rank_truth::equal, low_rank_truth::Errors, low_rank_truth::normal, low_rank_truth::Operands,
    low_rank_truth::Outputs, low_rank_truth::rounded, low_rank_truth::squared, low_rank_truth::Truth, low_rank_truth::whole,
    low_rank_truth::wide, low_rank_truth::within;
using monarch::Sizes;

// z [b_in][m, q] to h [b_out, m, b_in r].
inline std::vector<double> to_middle(const Sizes& s, const std::vector<double>& z) {
  std::vector<double> h(z.size());
  const int q = s.r * s.b_out, t = s.b_in * s.r;
  for (int i = 0; i < s.b_in; ++i) {
    for (int token = 0; token < s.m; ++token) {
      for (int j = 0; j < s.r; ++j) {
        for (int o = 0; o < s.b_out; ++o) {
          h[(size_t(o) * s.m + token) * t + i * s.r + j] = z[(size_t(i) * s.m + token) * q + j * s.b_out + o];
        }
      }
    }
  }
  return h;
}

// Column of y that row c of output block o makes; n and beyond: none.
inline int column_of(const Sizes& s, int o, int c) { return s.interleave ? o + c * s.b_out : o * s.s() + c; }

template <class Sum>
std::vector<double> first_product(const Sizes& s, const std::vector<double>& x, const std::vector<double>& v) {
  const int p = s.p(), q = s.r * s.b_out;
  std::vector<double> z(size_t(s.b_in) * s.m * q);
  for (int i = 0; i < s.b_in; ++i) {
    for (int token = 0; token < s.m; ++token) {
      for (int row = 0; row < q; ++row) {
        Sum sum = 0;
        for (int d = 0; d < p && i * p + d < s.k; ++d) {
          sum += static_cast<Sum>(x[size_t(token) * s.k + i * p + d]) * static_cast<Sum>(v[(size_t(i) * q + row) * p + d]);
        }
        z[(size_t(i) * s.m + token) * q + row] = sum;
      }
    }
  }
  return to_middle(s, z);
}

template <class Sum>
std::vector<double> second_product(const Sizes& s, const std::vector<double>& h, const std::vector<double>& u,
                                   const std::vector<double>& bias) {
  const int t = s.b_in * s.r, rows = s.s();
  std::vector<double> y(size_t(s.m) * s.n);
  for (int o = 0; o < s.b_out; ++o) {
    for (int token = 0; token < s.m; ++token) {
      for (int c = 0; c < rows; ++c) {
        const int column = column_of(s, o, c);
        if (column >= s.n) continue;
        Sum sum = 0;
        const double *a = &h[(size_t(o) * s.m + token) * t], *b = &u[(size_t(o) * rows + c) * t];
        for (int d = 0; d < t; ++d) sum += static_cast<Sum>(a[d]) * static_cast<Sum>(b[d]);
        y[size_t(token) * s.n + column] = bias.empty() ? sum : sum + static_cast<Sum>(bias[column]);
      }
    }
  }
  return y;
}

template <class T>
Truth truth_of(const Sizes& s, const Operands& in) {
  const auto x = wide<T>(in.x), v = wide<T>(in.v), u = wide<T>(in.u), bias = wide<T>(in.bias);
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11, in_float = 6 * 0x1p-24, least = 0x1p-24;
  Truth t;
  t.h = first_product<double>(s, x, v);
  t.y = second_product<double>(s, t.h, u, bias);
  t.two_gemms = rounded<T>(second_product<float>(s, rounded<T>(first_product<float>(s, x, v)), u, bias));
  const auto h_size = first_product<double>(s, absolute(x), absolute(v));
  const auto y_size = second_product<double>(s, h_size, absolute(u), absolute(bias));
  const auto spread = second_product<double>(s, squared(t.h), squared(u), {});
  for (size_t i = 0; i < t.h.size(); ++i) {
    t.h_bound.push_back(roundoff * std::fabs(t.h[i]) + in_float * std::sqrt(s.p()) * h_size[i] + least);
  }
  for (size_t i = 0; i < t.y.size(); ++i) {
    t.y_bound.push_back(roundoff * std::fabs(t.y[i]) + in_float * std::sqrt(s.p() + s.b_in * s.r) * y_size[i] +
                        6 * roundoff * std::sqrt(spread[i]) + least);
  }
  return t;
}

template <class T>
Operands operands(const Sizes& s, bool has_bias, bool is_whole) {
  std::mt19937_64 random(s.m * 1000003 + s.k * 1009 + s.r * 31 + s.n);
  const int p = s.p(), rows = s.s(), t = s.b_in * s.r;
  const auto make = [&](size_t count, double scale, double density) {
    return is_whole ? whole<T>(random, count, density) : normal<T>(random, count, scale);
  };
  return {make(size_t(s.m) * s.k, 1, 1), make(size_t(s.b_in) * s.r * s.b_out * p, 1 / std::sqrt(p), std::fmin(1, 30.0 / p)),
          make(size_t(s.b_out) * rows * t, 1 / std::sqrt(t), std::fmin(1, 10.0 / t)),
          has_bias ? make(s.n, 1, 1) : std::vector<uint16_t>()};
}

}  // namespace monarch_truth
