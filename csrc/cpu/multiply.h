// The CPU decode product, written once over a vector type: y = x w^T + bias for a handful of rows of x.
//
// Included by every product_cpu_<isa>.cpp, which defines the vector types V. Everything is in the anonymous namespace and
// nothing of the standard library is instantiated: a function shared between the files could be linked in its AVX-512
// version and run on a CPU without it.
//
//        depth ->                    A tile is V::kRows rows of w by up to V::kTokens rows of x: that many sums stay in
//      chunk   chunk                 registers while both are read along one chunk. A group is tiles whose chunk is about 4
//   w  [=======|=======|==]  group   KB: all rows of x pass over it while it is in the L1 cache. A block is 16 groups: x's
//      [-------|-------|--]  group   chunk stays in L1 while they go by. So w comes from memory once, and x from L2 once a
//       ... 16 groups: a block       block. Without chunks, 4096 -> 4096, r 512, m = 8 takes 900 us and not 740 (bf16).
//
// Each step asks for what a later step reads, so that memory works while the arithmetic does.
#pragma once

#include <cstdint>

#include "cpu/product.h"

namespace cpu {
namespace {

constexpr int64_t kChunk = 512;         // 32 KB of x at m = 16
constexpr int64_t kGroupBytes = 4096;   // widened bf16 takes twice as much beside it in L1; 8 KB is 4 % slower at m = 8
constexpr int64_t kBlockGroups = 16;
constexpr int64_t kAheadBytes = 16384;  // how far ahead of its use w is asked for

// The steps of the loop: one chunk of one group at a time, groups first, then chunks, then blocks.
template <class V>
struct Steps {
  explicit Steps(const Product& product)
      : rows(product.rows), depth(product.depth), chunk(depth < kChunk ? depth : kChunk),
        segment_chunks(chunk > 0 ? (depth + chunk - 1) / chunk : 1), chunks(product.segments * segment_chunks) {
    const int64_t tile_bytes = V::kRows * ((chunk + V::kStep - 1) / V::kStep * V::kStep) * kSize;
    group_rows = V::kRows * (tile_bytes == 0 || tile_bytes >= kGroupBytes ? 1 : kGroupBytes / tile_bytes);
    if (chunks > 1 && group_rows * kBlockGroups > kMaxBlockRows) group_rows = kMaxBlockRows / kBlockGroups;
  }

  static constexpr int64_t kSize = sizeof(typename V::Weight);
  static constexpr int64_t kTileNumbers = V::kRows * kChunk;
  static constexpr int64_t kMaxGroupNumbers = kGroupBytes / kSize > kTileNumbers ? kGroupBytes / kSize : kTileNumbers;
  static constexpr int64_t kMaxBlockRows = V::kRows * kBlockGroups * (kGroupBytes / (V::kRows * kChunk * kSize) + 1);
  const int64_t rows, depth, chunk, segment_chunks, chunks;
  int64_t group_rows;
};

// Where the step `lead` steps from now reads. Past the end of w it goes on in what is read next.
template <class V>
class Ahead {
 public:
  Ahead(const Product& product, const Steps<V>& steps, int64_t first_row)
      : product_(product), steps_(steps), block_(first_row) {
    const int64_t step_bytes = steps.group_rows * steps.chunk * steps.kSize;
    const int64_t lead = step_bytes > 0 && step_bytes < kAheadBytes ? kAheadBytes / step_bytes : 1;
    for (int64_t i = 0; i < lead; ++i) advance();
  }

  void advance() {
    if (in_next()) next_row_ += steps_.group_rows;
    if (++group_ < kBlockGroups) return;
    group_ = 0;
    if (++chunk_ < steps_.chunks) return;
    chunk_ = 0;
    block_ += kBlockGroups * steps_.group_rows;
  }

