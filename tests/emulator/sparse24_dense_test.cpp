// A sparse factor with its zeros and back, in the emulator: elements of every size, any pattern; and masks that are wrong.
#include "sparse24/dense.cu"

#include <random>

#include "check.h"

namespace {

using namespace sparse24;

struct Rows {
  int64_t rows;
  int columns, stored;
};

const Rows kRagged[] = {{1, 1, 1}, {9, 31, 7}, {17, 32, 32}, {70, 33, 12}, {40, 200, 100}, {3, 1100, 275}};

std::vector<uint32_t> mask_of(const Rows& r, std::mt19937_64& random) {
  const int words = parts_of(r.columns, kWordBits);
  std::vector<uint32_t> mask(r.rows * words);
  std::vector<int> columns(r.columns);
  for (int i = 0; i < r.columns; ++i) columns[i] = i;
  for (int64_t row = 0; row < r.rows; ++row) {
    std::shuffle(columns.begin(), columns.end(), random);
    for (int i = 0; i < r.stored; ++i) mask[row * words + columns[i] / 32] |= 1u << columns[i] % 32;
  }
  return mask;
}

template <class T>
std::vector<T> moved(const Rows& r, const std::vector<T>& from, const std::vector<uint32_t>& bits, bool into_dense,
                     uint64_t seed) {
  emulator::Buffer<T> in("from", from), out("to", r.rows * (into_dense ? r.columns : r.stored));
  emulator::Buffer<uint32_t> mask("mask", bits);
  const DenseOperands operands{in.data(), out.data(), mask.data(), r.rows, r.columns, r.stored};
  const auto launch = into_dense ? launch_expand_dense : launch_select_dense;
  check::that(launch(operands, sizeof(T), 1, nullptr) == nullptr, "the launch");
  emulator::synchronize({seed});
  return {out.data(), out.data() + out.size()};
}

template <class T>
void every_entry_is_moved(uint64_t seed) {
  std::mt19937_64 random(seed);
  for (const Rows& r : kRagged) {
    const std::vector<uint32_t> mask = mask_of(r, random);
    const int words = parts_of(r.columns, kWordBits);
    std::vector<T> values(r.rows * r.stored), dense(r.rows * r.columns);
    for (T& one : values) one = static_cast<T>(random());
    std::vector<T> expected(dense.size()), selected(values.size());
    for (T& one : dense) one = static_cast<T>(random());
    size_t next = 0;
    for (size_t i = 0; i < dense.size(); ++i) {
      if (mask[i / r.columns * words + i % r.columns / 32] >> i % r.columns % 32 & 1) {
        expected[i] = values[next];
        selected[next++] = dense[i];
      }
    }
    check::that(moved(r, values, mask, true, seed) == expected, "expanded; columns", r.columns);
    check::that(moved(r, dense, mask, false, seed) == selected, "selected; columns", r.columns);
  }
}

// The first of a row's values where there are bits, zeros where there are none, and for the values that no bit names.
void wrong_masks(uint64_t seed) {
  for (const Rows& r : {Rows{9, 40, 7}, Rows{9, 40, 39}}) {
    const std::vector<uint16_t> values(r.rows * r.stored, 3), dense(r.rows * r.columns, 5);
    for (const uint32_t word : {0u, ~0u, 1u, 0xfff00000u}) {
      const std::vector<uint32_t> mask(r.rows * 2, word);
      const std::vector<uint16_t> wide = moved(r, values, mask, true, seed), few = moved(r, dense, mask, false, seed);
      for (int64_t row = 0; row < r.rows; ++row) {
        int kept = 0;
        for (int i = 0; i < r.columns; ++i) {
          const bool is_kept = (word >> i % 32 & 1) && kept < r.stored;
          check::equal(wide[row * r.columns + i], is_kept ? 3 : 0, "dense", i);
          kept += is_kept;
        }
        for (int i = 0; i < r.stored; ++i) check::equal(few[row * r.stored + i], i < kept ? 5 : 0, "values", i);
      }
    }
  }
}

void other_elements_are_refused(uint64_t) {
  for (const auto launch : {launch_expand_dense, launch_select_dense}) {
    const char* error = launch(DenseOperands{}, 1, 1, nullptr);
    check::that(error && strstr(error, "2, 4 or 8 bytes"), "an error in words");
  }
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {{"every entry is moved, 2 bytes", every_entry_is_moved<uint16_t>},
                     {"every entry is moved, 4 bytes", every_entry_is_moved<uint32_t>},
                     {"every entry is moved, 8 bytes", every_entry_is_moved<uint64_t>},
                     {"wrong masks", wrong_masks},
                     {"other elements are refused", other_elements_are_refused}});
}
