// Each primitive against the definition of its instruction. The fragment tables are written down here once more, as the PTX
// documentation has them, and share nothing with the emulator or with device/layout.h.
#include "primitives.cu"

#include "check.h"

namespace {

using namespace primitives;
using emulator::Buffer;
using emulator::Random;
using Words = std::vector<uint32_t>;
using Matrix = std::vector<std::vector<float>>;

Matrix zeros(int rows, int columns) { return Matrix(rows, std::vector<float>(columns)); }

// Integers that every format holds, whose products and sums are exact in float.
Matrix integers(int rows, int columns, Random& random) {
  Matrix m = zeros(rows, columns);
  for (auto& row : m) {
    for (float& v : row) v = static_cast<float>(static_cast<int>(random.below(17))) - 8;
  }
  return m;
}

// c + a b, b [k, n].
Matrix product(const Matrix& a, const Matrix& b, Matrix c) {
  for (size_t row = 0; row < a.size(); ++row) {
    for (size_t column = 0; column < b[0].size(); ++column) {
      for (size_t k = 0; k < b.size(); ++k) c[row][column] += a[row][k] * b[k][column];
    }
  }
  return c;
}

// Launches, runs, and returns nothing: outputs are in the buffers of the parameters.
void run(void (*kernel)(Params), const Launch& shape, const Params& params, emulator::Options options) {
  launch(kernel, shape, params);
  emulator::synchronize(options);
}

// Registers of two 16-bit elements: value(lane, i) is element i of the lane's fragment.
template <class T, class Value>
Words packed(int lanes, int elements, const Value& value) {
  Words words(lanes * elements / 2);
  for (int lane = 0; lane < lanes; ++lane) {
    for (int i = 0; i < elements; ++i) {
      words[(lane * elements + i) / 2] |= uint32_t{narrow<T>(value(lane, i))} << (i % 2 * 16);
    }
  }
  return words;
}

// ---- mma. PTX: groupID = laneid >> 2, threadID_in_group = laneid % 4; then row and column of element i as below.

struct Mma16 {  // m16n8k16, .f16 and .bf16
  static int a_row(int lane, int i) { return (i < 2 || (4 <= i && i < 6)) ? (lane >> 2) : (lane >> 2) + 8; }
  static int a_column(int lane, int i) { return i < 4 ? (lane % 4) * 2 + (i & 1) : (lane % 4) * 2 + (i & 1) + 8; }
  static int b_row(int lane, int i) { return i < 2 ? (lane % 4) * 2 + (i & 1) : (lane % 4) * 2 + (i & 1) + 8; }
  static int b_column(int lane, int) { return lane >> 2; }
};

int d_row(int lane, int i) { return i < 2 ? (lane >> 2) : (lane >> 2) + 8; }
int d_column(int lane, int i) { return (lane % 4) * 2 + (i & 1); }

Words d_registers(const Matrix& d) {
  Words words(128);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) words[lane * 4 + i] = as_bits(d[d_row(lane, i)][d_column(lane, i)]);
  }
  return words;
}

template <class Config>
void check_mma(uint64_t seed, Words a, const Words& b, const Matrix& c, const Matrix& expected,
               const Words& metadata = Words(32)) {
  a.insert(a.end(), metadata.begin(), metadata.end());
  Buffer<uint32_t> gmem_a("a", a), gmem_b("b", b), gmem_c("c", d_registers(c)), out("out", 128);
  Params p;
  p.a = gmem_a.data(), p.b = gmem_b.data(), p.c = gmem_c.data(), p.out = out.data();
  run(mma<Config>, {dim3(1), 32}, p, {seed});
  const Words right = d_registers(expected);
  for (int i = 0; i < 128; ++i) check::equal(as_float(out[i]), as_float(right[i]), "d", i);
}

template <class T>
void dense(uint64_t seed) {
  Random random(seed);
  const Matrix a = integers(16, 16, random), b = integers(16, 8, random), c = integers(16, 8, random);
  check_mma<Dense<T>>(seed,
                      packed<T>(32, 8, [&](int lane, int i) { return a[Mma16::a_row(lane, i)][Mma16::a_column(lane, i)]; }),
                      packed<T>(32, 4, [&](int lane, int i) { return b[Mma16::b_row(lane, i)][Mma16::b_column(lane, i)]; }),
                      c, product(a, b, c));
}