  // Of the first row, and from row to row. An integer, because it may lie outside of the tensor: it is only ever prefetched.
  uintptr_t address() const {
    if constexpr (V::kMasked) return values_address();
    const void* from = in_next() && product_.then ? product_.then : product_.w;
    const int64_t elements = in_next() ? next_row_ * steps_.chunk : row() * steps_.depth + chunk_ * steps_.chunk;
    return reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(elements * steps_.kSize);
  }
  int64_t row_bytes() const {
    if constexpr (V::kMasked) return product_.segments * product_.kept * steps_.kSize;
    return (in_next() ? steps_.chunk : steps_.depth) * steps_.kSize;
  }
  uint64_t bytes() const {  // of a masked row's values among kChunk inputs, about
    return steps_.depth > 0 ? static_cast<uint64_t>(kChunk * product_.kept * steps_.kSize / steps_.depth) : 0;
  }

 private:
  // About: where a chunk's values begin, the bits before it say.
  uintptr_t values_address() const {
    const int64_t before = chunk_ % steps_.segment_chunks * steps_.chunk;
    const int64_t values = (row() * product_.segments + chunk_ / steps_.segment_chunks) * product_.kept +
                           (before > 0 ? before * product_.kept / steps_.depth : 0);
    return reinterpret_cast<uintptr_t>(product_.w) + static_cast<uintptr_t>(values * steps_.kSize);
  }

  int64_t row() const { return block_ + group_ * steps_.group_rows; }
  bool in_next() const { return row() >= steps_.rows; }

  const Product& product_;
  const Steps<V>& steps_;
  int64_t block_, chunk_ = 0, group_ = 0;
  int64_t next_row_ = 0;
};

// x as floats, chunk by chunk: [chunks, m, chunk], a chunk padded with zeros to whole vectors. Rows of x are often a
// power of two apart, and then their chunks compete for the same lines of L1: packed, 16 rows at k = 4096 are 10 %
// faster.
template <class V, int kStep>
struct Packed {
  using Input = float;
  static constexpr bool kMasked = false;

  static int64_t padded(int64_t depth) { return depth < kChunk ? (depth + kStep - 1) / kStep * kStep : kChunk; }
  static int64_t x_stride(const Product& product) { return padded(product.depth); }
  static int64_t x_at(const Product& product, int64_t chunk, int64_t token) {
    return (chunk * product.m + token) * x_stride(product);
  }
  static int64_t prepared_bytes(int64_t m, int64_t depth) { return (depth + kChunk - 1) / kChunk * m * padded(depth) * 4; }

