// Is the emulator right about the instructions? One tiny kernel per primitive (tests/emulator/primitives.cu) writes raw
// registers or memory, and a GEMM uses them together; built by nvcc this program runs them on a GPU, built by the host compiler
// in the emulator, on the same whole numbers. Both write a file, and bench/conformance/compare.py wants the same bits in them.
//
//   conformance FILE [FIRST]      each case: u32 length of its name, the name, u32 number of words, the words
//
// After a case that crashed or hung, FIRST goes on with the next one: the file then has no words of that case.
#include "gemm.cu"
#include "primitives.cu"

#include <functional>
#include <random>
#include <string>

#include "global_memory.h"

namespace conformance {

using namespace primitives;
using Words = std::vector<uint32_t>;

#ifdef __CUDACC__
constexpr int kRounds = 10000, kGridBlocks = 128, kItems = 20000, kPairs = 200;
#else
constexpr int kRounds = 100, kGridBlocks = 8, kItems = 40, kPairs = 3;  // the answers do not depend on how many
#endif

struct Case {
  std::string name;
  int arch;
  std::function<void(Words&)> run;  // appends what the kernel wrote
};

void start(void (*kernel)(Params), Launch shape, const Params& params) {
  shape.stream = stream();
  if (const char* error = launch(kernel, shape, params)) {
    fprintf(stderr, "conformance: launch: %s\n", error);
    exit(3);
  }
}

void append(Words& out, const Words& words) { out.insert(out.end(), words.begin(), words.end()); }

// ---- inputs: the same words everywhere

template <class T>
uint16_t element(int value) {  // |value| up to 64, exactly
  constexpr bool kIsBf16 = std::is_same<T, Bf16>::value;
  constexpr int kFraction = kIsBf16 ? 7 : 10, kBias = kIsBf16 ? 127 : 15;
  if (value == 0) return 0;
  const int size = value < 0 ? -value : value;
  int exponent = 0;
  while (size >> (exponent + 1)) ++exponent;
  const int fraction = (size << kFraction >> exponent) - (1 << kFraction);
  return static_cast<uint16_t>((value < 0) << 15 | (exponent + kBias) << kFraction | fraction);
}

uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

int whole(std::mt19937& random) { return static_cast<int>(random() % 17) - 8; }

template <class T>
Words elements(size_t words, std::mt19937& random) {
  Words all(words);
  for (uint32_t& word : all) {
    const uint32_t low = element<T>(whole(random));
    word = low | uint32_t{element<T>(whole(random))} << 16;
  }
  return all;
}

Words floats(size_t words, std::mt19937& random, uint32_t also = 0) {
  Words all(words);
  for (uint32_t& word : all) word = float_bits(static_cast<float>(whole(random))) | also;
  return all;
}

Words counted(size_t words, uint32_t step = 2654435761u) {
  Words all(words);
  for (size_t i = 0; i < words; ++i) all[i] = static_cast<uint32_t>(i + 1) * step;
  return all;
}

// ---- one warp

template <class Config>
void product(Words& out, Words a, const Words& b, std::mt19937& random, const Words& metadata = Words(32)) {
  append(a, metadata);
  Array<uint32_t> gmem_a("a", a), gmem_b("b", b), gmem_c("c", floats(128, random)), d("d", 128);
  Params p;
  p.a = gmem_a.data(), p.b = gmem_b.data(), p.c = gmem_c.data(), p.out = d.data();
  start(mma<Config>, {dim3(1), 32}, p);
  finish();
  append(out, d.values());
}

template <class T>
void dense(Words& out) {
  std::mt19937 random(1);
  const Words a = elements<T>(128, random), b = elements<T>(64, random);
  product<Dense<T>>(out, a, b, random);
}

void tf32(Words& out) {  // the lower 13 bits are set: nobody reads them
  std::mt19937 random(2);
  const Words a = floats(128, random, 0x1fff), b = floats(64, random, 0x1fff);
  product<Tf32>(out, a, b, random);
}

template <class T, int kSelector>
void sparse(Words& out) {
  constexpr uint32_t kPairs[6] = {0x4, 0x8, 0xc, 0x9, 0xd, 0xe};  // two of four, in order: first in the lower two bits
  std::mt19937 random(3);
  const Words a = elements<T>(128, random), b = elements<T>(128, random);
  Words metadata(32);
  for (int lane = 0; lane < 32; ++lane) {
    if (lane % 4 / 2 != kSelector) {
      metadata[lane] = random();  // not read
      continue;
    }
    for (int four = 0; four < 8; ++four) metadata[lane] |= kPairs[random() % 6] << (4 * four);
  }
  product<Sparse<T, kSelector>>(out, a, b, random, metadata);
}

template <class Config>
void loaded_matrices(Words& out) {
  Array<uint32_t> block("block", counted(128)), r("registers", 32 * Config::kCount);
  Params p;
  p.a = block.data(), p.out = r.data();
  start(load_matrices<Config>, {dim3(1), 32, 512}, p);
  finish();
  append(out, r.values());
}

template <class Config>
void stored_matrices(Words& out) {
  Array<uint32_t> r("registers", counted(32 * Config::kCount)), block("block", 128);
  Params p;
  p.a = r.data(), p.out = block.data();
  start(store_matrices<Config>, {dim3(1), 32, 512}, p);
  finish();
  append(out, block.values());
}

template <int kBytes>
void copied_rows(Words& out) {
  for (int rows : {64, 40, 1, 0}) {
    Array<uint32_t> in("in", counted(256)), rows_out("out", 256);
    Params p;
    p.a = in.data(), p.out = rows_out.data(), p.count = rows;
    start(copy_rows<Copied<kBytes>>, {dim3(1), 32, 1024}, p);
    finish();
    append(out, rows_out.values());
  }
}

void moved(Words& out) {
  Array<uint32_t> in("in", counted(128)), values("out", 640);
  Params p;
  p.a = in.data(), p.out = values.data();
  start(move16<void>, {dim3(1), 32}, p);
  finish();
  append(out, values.values());
}

// Every float that lies at, or next to, an element or half way between two: the upper 16 bits run through all values.
template <class T>
void converted(Words& out) {
  Words in;
  for (uint32_t high = 0; high < 0x10000; high += 3) {
    for (uint32_t low : {0x0000u, 0x0001u, 0x1000u, 0x2000u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) in.push_back(high << 16 | low);
  }
  const int pairs = static_cast<int>(in.size() / 2);
  Array<uint32_t> gmem("in", in), values("out", 4 * pairs);
  Params p;
  p.a = gmem.data(), p.out = values.data(), p.count = pairs;
  start(convert<T>, {dim3(1), 32}, p);
  finish();
  append(out, values.values());
}

void reduced(Words& out) {
  std::mt19937 random(4);
  Words in(64);
  for (uint32_t& word : in) word = float_bits(static_cast<float>(random() % (1 << 24)) / 4096 - 2000);  // the order matters
  Array<uint32_t> gmem("in", in), values("out", 256);
  Params p;
  p.a = gmem.data(), p.out = values.data();
  start(reduce<void>, {dim3(1), 64}, p);
  finish();
  append(out, values.values());
}

void handed_over(Words& out) {
  Array<uint32_t> values("out", 96);
  Params p;
  p.out = values.data(), p.count = 100;
  start(hand_over<void>, {dim3(1), 96, 128}, p);
  finish();
  append(out, values.values());
}

// ---- one warpgroup: any whole numbers make a tile, in whatever order its layout reads them

template <class Config>
void multiplied(Words& out) {
  std::mt19937 random(5);
  Array<uint32_t> image("image", elements<typename Config::T>(Config::kBytes / 4, random)), d("d", 64 * Config::kN);
  Params p;
  p.a = image.data(), p.out = d.data();
  start(multiply_tiles<Config>, {dim3(1), 128, Config::kBytes}, p);
  finish();
  append(out, d.values());
}

// ---- the copy engine

template <int kElementBytes, int kBoxColumns, bool kIsSwizzled>
void boxes(Words& out) {
  constexpr int kRows = 40, kColumns = 72, kStride = 80;
  using Config = Box<16, kBoxColumns * kElementBytes>;
  constexpr int kCorners[][2] = {{0, 0}, {8, 8}, {-3, -8}, {30, 64}, {36, 70}, {-16, 0}, {40, 0}, {0, 72}, {-100, -100}};
  for (const auto& corner : kCorners) {
    constexpr size_t kWords = kRows * kStride * kElementBytes / 4;
    Array<uint32_t> matrix("matrix", counted(kWords)), written("written", kWords);
    Array<uint32_t> tile("tile", counted(Config::kBytes / 4, 40503u)), loaded("loaded", Config::kBytes / 4);
    Params p;
    p.row = corner[0], p.column = corner[1], p.a = tile.data(), p.out = loaded.data();
    Tiled tiled{matrix.data(), kRows, kColumns, kStride, 16, kBoxColumns, kElementBytes, kIsSwizzled};
    const char* error = make_tensor_map(p.map, tiled);
    if (!error) {
      start(load_box<Config>, {dim3(1), 32, Config::kBytes + 8}, p);
      finish();
      tiled.gmem = written.data();
      error = make_tensor_map(p.map, tiled);
    }
    if (error) {
      fprintf(stderr, "conformance: make_tensor_map: %s\n", error);
      exit(3);
    }
    start(store_box<Config>, {dim3(1), 32, Config::kBytes}, p);
    finish();
    append(out, loaded.values());
    append(out, written.values());
  }
}

void passed_around(Words& out) {
  for (int cluster : {1, 2, 4, 8}) {
    Array<uint32_t> in("in", counted(8 * 128)), values("out", 8 * 128);
    Params p;
    p.a = in.data(), p.out = values.data();
    start(pass_around<void>, {dim3(8), 32, 1024 + 24, cluster}, p);
    finish();
    append(out, values.values());
  }
}

void pipelined_gemm(Words& out) {  // a ring of slots, setmaxnreg, TMA both ways; ragged in all three sizes
  constexpr int kM = 200, kN = 264, kK = 328;
  std::mt19937 random(6);
  const auto ternary = [&](size_t count) {
    std::vector<uint16_t> values(count);
    for (uint16_t& v : values) v = element<Bf16>(static_cast<int>(random() % 3) - 1);
    return values;
  };
  Array<uint16_t> a("a", ternary(kM * kK)), b("b", ternary(kN * kK)), c("c", kM * kN);
  if (const char* error = gemm_test::launch_gemm(a.data(), b.data(), c.data(), kM, kN, kK, 3)) {
    fprintf(stderr, "conformance: launch_gemm: %s\n", error);
    exit(3);
  }
  finish();
  for (uint16_t v : c.values()) out.push_back(v);
}

// ---- grids: how many answers are wrong

void barriers(Words& out) {
  Array<uint32_t> places("out", 2 * kGridBlocks);
  Array<uint64_t> counter("counter", 1);
  counter.fill(0);
  Params p;
  p.out = places.data(), p.counter = counter.data(), p.count = kRounds;
  for (int replay = 0; replay < 2; ++replay) {  // the counter is not reset
    Launch shape{dim3(kGridBlocks), 64};
    shape.is_cooperative = true;
    start(barrier_rounds<void>, shape, p);
    finish();
    const Words right = places.values();
    uint32_t wrong = 0;
    for (int block = 0; block < kGridBlocks; ++block) wrong += kRounds - right[block];
    out.push_back(wrong);
  }
  out.push_back(static_cast<uint32_t>(counter.values()[0] / (uint64_t{4} * kRounds)) - kGridBlocks);
}

void tickets(Words& out) {
  Array<uint32_t> items("out", kItems + 1);
  Array<uint64_t> ticket("ticket", 1);
  items.fill(0), ticket.fill(0);
  Params p;
  p.out = items.data(), p.counter = ticket.data(), p.count = kItems;
  start(chain_of_tickets<void>, {dim3(kGridBlocks), 32}, p);
  finish();
  const Words drawn = items.values();
  uint32_t wrong = 0;
  for (int i = 0; i < kItems; ++i) wrong += drawn[i] != static_cast<uint32_t>(i + 1);
  out.push_back(wrong);
}

void dependent(Words& out) {
  constexpr int kBlocks = 16, kCount = kBlocks * 64;
  uint32_t wrong = 0;
  for (int pair = 0; pair < kPairs; ++pair) {
    Array<uint32_t> weight("weight", Words{2}), values("out", 2 * kCount);
    Params p;
    p.a = weight.data(), p.out = values.data();
    start(fill<void>, {dim3(kBlocks), 64}, p);
    Launch second{dim3(kBlocks), 64};
    second.is_dependent = true;
    start(double_filled<void>, second, p);
    finish();
    const Words found = values.values();
    for (int i = 0; i < kCount; ++i) wrong += found[kCount + i] != static_cast<uint32_t>(2 * (i + 1));
    if (pair == kPairs - 1) append(out, found);
  }
  out.push_back(wrong);
}

// ---- all of them

template <class T, int kN>
void add_tiles(std::vector<Case>& all, const char* type) {
  const std::string name = std::string("wgmma ") + type + ", n " + std::to_string(kN);
  all.push_back({name + ", a K-major, b K-major", 90, multiplied<Tiles<T, kN, Major::k, Major::k>>});
  all.push_back({name + ", a K-major, b MN-major", 90, multiplied<Tiles<T, kN, Major::k, Major::mn>>});
  all.push_back({name + ", a MN-major, b K-major", 90, multiplied<Tiles<T, kN, Major::mn, Major::k>>});
  all.push_back({name + ", a MN-major, b MN-major", 90, multiplied<Tiles<T, kN, Major::mn, Major::mn>>});
  if constexpr (kN < 64) all.push_back({name + ", b MN-major in narrow rows", 90, multiplied<NarrowTiles<T, kN>>});
}

std::vector<Case> cases() {
  std::vector<Case> all = {
      {"loads and stores", 80, moved},
      {"conversions bf16", 80, converted<Bf16>},
      {"conversions fp16", 80, converted<Fp16>},
      {"reductions", 80, reduced},
      {"mma bf16", 80, dense<Bf16>},
      {"mma fp16", 80, dense<Fp16>},
      {"mma tf32", 80, tf32},
      {"mma.sp bf16, selector 0", 80, sparse<Bf16, 0>},
      {"mma.sp bf16, selector 1", 80, sparse<Bf16, 1>},
      {"mma.sp fp16, selector 0", 80, sparse<Fp16, 0>},
      {"mma.sp fp16, selector 1", 80, sparse<Fp16, 1>},
      {"ldmatrix x1", 80, loaded_matrices<Matrices<1, false>>},
      {"ldmatrix x2", 80, loaded_matrices<Matrices<2, false>>},
      {"ldmatrix x4", 80, loaded_matrices<Matrices<4, false>>},
      {"ldmatrix x1, transposed", 80, loaded_matrices<Matrices<1, true>>},
      {"ldmatrix x2, transposed", 80, loaded_matrices<Matrices<2, true>>},
      {"ldmatrix x4, transposed", 80, loaded_matrices<Matrices<4, true>>},
      {"cp.async, zero fill", 80, copied_rows<16>},
      {"cp.async of words, zero fill", 80, copied_rows<4>},
      {"named barriers", 80, handed_over},
      {"grid barrier", 80, barriers},
      {"tickets", 80, tickets},
      {"stmatrix x1", 90, stored_matrices<Matrices<1, false>>},
      {"stmatrix x2", 90, stored_matrices<Matrices<2, false>>},
      {"stmatrix x4", 90, stored_matrices<Matrices<4, false>>},
      {"stmatrix x1, transposed", 90, stored_matrices<Matrices<1, true>>},
      {"stmatrix x2, transposed", 90, stored_matrices<Matrices<2, true>>},
      {"stmatrix x4, transposed", 90, stored_matrices<Matrices<4, true>>},
      {"tma box, swizzled", 90, boxes<2, 64, true>},
      {"tma box of floats, swizzled", 90, boxes<4, 32, true>},
      {"tma box of floats, plain", 90, boxes<4, 8, false>},
      {"clusters, bulk copies to a peer", 90, passed_around},
      {"dependent launch", 90, dependent},
      {"gemm of all of them", 90, pipelined_gemm},
  };
  add_tiles<Bf16, 16>(all, "bf16"), add_tiles<Fp16, 16>(all, "fp16");
  add_tiles<Bf16, 32>(all, "bf16"), add_tiles<Fp16, 32>(all, "fp16");
  add_tiles<Bf16, 64>(all, "bf16"), add_tiles<Fp16, 64>(all, "fp16");
  add_tiles<Bf16, 128>(all, "bf16"), add_tiles<Fp16, 128>(all, "fp16");
  add_tiles<Bf16, 256>(all, "bf16"), add_tiles<Fp16, 256>(all, "fp16");
  return all;
}

// sm_90a code runs on 9.0 alone; elsewhere its cases are left out.
int arch_here() {
#ifdef __CUDACC__
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "device 0");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "device 0");
  return major * 10 + minor;
#else
  return 90;
#endif
}