void tf32(uint64_t seed) {  // m16n8k8: a0 (g, t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4); b0 (t, g), b1 (t + 4, g)
  Random random(seed);
  const Matrix a = integers(16, 8, random), b = integers(8, 8, random), c = integers(16, 8, random);
  Words words_a, words_b;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane >> 2, t = lane % 4;
    for (float v : {a[g][t], a[g + 8][t], a[g][t + 4], a[g + 8][t + 4]}) words_a.push_back(as_bits(v) | 0x1fff);  // not read
    for (float v : {b[t][g], b[t + 4][g]}) words_b.push_back(as_bits(v) | 0x0fff);
  }
  check_mma<Tf32>(seed, words_a, words_b, c, product(a, b, c));
}

// m16n8k32: a's kept elements lie as in m16n8k16; b7 is row 24 + 2 t + 1. Metadata words as drawn for .m16n8k32 with .f16:
// of quad g, thread 2 selector has columns 0..15 and the next 16..31, of row g in the lower half and row g + 8 in the upper.
template <class T, int kSelector>
void sparse(uint64_t seed) {
  Random random(seed);
  const Matrix kept = integers(16, 16, random), b = integers(32, 8, random), c = integers(16, 8, random);
  Matrix a = zeros(16, 32);
  Words metadata(32);
  for (auto& word : metadata) word = static_cast<uint32_t>(random.next());  // the other lanes' words are not read
  for (int g = 0; g < 8; ++g) {
    for (int word = 0; word < 2; ++word) {
      uint32_t bits = 0;
      for (int half = 0; half < 2; ++half) {
        for (int four = 0; four < 4; ++four) {
          const int pairs[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
          const int* pair = pairs[random.below(6)];
          const int row = g + 8 * half, column = 16 * word + 4 * four;
          bits |= static_cast<uint32_t>(pair[0] | pair[1] << 2) << (16 * half + 4 * four);
          for (int i = 0; i < 2; ++i) a[row][column + pair[i]] = kept[row][column / 2 + i];
        }
      }
      metadata[4 * g + 2 * kSelector + word] = bits;
    }
  }
  check_mma<Sparse<T, kSelector>>(
      seed, packed<T>(32, 8, [&](int lane, int i) { return kept[Mma16::a_row(lane, i)][Mma16::a_column(lane, i)]; }),
      packed<T>(32, 8, [&](int lane, int i) { return b[(lane % 4) * 2 + (i & 1) + i / 2 * 8][lane >> 2]; }), c,
      product(a, b, c), metadata);
}

// ---- ldmatrix, stmatrix. Matrix i: rows named by lanes 8 i ..; thread l holds row l / 4, elements 2 (l % 4) and the next.

uint32_t half_word(const Words& words, int halves) { return words[halves / 2] >> (halves % 2 * 16) & 0xffff; }

int half_index(int matrix, int lane, int half, bool is_transposed) {  // in the 512-byte block
  const int row = is_transposed ? 2 * (lane % 4) + half : lane / 4,
            column = is_transposed ? lane / 4 : 2 * (lane % 4) + half;
  return (matrix * 8 + row) * 5 % 32 * 8 + column;
}

template <int kCount, bool kIsTransposed>
void matrices(uint64_t seed) {
  Words block(128), registers(32 * kCount), expected(128, 0);
  for (int i = 0; i < 128; ++i) block[i] = static_cast<uint32_t>(2 * i | (2 * i + 1) << 16);
  for (size_t i = 0; i < registers.size(); ++i) registers[i] = static_cast<uint32_t>((2 * i + 1) | (2 * i + 2) << 16);
  Buffer<uint32_t> gmem_block("block", block), gmem_registers("registers", registers), loaded("loaded", 32 * kCount),
      stored("stored", 128);
  Params p;
  p.a = gmem_block.data(), p.out = loaded.data();
  run(load_matrices<Matrices<kCount, kIsTransposed>>, {dim3(1), 32, 512}, p, {seed});
  p.a = gmem_registers.data(), p.out = stored.data();
  run(store_matrices<Matrices<kCount, kIsTransposed>>, {dim3(1), 32, 512}, p, {seed});
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < kCount; ++matrix) {
      for (int half = 0; half < 2; ++half) {
        const int place = half_index(matrix, lane, half, kIsTransposed);
        check::equal(loaded[lane * kCount + matrix] >> (16 * half) & 0xffff, half_word(block, place), "ldmatrix", lane);
        expected[place / 2] |= half_word(registers, (lane * kCount + matrix) * 2 + half) << (place % 2 * 16);
      }
    }
  }
  for (int i = 0; i < 128; ++i) check::equal(stored[i], expected[i], "stmatrix", i);
}