  static void prepare(const Product& product, void* prepared) {
    auto* to = static_cast<float*>(prepared);
    const int64_t depth = product.depth;
    for (int64_t first_d = 0; first_d < depth; first_d += kChunk) {
      const int64_t last_d = depth - first_d < kChunk ? depth : first_d + kChunk;
      for (int64_t row = 0; row < product.m; ++row, to += padded(depth)) {
        const auto* from = static_cast<const typename V::Weight*>(product.x) + row * product.x_row;
        for (int64_t d = first_d; d < last_d; d += kStep) {
          const auto wide = last_d - d >= kStep ? V::load(from + d) : V::load_tail(from + d, last_d - d);
          for (int part = 0; part < V::kParts; ++part)
            V::store_part(to + (d - first_d) + part * (kStep / V::kParts), wide.part[part]);
        }
      }
    }
  }
};

// x as it is.
template <class Element>
struct Unprepared {
  using Input = Element;
  static constexpr bool kMasked = false;
  static int64_t x_stride(const Product& product) { return product.x_row; }
  static int64_t x_at(const Product& product, int64_t chunk, int64_t token) {
    return token * product.x_row + chunk * kChunk;
  }
  static int64_t prepared_bytes(int64_t, int64_t) { return 0; }
  static void prepare(const Product&, void*) {}
};

// One chunk of one group: what is read, and where the sums go.
struct Step {
  int64_t first_row, last_row;
  int64_t chunk, first_d, last_d;  // of its segment
  bool is_first, is_last;          // chunk of all
  float* partial;           // [tiles, kMostTokens, V::kRows]: the group's sums over earlier chunks
  float* widened;           // scratch: the group's chunk as floats, in the order of use, for every pass after the first
  uintptr_t ahead;          // what this step asks for: as many rows
  int64_t ahead_row_bytes;
  uint64_t ahead_bytes;     // of each, if masked, for kChunk inputs
  int64_t segment;          // if masked
  int64_t* cursors;         // if masked and its segment has more than one chunk: where each row's values of it go on
};

// Always inline, and a part per call instead of a loop: otherwise the compiler keeps the sums in memory, 60 % slower at
// m = 16. Widened bf16 comes in two parts, because both halves at once and the sums do not fit the registers.
template <class V, int kTokens, int kPart>
__attribute__((always_inline)) inline void add_part(typename V::Sum (&sums)[kTokens][V::kRows],
                                                    const typename V::Wide (&wide)[V::kRows], const typename V::Input* x,
                                                    int64_t x_stride, int64_t count) {
  for (int t = 0; t < kTokens; ++t) {
    const auto* from = x + t * x_stride;
    const auto x_part = V::template load_x<kPart>(from, count);
    for (int i = 0; i < V::kRows; ++i) sums[t][i] = V::multiply_add(wide[i].part[kPart], x_part, sums[t][i]);
  }
  if constexpr (kPart + 1 < V::kParts) add_part<V, kTokens, kPart + 1>(sums, wide, x, x_stride, count);
}

// What becomes of a tile's sums at the end, and what they meet there: each [kMostTokens, V::kRows] from the tile's first
// token on.
struct Ending {
  const float* earlier = nullptr;  // sums over earlier chunks, or null
  float* keep = nullptr;           // for later chunks, or null: then they go to y
  float scale = 1;
  const float* added = nullptr;
};

// The sums of a tile, V::kTogether tokens at a time, so that they share instructions.
template <class V, int kTokens, int kFirst>
__attribute__((always_inline)) inline void finish(const typename V::Sum (&sums)[kTokens][V::kRows], const Ending& ending,
                                                  typename V::Weight* y, int64_t y_stride, const typename V::Weight* bias,
                                                  int64_t rows) {
  constexpr int kMany = kTokens - kFirst >= V::kTogether ? V::kTogether : 1;
  auto total = V::template reduce<kMany>(&sums[kFirst]);
  if (ending.earlier) total = V::add_partial(total, ending.earlier + kFirst * V::kRows);
  if (ending.keep) {
    V::keep_partial(ending.keep + kFirst * V::kRows, total);
  } else {
    if (ending.scale != 1) total = V::scaled(total, ending.scale);
    if (ending.added) total = V::add_partial(total, ending.added + kFirst * V::kRows);
    V::store(y + kFirst * y_stride, y_stride, total, bias, rows);
  }
  if constexpr (kFirst + kMany < kTokens) finish<V, kTokens, kFirst + kMany>(sums, ending, y, y_stride, bias, rows);
}

// What a pass over a group does with the weights it widens. Later passes read them from the L1 cache: to widen again
// would be a fifth of their arithmetic.
enum class Widen { forget, keep, reuse };

template <class V, Widen kWiden>
__attribute__((always_inline)) inline typename V::Wide load_wide(const typename V::Weight* w, int64_t count,
                                                                 float*& widened) {
  constexpr int kLanes = V::kStep / V::kParts;
  typename V::Wide wide;
  if constexpr (kWiden == Widen::reuse) {
    for (int part = 0; part < V::kParts; ++part) wide.part[part] = V::load_part(widened + part * kLanes);
  } else {
    wide = count == V::kStep ? V::load(w) : V::load_tail(w, count);
  }
  if constexpr (kWiden == Widen::keep) {
    for (int part = 0; part < V::kParts; ++part) V::store_part(widened + part * kLanes, wide.part[part]);
  }
  if constexpr (kWiden != Widen::forget) widened += V::kStep;
  return wide;
}

// --- masked rows ---

constexpr int64_t mask_words(int64_t depth) { return (depth + 31) / 32; }

// Of inputs d to d + V::kStep.
template <class V>
uint32_t mask_bits(const uint32_t* mask, int64_t d) {
  return V::kStep == 32 ? mask[d / 32] : mask[d / 32] >> (d % 32) & ((1ull << V::kStep) - 1);
}

// Where the values run out: they are copied first, as many as there are.
template <class V>
__attribute__((noinline)) typename V::Wide expand_last(uint32_t bits, const typename V::Weight* values, int64_t left) {
  typename V::Weight padded[V::kStep] = {};
  for (int64_t i = 0; i < left && i < V::kStep; ++i) padded[i] = values[i];
  return V::expand(bits, padded);
}

// Inputs d to d + V::kStep of a row, from the values at `at` on, which moves past them. `total` values are all there are.
template <class V>
__attribute__((always_inline)) inline typename V::Wide take(const typename V::Weight* values, int64_t total,
                                                            const uint32_t* mask, int64_t d, int64_t& at) {
  const uint32_t bits = mask_bits<V>(mask, d);
  const int64_t from = at;
  at += V::count(bits);
  if (__builtin_expect(from <= total - V::kStep, 1)) return V::expand(bits, values + from);
  return expand_last<V>(bits, values + (from < total ? from : total), total - from);
}

// The same where no value is missing; kept for later passes as load_wide does.
template <class V, Widen kWiden>
__attribute__((always_inline)) inline typename V::Wide expand_wide(const uint32_t* mask, int64_t d,
                                                                   const typename V::Weight*& values, float*& widened) {
  constexpr int kLanes = V::kStep / V::kParts;
  const uint32_t bits = mask_bits<V>(mask, d);
  const auto wide = V::expand(bits, values);
  values += V::count(bits);
  if constexpr (kWiden == Widen::keep) {
    for (int part = 0; part < V::kParts; ++part) V::store_part(widened + part * kLanes, wide.part[part]);
    widened += V::kStep;
  }
  return wide;
}

// A chunk of masked rows: each one's mask, and where its values go on.
template <class V>
struct MaskedRows {
  MaskedRows(const Product& product, const Step& step)
      : product_(product), step_(step), row_values_(product.segments * product.kept), words_(mask_words(product.depth)) {}

