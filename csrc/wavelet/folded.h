// What wavelet's ops on a CPU have in common: the operands of a call, factors with the transform folded into them, halves.
//
// "Beside" is a middle [m, pairs r], as the library multiplies it; the ops have it as [pairs, m, r].
#pragma once

#include <algorithm>

#include "wavelet/haar_cpu.h"
#include "wavelet/wavelet.h"

namespace wavelet {

constexpr int64_t kTaskNumbers = 1 << 16;  // written by a thread, at least

// Contiguous, x as rows: the same bits for every layout of the same values, on whichever path.
struct Arguments {
  Tensor x, v, u;
  std::optional<Tensor> gain;

  Arguments(const Call& s, const Tensor& x_any, const Tensor& v_any, const std::optional<Tensor>& gain_any,
            const Tensor& u_any)
      : x(torch::stable::view(as_contiguous(x_any), {s.m, s.k})), v(as_contiguous(v_any)), u(as_contiguous(u_any)) {
    if (gain_any) gain = as_contiguous(*gain_any);
  }
};

inline Problem problem_of(const Call& s) {
  Problem problem;
  problem.m = s.m, problem.n = s.n, problem.k = s.k, problem.r = s.r, problem.pairs = s.pairs, problem.dtype = s.dtype;
  return problem;
}

// Rows of so many numbers each, shared among threads: each is written by one.
template <class Rows>
void for_rows(int64_t rows, int64_t numbers, const Rows& task) {
  torch::stable::parallel_for(0, rows, 1 + kTaskNumbers / (1 + numbers), task);
}

// v as it acts on features.   [pairs r, k]
template <class E>
Tensor fold_v(const Call& s, const Tensor& v) {
  const Tensor folded = empty(s.kind, {s.pairs * s.r, s.k});
  const int pairs = static_cast<int>(s.pairs);
  for_rows(s.pairs * s.r, s.k, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t pair = row / s.r, rank = row % s.r;
      fold_along(data_of<E>(v) + (rank * s.pairs + pair) * s.width(), source_of(pairs, static_cast<int>(pair)), s.k,
                 kRootHalf, data_to<E>(folded) + row * s.k);
    }
  });
  return folded;
}

// u as it makes features of the scaled result.   [n, pairs r]
template <class E>
Tensor fold_u(const Call& s, const Tensor& u) {
  const Tensor folded = empty(s.kind, {s.n, s.pairs * s.r});
  const float scale = s.scale * kRootHalf;
  for_rows(s.n, s.pairs * s.r, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      for (int pair = 0; pair < s.pairs; ++pair) {
        const bool is_negative = row % 2 && target_of(static_cast<int>(s.pairs), pair) == 1;
        const E* from = data_of<E>(u) + (pair * s.height() + row / 2) * s.r;
        E* to = data_to<E>(folded) + (row * s.pairs + pair) * s.r;
        for (int64_t j = 0; j < s.r; ++j) to[j] = narrowed<E>((is_negative ? -scale : scale) * cpu::widen(from[j]));
      }
    }
  });
  return folded;
}

// rows w^T over all features, twice as many as a half has coefficients: in float as two sums, since a library that adds them
// up as one rounds more than the reference does.   rows [m, size]   w [columns, size]
template <class E>
Tensor multiply_features(const Tensor& rows, const Tensor& w) {
  if constexpr (!std::is_same_v<E, float>) return library_linear(rows, w);
  const int64_t size = rows.size(1), first = size / 2;
  if (first == 0) return library_linear(rows, w);
  const auto part = [&](Tensor t, int64_t from, int64_t count) { return torch::stable::narrow(t, 1, from, count); };
  return add(library_linear(part(rows, 0, first), part(w, 0, first)),
             library_linear(part(rows, first, size - first), part(w, first, size - first)));
}