template <bool kIsTransposed>
void matrices_of_each_count(uint64_t seed) {
  matrices<1, kIsTransposed>(seed);
  matrices<2, kIsTransposed>(seed);
  matrices<4, kIsTransposed>(seed);
}

// ---- wgmma. The image of a tile with 128-byte swizzle: of each 1024 bytes, row r's 16-byte piece c is at r * 128 + (c ^ r)
// * 16.

size_t swizzled(size_t row, size_t byte) {
  return row / 8 * 1024 + row % 8 * 128 + ((byte / 16) ^ (row % 8)) * 16 + byte % 16;
}

template <class T>
void put(std::vector<uint8_t>& image, size_t at, float value) {
  const uint16_t bits = narrow<T>(value);
  memcpy(&image[at], &bits, 2);
}

// m [i, k]: K-major, rows i with 64 k's; MN-major, rows k with 64 i's, and the next 64 i's 8192 bytes on.
template <class T>
void put_tile(std::vector<uint8_t>& image, size_t at, const Matrix& m, Major major) {
  for (size_t i = 0; i < m.size(); ++i) {
    for (size_t k = 0; k < 64; ++k) {
      put<T>(image, at + (major == Major::k ? swizzled(i, 2 * k) : i / 64 * 8192 + swizzled(k, 2 * (i % 64))), m[i][k]);
    }
  }
}

// m [i, k] with rows k of all i's, 16 or 32: the swizzle of 32 or 64 bytes exchanges one or two bits of the piece with those
// of the row from bit 7 of the address on.
template <class T>
void put_narrow_tile(std::vector<uint8_t>& image, size_t at, const Matrix& m) {
  const size_t row_bytes = m.size() * 2;
  for (size_t i = 0; i < m.size(); ++i) {
    for (size_t k = 0; k < 64; ++k) {
      const size_t bits = row_bytes == 64 ? k / 2 % 4 : k / 4 % 2;
      put<T>(image, at + k * row_bytes + ((i / 8) ^ bits) * 16 + i % 8 * 2, m[i][k]);
    }
  }
}

template <class Config>
void multiplied(uint64_t seed) {
  using T = typename Config::T;
  constexpr int kN = Config::kN;
  Random random(seed);
  const Matrix a = integers(64, 64, random), b = integers(kN, 64, random);
  std::vector<uint8_t> image(Config::kBytes, 0xff);
  put_tile<T>(image, 0, a, Config::kMajorA);
  if (Config::kIsNarrow) {
    put_narrow_tile<T>(image, Config::kBytesA, b);
  } else {
    put_tile<T>(image, Config::kBytesA, b, Config::kMajorB);
  }
  Words words(Config::kBytes / 4);
  memcpy(words.data(), image.data(), image.size());
  Buffer<uint32_t> gmem("image", words), out("out", 128 * kN / 2);
  Params p;
  p.a = gmem.data(), p.out = out.data();
  run(multiply_tiles<Config>, {dim3(1), 128, Config::kBytes}, p, {seed});
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < kN / 2; ++i) {  // PTX, "WGMMA .m64nNk16 register fragment layout for accumulator matrix D"
      const int row = 16 * (thread / 32) + (thread % 32) / 4 + 8 * ((i / 2) & 1),
                column = 8 * (i / 4) + 2 * (thread % 4) + (i & 1);
      float sum = 0;
      for (int k = 0; k < 64; ++k) sum += a[row][k] * b[column][k];
      check::equal(as_float(out[thread * kN / 2 + i]), sum, "d", thread * 1000 + i);
    }
  }
}

