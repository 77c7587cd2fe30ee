// What the kernels of low_rank_sparse are tested with and against: supports good and bad, and S dense.
#pragma once

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "low_rank_sparse/support_layout.h"

namespace low_rank_sparse_truth {

struct Rows {  // S in rows
  int n, k;
  std::vector<int32_t> starts, columns;

  int entries() const { return static_cast<int>(columns.size()); }
};

// `entries` of the places of [n, k], by chance; a third of them in one row where they are to be `uneven`.
inline Rows rows_of(int n, int k, int entries, bool uneven = false) {
  std::mt19937_64 random(n * 1009 + k * 31 + entries);
  std::vector<int> places(size_t(n) * k);
  for (size_t i = 0; i < places.size(); ++i) places[i] = static_cast<int>(i);
  std::shuffle(places.begin(), places.end(), random);
  if (uneven) {  // those of row n / 2 come first
    const auto in_row = [&](int place) { return place / k == n / 2; };
    auto end = std::stable_partition(places.begin(), places.end(), in_row);
    end = places.begin() + std::min<ptrdiff_t>(end - places.begin(), entries / 3 + 1);
    std::shuffle(end, places.end(), random);
  }
  places.resize(entries);
  std::sort(places.begin(), places.end());
  Rows rows{n, k, std::vector<int32_t>(n + 1), {}};
  for (int place : places) {
    ++rows.starts[place / k + 1];
    rows.columns.push_back(place % k);
  }
  for (int row = 0; row < n; ++row) rows.starts[row + 1] += rows.starts[row];
  return rows;
}

// S, dense, of any numbers.
template <class Number>
std::vector<double> dense(const Rows& s, const std::vector<Number>& values) {
  std::vector<double> all(size_t(s.n) * s.k);
  for (int row = 0; row < s.n; ++row) {
    for (int e = s.starts[row]; e < s.starts[row + 1]; ++e) all[size_t(row) * s.k + s.columns[e]] = values[e];
  }
  return all;
}

// Where its rows and columns are while a kernel runs, in columns of 2 bytes or of 4.
struct InMemory {
  emulator::Buffer<int32_t> starts;
  std::unique_ptr<emulator::Buffer<uint16_t>> narrow;
  std::unique_ptr<emulator::Buffer<int32_t>> wide;
  low_rank_sparse::Support support;

  InMemory(const Rows& s, bool is_wide) : starts("starts", s.starts) {
    if (is_wide) {
      wide = std::make_unique<emulator::Buffer<int32_t>>("columns", s.columns);
    } else {
      const std::vector<uint16_t> columns(s.columns.begin(), s.columns.end());
      narrow = std::make_unique<emulator::Buffer<uint16_t>>("columns", columns);
    }
    const void* columns = is_wide ? static_cast<const void*>(wide->data()) : narrow->data();
    support = {starts.data(), columns, s.n, s.k, s.entries(), is_wide};
  }
};

// Supports that are none, made of a good one with columns in every row.
inline std::vector<Rows> bad_rows(const Rows& good) {
  const int n = good.n, k = good.k, entries = good.entries(), least = -2147483647 - 1, most = 2147483647;
  std::vector<Rows> all;
  const auto starts = [&](const auto& change) {
    all.push_back(good);
    change(all.back().starts);
  };
  const auto columns = [&](const auto& change) {
    all.push_back(good);
    change(all.back().columns);
  };
  for (int value : {-1, least, most, entries + 1, entries - 1, 0, n, 1}) {
    for (int at : {0, n / 2, n - 1, n}) starts([&](auto& t) { t[at] = value; });
    starts([&](auto& t) { std::fill(t.begin(), t.end(), value); });
  }
  starts([](auto& t) { std::reverse(t.begin(), t.end()); });
  starts([](auto& t) { std::rotate(t.begin(), t.begin() + 1, t.end()); });
  starts([](auto& t) { for (auto& one : t) one *= 2; });
  starts([](auto& t) { for (auto& one : t) one = -one; });
  starts([](auto& t) { for (auto& one : t) one += 5; });
  for (int value : {-1, -32768, 32767, k, k + 1, k - 1, 0}) {
    for (int at : {0, entries / 3, entries / 2, entries - 1}) columns([&](auto& t) { t[at] = value; });
    columns([&](auto& t) { std::fill(t.begin(), t.end(), value); });
  }
  columns([](auto& t) { std::reverse(t.begin(), t.end()); });
  columns([](auto& t) { std::rotate(t.begin(), t.begin() + 1, t.end()); });
  columns([&](auto& t) { for (auto& one : t) one += k; });
  columns([](auto& t) { for (auto& one : t) one = -1 - one; });
  std::mt19937_64 random(entries);
  starts([&](auto& t) { for (auto& one : t) one = static_cast<int32_t>(random()); });
  starts([&](auto& t) { for (auto& one : t) one = static_cast<int32_t>(random() % entries); });
  columns([&](auto& t) { for (auto& one : t) one = static_cast<int16_t>(random()); });
  columns([&](auto& t) { for (auto& one : t) one = static_cast<int32_t>(random() % k); });
  return all;
}

}  // namespace low_rank_sparse_truth