// Halves of rows, each rounded once: both, or the low one where that is all there is.   [1 or 2, m, (size + 1) / 2]
template <class E>
Tensor halves_of(const Call& s, const Tensor& rows, int64_t size, float scale) {
  const int64_t width = (size + 1) / 2, count = std::min<int64_t>(s.pairs, 2);
  const Tensor halves = empty(s.kind, {count, s.m, width});
  for_rows(s.m, size, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      E* low = data_to<E>(halves) + row * width;
      split_row(data_of<E>(rows) + row * size, size, scale, low, count == 2 ? low + s.m * width : nullptr);
    }
  });
  return halves;
}

// The way back; high null: of zeros.   [m, size]
template <class E>
Tensor joined(const Call& s, const Tensor& low, const Tensor* high, int64_t size, float scale) {
  const Tensor rows = empty(s.kind, {s.m, size});
  const int64_t width = (size + 1) / 2;
  for_rows(s.m, size, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      join_row(data_of<E>(low) + row * width, high ? data_of<E>(*high) + row * width : nullptr, size, scale,
               data_to<E>(rows) + row * size);
    }
  });
  return rows;
}

// Views: of halves or of a middle [.., m, .] one, of v's columns and of u's rows those of a pair.
inline Tensor one_of(Tensor all, int64_t which) {
  return torch::stable::view(torch::stable::narrow(all, 0, which, 1), {all.size(1), all.size(2)});
}
inline Tensor columns_of(const Call& s, Tensor v, int64_t pair) {
  return torch::stable::narrow(v, 1, pair * s.width(), s.width());
}
inline Tensor rows_of_pair(const Call& s, Tensor u, int64_t pair) {
  return torch::stable::narrow(u, 0, pair * s.height(), s.height());
}

// A pair's middle [m, r] to its place beside the others.
template <class E>
void put_beside(const Call& s, const Tensor& middle, int64_t pair, const Tensor& all) {
  for (int64_t row = 0; row < s.m; ++row)
    std::copy_n(data_of<E>(middle) + row * s.r, s.r, data_to<E>(all) + (row * s.pairs + pair) * s.r);
}

// [m, pairs r] -> [pairs, m, r]
template <class E>
Tensor apart(const Call& s, const Tensor& beside) {
  const Tensor h = empty(s.kind, {s.pairs, s.m, s.r});
  for (int64_t row = 0; row < s.m; ++row) {
    for (int64_t pair = 0; pair < s.pairs; ++pair)
      std::copy_n(data_of<E>(beside) + (row * s.pairs + pair) * s.r, s.r, data_to<E>(h) + (pair * s.m + row) * s.r);
  }
  return h;
}

// The way back.
template <class E>
Tensor beside(const Call& s, const Tensor& h) {
  const Tensor all = empty(s.kind, {s.m, s.pairs * s.r});
  for (int64_t row = 0; row < s.m; ++row) {
    for (int64_t pair = 0; pair < s.pairs; ++pair)
      std::copy_n(data_of<E>(h) + (pair * s.m + row) * s.r, s.r, data_to<E>(all) + (row * s.pairs + pair) * s.r);
  }
  return all;
}

// Times the gains, rounded as the reference does it.
template <class E>
void weigh_beside(const Call& s, const Tensor& beside, const Tensor& gain) {
  const int64_t columns = s.pairs * s.r;
  const E* by = data_of<E>(gain);
  E* row = data_to<E>(beside);
  for (int64_t token = 0; token < s.m; ++token, row += columns)
    for (int64_t i = 0; i < columns; ++i) row[i] = narrowed<E>(cpu::widen(row[i]) * cpu::widen(by[i]));
}

template <class E>
Tensor weigh(const Call& s, const Tensor& h, const Tensor& gain) {
  const Tensor weighed = empty(s.kind, {s.pairs, s.m, s.r});
  const E *from = data_of<E>(h), *by = data_of<E>(gain);
  E* to = data_to<E>(weighed);
  for (int64_t pair = 0; pair < s.pairs; ++pair, by += s.r)
    for (int64_t token = 0; token < s.m; ++token, from += s.r, to += s.r)
      for (int64_t i = 0; i < s.r; ++i) to[i] = narrowed<E>(cpu::widen(from[i]) * cpu::widen(by[i]));
  return weighed;
}

}  // namespace wavelet