template <Major kMajorA, Major kMajorB>
void tiles_of_each_width(uint64_t seed) {
  multiplied<Tiles<Bf16, 16, kMajorA, kMajorB>>(seed);
  multiplied<Tiles<Fp16, 32, kMajorA, kMajorB>>(seed);
  multiplied<Tiles<Bf16, 64, kMajorA, kMajorB>>(seed);
  multiplied<Tiles<Fp16, 128, kMajorA, kMajorB>>(seed);
  multiplied<Tiles<Bf16, 256, kMajorA, kMajorB>>(seed);
}

void narrow_tiles(uint64_t seed) {
  multiplied<NarrowTiles<Bf16, 16>>(seed);
  multiplied<NarrowTiles<Fp16, 32>>(seed);
}

// ---- TMA boxes of 16 rows over the corners of a [40, 72] matrix of 16-bit elements, and of floats without swizzle.

struct Corner {
  int row, column;
};
constexpr Corner kCorners[] = {{0, 0}, {8, 8}, {-3, -8}, {30, 64}, {36, 70}, {-16, 0}};

template <int kElementBytes, int kBoxColumns, bool kIsSwizzled>
void boxes(uint64_t seed) {
  constexpr int kRows = 40, kColumns = 72, kStride = 80, kRowBytes = kBoxColumns * kElementBytes;
  using Config = Box<16, kRowBytes>;
  for (const Corner& corner : kCorners) {
    std::vector<uint8_t> content(kRows * kStride * kElementBytes);
    for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<uint8_t>(i * 7 + i / 251 + 1);
    Buffer<uint8_t> matrix("matrix", content), written("written", content.size());
    Words tile(Config::kBytes / 4);
    for (size_t i = 0; i < tile.size(); ++i) tile[i] = static_cast<uint32_t>(i * 2654435761u);
    Buffer<uint32_t> gmem_tile("tile", tile), out("out", Config::kBytes / 4);
    Params p;
    p.row = corner.row, p.column = corner.column, p.out = out.data(), p.a = gmem_tile.data();
    const Tiled tiled{matrix.data(), kRows, kColumns, kStride, 16, kBoxColumns, kElementBytes, kIsSwizzled};
    check::that(make_tensor_map(p.map, tiled) == nullptr, "make_tensor_map");
    run(load_box<Config>, {dim3(1), 32, Config::kBytes + 8}, p, {seed});
    Tiled to = tiled;
    to.gmem = written.data();
    make_tensor_map(p.map, to);
    run(store_box<Config>, {dim3(1), 32, Config::kBytes}, p, {seed});
    std::vector<uint8_t> expected(content.size(), 0xff);
    const auto* loaded = reinterpret_cast<const uint8_t*>(out.data());
    for (int row = 0; row < 16; ++row) {
      for (int byte = 0; byte < kRowBytes; ++byte) {
        const int in_row = corner.row + row, in_byte = corner.column * kElementBytes + byte;
        const bool is_inside = in_row >= 0 && in_row < kRows && in_byte >= 0 && in_byte < kColumns * kElementBytes;
        const size_t place = kIsSwizzled ? swizzled(row, byte) : row * kRowBytes + byte,
                     global = size_t(in_row) * kStride * kElementBytes + in_byte;
        check::equal(loaded[place], is_inside ? content[global] : 0, "tma_load", row * 1000 + byte);
        if (is_inside) expected[global] = reinterpret_cast<const uint8_t*>(tile.data())[place];
      }
    }
    for (size_t i = 0; i < expected.size(); ++i) check::equal(written[i], expected[i], "tma_store", i);
  }
}