  const uint32_t* mask(int64_t row) const {
    return product_.mask + (row * product_.segments + step_.segment) * words_ + step_.first_d / 32;
  }
  int64_t first_value(int64_t row) const { return row * row_values_ + step_.segment * product_.kept; }
  int64_t cursor(int64_t row) const { return step_.first_d > 0 ? step_.cursors[row - step_.first_row] : first_value(row); }
  void keep_cursor(int64_t row, int64_t at) const {
    if (step_.cursors) step_.cursors[row - step_.first_row] = at;
  }

  // Whether no bits whatever make this group read values that there are not.
  bool is_far_from_end() const {
    return first_value(step_.last_row - 1) + product_.depth + V::kStep <= product_.rows * row_values_ &&
           (step_.last_row - step_.first_row) % V::kRows == 0;
  }

 private:
  const Product& product_;
  const Step& step_;
  const int64_t row_values_, words_;
};

// A masked group's chunk to step.widened, in the order of use: at the end of w, where every value is looked for.
template <class V>
__attribute__((noinline)) void expand_group(const Product& product, const Step& step) {
  constexpr int kLanes = V::kStep / V::kParts;
  const MaskedRows<V> rows(product, step);
  const auto* values = static_cast<const typename V::Weight*>(product.w);
  const int64_t total = product.rows * product.segments * product.kept, count = step.last_d - step.first_d;
  const int64_t steps = (count + V::kStep - 1) / V::kStep;
  for (int64_t first = 0; first < step.last_row - step.first_row; first += V::kRows) {
    for (int i = 0; i < V::kRows; ++i) {
      const int64_t row = step.first_row + first + i;
      float* to = step.widened + (first * steps + i) * V::kStep;
      if (row >= product.rows) {  // its sums are dropped
        for (int64_t d = 0; d < count; d += V::kStep, to += V::kRows * V::kStep)
          for (int lane = 0; lane < V::kStep; ++lane) to[lane] = 0;
        continue;
      }
      const uint32_t* mask = rows.mask(row);
      int64_t at = rows.cursor(row);
      for (int64_t d = 0; d < count; d += V::kStep, to += V::kRows * V::kStep) {
        const auto wide = take<V>(values, total, mask, d, at);
        for (int part = 0; part < V::kParts; ++part) V::store_part(to + part * kLanes, wide.part[part]);
      }
      rows.keep_cursor(row, at);
    }
  }
}

// kAhead: of how many rows of each tile this pass asks for the tile ahead, from row ahead_row on.
template <class V, int kTokens, int kAhead, Widen kWiden>
__attribute__((noinline)) void multiply_group(const Product& product, const Step& step, int64_t token, int64_t ahead_row) {
  using Weight = typename V::Weight;
  const int64_t depth = product.depth, x_stride = V::x_stride(product);
  const int64_t count = step.last_d - step.first_d;
  const auto* x = static_cast<const typename V::Input*>(product.x) + V::x_at(product, step.chunk, token);
  const auto* all_w = static_cast<const Weight*>(product.w);
  const auto* bias = static_cast<const Weight*>(product.bias);
  float* widened = step.widened;

  for (int64_t row = step.first_row; row < step.last_row; row += V::kRows) {
    const int64_t here = product.rows - row < V::kRows ? product.rows - row : V::kRows;
    const Weight* w[V::kRows] = {};  // past the last row: the last row again, and its sums are dropped
    [[maybe_unused]] const uint32_t* mask[V::kRows] = {};
    if constexpr (!V::kMasked) {
      for (int i = 0; i < V::kRows; ++i) w[i] = all_w + (row + (i < here ? i : here - 1)) * depth + step.first_d;
    } else if constexpr (kWiden != Widen::reuse) {
      const MaskedRows<V> rows(product, step);
      for (int i = 0; i < V::kRows; ++i) mask[i] = rows.mask(row + i), w[i] = all_w + rows.cursor(row + i);
    }
    const uintptr_t ahead = step.ahead + static_cast<uintptr_t>((row - step.first_row + ahead_row) * step.ahead_row_bytes);

    typename V::Sum sums[kTokens][V::kRows];
    for (int t = 0; t < kTokens; ++t)
      for (int i = 0; i < V::kRows; ++i) sums[t][i] = V::zero();
    typename V::Wide wide[V::kRows];
    int64_t d = 0;
    for (; d + V::kStep <= count; d += V::kStep) {
      if constexpr (V::kMasked && kWiden != Widen::reuse)
        for (int i = 0; i < V::kRows; ++i) wide[i] = expand_wide<V, kWiden>(mask[i], d, w[i], widened);
      else
        for (int i = 0; i < V::kRows; ++i) wide[i] = load_wide<V, kWiden>(w[i] + d, V::kStep, widened);
      const int64_t ahead_d = V::kMasked ? static_cast<int64_t>(static_cast<uint64_t>(d) * step.ahead_bytes / kChunk)
                                         : d * static_cast<int64_t>(sizeof(Weight));
      for (int i = 0; i < kAhead; ++i) {
        const int64_t at = i * step.ahead_row_bytes + ahead_d;
        __builtin_prefetch(reinterpret_cast<const void*>(ahead + static_cast<uintptr_t>(at)), 0, 2);  // into L2
      }
      add_part<V, kTokens, 0>(sums, wide, x + d, x_stride, V::kStep);
    }
    if (d < count) {
      if constexpr (V::kMasked && kWiden != Widen::reuse)
        for (int i = 0; i < V::kRows; ++i) wide[i] = expand_wide<V, kWiden>(mask[i], d, w[i], widened);
      else
        for (int i = 0; i < V::kRows; ++i) wide[i] = load_wide<V, kWiden>(w[i] + d, count - d, widened);
      add_part<V, kTokens, 0>(sums, wide, x + d, x_stride, count - d);
    }
    if constexpr (V::kMasked && kWiden != Widen::reuse)
      for (int i = 0; i < V::kRows; ++i) MaskedRows<V>(product, step).keep_cursor(row + i, w[i] - all_w);

    float* partial = step.partial + (row - step.first_row) * kMostTokens + token * V::kRows;
    const float* added = product.added ? product.added + row * kMostTokens + token * V::kRows : nullptr;
    const Ending ending{step.is_first ? nullptr : partial, step.is_last ? nullptr : partial, product.scale, added};
    auto* y = static_cast<Weight*>(product.y) + token * product.y_row + row;
    finish<V, kTokens, 0>(sums, ending, y, product.y_row, bias ? bias + row : nullptr, here);
  }
}

template <class V, int kAhead, Widen kWiden, int kTokens = V::kTokens>
void multiply_tokens(const Product& product, const Step& step, int64_t token, int64_t tokens, int64_t ahead_row) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) return multiply_tokens<V, kAhead, kWiden, kTokens - 1>(product, step, token, tokens, ahead_row);
  }
  multiply_group<V, kTokens, kAhead, kWiden>(product, step, token, ahead_row);
}