bool write(FILE* file, const std::string& case_name, const Words& words) {
  const uint32_t name = static_cast<uint32_t>(case_name.size()), count = static_cast<uint32_t>(words.size());
  return fwrite(&name, 4, 1, file) == 1 && fwrite(case_name.data(), 1, name, file) == name && fwrite(&count, 4, 1, file) == 1 &&
         fwrite(words.data(), 4, count, file) == count && fflush(file) == 0;
}

int write_all(const char* path, size_t first) {
  FILE* file = fopen(path, first ? "ab" : "wb");
  if (!file) return perror(path), 2;
  const int arch = arch_here();
  const std::vector<Case> all = cases();
  if (first > all.size()) return 2;
  bool is_written = first == 0 || write(file, all[first - 1].name, {});
  for (size_t i = first; i < all.size(); ++i) {
    if (all[i].arch > 80 && all[i].arch != arch) continue;
    fprintf(stderr, "case %zu %s\n", i, all[i].name.c_str());  // the last one named is the one that hangs
    Words words;
    all[i].run(words);
    is_written = is_written && write(file, all[i].name, words);
  }
  return fclose(file) == 0 && is_written ? 0 : 2;
}

}  // namespace conformance

int main(int count, char** arguments) {
  if (count != 2 && count != 3) return fprintf(stderr, "usage: conformance FILE [FIRST]\n"), 2;
  return conformance::write_all(arguments[1], count == 3 ? strtoul(arguments[2], nullptr, 10) : 0);
}