void tensor_map_limits(uint64_t) {
  alignas(16) static uint8_t memory[4096];
  TensorMap map;
  const Tiled good{memory, 8, 64, 64, 8, 64};
  check::that(!make_tensor_map(map, good), "the map is right");
  auto is_refused = [&](auto change) {
    Tiled wrong = good;
    change(wrong);
    return make_tensor_map(map, wrong) != nullptr;
  };
  check::that(is_refused([](Tiled& t) { t.gmem = memory + 8; }), "start");
  check::that(is_refused([](Tiled& t) { t.rows = 0; }), "no rows");
  check::that(is_refused([](Tiled& t) { t.row_stride = 68; }), "stride");
  check::that(is_refused([](Tiled& t) { t.row_stride = 56; }), "rows overlap");
  check::that(is_refused([](Tiled& t) { t.box_rows = 257; }), "box");
  check::that(is_refused([](Tiled& t) { t.box_columns = 32; }), "swizzled row of 64 bytes");
  check::that(is_refused([](Tiled& t) { t.element_bytes = 8; }), "element");
}

void around_clusters(uint64_t seed) {
  for (int cluster : {1, 2, 4, 8}) {
    const int blocks = 8;
    Words values(blocks * 128);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint32_t>(i * 3 + 1);
    Buffer<uint32_t> in("in", values), out("out", values.size());
    Params p;
    p.a = in.data(), p.out = out.data();
    run(pass_around<void>, {dim3(blocks), 32, 1024 + 24, cluster}, p, {seed, seed == 2 ? cluster : 0});
    for (int block = 0; block < blocks; ++block) {
      const int first = block / cluster * cluster, rank = block % cluster;
      const int before = first + (rank + cluster - 1) % cluster, third = first + (rank + 2 * cluster - 2) % cluster;
      for (int i = 0; i < 128; ++i)
        check::equal(out[block * 128 + i], values[before * 128 + i] + values[third * 128 + i], "out", i);
    }
  }
}

template <int kBytes>
void async_rows(uint64_t seed) {
  Words values(64 * 4);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint32_t>(i + 1);
  for (int rows : {64, 40, 1, 0}) {
    Buffer<uint32_t> in("in", Words(values.begin(), values.begin() + rows * 4)), out("out", values.size());  // no byte more
    Params p;
    p.a = in.data(), p.out = out.data(), p.count = rows;
    run(copy_rows<Copied<kBytes>>, {dim3(1), 32, 1024}, p, {seed});
    for (int i = 0; i < 256; ++i) check::equal(out[i], i / 4 < rows ? values[i] : 0, "row", i);
  }
}

// ---- Values

// To the nearest of the 2^16 elements, ties to the even one, by search among all of them.
template <class T>
uint16_t nearest(float value, const std::vector<std::pair<double, uint16_t>>& sorted, double overflow) {
  if (value != value) return 0x7fff;
  if (std::fabs(value) >= overflow) return narrow<T>(value < 0 ? -INFINITY : INFINITY);
  auto above =
      std::lower_bound(sorted.begin(), sorted.end(), std::make_pair(static_cast<double>(std::fabs(value)), uint16_t{0}));
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (above->first == std::fabs(value)) return above->second | sign;
  const auto below = above - 1;
  const double up = above->first - std::fabs(value), down = std::fabs(value) - below->first;
  return (up < down || (up == down && above->second % 2 == 0) ? above->second : below->second) | sign;
}