template <class V>
void multiply(const Product& product, int64_t first_tile, int64_t last_tile) {
  static_assert(kChunk % V::kStep == 0, "only the last chunk has a tail");
  const Steps<V> steps(product);
  const int64_t block_rows = kBlockGroups * steps.group_rows;
  const int64_t last_row = last_tile * V::kRows < product.rows ? last_tile * V::kRows : product.rows;
  const int64_t passes = (product.m + V::kTokens - 1) / V::kTokens;
  constexpr int kShare = (V::kRows + 1) / 2;  // of each tile ahead, for each of the first two passes
  constexpr Widen kFirst = V::kParts > 1 || V::kMasked ? Widen::keep : Widen::forget;
  constexpr Widen kLater = V::kParts > 1 || V::kMasked ? Widen::reuse : Widen::forget;
  alignas(64) float widened[V::kParts > 1 || V::kMasked ? Steps<V>::kMaxGroupNumbers : 1];
  alignas(64) float partial[kMostTokens * Steps<V>::kMaxBlockRows];
  int64_t cursors[V::kMasked ? Steps<V>::kMaxBlockRows : 1];
  Ahead<V> ahead(product, steps, first_tile * V::kRows);

  for (int64_t block = first_tile * V::kRows; block < last_row; block += block_rows) {
    const int64_t block_end = block + block_rows < last_row ? block + block_rows : last_row;
    for (int64_t chunk = 0; chunk < steps.chunks; ++chunk) {
      for (int64_t row = block; row < block_end; row += steps.group_rows, ahead.advance()) {
        const int64_t group_end = row + steps.group_rows < block_end ? row + steps.group_rows : block_end;
        const int64_t first_d = chunk % steps.segment_chunks * steps.chunk;
        const int64_t last_d = steps.depth - first_d < steps.chunk ? steps.depth : first_d + steps.chunk;
        const Step step{row, group_end, chunk, first_d, last_d, chunk == 0, chunk + 1 == steps.chunks,
                        partial + (row - block) * kMostTokens, widened, ahead.address(), ahead.row_bytes(),
                        ahead.bytes(), chunk / steps.segment_chunks,
                        steps.segment_chunks > 1 ? cursors + (row - block) : nullptr};
        bool is_expanded = false;
        if constexpr (V::kMasked) {
          is_expanded = !MaskedRows<V>(product, step).is_far_from_end();
          if (is_expanded) expand_group<V>(product, step);
        }
        if (passes == 1 && !is_expanded) {
          multiply_tokens<V, V::kRows, Widen::forget>(product, step, 0, product.m, 0);
          continue;
        }
        for (int64_t pass = 0, token = 0; pass < passes; ++pass) {
          const int64_t tokens = product.m / passes + (pass < product.m % passes ? 1 : 0);  // as even as can be
          if (pass == 0 && !is_expanded)
            multiply_tokens<V, kShare, kFirst>(product, step, token, tokens, 0);
          else if (pass == 1 && !is_expanded)
            multiply_tokens<V, kShare, kLater>(product, step, token, tokens, kShare);
          else
            multiply_tokens<V, 0, kLater>(product, step, token, tokens, 0);
          token += tokens;
        }
      }
    }
  }
}

template <class V>
Kernel kernel_of() {
  return {V::kRows, &V::prepared_bytes, &V::prepare, &multiply<V>};
}

// bf16 is the upper half of a float.
inline float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, 4);
  return wide;
}

inline float widen(float value) { return value; }

inline uint16_t round_to_bf16(float value) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x0040);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store_one(float* y, float sum, const float* bias) { *y = bias ? sum + *bias : sum; }
inline void store_one(uint16_t* y, float sum, const uint16_t* bias) { *y = round_to_bf16(bias ? sum + widen(*bias) : sum); }

}  // namespace
}  // namespace cpu
