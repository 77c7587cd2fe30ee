// S added to a dense matrix, and of a dense matrix what S has places for: what the library's products need around them,
// where low_rank_sparse has no kernel of its own.
//
//   values [nnz]   starts [n + 1]   columns [nnz]   dense [n, k]
//
// Adding, a thread has 64 columns of a row: it looks for its first entry, and goes on to the first that is past them. So an
// element has one thread that adds to it, in the order of the entries, whatever the support is. Selecting, a thread has an
// entry, and looks for its row; of an entry that has no place, the value is 0. No access leads outside.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator. It HAS NEVER RUN ON A GPU, no speed is claimed.
#include "low_rank_sparse/dense.h"

#include "device/launch.h"
#include "low_rank_sparse/support.h"

namespace low_rank_sparse {

template <class T>
struct DenseConfig {
  using Element = T;  // to add float or double; to select unsigned
  static constexpr int kThreads = 256;
  static constexpr int kColumns = 64;  // of a thread that adds
};

LOWFAT_DEVICE int64_t first_item(int threads) { return int64_t{blockIdx.x} * threads + threadIdx.x; }
LOWFAT_DEVICE int64_t next_item(int threads) { return int64_t{gridDim.x} * threads; }

template <class Config>
__global__ void __launch_bounds__(Config::kThreads) add_entries(const __grid_constant__ DenseOperands p) {
  using Element = typename Config::Element;
  const Support& s = p.s;
  const auto* values = static_cast<const Element*>(p.from);
  const int64_t parts = parts_of(s.k, Config::kColumns);
  for (int64_t i = first_item(Config::kThreads); i < s.n * parts; i += next_item(Config::kThreads)) {
    const int row = static_cast<int>(i / parts);
    const uint32_t column = static_cast<uint32_t>(i % parts) * Config::kColumns;
    const Range entries = entries_of_row(s, row);
    Element* dense = static_cast<Element*>(p.to) + int64_t{row} * s.k;
    visit_entries(s.columns, s.is_wide, values, first_from(s.columns, s.is_wide, entries.first, entries.last, column),
                  entries.last, column, smaller(column + Config::kColumns, s.k),
                  [&](uint32_t at, Element value) { device::store(dense + at, device::load(dense + at) + value); });
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads) select_entries(const __grid_constant__ DenseOperands p) {
  using Element = typename Config::Element;
  const Support& s = p.s;
  for (int64_t entry = first_item(Config::kThreads); entry < s.entries; entry += next_item(Config::kThreads)) {
    EntrySearch search(s.n, entry);
    while (!search.is_done()) search.turn(device::load(s.starts + search.place()));
    const int64_t row = search.first;
    const uint32_t column = column_of(s, entry);
    const bool has_place = row < s.n && column < static_cast<uint32_t>(s.k);
    const Element* dense = static_cast<const Element*>(p.from);
    device::store(static_cast<Element*>(p.to) + entry, has_place ? device::load(dense + (row * s.k + column)) : Element{0});
  }
}

// --- launch ---

template <class Config>
const char* launch(void (*kernel)(DenseOperands), const DenseOperands& operands, int64_t items, int sm_count, void* stream) {
  const int64_t blocks = device::ceil_div(items, Config::kThreads);
  device::Launch shape;
  shape.grid = dim3(static_cast<unsigned>(blocks < 8 * sm_count ? blocks : 8 * sm_count));
  shape.threads = Config::kThreads;
  shape.stream = stream;
  return device::launch(kernel, shape, operands);
}

template <class T>
const char* add(const DenseOperands& operands, int sm_count, void* stream) {
  using Config = DenseConfig<T>;
  const int64_t parts = parts_of(operands.s.k, Config::kColumns);
  return launch<Config>(add_entries<Config>, operands, operands.s.n * parts, sm_count, stream);
}

template <class T>
const char* select(const DenseOperands& operands, int sm_count, void* stream) {
  using Config = DenseConfig<T>;
  return launch<Config>(select_entries<Config>, operands, operands.s.entries, sm_count, stream);
}

const char* launch_add_entries(const DenseOperands& operands, int element_bytes, int sm_count, void* stream) {
  switch (element_bytes) {
    case 4: return add<float>(operands, sm_count, stream);
    case 8: return add<double>(operands, sm_count, stream);
    default: return "elements of 4 or 8 bytes are covered, no others";
  }
}

const char* launch_select_entries(const DenseOperands& operands, int element_bytes, int sm_count, void* stream) {
  switch (element_bytes) {
    case 2: return select<uint16_t>(operands, sm_count, stream);
    case 4: return select<uint32_t>(operands, sm_count, stream);
    case 8: return select<uint64_t>(operands, sm_count, stream);
    default: return "elements of 2, 4 or 8 bytes are covered, no others";
  }
}

}  // namespace low_rank_sparse