template <class T>
void conversions(uint64_t seed) {
  constexpr bool kIsBf16 = std::is_same<T, Bf16>::value;
  std::vector<std::pair<double, uint16_t>> sorted;  // magnitudes of the finite elements, from their definition
  for (int bits = 0; bits < 0x8000; ++bits) {
    const int fraction_bits = kIsBf16 ? 7 : 10, bias = kIsBf16 ? 127 : 15;
    const int exponent = bits >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
    if (exponent == 2 * bias + 1) break;
    const double magnitude = exponent ? std::ldexp(1 + std::ldexp(fraction, -fraction_bits), exponent - bias)
                                      : std::ldexp(fraction, 1 - bias - fraction_bits);
    sorted.emplace_back(magnitude, static_cast<uint16_t>(bits));
    check::equal(widen<T>(static_cast<uint16_t>(bits)), magnitude, "widen", bits);
    check::equal(widen<T>(static_cast<uint16_t>(bits | 0x8000)), -magnitude, "widen", bits);
  }
  const double largest = sorted.back().first, overflow = largest + (largest - sorted[sorted.size() - 2].first) / 2;
  sorted.emplace_back(2 * largest, static_cast<uint16_t>(sorted.size()));
  std::vector<float> values = {0.f,
                               -0.f,
                               INFINITY,
                               -INFINITY,
                               NAN,
                               static_cast<float>(overflow),
                               std::nextafter(static_cast<float>(overflow), 0.f),
                               static_cast<float>(largest),
                               -static_cast<float>(largest),
                               1e-45f,
                               -1e-8f,
                               5.9604645e-8f};
  Random random(seed);
  for (int i = 0; i < 3000; ++i) {
    const size_t at = random.below(sorted.size() - 2);
    const auto exact = static_cast<float>(sorted[at].first),
               tie = static_cast<float>((sorted[at].first + sorted[at + 1].first) / 2);
    for (float v : {exact, tie, std::nextafter(tie, 0.f), std::nextafter(tie, INFINITY)}) values.push_back(i % 2 ? v : -v);
  }
  const int pairs = static_cast<int>(values.size() / 2);
  Words words(values.size());
  for (size_t i = 0; i < words.size(); ++i) words[i] = as_bits(values[i]);
  Buffer<uint32_t> in("in", words), out("out", pairs * 4);
  Params p;
  p.a = in.data(), p.out = out.data(), p.count = pairs;
  run(convert<T>, {dim3(1), 32}, p, {seed});
  for (int i = 0; i < pairs; ++i) {
    const uint16_t lo = nearest<T>(values[2 * i], sorted, overflow), hi = nearest<T>(values[2 * i + 1], sorted, overflow);
    check::equal(out[4 * i], lo | uint32_t{hi} << 16, "pack2", i);
    check::equal(out[4 * i + 1], lo | uint32_t{hi} << 16, "narrow", i);
    check::equal(as_float(out[4 * i + 2]), widen<T>(lo), "unpack2 x", i);
    check::equal(as_float(out[4 * i + 3]), widen<T>(hi), "unpack2 y", i);
  }
}

