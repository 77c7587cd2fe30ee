// S added to a dense matrix, and its entries taken from one, in the emulator: elements of every size, columns of both
// widths; and supports that are none.
#include "low_rank_sparse/dense.cu"

#include "low_rank_sparse_truth.h"

namespace {

using namespace low_rank_sparse;
using low_rank_sparse_truth::bad_rows, low_rank_sparse_truth::Rows, low_rank_sparse_truth::rows_of;

const Rows kRagged[] = {rows_of(1, 1, 1), rows_of(9, 31, 70), rows_of(17, 64, 17 * 64), rows_of(70, 65, 401, true),
                        rows_of(40, 200, 0), rows_of(3, 1100, 275)};

template <class T>
std::vector<T> some(size_t count) {
  std::mt19937_64 random(count);
  std::vector<T> values(count);
  for (T& one : values) one = static_cast<T>(random() % 4096);
  return values;
}

template <class T>
std::vector<T> added(const Rows& s, bool is_wide, const std::vector<T>& values, const std::vector<T>& to, uint64_t seed) {
  emulator::Buffer<T> from("values", values), dense("dense", to.size());
  std::copy(to.begin(), to.end(), dense.data());
  const low_rank_sparse_truth::InMemory rows(s, is_wide);
  const DenseOperands operands{from.data(), dense.data(), rows.support};
  check::that(launch_add_entries(operands, sizeof(T), 1, nullptr) == nullptr, "the launch");
  emulator::synchronize({seed});
  return {dense.data(), dense.data() + dense.size()};
}

template <class T>
std::vector<T> selected(const Rows& s, bool is_wide, const std::vector<T>& dense, uint64_t seed) {
  emulator::Buffer<T> from("dense", dense), values("values", s.entries());
  const low_rank_sparse_truth::InMemory rows(s, is_wide);
  const DenseOperands operands{from.data(), values.data(), rows.support};
  check::that(launch_select_entries(operands, sizeof(T), 1, nullptr) == nullptr, "the launch");
  emulator::synchronize({seed});
  return {values.data(), values.data() + values.size()};
}

template <class T>
void every_entry_is_added(uint64_t seed) {
  for (const Rows& s : kRagged) {
    const auto values = some<T>(s.entries());
    auto dense = some<T>(size_t(s.n) * s.k);
    const auto before = dense;
    for (int row = 0; row < s.n; ++row) {
      for (int e = s.starts[row]; e < s.starts[row + 1]; ++e) dense[size_t(row) * s.k + s.columns[e]] += values[e];
    }
    for (bool is_wide : {false, true}) check::that(added(s, is_wide, values, before, seed) == dense, "added; columns", s.k);
  }
}

template <class T>
void every_entry_is_taken(uint64_t seed) {
  for (const Rows& s : kRagged) {
    if (s.entries() == 0) continue;
    const auto dense = some<T>(size_t(s.n) * s.k);
    std::vector<T> values;
    for (int row = 0; row < s.n; ++row) {
      for (int e = s.starts[row]; e < s.starts[row + 1]; ++e) values.push_back(dense[size_t(row) * s.k + s.columns[e]]);
    }
    for (bool is_wide : {false, true}) check::that(selected(s, is_wide, dense, seed) == values, "taken; columns", s.k);
  }
}

// Every place and every entry has some number, the same each time; nothing outside is read or written.
void bad_supports(uint64_t seed) {
  static std::map<size_t, std::pair<std::vector<float>, std::vector<float>>> first;
  const Rows good = rows_of(9, 136, 307);
  const auto values = some<float>(good.entries()), dense = some<float>(size_t(good.n) * good.k);
  size_t number = 0;
  for (bool is_wide : {false, true}) {
    for (const Rows& bad : bad_rows(good)) {
      const auto found = std::pair{added(bad, is_wide, values, dense, seed), selected(bad, is_wide, dense, seed)};
      if (bad.starts == good.starts) {  // no entry is added twice, nor where it has no place
        std::vector<float> most(dense.size()), ones(values.size(), 1), none(dense.size());
        for (int row = 0; row < bad.n; ++row) {
          for (int e = bad.starts[row]; e < bad.starts[row + 1]; ++e) {
            const int column = is_wide ? bad.columns[e] : static_cast<uint16_t>(bad.columns[e]);
            if (column >= 0 && column < bad.k) ++most[row * bad.k + column];
          }
        }
        const auto sums = added(bad, is_wide, ones, none, seed);
        for (size_t i = 0; i < sums.size(); ++i) check::that(sums[i] <= most[i], "entries of a place", i);
      }
      for (float one : found.first) check::that(std::isfinite(one), "a number", number);
      for (float one : found.second) check::that(std::isfinite(one), "a number", number);
      if (seed == 1) first[number] = found;
      check::that(found == first[number], "every seed gives the same bits", number);
      ++number;
    }
    Rows bad = good;
    bad.columns[5] = good.k, bad.columns[6] = -1;
    const auto taken = selected(bad, is_wide, dense, seed), before = selected(good, is_wide, dense, seed);
    for (int e = 0; e < good.entries(); ++e) check::equal(taken[e], e == 5 || e == 6 ? 0 : before[e], "without a place", e);
  }
}

void other_elements_are_refused(uint64_t) {
  const DenseOperands none{};
  for (const char* error : {launch_add_entries(none, 2, 1, nullptr), launch_select_entries(none, 1, 1, nullptr)})
    check::that(error && strstr(error, "are covered"), "an error in words");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"every entry is added, float", every_entry_is_added<float>},
                     {"every entry is added, double", every_entry_is_added<double>},
                     {"every entry is taken, 2 bytes", every_entry_is_taken<uint16_t>},
                     {"every entry is taken, 4 bytes", every_entry_is_taken<uint32_t>},
                     {"every entry is taken, 8 bytes", every_entry_is_taken<uint64_t>},
                     {"bad supports", bad_supports},
                     {"other elements are refused", other_elements_are_refused}});
}