void reductions(uint64_t seed) {
  Random random(seed);
  Words words(64);
  for (auto& word : words) word = as_bits(static_cast<float>(random.below(1 << 24)) / 3000 - 2000);
  Buffer<uint32_t> in("in", words), out("out", 256);
  Params p;
  p.a = in.data(), p.out = out.data();
  run(reduce<void>, {dim3(1), 64}, p, {seed});
  for (int thread = 0; thread < 64; ++thread) {
    float quad[4], largest = -INFINITY, largest_of_quad = -INFINITY;
    for (int i = 0; i < 4; ++i)
      quad[i] = as_float(words[thread / 4 * 4 + i]), largest_of_quad = std::max(largest_of_quad, quad[i]);
    check::equal(as_float(out[thread * 4]), (quad[0] + quad[1]) + (quad[2] + quad[3]), "quad_sum", thread);
    check::equal(as_float(out[thread * 4 + 2]), largest_of_quad, "quad_max", thread);
    float sums[32];
    for (int i = 0; i < 32; ++i) sums[i] = as_float(words[thread / 32 * 32 + i]), largest = std::max(largest, sums[i]);
    for (int count = 32; count > 1; count /= 2) {  // neighbours first
      for (int i = 0; i < count / 2; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
    }
    check::equal(as_float(out[thread * 4 + 1]), sums[0], "warp_sum", thread);
    check::equal(as_float(out[thread * 4 + 3]), largest, "warp_max", thread);
  }
}

void loads_and_stores(uint64_t seed) {
  Words words(128);
  for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(i + 1);
  Buffer<uint32_t> in("in", words), out("out", 640);
  Params p;
  p.a = in.data(), p.out = out.data();
  run(move16<void>, {dim3(1), 32}, p, {seed});
  for (int i = 0; i < 640; ++i) check::equal(out[i], words[i % 128], "out", i);
}

// ---- Blocks and grids

void grid_barriers(uint64_t seed) {
  constexpr int kBlocks = 7, kRounds = 4;
  Buffer<uint32_t> out("out", 7 + 8 + 1);  // the places start at element 7 of a buffer shifted so that they are aligned
  Buffer<uint32_t> shifted("shifted", 7 + 8, 1);
  Buffer<uint64_t> counter("counter", 1);
  counter[0] = 0;
  Params p;
  p.out = shifted.data(), p.counter = counter.data(), p.count = kRounds;
  for (int replay = 0; replay < 2; ++replay)
    run(barrier_rounds<void>, {dim3(kBlocks), 64, 0, 1, true}, p, {seed});  // no reset
  for (int i = 0; i < kBlocks; ++i) check::equal(shifted[i], kRounds, "right reads", i);
  check::equal(static_cast<double>(counter[0]), 2. * 2 * kRounds * kBlocks, "counter");
}

void tickets(uint64_t seed) {
  for (int resident : {0, 1, 2}) {
    constexpr int kItems = 20;
    Buffer<uint32_t> out("out", kItems + 1);
    Buffer<uint64_t> counter("counter", 1);
    counter[0] = 0, out[kItems] = 0;
    Params p;
    p.out = out.data(), p.counter = counter.data(), p.count = kItems;
    run(chain_of_tickets<void>, {dim3(5), 32}, p, {seed, resident});
    for (int i = 0; i < kItems; ++i) check::equal(out[i], i + 1, "item", i);
  }
}

void dependent_grids(uint64_t seed) {
  for (bool is_dependent : {true, false}) {
    Buffer<uint32_t> weight("weight", Words{2}), out("out", 2 * 3 * 64);
    Params p;
    p.a = weight.data(), p.out = out.data();
    launch(fill<void>, {dim3(3), 64}, p);
    launch(double_filled<void>, {dim3(3), 64, 0, 1, false, is_dependent}, p);
    emulator::synchronize({seed});
    for (int i = 0; i < 192; ++i) check::equal(out[192 + i], 2 * (i + 1), "out", i);
  }
}

void named_barriers(uint64_t seed) {
  Buffer<uint32_t> out("out", 96);
  Params p;
  p.out = out.data(), p.count = 5;
  run(hand_over<void>, {dim3(2), 96, 128}, p, {seed});
  for (int i = 32; i < 96; ++i) check::equal(out[i], 1000 + 5 * (31 - i % 32), "sum", i);
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments,
                    {
                        {"mma_m16n8k16 bf16", dense<Bf16>},
                        {"mma_m16n8k16 fp16", dense<Fp16>},
                        {"mma_m16n8k8_tf32", tf32},
                        {"mma_sp_m16n8k32 bf16, selector 0", sparse<Bf16, 0>},
                        {"mma_sp_m16n8k32 bf16, selector 1", sparse<Bf16, 1>},
                        {"mma_sp_m16n8k32 fp16, selector 0", sparse<Fp16, 0>},
                        {"mma_sp_m16n8k32 fp16, selector 1", sparse<Fp16, 1>},
                        {"ldmatrix, stmatrix", matrices_of_each_count<false>},
                        {"ldmatrix, stmatrix transposed", matrices_of_each_count<true>},
                        {"wgmma, a K-major, b K-major", tiles_of_each_width<Major::k, Major::k>},
                        {"wgmma, a K-major, b MN-major", tiles_of_each_width<Major::k, Major::mn>},
                        {"wgmma, b MN-major in narrow rows", narrow_tiles},
                        {"wgmma, a MN-major, b K-major", tiles_of_each_width<Major::mn, Major::k>},
                        {"wgmma, a MN-major, b MN-major", tiles_of_each_width<Major::mn, Major::mn>},
                        {"tma boxes, swizzled", boxes<2, 64, true>},
                        {"tma boxes of floats, swizzled", boxes<4, 32, true>},
                        {"tma boxes of floats, plain", boxes<4, 8, false>},
                        {"make_tensor_map", tensor_map_limits},
                        {"clusters, bulk copies", around_clusters},
                        {"copy16_async", async_rows<16>},
                        {"copy4_async", async_rows<4>},
                        {"conversions bf16", conversions<Bf16>},
                        {"conversions fp16", conversions<Fp16>},
                        {"reductions", reductions},
                        {"loads and stores", loads_and_stores},
                        {"grid_barrier", grid_barriers},
                        {"tickets", tickets},
                        {"dependent grids", dependent_grids},
                        {"named barriers", named_barriers},
                    });
}
